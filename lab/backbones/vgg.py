"""VGG: only 3x3 convolutions, and many of them (Simonyan & Zisserman 2015, arXiv:1409.1556).

Two 3x3 convolutions see 5x5 pixels and three see 7x7, with fewer weights than one large kernel and with a rectification after
each (section 2.3). Whenever pooling halves the sides, the width doubles, so that every stage costs about the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lab.backbones.alexnet import dropped
from lab.backbones.backbone import Staged, stem_stride
from lab.backbones.layers import ConvNorm, MaxPool, Norm, stem

DENSE = 256
"""Width of the two dense layers; 4096 in the paper."""


class VGG(Staged):
    """Stages of 3x3 convolutions with 2x2 pooling between, then two dense layers with dropout.

    The first convolution of large images is a larger one that shrinks them to about 28 pixels. The paper has no normalisation and
    started its deep networks from trained shallow ones; normalisation makes that needless.
    """

    paper = "Simonyan & Zisserman 2015, Very deep convolutional networks for large-scale image recognition, arXiv:1409.1556"
    year = 2015

    def __init__(
        self, in_channels: int, image_size: int, widths: Sequence[int], depths: Sequence[int], norm: Norm = "group", dropout: float = 0.5
    ) -> None:
        """Args:
        widths: channels of each stage.
        depths: convolutions of each stage.
        dropout: share of the dense units set to zero while training.
        """
        first = nn.Sequential(stem(in_channels, widths[0], image_size, norm), *row(widths[0], widths[0], depths[0] - 1, norm))
        later = [
            nn.Sequential(MaxPool(2), *row(inputs, outputs, depth, norm)) for inputs, outputs, depth in zip(widths, widths[1:], depths[1:])
        ]
        side = -(-image_size // stem_stride(image_size)) // 2 ** len(widths)
        head = nn.Sequential(MaxPool(2), *dropped(widths[-1] * side * side, DENSE, DENSE, dropout=dropout))
        super().__init__([first, *later], widths, head, DENSE)


def row(inputs: int, outputs: int, depth: int, norm: Norm) -> list[ConvNorm]:
    """3x3 convolutions, the first of which changes the width."""
    return [ConvNorm(inputs if index == 0 else outputs, outputs, norm=norm) for index in range(depth)]


def vgg_small(in_channels: int, image_size: int, norm: Norm = "group", dropout: float = 0.5) -> VGG:
    """Seven convolutions of 24, 48 and 96 channels; the paper's D has thirteen of 64 to 512.

    0.53 million weights and 20.8 million multiply-adds at 28x28 with one channel, 0.54 and 24.3 at 84x84 with four.
    """
    return VGG(in_channels, image_size, (24, 48, 96), (2, 2, 3), norm, dropout)
