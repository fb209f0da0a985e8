"""What every backbone is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """Images (N, C, H, W), numbers in [0, 1] or bytes that are scaled to them, to maps and to a vector."""

    out_channels: tuple[int, ...]
    """Channels of each of the maps."""
    out_features: int
    """Length of the vector."""

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """The maps on the way, from fine to coarse."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """The vector, (N, out_features)."""


def computed_in(device: torch.device) -> torch.dtype:
    """The format that products are computed in now."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def as_numbers(images: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1], in the format that products are computed in; numbers as they are."""
    return images.to(computed_in(images.device)).mul_(1 / 255) if images.dtype == torch.uint8 else images


class ConvStack(Backbone):
    """Convolutions with ReLU one after another, then a dense layer with ReLU; the base of the plainest backbones."""

    def __init__(self, layers: list[nn.Conv2d], side: int, hidden: int) -> None:
        """Args:
        layers: the convolutions.
        side: height and width of the last map.
        hidden: width of the dense layer; 0: none, the vector is the last map, flattened.
        """
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.out_channels = tuple(layer.out_channels for layer in layers)
        flat = self.out_channels[-1] * side * side
        self.dense = nn.Linear(flat, hidden) if hidden else None
        self.out_features = hidden or flat

    def features(self, images: Tensor) -> list[Tensor]:
        """The map after each convolution."""
        maps = [self.first(images).relu_()]
        for layer in self.layers[1:]:
            maps.append(layer(maps[-1]).relu_())
        return maps

    def first(self, images: Tensor) -> Tensor:
        """What the first convolution makes of the images."""
        numbers: Tensor = self.layers[0](as_numbers(images))
        return numbers

    def forward(self, images: Tensor) -> Tensor:
        """The vector, (N, out_features)."""
        flat = self.features(images)[-1].flatten(1)
        return self.dense(flat).relu() if self.dense else flat
