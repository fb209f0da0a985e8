"""Feature pyramids: the same as the top-down pass written out, on bodies of several shapes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones import create
from lab.backbones.backbone import Staged
from lab.backbones.cost import parameters
from lab.backbones.fpn import FPN, area_means, overlaps, resnet_fpn

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pyramid(width=5, kernels=(3, 3, 3), strides=(1, 2, 2), channels=(4, 6, 8)):
    """A pyramid on plain convolutions."""
    torch.manual_seed(0)
    stages = [
        nn.Conv2d(before, after, kernel, stride, kernel // 2)
        for before, after, kernel, stride in zip((2, *channels), channels, kernels, strides)
    ]
    return FPN(Staged(stages, channels, nn.Linear(channels[-1], 3), 3), width)


def nearest(maps, height, width):
    """Every place of the larger map takes that of the smaller one where its upper left corner falls."""
    rows = [row * maps.shape[2] // height for row in range(height)]
    columns = [column * maps.shape[3] // width for column in range(width)]
    return maps[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize("size", [16, 15, 10])
def test_the_pyramid_is_the_top_down_pass(size):
    neck, images = pyramid(), noise(2, 2, size, size)
    fine, middle, coarse = neck.body.features(images)
    top = neck.laterals[2](coarse)
    between = neck.laterals[1](middle) + nearest(top, *middle.shape[2:])
    bottom = neck.laterals[0](fine) + nearest(between, *fine.shape[2:])
    expected = [smooth(maps) for smooth, maps in zip(neck.smooth, (bottom, between, top), strict=True)]
    for found, wanted in zip(neck.features(images), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_its_convolutions_are_those_of_the_paper():
    neck = pyramid()
    assert [(lateral.in_channels, lateral.kernel_size) for lateral in neck.laterals] == [(channels, (1, 1)) for channels in (4, 6, 8)]
    assert all(smooth.kernel_size == (3, 3) for smooth in neck.smooth)
    added = sum((channels + 1) * 5 + (9 * 5 + 1) * 5 for channels in (4, 6, 8))
    assert parameters(neck) - parameters(neck.body) == added
    assert parameters(neck.body) == sum((9 * before + 1) * after for before, after in ((2, 4), (4, 6), (6, 8)))  # its head is gone


@pytest.mark.parametrize(("size", "sides"), [(28, [28, 14, 7]), (84, [28, 14, 7]), (30, [30, 15, 8]), (10, [10, 5, 3])])
def test_the_maps_are_as_large_as_those_of_the_body(size, sides):
    backbone = create("fpn", 3, size, width=6)
    maps = backbone.features(noise(2, 3, size, size))
    assert [tuple(each.shape[1:]) for each in maps] == [(6, side, side) for side in sides]
    assert backbone.out_channels == (6, 6, 6)
    assert backbone(noise(2, 3, size, size)).shape == (2, 6) == (2, backbone.out_features)


def test_sizes_are_as_the_docstring_says():
    assert (parameters(create("fpn", 1, 28)), parameters(create("fpn", 4, 84))) == (201_072, 204_064)


def test_any_backbone_can_be_the_body():
    neck = FPN(create("nature", 2, 84), 6)
    assert [tuple(each.shape[1:]) for each in neck.features(noise(1, 2, 84, 84))] == [(6, 20, 20), (6, 9, 9), (6, 7, 7)]
    assert neck(noise(1, 2, 84, 84)).shape == (1, 6)


# The vector


@pytest.mark.parametrize("size", [16, 15, 10])
def test_the_vector_is_the_mean_over_levels_of_their_means(size):
    neck, images = pyramid(), noise(2, 2, size, size)
    means = [maps.flatten(2).mean(2) for maps in neck.features(images)]
    torch.testing.assert_close(neck(images), (means[0] + means[1] + means[2]) / 3)


@pytest.mark.parametrize("hidden", [None, 0, 4])
def test_every_level_takes_part_whatever_the_head(hidden):
    backbone = create("fpn", 2, 12, hidden=hidden, width=6)
    images = noise(3, 2, 12, 12)
    vector = backbone(images)
    assert vector.shape == (3, {None: 6, 0: 6 * 3 * 3, 4: 4}[hidden]) == (3, backbone.out_features)
    assert [maps.shape[-1] for maps in backbone.features(images)] == [12, 6, 3]
    vector.square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert all(parameter.grad.abs().sum() > 0 for part in (backbone.laterals, backbone.smooth) for parameter in part.parameters())


def test_a_dense_head_sees_where_the_fine_maps_are_bright():
    neck = pyramid()
    neck.head = nn.Flatten()
    images = noise(1, 2, 16, 16)
    maps = neck.features(images)
    expected = sum(F.avg_pool2d(each, each.shape[-1] // 4) for each in maps) / 3
    torch.testing.assert_close(neck(images), expected.flatten(1))


def test_fine_tuning_finds_the_parts_of_the_body_first():
    neck = pyramid()
    parts = neck.sequence
    assert parts == [*neck.body.stages, *neck.laterals, *neck.smooth, neck.head]
    assert {id(weight) for part in parts for weight in part.parameters()} == {id(weight) for weight in neck.parameters()}


# Means over areas


@pytest.mark.parametrize(("fine", "coarse"), [(28, 7), (14, 7), (7, 7), (12, 1)])
def test_where_sizes_divide_area_means_are_pooling(fine, coarse):
    maps = noise(2, 3, fine, fine)
    torch.testing.assert_close(area_means(maps, coarse, coarse), F.adaptive_avg_pool2d(maps, coarse))


@pytest.mark.parametrize(("fine", "coarse"), [(15, 8), (20, 9), (10, 3), (5, 3), (9, 7)])
def test_elsewhere_they_are_pooling_of_places_cut_into_parts(fine, coarse):
    """Cut every place into as many as the coarse map has: then the sizes divide."""
    maps = noise(2, 3, fine, 2 * fine)
    parts = maps.repeat_interleave(coarse, 2).repeat_interleave(coarse, 3)
    expected = F.avg_pool2d(parts, (fine, 2 * fine))
    torch.testing.assert_close(area_means(maps, coarse, coarse), expected)
    torch.testing.assert_close(area_means(maps, coarse, coarse).mean((2, 3)), maps.mean((2, 3)))
    torch.testing.assert_close(overlaps(fine, coarse, maps).sum(1), torch.ones(coarse))


def test_the_norm_of_the_body_can_be_chosen():
    kinds = {norm: {type(part) for part in resnet_fpn(1, 12, norm=norm).modules()} for norm in ("group", "batch", "none")}
    assert nn.BatchNorm2d in kinds["batch"]
    assert nn.GroupNorm in kinds["group"]
    assert not {nn.BatchNorm2d, nn.GroupNorm} & kinds["none"]
