"""What the convolutional families have in common: a convolution with its normalisation and activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lab.backbones.backbone import stem_stride

Activation = Callable[[], nn.Module]
"""Makes an activation layer: a class such as nn.ReLU."""

Norm = Literal["group", "batch", "none"]
"""Batch normalisation (Ioffe & Szegedy 2015) is in the papers; here group normalisation (Wu & He 2018) is the default, since it
treats every image by itself: an agent acts as it learns, a batch cut into parts or over processes gives the same gradient, and
gradient penalties mean what they say. `none` is for agents too."""


def normalisation(kind: Norm, channels: int) -> nn.Module:
    """A normalisation of `channels` channels; in groups of 8 or, where that leaves a rest, of fewer."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    return nn.GroupNorm(channels // next(size for size in (8, 4, 2, 1) if channels % size == 0), channels)


class ConvNorm(nn.Sequential):
    """Convolution, normalisation, activation; the convolution keeps the size at stride 1 and has a bias only without normalisation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        norm: Norm = "group",
        activation: Activation | None = nn.ReLU,
    ) -> None:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2)
        convolution = nn.Conv2d(inputs, outputs, (height, width), stride, padding, groups=groups, bias=norm == "none")
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # He et al. 2015
        layers = [convolution, normalisation(norm, outputs), *([activation()] if activation else [])]
        super().__init__(*layers)


class MaxPool(nn.MaxPool2d):
    """Max pooling; on a CPU with the channels last, where torch's kernel is 3 to 9 times as fast, whatever the maps come in."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, h, w)."""
        last = maps.contiguous(memory_format=torch.channels_last) if maps.device.type == "cpu" else maps
        pooled: Tensor = super().forward(last)
        return pooled.contiguous() if maps.is_contiguous() else pooled


def stem(in_channels: int, outputs: int, image_size: int, norm: Norm = "group", activation: Activation | None = nn.ReLU) -> ConvNorm:
    """The first layer, which shrinks large images to about 28 pixels: 3x3 at 28 pixels, 7x7 with stride 3 at 84."""
    stride = stem_stride(image_size)
    return ConvNorm(in_channels, outputs, 2 * stride + 1, stride, norm=norm, activation=activation)
