"""Luong's scores are their formulas, pair by pair."""

import math

import pytest
import torch

from lab.attention.additive import Additive
from lab.attention.multihead import scaled_dot_product
from lab.attention.multiplicative import Concat, Dot, General

pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind):
    torch.manual_seed(0)
    return {"dot": lambda: Dot(), "general": lambda: General(4, 5), "concat": lambda: Concat(4, 5, 6)}[kind]()


def score(kind, module, query, key):
    """Of one pair of vectors, in loops."""
    if kind == "dot":
        return sum(q * k for q, k in zip(query, key))
    if kind == "general":
        matrix = module.key.weight.tolist()
        return sum(query[i] * matrix[i][j] * key[j] for i in range(len(query)) for j in range(len(key)))
    pair = [*query, *key]
    rows, vector = module.pair.weight.tolist(), module.vector.weight[0].tolist()
    return sum(v * math.tanh(sum(w * x for w, x in zip(row, pair))) for v, row in zip(vector, rows))


@pytest.mark.parametrize("kind", ["dot", "general", "concat"])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_and_values_are_those_of_the_formula_pair_by_pair(kind, masked):
    module = make(kind)
    queries, keys, values = torch.randn(2, 3, 4), torch.randn(2, 6, 4 if kind == "dot" else 5), torch.randn(2, 6, 3)
    mask = torch.rand(2, 3, 6) < 0.5 if masked else torch.ones(2, 3, 6, dtype=torch.bool)
    mask[..., 0] = True
    scores = torch.tensor([[[score(kind, module, q, k) for k in keys[n].tolist()] for q in queries[n].tolist()] for n in range(2)])
    torch.testing.assert_close(module.score(queries, keys), scores)
    expected = scores.exp() * mask / (scores.exp() * mask).sum(-1, keepdim=True)
    weights = module.weights(queries, keys, values, mask)
    torch.testing.assert_close(weights, expected)
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(module(queries, keys, values, mask), expected @ values)
    torch.testing.assert_close(module(queries, keys, mask=mask), expected @ keys)


@pytest.mark.parametrize(("kind", "size"), [("dot", 0), ("general", 4 * 5), ("concat", 6 * (4 + 5) + 6)])
def test_they_have_the_weights_of_their_formulas(kind, size):
    assert sum(weight.numel() for weight in make(kind).parameters()) == size


def test_dot_of_shrunk_queries_is_scaled_dot_product_attention_with_its_gradients():
    torch.manual_seed(0)
    given = [torch.randn(2, length, 4, requires_grad=True) for length in (3, 6, 6)]
    found, expected = Dot()(given[0] / 2, *given[1:]), scaled_dot_product(*given)
    torch.testing.assert_close(found, expected)
    sensitivity = torch.randn_like(found)
    for one, another in zip(*(torch.autograd.grad(each, given, sensitivity) for each in (found, expected)), strict=True):
        torch.testing.assert_close(one, another)


def test_general_with_the_identity_is_dot():
    module, queries, keys = General(4, 4), torch.randn(2, 3, 4), torch.randn(2, 6, 4)
    torch.nn.init.eye_(module.key.weight)
    torch.testing.assert_close(module(queries, keys), Dot()(queries, keys))


def test_concat_is_bahdanaus_with_one_matrix():
    torch.manual_seed(0)
    ours, theirs = Concat(4, 5, 6), Additive(4, 5, 6)
    queries, keys = torch.randn(2, 3, 4), torch.randn(2, 6, 5)
    with torch.no_grad():
        ours.pair.weight.copy_(torch.cat([theirs.query.weight, theirs.key.weight], 1))
        ours.vector.weight.copy_(theirs.vector.weight)
    found, expected = ours(queries, keys), theirs(queries, keys)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.pair.weight.grad, torch.cat([theirs.query.weight.grad, theirs.key.weight.grad], 1))
    torch.testing.assert_close(ours.vector.weight.grad, theirs.vector.weight.grad)
