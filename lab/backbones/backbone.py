"""What every backbone is, and how those made of stages are put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """Images (N, C, H, W), numbers in [0, 1] or bytes that are scaled to them, to maps and to a vector."""

    paper: ClassVar[str]
    """Where it comes from: authors, year, title or arXiv number."""
    year: ClassVar[int]
    """Of the paper."""
    out_channels: tuple[int, ...]
    """Channels of each of the maps."""
    out_features: int
    """Length of the vector."""
    head: nn.Module
    """Maps the last map to the vector."""

    @abstractmethod
    def features(self, images: Tensor) -> list[Tensor]:
        """The maps (N, C, h, w) on the way, one for each resolution, from fine to coarse."""

    def forward(self, images: Tensor) -> Tensor:
        """The vector, (N, out_features)."""
        vector: Tensor = self.head(self.features(images)[-1])
        return vector

    @property
    def forgets_places(self) -> bool:
        """Whether the vector comes from a mean over all places, which tells what is there but not where."""
        return any(isinstance(module, Average) for module in self.head.modules())

    @property
    def sequence(self) -> list[nn.Module]:
        """Its parts from the input to the output; fine-tuning thaws them from the last to the first."""
        return [part for child in self.children() for part in (child if isinstance(child, nn.ModuleList) else [child])]


class Staged(Backbone):
    """Stages one after another, each of them coarser than the one before; the vector is the mean over all places of the last map.

    Global average pooling is from Lin et al. 2014, "Network in network", arXiv:1312.4400.
    """

    def __init__(self, stages: Sequence[nn.Module], channels: Sequence[int], head: nn.Module | None = None, out_features: int = 0) -> None:
        """Args:
        stages: modules that map a map to the next one; the first one takes the images.
        channels: of each stage's map.
        head: maps the last map to a vector of `out_features` numbers; without one, the mean over places.
        """
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.out_channels = tuple(channels)
        self.head = head or Average()
        self.out_features = out_features or channels[-1]

    def features(self, images: Tensor) -> list[Tensor]:
        """The map after each stage."""
        maps = [as_numbers(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


class ConvStack(Backbone):
    """Convolutions with ReLU one after another, then a dense layer with ReLU; the base of the plainest backbones."""

    def __init__(self, layers: Sequence[nn.Conv2d], side: int, hidden: int, layer_norm: bool = False) -> None:
        """Args:
        layers: the convolutions.
        side: height and width of the last map.
        hidden: width of the dense layer.
        layer_norm: normalise the channels of each place before each ReLU.
        """
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.out_channels = tuple(layer.out_channels for layer in layers)
        self.norms = nn.ModuleList(ChannelNorm(channels) for channels in self.out_channels) if layer_norm else None
        self.head = dense(self.out_channels[-1] * side * side, hidden)
        self.out_features = hidden

    def features(self, images: Tensor) -> list[Tensor]:
        """The map after each convolution."""
        maps: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            sums = layer(maps[-1]) if maps else self.first(images)
            # In place on a norm's permuted view, the backward pass would copy the whole map: a tenth of both passes.
            maps.append(self.norms[index](sums).relu() if self.norms else sums.relu_())
        return maps

    def first(self, images: Tensor) -> Tensor:
        """What the first convolution makes of the images."""
        numbers: Tensor = self.layers[0](as_numbers(images))
        return numbers


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450) of the channels of each place, (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W), as it came."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Average(nn.Module):
    """The mean over all places of a map, (N, C, h, w) to (N, C)."""

    def forward(self, maps: Tensor) -> Tensor:
        """Vectors (N, C)."""
        return maps.mean((2, 3))


class LastPlace(nn.Module):
    """The last place of a map, (N, C, h, w) to (N, C): of what was read in order, the only one that knows all of it."""

    def forward(self, maps: Tensor) -> Tensor:
        """Vectors (N, C)."""
        return maps[:, :, -1, -1]


def dense(inputs: int, *widths: int) -> nn.Sequential:
    """The head that keeps where things are: the whole map through dense layers with ReLU; with no widths, only flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


def map_size(backbone: Backbone, in_channels: int, image_size: int) -> int:
    """Numbers in the last map of one image."""
    training = backbone.training
    with torch.no_grad():
        last = backbone.eval().features(torch.zeros(1, in_channels, image_size, image_size))[-1]
    backbone.train(training)
    return last.numel()


def stem_stride(image_size: int) -> int:
    """How much a first layer shrinks images so that the stages see about 28 pixels a side: 1 up to 41 pixels, 3 at 84."""
    return max(1, round(image_size / 28))


def computed_in(device: torch.device) -> torch.dtype:
    """The format that products are computed in now."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def as_numbers(images: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1], in the format that products are computed in; numbers as they are."""
    return images.to(computed_in(images.device)).mul_(1 / 255) if images.dtype == torch.uint8 else images
