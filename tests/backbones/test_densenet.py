"""Densely connected networks: every layer sees all before it."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from lab.backbones.densenet import DenseBlock, DenseNet, transition
from tests.backbones.compare import assert_same_function, map_shapes, multiplies, normalise, randomised, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def activated(maps, norm, given):
    active, bias = F.relu(normalise(maps, norm, given)), norm == "none"
    kernel = next(given)
    return F.conv2d(active, kernel, next(given) if bias else None, padding=kernel.shape[-1] // 2)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_a_block_is_equation_2(norm):
    def reference(maps, given):
        found = [maps]
        for _ in range(3):
            found.append(activated(activated(torch.cat(found, 1), norm, given), norm, given))
        return torch.cat(found, 1)

    assert_same_function(randomised(DenseBlock(6, 4, 3, norm)), reference, 2, 6, 5, 7)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_a_transition_is_a_convolution_and_a_mean_of_fours(norm):
    def reference(maps, given):
        found = activated(maps, norm, given)[:, :, :6, :4]  # a last odd row is dropped
        return found.unflatten(3, (2, 2)).unflatten(2, (3, 2)).mean((3, 5))

    assert_same_function(randomised(transition(16, 8, norm)), reference, 2, 16, 7, 4)


def test_every_layer_sees_the_maps_of_all_layers_before_it():
    torch.manual_seed(0)
    inputs, growth, depth = 6, 4, 5
    block = randomised(DenseBlock(inputs, growth, depth))
    maps = torch.randn(2, inputs, 4, 4, dtype=torch.float64)
    found = block(maps)
    assert found.shape[1] == inputs + depth * growth
    assert found[:, :inputs].equal(maps)
    for index, layer in enumerate(block.layers):
        first = layer[2]
        assert first.in_channels == inputs + index * growth
        new = found[:, first.in_channels : first.in_channels + growth]
        assert new.equal(layer(found[:, : first.in_channels]))
        (seen,) = torch.autograd.grad((new * torch.randn_like(new)).sum(), first.weight, retain_graph=True)
        for part in seen.split([inputs, *[growth] * index], dim=1):  # the weights for the maps of one layer before
            assert part.abs().sum() > 0


def test_each_layer_has_a_gradient_from_all_after_it():
    torch.manual_seed(0)
    block = randomised(DenseBlock(6, 4, 5))
    outputs = []
    for layer in block.layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    block(torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True))
    assert len(outputs) == 5
    for later in range(1, 5):
        probe = torch.randn_like(outputs[later])
        for gradient in torch.autograd.grad((outputs[later] * probe).sum(), outputs[:later], retain_graph=True):
            assert gradient.abs().min() > 0


CHANNELS = [24 + 2 * 12, 24 + 4 * 12, 36 + 6 * 12]


@pytest.mark.parametrize(("channels", "size", "kernel"), [(1, 28, 3), (4, 84, 7)])
def test_the_network_has_the_weights_and_multiply_adds_of_its_layers(channels, size, kernel):
    count = kernel**2 * channels * 24 + 24 + 2 * CHANNELS[-1]
    products = 28**2 * kernel**2 * channels * 24
    for side, inputs, depth in ((28, 24, 2), (14, 24, 4), (7, 36, 6)):
        for seen in range(inputs, inputs + depth * 12, 12):
            count += 2 * seen + seen * 48 + 2 * 48 + 9 * 48 * 12
            products += side**2 * (seen * 48 + 9 * 48 * 12)
    for side, wide in ((28, CHANNELS[0]), (14, CHANNELS[1])):
        count += 2 * wide + wide * wide // 2
        products += side**2 * wide * wide // 2
    assert weights(DenseNet(channels, size)) == count
    assert multiplies(DenseNet(channels, size), 1, channels, size, size) == products


@pytest.mark.parametrize("size", [28, 84])
def test_blocks_grow_and_transitions_halve(size):
    network = DenseNet(3, size)
    assert map_shapes(network, 3, size) == [(48, 28, 28), (72, 14, 14), (108, 7, 7)]
    halves = [stage[0][2] for stage in network.stages[1:]]
    assert [(each.in_channels, each.out_channels) for each in halves] == [(48, 24), (72, 36)]
    assert network.out_features == 108


def test_the_last_map_is_normalised_and_the_others_go_on_as_they_are():
    network = DenseNet(1, 28, growth=8, depths=(1, 1))
    maps = network.features(torch.rand(2, 1, 28, 28))
    *before, _, _ = network.stages[-1]
    last = maps[0]
    for part in before:
        last = part(last)
    torch.testing.assert_close(maps[-1], F.relu(F.group_norm(last, last.shape[1] // 4)))
    assert maps[0].min() < 0
    assert all(coarse.shape[-1] < fine.shape[-1] for fine, coarse in pairwise(maps))
