"""Swin: patches, blocks and merging are their formulas; windows are shifted in every second block of the first stage."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lab.attention import recorded
from lab.backbones.swin import Merging, Patches, Swin, SwinBlock

pytestmark = pytest.mark.usefixtures("one_thread")


def images(channels, size, count=2):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(size))


def make(*args, **options):
    torch.manual_seed(0)
    return Swin(*args, **options)


@pytest.mark.parametrize("size", [8, 10, 14, 15, 28, 64, 84, 128])
def test_maps_are_of_14_and_7_patches_at_every_size(size):
    backbone = make(3, size, depths=(1, 1))
    assert [tuple(each.shape) for each in backbone.features(images(3, size))] == [(2, 32, 14, 14), (2, 64, 7, 7)]
    assert backbone.out_channels == (32, 64)
    assert backbone(images(3, size)).shape == (2, backbone.out_features) == (2, 64)


@pytest.mark.parametrize(("size", "side"), [(8, 1), (14, 1), (20, 2), (28, 2), (83, 6)])
def test_patches_are_products_with_a_matrix_and_what_is_missing_is_black(size, side):
    torch.manual_seed(0)
    module, given = Patches(2, size, 5), images(2, size)
    whole = torch.zeros(2, 2, 14 * side, 14 * side)
    whole[:, :, :size, :size] = given
    expected = torch.zeros(2, 14, 14, 5)
    for y in range(14):
        for x in range(14):
            pixels = whole[:, :, y * side : (y + 1) * side, x * side : (x + 1) * side].flatten(1)
            expected[:, y, x] = F.layer_norm(pixels @ module.project.weight.flatten(1).T + module.project.bias, (5,))
    torch.testing.assert_close(module(given), expected, rtol=1e-4, atol=1e-4)


def test_merging_puts_four_patches_into_one():
    torch.manual_seed(0)
    module, maps = Merging(3), torch.randn(2, 3, 4, 6)
    found = module(maps)
    assert found.shape == (2, 2, 3, 6)
    for y in range(2):
        for x in range(3):
            four = torch.cat([maps[:, :, 2 * y + i, 2 * x + j] for i in (0, 1) for j in (0, 1)], 1)
            torch.testing.assert_close(found[:, y, x], F.layer_norm(four, (12,)) @ module.reduce.weight.T)


@pytest.mark.parametrize("shift", [0, 3])
def test_a_block_is_two_residuals_each_with_its_norm_before(shift):
    torch.manual_seed(0)
    block, maps = SwinBlock(16, 2, shift), torch.randn(2, 14, 14, 16)
    middle = maps + block.attention(F.layer_norm(maps, (16,)))
    hidden = F.gelu(F.layer_norm(middle, (16,)) @ block.mlp[0].weight.T + block.mlp[0].bias)
    torch.testing.assert_close(block(maps), middle + hidden @ block.mlp[2].weight.T + block.mlp[2].bias)
    assert hidden.shape[-1] == 4 * 16


def test_every_second_block_of_the_first_stage_is_shifted_and_none_of_the_second():
    backbone = make(1, 28, depths=(4, 2))
    blocks = [[part for part in stage if isinstance(part, SwinBlock)] for stage in backbone.stages]
    assert [[block.attention.shift for block in stage] for stage in blocks] == [[0, 3, 0, 3], [0, 0]]
    assert [[block.attention.heads for block in stage] for stage in blocks] == [[2] * 4, [4] * 2]
    with recorded(backbone) as notes:
        backbone(images(1, 28))
    assert [calls[0].shape[:3] for calls in notes.values()] == [(8, 2, 49)] * 4 + [(2, 4, 49)] * 2


def reach(depth):
    """Which patches the first patch of the first stage can see, (14, 14)."""
    given = images(1, 14, 1).requires_grad_()
    torch.manual_seed(0)
    seen = make(1, 14, depths=(depth, 1)).features(given)[0][0, :, 0, 0]
    return torch.autograd.grad(seen @ torch.randn(32), given)[0][0, 0] != 0


def test_shifted_windows_let_see_over_the_border_of_a_window():
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[:7, :7] = True
    assert reach(1).equal(expected)
    assert reach(2).equal(expected)  # the corner is alone in its shifted window
    assert reach(3).all()


def test_the_vector_is_the_mean_of_the_normalised_last_map():
    backbone = make(3, 28)
    last = backbone.features(images(3, 28))[-1]
    torch.testing.assert_close(last.mean(1), torch.zeros(2, 7, 7), rtol=0, atol=1e-5)
    torch.testing.assert_close(last.var(1, correction=0), torch.ones(2, 7, 7), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(backbone(images(3, 28)), last.mean((2, 3)))


def weights_of(channels, side, width, depths):
    """Counted from the formulas: patches and their norm, blocks, merging and its norm, the last norm."""

    def block(wide):
        return 4 * wide**2 + 4 * wide + (wide // 16) * 13**2 + 8 * wide**2 + 5 * wide + 2 * 2 * wide

    merging = 2 * 4 * width + 4 * width * 2 * width
    ends = channels * side**2 * width + width + 2 * width + 2 * 2 * width
    return ends + depths[0] * block(width) + merging + depths[1] * block(2 * width)


def products_of(channels, side, width, depths):
    """Multiply-adds of an image: each of 49 pixels of a window takes products with 49 keys and 49 values."""

    def block(wide):
        return 12 * wide**2 + 2 * 49 * wide

    return 196 * (channels * side**2 * width + depths[0] * block(width)) + 49 * (8 * width**2 + depths[1] * block(2 * width))


@pytest.mark.parametrize(("channels", "size", "side"), [(1, 28, 2), (4, 84, 6)])
@pytest.mark.parametrize(("width", "depths"), [(32, (2, 4)), (48, (1, 2))])
def test_weights_and_products_are_as_many_as_the_formulas_say(channels, size, side, width, depths):
    backbone = make(channels, size, width, depths)
    assert sum(weight.numel() for weight in backbone.parameters()) == weights_of(channels, side, width, depths)
    with FlopCounterMode(display=False) as counter:
        backbone(images(channels, size, 1))
    assert counter.get_total_flops() == 2 * products_of(channels, side, width, depths)


def test_it_is_as_large_as_it_says():
    sizes = [(weights_of(*of, 32, (2, 4)), products_of(*of, 32, (2, 4))) for of in [(1, 2), (4, 6)]]
    assert sizes == [(237_524, 17_335_808), (242_004, 18_213_888)]


def test_linear_layers_begin_small_and_without_bias():
    linear = [layer for layer in make(3, 28).modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linear) == 6 * 4 + 1
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias is None or (layer.bias == 0).all()


def test_every_weight_learns():
    backbone = make(3, 28)
    backbone(images(3, 28)).square().sum().backward()
    assert all(weight.grad is not None and (weight.grad != 0).any() for weight in backbone.parameters())


def test_a_process_that_has_no_image_of_a_batch_learns_nothing_from_it_and_does_not_fail():
    backbone = make(3, 28)
    maps = backbone.features(images(3, 28, 0))
    assert [tuple(map.shape) for map in maps] == [(0, *map.shape[1:]) for map in backbone.features(images(3, 28, 1))]
    backbone(images(3, 28, 0)).sum().backward()
    assert all((weight.grad == 0).all() for weight in backbone.parameters())
