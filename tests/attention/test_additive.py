"""Bahdanau's attention is its formula, pair by pair."""

import math

import pytest
import torch

from lab.attention import recorded
from lab.attention.additive import Additive

pytestmark = pytest.mark.usefixtures("one_thread")

QUERY, KEY, VALUE, HIDDEN = 5, 4, 3, 6


def setup():
    torch.manual_seed(0)
    return Additive(QUERY, KEY, HIDDEN), torch.randn(2, 3, QUERY), torch.randn(2, 7, KEY), torch.randn(2, 7, VALUE)


def looped(module, query, keys, allowed):
    """The weights of one query, number by number."""
    w, u, v = module.query.weight.tolist(), module.key.weight.tolist(), module.vector.weight[0].tolist()
    grades = []
    for key in keys.tolist():
        inner = [
            math.tanh(sum(a * b for a, b in zip(w[unit], query.tolist())) + sum(a * b for a, b in zip(u[unit], key)))
            for unit in range(HIDDEN)
        ]
        grades.append(math.exp(sum(a * b for a, b in zip(v, inner))))
    kept = [grade if may else 0.0 for grade, may in zip(grades, allowed)]
    return [grade / sum(kept) for grade in kept]


@pytest.mark.parametrize("masked", [False, True])
def test_weights_and_values_are_those_of_the_formula_pair_by_pair(masked):
    module, queries, keys, values = setup()
    mask = torch.rand(2, 3, 7) < 0.6
    mask[..., 0] = True
    given = mask if masked else None
    expected = torch.tensor(
        [[looped(module, queries[n, i], keys[n], mask[n, i] if masked else [True] * 7) for i in range(3)] for n in range(2)]
    )
    weights = module.weights(queries, keys, values, given)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(module(queries, keys, values, given), torch.einsum("nls,nsd->nld", expected, values))
    torch.testing.assert_close(module(queries, keys, mask=given), torch.einsum("nls,nsd->nld", expected, keys))
    if masked:
        assert (weights[~mask] == 0).all()


def test_padding_gets_no_weight_and_no_gradient():
    module, queries, keys, values = setup()
    keys.requires_grad_()
    mask = torch.ones(2, 1, 7, dtype=torch.bool)
    mask[1, :, 5:] = False
    found = module(queries, keys, values, mask)
    torch.testing.assert_close(found[1], module(queries[1:], keys[1:, :5], values[1:, :5])[0])
    gradient = torch.autograd.grad(found.sum(), keys)[0]
    assert (gradient[1, 5:] == 0).all()
    assert (gradient[1, :5] != 0).all()


def test_who_may_look_nowhere_sees_zeros():
    module, queries, keys, values = setup()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1] = False
    found = module(queries, keys, values, mask)
    assert (found[:, 1] == 0).all()
    assert (found[:, [0, 2]] != 0).all()
    found.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in module.parameters())


def test_gradients_are_those_of_small_differences():
    torch.manual_seed(0)
    module = Additive(2, 3, 4).double()
    queries, keys, values = (torch.randn(1, 2, size, dtype=torch.float64, requires_grad=True) for size in (2, 3, 2))
    mask = torch.tensor([[True, True], [False, True]])
    assert torch.autograd.gradcheck(lambda *given: module(*given, mask), (queries, keys, values))


def test_its_weights_are_noted_and_its_size_is_that_of_the_formula():
    module, queries, keys, values = setup()
    with recorded(module) as notes:
        module(queries, keys, values)
    assert notes[""][0].equal(module.weights(queries, keys))
    assert sum(weight.numel() for weight in module.parameters()) == HIDDEN * (QUERY + KEY + 1)


def test_it_runs_in_half_precision_with_weights_in_full():
    module, *given = setup()
    with torch.autocast("cpu", torch.bfloat16):
        found, weights = module(*given), module.weights(*given)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(found.float(), module(*given), rtol=0.05, atol=0.05)
    torch.testing.assert_close(module.bfloat16()(*(each.bfloat16() for each in given)).float(), found.float(), rtol=0.05, atol=0.05)
