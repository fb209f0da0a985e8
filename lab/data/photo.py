"""Anybody's photo as the images that a model was trained on: upright, square, grey, the right way round in brightness.

A set drawn on black, as MNIST is, has its figures cut out, scaled to one size and centred; a photo of ink on paper gets the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.data.folder import decode
from lab.data.imageset import Split, as_float

BLACK = 0.2
"""A set whose borders are darker than this on average is one of figures drawn on black."""
INK = 0.35
"""Brightness, as a part of the brightest, from which a pixel counts as drawn."""
LARGE = 10
"""A photo is looked at with so many pixels for each one of the model's, before figures are cut out."""

Inversion = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class Framing:
    """How the images of a set are framed."""

    ground: float
    """Mean grey at their borders, 0 to 1."""
    extent: float
    """The longer side of the figure as a part of the image's side, on average; of sets drawn on black."""

    @property
    def drawn(self) -> bool:
        """Whether the set is one of figures drawn on black."""
        return self.ground < BLACK


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo made ready."""

    image: Tensor
    """Float (C, S, S) in [0, 1]."""
    inverted: bool
    """Whether its brightness was turned round."""


def framing(split: Split) -> Framing:
    """How the images of a split are framed."""
    images = as_float(split.spread(2000).images)
    drawn = images.mean(1) > INK * images.amax((1, 2, 3))[:, None, None]
    rows, columns = (drawn.any(axis).sum(1) for axis in (2, 1))
    return Framing(border(images), float((torch.maximum(rows, columns) / images.shape[-1]).mean()))


def border(images: Tensor) -> float:
    """The mean grey at the borders of images (..., H, W)."""
    return float(torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1).mean())


def read(path: Path, shape: tuple[int, int, int], frame: Framing, invert: Inversion = "auto") -> Photo:
    """A photo as a model wants it that was trained on images of `shape` (C, H, W), framed so.

    Raises:
        DataError: the file cannot be read as an image.
    """
    channels, side, _ = shape
    image = as_float(decode(path, side * LARGE if frame.drawn else side, greyscale=channels == 1))
    inverted = invert == "yes" or (invert == "auto" and wrong_way_round(image, frame))
    image = 1 - image if inverted else image
    return Photo(cut_out(image, side, frame.extent) if frame.drawn else image, inverted)


def wrong_way_round(image: Tensor, frame: Framing) -> bool:
    """Whether the border of an image is nearer to the set's when turned round; never where the set has no clear side."""
    grey = border(image)
    return not 0.35 < frame.ground < 0.65 and abs(1 - grey - frame.ground) < abs(grey - frame.ground)


def cut_out(image: Tensor, side: int, extent: float) -> Tensor:
    """The figure of a picture (C, S, S) on an uneven dark ground, on black, at the set's size, its centre of mass in the middle.

    As MNIST was made: scaled to a box of 20 of 28 pixels, then centred by mass (LeCun et al. 1998).
    """
    figure = without_ground(image)
    drawn = figure.mean(0) > INK
    if not drawn.any():
        return F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
    (top, bottom), (left, right) = (_range(drawn.any(axis)) for axis in (1, 0))
    part = figure[:, top:bottom, left:right]
    scale = extent * side / max(part.shape[1:])
    size = [max(1, round(scale * length)) for length in part.shape[1:]]
    small = F.interpolate(part[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    return centred(small, side)


def without_ground(image: Tensor, rounds: int = 5) -> Tensor:
    """A picture (C, S, S) less its ground, a surface of the second degree through all that is not drawn, stretched to [0, 1]."""
    grey, line = F.avg_pool2d(image.mean(0)[None], 5, 1, 2, count_include_pad=False)[0], torch.linspace(-1, 1, image.shape[-1])
    y, x = torch.meshgrid(line, line, indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], -1)
    plain, surface = torch.ones_like(grey, dtype=torch.bool), grey
    for _ in range(rounds):  # what stands out of the surface is drawn, and does not count for the next one
        # In doubles, so that the last digits, which hang on where numbers lie in memory, are rounded off.
        surface = terms @ torch.linalg.lstsq(terms[plain].double(), grey[plain, None].double()).solution[:, 0].float()
        rest = grey - surface
        plain = rest < 2 * rest[plain].std().clamp(min=1e-3)
    return ((image - surface) / (grey - surface).max().clamp(min=1e-3)).clamp(0, 1)


def centred(figure: Tensor, side: int) -> Tensor:
    """A figure (C, h, w) on a black square, its centre of mass at the square's centre as far as it then stays inside."""
    mass = figure.mean(0)
    offsets = []
    for axis in (0, 1):
        line = mass.sum(1 - axis)
        middle = float((line * (torch.arange(len(line)) + 0.5)).sum() / line.sum())
        offsets.append(min(max(0, round(side / 2 - middle)), side - len(line)))
    (top, left), (height, width) = offsets, figure.shape[1:]
    return F.pad(figure, (left, side - left - width, top, side - top - height))


def _range(line: Tensor) -> tuple[int, int]:
    """First and one past the last true place of a line."""
    places = line.nonzero().flatten()
    return int(places[0]), int(places[-1]) + 1
