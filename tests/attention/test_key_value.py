"""Key-value attention is its formula state by state, and looks only at the states before."""

import pytest
import torch

from lab.attention import recorded
from lab.attention.key_value import KeyValue, earlier

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, SIZE = 9, 4


def setup(predict, window):
    torch.manual_seed(0)
    parts = 3 if predict else 2
    return KeyValue(parts * SIZE, window, predict=predict), torch.randn(2, LENGTH, parts * SIZE, requires_grad=True)


def looped(module, states, predict):
    """Outputs (L, size) and weights (L, L) of one sequence, state by state."""
    keys, values = states[:, :SIZE], states[:, SIZE : 2 * SIZE]
    own = states[:, 2 * SIZE :] if predict else values
    outputs, weights = [], torch.zeros(LENGTH, LENGTH)
    for t in range(LENGTH):
        past = list(range(max(0, t - module.window), t))
        grades = [
            (module.vector.weight[0] * (module.key.weight @ keys[i] + module.query.weight @ keys[t]).tanh()).sum().exp() for i in past
        ]
        seen = torch.zeros(SIZE)
        for i, grade in zip(past, grades):
            weights[t, i] = grade / sum(grades)
            seen = seen + grade / sum(grades) * values[i]
        outputs.append((module.seen.weight @ seen + module.own.weight @ own[t]).tanh())
    return torch.stack(outputs), weights


@pytest.mark.parametrize("predict", [False, True])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_values_weights_and_gradients_are_those_of_the_formula_state_by_state(predict, window):
    module, states = setup(predict, window)
    found, (expected, weights) = module(states), map(torch.stack, zip(*(looped(module, each, predict) for each in states)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(module.weights(states), weights)
    sensitivity, learned = torch.randn_like(found), [states, *module.parameters()]
    mine, other = (torch.autograd.grad(each, learned, sensitivity, allow_unused=True) for each in (found, expected))
    for one, another in zip(mine, other, strict=True):
        torch.testing.assert_close(one, another)


@pytest.mark.parametrize("predict", [False, True])
def test_a_state_sees_the_window_before_it_and_nothing_after(predict):
    module, states = setup(predict, 3)
    found = module(states)
    for place in range(LENGTH):
        gradient = torch.autograd.grad(found[:, place].sum(), states, retain_graph=True)[0].abs().sum((0, 2))
        seen = [max(0, place - 3) <= other <= place for other in range(LENGTH)]  # itself by its key and its own part
        assert (gradient != 0).tolist() == seen


def test_no_state_looks_at_itself_and_the_first_one_looks_nowhere():
    module, states = setup(True, 3)
    weights = module.weights(states)
    assert (weights.diagonal(dim1=1, dim2=2) == 0).all()
    assert (weights[:, 0] == 0).all()
    torch.testing.assert_close(weights[:, 1:].sum(-1), torch.ones(2, LENGTH - 1))
    torch.testing.assert_close(module(states)[:, 0], (states[:, 0, 2 * SIZE :] @ module.own.weight.T).tanh())


def test_prediction_is_no_key_and_no_value():
    module, states = setup(True, 3)
    found = module(states)
    gradient = torch.autograd.grad(found[:, 5].sum(), states)[0].unflatten(-1, (3, SIZE)).abs().sum((0, 3))
    assert (gradient[2:5, :2] > 0).all()
    assert (gradient[2:5, 2] == 0).all()
    assert gradient[5, 1] == 0
    assert gradient[5, 2] > 0


@pytest.mark.parametrize(("length", "window"), [(1, 1), (5, 2), (4, 9)])
def test_the_window_is_that_of_its_definition(length, window):
    assert earlier(length, window).tolist() == [[i - window <= j < i for j in range(length)] for i in range(length)]


def test_weights_are_noted_sizes_are_those_of_the_formula_and_uneven_widths_are_refused():
    module, states = setup(True, 3)
    with recorded(module) as notes:
        module(states)
    assert list(notes) == [""]
    assert notes[""][0].equal(module.weights(states))
    assert sum(weight.numel() for weight in module.parameters()) == 4 * SIZE**2 + SIZE
    with pytest.raises(ValueError, match="width 8 is no multiple of the 3 parts of a state"):
        KeyValue(8)
