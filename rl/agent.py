"""Agents that play, from whichever algorithm, and the one way to load a trained one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from envs.games import GameConfig
from lab import loading, runs
from lab.checkpoint import Checkpoint
from lab.experiment import Experiment

FAMILIES = {"dqn": "rl.dqn", "pqn": "rl.pqn", "sb3": "rl.sb3"}

Policy = Literal["epsilon", "greedy", "sampled"]


class Agent(ABC):
    """Something that says what each action is worth."""

    meaning: Literal["Q-value", "probability"]
    """What `values` are: estimates of the return, or how likely the agent is to take each action."""

    @abstractmethod
    def values(self, observations: Tensor) -> Tensor:
        """The worth of every action, float32 (N, actions) on the CPU, for observations uint8 (N, stack, H, W)."""

    def act(self, observations: Tensor, policy: Policy, epsilon: float, generator: torch.Generator) -> Tensor:
        """An action for each observation, int64 (N,) on the CPU."""
        return choose(self.values(observations), policy, epsilon, generator)


class RandomAgent(Agent):
    """Every action is as good as any other: what learning is compared with."""

    meaning = "probability"

    def __init__(self, actions: int) -> None:
        self.actions = actions

    def values(self, observations: Tensor) -> Tensor:
        """The same probability for all."""
        return torch.full((len(observations), self.actions), 1 / self.actions)


def choose(values: Tensor, policy: Policy, epsilon: float | Tensor, generator: torch.Generator) -> Tensor:
    """Actions (N,) by `values` (N, actions).

    Args:
        policy: `greedy` takes the best (among equals a random one), `sampled` draws with `values` as probabilities, `epsilon`
            is greedy but in a part `epsilon` of the cases takes any action; every row flips a coin of its own.
        epsilon: for `epsilon`, one number or one for each row.
    """
    count, actions = values.shape
    if policy == "sampled":
        return torch.multinomial(values, 1, generator=generator)[:, 0]
    ties = torch.rand(count, actions, generator=generator)
    best = torch.where(values == values.amax(1, keepdim=True), ties, -1).argmax(1)
    if policy == "greedy":
        return best
    coin, other = torch.rand(count, generator=generator), torch.randint(actions, (count,), generator=generator)
    return torch.where(coin < torch.as_tensor(epsilon), other, best)


# Loading


@dataclass(frozen=True, kw_only=True)
class AgentExperiment(Experiment, ABC):
    """An experiment that trains an agent on a game."""

    game: GameConfig = GameConfig()

    @abstractmethod
    def agent(self, saved: Checkpoint, device: torch.device) -> Agent:
        """The agent that a checkpoint holds."""

    @property
    @abstractmethod
    def usual_policy(self) -> Policy:
        """How the literature has such agents play when they are judged."""


@dataclass(frozen=True)
class Loaded:
    """A trained agent and where it comes from."""

    agent: Agent
    experiment: AgentExperiment
    run: runs.Run
    step: int
    actions: tuple[str, ...]
    """The names of its actions."""


def load(name: str, device: str | torch.device = "cpu") -> Loaded:
    """The agent of a run.

    Args:
        name: a run folder, a checkpoint folder, or `latest`.

    Raises:
        UserError: no such run, or none of its checkpoints is whole.
    """
    found = runs.find(name, FAMILIES)
    experiment: AgentExperiment = loading.settings_of(found.run, FAMILIES)
    saved = loading.saved(found, only=("model", "ema"))  # a replay memory of gigabytes stays where it is
    return Loaded(experiment.agent(saved, torch.device(device)), experiment, found.run, saved.step, tuple(saved.notes["facts"]["actions"]))
