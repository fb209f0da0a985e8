"""What every backbone is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """Images (N, C, H, W) in [0, 1] to maps, and to a vector."""

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
        maps = [images]
        for layer in self.layers:
            maps.append(layer(maps[-1]).relu_())
        return maps[1:]

    def forward(self, images: Tensor) -> Tensor:
        """The vector, (N, out_features)."""
        flat = self.features(images)[-1].flatten(1)
        return self.dense(flat).relu() if self.dense else flat
