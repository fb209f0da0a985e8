"""Augmentation on the device: shift, rotation, zoom and brightness of a whole batch, as a function of given draws.

There are no flips: a mirrored digit or hand is another sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.config import Fraction, NonNegative, Settings

DRAWS = 5
"""Uniform numbers that one image takes: shift x, shift y, rotation, zoom, brightness."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Settings):
    """How far a training image may be changed; every amount is drawn evenly between minus and plus its setting."""

    shift: NonNegative = 0.0
    """Largest shift, in pixels along each axis."""
    rotation: NonNegative = 0.0
    """Largest rotation, in degrees either way."""
    zoom: Fraction = 0.0
    """Largest zoom: 0.1 scales by 1/1.1 to 1.1 about the centre."""
    brightness: Fraction = 0.0
    """Largest change of brightness: 0.2 multiplies by 0.8 to 1.2, cut off at white."""

    @property
    def moves(self) -> bool:
        """Whether any setting moves pixels."""
        return bool(self.shift or self.rotation or self.zoom)

    @property
    def active(self) -> bool:
        """Whether any setting changes an image."""
        return self.moves or bool(self.brightness)


def augment(images: Tensor, config: AugmentConfig, draws: Tensor) -> Tensor:
    """Change every image by its own row of draws.

    What comes in from outside is the image mirrored at its edge, so that photographs get no black corners and a frame
    is not smeared; a digit on a black ground stays on black.

    Args:
        images: float (N, C, H, W) in [0, 1].
        config: the largest changes; with none, `images` itself is returned.
        draws: uniform numbers in [0, 1), (N, 5), on the images' device: shift right, shift down, rotation
            counter-clockwise, zoom, brightness. A draw of 0.5 changes nothing.

    Returns:
        Float (N, C, H, W) in [0, 1].

    Raises:
        ValueError: the draws do not have the shape (N, 5).
    """
    if not config.active:
        return images
    if draws.shape != (len(images), DRAWS):
        raise ValueError(f"draws: expected shape {(len(images), DRAWS)}, found {tuple(draws.shape)}")
    amounts = draws.to(images.dtype) * 2 - 1
    if config.moves:
        theta = _sampling_matrices(amounts, config, height=images.shape[2], width=images.shape[3])
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if config.brightness:
        images = (images * (1 + config.brightness * amounts[:, 4, None, None, None])).clamp(0, 1)
    return images


def _sampling_matrices(amounts: Tensor, config: AugmentConfig, height: int, width: int) -> Tensor:
    """(N, 2, 3): where each output place looks in the input, both in `affine_grid`'s units (the image spans -1 to 1).

    In pixels from the centre, an image is zoomed, turned and then shifted: out = zoom R(angle) in + shift. The matrix
    is the inverse of that, in = R(-angle) (out - shift) / zoom. As a unit is half the width on one axis and half the
    height on the other, the terms across axes take their ratio; else turning a non-square image would shear it.
    """
    angle = amounts[:, 2] * math.radians(config.rotation)
    zoom = (1 + config.zoom) ** amounts[:, 3]
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    right, down = config.shift * amounts[:, 0], config.shift * amounts[:, 1]
    x = torch.stack((cos, -sin * (height / width), (down * sin - right * cos) * (2 / width)), dim=1)
    y = torch.stack((sin * (width / height), cos, (-right * sin - down * cos) * (2 / height)), dim=1)
    return torch.stack((x, y), dim=1)
