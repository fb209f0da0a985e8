"""Depthwise-separable convolutions and Xception (Chollet 2017, arXiv:1610.02357).

A convolution looks for patterns in space and across channels at once. A separable one does it in turn: first a kernel of
its own for every channel (depthwise), then a 1x1 convolution over all of them (pointwise), with nothing in between. For
each place, with 3 channels in, 10 out and a 3x3 kernel:

    plain        3*3 * 3 * 10         270 multiplications
    separable    3*3 * 3 + 3 * 10      57

Xception is a residual network of these: what Inception does with four towers, with as many towers as there are channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lab.backbones.backbone import Staged
from lab.backbones.layers import ConvNorm, MaxPool, Norm, normalisation, stem


class SeparableConv(nn.Sequential):
    """A depthwise convolution of odd `kernel`, then a pointwise one: (N, C, H, W) to (N, outputs, H, W)."""

    def __init__(self, channels: int, outputs: int, kernel: int = 3, bias: bool = False) -> None:
        depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        pointwise = nn.Conv2d(channels, outputs, 1, bias=bias)
        nn.init.kaiming_normal_(depthwise.weight, nonlinearity="linear")  # no activation follows
        nn.init.kaiming_normal_(pointwise.weight, nonlinearity="relu")
        super().__init__(depthwise, pointwise)


def multiplies_plain(channels: int, outputs: int, kernel: int) -> int:
    """Multiplications of a plain convolution for each place of its map."""
    return kernel**2 * channels * outputs


def multiplies_separable(channels: int, outputs: int, kernel: int) -> int:
    """Those of a depthwise-separable one; of the plain one's, the part 1/outputs + 1/kernel^2."""
    return kernel**2 * channels + channels * outputs


class Separables(nn.Module):
    """x + separable convolutions of relu(x), each with its normalisation; with `pool`, at half the size (figure 5 of the paper).

    With `pool`, max-pooling ends the branch, and a 1x1 convolution with stride 2 stands in for x.
    """

    def __init__(self, widths: Sequence[int], pool: bool = False, norm: Norm = "group") -> None:
        """Args:
        widths: channels that go in, and those after each separable convolution.
        """
        super().__init__()
        layers = [layer for pair in pairwise(widths) for layer in separable(*pair, norm)]
        self.branch = nn.Sequential(*layers, *([MaxPool(3, 2, 1)] if pool else []))
        self.shortcut = ConvNorm(widths[0], widths[-1], 1, 2, norm=norm, activation=None) if pool else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', h, w), not activated."""
        total: Tensor = self.branch(maps) + self.shortcut(maps)
        return total


def separable(inputs: int, outputs: int, norm: Norm) -> list[nn.Module]:
    """ReLU, separable convolution, normalisation."""
    return [nn.ReLU(), SeparableConv(inputs, outputs, bias=norm == "none"), normalisation(norm, outputs)]


class Xception(Staged):
    """Entry flow (two convolutions, one halving block), middle flow, exit flow (a halving block, a wider convolution).

    91 thousand weights and 19 M multiply-adds for 28x28 grey pixels; 94 thousand and 22 M for 84x84 with 4 frames.
    """

    paper = "Chollet 2017, Xception: deep learning with depthwise separable convolutions, arXiv:1610.02357"
    year = 2017

    def __init__(
        self, in_channels: int, image_size: int, widths: Sequence[int] = (32, 64, 128, 192), middle: int = 2, norm: Norm = "group"
    ) -> None:
        """Args:
        widths: channels of the three maps, the last of them within the exit flow and at its end.
        middle: blocks of three convolutions between entry and exit; eight in the paper.
        """
        entry, centre, exit_, last = widths
        stages = [
            nn.Sequential(stem(in_channels, entry // 2, image_size, norm), ConvNorm(entry // 2, entry, norm=norm)),
            nn.Sequential(
                Separables((entry, centre, centre), pool=True, norm=norm), *(Separables([centre] * 4, norm=norm) for _ in range(middle))
            ),
            # The paper's exit ends in two separable convolutions; here one.
            nn.Sequential(Separables((centre, centre, exit_), pool=True, norm=norm), *separable(exit_, last, norm), nn.ReLU()),
        ]
        super().__init__(stages, (entry, centre, last))
