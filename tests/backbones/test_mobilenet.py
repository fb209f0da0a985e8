"""Inverted residuals: narrow at both ends, and linear where they are narrow."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.mobilenet import InvertedResidual, MobileNetV2
from tests.backbones.compare import assert_same_function, convolve, map_shapes, multiplies, normalised, randomised, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize(("outputs", "stride", "expansion"), [(8, 1, 6), (16, 1, 6), (8, 2, 6), (16, 2, 3), (8, 1, 1), (16, 1, 1)])
def test_a_block_is_table_1_of_the_paper(outputs, stride, expansion, norm):
    def reference(maps, given):
        wide = F.hardtanh(convolve(maps, norm, given), 0, 6) if expansion > 1 else maps
        deep = F.hardtanh(convolve(wide, norm, given, stride, 8 * expansion), 0, 6)
        projected = convolve(deep, norm, given)
        return projected + maps if (outputs, stride) == (8, 1) else projected

    ours = randomised(InvertedResidual(8, outputs, stride, expansion, norm))
    assert_same_function(ours, reference, 2, 8, 7, 6)


def test_the_projection_is_linear():
    block = randomised(InvertedResidual(8, 16, norm="none"))
    maps = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    before = block(maps)
    with torch.no_grad():
        for weight in list(block.parameters())[-2:]:
            weight.mul_(-3)
    torch.testing.assert_close(block(maps), -3 * before)
    assert (before > 0).any()
    assert (before < 0).any()


def test_numbers_within_a_block_end_at_six():
    block = InvertedResidual(8, 8, norm="none")
    seen = []
    for layer in block.modules():
        if isinstance(layer, nn.ReLU6):
            layer.register_forward_hook(lambda _, __, output: seen.append(output))
    block(1000 * torch.randn(2, 8, 5, 5))
    assert [(each.shape[1], each.min().item(), each.max().item()) for each in seen] == [(48, 0, 6), (48, 0, 6)]


BLOCKS = [(16, 16, 1), (16, 24, 6), (24, 24, 6), (24, 24, 6), (24, 48, 6), (48, 48, 6), (48, 48, 6)]
"""Channels in and out and expansion, as the network has them."""


@pytest.mark.parametrize(("channels", "size", "kernel"), [(1, 28, 3), (4, 84, 7)])
def test_the_network_has_the_weights_and_multiply_adds_of_its_blocks(channels, size, kernel):
    network = MobileNetV2(channels, size)
    count = normalised(channels, 16, kernel) + normalised(48, 192, 1)
    products = 28**2 * kernel**2 * channels * 16 + 7**2 * 48 * 192
    fine = 28
    for inputs, outputs, expansion in BLOCKS:
        wide, coarse = expansion * inputs, fine // 2 if outputs > inputs else fine
        count += (normalised(inputs, wide, 1) if expansion > 1 else 0) + normalised(1, wide, 3) + normalised(wide, outputs, 1)
        products += (fine**2 * inputs * wide if expansion > 1 else 0) + coarse**2 * (9 * wide + wide * outputs)
        fine = coarse
    assert weights(network) == count
    assert multiplies(network, 1, channels, size, size) == products


@pytest.mark.parametrize("size", [28, 84])
def test_the_stages_see_28_14_and_7_pixels(size):
    network = MobileNetV2(3, size)
    assert map_shapes(network, 3, size) == [(16, 28, 28), (24, 14, 14), (48, 7, 7)]
    vector = network(torch.rand(2, 3, size, size))
    assert vector.shape == (2, network.out_features) == (2, 192)
    assert vector.min() >= 0
    assert vector.max() <= 6
