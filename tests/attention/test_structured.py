"""Structured self-attention and its penalty are their formulas, number by number."""

import math

import pytest
import torch

from lab.attention.structured import Structured, penalty

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, LENGTH, WIDTH, HIDDEN, HOPS = 2, 6, 4, 5, 3


def setup():
    torch.manual_seed(0)
    return Structured(WIDTH, HIDDEN, HOPS), torch.randn(COUNT, LENGTH, WIDTH, requires_grad=True)


def looped(module, states, real):
    """Weights (hops, length) of one sequence, of which the first `real` states count, number by number."""
    first, second = module.hidden.weight.tolist(), module.hops.weight.tolist()
    rows = []
    for hop in range(HOPS):
        grades = [0.0] * LENGTH
        for place in range(real):
            inner = [math.tanh(sum(first[u][c] * states[place][c] for c in range(WIDTH))) for u in range(HIDDEN)]
            grades[place] = math.exp(sum(second[hop][u] * inner[u] for u in range(HIDDEN)))
        rows.append([grade / sum(grades) for grade in grades])
    return rows


@pytest.mark.parametrize("lengths", [(LENGTH, LENGTH), (LENGTH, 4)])
def test_weights_and_embedding_are_those_of_the_formula(lengths):
    module, states = setup()
    mask = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)
    expected = [looped(module, each, real) for each, real in zip(states.tolist(), lengths)]
    numbers = states.tolist()
    embedding = [
        [[sum(expected[n][hop][i] * numbers[n][i][c] for i in range(LENGTH)) for c in range(WIDTH)] for hop in range(HOPS)]
        for n in range(COUNT)
    ]
    for given in [mask] if min(lengths) < LENGTH else [mask, None]:
        torch.testing.assert_close(module.weights(states, given), torch.tensor(expected))
        torch.testing.assert_close(module(states, given), torch.tensor(embedding))
        torch.testing.assert_close(module.weights(states, given).sum(-1), torch.ones(COUNT, HOPS))
    assert (module.weights(states, mask)[~mask.unsqueeze(1).expand(-1, HOPS, -1)] == 0).all()


def test_padding_changes_nothing_and_learns_nothing():
    module, states = setup()
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4]])
    found = module(states, mask)
    torch.testing.assert_close(found[1:], module(states[1:, :4]))
    gradient = torch.autograd.grad(found.sum(), states)[0]
    assert (gradient[1, 4:] == 0).all()
    assert (gradient[1, :4] != 0).any(-1).all()


def test_the_penalty_is_that_of_the_formula():
    torch.manual_seed(0)
    weights = torch.rand(COUNT, HOPS, LENGTH).softmax(-1)
    for found, rows in zip(penalty(weights), weights.tolist(), strict=True):
        expected = 0.0
        for i in range(HOPS):
            for j in range(HOPS):
                expected += (sum(rows[i][k] * rows[j][k] for k in range(LENGTH)) - (i == j)) ** 2
        assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_penalty_is_nothing_for_hops_that_each_look_at_another_state():
    apart = torch.eye(LENGTH)[[4, 0, 2]]
    same = torch.eye(LENGTH)[[1, 1, 1]]
    even = torch.full((HOPS, LENGTH), 1 / LENGTH)
    expected = [0.0, HOPS * (HOPS - 1), HOPS * (1 - 1 / LENGTH) ** 2 + HOPS * (HOPS - 1) / LENGTH**2]
    torch.testing.assert_close(penalty(torch.stack([apart, same, even])), torch.tensor(expected))


def test_gradients_are_those_of_small_differences():
    torch.manual_seed(0)
    module = Structured(2, 3, 2).double()
    states = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda given: (module(given, mask), penalty(module.weights(given, mask))), states)
    assert sum(weight.numel() for weight in module.parameters()) == 2 * 3 + 3 * 2
