"""Distributions of returns against slow loops, closed forms and torch.distributions."""

import math

import pytest
import torch
from torch import Tensor

from rl.distributional import Categorical, Mean, Quantile, divergence, error_cost, of_actions, projected, quantile_huber


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=numbers(seed))


def looped(returns: list[float], masses: list[float], low: float, high: float, atoms: int) -> list[float]:
    """Algorithm 1 of Bellemare et al. 2017, one atom after the other, with the case in which a return falls on an atom."""
    step, found = (high - low) / (atoms - 1), [0.0] * atoms
    for value, mass in zip(returns, masses, strict=True):
        place = (min(high, max(low, value)) - low) / step
        lower, upper = math.floor(place), math.ceil(place)
        if lower == upper:
            found[lower] += mass
        else:
            found[lower] += mass * (upper - place)
            found[upper] += mass * (place - lower)
    return found


@pytest.mark.parametrize(("low", "high", "atoms"), [(-10.0, 10.0, 51), (-2.0, 8.0, 21), (0.0, 1.0, 2), (-1.0, 3.0, 5)])
def test_the_projection_is_that_of_the_papers_loop(low: float, high: float, atoms: int) -> None:
    support = torch.linspace(low, high, atoms)
    masses = drawn(64, atoms).softmax(1)
    rewards, discounts = 4 * drawn(64, seed=1), torch.rand(64, generator=numbers(2)) * (torch.arange(64) % 4 > 0)
    returns = rewards[:, None] + discounts[:, None] * support
    found = projected(returns, masses, support)
    expected = [looped(*row, low, high, atoms) for row in zip(returns.tolist(), masses.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_the_projection_keeps_the_mass_and_where_nothing_is_clipped_the_mean() -> None:
    support, masses = torch.linspace(-10, 10, 51), drawn(64, 51).softmax(1)
    inside = drawn(64, seed=1)[:, None].clamp(-1, 1) + 0.9 * support
    beyond = 30 * drawn(64, seed=2)[:, None] + support
    for returns in (inside, beyond):
        found = projected(returns, masses, support)
        assert (found >= 0).all()
        torch.testing.assert_close(found.sum(1), torch.ones(64), rtol=1e-5, atol=0)
    torch.testing.assert_close((projected(inside, masses, support) * support).sum(1), (inside * masses).sum(1), rtol=1e-4, atol=1e-5)


def test_a_return_that_falls_on_an_atom_gives_it_all_of_its_mass() -> None:
    """Where lower and upper neighbour are one, their two parts are both zero, and implementations without a case for it lose the mass."""
    support, masses = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]), drawn(1, 5).softmax(1)
    assert projected(support[None], masses, support).equal(masses)
    shifted = projected(1 + support[None], masses, support)
    torch.testing.assert_close(shifted[0], torch.tensor([0, *masses[0, :3].tolist(), masses[0, 3:].sum().item()]))


def test_what_lies_beyond_the_ends_counts_as_the_ends_and_an_end_of_the_game_leaves_the_rewards_alone() -> None:
    kind, later = Categorical(5, -2.0, 2.0), drawn(3, 5)
    _, priorities = kind.errors(torch.zeros(3, 5), torch.tensor([7.0, -7.0, 0.25]), torch.zeros(3), later)
    support = kind.support(torch.device("cpu"))
    goal = projected(torch.tensor([7.0, -7.0, 0.25])[:, None] + 0 * support, later.softmax(1), support)
    torch.testing.assert_close(goal, torch.tensor([[0, 0, 0, 0, 1.0], [1.0, 0, 0, 0, 0], [0, 0, 0.75, 0.25, 0]]))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert priorities.tolist() == pytest.approx([math.log(5), math.log(5), math.log(5) - entropy])  # nothing is known: each has 1/5


def test_the_categorical_cost_is_the_divergence_with_the_gradient_of_the_cross_entropy() -> None:
    goals = drawn(16, 7).softmax(1)
    goals[0] = torch.eye(7)[3]  # which has probabilities of zero
    said = drawn(16, 7, seed=1).requires_grad_()
    found = divergence(goals, said.log_softmax(1))
    told, known = (torch.distributions.Categorical(probs=probabilities) for probabilities in (said.softmax(1).detach(), goals))
    torch.testing.assert_close(found.detach(), torch.distributions.kl_divergence(known, told), rtol=1e-4, atol=1e-6)
    found.sum().backward()
    slopes, said.grad = said.grad, None
    torch.nn.functional.cross_entropy(said, goals, reduction="sum").backward()
    torch.testing.assert_close(slopes, said.grad)
    torch.testing.assert_close(slopes, said.detach().softmax(1) - goals, rtol=1e-4, atol=1e-6)  # in closed form
    torch.testing.assert_close(divergence(goals, goals.clamp(min=1e-30).log()), torch.zeros(16), rtol=0, atol=1e-6)


def test_a_categorical_agent_is_told_by_the_loop_what_to_say() -> None:
    kind, later, said = Categorical(11, -3.0, 3.0), drawn(20, 11), drawn(20, 11, seed=1)
    returns, discounts = drawn(20, seed=2), torch.full((20,), 0.97)
    costs, priorities = kind.errors(said, returns, discounts, later)
    for row in range(20):
        atoms = [-3 + 0.6 * index for index in range(11)]
        goal = looped([returns[row].item() + 0.97 * atom for atom in atoms], later[row].softmax(0).tolist(), -3, 3, 11)
        odds = said[row].softmax(0).tolist()
        expected = sum(p * math.log(p / q) for p, q in zip(goal, odds, strict=True) if p > 0)
        assert costs[row].item() == pytest.approx(expected, rel=1e-4)
    assert priorities.equal(costs)  # Hessel et al. 2018 draw by the loss


def plain_quantile_huber(goals: list[float], said: list[float]) -> float:
    """Algorithm 1 of Dabney et al. 2018, pair by pair."""
    total = 0.0
    for index, guess in enumerate(said):
        middle = (2 * index + 1) / (2 * len(said))
        for goal in goals:
            error = goal - guess
            huber = 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
            total += abs(middle - (error < 0)) * huber / len(goals)
    return total


def test_the_quantile_huber_loss_is_the_double_loop() -> None:
    goals, said = 2 * drawn(12, 6), 2 * drawn(12, 9, seed=1)
    expected = [plain_quantile_huber(*pair) for pair in zip(goals.tolist(), said.tolist(), strict=True)]
    torch.testing.assert_close(quantile_huber(goals, said), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_quantiles_learn_the_quantiles_of_what_they_are_shown() -> None:
    """The least quantile Huber loss of many samples: close to the sample's own quantiles, where errors are large beside Huber's 1."""
    sample = 1000 * drawn(4001).sort()[0]
    said = torch.zeros(1, 5, requires_grad=True)
    optimiser = torch.optim.LBFGS([said], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        cost = quantile_huber(sample[None], said)[0]
        cost.backward()
        return cost

    optimiser.step(closure)
    expected = torch.quantile(sample, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    assert (said.detach()[0] - expected).abs().max() < 20  # of a spread of 1000


def test_a_quantile_agent_learns_from_rewards_and_later_quantiles_and_draws_by_its_loss() -> None:
    kind, later, said = Quantile(4), drawn(6, 4), drawn(6, 4, seed=1)
    returns, discounts = drawn(6, seed=2), torch.tensor([0.9, 0.0] * 3)
    costs, priorities = kind.errors(said, returns, discounts, later)
    for row in range(6):
        goals = [returns[row].item() + discounts[row].item() * value for value in later[row].tolist()]
        assert costs[row].item() == pytest.approx(plain_quantile_huber(goals, said[row].tolist()), rel=1e-5)
    assert priorities.equal(costs)


def test_the_mean_draws_by_its_error() -> None:
    said, later, returns, discounts = drawn(8), drawn(8, seed=1), drawn(8, seed=2), torch.tensor([0.9, 0.0] * 4)
    costs, priorities = Mean("huber").errors(said, returns, discounts, later)
    torch.testing.assert_close(priorities, returns + discounts * later - said)
    torch.testing.assert_close(costs, error_cost(priorities, "huber"))


def test_means_are_those_of_the_distributions() -> None:
    outputs = drawn(5, 3, 4)
    odds, atoms = outputs.softmax(2), [-1.0, 0.0, 1.0, 2.0]
    found, middles = Categorical(4, -1.0, 2.0).means(outputs), Quantile(4).means(outputs)
    for row in range(5):
        for action in range(3):
            expected = sum(p * z for p, z in zip(odds[row, action].tolist(), atoms, strict=True))
            assert found[row, action].item() == pytest.approx(expected, abs=1e-6)
            assert middles[row, action].item() == pytest.approx(sum(outputs[row, action].tolist()) / 4, abs=1e-6)
    assert Mean("huber").means(outputs[..., 0]).equal(outputs[..., 0])


@pytest.mark.parametrize("each", [(), (6,)])
def test_what_is_said_of_the_actions_that_were_taken_is_picked_out(each: tuple[int, ...]) -> None:
    outputs, actions = drawn(7, 3, *each).requires_grad_(), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    found = of_actions(outputs, actions)
    assert found.shape == (7, *each)
    for row, action in enumerate(actions.tolist()):
        assert found[row].equal(outputs[row, action])
    found.sum().backward()
    assert outputs.grad is not None
    assert outputs.grad.sum().item() == pytest.approx(7 * math.prod(each))
    assert of_actions(outputs[:0], actions[:0]).shape == (0, *each)
