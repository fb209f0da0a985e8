"""LeNet-5: the weights and connections that the paper counts, and the layers against loops."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.lenet import TABLE, LeNet, PartialConv, Squash, SubSampling

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(module):
    return sum(weight.numel() for weight in module.parameters())


def test_it_has_the_60_000_weights_of_the_paper():
    network = LeNet(1, 28)
    by_layer = [weights(stage) for stage in network.stages] + [weights(layer) for layer in network.head if weights(layer)]
    assert by_layer == [156, 12, 1516, 32, 48_120, 10_164]  # C1, S2, C3, S4, C5, F6 as section II-B counts them
    assert weights(network) == 60_000


def test_it_has_the_340_908_connections_of_the_paper():
    network = LeNet(1, 28)
    c1, s2, c3, s4 = (each[0, 0].numel() for each in network.features(torch.zeros(1, 1, 28, 28)))
    pooled = 4 + 1  # four places and a bias
    output = 84 * 10  # the paper's last layer, which is none of ours
    assert c1 * 156 == 122_304
    assert s2 * 6 * pooled == 5_880
    assert c3 * 1_516 == 151_600
    assert s4 * 16 * pooled == 2_000
    assert c1 * 156 + s2 * 6 * pooled + c3 * 1_516 + s4 * 16 * pooled + 48_120 + 10_164 + output == 340_908


def test_the_table_is_that_of_the_paper():
    drawn = """
        X...XXX..XXXX.XX
        XX...XXX..XXXX.X
        XXX...XXX..X.XXX
        .XXX..XXXX..X.XX
        ..XXX..XXXX.XX.X
        ...XXX..XXXX.XXX
    """  # table I: a row for each map of S2
    assert [[row[column] == "X" for column in range(16)] for row in drawn.split()] == [[seen in row for row in TABLE] for seen in range(6)]
    assert sum(map(len, TABLE)) == 60


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        *[(8, [12, 6, 2, 1]), (9, [13, 6, 2, 1]), (10, [12, 6, 2, 1]), (12, [12, 6, 2, 1]), (28, [28, 14, 10, 5])],
        *[(41, [41, 20, 16, 8]), (42, [21, 10, 6, 3]), (64, [32, 16, 12, 6]), (84, [28, 14, 10, 5]), (128, [26, 13, 9, 4])],
    ],
)
def test_sizes_of_the_maps(size, sides):
    network = LeNet(2, size)
    maps = network.features(torch.rand(1, 2, size, size))
    assert [tuple(each.shape[1:]) for each in maps] == [(channels, side, side) for channels, side in zip(network.out_channels, sides)]
    assert network(torch.rand(3, 2, size, size)).shape == (3, network.out_features) == (3, 84)


def test_a_digit_of_28_pixels_is_seen_as_one_of_32_with_an_empty_frame():
    torch.manual_seed(0)
    digit, convolution = torch.rand(1, 1, 28, 28), LeNet(1, 28).stages[0][0]
    torch.testing.assert_close(convolution(digit), F.conv2d(F.pad(digit, (2, 2, 2, 2)), convolution.weight, convolution.bias))


def test_the_squashing_function_has_the_values_of_appendix_a():
    sums = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0], dtype=torch.float64, requires_grad=True)
    squashed = Squash()(sums)
    torch.testing.assert_close(squashed, torch.tensor([-1.7159, -1.0, 0.0, 1.0, 1.7159], dtype=torch.float64), atol=1e-5, rtol=0)
    (slope,) = torch.autograd.grad(squashed[2], sums)
    assert slope[2].item() == pytest.approx(1.7159 * 2 / 3)


def test_sub_sampling_is_the_mean_of_four_places_weighed_shifted_and_squashed():
    torch.manual_seed(1)
    layer, maps = SubSampling(3), torch.randn(2, 3, 6, 8)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    found = layer(maps)
    assert found.shape == (2, 3, 3, 4)
    for n, c, y, x in itertools.product(range(2), range(3), range(3), range(4)):
        total = maps[n, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].sum() / 4
        expected = 1.7159 * torch.tanh(2 / 3 * (layer.weight[c, 0, 0] * total + layer.bias[c, 0, 0]))
        torch.testing.assert_close(found[n, c, y, x], expected)


def test_a_partial_convolution_is_the_sum_over_the_maps_that_it_sees():
    torch.manual_seed(2)
    layer, maps = PartialConv(TABLE).double(), torch.randn(2, 6, 8, 7, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(layer.bias)
    found = layer(maps)
    kernels, rows = iter(layer.weight), []
    for output, seen in enumerate(TABLE):
        rows.append(sum(F.conv2d(maps[:, [each]], next(kernels)[None, None]) for each in seen) + layer.bias[output])
    expected = torch.cat(rows, 1)
    torch.testing.assert_close(found, expected)
    values = [maps, layer.weight, layer.bias]
    for mine, other in zip(torch.autograd.grad(found.square().sum(), values), torch.autograd.grad(expected.square().sum(), values)):
        torch.testing.assert_close(mine, other)
        assert other.abs().sum() > 0


def test_weights_begin_with_the_variance_of_one_over_the_inputs():
    torch.manual_seed(3)
    layer = PartialConv([[0, 1, 2]] * 200 + [list(range(6))] * 100)
    for kernels, seen in ((layer.weight[:600], 3), (layer.weight[600:], 6)):
        assert kernels.var().item() == pytest.approx(1 / (25 * seen), rel=0.05)
    for dense in (each for each in LeNet(1, 28).head if isinstance(each, nn.Linear)):
        assert dense.weight.var().item() == pytest.approx(1 / dense.in_features, rel=0.05)


def test_the_whole_is_the_layers_in_a_row():
    torch.manual_seed(4)
    network, images = LeNet(1, 28).double(), torch.rand(2, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    c1, s2, (c3, _), s4 = network.stages[0][0], network.stages[1], network.stages[2], network.stages[3]
    dense = [layer for layer in network.head if isinstance(layer, nn.Linear)]

    def squash(sums):
        return 1.7159 * torch.tanh(2 / 3 * sums)

    maps = squash(F.conv2d(images, c1.weight, c1.bias, padding=2))
    maps = squash(F.avg_pool2d(maps, 2) * s2.weight + s2.bias)
    maps = squash(c3(maps))
    maps = squash(F.avg_pool2d(maps, 2) * s4.weight + s4.bias)
    expected = squash(dense[1](squash(dense[0](maps.flatten(1)))))
    found = network(images)
    torch.testing.assert_close(found, expected)
    (mine,), (other,) = torch.autograd.grad(found.sum(), images), torch.autograd.grad(expected.sum(), images)
    torch.testing.assert_close(mine, other)
