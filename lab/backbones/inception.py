"""Inception: kernels of several sizes side by side (Szegedy et al. 2014, 2015).

GoogLeNet (arXiv:1409.4842) lets 1x1, 3x3 and 5x5 convolutions and a pooling look at the same map, each behind a cheap 1x1
convolution that narrows it, and puts what they find together. Inception-v3 (arXiv:1512.00567) factorises the kernels: 5x5 into
two 3x3 (18/25 of the multiplications), 7x7 into 1x7 and 7x1 (2/7).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lab.backbones.backbone import Staged
from lab.backbones.layers import ConvNorm, MaxPool, Norm, stem


class Branches(nn.Module):
    """Ways side by side from the same maps (N, C, h, w); what they give is put together along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, the sum of their channels, h', w')."""
        return torch.cat([branch(maps) for branch in self.branches], 1)


def chain(norm: Norm, inputs: int, *steps: tuple[int, int | tuple[int, int]], stride: int = 1) -> nn.Sequential:
    """Convolutions one after another, each given by its channels and its kernel; the last one has the stride."""
    layers = []
    for left, (outputs, kernel) in zip(reversed(range(len(steps))), steps):
        layers.append(ConvNorm(inputs, outputs, kernel, 1 if left else stride, norm=norm))
        inputs = outputs
    return nn.Sequential(*layers)


# GoogLeNet


class GoogLeNet(Staged):
    """Seven Inception modules of 32, 64 and 128 channels; the paper's network has nine of 256 to 1024.

    0.12 million weights and 14.5 million multiply-adds at 28x28 with one channel, 0.12 and 18.0 at 84x84 with four.
    """

    # Left out: the two classifiers on the way that kept gradients alive before there was normalisation, and the dropout of the
    # last vector, which belongs to whatever classifies it. Normalisation is not in the paper (Ioffe & Szegedy 2015 brought it here).

    paper = "Szegedy et al. 2014, Going deeper with convolutions, arXiv:1409.4842"
    year = 2014

    def __init__(self, in_channels: int, image_size: int, norm: Norm = "group") -> None:
        stages = [
            nn.Sequential(stem(in_channels, 24, image_size, norm), inception(24, 32, norm), inception(32, 32, norm)),
            nn.Sequential(MaxPool(3, 2, 1), inception(32, 64, norm), *(inception(64, 64, norm) for _ in range(2))),
            nn.Sequential(MaxPool(3, 2, 1), inception(64, 128, norm), inception(128, 128, norm)),
        ]
        super().__init__(stages, (32, 64, 128))


def inception(inputs: int, outputs: int, norm: Norm = "group") -> Branches:
    """The module with dimension reductions (figure 2b), in the proportions of the first one, 3a (table 1).

    Args:
        outputs: of all four branches together, a multiple of 16.
    """
    part = outputs // 16
    return Branches(
        chain(norm, inputs, (4 * part, 1)),
        chain(norm, inputs, (6 * part, 1), (8 * part, 3)),
        chain(norm, inputs, (part, 1), (2 * part, 5)),
        nn.Sequential(MaxPool(3, 1, 1), *chain(norm, inputs, (2 * part, 1))),
    )


# Inception-v3


class InceptionV3(Staged):
    """Two factorised, three asymmetric and two expanded modules of 32, 64 and 128 channels; the paper's have 288, 768 and 2048.

    0.11 million weights and 18.1 million multiply-adds at 28x28 with one channel, 0.12 and 22.8 at 84x84 with four.
    """

    # Left out: the auxiliary classifier and label smoothing, which are the training's. All convolutions pad, so that small maps last.

    paper = "Szegedy et al. 2015, Rethinking the Inception architecture for computer vision, arXiv:1512.00567"
    year = 2015

    def __init__(self, in_channels: int, image_size: int, norm: Norm = "group") -> None:
        stages = [
            nn.Sequential(stem(in_channels, 32, image_size, norm), *(factorised(32, norm) for _ in range(2))),
            nn.Sequential(reduction(32, 64, norm), *(asymmetric(64, norm) for _ in range(3))),
            nn.Sequential(reduction(64, 128, norm), *(expanded(128, norm) for _ in range(2))),
        ]
        super().__init__(stages, (32, 64, 128))


def factorised(width: int, norm: Norm = "group") -> Branches:
    """The 5x5 convolution becomes two of 3x3 (figure 5); for the largest maps. Channels: `width`, a multiple of 4."""
    part = width // 4
    return Branches(
        chain(norm, width, (part, 1), (part, 3), (part, 3)),
        chain(norm, width, (part, 1), (part, 3)),
        averaged(width, part, norm),
        chain(norm, width, (part, 1)),
    )


def asymmetric(width: int, norm: Norm = "group", n: int = 7) -> Branches:
    """nxn convolutions become 1xn and nx1 (figure 6); for maps of 12 to 20 pixels. Channels: `width`, a multiple of 4."""
    part = width // 4
    across, down = (part, (1, n)), (part, (n, 1))
    return Branches(
        chain(norm, width, (part, 1), across, down, across, down),
        chain(norm, width, (part, 1), across, down),
        averaged(width, part, norm),
        chain(norm, width, (part, 1)),
    )


def expanded(width: int, norm: Norm = "group") -> Branches:
    """1x3 and 3x1 side by side instead of one after another (figure 7), for more features on the coarsest maps.

    Channels: `width`, a multiple of 16; three eighths from each fan, one eighth from each of the others.
    """
    part, each = width // 8, 3 * width // 16
    return Branches(
        nn.Sequential(*chain(norm, width, (each, 1), (each, 3)), fan(each, norm)),
        nn.Sequential(*chain(norm, width, (each, 1)), fan(each, norm)),
        averaged(width, part, norm),
        chain(norm, width, (part, 1)),
    )


def fan(width: int, norm: Norm) -> Branches:
    """1x3 and 3x1 side by side, twice `width` together."""
    return Branches(chain(norm, width, (width, (1, 3))), chain(norm, width, (width, (3, 1))))


def averaged(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    """The mean of the 3x3 places around each, then 1x1."""
    return nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), *chain(norm, inputs, (outputs, 1)))


def reduction(inputs: int, outputs: int, norm: Norm = "group") -> Branches:
    """Half the sides and more channels (figure 10): strided convolutions beside a pooling, so that nothing is squeezed through few numbers.

    Args:
        outputs: channels in all; the pooling gives `inputs` of them, each of the others half of the rest.
    """
    part = (outputs - inputs) // 2
    return Branches(
        chain(norm, inputs, (part // 2, 1), (part // 2, 3), (part, 3), stride=2),
        chain(norm, inputs, (part // 2, 1), (part, 3), stride=2),
        MaxPool(3, 2, 1),
    )
