"""Inception: every block against its branches written out, and what factorising saves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lab.backbones.inception import Branches, GoogLeNet, InceptionV3, asymmetric, expanded, factorised, inception, reduction

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(module):
    return sum(weight.numel() for weight in module.parameters())


def multiplies(module, width, side=14):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.rand(1, width, side, side))
    return counter.get_total_flops() // 2


def same(block, written, inputs, side=9):
    """Whether a block without normalisation gives the values and the gradients of its formula.

    `written(x, conv)` is the formula, where conv(x, kernel, stride) is the next convolution of the block with its ReLU.
    """
    torch.manual_seed(0)
    block = block.double()
    maps = torch.randn(2, inputs, side, side + 2, dtype=torch.float64, requires_grad=True)
    layers = iter([layer for layer in block.modules() if isinstance(layer, nn.Conv2d)])

    def conv(x, kernel, stride=1):
        layer = next(layers)
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        assert layer.weight.shape[2:] == (height, width)
        padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2))
        return F.conv2d(padded, layer.weight, layer.bias, stride).clamp(min=0)

    found, expected, values = block(maps), written(maps, conv), [maps, *block.parameters()]
    assert next(layers, None) is None
    torch.testing.assert_close(found, expected)
    for mine, other in zip(torch.autograd.grad(found.square().sum(), values), torch.autograd.grad(expected.square().sum(), values)):
        torch.testing.assert_close(mine, other)
        assert other.abs().sum() > 0
    return found


def average(x):
    """The mean of the places of a 3x3 window that lie within the map."""
    total, count = (
        F.conv2d(F.pad(each, (1, 1, 1, 1)), each.new_ones(1, 1, 3, 3)) for each in (x.flatten(0, 1)[:, None], torch.ones_like(x[:1, :1]))
    )
    return (total / count).view_as(x)


# Blocks


def test_branches_put_side_by_side_what_they_give():
    maps = torch.rand(2, 3, 4, 4)
    assert Branches(nn.Identity(), nn.MaxPool2d(3, 1, 1))(maps).equal(torch.cat([maps, F.max_pool2d(maps, 3, 1, 1)], 1))


def test_the_first_module_is_its_four_branches():
    def written(x, conv):
        return torch.cat([conv(x, 1), conv(conv(x, 1), 3), conv(conv(x, 1), 5), conv(F.max_pool2d(x, 3, 1, 1), 1)], 1)

    assert same(inception(6, 32, "none"), written, 6).shape == (2, 32, 9, 11)


def test_the_first_module_has_the_proportions_of_3a():
    layers = [layer for layer in inception(192, 256, "none").modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == [64, 96, 128, 16, 32, 32]  # table 1
    assert sum(layer.weight.numel() for layer in layers) == 163_328  # "159K", where K is 1024
    assert multiplies(inception(192, 256, "none"), 192, 28) == 163_328 * 28**2  # "128M"


def test_the_factorised_module_is_its_four_branches():
    def written(x, conv):
        return torch.cat([conv(conv(conv(x, 1), 3), 3), conv(conv(x, 1), 3), conv(average(x), 1), conv(x, 1)], 1)

    assert same(factorised(16, "none"), written, 16).shape == (2, 16, 9, 11)


@pytest.mark.parametrize("n", [7, 3])
def test_the_asymmetric_module_is_its_four_branches(n):
    def written(x, conv):
        long = conv(conv(conv(conv(conv(x, 1), (1, n)), (n, 1)), (1, n)), (n, 1))
        return torch.cat([long, conv(conv(conv(x, 1), (1, n)), (n, 1)), conv(average(x), 1), conv(x, 1)], 1)

    assert same(asymmetric(16, "none", n), written, 16).shape == (2, 16, 9, 11)


def test_the_expanded_module_is_its_six_branches():
    def written(x, conv):
        deep = conv(conv(x, 1), 3)
        parts = [conv(deep, (1, 3)), conv(deep, (3, 1))]
        flat = conv(x, 1)
        return torch.cat([*parts, conv(flat, (1, 3)), conv(flat, (3, 1)), conv(average(x), 1), conv(x, 1)], 1)

    assert same(expanded(16, "none"), written, 16).shape == (2, 16, 9, 11)


def test_a_reduction_is_its_three_branches_at_half_the_size():
    def written(x, conv):
        return torch.cat([conv(conv(conv(x, 1), 3), 3, 2), conv(conv(x, 1), 3, 2), F.max_pool2d(x, 3, 2, 1)], 1)

    assert same(reduction(6, 14, "none"), written, 6).shape == (2, 14, 5, 6)


# What factorising saves


def test_two_3x3_cost_18_25ths_of_a_5x5_and_see_as_much():
    pair = factorised(32, "none").branches[0][1:]
    whole = nn.Conv2d(8, 8, 5, padding=2)
    assert multiplies(pair, 8) * 25 == multiplies(whole, 8) * 18
    assert reach(pair, 8) == reach(whole, 8) == (5, 5)


def test_1x7_and_7x1_cost_two_sevenths_of_a_7x7_and_see_as_much():
    pair = asymmetric(32, "none").branches[1][1:]
    whole = nn.Conv2d(8, 8, 7, padding=3)
    assert multiplies(pair, 8) * 7 == multiplies(whole, 8) * 2
    assert reach(pair, 8) == reach(whole, 8) == (7, 7)


def reach(module, width):
    """Height and width of what one place of the result sees."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.ones_(layer.weight)
    maps = torch.rand(1, width, 15, 15, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(maps)[0, :, 7, 7].sum(), maps)
    seen = gradient[0].sum(0) > 0
    return int(seen.any(1).sum()), int(seen.any(0).sum())


# Networks


@pytest.mark.parametrize("kind", [GoogLeNet, InceptionV3])
@pytest.mark.parametrize(("size", "sides"), [(8, (8, 4, 2)), (10, (10, 5, 3)), (28, (28, 14, 7)), (84, (28, 14, 7)), (128, (26, 13, 7))])
def test_sizes_of_the_maps(kind, size, sides):
    network = kind(3, size)
    maps = network.features(torch.rand(1, 3, size, size))
    assert [tuple(each.shape[1:]) for each in maps] == [(channels, side, side) for channels, side in zip((32, 64, 128), sides)]
    assert network(torch.rand(2, 3, size, size)).shape == (2, network.out_features) == (2, 128)


def module_weights(inputs, part):
    """Of a module of GoogLeNet, whose branches have 4, 8, 2 and 2 parts; two numbers of normalisation for each channel."""
    steps = [(inputs, 4, 1), (inputs, 6, 1), (6 * part, 8, 9), (inputs, 1, 1), (part, 2, 25), (inputs, 2, 1)]
    return sum(i * o * part * k + 2 * o * part for i, o, k in steps)


def test_googlenet_has_the_weights_that_its_modules_have():
    modules = [(24, 2), (32, 2), (32, 4), (64, 4), (64, 4), (64, 8), (128, 8)]
    assert weights(GoogLeNet(1, 28)) == 9 * 24 + 48 + sum(module_weights(*each) for each in modules) == 120_168
    assert weights(GoogLeNet(4, 84)) == 120_168 - 9 * 24 + 49 * 4 * 24


def test_inception_v3_has_each_module_where_its_maps_suit_it():
    kernels = [
        {layer.kernel_size for module in (stage[1:]) for layer in module.modules() if isinstance(layer, nn.Conv2d)}
        for stage in InceptionV3(1, 28).stages
    ]
    assert kernels == [{(1, 1), (3, 3)}, {(1, 1), (1, 7), (7, 1)}, {(1, 1), (3, 3), (1, 3), (3, 1)}]


@pytest.mark.parametrize("kind", [GoogLeNet, InceptionV3])
@pytest.mark.parametrize(("norm", "layer"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d), ("none", nn.Identity)])
def test_every_convolution_is_followed_by_the_normalisation_that_was_asked_for(kind, norm, layer):
    modules = list(kind(1, 28, norm=norm).modules())
    convolutions = [each for each in modules if isinstance(each, nn.Conv2d)]
    assert sum(isinstance(each, layer) for each in modules) == len(convolutions)
    assert all((each.bias is None) == (norm != "none") for each in convolutions)
