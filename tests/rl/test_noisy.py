"""Noisy layers against the formulas of Fortunato et al. 2018."""

import math

import pytest
import torch
from torch import Tensor, nn

from rl.noisy import NoisyLinear, noise, scaled


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(inputs: int, outputs: int, sigma: float = 0.5, seed: int = 0) -> NoisyLinear:
    torch.manual_seed(seed)
    return NoisyLinear(inputs, outputs, sigma)


def weights(noisy: NoisyLinear) -> tuple[Tensor, Tensor]:
    """What the layer multiplies and adds now, found by what it does to unit vectors."""
    inputs = noisy.mean.in_features
    with torch.no_grad():
        bias = noisy(torch.zeros(1, inputs))[0]
        return (noisy(torch.eye(inputs)) - bias).T, bias


def test_weights_begin_as_in_the_paper() -> None:
    """Section 3.2: mu uniform within 1 / sqrt(p), sigma everywhere sigma_0 / sqrt(p), biases too."""
    noisy = layer(400, 300, 0.4)
    for tensor in noisy.mean.parameters():
        assert tensor.abs().max() <= 1 / 20
        assert tensor.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.1)
        assert tensor.mean().abs() < 0.005
    for tensor in noisy.spread.parameters():
        assert torch.allclose(tensor, torch.tensor(0.4 / 20))


def test_the_noise_of_the_weights_is_the_outer_product_of_two_vectors() -> None:
    """CleanRL's layer, which is told to be factorised, draws every weight's noise by itself: that matrix has full rank."""
    noisy = layer(9, 7)
    with torch.no_grad():
        for tensor in noisy.spread.parameters():
            tensor.uniform_(0.1, 1.0)
    with noise(noisy, numbers(1)):
        matrix, bias = weights(noisy)
        inner, outer = noisy.noise[0][0], noisy.noise[1][0]
    found = (matrix - noisy.mean.weight) / noisy.spread.weight
    singular = torch.linalg.svdvals(found.detach())
    assert singular[0] > 0.5
    assert singular[1] < 1e-5 * singular[0]
    torch.testing.assert_close(found.detach(), outer[:, None] * inner, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(((bias - noisy.mean.bias) / noisy.spread.bias).detach(), outer, rtol=1e-4, atol=1e-5)


def test_noise_is_normal_and_then_scaled_by_f() -> None:
    draws = torch.linspace(-3, 3, 13)
    expected = [math.copysign(math.sqrt(abs(value)), value) for value in draws.tolist()]
    assert scaled(draws).tolist() == pytest.approx(expected)
    noisy = layer(50_000, 40_000 // 1000)
    noisy.draw(numbers(0), 1, slice(None))
    squares = noisy.noise[0].abs() ** 2 * noisy.noise[0].sign()  # f backwards
    assert squares.mean().abs() < 0.02
    assert squares.std().item() == pytest.approx(1, abs=0.02)
    assert (squares**4).mean().item() == pytest.approx(3, abs=0.2)  # which is the normal distribution's


def test_the_variance_of_a_weight_is_that_of_the_formula() -> None:
    """Var f(e_out) f(e_in) = E|e_out| E|e_in| = 2 / pi, so a weight spreads by sigma sqrt(2 / pi); its bias by sigma (2 / pi)^(1/4)."""
    noisy, found = layer(4, 3), []
    for draw in range(4000):
        with noise(noisy, numbers(draw)):
            matrix, bias = weights(noisy)
            found.append(torch.cat([matrix.flatten(), bias]))
    spread, middle = torch.stack(found).std(0), torch.stack(found).mean(0)
    sigma = 0.5 / 2
    assert spread[:12].tolist() == pytest.approx([sigma * math.sqrt(2 / math.pi)] * 12, rel=0.08)
    assert spread[12:].tolist() == pytest.approx([sigma * (2 / math.pi) ** 0.25] * 3, rel=0.08)
    means = torch.cat([noisy.mean.weight.flatten(), noisy.mean.bias]).detach()
    assert (middle - means).abs().max() < 5 * sigma / math.sqrt(4000)


def test_without_noise_a_layer_is_its_means() -> None:
    noisy, features = layer(6, 5), torch.randn(3, 6, generator=numbers())
    expected = features @ noisy.mean.weight.T + noisy.mean.bias
    torch.testing.assert_close(noisy(features), expected)
    with noise(noisy, numbers()):
        assert not torch.allclose(noisy(features), expected)
    torch.testing.assert_close(noisy(features), expected)  # even where somebody forgets `eval`
    with pytest.raises(KeyError), noise(noisy, numbers()):
        raise KeyError
    torch.testing.assert_close(noisy(features), expected)


def test_every_row_can_have_noise_of_its_own_and_a_part_of_them_is_the_same_part() -> None:
    noisy, features = layer(6, 5), torch.randn(1, 6, generator=numbers()).expand(8, 6)
    with noise(noisy, numbers(1)):
        same = noisy(features)
    torch.testing.assert_close(same, same[:1].expand(8, 5))
    with noise(noisy, numbers(1), rows=8):
        own = noisy(features)
    assert len(own.unique(dim=0)) == 8
    for part in (slice(0, 4), slice(4, 8)):
        with noise(noisy, numbers(1), rows=8, own=part):
            torch.testing.assert_close(noisy(features[part]), own[part])


def test_layers_of_a_network_draw_one_after_the_other() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(NoisyLinear(6, 6, 0.5), nn.ReLU(), NoisyLinear(6, 6, 0.5))
    features = torch.randn(3, 6, generator=numbers())
    with noise(network, numbers(3)):
        first, again = network[0].noise[0], network(features)
        assert not first.equal(network[2].noise[0])
    with noise(network, numbers(3)):
        assert network(features).equal(again)
    with noise(network, numbers(4)):
        assert not network(features).equal(again)


def test_gradients_are_those_of_the_weights_that_were_used() -> None:
    noisy, features = layer(6, 5), torch.randn(3, 6, generator=numbers(), requires_grad=True)
    slopes = torch.randn(3, 5, generator=numbers(1))
    with noise(noisy, numbers(2)):
        inner, outer = noisy.noise
        found = noisy(features)
    (found * slopes).sum().backward()
    matrix = slopes.T @ features.detach()
    torch.testing.assert_close(noisy.mean.weight.grad, matrix)
    torch.testing.assert_close(noisy.spread.weight.grad, matrix * outer.T * inner)
    torch.testing.assert_close(noisy.spread.bias.grad, slopes.sum(0) * outer[0])
    used = noisy.mean.weight + noisy.spread.weight * outer.T * inner
    torch.testing.assert_close(features.grad, (slopes @ used).detach())


def test_noise_is_no_part_of_what_is_saved() -> None:
    noisy = layer(3, 2)
    with noise(noisy, numbers()):
        assert set(noisy.state_dict()) == {"mean.weight", "mean.bias", "spread.weight", "spread.bias"}
