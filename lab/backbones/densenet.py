"""Densely connected networks (Huang et al. 2017, arXiv:1608.06993): every layer sees the maps of all layers before it.

    x_l = H_l([x_0, x_1, ..., x_(l-1)])                          equation 2; [ ] puts channels side by side

Each layer adds only `growth` channels, since what was found before need not be carried along: it is still there. H is
normalisation, ReLU, 1x1 convolution to 4 growth channels, normalisation, ReLU, 3x3 convolution (DenseNet-B); between the
blocks, a transition halves both channels and size (DenseNet-C with compression 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lab.backbones.backbone import Staged
from lab.backbones.layers import Norm, normalisation, stem

BOTTLENECK = 4
"""Channels of the 1x1 convolution for each channel that a layer adds."""


class DenseBlock(nn.Module):
    """Layers each of which adds `growth` channels to the maps: (N, C, H, W) to (N, C + depth growth, H, W)."""

    def __init__(self, inputs: int, growth: int, depth: int, norm: Norm = "group") -> None:
        super().__init__()
        self.layers = nn.ModuleList(dense_layer(inputs + index * growth, growth, norm) for index in range(depth))

    def forward(self, maps: Tensor) -> Tensor:
        """The maps that went in, then those of the layers in their order."""
        for layer in self.layers:
            maps = torch.cat((maps, layer(maps)), 1)
        return maps


def dense_layer(inputs: int, growth: int, norm: Norm) -> nn.Sequential:
    """H of equation 2: all maps so far to `growth` new ones."""
    width = BOTTLENECK * growth
    return nn.Sequential(*activated(inputs, width, 1, norm), *activated(width, growth, 3, norm))


def transition(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    """Fewer channels, then the mean over 2x2 places."""
    return nn.Sequential(*activated(inputs, outputs, 1, norm), nn.AvgPool2d(2))


def activated(inputs: int, outputs: int, kernel: int, norm: Norm) -> list[nn.Module]:
    """Normalisation, ReLU, convolution: in this order every layer normalises the maps of others in its own way."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm == "none")
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")  # He et al. 2015
    return [normalisation(norm, inputs), nn.ReLU(), convolution]


class DenseNet(Staged):
    """Three dense blocks with transitions between them; a last normalisation and ReLU end the last stage.

    99 thousand weights and 20 M multiply-adds for 28x28 grey pixels; 103 thousand and 24 M for 84x84 with 4 frames.
    """

    paper = "Huang et al. 2017, Densely connected convolutional networks, arXiv:1608.06993"
    year = 2017

    def __init__(
        self, in_channels: int, image_size: int, growth: int = 12, depths: Sequence[int] = (2, 4, 6), norm: Norm = "group"
    ) -> None:
        """Args:
        growth: channels that each layer adds; the stem gives twice as many (section 3, "implementation details").
        depths: layers of each block.
        """
        stages, channels, width = [], [], 2 * growth
        before: nn.Module = stem(in_channels, width, image_size, "none", None)
        for depth in depths:
            stages.append(nn.Sequential(before, DenseBlock(width, growth, depth, norm)))
            channels.append(width + depth * growth)
            width = channels[-1] // 2
            before = transition(channels[-1], width, norm)
        stages[-1].extend([normalisation(norm, channels[-1]), nn.ReLU()])
        super().__init__(stages, channels)
