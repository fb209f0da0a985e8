"""Rainbow's parts together: every combination, whose noise is whose, how it plays, and what is drawn by surprise."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lab.learner import Shard
from lab.trainer import Trainer
from rl.dqn import EXPERIMENT, DQNConfig, DQNExperiment, QNetwork
from rl.noisy import NoisyLinear
from rl.replay import ReplayConfig
from rl.values import QAgent

from .test_dqn import launched, observations, rounds, set_up, training

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
RAINBOW = {"values": "categorical", "atoms": 11, "v_min": -2.0, "v_max": 2.0, "noisy": True, "n_step": 3}
SURPRISE = ReplayConfig(capacity=2000, prioritised=True)


def rainbow(steps: int = 20, seed: int = 0, **changes) -> Trainer:
    return set_up(trainer=training(steps, seed), replay=SURPRISE, **(RAINBOW | changes))


def shard(step: int, count: int = 8) -> Shard:
    return Shard(0, count, count, 0, step, torch.device("cpu"))


@pytest.mark.parametrize("values", ["mean", "categorical", "quantile"])
@pytest.mark.parametrize(("noisy", "dueling", "double", "prioritised"), list(itertools.product([True, False], repeat=4)))
def test_every_combination_learns(values, noisy, dueling, double, prioritised):
    options = {"values": values, "noisy": noisy, "dueling": dueling, "double": double, "atoms": 7, "quantiles": 5, "n_step": 2}
    trainer = set_up(replay=ReplayConfig(capacity=2000, prioritised=prioritised), learning_starts=16, **options)
    before = [weight.clone() for weight in trainer.task.learner.module.parameters()]
    *_, metrics = rounds(trainer, 5)
    assert math.isfinite(metrics["loss"])
    assert metrics["epsilon"] == 0 or not noisy
    assert not any(one.equal(other) for one, other in zip(before, trainer.task.learner.module.parameters(), strict=True))
    assert trainer.task.learner.module(observations(3)).shape == (3, 3, *{"mean": (), "categorical": (7,), "quantile": (5,)}[values])


def test_the_torso_of_impala_carries_all_parts():
    metrics = rounds(rainbow(backbone="impala"), 7)
    assert math.isfinite(metrics[-1]["loss"])


def test_settings_that_mean_nothing_are_refused_in_a_sentence(capsys):
    for words, sentence in (
        (["--dqn.v-min", "3", "--dqn.v-max", "3"], "v_min must be below v_max, and 3 is not below 3"),
        (["--dqn.atoms", "1"], "atoms must be 2 at least, one for v_min and one for v_max"),
        (["--dqn.sigma", "0"], "expected a float > 0"),
        (["--dqn.values", "median"], "expected one of mean, categorical, quantile"),
    ):
        assert launched([*words, "--print-config"]) == 2
        told = capsys.readouterr().err
        assert sentence in told
        assert "Traceback" not in told


# The network


@pytest.mark.parametrize("values", ["categorical", "quantile"])
def test_the_streams_of_distributions_are_put_together_number_by_number(values):
    """Wang et al.'s equation 9 for each atom (Hessel et al. 2018), before the softmax."""
    torch.manual_seed(0)
    network, seen = QNetwork(DQNConfig(backbone="small", hidden=16, values=values, atoms=6, quantiles=6), (2, 12, 12), 3), observations(4)
    with torch.no_grad():
        features = network.torso(seen)
        value, advantage, found = network.value(features), network.advantage(features), network(seen)
    assert (value.shape, advantage.shape, found.shape) == ((4, 1, 6), (4, 3, 6), (4, 3, 6))
    for row, action, number in itertools.product(range(4), range(3), range(6)):
        mean = sum(advantage[row, other, number].item() for other in range(3)) / 3
        expected = value[row, 0, number].item() + advantage[row, action, number].item() - mean
        assert found[row, action, number].item() == pytest.approx(expected, abs=1e-5)


def test_noise_is_in_the_dense_layers_and_nowhere_else():
    for dueling, count in ((True, 4), (False, 2)):
        network = QNetwork(DQNConfig(backbone="small", hidden=16, noisy=True, dueling=dueling), (2, 12, 12), 3)
        assert sum(isinstance(layer, NoisyLinear) for layer in network.modules()) == count
        assert sum(isinstance(layer, nn.Linear) for layer in network.modules()) == 2 * count


# Noise


def heard(module: nn.Module, into: list) -> None:
    """Note the noise that the last layer of a network computes with."""
    layer = [layer for layer in module.modules() if isinstance(layer, NoisyLinear)][-1]
    layer.register_forward_hook(lambda *_: into.append(layer.noise and layer.noise[0].clone()))


def test_learning_choosing_the_target_and_acting_have_noise_of_their_own_each_time_anew():
    trainer, online, target = rainbow(), [], []
    rounds(trainer, 6)
    heard(trainer.task.learner.module, online)
    heard(trainer.task.target, target)
    rounds(trainer, 2)
    assert [len(one) for one in online] == [4, 4, 1, 1] * 2  # two actions in each of four games, then the choice and what learns
    assert [len(one) for one in target] == [1, 1]
    drawn = torch.cat(online + target)
    assert len(drawn.unique(dim=0)) == 22


def test_noise_is_a_function_of_the_seed_and_the_step():
    first, second, other = rainbow(), rainbow(), rainbow(seed=1)
    kept = []
    for trainer in (first, second, other):
        rounds(trainer, 9)
        kept.append(torch.cat([weight.flatten() for weight in trainer.task.learner.module.parameters()]))
    assert kept[0].equal(kept[1])
    assert not kept[0].equal(kept[2])
    metrics = [first.task.loss(shard(9), first)[0].item() for _ in range(2)]
    assert metrics[0] == metrics[1]  # whoever computes a step once more hears the same noise


def test_random_actions_end_when_learning_starts():
    trainer = rainbow(learning_starts=40)
    found = [metrics["epsilon"] for metrics in rounds(trainer, 10)]
    assert found == [1.0] * 5 + [0.0] * 5


def test_actions_are_the_best_by_the_means_under_each_games_own_noise():
    trainer = rainbow()
    rounds(trainer, 8)
    task, seen = trainer.task, torch.from_numpy(trainer.task.games.last.observations)
    chosen = task.explore(trainer, 0.0, 4000)
    atoms = torch.linspace(-2, 2, 11)
    generator = task.noise(task.learner.module, "act", 4000, torch.device("cpu"), rows=4)
    with torch.no_grad(), generator:
        together = (task.learner.module(seen).softmax(2) * atoms).sum(2)
    assert chosen.tolist() == together.argmax(1).tolist()


def test_noise_lets_games_that_look_alike_do_different_things():
    """stable-baselines3 flips one coin for all games; one noise for all would be the same mistake."""
    trainer = rainbow(games=8)
    rounds(trainer, 8)
    trainer.task.games.last.observations[:] = trainer.task.games.last.observations[:1]
    kinds = [len(set(trainer.task.explore(trainer, 0.0, 8 * draw).tolist())) for draw in range(40)]
    assert max(kinds) > 1


def test_an_agent_is_judged_greedily_and_by_its_mean_weights():
    experiment = DQNExperiment(dqn=DQNConfig(backbone="small", hidden=16, **RAINBOW))
    assert (experiment.usual_policy, EXPERIMENT.usual_policy) == ("greedy", "epsilon")
    trainer = rainbow()
    rounds(trainer, 7)
    assert trainer.task.tester.policy == "greedy"
    network, seen = trainer.task.learner.module, observations(5)
    found = QAgent(network, torch.device("cpu"), trainer.task.kind.means).values(seen)
    with torch.no_grad():
        features = network.torso(seen)
        value, advantage = (
            stream[3](stream[2].mean(stream[0].mean(features).relu())) for stream in (network.value, network.advantage)
        )  # without any sigma
        expected = ((value + advantage - advantage.mean(1, keepdim=True)).softmax(2) * torch.linspace(-2, 2, 11)).sum(2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Learning


def by_hand(task, target: nn.Module, online: nn.Module, batch, step: int) -> list[float]:
    """The loss of every transition of a batch by plain loops: whose noise, whose choice, which distribution."""
    with torch.no_grad():
        outputs = {}
        for stream, network, seen in (
            ("target", target, batch.next_observations),
            ("choice", online, batch.next_observations),
            ("online", online, batch.observations),
        ):
            with task.noise(network, stream, step, torch.device("cpu")):
                outputs[stream] = network(seen).softmax(2).tolist()
    found, atoms = [], [-2 + 0.4 * index for index in range(11)]
    for row in range(len(batch.actions)):
        means = [sum(p * z for p, z in zip(odds, atoms, strict=True)) for odds in outputs["choice"][row]]
        later, said = outputs["target"][row][means.index(max(means))], outputs["online"][row][batch.actions[row]]
        goal = [0.0] * 11
        for mass, atom in zip(later, atoms, strict=True):
            place = (min(2.0, max(-2.0, batch.returns[row].item() + batch.discounts[row].item() * atom)) + 2) / 0.4
            for index in range(11):
                goal[index] += mass * max(0.0, 1 - abs(index - place))
        found.append(sum(p * math.log(p / q) for p, q in zip(goal, said, strict=True) if p > 0))
    return found


def test_what_is_learnt_and_the_priorities_are_the_losses_of_plain_loops():
    trainer = rainbow()
    rounds(trainer, 9)
    task = trainer.task
    target, online = copy.deepcopy(task.target), copy.deepcopy(task.learner.module)
    torch.manual_seed(1)
    for weight in target.parameters():  # which prefers other actions
        weight.data.add_(0.3 * torch.randn_like(weight))
    task.target.load_state_dict(target.state_dict())
    told, reprioritise = [], task.replay.reprioritise
    task.replay.reprioritise = lambda *given: told.append(given) or reprioritise(*given)
    (metrics,) = rounds(trainer, 1)
    ((batch, surprise),) = told
    expected = torch.tensor(by_hand(task, target, online, batch, 9))
    torch.testing.assert_close(surprise, expected, rtol=1e-3, atol=1e-5)
    assert metrics["loss"].item() == pytest.approx((batch.weights * expected).mean().item(), rel=1e-3)
    places = (batch.times % task.replay.rows) * 4 + batch.games
    largest = {}
    for place, loss in zip(places.tolist(), surprise.double().tolist(), strict=True):
        largest[place] = max(loss, largest.get(place, 0.0))
    for place, loss in largest.items():
        assert task.replay.tree.masses[place].item() == pytest.approx((loss + 1e-6) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("double", [True, False])
def test_the_next_action_is_chosen_by_means(double):
    """The categorical network whose most likely return is the highest is not the one with the highest mean."""
    trainer = rainbow(double=double, noisy=False, dueling=False, atoms=3, v_min=-1.0, v_max=1.0)
    odds = torch.tensor([[0.3, 0.3, 0.4], [0.0, 0.7, 0.3], [0.45, 0.1, 0.45]])  # means 0.1, 0.3, 0
    other = odds.roll(1, 0)
    task = trainer.task
    for network, said in ((task.learner.module, odds), (task.target, other)):
        network.register_forward_hook(lambda module, given, outputs, said=said: (said + 1e-9).log().expand(len(outputs), 3, 3))
    later = task.later(observations(2), shard(0, 2)).softmax(1)
    torch.testing.assert_close(later[0], other[1] if double else other[2])


@pytest.mark.slow
def test_catch_is_learnt(tmp_path):
    words = [str(ROOT / "configs/rl/rainbow_catch.yaml"), "--run-dir", str(tmp_path / "run"), "--tracking.mode", "disabled"]
    quick = ["--trainer.steps", "900", "--trainer.preview-every", "900", "--test.games", "20", "--test.video-every", "0"]
    assert launched([*words, *quick]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["train/return"] < -2
    assert rows[-1]["eval/return"] >= 8
