"""VGG: the paper's counts of weights, the reach of stacked 3x3 convolutions, and the whole against plain operations."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.vgg import DENSE, VGG, row, vgg_small

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (64, 128, 256, 512, 512)


def weights(module):
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize(
    ("depths", "convolutions"),
    [((1, 1, 2, 2, 2), 9_220_480), ((2, 2, 2, 2, 2), 9_404_992), ((2, 2, 3, 3, 3), 14_714_688), ((2, 2, 4, 4, 4), 20_024_384)],
)
def test_configurations_a_b_d_and_e_have_the_weights_of_the_paper(depths, convolutions):
    with torch.device("meta"):
        assert weights(VGG(3, 32, WIDTHS, depths, norm="none").stages) == convolutions


@pytest.mark.parametrize("channels", [1, 4])
def test_the_small_one_has_the_weights_that_its_layers_have(channels):
    pairs = [(channels, 24), (24, 24), (24, 48), (48, 48), (48, 96), (96, 96), (96, 96)]
    dense = [(96 * 3 * 3, DENSE), (DENSE, DENSE)]
    expected = sum(9 * i * o + o for i, o in pairs) + sum(i * o + o for i, o in dense)
    assert weights(vgg_small(channels, 28, norm="none")) == expected
    assert weights(vgg_small(channels, 28)) == expected + sum(o for _, o in pairs)  # a gain and a shift in place of a bias


def test_three_small_kernels_have_fewer_weights_than_a_large_one_as_section_2_3_counts():
    width = 16
    three = sum(each.numel() for each in nn.Sequential(*row(width, width, 3, "none")).parameters()) - 3 * width
    assert three == 27 * width**2
    assert 49 * width**2 / three == pytest.approx(1.81, abs=0.01)  # "81 % more"


@pytest.mark.parametrize(("depth", "reach"), [(1, 3), (2, 5), (3, 7)])
def test_stacked_small_kernels_reach_as_far_as_a_large_one(depth, reach):
    layers, maps = nn.Sequential(*row(2, 4, depth, "none")), torch.rand(1, 2, 11, 11, requires_grad=True)
    for layer in layers:
        nn.init.ones_(layer[0].weight)  # nothing cancels, no unit is dead
    (gradient,) = torch.autograd.grad(layers(maps)[0, :, 5, 5].sum(), maps)
    seen = gradient[0].abs().sum(0) > 0
    expected = torch.zeros(11, 11, dtype=torch.bool)
    expected[5 - reach // 2 : 6 + reach // 2, 5 - reach // 2 : 6 + reach // 2] = True
    assert seen.equal(expected)


def test_small_images_meet_no_kernel_but_3x3():
    kernels = {layer.kernel_size for layer in vgg_small(1, 28).modules() if isinstance(layer, nn.Conv2d)}
    assert kernels == {(3, 3)}


@pytest.mark.parametrize(
    ("size", "sides"), [(8, (8, 4, 2)), (10, (10, 5, 2)), (15, (15, 7, 3)), (28, (28, 14, 7)), (84, (28, 14, 7)), (128, (26, 13, 6))]
)
def test_sizes_of_the_maps(size, sides):
    network = vgg_small(3, size).eval()
    maps = network.features(torch.rand(1, 3, size, size))
    assert [tuple(each.shape[1:]) for each in maps] == [(channels, side, side) for channels, side in zip((24, 48, 96), sides)]
    assert network(torch.rand(2, 3, size, size)).shape == (2, network.out_features) == (2, DENSE)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_the_whole_is_the_layers_in_a_row(norm):
    torch.manual_seed(0)
    network = VGG(2, 12, (8, 16), (2, 1), norm=norm, dropout=0.0).double()
    images = torch.rand(3, 2, 12, 12, dtype=torch.float64, requires_grad=True)
    kinds = nn.Conv2d, nn.Linear, nn.GroupNorm, nn.BatchNorm2d
    layers = iter([layer for layer in network.modules() if isinstance(layer, kinds)])

    def rectified(maps):
        layer = next(layers)
        maps = F.conv2d(maps, layer.weight, layer.bias, padding=1)
        if norm != "none":
            scale = next(layers)
            nn.init.normal_(scale.weight)
            nn.init.normal_(scale.bias)
            groups = (3, -1, 8, *maps.shape[2:])  # of eight channels each
            spread = (0, 2, 3) if norm == "batch" else (2, 3, 4)
            parts = maps if norm == "batch" else maps.reshape(groups)
            parts = (parts - parts.mean(spread, True)) / (parts.var(spread, correction=0, keepdim=True) + 1e-5).sqrt()
            maps = parts.reshape(maps.shape) * scale.weight[:, None, None] + scale.bias[:, None, None]
        return maps.clamp(min=0)

    maps = rectified(F.max_pool2d(rectified(rectified(images)), 2))
    expected = F.max_pool2d(maps, 2).flatten(1)
    for layer in layers:
        expected = layer(expected).clamp(min=0)
    found, values = network(images), [images, *network.parameters()]
    torch.testing.assert_close(found, expected)
    for mine, other in zip(torch.autograd.grad(found.square().sum(), values), torch.autograd.grad(expected.square().sum(), values)):
        torch.testing.assert_close(mine, other)


def test_dropout_is_as_asked():
    for dropout in (0.5, 0.1):
        assert [layer.p for layer in vgg_small(1, 28, dropout=dropout).modules() if isinstance(layer, nn.Dropout)] == [dropout] * 2


def test_every_width_is_twice_the_one_before():
    assert all(after == 2 * before for before, after in itertools.pairwise(vgg_small(1, 28).out_channels))
