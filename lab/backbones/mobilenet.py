"""Inverted residuals with linear bottlenecks: MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381).

A bottleneck of a ResNet is wide, narrow, wide, with the shortcut between the wide ends. Here it is narrow, wide, narrow: a
1x1 convolution expands the map six times, a depthwise 3x3 one is cheap even so, and a 1x1 one projects it back. The
projection has no activation, since a ReLU would lose what a narrow map has no room to keep twice (section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lab.backbones.backbone import Average, Staged
from lab.backbones.layers import ConvNorm, Norm, stem

EXPANSION = 6
"""Channels within a block for each channel that goes in."""


class SkipConnection(nn.Module):
    """branch(x), plus x where the shape stays."""

    def __init__(self, branch: nn.Module, skip: bool) -> None:
        super().__init__()
        self.branch, self.skip = branch, skip

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', h, w), not activated."""
        change: Tensor = self.branch(maps)
        return maps + change if self.skip else change


class InvertedResidual(SkipConnection):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation (table 1 of the paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expansion: int = EXPANSION, norm: Norm = "group") -> None:
        """Args:
        stride: of the depthwise convolution.
        expansion: channels within for each channel that goes in; with 1 there is no first convolution.
        """
        width = expansion * inputs
        expand = [ConvNorm(inputs, width, 1, norm=norm, activation=nn.ReLU6)] if expansion > 1 else []
        depthwise = ConvNorm(width, width, 3, stride, groups=width, norm=norm, activation=nn.ReLU6)
        project = ConvNorm(width, outputs, 1, norm=norm, activation=None)
        super().__init__(nn.Sequential(*expand, depthwise, project), skip=stride == 1 and inputs == outputs)


class MobileNetV2(Staged):
    """A stem, stages of inverted residuals, and a head that is a 1x1 convolution to four times the channels and the mean over places.

    108 thousand weights and 10 M multiply-adds for 28x28 grey pixels; 111 thousand and 12 M for 84x84 with 4 frames.
    """

    paper = "Sandler et al. 2018, MobileNetV2: inverted residuals and linear bottlenecks, arXiv:1801.04381"
    year = 2018

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        widths: Sequence[int] = (16, 24, 48),
        depths: Sequence[int] = (1, 3, 3),
        norm: Norm = "group",
    ) -> None:
        """Args:
        widths: channels of each stage's map.
        depths: blocks of each stage; those of the first one do not expand.
        """
        stages: list[nn.Sequential] = []
        layers: list[nn.Module] = [stem(in_channels, widths[0], image_size, norm, nn.ReLU6)]
        inputs = widths[0]
        for width, depth in zip(widths, depths, strict=True):
            stride, expansion = (2, EXPANSION) if stages else (1, 1)
            for _ in range(depth):
                layers.append(InvertedResidual(inputs, width, stride, expansion, norm))
                inputs, stride = width, 1
            stages.append(nn.Sequential(*layers))
            layers = []
        head = nn.Sequential(ConvNorm(inputs, 4 * inputs, 1, norm=norm, activation=nn.ReLU6), Average())
        super().__init__(stages, widths, head, 4 * inputs)
