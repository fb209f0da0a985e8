"""What a Q-network says of an action: the mean of the return alone, or its whole distribution.

    mean          Q(s, a) itself                                     Mnih et al. 2015
    categorical   the probabilities of `atoms` fixed returns         C51, Bellemare et al. 2017, arXiv:1707.06887
    quantile      `quantiles` returns of equal probability           QR-DQN, Dabney et al. 2018, arXiv:1710.10044

Actions are chosen by the means. What is learnt is the distribution of R + g^m Z', where Z' is the target network's of the action
chosen in the state that was reached, and R the rewards on the way there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


class Values(ABC):
    """A way to say what an action is worth. Of every action a network gives numbers of the shape `each`."""

    @property
    @abstractmethod
    def each(self) -> tuple[int, ...]:
        """The shape of what is said of one action."""

    @abstractmethod
    def means(self, outputs: Tensor) -> Tensor:
        """Q(s, a), (N, actions), of what a network says, (N, actions, *each)."""

    @abstractmethod
    def errors(self, said: Tensor, returns: Tensor, discounts: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """The cost of each transition and its priority, (B,) each.

        Args:
            said: what the network says of the actions that were taken, (B, *each).
            returns: the rewards until the state that was reached, (B,).
            discounts: the weight of what comes after it, (B,): 0 after an end.
            later: what the target network says there, (B, *each).
        """


def of_actions(outputs: Tensor, actions: Tensor) -> Tensor:
    """What is said of one action in each row, (B, *each), of (B, actions, *each)."""
    return outputs.take_along_dim(actions.view(-1, *[1] * (outputs.dim() - 1)), 1)[:, 0]


# The mean


@dataclass(frozen=True)
class Mean(Values):
    """One number, the mean; a transition's priority is its error."""

    loss: Literal["huber", "squared"]

    @property
    def each(self) -> tuple[int, ...]:
        """A plain number."""
        return ()

    def means(self, outputs: Tensor) -> Tensor:
        """What is said."""
        return outputs

    def errors(self, said: Tensor, returns: Tensor, discounts: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """The cost of y - Q(s, a)."""
        error = returns + discounts * later - said
        return error_cost(error, self.loss), error


def error_cost(error: Tensor, kind: Literal["huber", "squared"]) -> Tensor:
    """The cost of each error, (B,); Huber's has the gradient of half the square, clipped to [-1, 1]."""
    zero = torch.zeros_like(error)
    return F.huber_loss(error, zero, reduction="none") if kind == "huber" else 0.5 * error**2


# Categorical


@dataclass(frozen=True)
class Categorical(Values):
    """Logits of `atoms` returns, evenly from `low` to `high`; a transition's priority is its loss (Hessel et al. 2018)."""

    atoms: int
    low: float
    high: float

    @property
    def each(self) -> tuple[int, ...]:
        """One logit for each atom."""
        return (self.atoms,)

    def support(self, device: torch.device) -> Tensor:
        """The returns, float32 (atoms,)."""
        return torch.linspace(self.low, self.high, self.atoms, device=device)

    def means(self, outputs: Tensor) -> Tensor:
        """The sum of the returns times their probabilities."""
        return (outputs.softmax(-1) * self.support(outputs.device)).sum(-1)

    def errors(self, said: Tensor, returns: Tensor, discounts: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence of what is said from the target."""
        support = self.support(said.device)
        goal = projected(returns[:, None] + discounts[:, None] * support, later.softmax(-1), support)
        cost = divergence(goal, said.log_softmax(-1))
        return cost, cost


def projected(returns: Tensor, probabilities: Tensor, support: Tensor) -> Tensor:
    """The distribution of `returns` (B, atoms), given with their probabilities, on the support (atoms,): (B, atoms).

    Equation 7 of Bellemare et al. Each return, clipped into the support, gives its probability to its two neighbours there, the more
    the nearer: an atom's part is a triangle around it. One that falls on an atom gives all to it, with no case of its own; mass and,
    where nothing is clipped, the mean are kept.
    """
    low, high = support[0], support[-1]
    distances = (returns.clamp(low, high)[:, None, :] - support[:, None]).abs() * (len(support) - 1) / (high - low)
    return ((1 - distances).clamp(min=0) * probabilities[:, None, :]).sum(-1)


def divergence(goal: Tensor, log_probabilities: Tensor) -> Tensor:
    """D(goal || said) = sum goal log(goal / said), (B,): the cross-entropy less what no prediction can help, so with its gradient."""
    return F.kl_div(log_probabilities, goal, reduction="none").sum(-1)


# Quantile


@dataclass(frozen=True)
class Quantile(Values):
    """The returns at the middles of `count` equal parts of the distribution; a transition's priority is its loss."""

    count: int

    @property
    def each(self) -> tuple[int, ...]:
        """One return for each part."""
        return (self.count,)

    def means(self, outputs: Tensor) -> Tensor:
        """The mean of the returns, which are equally likely."""
        return outputs.mean(-1)

    def errors(self, said: Tensor, returns: Tensor, discounts: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """The quantile Huber loss."""
        cost = quantile_huber(returns[:, None] + discounts[:, None] * later, said)
        return cost, cost


def quantile_huber(goals: Tensor, said: Tensor) -> Tensor:
    """rho(y_j - q_i), the mean over goals (B, M) and the sum over quantiles (B, N): (B,).

    Equation 10 and algorithm 1 of Dabney et al. An error above costs tau_i times Huber's cost, one below 1 - tau_i times, where tau_i
    is the middle of part i of N.
    """
    count = said.shape[1]
    middles = (torch.arange(count, device=said.device) + 0.5) / count
    errors = goals[:, None, :] - said[:, :, None]
    tilt = (middles[:, None] - (errors.detach() < 0).float()).abs()
    return (tilt * error_cost(errors, "huber")).mean(2).sum(1)
