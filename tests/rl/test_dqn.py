"""DQN against plain loops over what was played, the formulas of the papers, and a chain whose exact values are known."""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import envs.games
from envs.games import GameConfig, Games, Step
from lab import checkpoint
from lab.backbones.backbone import as_numbers
from lab.checkpoint import Checkpoint
from lab.config import UserError
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.launch import launch
from lab.learner import Shard
from lab.optimizer import OptimizerConfig
from lab.recorder import log
from lab.trainer import DONE, Trainer, TrainingStopped
from rl import agent
from rl.agent import choose
from rl.distributional import error_cost
from rl.dqn import EXPERIMENT, DQNConfig, DQNExperiment, QNetwork, dueling, scale_gradient
from rl.replay import ReplayConfig
from rl.values import ExplorationConfig, exploration_ladder, exploration_rate

pytestmark = pytest.mark.usefixtures("_one_thread")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def _one_thread():
    """Many tiny operations go faster without a pool of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Games whose every step is written down beforehand

GO, LIFE, END, CUT = "go", "life", "end", "cut"
SCRIPTS = (
    [(1.0, GO), (0.0, GO), (5.0, LIFE), (-3.0, GO), (0.0, END), (2.0, GO), (0.5, CUT), (-1.0, END), (0.25, LIFE), (1.0, LIFE), (0.0, CUT)],
    [(0.0, CUT), (4.0, END), (0.5, GO), (0.25, GO), (-0.5, GO), (7.0, GO), (0.0, GO), (1.0, GO), (-8.0, LIFE), (3.0, END)],
)


class Scripted(Games):
    """Games that do what their scripts say, over and over, whatever the actions are; a frame is (game + 1, clock + 1)."""

    frames_per_step = 4

    def __init__(self, scripts=SCRIPTS, kinds=2):
        self.scripts, self.count, self.shape = scripts, len(scripts), (1, 1, 2)
        self.actions = tuple(f"action {index}" for index in range(kinds))
        self.reset()

    def reset(self):
        self.clock, self.places = 0, [0] * self.count
        self.rows = [[] for _ in self.scripts]
        """What happened in each game after each time: reward, kind and action, or None where nobody acted."""
        no, zero, none = np.zeros(self.count, bool), np.zeros(self.count, np.float32), np.zeros(self.count, np.int64)
        self.last = Step(self.frames(), zero, no, no, no, ~no, zero, none, none)
        return self.last

    def frames(self):
        return np.array([[[[game + 1, self.clock + 1]]] for game in range(self.count)], np.uint8)

    def step(self, actions):
        over = self.last.ended
        for game, rows in enumerate(self.rows):
            script = self.scripts[game]
            rows.append(None if over[game] else (*script[self.places[game] % len(script)], int(actions[game])))
            self.places[game] += not over[game]
        self.clock += 1
        rewards = np.array([rows[-1][0] if rows[-1] else 0 for rows in self.rows], np.float32)
        terminated, truncated, lost = (
            np.array([bool(rows[-1]) and rows[-1][1] == kind for rows in self.rows]) for kind in (END, CUT, LIFE)
        )
        returns = np.where(over, 0, self.last.returns + rewards).astype(np.float32)
        lengths = np.where(over, 0, self.last.lengths + 1)
        self.last = Step(self.frames(), rewards, terminated, truncated, lost, over, returns, lengths, np.ones(self.count, np.int64))
        return self.last

    def restart(self, chosen):
        raise NotImplementedError

    def pictures(self):
        raise NotImplementedError

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Table(nn.Module):
    """Values of (game, clock), drawn at random."""

    def __init__(self, games, kinds):
        super().__init__()
        self.values = nn.Parameter(torch.randn(games, 256, kinds))

    def forward(self, observations):
        game, clock = observations[:, -1, 0].long().unbind(1)
        return self.values[game - 1, clock]


@dataclass(frozen=True, kw_only=True)
class TableExperiment(DQNExperiment):
    def network(self, shape, actions):
        return Table(self.dqn.games, actions)


def training(steps=10, seed=0, **changes):
    return TrainerConfig(**({"steps": steps, "seed": seed, "precision": "fp32", "log_every": 1000, "preview_every": 1000} | changes))


def set_up(
    game="catch", stack=2, kind=DQNExperiment, trainer=None, optimizer=None, exploration=None, replay=None, size=84, **dqn
) -> Trainer:
    """A trainer with a small DQN task."""
    defaults = {"backbone": "small", "hidden": 16, "n_step": 1, "games": 4, "train_every": 8, "batch_size": 8, "learning_starts": 40}
    experiment = kind(
        trainer=trainer or training(),
        optimizer=optimizer or OptimizerConfig(kind="adam", lr=1e-3),
        game=GameConfig(name=game, stack=stack, size=size, threads=1),
        dqn=DQNConfig(**(defaults | {"target_every": 80} | dqn)),
        exploration=exploration or ExplorationConfig(),
        replay=replay or ReplayConfig(capacity=2000),
    )
    return Trainer(experiment, World())


def scripted(monkeypatch, scripts=SCRIPTS, kinds=2, **settings) -> Trainer:
    """A trainer on scripted games, whose network is a table."""
    monkeypatch.setattr(envs.games, "make", lambda *_, **__: Scripted(scripts, kinds))
    return set_up(kind=TableExperiment, **({"games": len(scripts), "train_every": len(scripts)} | settings))


@contextlib.contextmanager
def as_it_was():
    """Put back what a script sets for the whole process."""
    threads, handlers, level, propagate = torch.get_num_threads(), list(log.handlers), log.level, log.propagate
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


def launched(words):
    """Run the training script in this process; returns its exit status."""
    with as_it_was():
        return launch(EXPERIMENT, "", words)


def rounds(trainer, count):
    """So many rounds; gives each one's metrics."""
    found = []
    for _ in range(count):
        found.append(trainer.task.step(trainer))
        trainer.step += 1
    return found


# Targets


def plain_target(rows, shown, game, time, config, target, online):
    """The target of one transition by a plain loop over what happened in its game."""
    total, weight = 0.0, 1.0
    for step in range(config.n_step):
        reward, kind, _ = rows[game][time + step]
        reward = min(1.0, max(-1.0, reward)) if config.clip_rewards else reward
        total += weight * reward
        weight *= config.discount
        if kind == END or (kind == LIFE and config.life_loss):
            return total
        if kind == CUT:
            break
    values = target(shown(game, time + step + 1))[0].tolist()
    judge = online(shown(game, time + step + 1))[0].tolist() if config.double else values
    return total + weight * values[judge.index(max(judge))]


@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("life_loss", "clip_rewards"), [(True, True), (True, False), (False, True), (False, False)])
def test_targets_are_those_of_a_plain_loop_over_what_was_played(monkeypatch, n_step, double, life_loss, clip_rewards):
    options = {"double": double, "life_loss": life_loss, "clip_rewards": clip_rewards, "learning_starts": 10_000, "discount": 0.9}
    trainer = scripted(monkeypatch, n_step=n_step, kinds=5, trainer=training(60), **options)
    task = trainer.task
    assert trainer.fit() == DONE
    task.target.values.data = torch.randn(task.target.values.shape, generator=torch.Generator().manual_seed(1))
    rows, config = task.games.rows, trainer.experiment.dqn
    assert len(rows[0]) == 60
    chosen = [(time, game) for game in range(2) for time in range(60 - n_step) if rows[game][time]]
    batch = task.replay.gather(*torch.tensor(chosen).T)

    def shown(game, time):
        return torch.tensor([[[[game + 1, time + 1]]]], dtype=torch.uint8)

    with torch.no_grad():
        later = task.later(batch.next_observations, Shard(0, 1, 1, 0, 60, torch.device("cpu")))
        found = task.kind.errors(torch.zeros(len(chosen)), batch.returns, batch.discounts, later)[1]
        expected = [plain_target(rows, shown, game, time, config, task.target, task.learner.module) for time, game in chosen]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert batch.actions.tolist() == [rows[game][time][2] for time, game in chosen]
    assert batch.observations.flatten(1).tolist() == [[game + 1, time + 1] for time, game in chosen]
    assert task.replay.sampleable == len(chosen)


def test_a_lost_life_ends_the_episode_of_the_learner_only_if_it_should_and_never_the_game(monkeypatch):
    """The game of Mnih et al.: the learner's discount is 0 there, but the next action goes on from where the game stands."""
    for life_loss in (True, False):
        trainer = scripted(monkeypatch, scripts=([(0.0, GO), (0.0, LIFE), (0.0, GO), (0.0, END)],) * 2, life_loss=life_loss)
        rounds(trainer, 9)
        batch = trainer.task.replay.gather(torch.arange(4), torch.zeros(4, dtype=torch.int64))
        assert batch.discounts.tolist() == pytest.approx([0.99, 0.0 if life_loss else 0.99, 0.99, 0.0])
        assert [row[1] if row else None for row in trainer.task.games.rows[0]] == [GO, LIFE, GO, END, None, GO, LIFE, GO, END]


def test_rewards_are_clipped_for_the_learner_and_never_in_the_score(monkeypatch):
    for clip, expected in ((True, [1.0, -1.0, 0.25, 1.0]), (False, [7.0, -3.0, 0.25, 1.5])):
        script = [(7.0, GO), (-3.0, GO), (0.25, GO), (1.5, END)]
        trainer = scripted(monkeypatch, scripts=(script, script), clip_rewards=clip)
        metrics = rounds(trainer, 6)
        batch = trainer.task.replay.gather(torch.arange(4), torch.ones(4, dtype=torch.int64))
        assert batch.returns.tolist() == expected
        assert [(row.get("return"), row.get("length")) for row in metrics] == [(None, None)] * 3 + [(5.75, 4.0)] + [(None, None)] * 2


# Formulas


def test_the_gradient_of_hubers_cost_is_the_clipped_error():
    errors = torch.tensor([-7.0, -1.0, -0.3, 0.0, 0.5, 1.0, 2.5], requires_grad=True)
    cost = error_cost(errors, "huber")
    assert cost.tolist() == pytest.approx([6.5, 0.5, 0.045, 0.0, 0.125, 0.5, 2.0])
    cost.sum().backward()
    assert errors.grad.equal(errors.detach().clamp(-1, 1))


def test_the_squared_cost_is_half_the_square_and_its_gradient_the_error():
    errors = torch.tensor([-7.0, 0.0, 2.5], requires_grad=True)
    cost = error_cost(errors, "squared")
    assert cost.tolist() == [24.5, 0.0, 3.125]
    cost.sum().backward()
    assert errors.grad.equal(errors.detach())


def test_dueling_streams_are_put_together_by_equation_9():
    numbers = torch.Generator().manual_seed(0)
    value, advantage = torch.randn(5, 1, generator=numbers), torch.randn(5, 3, generator=numbers)
    found = dueling(value, advantage)
    for row in range(5):
        mean = sum(advantage[row].tolist()) / 3
        assert found[row].tolist() == pytest.approx([value[row].item() + each - mean for each in advantage[row].tolist()], abs=1e-6)
    torch.testing.assert_close(dueling(value, advantage + 3), found)  # what all actions have in common says nothing
    torch.testing.assert_close(found.mean(1, keepdim=True), value)


def test_a_scaled_gradient_leaves_the_numbers_as_they_are():
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(scale_gradient(features, 0.25), features, rtol=1e-6, atol=0)
    (scale_gradient(features, 0.25) ** 2).sum().backward()
    torch.testing.assert_close(features.grad, 0.25 * 2 * features.detach())


def test_bytes_become_numbers_from_0_to_1_and_none_is_lost():
    every = torch.arange(256, dtype=torch.uint8)
    numbers = as_numbers(every)
    assert numbers.dtype == torch.float32
    assert (numbers[0].item(), numbers[255].item()) == (0.0, 1.0)
    torch.testing.assert_close(numbers.double(), every.double() / 255, rtol=2e-7, atol=0)
    assert (numbers * 255).round().to(torch.uint8).equal(every)
    assert every.equal(torch.arange(256, dtype=torch.uint8))  # what was given is as it was
    with torch.autocast("cpu", torch.bfloat16):
        rough = as_numbers(every)
    assert rough.dtype == torch.bfloat16
    assert (rough[0].item(), rough[255].item()) == (0.0, 1.0)
    torch.testing.assert_close(rough.double(), every.double() / 255, rtol=2**-7, atol=0)


def observations(count, stack=2, side=12, seed=0):
    return torch.randint(256, (count, stack, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_a_dueling_network_is_its_streams_put_together():
    torch.manual_seed(0)
    network, seen = QNetwork(DQNConfig(backbone="small", hidden=16), (2, 12, 12), 3), observations(5)
    features = network.torso(seen / 255)
    torch.testing.assert_close(network(seen), dueling(network.value(features), network.advantage(features)))
    shapes = [
        tuple(layer.weight.shape) for stream in (network.value, network.advantage) for layer in stream if isinstance(layer, nn.Linear)
    ]
    assert shapes == [(16, 32 * 6 * 6), (1, 16), (16, 32 * 6 * 6), (3, 16)]


def test_two_streams_send_no_more_gradient_into_the_torso_than_one():
    torch.manual_seed(0)
    network, seen = QNetwork(DQNConfig(backbone="small", hidden=16), (2, 12, 12), 3), observations(5)
    network(seen).square().sum().backward()
    found = [weight.grad.clone() for weight in network.parameters()]
    network.zero_grad()
    features = network.torso(seen / 255)
    dueling(network.value(features), network.advantage(features)).square().sum().backward()
    for (name, weight), scaled in zip(network.named_parameters(), found, strict=True):
        torch.testing.assert_close(scaled, weight.grad * (0.5**0.5 if name.startswith("torso") else 1), rtol=1e-4, atol=1e-5)


def test_a_plain_network_is_the_papers():
    torch.manual_seed(0)
    network = QNetwork(DQNConfig(dueling=False), (4, 84, 84), 6)
    assert sum(weight.numel() for weight in network.parameters()) == 1_684_128 + 512 * 6 + 6
    seen = observations(2, 4, 84)
    torch.testing.assert_close(network(seen), network.action_value(network.torso(seen / 255)))


def test_values_are_single_precision_even_where_the_network_computes_in_half():
    for streams in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            assert QNetwork(DQNConfig(backbone="small", hidden=8, dueling=streams), (2, 12, 12), 3)(observations(2)).dtype == torch.float32


# Gradients


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_no_gradient_flows_through_the_bootstrap_or_into_the_target_network(double, loss):
    trainer = set_up(double=double, loss=loss, n_step=3, batch_size=32, replay=ReplayConfig(capacity=2000, prioritised=True))
    task = trainer.task
    rounds(trainer, 9)
    torch.manual_seed(1)
    task.target.load_state_dict(task.experiment.network((2, 12, 12), 3).state_dict())  # which prefers other actions
    task.learner.optimizer.zero_grad()
    value, _ = task.loss(Shard(0, 32, 32, 0, 1000, torch.device("cpu")), trainer)
    value.backward()
    found = [weight.grad.clone() for weight in task.learner.module.parameters()]
    assert all(weight.grad is None and not weight.requires_grad for weight in task.target.parameters())

    batch, _ = task.drawn[-1]
    with torch.no_grad():
        later = task.target(batch.next_observations)
        best = (task.learner.module(batch.next_observations) if double else later).argmax(1)
        goal = batch.returns + batch.discounts * later[torch.arange(32), best]
    online = task.learner.module(batch.observations)[torch.arange(32), batch.actions]
    task.learner.optimizer.zero_grad()
    clipped = (goal - online).detach() if loss == "squared" else (goal - online).detach().clamp(-1, 1)
    (-batch.weights * clipped * online).mean().backward()  # the published update: the error times the gradient of Q(s, a)
    for weight, gradient in zip(task.learner.module.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-7)
    assert sum(gradient.abs().sum().item() for gradient in found) > 1e-4


def test_the_metrics_of_an_update_are_what_they_say():
    trainer = set_up(batch_size=32, n_step=2)
    task = trainer.task
    rounds(trainer, 8)
    value, metrics = task.loss(Shard(0, 32, 32, 0, 1000, torch.device("cpu")), trainer)
    batch, error = task.drawn[-1]
    online = task.learner.module(batch.observations).gather(1, batch.actions[:, None])[:, 0]
    assert metrics["q"].item() == pytest.approx(online.mean().item(), abs=1e-6)
    assert metrics["error"].item() == pytest.approx(error.abs().mean().item())
    assert metrics["age"].item() == pytest.approx(np.mean([4 * (16 - time) for time in batch.times.tolist()]))
    assert value.item() == pytest.approx(error_cost(error, "huber").mean().item())


# Exploring


def test_the_share_of_random_actions_falls_only_after_learning_has_started():
    """LeanRL's schedule gives the last value from the first step on."""
    config = ExplorationConfig(start=1.0, end=0.1, steps=1000)
    rates = [exploration_rate(config, actions, learning_starts=500) for actions in range(0, 3000, 100)]
    assert rates[:6] == [1.0] * 6
    assert rates[6:15] == pytest.approx([1.0 - 0.09 * index for index in range(1, 10)])
    assert rates[15:] == pytest.approx([0.1] * 15)
    assert exploration_rate(config, 1000, 500) == 0.55
    assert len(set(rates)) == 11


def test_each_round_explores_at_the_rate_of_its_actions():
    exploration = ExplorationConfig(start=0.9, end=0.1, steps=64)
    trainer = set_up(exploration=exploration)
    found = [metrics["epsilon"] for metrics in rounds(trainer, 16)]
    assert found == [exploration_rate(exploration, 8 * step + 4, 40) for step in range(16)]
    assert found[:5] == [0.9] * 5
    assert found[-1] == pytest.approx(0.1)


def test_games_on_a_ladder_explore_by_the_formula_of_ape_x():
    config = ExplorationConfig(ladder=7.0)
    expected = [0.4 ** (1 + 7 * index / 7) for index in range(8)]
    assert exploration_ladder(config, 0.4, 8).tolist() == pytest.approx(expected)
    assert exploration_ladder(config, 0.4, 1).tolist() == pytest.approx([0.4])
    assert exploration_ladder(ExplorationConfig(), 0.4, 3).tolist() == pytest.approx([0.4] * 3)
    assert exploration_ladder(config, 0.0, 3).tolist() == [0.0] * 3
    assert exploration_ladder(config, 1.0, 3).tolist() == [1.0] * 3


def chi_square(counts, expected):
    """Pearson's statistic, the rarest bins taken together, and its degrees of freedom."""
    pairs, rest = [], np.zeros(2)
    for pair in zip(counts, expected, strict=True):
        if pair[1] >= 5:
            pairs.append(pair)
        else:
            rest += pair
    pairs += [tuple(rest)] if rest[1] else []
    return sum((count - mean) ** 2 / mean for count, mean in pairs), len(pairs) - 1


def explorers(monkeypatch, exploration, draws, kinds=18):
    """Which of 8 games explored, (draws, 8), seen by actions that are not the best."""
    trainer = scripted(monkeypatch, scripts=SCRIPTS * 4, kinds=kinds, exploration=exploration)
    task = trainer.task
    task.learner.module.values.data[...] = 0
    task.learner.module.values.data[..., 3] = 1
    rate = exploration.start
    return np.stack([task.explore(trainer, rate, 8 * draw) != 3 for draw in range(draws)])


def test_every_game_flips_a_coin_of_its_own(monkeypatch):
    """stable-baselines3 flips one for all of them (DQN.predict): then either all explore or none."""
    found = explorers(monkeypatch, ExplorationConfig(start=0.5), 2000)
    share = 0.5 * 17 / 18
    counts = np.bincount(found.sum(1), minlength=9)
    expected = [2000 * math.comb(8, k) * share**k * (1 - share) ** (8 - k) for k in range(9)]
    statistic, freedom = chi_square(counts, expected)
    assert freedom == 8
    assert statistic < 27.9  # exceeded once in 2000 times
    correlations = np.corrcoef(found.T)[~np.eye(8, dtype=bool)]
    assert abs(correlations).max() < 0.1


def test_games_of_the_ladder_really_explore_at_their_shares(monkeypatch):
    found = explorers(monkeypatch, ExplorationConfig(start=0.5, ladder=3.0), 2000)
    expected = np.array([0.5 ** (1 + 3 * index / 7) for index in range(8)]) * 17 / 18
    assert found.mean(0) == pytest.approx(expected, abs=0.045)  # four standard errors


def test_before_learning_all_actions_are_random_and_equally_likely(monkeypatch):
    trainer = scripted(monkeypatch, scripts=SCRIPTS * 4, kinds=6, learning_starts=10_000)
    actions = np.stack([trainer.task.explore(trainer, 1.0, 8 * draw) for draw in range(1000)])
    statistic, _ = chi_square(np.bincount(actions.ravel(), minlength=6), [8000 / 6] * 6)
    assert statistic < 22.1  # exceeded once in 2000 times
    assert abs(np.corrcoef(actions.T)[~np.eye(8, dtype=bool)]).max() < 0.15


def test_without_exploration_the_best_action_by_the_newest_observation_is_taken(monkeypatch):
    trainer = scripted(monkeypatch, kinds=5, exploration=ExplorationConfig(start=0.0, end=0.0), learning_starts=10_000)
    best = trainer.task.learner.module.values.argmax(2).tolist()
    rounds(trainer, 60)
    for game, rows in enumerate(trainer.task.games.rows):
        assert len(rows) == 60
        assert all(row is None or row[2] == best[game][time + 1] for time, row in enumerate(rows))


def test_among_equally_good_actions_one_is_drawn():
    values, draw = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]).expand(6000, -1), torch.Generator().manual_seed(0)
    for policy, epsilon in (("greedy", 0.0), ("epsilon", 0.0)):
        counts = torch.bincount(choose(values, policy, epsilon, draw), minlength=5).tolist()
        assert (counts[0], counts[3]) == (0, 0)
        statistic, _ = chi_square([counts[1], counts[2], counts[4]], [2000] * 3)
        assert statistic < 15.2  # exceeded once in 2000 times


def test_the_same_round_explores_in_the_same_way_again():
    first, second = set_up(), set_up()
    for trainer in (first, second):
        rounds(trainer, 10)
    assert first.task.replay.read(0, 20)["actions"].equal(second.task.replay.read(0, 20)["actions"])
    other = set_up(trainer=training(seed=1))
    rounds(other, 10)
    assert not first.task.replay.read(0, 20)["actions"].equal(other.task.replay.read(0, 20)["actions"])


# What is remembered


@pytest.mark.parametrize(("game", "stack", "hidden"), [("breakout", 4, 8), ("catch", 3, 8)])
def test_the_memory_gives_back_exactly_what_the_games_showed(game, stack, hidden):
    backbone = "nature" if game == "breakout" else "small"
    options = {"n_step": 3, "learning_starts": 10_000, "train_every": 4, "backbone": backbone, "hidden": hidden}
    trainer = set_up(game, stack, trainer=training(300), replay=ReplayConfig(capacity=4000), **options)
    task = trainer.task
    shown, step = [task.games.last], task.games.step
    task.games.step = lambda actions: shown.append(step(actions)) or shown[-1]
    assert trainer.fit() == DONE
    assert len(shown) == 301
    checked = lives = ends = 0
    for time in range(300 - 3):
        rows = [game for game in range(4) if not shown[time].ended[game]]
        batch = task.replay.gather(torch.full((len(rows),), time), torch.tensor(rows, dtype=torch.int64))
        for row, place in enumerate(rows):
            later = time
            while later < time + 3:
                later += 1
                if shown[later].ended[place] or shown[later].life_lost[place]:
                    break
            assert (batch.observations[row].numpy() == shown[time].observations[place]).all()
            assert (batch.next_observations[row].numpy() == shown[later].observations[place]).all()
            assert batch.returns[row].item() == pytest.approx(
                sum(0.99 ** (t - time - 1) * np.clip(shown[t].rewards[place], -1, 1) for t in range(time + 1, later + 1)), abs=1e-6
            )
            checked, lives, ends = checked + 1, lives + shown[later].life_lost[place], ends + shown[later].ended[place]
    assert checked == task.replay.sampleable > 1000
    assert ends > 5
    assert lives > 20 or game == "catch"


def test_truncated_games_bootstrap_from_their_last_frame():
    """CleanRL's PPO and DQN take a game that was broken off for one that ended."""
    trainer = set_up(trainer=training(40), learning_starts=10_000)
    trainer.task.games.config = GameConfig(name="catch", stack=2, max_frames=13)
    trainer.fit()
    held = trainer.task.replay.read(0, 80)
    cut = held["ended"] & ~held["terminal"]
    assert cut.sum() == 4 * 5
    times, games = (cut & (torch.arange(80)[:, None] < 78)).nonzero().unbind(1)
    torch.testing.assert_close(trainer.task.replay.gather(times, games).discounts, torch.full((20,), 0.99))


# The course of training


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def alike(left, right):
    return all(left[name].equal(right[name]) for name in left)


@pytest.mark.parametrize("target_every", [8, 24, 20, 4])
def test_the_target_network_is_copied_every_so_many_actions_and_is_left_alone_between(target_every):
    trainer = set_up(target_every=target_every, learning_starts=16)
    task, copies = trainer.task, 0
    assert alike(snapshot(task.target), snapshot(task.learner.module))
    for step in range(20):
        before = snapshot(task.target)
        rounds(trainer, 1)
        due = any(actions % target_every == 0 for actions in range(8 * step + 1, 8 * step + 9))
        after, online = snapshot(task.target), snapshot(task.learner.module)
        assert alike(after, online if due else before)
        assert due or step < 2 or not alike(after, online)
        copies += due
    assert copies == 160 // max(8, target_every)


@pytest.mark.parametrize(("learning_starts", "first"), [(40, 5), (41, 6), (1, 1), (8, 1)])
def test_learning_begins_after_so_many_actions_with_one_update_a_round(learning_starts, first):
    trainer = set_up(learning_starts=learning_starts)
    start = snapshot(trainer.task.learner.module)
    for step in range(12):
        before = snapshot(trainer.task.learner.module)
        (metrics,) = rounds(trainer, 1)
        assert ("loss" in metrics) == (step >= first)
        assert alike(before, snapshot(trainer.task.learner.module)) == (step < first)
        assert trainer.task.progress(trainer) == {"frames": 8 * (step + 1), "actions": 8 * (step + 1), "updates": max(0, step + 1 - first)}
    assert not alike(start, snapshot(trainer.task.learner.module))


def test_updates_are_not_counted_before_there_is_anything_to_learn_from():
    trainer, made = set_up(learning_starts=1, n_step=5), 0
    for _ in range(6):
        made += "loss" in rounds(trainer, 1)[0]
        assert trainer.task.progress(trainer)["updates"] == made
    assert made > 0


def test_frames_are_counted_as_the_literature_does(monkeypatch):
    trainer = scripted(monkeypatch)
    rounds(trainer, 7)
    assert trainer.task.progress(trainer) == {"frames": 4 * 14, "actions": 14, "updates": 0}


def test_a_batch_is_drawn_whole_or_in_equal_parts():
    whole, parts = set_up(batch_size=12), set_up(batch_size=12, trainer=training(accumulate=3))
    for trainer in (whole, parts):
        rounds(trainer, 10)
    for one, other in zip(whole.task.learner.module.parameters(), parts.task.learner.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="a batch of 8 cannot be cut into"):
        rounds(set_up(trainer=training(accumulate=3)), 10)


def test_rounds_that_cannot_be_shared_by_the_games_are_refused(capsys):
    assert launched(["--dqn.train-every", "12", "--dqn.games", "8", "--print-config"]) == 2
    assert "train_every must be a multiple of games, and 12 is none of 8" in capsys.readouterr().err


def test_games_that_processes_cannot_share_evenly_are_refused():
    with pytest.raises(UserError, match=r"^dqn.games: 8 cannot be cut into equal parts for 3 processes; give a multiple of 3$"):
        Trainer(DQNExperiment(game=GameConfig(name="catch")), World(rank=0, size=3))


# Drawing by surprise


@pytest.mark.parametrize("accumulate", [1, 2])
def test_priorities_follow_from_the_errors_of_exactly_the_batch_that_was_learnt_from(accumulate):
    trainer = set_up(replay=ReplayConfig(capacity=2000, prioritised=True, alpha=0.6), n_step=3, trainer=training(20, accumulate=accumulate))
    task = trainer.task
    rounds(trainer, 7)
    drawn, told = [], []
    sample, reprioritise = task.replay.sample, task.replay.reprioritise
    task.replay.sample = lambda *given: drawn.append(sample(*given)) or drawn[-1]
    task.replay.reprioritise = lambda *given: told.append(given) or reprioritise(*given)
    for _ in range(5):
        online, target = copy.deepcopy(task.learner.module), copy.deepcopy(task.target)
        drawn.clear()
        told.clear()
        rounds(trainer, 1)
        assert len(drawn) == len(told) == accumulate
        for batch, (learnt, errors) in zip(drawn, told, strict=True):
            assert learnt.times.equal(batch.times)
            assert learnt.games.equal(batch.games)
            with torch.no_grad():
                best = online(batch.next_observations).argmax(1)
                goal = batch.returns + batch.discounts * target(batch.next_observations)[torch.arange(len(best)), best]
                expected = goal - online(batch.observations).gather(1, batch.actions[:, None])[:, 0]
            torch.testing.assert_close(errors, expected, rtol=1e-5, atol=1e-6)
        index = (learnt.times % task.replay.rows) * 4 + learnt.games
        largest = {}
        for place, error in zip(index.tolist(), errors.abs().double().tolist(), strict=True):
            largest[place] = max(error, largest.get(place, 0.0))
        for place, error in largest.items():
            assert task.replay.tree.masses[place].item() == pytest.approx((error + 1e-6) ** 0.6, rel=1e-6)


def test_beta_climbs_linearly_to_1():
    trainer, betas = set_up(replay=ReplayConfig(capacity=2000, prioritised=True, beta=0.4), trainer=training(30)), []
    sample = trainer.task.replay.sample
    trainer.task.replay.sample = lambda count, draw, beta: betas.append(beta) or sample(count, draw, beta)
    trainer.fit()
    assert betas == pytest.approx([0.4 + 0.6 * step / 29 for step in range(5, 30)])
    assert betas[-1] == 1


def test_an_update_that_was_skipped_leaves_the_priorities_as_they_were():
    """One error that is not a number would otherwise spoil every sum of the tree, and no batch could be drawn again."""
    trainer = set_up(replay=ReplayConfig(capacity=2000, prioritised=True), trainer=training(20))
    rounds(trainer, 8)
    task = trainer.task
    spoilt = task.learner.module.register_forward_hook(lambda module, given, values: values * math.nan)
    (metrics,) = rounds(trainer, 1)
    spoilt.remove()
    assert math.isnan(metrics["loss"])
    assert trainer.skipped == 1
    assert task.replay.tree.masses.isfinite().all()
    assert task.replay.tree.total.isfinite()
    try:
        assert all(math.isfinite(metrics["loss"]) for metrics in rounds(trainer, 5))
    except TrainingStopped:
        pytest.fail("one bad batch stopped the training")


# A chain whose values are known

STATES, END_REWARDS = 6, (0.1, 1.0)


class Chain(Games):
    """States in a row, the outer two ends; a point is worth more at the right one. Broken off after five actions, which is no end."""

    actions, frames_per_step = ("LEFT", "RIGHT"), 1

    def __init__(self, count):
        self.count, self.shape = count, (1, 1, STATES)
        self.reset()

    def reset(self):
        self.clock = 0
        self.states = self.starts()
        no, zero, none = np.zeros(self.count, bool), np.zeros(self.count, np.float32), np.zeros(self.count, np.int64)
        self.last = Step(self.shown(), zero, no, no, no, ~no, zero, none, none)
        return self.last

    def starts(self):
        return 1 + (self.clock + np.arange(self.count)) % (STATES - 2)

    def shown(self):
        return (np.eye(STATES, dtype=np.uint8) * 255)[self.states][:, None, None]

    def step(self, actions):
        over, self.clock = self.last.ended, self.clock + 1
        self.states = np.where(over, self.starts(), self.states + 2 * actions - 1)
        rewards = np.select([over, self.states == 0, self.states == STATES - 1], [0.0, *END_REWARDS], 0.0).astype(np.float32)
        lengths = np.where(over, 0, self.last.lengths + 1)
        terminated = (self.states == 0) | (self.states == STATES - 1)
        returns, none = np.where(over, 0, self.last.returns + rewards), np.zeros(self.count, np.int64)
        self.last = Step(
            self.shown(), rewards, terminated, (lengths == 5) & ~terminated, np.zeros(self.count, bool), over, returns, lengths, none
        )
        return self.last

    restart = pictures = load_state_dict = None

    def state_dict(self):
        return {}


class Tabular(nn.Module):
    """A value for every state and action."""

    def __init__(self):
        super().__init__()
        self.values = nn.Linear(STATES, 2, bias=False)

    def forward(self, observations):
        return self.values(as_numbers(observations).flatten(1))


@dataclass(frozen=True, kw_only=True)
class ChainExperiment(DQNExperiment):
    def network(self, shape, actions):
        assert (shape, actions) == ((1, 1, STATES), 2)
        return Tabular()


def optimum(discount):
    """Value iteration."""
    values = np.zeros((STATES, 2))
    for _ in range(1000):
        before = values.copy()
        for state in range(1, STATES - 1):
            for action, following in enumerate((state - 1, state + 1)):
                end = following in (0, STATES - 1)
                values[state, action] = END_REWARDS[following > 0] if end else discount * before[following].max()
    return values[1:-1]


@pytest.mark.parametrize(("double", "prioritised"), [(False, False), (True, False), (True, True)])
def test_a_chain_is_solved_to_its_exact_optimum_by_watching_random_play(monkeypatch, double, prioritised):
    monkeypatch.setattr(envs.games, "make", lambda config, count, *_, **__: Chain(count))
    trainer = set_up(
        kind=ChainExperiment,
        trainer=training(500),
        optimizer=OptimizerConfig(kind="sgd", lr=1.0, betas=(0.0, 0.0)),
        exploration=ExplorationConfig(start=1.0, end=1.0),
        replay=ReplayConfig(capacity=4000, prioritised=prioritised),
        double=double,
        loss="squared",
        discount=0.8,
        train_every=4,
        batch_size=64,
        target_every=40,
    )
    assert trainer.fit() == DONE
    found = trainer.task.learner.module.values.weight.T[1:-1].detach().numpy()
    expected = optimum(0.8)
    assert abs(found - expected).max() < 1e-3
    assert expected.argmax(1).tolist() == [1, 1, 1, 1]  # and yet the nearer end is not the better one


# Whole runs

TINY = """
    --game.name catch --game.stack 2 --dqn.backbone small --dqn.hidden 16 --dqn.learning-starts 64 --dqn.batch-size 16 --dqn.target-every 64
    --replay.capacity 2000 --trainer.precision fp32 --trainer.threads 1 --trainer.steps 24 --trainer.save-every 8 --trainer.log-every 4
    --trainer.preview-every 12 --test.games 2 --test.video-every 0 --tracking.mode disabled
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a moment."""
    folder = tmp_path_factory.mktemp("dqn") / "run"
    assert launched([*TINY, "--run-dir", str(folder)]) == 0
    return folder


def test_a_run_counts_frames_actions_and_updates_and_judges_the_agent(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [(row["frames"], row["actions"], row["updates"]) for row in rows] == [
        (32 * row["step"], 32 * row["step"], row["step"] - 2) for row in rows
    ]
    assert [row["step"] for row in rows if "eval/return" in row] == [12, 24]
    assert rows[-1]["eval/length"] == 119
    assert {"train/loss", "train/q", "train/error", "train/age", "train/epsilon", "train/lr"} <= set(rows[-1])


def saved_network(folder):
    network = QNetwork(DQNConfig(backbone="small", hidden=16), (2, 12, 12), 3)
    network.load_state_dict(checkpoint.load(folder).parts["model"])
    return network


def test_agents_are_loaded_by_the_name_of_their_run_or_of_a_checkpoint(run):
    seen = observations(6)
    for name, step in ((run, 24), (run / "checkpoints/step_000000024", 24), (run / "checkpoints/step_000000016", 16)):
        loaded = agent.load(str(name))
        assert (loaded.step, loaded.run.folder, loaded.actions) == (step, run, ("NOOP", "LEFT", "RIGHT"))
        assert loaded.experiment.game.name == "catch"
        torch.testing.assert_close(loaded.agent.values(seen), saved_network(run / f"checkpoints/step_{step:09d}")(seen).detach())
    assert loaded.agent.meaning == "Q-value"
    assert not any(weight.requires_grad for weight in loaded.agent.network.parameters())


def test_an_agent_is_its_averaged_weights_where_there_are_any():
    shape = {"facts": {"shape": [2, 12, 12], "actions": ["NOOP", "LEFT", "RIGHT"]}}
    experiment = DQNExperiment(dqn=DQNConfig(backbone="small", hidden=16))
    now, average = (QNetwork(experiment.dqn, (2, 12, 12), 3) for _ in range(2))
    parts = {"model": now.state_dict(), "ema": {"module": average.state_dict(), "updates": 3}}
    found = experiment.agent(Checkpoint(1, shape, parts), torch.device("cpu"))
    torch.testing.assert_close(found.values(observations(3)), average(observations(3)).detach())
    assert experiment.usual_policy == "epsilon"


@pytest.fixture
def forgetful(run, tmp_path):
    """A copy of the run without the rows of its memory."""
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints/segments")
    return tmp_path / "copy"


def test_an_agent_is_loaded_without_its_memory(run, forgetful):
    seen = observations(3)
    for name in ("", "checkpoints/step_000000016"):
        assert agent.load(str(forgetful / name)).agent.values(seen).equal(agent.load(str(run / name)).agent.values(seen))


def test_a_run_that_lost_its_memory_is_not_resumed_and_nothing_of_it_is_touched(forgetful, capsys):
    before = {path: path.read_bytes() for path in forgetful.rglob("*") if path.is_file()}
    assert launched(["--resume", str(forgetful), "--trainer.steps", "32"]) == 2
    message = capsys.readouterr().err
    assert "segments" in message
    assert "Traceback" not in message
    kept = ("metrics.jsonl", "model.safetensors", "manifest.json")
    assert all(path.read_bytes() == content for path, content in before.items() if path.name in kept)


def learnt_on_catch(folder, seed):
    """The return of the last test of the preset, from a process as a user starts it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "scripts/train_dqn.py"), str(ROOT / "configs/rl/dqn_catch.yaml"), "--run-dir", "run"]
    options = ["--trainer.seed", str(seed), "--trainer.threads", "1", "--trainer.preview-every", "1000"]
    options += ["--test.games", "40", "--test.video-every", "0", "--tracking.mode", "disabled"]
    done = subprocess.run([*words, *options], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^run: run$", done.stdout, re.M)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return rows[0]["train/return"], rows[-1]["eval/return"]


def test_catch_is_learnt_nearly_perfectly(tmp_path):
    before, after = learnt_on_catch(tmp_path, seed=0)
    assert before < -2  # random play
    assert after >= 9.5  # of 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_catch_is_learnt_from_other_seeds_too(tmp_path, seed):
    assert learnt_on_catch(tmp_path, seed)[1] >= 9.5
