"""Ways up: each against loops and closed forms, and which of them leave checkerboards."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.upsampling import PixelShuffleConv, ResizeConv, TransposedConv, checkerboard

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS = [TransposedConv, ResizeConv, PixelShuffleConv]
SEEDS = range(10)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blob(side):
    """A bright smooth spot on a grey ground, (1, 1, side, side)."""
    line = torch.linspace(-2, 2, side)
    return 0.5 + 0.5 * torch.exp(-(line[:, None] ** 2) - line**2)[None, None]


def inside(maps, frame=4):
    """Without the frame, where zeros from outside come in."""
    return maps[..., frame:-frame, frame:-frame]


# Shapes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_maps_grow_by_the_factor(way, factor):
    kernels = [{}] if way is not TransposedConv else [{"kernel": kernel} for kernel in range(max(3, factor), 7)]
    for options in kernels:
        assert way(2, 5, factor, **options)(noise(3, 2, 4, 7)).shape == (3, 5, 4 * factor, 7 * factor)


def test_kernels_that_leave_gaps_are_refused():
    with pytest.raises(ValueError, match="a kernel of 3 leaves gaps at factor 4"):
        TransposedConv(1, 1, 4)


# Values


@pytest.mark.parametrize(("factor", "kernel", "padding"), [(2, 3, 1), (2, 4, 1), (3, 3, 0), (2, 2, 0), (3, 6, 2), (2, 5, 2)])
def test_a_transposed_convolution_is_the_gradient_of_a_convolution(factor, kernel, padding):
    torch.manual_seed(0)
    layer, coarse = TransposedConv(3, 2, factor, kernel), noise(2, 3, 4, 5)
    fine = torch.zeros(2, 2, 4 * factor, 5 * factor, requires_grad=True)
    down = F.conv2d(fine, layer.convolution.weight, stride=factor, padding=padding)
    (expected,) = torch.autograd.grad(down, fine, coarse)
    torch.testing.assert_close(layer(coarse), expected + layer.convolution.bias[:, None, None])


def test_a_transposed_convolution_adds_its_kernel_at_every_place():
    torch.manual_seed(0)
    layer, coarse = TransposedConv(2, 3), noise(1, 2, 3, 4)
    expected = torch.zeros(3, 6 + 2, 8 + 2)  # with a place more around
    for row in range(3):
        for column in range(4):
            expected[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3] += torch.einsum(
                "i,iokl->okl", coarse[0, :, row, column], layer.convolution.weight
            )
    expected = expected[:, 1:7, 1:9] + layer.convolution.bias[:, None, None]
    torch.testing.assert_close(layer(coarse)[0], expected)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_resize_convolution_sees_every_place_repeated(factor):
    torch.manual_seed(0)
    layer, coarse = ResizeConv(3, 4, factor), noise(2, 3, 5, 4)
    repeated = coarse.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    torch.testing.assert_close(layer(coarse), F.conv2d(repeated, layer.convolution.weight, layer.convolution.bias, padding=1))


def test_a_resize_convolution_goes_to_the_size_it_is_told():
    torch.manual_seed(0)
    layer, coarse = ResizeConv(2, 2), noise(1, 2, 8, 3)
    repeated = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :15, :5]
    torch.testing.assert_close(layer(coarse, (15, 5)), F.conv2d(repeated, layer.convolution.weight, layer.convolution.bias, padding=1))


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffling_turns_channels_into_places(factor):
    torch.manual_seed(0)
    layer, coarse = PixelShuffleConv(3, 4, factor), noise(2, 3, 5, 6)
    nn.init.normal_(layer.convolution.weight)
    many, fine = layer.convolution(coarse), layer(coarse)
    for channel in range(4):
        for row in range(5 * factor):
            for column in range(6 * factor):
                source = channel * factor**2 + row % factor * factor + column % factor
                assert fine[:, channel, row, column].equal(many[:, source, row // factor, column // factor])


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffling_begins_as_a_convolution_whose_places_are_repeated(factor):
    torch.manual_seed(0)
    layer, coarse = PixelShuffleConv(3, 4, factor), noise(2, 3, 5, 6)
    small = F.conv2d(coarse, layer.convolution.weight[:: factor**2], layer.convolution.bias[:: factor**2], padding=1)
    torch.testing.assert_close(layer(coarse), small.repeat_interleave(factor, 2).repeat_interleave(factor, 3))
    assert small.std((0, 2, 3)).min() > 0
    assert len(small[0, :, 2, 2].unique()) == 4  # while different outputs have kernels of their own
    bound = (3 * 9) ** -0.5
    assert 0.9 * bound < layer.convolution.weight.abs().max() <= bound  # of the size that torch gives


# The measure


def test_checkerboards_and_stripes_are_all_checkerboard():
    flips = (-1.0) ** torch.arange(12)
    for pattern in (flips[:, None] * flips, flips[:, None].expand(12, 12), flips.expand(12, 12)):
        torch.testing.assert_close(checkerboard(3 + 0.2 * pattern[None, None]), torch.ones(1))


def test_repeated_places_are_no_checkerboard():
    repeated = noise(3, 2, 5, 6).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert checkerboard(repeated).max() < 1e-10


def test_the_share_is_that_of_the_energy_over_all_channels():
    flips, wave = (-1.0) ** torch.arange(16), torch.sin(2 * torch.pi * torch.arange(16) / 8)
    first, second = 3 * flips + 7, wave * 5 - 2  # energies of 9 and 12.5
    maps = torch.stack([first, second])[None, :, :, None].expand(1, 2, 16, 8)
    torch.testing.assert_close(checkerboard(maps), torch.tensor([9 / (9 + 12.5)]))


def test_white_noise_has_the_share_of_the_lines():
    shares = checkerboard(noise(200, 4, 16, 24))
    assert shares.mean().item() == pytest.approx((16 + 24 - 1) / (16 * 24 - 1), rel=0.02)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e3])
def test_constant_maps_have_none(value):
    assert checkerboard(torch.full((2, 3, 13, 10), value)).max() < 1e-3


def test_every_image_is_measured_by_itself_and_odd_sides_lose_their_last_place():
    maps = noise(5, 2, 9, 13)
    shares = checkerboard(maps)
    assert shares.shape == (5,)
    for image, share in zip(maps, shares, strict=True):
        torch.testing.assert_close(checkerboard(image[None, :, :8, :12])[0], share)


# The artefact


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("picture", ["constant", "blob"])
def test_only_the_transposed_convolution_leaves_checkerboards(seed, picture):
    torch.manual_seed(seed)
    coarse = torch.ones(1, 1, 16, 16) if picture == "constant" else blob(16)
    shares = {way: checkerboard(inside(way(1, 4)(coarse))).item() for way in WAYS}
    assert shares[TransposedConv] > (0.99 if picture == "constant" else 0.8)
    assert shares[ResizeConv] < 0.003
    assert shares[PixelShuffleConv] < 0.003


@pytest.mark.parametrize("seed", SEEDS)
def test_without_its_initialisation_pixel_shuffling_leaves_them_too(seed):
    torch.manual_seed(seed)
    layer = PixelShuffleConv(1, 4)
    layer.convolution.reset_parameters()
    assert checkerboard(inside(layer(blob(16)))) > 0.3


def test_a_kernel_that_is_a_multiple_of_the_stride_can_be_even():
    """A box of 4 at stride 2 adds four equal terms everywhere; a box of 3 cannot."""
    shares = {}
    for kernel in (3, 4):
        layer = TransposedConv(1, 1, kernel=kernel)
        nn.init.ones_(layer.convolution.weight)
        shares[kernel] = checkerboard(inside(layer(torch.ones(1, 1, 16, 16)))).item()
    assert shares[3] > 0.99
    assert shares[4] < 1e-3
