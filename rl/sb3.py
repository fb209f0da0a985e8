"""Agents that stable-baselines3 trains: its PPO (Schulman et al. 2017) and its DQN, in our environments and our loop.

A step of the trainer is one iteration of what SB3's `learn` does, done by SB3's own methods. Ours are the environments, the
memory of the DQN (an eighth of the bytes), tests, checkpoints and records; so a run that was killed goes on exactly, which
SB3 alone cannot do. All that needs SB3 itself is in rl/stable_baselines.py, loaded when a run begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lab.checkpoint import Checkpoint
from lab.config import Count, Fraction, NonNegative, Positive, Settings
from lab.experiment import TrainerConfig
from lab.trainer import Trainer
from rl.agent import Agent, AgentExperiment, Policy
from rl.evaluate import TestConfig
from rl.replay import ReplayConfig

if TYPE_CHECKING:
    from rl.stable_baselines import SB3Task


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Settings):
    """Proximal policy optimisation; the defaults are rl-zoo's for Atari."""

    games: Count = 8
    """Games played side by side."""
    n_steps: Count = 128
    """Actions in each game between two rounds of learning; a step of the trainer is games x n_steps actions."""
    epochs: Count = 4
    """Times that a round of learning goes through those actions."""
    batch_size: Count = 256
    """Actions of one update; a divisor of games x n_steps."""
    lr: Positive = 2.5e-4
    """Learning rate (Adam) at the start."""
    final_lr: Fraction = 0.0
    """Where the learning rate comes to at the last step, linearly, as a part of lr; 1: it stays."""
    clip: Positive = 0.1
    """How far the probability of an action may move in a round: up or down by this part of itself."""
    final_clip: Fraction = 0.0
    """Where clip comes to at the last step, linearly, as a part of itself; 1: it stays."""
    discount: Fraction = 0.99
    """What a point is worth one action later."""
    gae_lambda: Fraction = 0.95
    """Generalised advantage estimation: 0 trusts the value of the next state, 1 only the rewards."""
    entropy: NonNegative = 0.01
    """Weight of the entropy of the policy, which keeps it trying."""
    value: NonNegative = 0.5
    """Weight of the squared error of the value; no further half, no clipping (in OpenAI's Baselines: half of it, and clipped)."""
    max_grad_norm: Positive = 0.5
    """Largest norm of the whole gradient; a larger one is scaled down to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        actions = self.games * self.n_steps
        if actions % self.batch_size or self.batch_size < 2:
            raise ValueError(
                f"batch_size must divide games x n_steps and be at least 2, and {self.batch_size} is no such part of {actions}"
            )


@dataclass(frozen=True, kw_only=True)
class SB3DQNConfig(Settings):
    """SB3's DQN, neither double nor dueling; the defaults are rl-zoo's for Atari. Counts are over all games together."""

    games: Count = 4
    """Games played side by side. SB3 flips one coin for all of them: they explore together or not at all."""
    train_every: Count = 4
    """Actions from one time of learning to the next, a multiple of games."""
    gradient_steps: Count = 1
    """Updates each time."""
    actions_per_step: Count = 1024
    """Actions of one step of the trainer, a multiple of train_every."""
    lr: Positive = 1e-4
    """Learning rate (Adam)."""
    batch_size: Count = 32
    """Transitions of an update."""
    learning_starts: Count = 100_000
    """Actions that are random and only fill the memory."""
    target_every: Count = 1_000
    """Actions after which the target network is copied anew."""
    discount: Fraction = 0.99
    """What a point is worth one action later."""
    exploration_fraction: Positive = 0.1
    """Part of the run over which the share of random actions falls from 1 to final_epsilon."""
    final_epsilon: Fraction = 0.01
    """Share of random actions from then on."""
    max_grad_norm: Positive = 10.0
    """Largest norm of the whole gradient; a larger one is scaled down to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_every % self.games:
            raise ValueError(f"train_every must be a multiple of games, and {self.train_every} is none of {self.games}")
        actions = self.actions_per_step
        if actions % self.train_every:
            raise ValueError(f"actions_per_step must be a multiple of train_every, and {actions} is none of {self.train_every}")
        if self.learning_starts < self.games:
            raise ValueError(f"learning_starts must be at least games, {self.games}: nothing can be learned from an empty memory")


@dataclass(frozen=True, kw_only=True)
class SB3Experiment(AgentExperiment):
    """Train an agent with stable-baselines3."""

    experiment: ClassVar[str] = "sb3"
    axes: ClassVar[Mapping[str, str]] = {"*": "frames", "train/loss": "updates", "train/lr": "updates"}

    name: str = "sb3"
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig = TrainerConfig(steps=9766, precision="auto", log_every=10, preview_every=500, save_every=100)
    algorithm: Literal["ppo", "dqn"] = "ppo"
    """Which of SB3's algorithms; the section of the other one is not used."""
    environments: Literal["native", "classic"] = "native"
    """classic: SB3's own Atari wrappers, to compare with; slower, and such a run cannot be resumed."""
    backbone: str = "nature"
    """Network that sees: nature for 84x84 pixels (SB3's own copy of it, so that others can read its files), small for the small games, or
    any other that `python scripts/backbones.py` lists."""
    life_loss: bool = True
    """A lost life ends the episode for the learner, not the game."""
    clip_rewards: bool = True
    """Rewards outside of [-1, 1] are taken as -1 or 1, so that one learning rate suits all games."""
    initial_zip: str | None = None
    """Start from the weights in a file that SB3 saved; nothing else of it is read, so nothing in it is run."""
    ppo: PPOConfig = PPOConfig()
    dqn: SB3DQNConfig = SB3DQNConfig()
    replay: ReplayConfig = ReplayConfig()
    test: TestConfig = TestConfig()

    def task(self, trainer: Trainer) -> SB3Task:
        """What SB3's `learn` does, an iteration a step."""
        from rl import stable_baselines

        return stable_baselines.TASKS[self.algorithm](self, trainer)

    def agent(self, saved: Checkpoint, device: torch.device) -> Agent:
        """The agent that a checkpoint holds."""
        from rl import stable_baselines

        facts = saved.notes["facts"]
        policy = stable_baselines.make_policy(self, tuple(facts["shape"]), len(facts["actions"]))
        policy.load_state_dict(saved.parts["model"])
        return stable_baselines.agent_of(policy.to(device))

    @property
    def usual_policy(self) -> Policy:
        """PPO learns probabilities, which are drawn from; a DQN takes one action in twenty at random (Mnih et al. 2015)."""
        return "sampled" if self.algorithm == "ppo" else "epsilon"

    @property
    def games(self) -> int:
        """Games played side by side."""
        return self.ppo.games if self.algorithm == "ppo" else self.dqn.games

    @property
    def actions_per_step(self) -> int:
        """Actions of one step of the trainer, over all games together."""
        return self.ppo.games * self.ppo.n_steps if self.algorithm == "ppo" else self.dqn.actions_per_step


EXPERIMENT = SB3Experiment()
