"""Backbones: by name, of the sizes that their papers say, and the same functions as plain layers in a row."""

import pytest
import torch
from torch import nn

from lab.backbones import REGISTRY, Backbone, create, list_backbones
from lab.backbones.nature import blocks
from lab.config import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = sorted(REGISTRY)


def images(channels, size, count=2):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(size))


def weights(module):
    return sum(weight.numel() for weight in module.parameters())


# By name


@pytest.mark.parametrize("name", NAMES)
def test_every_name_gives_a_backbone(name):
    backbone = create(name, in_channels=3, image_size=84)
    assert isinstance(backbone, Backbone)
    assert backbone(images(3, 84)).shape == (2, backbone.out_features)


@pytest.mark.parametrize(("wrong", "meant"), [("natur", "nature"), ("Nature", "nature"), ("smal", "small")])
def test_the_nearest_name_is_told(wrong, meant):
    with pytest.raises(UserError, match=f"no backbone is called '{wrong}'; did you mean .*{meant}"):
        create(wrong, 4, 84)


def test_a_name_like_no_other_is_answered_by_all_there_are():
    with pytest.raises(UserError, match=f"no backbone is called 'xyzzy'; there are {', '.join(NAMES)}"):
        create("xyzzy", 4, 84)


def test_names_are_listed_by_a_pattern():
    assert list_backbones() == NAMES
    assert list_backbones("nat*") == ["nature"]
    assert list_backbones("resnet*") == ["resnet_bottleneck", "resnet_preact", "resnet_small"]
    assert list_backbones("nothing*") == []


# Shapes


@pytest.mark.parametrize(
    ("name", "size"), [("nature", size) for size in (8, 28, 36, 37, 64, 84, 85, 128)] + [("small", size) for size in (1, 7, 10, 12, 16)]
)
@pytest.mark.parametrize("channels", [1, 4])
def test_vectors_and_maps_have_the_sizes_they_say(name, size, channels):
    for hidden in (0, 24):
        backbone = create(name, channels, size, hidden=hidden)
        vector, maps = backbone(images(channels, size)), backbone.features(images(channels, size))
        assert vector.shape == (2, backbone.out_features)
        assert tuple(each.shape[1] for each in maps) == backbone.out_channels
        assert backbone.out_features == (hidden or maps[-1][0].numel())
        sides = [each.shape[-1] for each in maps]
        assert sides == sorted(sides, reverse=True)
        assert all(each.shape[-2] == each.shape[-1] and (each >= 0).all() for each in maps)


def test_the_maps_of_nature_at_84_pixels_are_those_of_the_paper():
    maps = create("nature", 4, 84).features(images(4, 84))
    assert [tuple(each.shape[1:]) for each in maps] == [(32, 20, 20), (64, 9, 9), (64, 7, 7)]


@pytest.mark.parametrize("name", ["nature", "small"])
def test_without_a_dense_layer_the_vector_is_the_last_map(name):
    backbone = create(name, 4, 84, hidden=0)
    assert backbone(images(4, 84)).equal(backbone.features(images(4, 84))[-1].flatten(1))


def test_nature_has_the_weights_that_the_paper_gives_it():
    convolutions = 8 * 8 * 4 * 32 + 32 + 4 * 4 * 32 * 64 + 64 + 3 * 3 * 64 * 64 + 64
    assert weights(create("nature", 4, 84, hidden=0)) == convolutions == 77_984
    assert weights(create("nature", 4, 84)) == convolutions + 7 * 7 * 64 * 512 + 512 == 1_684_128


def test_small_has_the_weights_that_it_says():
    assert weights(create("small", 2, 12, hidden=64)) == 9 * 2 * 16 + 16 + 9 * 16 * 32 + 32 + 6 * 6 * 32 * 64 + 64


@pytest.mark.parametrize(("size", "before", "after"), [(1, 17, 18), (12, 12, 12), (28, 4, 4), (35, 0, 1)])
def test_nature_puts_a_black_frame_around_images_of_fewer_than_36_pixels(size, before, after):
    torch.manual_seed(0)
    framed, whole = create("nature", 3, size), create("nature", 3, 36)
    framed.load_state_dict(whole.state_dict())
    seen = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    frame = torch.zeros(2, 3, 36, 36, dtype=torch.uint8)
    frame[:, :, before : 36 - after, before : 36 - after] = seen
    assert framed(seen).equal(whole(frame))
    assert framed(seen.float() / 255).equal(whole(frame.float() / 255))
    assert framed.features(seen)[0].std() > 0


@pytest.mark.parametrize("size", [36, 84])
def test_nature_puts_no_frame_around_larger_images(size):
    backbone = create("nature", 3, size)
    plain = backbone.layers[0](images(3, size)).relu()
    assert backbone.features(images(3, size))[0].equal(plain)


@pytest.mark.parametrize("name", ["nature", "small"])
def test_a_single_pixel_goes_through(name):
    backbone = create(name, 1, 1)
    assert backbone(images(1, 1)).isfinite().all()


# Numbers


@pytest.mark.parametrize("name", ["nature", "small"])
def test_weights_and_biases_begin_uniform_within_one_over_the_root_of_the_inputs(name):
    torch.manual_seed(0)
    layers = [layer for layer in create(name, 4, 84).modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) >= 3
    for layer in layers:
        bound = layer.weight[0].numel() ** -0.5
        assert layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound
        assert layer.bias.abs().max() > 0.7 * bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.06)  # of a uniform distribution
        assert layer.weight.abs().max() > 0.98 * bound


def plain(name, hidden, channels, side):
    """The same network as layers in a row."""
    convolutions = {
        "nature": [
            nn.Conv2d(channels, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
        ],
        "small": [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()],
    }[name]
    dense = [nn.Linear(convolutions[-2].out_channels * side * side, hidden), nn.ReLU()] if hidden else []
    return nn.Sequential(*convolutions, nn.Flatten(), *dense)


@pytest.mark.parametrize(("name", "size", "side"), [("nature", 84, 7), ("nature", 50, 2), ("small", 12, 6), ("small", 7, 4)])
@pytest.mark.parametrize("hidden", [0, 24])
def test_values_and_gradients_are_those_of_plain_layers_in_a_row(name, size, side, hidden):
    torch.manual_seed(1)
    ours, theirs = create(name, 3, size, hidden=hidden), plain(name, hidden, 3, side)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    mine, other = images(3, size).requires_grad_(), images(3, size).requires_grad_()
    found, expected = ours(mine), theirs(other)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    assert other.grad.abs().sum() > 0
    for weight, plain_weight in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, plain_weight.grad)


@pytest.mark.parametrize("size", [36, 84, 50])
def test_nature_makes_the_same_of_bytes_as_of_the_numbers_that_they_stand_for(size):
    torch.manual_seed(0)
    network = create("nature", in_channels=3, image_size=size)
    seen = torch.randint(256, (5, 3, size, size), dtype=torch.uint8)
    outcomes = []
    shared = torch.cat([seen, seen[:, :1]], 1)[:, :-1]  # as the stacks of a memory are views of the frames that they share
    for images in (seen, seen.float() / 255, shared, seen.to(memory_format=torch.channels_last)):
        network.zero_grad()
        outputs = network(images)
        outputs.square().sum().backward()
        outcomes.append([outputs.detach(), *(weight.grad.clone() for weight in network.parameters())])
    for mine, *others in zip(*outcomes, strict=True):
        for same in others:
            torch.testing.assert_close(mine, same, rtol=1e-4, atol=1e-6)


def test_no_images_have_no_blocks():
    assert blocks(torch.zeros(0, 4, 84, 84, dtype=torch.uint8)).shape == (0, 64, 21, 21)
