"""Residual networks: the blocks written out, the identity they start as, and what the networks cost."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones import create
from lab.backbones.resnet import Basic, Bottleneck, PreActivation, ResNet, resnet_bottleneck, resnet_preact, resnet_small
from tests.backbones.compare import assert_same_function, convolve, map_shapes, multiplies, normalise, normalised, randomised, weights

pytestmark = pytest.mark.usefixtures("one_thread")


# The blocks written out


def basic(maps, norm, stride, projects, given):
    branch = convolve(F.relu(convolve(maps, norm, given, stride)), norm, given)
    return F.relu(branch + (convolve(maps, norm, given, stride) if projects else maps))


def bottleneck(maps, norm, stride, projects, given):
    branch = F.relu(convolve(F.relu(convolve(maps, norm, given)), norm, given, stride))
    branch = convolve(branch, norm, given)
    return F.relu(branch + (convolve(maps, norm, given, stride) if projects else maps))


def preactivation(maps, norm, stride, projects, given):
    active = F.relu(normalise(maps, norm, given))
    branch = convolve(F.relu(convolve(active, norm, given, stride)), "none", given)
    return branch + (convolve(active, "none", given, stride) if projects else maps)


REFERENCES = {Basic: basic, Bottleneck: bottleneck, PreActivation: preactivation}


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize(("inputs", "stride"), [(32, 1), (16, 1), (32, 2), (16, 2)])
@pytest.mark.parametrize("block", REFERENCES)
def test_blocks_are_the_papers_functions(block, inputs, stride, norm):
    width = 32 // block.expansion
    projects = inputs != 32 or stride != 1
    ours = randomised(block(inputs, width, stride, norm))
    assert_same_function(ours, lambda maps, given: REFERENCES[block](maps, norm, stride, projects, given), 2, inputs, 7, 6)


# How they start


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("block", REFERENCES)
def test_a_block_starts_as_the_identity_and_can_learn(block, norm):
    torch.manual_seed(0)
    network, maps = block(32, 32 // block.expansion, norm=norm), torch.randn(4, 32, 6, 6)
    if block is not PreActivation:
        maps = maps.relu()  # as the block before gives them
    found = network(maps)
    assert found.equal(maps)
    (found * torch.randn(found.shape)).sum().backward()
    last = next(layer for layer in reversed(list(network.branch.modules())) if hasattr(layer, "weight"))
    assert last.weight.abs().max() == 0
    assert last.weight.grad.reshape(32, -1).abs().sum(1).min() > 0  # in every channel


@pytest.mark.parametrize("block", REFERENCES)
def test_a_block_that_changes_the_shape_starts_as_its_projection(block):
    network, maps = block(8, 16, 2), torch.randn(4, 8, 6, 6)
    if block is PreActivation:
        assert network(maps).equal(network.projection(network.activation(maps)))
    else:
        assert network(maps).equal(network.shortcut(maps).relu())


def test_a_deep_network_without_normalisation_starts_with_numbers_of_order_one():
    torch.manual_seed(0)
    for map_ in ResNet(4, 28, depths=(20, 20, 20), norm="none").features(torch.rand(8, 4, 28, 28)):
        assert 0.1 < map_.std() < 2


# The networks


def basic_weights(inputs, width):
    return normalised(inputs, width, 3) + normalised(width, width, 3) + (normalised(inputs, width, 1) if inputs != width else 0)


def bottleneck_weights(inputs, width):
    outputs = 4 * width
    inner = normalised(inputs, width, 1) + normalised(width, width, 3) + normalised(width, outputs, 1)
    return inner + (normalised(inputs, outputs, 1) if inputs != outputs else 0)


def preactivation_weights(inputs, width):
    inner = 2 * inputs + normalised(inputs, width, 3) + 9 * width**2 + width
    return inner + (inputs * width + width if inputs != width else 0)


@pytest.mark.parametrize(("channels", "size", "kernel"), [(1, 28, 3), (4, 84, 7)])
def test_networks_have_the_weights_of_their_blocks(channels, size, kernel):
    pairs = [(16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    stem = normalised(channels, 16, kernel)
    assert weights(resnet_small(channels, size)) == stem + sum(basic_weights(*pair) for pair in pairs)
    bare = channels * kernel**2 * 16 + 16
    assert weights(resnet_preact(channels, size)) == bare + sum(preactivation_weights(*pair) for pair in pairs) + 2 * 64
    pairs = [(16, 16), (64, 32), (128, 32), (128, 64), (256, 64)]
    assert weights(resnet_bottleneck(channels, size)) == stem + sum(bottleneck_weights(*pair) for pair in pairs)


@pytest.mark.parametrize(("channels", "size", "stem"), [(1, 28, 9 * 16), (4, 84, 4 * 49 * 16)])
def test_networks_have_the_multiply_adds_of_their_blocks(channels, size, stem):
    two = 28**2 * (stem + 2 * 9 * 16**2)
    for fine, inputs, width in ((28, 16, 32), (14, 32, 64)):
        two += (fine // 2) ** 2 * (9 * inputs * width + inputs * width + 3 * 9 * width**2)
    assert multiplies(resnet_small(channels, size), 1, channels, size, size) == two
    assert multiplies(resnet_preact(channels, size), 1, channels, size, size) == two
    three = 28**2 * (stem + 16 * 16 + 9 * 16**2 + 2 * 16 * 64)
    for fine, width in ((28, 32), (14, 64)):
        coarse = (fine // 2) ** 2
        three += fine**2 * 2 * width**2  # the first 1x1 still sees every place
        three += coarse * (9 * width**2 + 4 * width**2 + 8 * width**2)
        three += coarse * (4 * width**2 + 9 * width**2 + 4 * width**2)
    assert multiplies(resnet_bottleneck(channels, size), 1, channels, size, size) == three


@pytest.mark.parametrize(("name", "factor"), [("resnet_small", 1), ("resnet_bottleneck", 4), ("resnet_preact", 1)])
@pytest.mark.parametrize("size", [28, 84])
def test_the_stages_see_28_14_and_7_pixels(name, factor, size):
    backbone = create(name, 3, size)
    assert map_shapes(backbone, 3, size) == [(factor * 16, 28, 28), (factor * 32, 14, 14), (factor * 64, 7, 7)]
    assert backbone.out_features == factor * 64


def test_the_last_map_of_preactivation_is_normalised():
    network = resnet_preact(1, 28)
    before = nn.Sequential(*list(network.stages[-1])[:-2])
    maps = network.features(torch.rand(2, 1, 28, 28))
    torch.testing.assert_close(maps[-1], F.relu(F.group_norm(before(maps[-2]), 8)))
    assert maps[0].min() < 0  # nothing activated ends the stages before


def test_stages_have_the_blocks_that_depths_say():
    network = ResNet(1, 28, Bottleneck, widths=(8, 16), depths=(3, 1))
    assert [sum(isinstance(part, Bottleneck) for part in stage) for stage in network.stages] == [3, 1]
    assert network.out_channels == (32, 64)
    with pytest.raises(ValueError, match="shorter"):
        ResNet(1, 28, widths=(8, 16, 32), depths=(1, 1))
