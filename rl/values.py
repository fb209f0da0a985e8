"""What agents that learn the values of actions share, whichever way they learn them: how they explore, and how they play."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lab.config import Count, Fraction, NonNegative, Settings
from rl.agent import Agent


@dataclass(frozen=True, kw_only=True)
class ExplorationConfig(Settings):
    """How often an action is taken at random; every game flips its own coin."""

    start: Fraction = 1.0
    """Share of random actions at first, and until learning starts."""
    end: Fraction = 0.01
    """Share at the end of the descent, and from then on."""
    steps: Count = 250_000
    """Actions over which it falls linearly, after learning has started."""
    ladder: NonNegative = 0.0
    """Game i of n explores at the share to the power 1 + ladder i/(n-1): 7 in Ape-X (Horgan et al. 2018); 0: all alike."""


def exploration_rate(config: ExplorationConfig, actions: int, learning_starts: int) -> float:
    """The share of random actions after so many actions."""
    part = min(1.0, max(0, actions - learning_starts) / config.steps)
    return config.start + part * (config.end - config.start)


def exploration_ladder(config: ExplorationConfig, rate: float, count: int) -> Tensor:
    """The share of each of `count` games, float32 (count,) (Horgan et al. 2018, section 4.1)."""
    return rate ** (1 + config.ladder * torch.linspace(0, 1, count))


def as_they_are(outputs: Tensor) -> Tensor:
    """The values of a network that says nothing but values."""
    return outputs


class QAgent(Agent):
    """Plays by the values of a Q-network.

    Args:
        means: what the network says as values (N, actions), where it says more than these.
    """

    meaning = "Q-value"

    def __init__(self, network: nn.Module, device: torch.device, means: Callable[[Tensor], Tensor] = as_they_are) -> None:
        self.network, self.device, self.means = network, device, means

    @torch.no_grad()
    def values(self, observations: Tensor) -> Tensor:
        """Q(s, a), float32 (N, actions)."""
        return self.means(self.network(observations.to(self.device))).cpu()
