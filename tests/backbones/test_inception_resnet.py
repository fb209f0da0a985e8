"""Inception-ResNet: every block against its formula, and what its scale does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.inception_resnet import InceptionResNet, block_a, block_b, block_c

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = [block_a, block_b, block_c]


def branches_a(x, conv):
    return [conv(x, 1), conv(conv(x, 1), 3), conv(conv(conv(x, 1), 3), 3)]


def branches_b(x, conv):
    return [conv(x, 1), conv(conv(conv(x, 1), (1, 7)), (7, 1))]


def branches_c(x, conv):
    return [conv(x, 1), conv(conv(conv(x, 1), (1, 3)), (3, 1))]


@pytest.mark.parametrize(("block", "branches"), list(zip(BLOCKS, [branches_a, branches_b, branches_c])))
@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_a_block_adds_its_scaled_projected_branches(block, branches, scale):
    torch.manual_seed(0)
    network = block(16, "none", scale).double()
    maps = torch.randn(2, 16, 5, 6, dtype=torch.float64, requires_grad=True)
    *layers, projection = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    layers = iter(layers)

    def conv(x, kernel):
        layer = next(layers)
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        return F.conv2d(x, layer.weight, layer.bias, padding=(height // 2, width // 2)).clamp(min=0)

    joined = torch.cat(branches(maps, conv), 1)
    expected = (
        maps + scale * torch.einsum("oc,nchw->nohw", projection.weight[:, :, 0, 0], joined) + scale * projection.bias.view(-1, 1, 1)
    ).clamp(min=0)
    assert next(layers, None) is None
    found, values = network(maps), [maps, *network.parameters()]
    torch.testing.assert_close(found, expected)
    for mine, other in zip(torch.autograd.grad(found.square().sum(), values), torch.autograd.grad(expected.square().sum(), values)):
        torch.testing.assert_close(mine, other)
        assert other.abs().sum() > 0


@pytest.mark.parametrize("block", BLOCKS)
def test_without_scale_a_block_leaves_rectified_maps_as_they_are(block):
    maps = torch.rand(2, 16, 5, 5)
    assert block(16, "group", 0.0)(maps).equal(maps)
    assert not block(16, "group", 0.1)(maps).allclose(maps)


@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_added_may_be_negative_and_grows_with_the_scale(block):
    torch.manual_seed(1)
    small, large = block(16, "group", 0.1), block(16, "group", 0.3)
    large.load_state_dict(small.state_dict())
    maps = 100 + torch.rand(2, 16, 5, 5, dtype=torch.float64)  # so far from zero that the last ReLU changes nothing
    added, more = small.double()(maps) - maps, large.double()(maps) - maps
    torch.testing.assert_close(more, 3 * added)
    assert added.min() < 0 < added.max()


def test_the_scale_is_that_of_every_block():
    network = InceptionResNet(1, 28, scale=0.0)
    maps = [torch.rand(1, 1, 28, 28)]
    for stage in network.stages:
        maps.append(stage[0](maps[-1]))  # the stem, then the reductions: blocks add nothing
    torch.testing.assert_close(network.features(maps[0]), maps[1:])
    assert {each.scale for each in InceptionResNet(1, 28).modules() if hasattr(each, "scale")} == {0.2}


@pytest.mark.parametrize(("size", "sides"), [(8, (8, 4, 2)), (10, (10, 5, 3)), (28, (28, 14, 7)), (84, (28, 14, 7)), (128, (26, 13, 7))])
def test_sizes_of_the_maps(size, sides):
    network = InceptionResNet(3, size)
    maps = network.features(torch.rand(1, 3, size, size))
    assert [tuple(each.shape[1:]) for each in maps] == [(channels, side, side) for channels, side in zip((32, 80, 160), sides)]
    assert network(torch.rand(2, 3, size, size)).shape == (2, network.out_features) == (2, 160)


def test_it_has_the_weights_that_its_blocks_have():
    def layer(inputs, outputs, kernel):
        return inputs * outputs * kernel + 2 * outputs  # a gain and a shift of normalisation

    def a(width, part):
        return 3 * layer(width, part, 1) + 3 * layer(part, part, 9) + 3 * part * width + width

    def b(width, part, n):
        return 2 * layer(width, part, 1) + 2 * layer(part, part, n) + 2 * part * width + width

    def reduction(inputs, part):
        half = part // 2
        return 2 * layer(inputs, half, 1) + layer(half, half, 9) + 2 * layer(half, part, 9)

    blocks = 2 * a(32, 8) + 3 * b(80, 20, 7) + 2 * b(160, 40, 3)
    expected = layer(1, 32, 9) + blocks + reduction(32, 24) + reduction(80, 40)
    assert sum(weight.numel() for weight in InceptionResNet(1, 28).parameters()) == expected == 144_112


@pytest.mark.parametrize(("norm", "kind"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d)])
def test_sums_and_projections_are_not_normalised(norm, kind):
    modules = list(InceptionResNet(1, 28, norm=norm).modules())
    projections = [each.projection for each in modules if hasattr(each, "projection")]
    convolutions = [each for each in modules if isinstance(each, nn.Conv2d)]
    assert len(projections) == 7
    assert sum(isinstance(each, kind) for each in modules) == len(convolutions) - len(projections)
    assert all((each.bias is not None) == any(each is projection for projection in projections) for each in convolutions)
