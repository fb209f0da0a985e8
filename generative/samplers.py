"""Ways from noise to image, for every model that guesses the clean image in a noisy one.

At a point of the way an image is x = alpha x0 + sigma noise, with sigma falling to 0. All samplers have one signature, call the
network as `denoise(x, point)`, and yield x after every step. If the guess x0 never changed, so that x0 and noise were both known, one
step could go anywhere (`follow`, which is DDIM's step). It does change, and that is all the samplers without chance differ in: each is
DDIM's step with a better guess for the stretch ahead, a line through guesses at several points.

    ddim, euler         the guess at the start of the step                                  first order
    heun, flow_heun     a line through the guesses at both ends of the step                 second order, two calls of the network
    midpoint            a line through the guesses at the start and in the middle           second order, two calls
    dpmpp               a line through the last two guesses, drawn out to the middle        second order, one call
    unipc               as dpmpp, and the way so far corrected by the guess at its end      second order and more exact, one call

`euler`, `midpoint` and `flow_heun` reckon in time, for flow matching (alpha = 1 - t, sigma = t); `heun` in sigma / alpha, the others in
log(alpha / sigma), for any schedule. All coefficients are Python floats, so that a step never waits for the device.
"""

from __future__ import annotations

import difflib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lab.config import UserError


@dataclass(frozen=True)
class Point:
    """A moment of the way from noise to image: x = alpha x0 + sigma noise."""

    alpha: float
    sigma: float
    time: float
    """What the network is told; its meaning is the process's."""

    @property
    def lam(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, log(alpha / sigma): -inf in pure noise, inf at the image."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


class Guess(NamedTuple):
    """What a network makes of noisy images at a point."""

    x0: Tensor
    """The expected clean images."""
    fraction: Tensor | float = 0.0
    """Variance of an ancestral step: 0 the smallest that is right, 1 the largest, in between geometrically."""


Denoise = Callable[[Tensor, Point], Guess]
"""Noisy images at a point -> what they are thought to be."""
Noise = Callable[[], Tensor]
"""Fresh standard normal numbers of the images' shape."""
Sampler = Callable[[Denoise, Tensor, Sequence[Point], Noise], Iterator[Tensor]]
"""Takes images from the first point, where they stand, to the last one, the image; no two neighbours are alike. Yields after every step."""


def follow(x: Tensor, x0: Tensor, start: Point, end: Point) -> Tensor:
    """Images at another point if `x0` was right: the noise stays, its share changes (Song et al. 2021, equation 12 with eta 0)."""
    keep = end.sigma / start.sigma
    return keep * x + (end.alpha - keep * start.alpha) * x0


# With chance


def ancestral(denoise: Denoise, x: Tensor, points: Sequence[Point], noise: Noise) -> Iterator[Tensor]:
    """Draw each image from its distribution given the one before (Ho et al. 2020, equation 7).

    The variance lies between that of a single known x0 and that of x0 ~ N(0, 1) (Nichol & Dhariwal 2021, equation 15); the last
    step adds none.
    """
    for start, end in pairwise(points):
        guess = denoise(x, start)
        shrink, ratio = start.alpha / end.alpha, end.sigma / start.sigma
        variance = start.sigma**2 - (shrink * end.sigma) ** 2
        x = shrink * ratio**2 * x + end.alpha * variance / start.sigma**2 * guess.x0
        if end.sigma > 0:
            x = x + math.sqrt(variance) * ratio ** (1 - guess.fraction) * noise()
        yield x


# Without chance, for every schedule


def ddim(denoise: Denoise, x: Tensor, points: Sequence[Point], noise: Noise) -> Iterator[Tensor]:
    """Take every guess for the truth as far as the next point (Song et al. 2021, eta 0).

    The way back, from image to noise, is the same with the points turned round, but for its start: it needs a little noise there.
    """
    for start, end in pairwise(points):
        x = follow(x, denoise(x, start).x0, start, end)
        yield x


def heun(denoise: Denoise, x: Tensor, points: Sequence[Point], noise: Noise) -> Iterator[Tensor]:
    """The mean of the slopes at both ends of each step (Karras et al. 2022, algorithm 1).

    With y = x / alpha and s = sigma / alpha the slope is dy/ds = (y - x0) / s. From s to s' the mean of two slopes goes where the
    guess x0 + s / (2 s') (x0' - x0) leads. It needs both ends finite: the step to the image and one from pure noise are DDIM's.
    """
    for start, end in pairwise(points):
        x0 = denoise(x, start).x0
        ahead = follow(x, x0, start, end)
        gain = end.lam - start.lam
        if math.isfinite(gain):
            ahead = follow(x, x0.lerp(denoise(ahead, end).x0, math.exp(gain) / 2), start, end)
        x = ahead
        yield x


def dpmpp(denoise: Denoise, x: Tensor, points: Sequence[Point], noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2M): one call of the network a step (Lu et al. 2022, algorithm 2); its first and last step are DDIM's."""
    guesses: deque[Tensor] = deque(maxlen=2)
    for index, (start, end) in enumerate(pairwise(points)):
        guesses.append(denoise(x, start).x0)
        x = follow(x, drawn_out(guesses, points, index), start, end)
        yield x


def unipc(denoise: Denoise, x: Tensor, points: Sequence[Point], noise: Noise) -> Iterator[Tensor]:
    """UniPC-2 of kind bh2: predict as DPM-Solver++(2M), and go each step again with what was seen at its end.

    The corrected image costs no call of the network: the guess at the predicted one serves it too (Zhao et al. 2023, algorithm 1).
    """
    guesses: deque[Tensor] = deque(maxlen=3)
    origin = x
    for index, (start, end) in enumerate(pairwise(points)):
        guesses.append(denoise(x, start).x0)
        if index > 0:
            x = follow(origin, corrected(guesses, points, index), points[index - 1], start)
        origin = x
        x = follow(x, drawn_out(guesses, points, index), start, end)
        yield x


def drawn_out(guesses: Sequence[Tensor], points: Sequence[Point], index: int) -> Tensor:
    """The guess for the step from `points[index]`: the line through the last two (in lam), at the middle of the step.

    The first step has no guess before it, the last one no middle (its end is at infinity): there it is the last guess as it is.
    """
    if not 0 < index < len(points) - 2:
        return guesses[-1]
    before, start, end = (point.lam for point in points[index - 1 : index + 2])
    return guesses[-1].lerp(guesses[-2], -(end - start) / (start - before) / 2)


def corrected(guesses: Sequence[Tensor], points: Sequence[Point], index: int) -> Tensor:
    """The guess for the step that led to `points[index]`, from those at its end, its start and the point before it.

    It is the mean over the step, weighted with exp(lam), of the parabola through the three (Zhao et al. 2023, section 3); in the first
    step, which has no point before it, half of both ends.
    """
    if index == 1:
        return guesses[-1].lerp(guesses[-2], 0.5)
    earlier, old, new = guesses
    before, start, end = (point.lam for point in points[index - 2 : index + 1])
    gain = end - start
    place = (before - start) / gain  # of the point before, where the step is from 0 to 1; -inf where that one was pure noise
    linear = -1 / gain - 1 / math.expm1(-gain)  # the mean of the place over the step, weighted with exp(lam)
    square = -2 * linear / gain - 1 / math.expm1(-gain)  # the mean of its square
    back = (linear - square) / (1 - place)
    return old + back / place * (earlier - old) + (linear - back) * (new - old)


# Without chance, on the straight path of flow matching


def euler(denoise: Denoise, x: Tensor, points: Sequence[Point], noise: Noise) -> Iterator[Tensor]:
    """x + (t' - t) v with the velocity v = (x - x0) / t, which on a straight path is DDIM's step (Lipman et al. 2023)."""
    require_straight(points)
    yield from ddim(denoise, x, points, noise)


def midpoint(denoise: Denoise, x: Tensor, points: Sequence[Point], noise: Noise) -> Iterator[Tensor]:
    """The velocity in the middle of each step, for the whole step: the guess x0 + t / tm (x0m - x0)."""
    require_straight(points)
    for start, end in pairwise(points):
        t = (start.sigma + end.sigma) / 2
        middle = Point(1 - t, t, (start.time + end.time) / 2)
        x0 = denoise(x, start).x0
        seen = denoise(follow(x, x0, start, middle), middle).x0
        x = follow(x, x0.lerp(seen, start.sigma / t), start, end)
        yield x


def flow_heun(denoise: Denoise, x: Tensor, points: Sequence[Point], noise: Noise) -> Iterator[Tensor]:
    """The mean of the velocities at both ends: the guess x0 + t / (2 t') (x0' - x0). The step to t' = 0 is Euler's."""
    require_straight(points)
    for start, end in pairwise(points):
        x0 = denoise(x, start).x0
        ahead = follow(x, x0, start, end)
        if end.sigma > 0:
            ahead = follow(x, x0.lerp(denoise(ahead, end).x0, start.sigma / end.sigma / 2), start, end)
        x = ahead
        yield x


def require_straight(points: Sequence[Point]) -> None:
    """Raise a UserError if the points are not those of flow matching, alpha + sigma = 1."""
    if any(abs(point.alpha + point.sigma - 1) > 1e-6 for point in points):
        others = ", ".join(name for name in SAMPLERS if name not in FLOW)
        raise UserError(f"sampler: {', '.join(FLOW)} are for flow matching; this model needs one of {others}")


# By name

FLOW: dict[str, Sampler] = {"euler": euler, "midpoint": midpoint, "flow_heun": flow_heun}
"""Those that need the straight path of flow matching; the others take any path, this one too."""
SAMPLERS: dict[str, Sampler] = {"ancestral": ancestral, "ddim": ddim, "heun": heun, "dpmpp": dpmpp, "unipc": unipc} | FLOW
"""All samplers by name."""
EVALUATIONS: dict[str, int] = dict.fromkeys(SAMPLERS, 1) | {"heun": 2, "midpoint": 2, "flow_heun": 2}
"""How often each calls the network in a step; `heun` and `flow_heun` only once in the last one."""


def find(name: str) -> Sampler:
    """A sampler by its name.

    Raises:
        UserError: there is none of this name; tells all.
    """
    if name not in SAMPLERS:
        nearest = difflib.get_close_matches(name, SAMPLERS, n=1)
        hint = f"did you mean {nearest[0]}? There are" if nearest else "there are"
        raise UserError(f"sampler: no sampler is called {name!r}; {hint} {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


# What goes with all of them


def inpainting(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """As `denoise`, but sure of what is known, so that only the rest is made up.

    The known part then goes its own way exactly: with the noise it began with where there is no chance, and else by the posterior.

    Args:
        known: clean images as the model sees them, of a shape that fits those sampled.
        mask: 1 (or true) where `known` holds, of a shape that fits too.
    """
    given = mask.bool()

    def look(x: Tensor, point: Point) -> Guess:
        guess = denoise(x, point)
        return Guess(torch.where(given, known, guess.x0), torch.where(given, 0.0, guess.fraction))

    return look
