"""Deep Q-networks (Mnih et al. 2015), and what grew from them.

    Q(s, a)     the return that an agent can expect who takes action a in state s and the best ones after it
    target      y = r_1 + g r_2 + ... + g^(m-1) r_m + g^m Q'(s_m, a*)          nothing after r_m where the game has ended
    loss        huber(y - Q(s, a)), the mean over a batch drawn from a memory of what was played

Q' is the target network, a copy that lags behind; a* is its own best action, or for double Q-learning (van Hasselt et al.
2016) the one that Q thinks best. Further settings: dueling streams (Wang et al. 2016), m > 1 steps (Sutton 1988), drawing
by surprise (Schaul et al. 2016), a ladder of exploration rates (Horgan et al. 2018), distributions of returns in place of their
means (Bellemare et al. 2017, Dabney et al. 2018), exploring by noisy layers (Fortunato et al. 2018). All of them together, with a
categorical distribution, are Rainbow (Hessel et al. 2018, arXiv:1710.02298).

A step of the trainer is a round: `train_every` actions, shared by the games side by side, then one update. Truncation is
not an end: the value of the last frame stands for what would have come. A lost life may count as an end for the learner;
the game goes on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from envs import games
from envs.games import AllGames, Games, Step
from lab import backbones, seeding
from lab.backbones import Backbone
from lab.checkpoint import Checkpoint, Stateful
from lab.config import Count, Fraction, Positive, Settings
from lab.experiment import Every, TrainerConfig
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer
from rl.agent import AgentExperiment, Policy, choose
from rl.distributional import Categorical, Mean, Quantile, Values, of_actions
from rl.evaluate import TestConfig, Tester
from rl.noisy import NoisyLinear, noise
from rl.replay import Replay, ReplayConfig, Transitions, check_room
from rl.values import ExplorationConfig, QAgent, exploration_ladder, exploration_rate


@dataclass(frozen=True, kw_only=True)
class DQNConfig(Settings):
    """The algorithm. All counts of actions are over all games together; an action is four frames of the emulator."""

    backbone: str = "nature"
    """Network that sees: nature for 84x84 pixels, small for the small games, or any other that `python scripts/backbones.py` lists."""
    hidden: Count = 512
    """Width of the dense layer, or of each of the two streams."""
    double: bool = True
    """The online network chooses the action whose target value is taken."""
    dueling: bool = True
    """Two streams, for the value of a state and for the advantages of actions."""
    n_step: Count = 3
    """Steps of real reward in a target."""
    values: Literal["mean", "categorical", "quantile"] = "mean"
    """What is learnt of the return: its mean, or its distribution as atoms with probabilities (C51) or as quantiles (QR-DQN)."""
    atoms: Count = 51
    """Values categorical: returns that have a probability."""
    v_min: float = -10.0
    """Values categorical: the lowest of them, a discounted return of (clipped) rewards; what lies below counts as this one."""
    v_max: float = 10.0
    """Values categorical: the highest of them."""
    quantiles: Count = 200
    """Values quantile: returns that part the distribution."""
    noisy: bool = False
    """Explore by noise in the weights of the dense layers, not by random actions; `exploration` counts only until learning starts."""
    sigma: Positive = 0.5
    """Noisy: size of the noise at first, times 1 / sqrt(inputs of a layer)."""
    loss: Literal["huber", "squared"] = "huber"
    """Values mean: Huber is the paper's clipping of the error to [-1, 1]."""
    discount: Fraction = 0.99
    """What a point is worth one action later."""
    games: Count = 8
    """Games played side by side; they change speed and how mixed the memory is, not the number of actions."""
    train_every: Count = 32
    """Actions from one update to the next, a multiple of games."""
    batch_size: Count = 256
    """Transitions of an update; divided by train_every: how often each one is seen."""
    target_every: Count = 8_000
    """Actions after which the target network is copied anew."""
    learning_starts: Count = 20_000
    """Actions that are random and only fill the memory."""
    life_loss: bool = True
    """A lost life ends the episode for the learner, not the game."""
    clip_rewards: bool = True
    """Rewards outside of [-1, 1] are taken as -1 or 1, so that one learning rate suits all games."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_every % self.games:
            raise ValueError(f"train_every must be a multiple of games, and {self.train_every} is none of {self.games}")
        if self.v_min >= self.v_max:
            raise ValueError(f"v_min must be below v_max, and {self.v_min:g} is not below {self.v_max:g}")
        if self.atoms < 2:
            raise ValueError("atoms must be 2 at least, one for v_min and one for v_max")

    @property
    def kind(self) -> Values:
        """What the network says of an action."""
        kinds = {
            "mean": Mean(self.loss),
            "categorical": Categorical(self.atoms, self.v_min, self.v_max),
            "quantile": Quantile(self.quantiles),
        }
        return kinds[self.values]


@dataclass(frozen=True, kw_only=True)
class DQNExperiment(AgentExperiment):
    """Train a DQN agent from scratch."""

    experiment: ClassVar[str] = "dqn"
    axes: ClassVar[Mapping[str, str]] = {"*": "frames", "train/loss": "updates", "train/gradient_norm": "updates", "train/lr": "updates"}

    name: str = "dqn"
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig = TrainerConfig(steps=31_250, precision="auto", log_every=100, preview_every=3125, save_every=3125)
    optimizer: OptimizerConfig = OptimizerConfig(kind="adam", lr=2.5e-4, eps=1.5e-4, clip_norm=10.0)
    dqn: DQNConfig = DQNConfig()
    exploration: ExplorationConfig = ExplorationConfig()
    replay: ReplayConfig = ReplayConfig()
    test: TestConfig = TestConfig()

    def task(self, trainer: Trainer) -> DQNTask:
        """Playing and learning in turns."""
        return DQNTask(self, trainer)

    def network(self, shape: tuple[int, int, int], actions: int) -> QNetwork:
        """The untrained network."""
        return QNetwork(self.dqn, shape, actions)

    def agent(self, saved: Checkpoint, device: torch.device) -> QAgent:
        """The agent that a checkpoint holds."""
        facts = saved.notes["facts"]
        network = self.network(tuple(facts["shape"]), len(facts["actions"]))
        network.load_state_dict(saved.parts["ema"]["module"] if "ema" in saved.parts else saved.parts["model"])
        return QAgent(network.to(device).eval().requires_grad_(False), device, self.dqn.kind.means)

    @property
    def usual_policy(self) -> Policy:
        """Mnih et al. 2015 test with one action in twenty at random; who has learnt to explore by noise is judged without it."""
        return "greedy" if self.dqn.noisy else "epsilon"


# The network


class QNetwork(nn.Module):
    """What every action is worth."""

    def __init__(self, config: DQNConfig, shape: tuple[int, int, int], actions: int) -> None:
        super().__init__()
        (frames, size, _), self.dueling, self.each = shape, config.dueling, config.kind.each
        self.torso: Backbone = backbones.create(config.backbone, frames, size, hidden=0)
        if self.dueling:
            self.value, self.advantage = (self.stream(config, outputs) for outputs in (1, actions))
        else:
            self.action_value = self.stream(config, actions)

    def stream(self, config: DQNConfig, actions: int) -> nn.Sequential:
        """Two dense layers, which end with what is said of so many actions: (N, actions, *each)."""
        linear = partial(NoisyLinear, sigma=config.sigma) if config.noisy else nn.Linear
        outputs = actions * math.prod(self.each)
        layers = linear(self.torso.out_features, config.hidden), nn.ReLU(), linear(config.hidden, outputs)
        return nn.Sequential(*layers, nn.Unflatten(1, (actions, *self.each)))

    def forward(self, observations: Tensor) -> Tensor:
        """What is said of all actions, float32 (N, actions) or (N, actions, numbers), of observations uint8 (N, stack, H, W)."""
        features = self.torso(observations)
        if not self.dueling:
            values: Tensor = self.action_value(features)
            return values.float()
        features = scale_gradient(features, 0.5**0.5)  # two streams send their gradients into one torso
        value, advantage = self.value(features).float(), self.advantage(features).float()
        return dueling(value, advantage)


def dueling(value: Tensor, advantage: Tensor) -> Tensor:
    """Q = V + A - mean A (Wang et al. 2016, equation 9), of (N, 1, ...) and (N, actions, ...); of distributions number by number."""
    return value + advantage - advantage.mean(1, keepdim=True)


def scale_gradient(features: Tensor, scale: float) -> Tensor:
    """The same numbers, whose gradient is multiplied by `scale`."""
    return features * scale + features.detach() * (1 - scale)


# Training


class DQNTask:
    """Plays some actions, then learns from one batch, over and over."""

    def __init__(self, experiment: DQNExperiment, trainer: Trainer) -> None:
        self.experiment, self.config, self.seed, world = experiment, experiment.dqn, trainer.config.seed, trainer.world
        self.kind = self.config.kind
        self.own = world.part(self.config.games, "dqn.games")
        """Which of the games this process plays."""
        self.games: Games = games.make(experiment.game, len(self.own), seeding.derive(self.seed, "games", 0), first=self.own.start)
        self.all_games = AllGames(self.games, world)
        shape, count = self.games.shape, len(self.games.actions)
        self.facts = {"shape": list(shape), "actions": list(self.games.actions)}
        check_room(experiment.replay, self.config.games, shape, world)
        self.replay = Replay(experiment.replay, self.config.games, shape, self.config.n_step, self.config.discount, world)
        torch.manual_seed(seeding.derive(self.seed, "weights", 0))
        network = experiment.network(shape, count)
        self.target = copy.deepcopy(network)
        self.learner = trainer.learner(network, experiment.optimizer)
        self.target.to(trainer.world.device).requires_grad_(False)
        self.tester = Tester(experiment.game, experiment.test, self.seed, experiment.usual_policy)
        self.drawn: list[tuple[Transitions, Tensor]] = []
        self.games.reset()

    def parts(self) -> Mapping[str, Stateful]:
        """Both networks, the optimiser, the games where they stand, and the memory."""
        return {**self.learner.parts(), "target": self.target, "games": self.all_games, "replay": self.replay}

    def hooks(self, trainer: Trainer) -> Sequence[Every]:
        """How far the run is, and how well the agent plays."""
        return [
            Every(trainer.config.log_every, lambda: self.progress(trainer)),
            Every(trainer.config.preview_every, lambda: self.progress(trainer) | self.test(trainer)),
        ]

    def progress(self, trainer: Trainer) -> dict[str, float | int | str]:
        """The axes: frames of the emulator, actions, and updates so far."""
        actions = trainer.step * self.config.train_every
        updates = max(0, trainer.step - self.first_update) - trainer.skipped
        return {"frames": actions * self.games.frames_per_step, "actions": actions, "updates": updates}

    def test(self, trainer: Trainer) -> dict[str, float | int | str]:
        """Scores of whole games that are played for nothing else, and now and then a video."""
        with self.learner.judged() as network, torch.autocast(trainer.world.device.type, torch.bfloat16, enabled=trainer.bf16):
            return self.tester(QAgent(network, trainer.world.device, self.kind.means), trainer)

    @property
    def first_update(self) -> int:
        """Rounds that only play: until learning starts, and until the memory holds a whole return."""
        rows = self.config.train_every // self.config.games
        return max(-(-self.config.learning_starts // self.config.train_every), self.config.n_step // rows)

    def step(self, trainer: Trainer) -> Metrics:
        """A round: some actions, one update, the target network."""
        metrics = self.play(trainer)
        actions = (trainer.step + 1) * self.config.train_every
        if trainer.step >= self.first_update and self.replay.sampleable:
            self.drawn.clear()
            learnt = trainer.minimise(self.learner, lambda shard: self.loss(shard, trainer), self.config.batch_size)
            metrics |= learnt
            for batch, surprise in self.drawn:
                self.replay.reprioritise(batch, surprise + 0 * learnt["loss"])  # NaN where the update was skipped
        if actions // self.config.target_every > (actions - self.config.train_every) // self.config.target_every:
            self.target.load_state_dict(self.learner.module.state_dict())
        return metrics

    # Playing

    def play(self, trainer: Trainer) -> dict[str, Tensor | float]:
        """Take `train_every` actions and remember them; returns what the games that ended were worth."""
        first, count = trainer.step * self.config.train_every, self.config.games
        rows: list[Mapping[str, Any]] = []
        ended: list[tuple[float, int]] = []
        for actions in range(first, first + self.config.train_every, count):
            rate = self.exploration_rate(actions)
            before, chosen = self.games.last, self.explore(trainer, rate, actions)
            after = self.games.step(chosen)
            rows.append(self.remembered(before, chosen, after))
            ended += [(float(after.returns[game]), int(after.lengths[game])) for game in np.flatnonzero(after.ended)]
        self.replay.extend(rows)
        metrics: dict[str, Tensor | float] = {"epsilon": rate}
        if ended:
            metrics |= {"return": sum(score for score, _ in ended) / len(ended), "length": sum(length for _, length in ended) / len(ended)}
        return metrics

    def exploration_rate(self, actions: int) -> float:
        """The share of random actions after so many actions; none where the layers are noisy and learn."""
        if self.config.noisy and actions >= self.config.learning_starts:
            return 0.0
        return exploration_rate(self.experiment.exploration, actions, self.config.learning_starts)

    def noise(self, network: nn.Module, stream: str, index: int, device: torch.device, **rows: Any) -> AbstractContextManager[None]:
        """Within, a network has the noise of this stream and index, whichever process asks."""
        if not self.config.noisy:
            return nullcontext()
        return noise(network, seeding.generator(self.seed, f"noise/{stream}", index, device), **rows)

    @torch.no_grad()
    def explore(self, trainer: Trainer, rate: float, actions: int) -> Any:
        """An action for every game that this process plays, int64 (games,); what is drawn is drawn for all."""
        draw = seeding.generator(self.seed, "explore", actions)
        count, kinds = self.config.games, len(self.games.actions)
        if rate >= 1 and not self.experiment.exploration.ladder:
            return torch.randint(kinds, (count,), generator=draw)[self.own].numpy()
        device, network, values = trainer.world.device, self.learner.module, torch.zeros(count, kinds)
        observations, own = torch.from_numpy(self.games.last.observations).to(device), slice(self.own.start, self.own.stop)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=trainer.bf16)
        with autocast, self.noise(network, "act", actions, device, rows=count, own=own):  # every game has its own
            values[own] = self.kind.means(network(observations)).cpu()
        return choose(values, "epsilon", exploration_ladder(self.experiment.exploration, rate, count), draw)[self.own].numpy()

    def remembered(self, before: Step, actions: Any, after: Step) -> Mapping[str, Any]:
        """One frame of every game, what was done there and what came of it, under the learner's rules."""
        rewards = np.clip(after.rewards, -1, 1) if self.config.clip_rewards else after.rewards
        terminal = after.terminated | after.life_lost if self.config.life_loss else after.terminated
        return {
            "frames": before.observations[:, -1],
            "actions": actions,
            "rewards": rewards,
            "started": before.started,
            "terminal": terminal,
            "ended": after.ended,
            "playable": ~before.ended,
        }

    # Learning

    def loss(self, shard: Shard, trainer: Trainer) -> tuple[Tensor, Metrics]:
        """The mean cost of the errors of a batch, and metrics; each process computes those of the games that it plays."""
        shard = shard.common(trainer.world)
        beta = self.experiment.replay.beta + (1 - self.experiment.replay.beta) * shard.step / max(1, trainer.config.steps - 1)
        draws = replace(shard, device=self.replay.device)  # made where they are wanted, so that nobody waits for a GPU
        batch = self.replay.sample(shard.count, lambda attempt: draws.uniform(f"replay/{attempt}", 2), beta).to(shard.device)
        later = self.later(batch.next_observations, shard)
        with self.noise(self.learner.module, "online", shard.step, shard.device):
            said = of_actions(self.learner.module(batch.observations), batch.actions)
        costs, surprise = self.kind.errors(said, batch.returns, batch.discounts, later)
        self.drawn.append((batch, surprise.detach()))
        age = shard.mean((self.replay.written - batch.times).double()) * self.config.games
        values, errors = shard.mean(self.kind.means(said)), shard.mean(surprise.abs())
        return shard.mean(batch.weights * costs), {"q": values, "error": errors, "age": age}

    @torch.no_grad()
    def later(self, observations: Tensor, shard: Shard) -> Tensor:
        """What the target network says of the best action in the states that were reached, (B, ...).

        Each network has noise of its own, and that which chooses another than that which learns.
        """
        with self.noise(self.target, "target", shard.step, shard.device):
            outputs = self.target(observations)
        judged = outputs
        if self.config.double:
            with self.noise(self.learner.module, "choice", shard.step, shard.device):
                judged = self.learner.module(observations)
        return of_actions(outputs, self.kind.means(judged).argmax(1))


EXPERIMENT = DQNExperiment()
