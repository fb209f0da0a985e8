"""Squeeze-and-excitation, MBConv and Fused-MBConv."""

import math

import pytest
import torch
from torch.nn import functional as F

from lab.backbones.efficientnet import EfficientNetV2, FusedMBConv, MBConv, SqueezeExcitation
from tests.backbones.compare import assert_same_function, convolve, map_shapes, multiplies, normalised, randomised, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_squeeze_and_excitation_is_what_a_loop_says():
    layer, maps = randomised(SqueezeExcitation(6, 2)), torch.randn(3, 6, 4, 5, dtype=torch.float64)
    w1, b1, w2, b2 = (weight.tolist() for weight in layer.parameters())
    found = layer(maps)
    for image in range(3):
        means = [maps[image, channel].mean().item() for channel in range(6)]
        sums = [sum(w * mean for w, mean in zip(w1[unit], means, strict=True)) + b1[unit] for unit in range(2)]
        squeezed = [number / (1 + math.exp(-number)) for number in sums]
        for channel in range(6):
            number = sum(w * unit for w, unit in zip(w2[channel], squeezed, strict=True)) + b2[channel]
            torch.testing.assert_close(found[image, channel], maps[image, channel] / (1 + math.exp(-number)))


def excite(maps, given):
    squeezed = F.silu(F.linear(maps.mean((2, 3)), next(given), next(given)))
    return maps * torch.sigmoid(F.linear(squeezed, next(given), next(given)))[:, :, None, None]


SHAPES = [(8, 1, 4), (16, 1, 4), (8, 2, 4), (16, 2, 6)]


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize(("outputs", "stride", "expansion"), SHAPES)
def test_mbconv_written_out(outputs, stride, expansion, norm):
    def reference(maps, given):
        wide = F.silu(convolve(maps, norm, given))
        deep = excite(F.silu(convolve(wide, norm, given, stride, 8 * expansion)), given)
        projected = convolve(deep, norm, given)
        return projected + maps if (outputs, stride) == (8, 1) else projected

    block = randomised(MBConv(8, outputs, stride, expansion, norm))
    assert_same_function(block, reference, 2, 8, 7, 6)
    squeezed = [weight.shape for weight in block.parameters() if weight.dim() == 2]
    assert squeezed == [(2, 8 * expansion), (8 * expansion, 2)]  # a quarter of the channels that go in


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize(("outputs", "stride", "expansion"), [*SHAPES, (8, 1, 1), (16, 2, 1)])
def test_fused_mbconv_written_out(outputs, stride, expansion, norm):
    def reference(maps, given):
        found = F.silu(convolve(maps, norm, given, stride))
        found = convolve(found, norm, given) if expansion > 1 else found
        return found + maps if (outputs, stride) == (8, 1) else found

    assert_same_function(randomised(FusedMBConv(8, outputs, stride, expansion, norm)), reference, 2, 8, 7, 6)


FUSED = [(16, 24, 14), (24, 24, 14)]
LATE = [(24, 48, 4, 14), (48, 48, 4, 7), (48, 64, 6, 7), (64, 64, 6, 7)]
"""Channels in and out, expansion, and pixels a side that come in."""


@pytest.mark.parametrize(("channels", "size", "kernel"), [(1, 28, 3), (4, 84, 7)])
def test_the_network_has_the_weights_and_multiply_adds_of_its_blocks(channels, size, kernel):
    network = EfficientNetV2(channels, size)
    count = normalised(channels, 16, kernel) + normalised(16, 16, 3) + normalised(64, 256, 1)
    products = 28**2 * (kernel**2 * channels * 16 + 9 * 16 * 16) + 7**2 * 64 * 256
    for inputs, outputs, side in FUSED:
        count += normalised(inputs, 4 * inputs, 3) + normalised(4 * inputs, outputs, 1)
        products += side**2 * (9 * inputs * 4 * inputs + 4 * inputs * outputs)
    for inputs, outputs, expansion, side in LATE:
        wide, squeezed = expansion * inputs, inputs // 4
        count += normalised(inputs, wide, 1) + normalised(1, wide, 3) + normalised(wide, outputs, 1)
        count += 2 * wide * squeezed + wide + squeezed
        products += side**2 * inputs * wide + 7**2 * (9 * wide + wide * outputs) + 2 * wide * squeezed
    assert weights(network) == count
    assert multiplies(network, 1, channels, size, size) == products


@pytest.mark.parametrize("size", [28, 84])
def test_the_stages_see_28_14_and_7_pixels(size):
    network = EfficientNetV2(3, size, out_features=40)
    assert map_shapes(network, 3, size) == [(16, 28, 28), (24, 14, 14), (64, 7, 7)]
    assert network(torch.rand(2, 3, size, size)).shape == (2, network.out_features) == (2, 40)


def test_early_blocks_are_fused_and_late_ones_are_not():
    kinds = [[type(part) for part in stage if isinstance(part, FusedMBConv | MBConv)] for stage in EfficientNetV2(1, 28).stages]
    assert kinds == [[FusedMBConv], [FusedMBConv] * 2, [MBConv] * 4]
