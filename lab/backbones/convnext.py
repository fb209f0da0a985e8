"""A convolutional network with a Transformer's habits: ConvNeXt (Liu et al. 2022, arXiv:2201.03545).

    y = x + g * W2 gelu(W1 norm(depthwise 7x7(x)))

As in a Transformer's block, one part mixes places (there attention, here a depthwise convolution) and the other mixes the
channels of each place by itself (two dense layers, four times as wide between). There is one normalisation and one
activation in a block, and the normalisation is over the channels of each place. g is a learnt number for each channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lab.backbones.backbone import ChannelNorm, Staged
from lab.backbones.layers import stem

LAYER_SCALE = 0.1
"""What g starts as. The paper's 1e-6 lets networks of dozens of blocks start as the identity; one of four blocks would, for as
long as g takes to grow, be little more than its stem."""


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, normalisation, two dense layers over channels, layer scale, shortcut: (N, C, H, W) as it came."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.mix = nn.Sequential(
            nn.LayerNorm(channels, eps=1e-6), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.scale = nn.Parameter(torch.full((channels,), LAYER_SCALE))

    def forward(self, maps: Tensor) -> Tensor:
        """The maps with what this block adds; channels are last within, where dense layers want them."""
        mixed: Tensor = self.scale * self.mix(self.depthwise(maps).permute(0, 2, 3, 1))
        return maps + mixed.permute(0, 3, 1, 2)


class ConvNeXt(Staged):
    """A stem, stages of blocks, and between them a normalisation with a 2x2 convolution of stride 2.

    210 thousand weights and 18 M multiply-adds for 28x28 grey pixels; 214 thousand and 22 M for 84x84 with 4 frames.
    """

    # The paper's stem cuts 4x4 patches, which would leave 7 places a side of 28 pixels; here it is the one of the other families.
    # The last normalisation stands before the mean over places and not after it, so that a dense head has a normalised map too.
    # The blocks' weights begin as torch has them: the paper's standard deviation of 0.02 is meant for a hundred channels and more.

    paper = "Liu et al. 2022, A ConvNet for the 2020s, arXiv:2201.03545"
    year = 2022

    def __init__(self, in_channels: int, image_size: int, widths: Sequence[int] = (24, 48, 96), depths: Sequence[int] = (1, 1, 2)) -> None:
        """Args:
        widths: channels of each stage.
        depths: blocks of each stage.
        """
        stages = [nn.Sequential(stem(in_channels, widths[0], image_size, "none", None), ChannelNorm(widths[0]))]
        stages += [nn.Sequential(*shrink(*pair)) for pair in pairwise(widths)]
        for stage, width, depth in zip(stages, widths, depths, strict=True):
            stage.extend(ConvNeXtBlock(width) for _ in range(depth))
        stages[-1].append(ChannelNorm(widths[-1]))
        super().__init__(stages, widths)


def shrink(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    """Half the size, (N, C, H, W) to (N, outputs, H/2, W/2), normalised before, which keeps the training stable (section 2.6)."""
    return ChannelNorm(inputs), nn.Conv2d(inputs, outputs, 2, 2)
