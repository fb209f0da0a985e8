"""Encoders from images to vectors and decoders back, as plain perceptrons or convolutions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab import backbones
from lab.config import Count, Settings, UserError
from lab.images import Shape


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Settings):
    """The network on each side of the code."""

    kind: Literal["mlp", "conv"] = "mlp"
    """Perceptron over all pixels, or convolutions (image size a multiple of 4: 28 -> 14 -> 7)."""
    hidden: Count = 512
    """Units of each hidden layer of the perceptron, and of the layer between convolutions and code."""
    layers: Count = 2
    """Hidden layers of the perceptron."""
    channels: Count = 32
    """Channels of the first convolution (a multiple of 8); the second has twice as many."""
    encoder: str = ""
    """A backbone, by name, that encodes in place of the perceptron or the convolutions; the decoder stays of the kind that is set."""


class Encoder(nn.Module):
    """Maps images (N, C, H, W), and labels if there are classes, to vectors (N, outputs)."""

    def __init__(self, config: NetworkConfig, shape: Shape, classes: int, outputs: int) -> None:
        super().__init__()
        self.classes, self.flat = classes, config.kind == "mlp" and not config.encoder
        self.features: nn.Module = _body(config, shape, classes)
        self.head = nn.Linear(config.hidden, outputs)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Vectors (N, outputs); labels (N,) enter as constant planes or as extra inputs."""
        inputs = images.flatten(1) if self.flat else images
        if self.classes:
            marks = one_hot(labels, self.classes, images)
            planes = marks[:, :, None, None].expand(-1, -1, *images.shape[2:])
            inputs = torch.cat([inputs, marks if self.flat else planes], 1)
        vectors: Tensor = self.head(self.features(inputs))
        return vectors


class Decoder(nn.Module):
    """Maps codes (N, latent), and labels if there are classes, to images (N, C, H, W), before any squashing."""

    def __init__(self, config: NetworkConfig, shape: Shape, classes: int, latent: int) -> None:
        super().__init__()
        self.classes = classes
        build = _perceptron_out if config.kind == "mlp" else _convolutions_out
        self.layers = build(config, shape, latent + classes)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) on an unbounded scale."""
        inputs = torch.cat([codes, one_hot(labels, self.classes, codes)], 1) if self.classes else codes
        images: Tensor = self.layers(inputs)
        return images


def one_hot(labels: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """Labels (N,) as (N, classes), 1 at the label."""
    if labels is None:
        raise ValueError("a model with classes needs labels")
    return F.one_hot(labels, classes).to(like.dtype)


def _body(config: NetworkConfig, shape: Shape, classes: int) -> nn.Module:
    """What maps an image, with its label, to `config.hidden` numbers."""
    if config.encoder:
        return backbones.create(config.encoder, shape[0] + classes, shape[1], hidden=config.hidden)
    return _hidden_layers(config, math.prod(shape) + classes) if config.kind == "mlp" else _convolutions_in(config, shape, classes)


def _perceptron_out(config: NetworkConfig, shape: Shape, inputs: int) -> nn.Sequential:
    return nn.Sequential(*_hidden_layers(config, inputs), nn.Linear(config.hidden, math.prod(shape)), nn.Unflatten(1, shape))


def _hidden_layers(config: NetworkConfig, inputs: int) -> nn.Sequential:
    widths = [inputs, *[config.hidden] * config.layers]
    return nn.Sequential(*[layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.SiLU())])


def _convolutions_in(config: NetworkConfig, shape: Shape, classes: int) -> nn.Sequential:
    width, (height, breadth) = config.channels, _quarter(config, shape)
    return nn.Sequential(
        nn.Conv2d(shape[0] + classes, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * width), nn.SiLU(),
        nn.Flatten(), nn.Linear(2 * width * height * breadth, config.hidden), nn.SiLU(),
    )  # fmt: skip


def _convolutions_out(config: NetworkConfig, shape: Shape, inputs: int) -> nn.Sequential:
    """Nearest-neighbour upsampling before each convolution: transposed ones leave checkerboards (Odena et al. 2016)."""
    width, (height, breadth) = config.channels, _quarter(config, shape)
    return nn.Sequential(
        nn.Linear(inputs, config.hidden), nn.SiLU(), nn.Linear(config.hidden, 2 * width * height * breadth), nn.SiLU(),
        nn.Unflatten(1, (2 * width, height, breadth)),
        nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(width, shape[0], 3, padding=1),
    )  # fmt: skip


def _quarter(config: NetworkConfig, shape: Shape) -> tuple[int, int]:
    """Height and width of the maps after two halvings.

    Raises:
        UserError: the image or the channels cannot be divided.
    """
    _, height, width = shape
    if height % 4 or width % 4:
        raise UserError(f"model.network.kind 'conv' halves an image twice; {height}x{width} is not a multiple of 4, set data.image_size")
    if config.channels % 8:
        raise UserError(f"model.network.channels must be a multiple of 8 (groups of its normalisation), found {config.channels}")
    return height // 4, width // 4
