"""How pictures are made of noise and of images: `scripts/sample.py` and the studio draw by the same functions, and so the same pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from generative.model import Generator, SamplingConfig
from lab import media, seeding
from lab.config import UserError

EDGE = 0.02
"""A plane of codes goes from this quantile of the prior to the opposite one."""

# What some models can do


@runtime_checkable
class Trajectory(Protocol):
    """A model that can show its way from noise to picture."""

    def trajectory(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator) -> list[Tensor]:
        """Images (N, C, H, W) in [0, 1] of every step, noise first."""


@runtime_checkable
class Editor(Protocol):
    """A model that can change images."""

    def inpaint(
        self, images: Tensor, mask: Tensor, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator
    ) -> Tensor:
        """Images (N, C, H, W) in [0, 1], as they were where the mask (1, 1, H, W) is 1 and filled in where it is 0."""

    def vary(
        self, images: Tensor, strength: float, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator
    ) -> Tensor:
        """Images brought back from `strength` of the way into noise."""


def small_code(model: Generator) -> bool:
    """Whether the code is smaller than the image, so that single numbers of it mean something."""
    return 0 < model.latent < math.prod(model.shape)


# What a picture is made of


def noise_for(model: Generator, seed: int, rows: int, index: int = 0) -> Tensor:
    """Standard normal noise (rows, latent), for each index another."""
    return torch.randn(rows, model.latent, generator=seeding.generator(seed, "sample", index))


def way(seed: int, index: int = 0) -> torch.Generator:
    """What else is drawn on the way: the same for pictures between which only the noise is to change."""
    return seeding.generator(seed, "way", index)


def read_labels(text: str, classes: tuple[str, ...]) -> list[int]:
    """The labels that names, commas and ranges mean, as in `3` or `0-4,7`.

    Raises:
        UserError: no such class.
    """
    return [label for part in text.split(",") for label in read_range(part.strip(), classes)]


def read_range(text: str, classes: tuple[str, ...]) -> list[int]:
    """The class indices that `3`, `0-4` or `A-F` names.

    Raises:
        UserError: no such class.
    """
    first, dash, last = (text, "", text) if text in classes else text.partition("-")
    try:
        start, stop = classes.index(first.strip()), classes.index(last.strip() if dash else first.strip())
    except ValueError:
        raise UserError(f"--labels {text}: the classes are {', '.join(classes)}") from None
    return list(range(start, stop + 1)) or list(range(start, stop - 1, -1))


def labels_for(text: str, classes: tuple[str, ...], count: int) -> Tensor:
    """A label for each of `count` images: those that the text names in turn, or all where it is empty."""
    chosen = read_labels(text, classes) if text else list(range(max(1, len(classes))))
    return torch.tensor(chosen)[torch.arange(count) % len(chosen)]


def spherical(starts: Tensor, ends: Tensor, place: float) -> Tensor:
    """A place between two points (N, latent) on an arc: straight lines would cut through the empty middle of the prior."""
    angle = torch.acos(F.cosine_similarity(starts, ends, dim=1).clamp(-0.9999, 0.9999))[:, None]
    return (torch.sin((1 - place) * angle) * starts + torch.sin(place * angle) * ends) / torch.sin(angle)


def places(count: int) -> list[float]:
    """`count` places between two ends, from 0 to 1."""
    return [index / max(1, count - 1) for index in range(count)]


def sensitive(model: Generator, how: SamplingConfig, seed: int, device: str = "cpu") -> list[int]:
    """Code dimensions, the one that changes the picture most first."""
    steps = 2 * torch.eye(model.latent, device=device)
    labels = torch.zeros(model.latent, dtype=torch.long, device=device)
    high, low = (model.generate_all(side * steps, labels, how, way(seed)) for side in (1, -1))
    return [int(index) for index in (high - low).abs().flatten(1).sum(1).argsort(descending=True)]


def plane(latent: int, across: int, down: int, side: int) -> Tensor:
    """Noise (side, side, latent) at even quantiles of two dimensions, the others 0 (Kingma & Welling 2014, figure 4)."""
    quantiles = quantile(torch.linspace(0, 1, side, dtype=torch.float64))
    rows = torch.zeros(side, side, latent)
    rows[:, :, across], rows[:, :, down] = quantiles[None, :], quantiles[:, None]
    return rows


def quantile(places: Tensor) -> Tensor:
    """The numbers of a standard normal at places from 0 to 1 of a plane's side, float32."""
    numbers: Tensor = torch.special.ndtri(EDGE + (1 - 2 * EDGE) * places.double())
    return numbers.float()


# Filling in


def holes(height: int, width: int) -> dict[str, tuple[slice, slice]]:
    """The parts of an image that can be asked to be filled in by name: rows and columns."""
    down, across = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
    whole, (top, bottom), (left, right) = slice(None), halves(height), halves(width)
    return {"left": (whole, left), "right": (whole, right), "top": (top, whole), "bottom": (bottom, whole), "centre": (down, across)}


def halves(size: int) -> tuple[slice, slice]:
    """The first and the second half of `size` rows or columns."""
    return slice(size // 2), slice(size // 2, None)


def without(hole: tuple[slice, slice], height: int, width: int) -> Tensor:
    """1 where an image is to stay and 0 in the hole, (1, 1, H, W)."""
    stays = torch.ones(1, 1, height, width)
    stays[0, 0][hole] = 0
    return stays


# Laying out


def side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """One picture of columns of images (rows, C, H, W)."""
    return media.grid(torch.stack(list(columns), 1).flatten(0, 1), columns=len(columns))


def thinned(moments: Sequence[Tensor], most: int) -> list[Tensor]:
    """The moments, or `most` of them, evenly spaced and always with the last."""
    count, last = min(len(moments), most), len(moments) - 1
    return [moments[last - round(index * last / max(1, count - 1))] for index in reversed(range(count))]
