"""PQN against the definition of lambda-returns, a network written out by hand, and games whose every step is known."""

import contextlib
import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import envs.games
from envs.games import GameConfig
from lab import checkpoint
from lab.config import UserError
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.launch import launch
from lab.learner import Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer
from rl import agent
from rl.pqn import EXPERIMENT, PQNConfig, PQNetwork, PQNExperiment, lambda_returns, trace_after
from rl.pqn import scores as pqn_scores
from rl.values import ExplorationConfig

from .test_dqn import CUT, END, LIFE, SCRIPTS, Scripted, Table

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
CATCH = GameConfig(name="catch", stack=2)
SMALL = PQNConfig(backbone="small", hidden=16, games=4, n_steps=8, batch_size=16, epochs=2)
SHORT = TrainerConfig(steps=4, log_every=1, preview_every=100, save_every=100, precision="fp32")


def trainer_of(experiment, **changes):
    return Trainer(dataclasses.replace(experiment, **changes) if changes else experiment, World())


@pytest.fixture
def catch():
    return PQNExperiment(trainer=SHORT, game=CATCH, pqn=SMALL)


# Returns


def by_definition(rewards, terminal, ended, values, discount, trace):
    """Sutton & Barto 2018, equation 12.3, for each start: every n-step return with its weight, the longest with what is left."""
    steps, games = rewards.shape
    found = torch.zeros(steps, games, dtype=torch.float64)
    for game in range(games):
        for start in range(steps):
            total, gained = 0.0, 0.0
            for n in range(1, steps - start + 1):
                t = start + n - 1
                gained += discount ** (n - 1) * float(rewards[t, game])
                whole = gained + (0.0 if terminal[t, game] else discount**n * float(values[t + 1, game]))
                if terminal[t, game] or ended[t, game] or t == steps - 1:
                    total += trace ** (n - 1) * whole
                    break
                total += (1 - trace) * trace ** (n - 1) * whole
            found[start, game] = total
    return found


@pytest.mark.parametrize("trace", [0.0, 0.65, 1.0])
def test_returns_are_those_of_the_definition(trace):
    torch.manual_seed(0)
    rewards, values = torch.randn(40, 6), torch.randn(41, 6)
    terminal, cut = torch.rand(40, 6) < 0.15, torch.rand(40, 6) < 0.1
    found = lambda_returns(rewards, terminal, terminal & (torch.rand(40, 6) < 0.5) | cut, values, 0.9, trace)
    torch.manual_seed(0)
    torch.randn(40, 6), torch.randn(41, 6), torch.rand(40, 6), torch.rand(40, 6)
    expected = by_definition(rewards, terminal, terminal & (torch.rand(40, 6) < 0.5) | cut, values, 0.9, trace)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_nothing_of_the_next_game_reaches_a_return():
    """The bug of CleanRL's first PQN: without masks the trace ran on into the next episode."""
    rewards, values = torch.zeros(4, 2), torch.zeros(5, 2)
    rewards[2:], values[2:] = 100.0, 100.0  # all that belongs to the next games
    terminal, ended = torch.zeros(4, 2, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.bool)
    terminal[1, 0], ended[1] = True, True  # one game is over, the other one was broken off when 7 was still to come
    values[2, 1] = 7.0
    found = lambda_returns(rewards, terminal, ended, values, 0.5, 0.5)
    assert found[1].tolist() == [0.0, 3.5]
    assert found[0].tolist() == [0.0, 0.5 * 0.5 * 3.5]


def test_lambda_falls_as_far_and_as_fast_as_it_is_told():
    config = PQNConfig(trace=0.9, trace_fall=0.25, trace_steps=1000)
    assert [trace_after(config, actions) for actions in (0, 400, 1000, 5000)] == pytest.approx([0.9, 0.8, 0.65, 0.65])
    assert trace_after(PQNConfig(trace=0.8), 300_000) == 0.8


# Network


def test_the_network_is_the_one_written_out_by_hand():
    """Layer normalisation over the channels of each place, as Flax does it: over the whole map it would be another network."""
    torch.manual_seed(1)
    network = PQNetwork(PQNConfig(hidden=20), (4, 84, 84), 3).double()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.1)
    pictures = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)

    def normalised(maps, layer, dim):
        centred = maps - maps.mean(dim, keepdim=True)
        scaled = centred / (centred.square().mean(dim, keepdim=True) + 1e-6).sqrt()
        shape = [-1 if axis == dim else 1 for axis in range(maps.ndim)]
        return (scaled * layer.weight.view(shape) + layer.bias.view(shape)).clamp(min=0)

    maps = pictures.double() / 255
    torso = network.torso
    for layer, norm, stride in zip(torso.layers, torso.norms, (4, 2, 1), strict=True):
        windows = maps.unfold(2, layer.kernel_size[0], stride).unfold(3, layer.kernel_size[0], stride)
        maps = normalised(torch.einsum("nchwij,ocij->nohw", windows, layer.weight) + layer.bias.view(1, -1, 1, 1), norm, 1)
    vector = normalised(maps.flatten(1) @ network.dense.weight.T + network.dense.bias, network.norm, 1)
    expected = vector @ network.action_value.weight.T + network.action_value.bias
    found = network(pictures.double() / 255)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert torch.allclose(network.float()(pictures), expected.float(), atol=1e-3)


def test_weights_begin_as_he_et_al_say():
    network = PQNetwork(PQNConfig(), (4, 84, 84), 6)
    for layer, gain in ((network.torso.layers[1], 2), (network.dense, 2), (network.action_value, 1)):
        fan_in = layer.weight[0].numel()
        assert float(layer.weight.detach().var()) == pytest.approx(gain / fan_in, rel=0.05)
        assert not layer.bias.any()


# Playing


@dataclass(frozen=True, kw_only=True)
class TableExperiment(PQNExperiment):
    def network(self, shape, actions):
        return Table(self.pqn.games, actions)


@pytest.fixture
def scripted(monkeypatch):
    """A trainer whose games follow a script and whose values are a table."""
    monkeypatch.setattr(envs.games, "make", lambda *_, **__: Scripted())
    config = PQNConfig(games=2, n_steps=15, batch_size=10, discount=0.9, trace=0.6)
    return Trainer(TableExperiment(trainer=SHORT, pqn=config, exploration=ExplorationConfig(start=0.3, end=0.3)), World())


def test_a_round_is_what_was_played(scripted):
    task = scripted.task
    values = task.learner.module.values.detach()
    acted = task.play(task.learner.module, 0, scripted)
    played, scores = task.learnt_from(acted, 0.6), pqn_scores(acted.steps[1:])
    rows, games = task.games.rows, range(2)
    assert played.actions.view(15, 2).tolist() == [
        [rows[game][t][2] if rows[game][t] else played.actions[2 * t + game] for game in games] for t in range(15)
    ]
    for t in range(15):
        for game in games:
            assert played.observations[2 * t + game, 0, 0].tolist() == [game + 1, t + 1]
    assert played.playable.tolist() == [2 * t + game for t in range(15) for game in games if rows[game][t]]
    flags = {
        kind: torch.tensor([[bool(rows[game][t]) and rows[game][t][1] == kind for game in games] for t in range(15)])
        for kind in (END, CUT, LIFE)
    }
    rewards = torch.tensor([[rows[game][t][0] if rows[game][t] else 0.0 for game in games] for t in range(15)]).clamp(-1, 1)
    best = torch.stack([values[game, 1:17].amax(1) for game in games], 1)
    expected = by_definition(rewards, flags[END] | flags[LIFE], flags[END] | flags[CUT], best, 0.9, 0.6)
    kept = played.playable
    assert torch.allclose(played.returns[kept].double(), expected.flatten()[kept], atol=1e-5)
    assert sum(len(script) for script in SCRIPTS) < 30  # both scripts were played more than once
    assert scores["return"] == pytest.approx(mean_of_ends(rows))


def mean_of_ends(rows):
    """The mean of the unclipped points of all games that ended."""
    ends = []
    for game in rows:
        total = 0.0
        for row in game:
            total += row[0] if row else 0
            if row and row[1] in (END, CUT):
                ends.append(total)
                total = 0.0
    return sum(ends) / len(ends)


def test_every_action_is_learnt_from_in_every_pass(scripted):
    task = scripted.task
    played = task.learnt_from(task.play(task.learner.module, 0, scripted), 0.6)
    passes = [task.batches(played, scripted, number) for number in range(2)]
    for batches in passes:
        assert [len(rows) for rows in batches] == [10, 10, 10]
        assert set(torch.cat(batches).tolist()) == set(played.playable.tolist())
    assert torch.cat(passes[0]).tolist() != torch.cat(passes[1]).tolist()


def test_games_explore_as_often_as_they_should(catch):
    trainer = trainer_of(catch, pqn=PQNConfig(backbone="small", hidden=16, games=64, n_steps=8, batch_size=16))
    values = torch.zeros(64, 3)
    values[:, 1] = 1.0
    chosen = torch.stack([trainer.task.explore(values, 0.3, number) for number in range(400)])
    assert (chosen != 1).double().mean() == pytest.approx(0.3 * 2 / 3, abs=0.01)  # a random action is the best one a third of the time


# Learning


def test_an_update_is_the_one_written_out_by_hand(catch):
    trainer = trainer_of(
        catch, optimizer=OptimizerConfig(kind="sgd", lr=0.1, betas=(0.0, 0.0)), pqn=dataclasses.replace(SMALL, epochs=1, batch_size=32)
    )
    task = trainer.task
    other = PQNetwork(SMALL, task.games.shape, 3)
    other.load_state_dict(task.learner.module.state_dict())
    played = []
    keep = task.learnt_from
    task.learnt_from = lambda *given: played.append(keep(*given)) or played[-1]
    metrics = task.step(trainer)
    (chosen,) = task.batches(played[0], trainer, 0)
    values = other(played[0].observations[chosen])[torch.arange(32), played[0].actions[chosen]]
    loss = ((played[0].returns[chosen] - values) ** 2).mean() / 2
    loss.backward()
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    for ours, theirs in zip(task.learner.module.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs - 0.1 * theirs.grad, atol=1e-6)


def test_parts_of_a_batch_have_the_gradient_of_the_whole(catch):
    whole, parts = trainer_of(catch), trainer_of(catch, trainer=dataclasses.replace(SHORT, accumulate=4))
    for trainer in (whole, parts):
        for _ in range(3):
            trainer.advance()
    for one, other in zip(whole.task.learner.module.parameters(), parts.task.learner.module.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_returns_do_not_depend_on_how_the_loss_is_computed(catch):
    """No gradient flows into the goal."""
    trainer = trainer_of(catch)
    played = trainer.task.learnt_from(trainer.task.play(trainer.task.learner.module, 0, trainer), 0.65)
    assert not played.returns.requires_grad
    loss, _ = trainer.task.loss(Shard(0, 16, 16, 0, 0, torch.device("cpu")), played, played.playable[:16])
    assert loss.requires_grad


def test_a_round_played_ahead_is_played_by_the_weights_before_and_learnt_from_as_ever(catch):
    """Against a loop that plays and learns in turns and holds the older weights by hand."""
    ahead, turns = trainer_of(catch, pqn=dataclasses.replace(SMALL, overlap=True)), trainer_of(catch)
    rows = [ahead.advance()[0] for _ in range(4)]
    task, older = turns.task, copy.deepcopy(turns.task.learner.module)
    played = task.play(older, 0, turns)
    for number, row in enumerate(rows):
        older.load_state_dict(task.learner.module.state_dict())
        following = task.play(older, number + 1, turns)
        expected = task.learn(played, turns)
        turns.step, played = turns.step + 1, following
        assert {name: float(value) for name, value in row.items()} == {name: float(value) for name, value in expected.items()}
    for one, other in zip(ahead.task.learner.module.parameters(), task.learner.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turns", "overlapped"])
@pytest.mark.parametrize(
    "game", [CATCH, GameConfig(name="bricks"), GameConfig(name="pong", max_frames=60, threads=1)], ids=lambda game: game.name
)
def test_a_run_goes_on_exactly_from_any_round(game, overlap, tmp_path):
    pqn = dataclasses.replace(SMALL, backbone="nature" if game.name == "pong" else "small", games=2, batch_size=8, overlap=overlap)
    experiment = PQNExperiment(trainer=SHORT, game=game, pqn=pqn)
    whole = trainer_of(experiment)
    for _ in range(2):
        whole.advance()
    checkpoint.save(tmp_path, 2, whole._parts(), {}, 2)
    for _ in range(2):
        whole.advance()
    again = trainer_of(experiment)
    again.put_back(checkpoint.load_newest(tmp_path))
    assert again.step == 2
    for _ in range(2):
        again.advance()
    for one, other in zip(whole.task.learner.module.parameters(), again.task.learner.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (whole.task.games.last.observations == again.task.games.last.observations).all()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_catch_is_learnt(seed, tmp_path):
    words = ["configs/rl/pqn_catch.yaml", "--run-dir", str(tmp_path / "run"), "--tracking.mode", "disabled", "--trainer.seed", str(seed)]
    with contextlib.chdir(ROOT):
        assert launch(EXPERIMENT, "", [*words, "--test.games", "20", "--test.video-every", "0", "--trainer.preview-every", "1000"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/return"] >= 9
    assert rows[-1]["actions"] == rows[-1]["step"] * 512
    loaded = agent.load(str(tmp_path / "run"))
    assert loaded.experiment.experiment == "pqn"


def test_mistakes_are_told(catch):
    for wrong in ({"channels": (16, 32)}, {"channels": (8, 8, 8), "backbone": "small"}):
        with pytest.raises(ValueError, match="channels are those of nature's three convolutions"):
            PQNConfig(**wrong)
    with pytest.raises(ValueError, match="batch_size must divide games x n_steps, and 100 is no such part of 4096"):
        PQNConfig(batch_size=100)
    with pytest.raises(ValueError, match=r"trace_fall: lambda cannot fall by 0\.5 from 0\.4"):
        PQNConfig(trace=0.4, trace_fall=0.5)
    with pytest.raises(UserError, match=r"pqn\.games: 4 cannot be cut into equal parts for 3 processes"):
        Trainer(catch, World(0, 3))
