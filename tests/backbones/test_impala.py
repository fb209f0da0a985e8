"""The large network of IMPALA."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.impala import Impala, ImpalaBlock
from tests.backbones.compare import assert_same_function, map_shapes, multiplies, randomised, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def convolve(maps, given):
    return F.conv2d(maps, next(given), next(given), padding=1)


def block(maps, given):
    return maps + convolve(F.relu(convolve(F.relu(maps), given)), given)


def network(images, given):
    maps = images
    for _ in range(3):
        maps = F.max_pool2d(convolve(maps, given), 3, 2, 1)
        maps = block(block(maps, given), given)
    return F.relu(F.linear(F.relu(maps).flatten(1), next(given), next(given)))


def test_a_block_is_two_convolutions_each_after_a_relu():
    assert_same_function(randomised(ImpalaBlock(5)), block, 2, 5, 6, 7)


@pytest.mark.parametrize("size", [8, 13])
def test_the_network_is_figure_3_of_the_paper(size):
    assert_same_function(randomised(Impala(3, size, widths=(4, 6, 6), hidden=11)), network, 2, 3, size, size)


def test_without_its_last_kernel_a_block_is_the_identity():
    ours, maps = ImpalaBlock(5), torch.randn(2, 5, 6, 6)
    nn.init.zeros_(ours.branch[-1].weight)
    nn.init.zeros_(ours.branch[-1].bias)
    assert ours(maps).equal(maps)


@pytest.mark.parametrize(("channels", "size", "sides"), [(4, 84, (42, 21, 11)), (1, 28, (14, 7, 4)), (2, 10, (5, 3, 2))])
def test_weights_multiply_adds_and_maps(channels, size, sides):
    ours = Impala(channels, size)
    count, products, seen = 32 * sides[-1] ** 2 * 256 + 256, 32 * sides[-1] ** 2 * 256, size
    for inputs, width, side in zip((channels, 16, 32), (16, 32, 32), sides, strict=True):
        count += 9 * inputs * width + width + 4 * (9 * width**2 + width)
        products += seen**2 * 9 * inputs * width + side**2 * 4 * 9 * width**2
        seen = side
    assert weights(ours) == count
    assert multiplies(ours, 1, channels, size, size) == products
    assert map_shapes(ours, channels, size) == [(width, side, side) for width, side in zip((16, 32, 32), sides, strict=True)]
    assert ours(torch.rand(2, channels, size, size)).shape == (2, ours.out_features) == (2, 256)


def test_its_size_with_four_frames_of_84_pixels():
    assert weights(Impala(4, 84)) == 1_089_232
