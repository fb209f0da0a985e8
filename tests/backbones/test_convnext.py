"""ConvNeXt: places and channels mixed in turn, and a normalisation of the channels of each place."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.backbone import ChannelNorm
from lab.backbones.convnext import ConvNeXt, ConvNeXtBlock, shrink
from tests.backbones.compare import assert_same_function, map_shapes, multiplies, randomised, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_norm_is_layer_norm_of_maps_with_channels_last(layout):
    ours, theirs = ChannelNorm(12), nn.LayerNorm(12, eps=1e-6)
    theirs.load_state_dict(randomised(ours).float().state_dict())
    mine = torch.randn(3, 12, 5, 4).contiguous(memory_format=layout).requires_grad_()
    other = mine.detach().clone().requires_grad_()
    found, expected = ours(mine), theirs(other.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert found.equal(expected)
    probe = torch.randn(found.shape)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    assert mine.grad.equal(other.grad)
    assert ours.weight.grad.equal(theirs.weight.grad)
    assert ours.bias.grad.equal(theirs.bias.grad)


def test_channel_norm_by_hand():
    maps = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    found = ChannelNorm(5).double()(maps)
    for place in ((0, 0, 0), (1, 2, 3)):
        vector = maps[place[0], :, place[1], place[2]]
        centred = vector - vector.mean()
        torch.testing.assert_close(found[place[0], :, place[1], place[2]], centred / (centred.square().mean() + 1e-6).sqrt())


def by_places(maps, given):
    """Layer normalisation over dimension 1."""
    centred = maps - maps.mean(1, keepdim=True)
    normal = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return normal * next(given)[:, None, None] + next(given)[:, None, None]


def block(maps, given):
    scale = next(given)  # a module's own parameters come before those of its parts
    mixed = by_places(F.conv2d(maps, next(given), next(given), padding=3, groups=maps.shape[1]), given)
    mixed = F.conv2d(mixed, next(given)[:, :, None, None], next(given))
    mixed = 0.5 * mixed * (1 + torch.erf(mixed / 2**0.5))
    mixed = F.conv2d(mixed, next(given)[:, :, None, None], next(given))
    return maps + scale[:, None, None] * mixed


def test_a_block_with_its_dense_layers_as_1x1_convolutions():
    assert_same_function(randomised(ConvNeXtBlock(6)), block, 2, 6, 9, 8)


def test_a_step_down_normalises_and_then_convolves():
    def reference(maps, given):
        return F.conv2d(by_places(maps, given), next(given), next(given), 2)

    assert_same_function(randomised(nn.Sequential(*shrink(6, 10))), reference, 2, 6, 8, 6)


def test_a_block_starts_near_the_identity_by_its_layer_scale():
    network, maps = ConvNeXtBlock(8).double(), torch.randn(2, 8, 7, 7, dtype=torch.float64)
    assert network.scale.tolist() == pytest.approx([0.1] * 8)
    tenth = network(maps) - maps
    nn.init.ones_(network.scale)
    torch.testing.assert_close(network(maps) - maps, 10 * tenth, rtol=1e-6, atol=1e-7)  # 0.1 was rounded to float32
    nn.init.zeros_(network.scale)
    assert network(maps).equal(maps)


@pytest.mark.parametrize(("channels", "size", "kernel"), [(1, 28, 3), (4, 84, 7)])
def test_the_network_has_the_weights_and_multiply_adds_of_its_blocks(channels, size, kernel):
    network = ConvNeXt(channels, size)
    count = kernel**2 * channels * 24 + 24 + 2 * 24 + 2 * 96
    products = 28**2 * kernel**2 * channels * 24
    for side, width, depth in ((28, 24, 1), (14, 48, 1), (7, 96, 2)):
        dense = 2 * 4 * width**2
        count += depth * (49 * width + width + 2 * width + dense + 4 * width + width + width)
        products += depth * side**2 * (49 * width + dense)
    for side, width in ((14, 24), (7, 48)):
        count += 2 * width + 4 * width * 2 * width + 2 * width
        products += side**2 * 4 * width * 2 * width
    assert weights(network) == count
    assert multiplies(network, 1, channels, size, size) == products


@pytest.mark.parametrize("size", [28, 84])
def test_the_stages_see_28_14_and_7_pixels_and_the_last_map_is_normalised(size):
    network = ConvNeXt(3, size)
    assert map_shapes(network, 3, size) == [(24, 28, 28), (48, 14, 14), (96, 7, 7)]
    last = network.features(torch.rand(2, 3, size, size))[-1]
    torch.testing.assert_close(last.mean(1), torch.zeros(2, 7, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(last.var(1, unbiased=False), torch.ones(2, 7, 7), atol=1e-3, rtol=0)
