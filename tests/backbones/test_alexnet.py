"""AlexNet: response normalisation against a loop, overlapping pooling, dropout, and the whole against plain operations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.alexnet import AlexNet, dropped, overlapping_pool, response_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(module):
    return sum(weight.numel() for weight in module.parameters())


def normalised(responses, alpha):
    """Section 3.3, written out: k = 2, n = 5, beta = 0.75."""
    rows = []
    for i in range(responses.shape[1]):
        around = range(max(0, i - 2), min(responses.shape[1] - 1, i + 2) + 1)
        squares = sum(responses[:, j] ** 2 for j in around)
        rows.append(responses[:, i] / (2 + alpha * squares) ** 0.75)
    return torch.stack(rows, 1)


def test_responses_are_normalised_by_those_of_the_neighbouring_maps():
    torch.manual_seed(0)
    responses = torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True)
    found, expected = response_norm()(responses), normalised(responses, 1e-4 * 255**2)
    torch.testing.assert_close(found, expected)
    (mine,), (other,) = torch.autograd.grad(found.sin().sum(), responses), torch.autograd.grad(expected.sin().sum(), responses)
    torch.testing.assert_close(mine, other)


def test_numbers_from_0_to_1_are_normalised_as_the_paper_does_with_those_from_0_to_255():
    torch.manual_seed(1)
    responses = 255 * torch.rand(2, 9, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(255 * response_norm()(responses / 255), normalised(responses, 1e-4))


@pytest.mark.parametrize(("side", "half"), [(28, 14), (14, 7), (7, 4), (13, 7), (2, 1), (1, 1)])
def test_pooling_halves_the_sides(side, half):
    assert overlapping_pool()(torch.rand(1, 2, side, side)).shape == (1, 2, half, half)


def test_the_windows_of_pooling_overlap_by_a_row():
    pool = overlapping_pool()
    for place, seen in ((4, 1), (5, 2), (6, 1), (7, 2)):  # windows are centred on even places and reach one to each side
        maps = torch.zeros(1, 1, 12, 12)
        maps[0, 0, place, 4] = 1
        assert pool(maps).sum() == seen


@pytest.mark.parametrize(
    ("size", "sides"), [(8, (8, 4, 2)), (10, (10, 5, 3)), (28, (28, 14, 7)), (41, (41, 21, 11)), (84, (28, 14, 7)), (128, (26, 13, 7))]
)
def test_sizes_of_the_maps(size, sides):
    network = AlexNet(3, size).eval()
    maps = network.features(torch.rand(1, 3, size, size))
    assert [tuple(each.shape[1:]) for each in maps] == [(channels, side, side) for channels, side in zip((24, 64, 64), sides)]
    assert network(torch.rand(2, 3, size, size)).shape == (2, network.out_features) == (2, 256)


@pytest.mark.parametrize(("channels", "size", "kernel"), [(1, 28, 5), (4, 84, 9), (3, 112, 11)])
def test_it_has_the_weights_that_its_layers_have(channels, size, kernel):
    convolutions = [(channels, 24, kernel), (24, 64, 5), (64, 96, 3), (96, 96, 3), (96, 64, 3)]
    dense = [(64 * 4 * 4, 256), (256, 256)]
    expected = sum(i * o * k * k + o for i, o, k in convolutions) + sum(i * o + o for i, o in dense)
    assert weights(AlexNet(channels, size)) == expected


def test_widths_are_a_quarter_of_the_papers():
    widths = [layer.out_channels for layer in AlexNet(1, 28).modules() if isinstance(layer, nn.Conv2d)]
    assert [4 * width for width in widths] == [96, 256, 384, 384, 256]


def test_the_whole_is_the_layers_in_a_row():
    torch.manual_seed(2)
    network, images = AlexNet(2, 12).eval().double(), torch.rand(2, 2, 12, 12, dtype=torch.float64, requires_grad=True)
    layers = iter([layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)])

    def rectified(maps, padding):
        layer = next(layers)
        return F.conv2d(maps, layer.weight, layer.bias, padding=padding).clamp(min=0)

    maps = normalised(rectified(images, 2), 1e-4 * 255**2)
    maps = normalised(rectified(F.max_pool2d(maps, 3, 2, 1), 2), 1e-4 * 255**2)
    maps = F.max_pool2d(maps, 3, 2, 1)
    for _ in range(3):
        maps = rectified(maps, 1)
    expected = F.max_pool2d(maps, 3, 2, 1).flatten(1)
    for layer in layers:
        expected = layer(expected).clamp(min=0)
    found, values = network(images), [images, *network.parameters()]
    torch.testing.assert_close(found, expected)
    for mine, other in zip(torch.autograd.grad(found.square().sum(), values), torch.autograd.grad(expected.square().sum(), values)):
        torch.testing.assert_close(mine, other)
        assert other.abs().sum() > 0


def test_dropout_takes_its_share_while_training_and_nothing_afterwards():
    torch.manual_seed(3)
    head = dropped(64, 4096, dropout=0.25)
    nn.init.ones_(head[1].bias)
    nn.init.zeros_(head[1].weight)
    units = head(torch.rand(4, 64, 1, 1))
    assert (units == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert units[units > 0].unique().tolist() == pytest.approx([1 / 0.75])
    assert head.eval()(torch.rand(4, 64, 1, 1)).eq(1).all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_within_the_dense_layers_alone(dropout):
    torch.manual_seed(4)
    network, images = AlexNet(1, 12, dropout=dropout), torch.rand(2, 1, 12, 12)
    assert all(each.equal(again) for each, again in zip(network.features(images), network.features(images)))
    assert network(images).equal(network(images)) == (dropout == 0)
    assert sum(isinstance(layer, nn.Dropout) for layer in network.head.modules()) == 2


def test_layers_begin_with_the_variance_that_rectified_units_need():
    torch.manual_seed(5)
    for layer in (layer for layer in AlexNet(1, 28).modules() if isinstance(layer, nn.Conv2d | nn.Linear)):
        assert layer.weight.var().item() == pytest.approx(2 / layer.weight[0].numel(), rel=0.15)
