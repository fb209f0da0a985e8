"""How images turn to noise: the processes that diffusion models learn to undo.

    x = alpha x0 + sigma noise          noise ~ N(0, 1)

A process says which pairs (alpha, sigma) there are, how often each is trained on, what the network F sees and tells at each, and
which points a sampler stops at. For every one the expected clean image is a sum with known factors,

    x0 = skip x + out F(inp x, time)

so that one loss and one set of samplers serve them all.

    ddpm    alpha^2 + sigma^2 = 1 in 1,000 steps (Ho et al. 2020, arXiv:2006.11239; cosine: Nichol & Dhariwal 2021, arXiv:2102.09672)
    edm     alpha = 1, sigma from 0.002 to 80 (Karras et al. 2022, arXiv:2206.00364)
    flow    alpha = 1 - t, sigma = t: straight ways (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003)

Tables are computed in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from generative.samplers import Point
from lab.config import Count, NonNegative, Positive, Settings, UserError

Prediction = Literal["epsilon", "x0", "v"]
TIMES = 1000.0
"""The scale that networks are told times on."""


class Moment(NamedTuple):
    """Where each of a batch of noisy images stands, float32 (N,) each."""

    alpha: Tensor
    sigma: Tensor
    time: Tensor
    """What the network is told, from 0 to 1000."""

    @staticmethod
    def of(point: Point, count: int, device: torch.device) -> Moment:
        """All images at one point."""
        numbers = (point.alpha, point.sigma, point.time)
        return Moment(*(torch.full((count,), number, dtype=torch.float32, device=device) for number in numbers))


class Scales(NamedTuple):
    """x0 = skip x + out F(inp x), (N,) each."""

    skip: Tensor
    out: Tensor
    inp: Tensor


class Process(ABC):
    """A way from images to noise; subclasses are settings too."""

    @abstractmethod
    def draw(self, uniform: Tensor) -> Moment:
        """Moments to train on, of numbers uniform in [0, 1), (N,)."""

    @abstractmethod
    def scales(self, moment: Moment) -> Scales:
        """What the network's output means."""

    @abstractmethod
    def points(self, steps: int) -> list[Point]:
        """The `steps` + 1 points at which a sampler stops, from noise to the image, whose sigma is 0.

        Raises:
            UserError: the process has not so many steps.
        """

    @abstractmethod
    def chain(self, finest: float) -> list[Point]:
        """The points of the ancestral sampler whose bound on the likelihood is taken, down to where sigma / alpha is `finest`.

        Only some of its steps are looked at, so that more of them cost nothing and make the bound tighter.
        """

    @property
    def most(self) -> int:
        """The most steps that a sampler can take, or that are worth taking."""
        return 1000

    def weight(self, moment: Moment) -> Tensor:
        """Weight of the squared error of F, (N,)."""
        return torch.ones_like(moment.alpha)

    def start(self, noise: Tensor) -> Tensor:
        """Where samplers begin, of standard normal noise."""
        return noise


def falling(high: float, low: float, count: int = 10_000) -> Tensor:
    """Numbers that fall by the same factor each, float64 (count,)."""
    return torch.linspace(math.log(high), math.log(low), count, dtype=torch.float64).exp()


def normal_numbers(uniform: Tensor) -> Tensor:
    """Standard normal numbers, one for each number uniform in [0, 1)."""
    numbers: Tensor = torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6))
    return numbers.to(uniform.dtype)


# Denoising diffusion probabilistic models


def linear_betas(steps: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Variances that grow evenly (Ho et al. 2020, section 4), (steps,); shorter chains get larger ones, so that all end in noise."""
    return torch.linspace(first, last, steps, dtype=torch.float64) * (1000 / steps)


def cosine_betas(steps: int, largest: float = 0.999) -> Tensor:
    """Variances such that alpha^2 falls as a squared cosine (Nichol & Dhariwal 2021, equation 17), (steps,)."""
    places = torch.arange(steps + 1, dtype=torch.float64) / steps
    height = torch.cos((places + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - height[1:] / height[:-1]).clamp(max=largest)


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Table of alpha shifted and stretched so that the last is 0: pure noise, as sampling begins with (Lin et al. 2024, algorithm 1)."""
    return (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))


@dataclass(frozen=True, kw_only=True)
class DDPMConfig(Settings, Process):
    """Denoising diffusion in discrete steps."""

    schedule: Literal["linear", "cosine"] = "cosine"
    """How noise grows over the steps."""
    times: Count = 1000
    """Steps of the whole chain."""
    zero_snr: bool = True
    """Let the last step be pure noise, as sampling begins with it; wants prediction v or x0."""
    prediction: Prediction = "v"
    """What the network tells: the noise, the clean image, or v = alpha noise - sigma x0 (Salimans & Ho 2022), good at both ends."""
    min_snr: NonNegative = 5.0
    """Cap of the signal-to-noise ratio that weighs the error of x0 (Hang et al. 2023, arXiv:2303.09556); 0: plain error of what is told."""
    variance: Literal["small", "large", "learned"] = "small"
    """Variance of the ancestral sampler's steps: the posterior's, beta, or learned in between (Nichol & Dhariwal 2021)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.times < 25:
            raise ValueError(f"times: a chain needs at least 25 steps, or some would be all noise; found {self.times}")
        if self.zero_snr and self.prediction == "epsilon":
            raise ValueError("zero_snr: in pure noise epsilon tells nothing of the image; set prediction v, or zero_snr false")

    @property
    def most(self) -> int:
        """A sampler stops at steps of the chain only."""
        return self.times

    @cached_property
    def alphas(self) -> Tensor:
        """alpha of every step, float64 (times,), from little noise to much."""
        betas = linear_betas(self.times) if self.schedule == "linear" else cosine_betas(self.times)
        alphas = (1 - betas).cumprod(0).sqrt()
        return zero_terminal_snr(alphas) if self.zero_snr else alphas

    def at(self, index: int) -> Point:
        """The point of a step."""
        alpha = float(self.alphas[index])
        return Point(alpha, math.sqrt(1 - alpha**2), index * TIMES / self.times)

    def draw(self, uniform: Tensor) -> Moment:
        """Every step equally often."""
        return self.moments((uniform * self.times).long().clamp(max=self.times - 1))

    def moments(self, index: Tensor) -> Moment:
        """Where steps are, (N,)."""
        alpha = self.alphas.to(index.device, non_blocking=True)[index]
        return Moment(alpha.float(), (1 - alpha**2).sqrt().float(), index * (TIMES / self.times))

    def scales(self, moment: Moment) -> Scales:
        """x0 = (x - sigma F) / alpha for epsilon, F for x0, alpha x - sigma F for v."""
        alpha, sigma, one = moment.alpha, moment.sigma, torch.ones_like(moment.alpha)
        if self.prediction == "epsilon":
            return Scales(1 / alpha, -sigma / alpha, one)
        return Scales(0 * one, one, one) if self.prediction == "x0" else Scales(alpha, -sigma, one)

    def weight(self, moment: Moment) -> Tensor:
        """min(SNR, cap) on the error of x0, as a weight of the error of F.

        With zero_snr it is at least 1 (Salimans & Ho 2022, section 4), or the first step of a sampler would hardly be trained.
        """
        if not self.min_snr:
            return torch.ones_like(moment.alpha)
        snr = (moment.alpha / moment.sigma) ** 2
        capped = snr.clamp(min=float(self.zero_snr), max=self.min_snr)
        return {"epsilon": capped / snr, "x0": capped, "v": capped / (snr + 1)}[self.prediction]

    def points(self, steps: int) -> list[Point]:
        """Evenly spaced steps that end with the first and begin with the last (`trailing` in diffusers)."""
        if steps > self.times:
            raise UserError(f"this model was trained on {self.times} steps of noise, so no sampler can take {steps}; ask for fewer")
        indices = [round(self.times - place * self.times / steps) - 1 for place in range(steps)]
        return [*(self.at(index) for index in indices), Point(1.0, 0.0, 0.0)]

    def chain(self, finest: float) -> list[Point]:
        """All steps that were trained on; there are no others."""
        return self.points(self.times)[:-1]


# Elucidated diffusion


@dataclass(frozen=True, kw_only=True)
class EDMConfig(Settings, Process):
    """Noise that is added only, with the preconditioning of Karras et al. 2022 (table 1); images have mean 0 and variance 1."""

    mean: float = -0.5
    """Mean of log sigma in training; -1.2 + log 2 for images of variance 1, where the paper's have 1/4."""
    std: Positive = 1.2
    """Standard deviation of log sigma in training."""
    smallest: Positive = 0.004
    """Smallest sigma of a sampler."""
    largest: Positive = 160.0
    """Largest sigma of a sampler."""
    rho: Positive = 7.0
    """Bends the grid of sigmas: the larger, the more steps at little noise."""

    def told(self, sigma: Tensor) -> Tensor:
        """What the network is told: log sigma, spread from 0 to 1000 over the sampler's range."""
        low, high = math.log(self.smallest), math.log(self.largest)
        return (sigma.log() - low) * (TIMES / (high - low))

    def draw(self, uniform: Tensor) -> Moment:
        """log sigma is normal."""
        sigma = (self.mean + self.std * normal_numbers(uniform)).exp()
        return Moment(torch.ones_like(sigma), sigma, self.told(sigma))

    def scales(self, moment: Moment) -> Scales:
        """Inputs and targets of variance 1 at every sigma."""
        total = moment.sigma**2 + 1
        return Scales(1 / total, moment.sigma / total.sqrt(), 1 / total.sqrt())

    def points(self, steps: int) -> list[Point]:
        """sigma^(1/rho) falls evenly (equation 5)."""
        places = torch.linspace(0, 1, steps, dtype=torch.float64)
        high, low = self.largest ** (1 / self.rho), self.smallest ** (1 / self.rho)
        return [*self.at((high + places * (low - high)) ** self.rho), Point(1.0, 0.0, 0.0)]

    def at(self, sigmas: Tensor) -> list[Point]:
        """The points of some sigmas."""
        return [Point(1.0, sigma, time) for sigma, time in zip(sigmas.tolist(), self.told(sigmas).tolist())]

    def chain(self, finest: float) -> list[Point]:
        """sigma falls by the same factor each step."""
        return self.at(falling(self.largest, finest))

    def start(self, noise: Tensor) -> Tensor:
        """Noise of the largest sigma."""
        return noise * self.largest


# Flow matching


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig(Settings, Process):
    """Straight ways from noise to image, whose velocity noise - x0 is learned."""

    mean: float = 0.0
    """Mean of logit t in training (Esser et al. 2024, arXiv:2403.03206)."""
    std: Positive = 1.0
    """Standard deviation of logit t in training."""
    shift: Positive = 1.0
    """Above 1: a sampler takes more of its steps where there is much noise."""

    def draw(self, uniform: Tensor) -> Moment:
        """logit t is normal."""
        time = torch.sigmoid(self.mean + self.std * normal_numbers(uniform))
        return Moment(1 - time, time, time * TIMES)

    def scales(self, moment: Moment) -> Scales:
        """x0 = x - t F."""
        one = torch.ones_like(moment.sigma)
        return Scales(one, -moment.sigma, one)

    def points(self, steps: int) -> list[Point]:
        """t falls evenly, or is shifted towards noise."""
        times = [1 - place / steps for place in range(steps + 1)]
        shifted = [self.shift * time / (1 + (self.shift - 1) * time) for time in times]
        return [Point(1 - time, time, time * TIMES) for time in shifted]

    def chain(self, finest: float) -> list[Point]:
        """sigma / alpha falls by the same factor each step, after a first one from pure noise."""
        ratios = falling(1000.0, finest).tolist()
        return [Point(0.0, 1.0, TIMES), *(Point(1 / (1 + ratio), ratio / (1 + ratio), ratio / (1 + ratio) * TIMES) for ratio in ratios)]
