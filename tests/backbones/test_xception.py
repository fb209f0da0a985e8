"""Depthwise-separable convolutions: the function, and the multiplications they save."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.xception import SeparableConv, Separables, Xception, multiplies_plain, multiplies_separable
from tests.backbones.compare import assert_same_function, convolve, map_shapes, multiplies, normalised, randomised, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_separable_convolution_is_a_plain_one_whose_kernel_is_a_product(kernel):
    def reference(maps, given):
        depthwise, pointwise = next(given), next(given)
        return F.conv2d(maps, pointwise * depthwise[:, 0], next(given), padding=kernel // 2)

    assert_same_function(randomised(SeparableConv(3, 10, kernel, bias=True)), reference, 2, 3, 6, 7)


def test_the_depthwise_part_leaves_channels_apart():
    layer = randomised(SeparableConv(3, 10))
    maps = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    found = layer[0](maps)
    for channel in range(3):
        alone = F.conv2d(maps[:, channel : channel + 1], layer[0].weight[channel : channel + 1], padding=1)
        torch.testing.assert_close(found[:, channel : channel + 1], alone)


def test_the_multiplications_of_the_lecture():
    assert multiplies_separable(channels=3, outputs=10, kernel=3) == 3 * 3 * 3 + 3 * 10 == 57
    assert multiplies_plain(channels=3, outputs=10, kernel=3) == 3 * 3 * 3 * 10 == 270


@pytest.mark.parametrize(("channels", "outputs", "kernel"), [(3, 10, 3), (16, 32, 3), (8, 8, 5), (4, 9, 1)])
def test_the_closed_forms_count_what_torch_counts(channels, outputs, kernel):
    places = 6 * 9
    separable = multiplies(SeparableConv(channels, outputs, kernel), 1, channels, 6, 9)
    plain = multiplies(nn.Conv2d(channels, outputs, kernel, padding=kernel // 2), 1, channels, 6, 9)
    assert separable == places * multiplies_separable(channels, outputs, kernel)
    assert plain == places * multiplies_plain(channels, outputs, kernel)
    assert separable / plain == pytest.approx(1 / outputs + 1 / kernel**2)


def separable(maps, norm, given):
    maps = F.conv2d(F.relu(maps), next(given), padding=1, groups=maps.shape[1])
    return convolve(maps, norm, given)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_a_middle_block_is_three_separable_convolutions_and_the_identity(norm):
    def reference(maps, given):
        return separable(separable(separable(maps, norm, given), norm, given), norm, given) + maps

    assert_same_function(randomised(Separables([16] * 4, norm=norm)), reference, 2, 16, 5, 6)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_a_halving_block_pools_and_projects(norm):
    def reference(maps, given):
        branch = F.max_pool2d(separable(separable(maps, norm, given), norm, given), 3, 2, 1)
        return branch + convolve(maps, norm, given, 2)

    assert_same_function(randomised(Separables((8, 16, 24), pool=True, norm=norm)), reference, 2, 8, 7, 6)


PAIRS = {28: [(32, 64), (64, 64)], 14: [(64, 64)] * 6 + [(64, 64), (64, 128)], 7: [(128, 192)]}
"""Channels of the separable convolutions, by the pixels a side at which they are computed."""


@pytest.mark.parametrize(("channels", "size", "kernel"), [(1, 28, 3), (4, 84, 7)])
def test_the_network_has_the_weights_and_multiply_adds_of_its_layers(channels, size, kernel):
    network = Xception(channels, size)
    pairs = [pair for each in PAIRS.values() for pair in each]
    count = sum(9 * inputs + inputs * outputs + 2 * outputs for inputs, outputs in pairs)
    count += normalised(channels, 16, kernel) + normalised(16, 32, 3) + normalised(32, 64, 1) + normalised(64, 128, 1)
    assert weights(network) == count
    products = sum(side**2 * multiplies_separable(*pair, 3) for side, each in PAIRS.items() for pair in each)
    products += 28**2 * (kernel**2 * channels * 16 + 9 * 16 * 32) + 14**2 * 32 * 64 + 7**2 * 64 * 128
    assert multiplies(network, 1, channels, size, size) == products


@pytest.mark.parametrize("size", [28, 84])
def test_the_stages_see_28_14_and_7_pixels(size):
    network = Xception(3, size)
    assert map_shapes(network, 3, size) == [(32, 28, 28), (64, 14, 14), (192, 7, 7)]
    assert network.features(torch.rand(1, 3, size, size))[-1].min() == 0  # a ReLU ends the exit flow
