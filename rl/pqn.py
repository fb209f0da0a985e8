"""PQN: parallelised Q-learning without a memory and without a target network (Gallici et al. 2025, arXiv:2407.04811).

    G_t     r_t + g [(1 - lambda) max_a Q(s_{t+1}, a) + lambda G_{t+1}]        the return, computed backwards over what was just played
    loss    (G_t - Q(s_t, a_t))^2 / 2, over some passes through all of it, in small batches

What makes this stable is layer normalisation, over the channels of each place, before every ReLU; fresh experience from many
games side by side stands in for the memory. The returns are Peng's Q(lambda): they go on after an exploring action.

A step of the trainer is a round: `n_steps` actions in each game, then `epochs` passes; or both at once (`overlap`), where the next
round is played, by a copy of the weights, while this one is learnt from. Where a game is over (or a life lost)
nothing follows, G_t = r_t; where it was broken off for its length, and at the end of the round, the value of what was seen
last stands for what would have come. The action after an end is ignored by the game and learnt from by nobody.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from envs import games
from envs.games import AllGames, Games, Step
from lab import backbones, seeding
from lab.backbones import Backbone
from lab.checkpoint import Checkpoint, Stateful
from lab.config import Count, Fraction, Settings
from lab.experiment import Every, TrainerConfig
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer, averages
from rl.agent import AgentExperiment, Policy, choose
from rl.evaluate import TestConfig, Tester
from rl.values import ExplorationConfig, QAgent, exploration_ladder, exploration_rate


@dataclass(frozen=True, kw_only=True)
class PQNConfig(Settings):
    """The algorithm. All counts of actions are over all games together; an action is four frames of the emulator."""

    backbone: str = "nature"
    """Network that sees: nature for 84x84 pixels, small for the small games, or any other that `python scripts/backbones.py` lists."""
    channels: tuple[Count, ...] = ()
    """Channels of its three convolutions, for nature, whose own are 32 64 64."""
    hidden: Count = 512
    """Width of the dense layer."""
    games: Count = 128
    """Games played side by side."""
    n_steps: Count = 32
    """Actions in each game between two rounds of learning; a step of the trainer is games x n_steps actions."""
    epochs: Count = 2
    """Times that a round of learning goes through those actions."""
    batch_size: Count = 128
    """Actions of one update; a divisor of games x n_steps."""
    discount: Fraction = 0.99
    """What a point is worth one action later."""
    trace: Fraction = 0.65
    """Lambda: 0 trusts the value of the next state, 1 only the rewards."""
    trace_fall: Fraction = 0.0
    """By how much lambda falls, linearly: rewards teach values that are not known yet, values that are known tremble less."""
    trace_steps: Count = 500_000
    """Actions over which it falls."""
    overlap: bool = False
    """Play the next round while this one is learnt from, each on half of the threads: more actions a second, by weights a round older."""
    life_loss: bool = True
    """A lost life ends the episode for the learner, not the game."""
    clip_rewards: bool = True
    """Rewards outside of [-1, 1] are taken as -1 or 1, so that one learning rate suits all games."""

    def __post_init__(self) -> None:
        super().__post_init__()
        actions = self.games * self.n_steps
        if actions % self.batch_size:
            raise ValueError(f"batch_size must divide games x n_steps, and {self.batch_size} is no such part of {actions}")
        if self.trace_fall > self.trace:
            raise ValueError(f"trace_fall: lambda cannot fall by {self.trace_fall} from {self.trace}")
        if self.channels and (self.backbone != "nature" or len(self.channels) != 3):
            raise ValueError(f"channels are those of nature's three convolutions, as 32 64 64, not of {self.backbone} {self.channels}")


@dataclass(frozen=True, kw_only=True)
class PQNExperiment(AgentExperiment):
    """Train a PQN agent from scratch."""

    experiment: ClassVar[str] = "pqn"
    axes: ClassVar[Mapping[str, str]] = {"*": "frames", "train/loss": "updates", "train/gradient_norm": "updates", "train/lr": "updates"}

    name: str = "pqn"
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig = TrainerConfig(steps=2442, precision="auto", log_every=1, preview_every=250, save_every=50)
    optimizer: OptimizerConfig = OptimizerConfig(kind="radam", lr=2.5e-4, clip_norm=10.0)
    pqn: PQNConfig = PQNConfig()
    exploration: ExplorationConfig = ExplorationConfig(end=0.001, steps=1_000_000)
    test: TestConfig = TestConfig()

    def task(self, trainer: Trainer) -> PQNTask:
        """Playing and learning in turns."""
        return PQNTask(self, trainer)

    def network(self, shape: tuple[int, int, int], actions: int) -> PQNetwork:
        """The untrained network."""
        return PQNetwork(self.pqn, shape, actions)

    def agent(self, saved: Checkpoint, device: torch.device) -> QAgent:
        """The agent that a checkpoint holds."""
        facts = saved.notes["facts"]
        network = self.network(tuple(facts["shape"]), len(facts["actions"]))
        network.load_state_dict(saved.parts["ema"]["module"] if "ema" in saved.parts else saved.parts["model"])
        return QAgent(network.to(device).eval().requires_grad_(False), device)

    @property
    def usual_policy(self) -> Policy:
        """Judged like any agent that learns values (Mnih et al. 2015)."""
        return "epsilon"


# The network


class PQNetwork(nn.Module):
    """The value of every action; layer normalisation before each ReLU (the authors' `CNN` and `QNetwork`)."""

    def __init__(self, config: PQNConfig, shape: tuple[int, int, int], actions: int) -> None:
        super().__init__()
        frames, size, _ = shape
        # Other backbones have normalisations of their own.
        options: dict[str, Any] = {"layer_norm": True} if config.backbone in ("nature", "small") else {}
        if config.channels:
            options["widths"] = config.channels
        self.torso: Backbone = backbones.create(config.backbone, frames, size, hidden=0, **options)
        self.dense = nn.Linear(self.torso.out_features, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.action_value = nn.Linear(config.hidden, actions)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is self.action_value else "relu")
                nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, observations: Tensor) -> Tensor:
        """Q(s, a), float32 (N, actions), of observations uint8 (N, stack, H, W)."""
        values: Tensor = self.action_value(self.norm(self.dense(self.torso(observations))).relu())
        return values.float()


# The mathematics


def lambda_returns(rewards: Tensor, terminal: Tensor, ended: Tensor, values: Tensor, discount: float, trace: float) -> Tensor:
    """Peng's Q(lambda) over T steps of N games, float32 (T, N) (Gallici et al. 2025, equation 9 and appendix).

    Args:
        rewards: (T, N).
        terminal: nothing follows, (T, N).
        ended: the game is over or was broken off; what follows in the next row belongs to another one, (T, N).
        values: max_a Q(s, a) of what was seen before each step and after the last one, (T + 1, N).
    """
    returns, follows, same_game = values[-1], ~terminal, ~(terminal | ended)
    found = []
    for t in reversed(range(len(rewards))):
        # At the last step both are the value of what was seen then.
        ahead = torch.where(same_game[t], torch.lerp(values[t + 1], returns, trace), values[t + 1])
        returns = rewards[t] + discount * follows[t] * ahead
        found.append(returns)
    return torch.stack(found[::-1])


def trace_after(config: PQNConfig, actions: int) -> float:
    """Lambda after so many actions."""
    return config.trace - config.trace_fall * min(1.0, actions / config.trace_steps)


# Training


@dataclass(frozen=True)
class Played:
    """What this process played in a round of T steps: its n games after T + 1 steps, T actions int64 (n,), T + 1 best values (n,)."""

    steps: Sequence[Step]
    actions: Sequence[Tensor]
    values: Sequence[Tensor]
    exploration: float


@dataclass(frozen=True)
class Round:
    """What is learnt from in a round of T steps: by the n games of this process, flat, and which of it all processes learn from."""

    observations: Tensor
    """uint8 (T * n, stack, H, W)."""
    actions: Tensor
    """int64 (T * n,)."""
    returns: Tensor
    """float32 (T * n,)."""
    playable: Tensor
    """Where an action was really taken, among all T * N of the N games of all processes, int64 (at most T * N,)."""


class PQNTask:
    """Plays a round, then learns from it, over and over."""

    def __init__(self, experiment: PQNExperiment, trainer: Trainer) -> None:
        self.experiment, self.config, self.seed, self.world = experiment, experiment.pqn, trainer.config.seed, trainer.world
        self.own = self.world.part(self.config.games, "pqn.games")
        """Which of the games this process plays."""
        seed = seeding.derive(self.seed, "games", 0)
        self.games: Games = games.make(experiment.game, len(self.own), seed, first=self.own.start)
        self.all_games = AllGames(self.games, self.world, self.standing)
        self.facts = {"shape": list(self.games.shape), "actions": list(self.games.actions)}
        torch.manual_seed(seeding.derive(self.seed, "weights", 0))
        self.learner = trainer.learner(experiment.network(self.games.shape, len(self.games.actions)), experiment.optimizer)
        self.tester = Tester(experiment.game, experiment.test, self.seed, experiment.usual_policy)
        self.ahead: tuple[Played, dict[str, Any]] | None = None
        """The round that is learnt from next, where it has been played, and the games as they stood before it."""
        self.actor = copy.deepcopy(self.learner.module) if self.config.overlap else None
        self.player = ThreadPoolExecutor(1, "player")
        self.games.reset()

    def parts(self) -> Mapping[str, Stateful]:
        """The network, the optimiser, the games where they stand, and the weights that play where those are older."""
        return {**self.learner.parts(), "games": self.all_games} | ({"actor": self.actor} if self.actor else {})

    def standing(self) -> dict[str, Any]:
        """The games of this process, before a round that was played ahead: a resumed run plays it again."""
        return self.ahead[1] if self.ahead else self.games.state_dict()

    def hooks(self, trainer: Trainer) -> Sequence[Every]:
        """How far the run is, and how well the agent plays."""
        return [
            Every(trainer.config.log_every, lambda: self.progress(trainer)),
            Every(trainer.config.preview_every, lambda: self.progress(trainer) | self.test(trainer)),
        ]

    @property
    def actions_per_round(self) -> int:
        """Over all games together."""
        return self.config.games * self.config.n_steps

    def progress(self, trainer: Trainer) -> dict[str, float | int | str]:
        """The axes: frames of the emulator, actions, and updates so far."""
        actions = trainer.step * self.actions_per_round
        updates = trainer.step * self.config.epochs * (self.actions_per_round // self.config.batch_size) - trainer.skipped
        return {"frames": actions * self.games.frames_per_step, "actions": actions, "updates": updates}

    def test(self, trainer: Trainer) -> dict[str, float | int | str]:
        """Scores of whole games that are played for nothing else, and now and then a video."""
        with self.learner.judged() as network, torch.autocast(trainer.world.device.type, torch.bfloat16, enabled=trainer.bf16):
            return self.tester(QAgent(network, trainer.world.device), trainer)

    def step(self, trainer: Trainer) -> Metrics:
        """A round: play, then learn; or learn from what was played ahead while the next round is played."""
        if self.actor is None:
            return self.learn(self.play(self.learner.module, trainer.step, trainer), trainer)
        with threads_halved(trainer.world.device):
            played = self.ahead[0] if self.ahead else self.play(self.actor, trainer.step, trainer)
            standing = self.games.state_dict()
            self.actor.load_state_dict(self.learner.module.state_dict())
            playing = self.player.submit(self.play, self.actor, trainer.step + 1, trainer)
            metrics = self.learn(played, trainer)
            self.ahead = playing.result(), standing
        return metrics

    # Playing

    @torch.no_grad()
    def play(self, network: nn.Module, number: int, trainer: Trainer) -> Played:
        """Take the `n_steps` actions of a round in every game that is this process's."""
        rate = exploration_rate(self.experiment.exploration, number * self.actions_per_round, 0)
        steps, chosen, best = [self.games.last], [], []
        # One context for the whole round, so that autocast converts the weights once.
        with torch.autocast(trainer.world.device.type, torch.bfloat16, enabled=trainer.bf16):
            for time in range(self.config.n_steps + 1):
                values = network(torch.from_numpy(steps[-1].observations).to(trainer.world.device)).cpu()
                best.append(values.amax(1))
                if time < self.config.n_steps:
                    chosen.append(self.explore(values, rate, number * self.config.n_steps + time))
                    steps.append(self.games.step(chosen[-1].numpy()))
        return Played(steps, chosen, best, rate)

    def explore(self, values: Tensor, rate: float, number: int) -> Tensor:
        """An action for every game that this process plays, int64 (n,); what is drawn is drawn for all."""
        rates = exploration_ladder(self.experiment.exploration, rate, self.config.games)
        everybodys = values.new_zeros(self.config.games, values.shape[1])
        everybodys[self.own] = values
        return choose(everybodys, "epsilon", rates, seeding.generator(self.seed, "explore", number))[self.own]

    # Learning

    def learn(self, played: Played, trainer: Trainer) -> Metrics:
        """Some passes through a round; metrics of the updates, and of the games that ended in it."""
        turn = self.learnt_from(played, trace_after(self.config, trainer.step * self.actions_per_round))
        metrics: list[Metrics] = []
        for number in range(self.config.epochs):
            for chosen in self.batches(turn, trainer, number):
                metrics.append(trainer.minimise(self.learner, partial(self.loss, played=turn, rows=chosen), self.config.batch_size))
        return averages(metrics, self.world.device) | {"epsilon": played.exploration} | scores(played.steps[1:])

    def learnt_from(self, played: Played, trace: float) -> Round:
        """The round as the learner sees it."""
        before, after, config = played.steps[:-1], played.steps[1:], self.config
        rewards = stacked([step.rewards for step in after])
        terminal = stacked([step.terminated | step.life_lost if config.life_loss else step.terminated for step in after])
        ended = stacked([step.ended for step in after])
        rewards = rewards.clamp(-1, 1) if config.clip_rewards else rewards
        returns = lambda_returns(rewards, terminal, ended, torch.stack(list(played.values)), config.discount, trace)
        playable = self.world.beside(~stacked([step.ended for step in before])).flatten().nonzero()[:, 0]
        observations = stacked([step.observations for step in before]).flatten(0, 1)
        actions, device = torch.stack(list(played.actions)).flatten(), self.world.device
        observations, actions, returns = (kept.to(device, non_blocking=True) for kept in (observations, actions, returns.flatten()))
        return Round(observations, actions, returns, playable)

    def batches(self, played: Round, trainer: Trainer, number: int) -> Sequence[Tensor]:
        """All that was played in a random order, in batches; some rows twice, in place of those where no action was taken."""
        draw = seeding.generator(self.seed, f"batches/{number}", trainer.step)
        order = played.playable[torch.randperm(len(played.playable), generator=draw)]
        filled = order[torch.arange(self.actions_per_round) % len(order)]
        return torch.split(filled, self.config.batch_size)

    def loss(self, shard: Shard, played: Round, rows: Tensor) -> tuple[Tensor, Metrics]:
        """Half the mean square of the errors, and metrics; each process computes those of the games that it plays."""
        shard = shard.common(self.world)
        here = self.here(rows[shard.first : shard.first + shard.count]).to(shard.device, non_blocking=True)
        observations, actions, returns = (kept.index_select(0, here) for kept in (played.observations, played.actions, played.returns))
        values = self.learner.module(observations).gather(1, actions[:, None])[:, 0]
        error = returns - values
        return 0.5 * shard.mean(error.square()), {"q": shard.mean(values), "error": shard.mean(error.abs())}

    def here(self, rows: Tensor) -> Tensor:
        """Of rows among all games' those of this process's games, as places among its own."""
        if self.world.size == 1:
            return rows
        times, number = rows // self.config.games, rows % self.config.games
        own = (number >= self.own.start) & (number < self.own.stop)
        return (times * len(self.own) + number - self.own.start)[own]


@contextlib.contextmanager
def threads_halved(device: torch.device) -> Iterator[None]:
    """Within, each of two things that a CPU computes at once has half of its threads; a GPU is left alone."""
    whole = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(max(1, whole // 2))
        yield
    finally:
        torch.set_num_threads(whole)


def stacked(arrays: Sequence[NDArray[Any]]) -> Tensor:
    """Arrays of one shape as one tensor, (count, ...)."""
    return torch.from_numpy(np.stack(arrays))


def scores(steps: Sequence[Step]) -> dict[str, float]:
    """The mean return and length of the games that ended in these steps."""
    ended = [(float(step.returns[game]), int(step.lengths[game])) for step in steps for game in np.flatnonzero(step.ended)]
    if not ended:
        return {}
    return {"return": sum(score for score, _ in ended) / len(ended), "length": sum(length for _, length in ended) / len(ended)}


EXPERIMENT = PQNExperiment()
