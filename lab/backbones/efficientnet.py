"""Squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507), MBConv, Fused-MBConv and EfficientNetV2 (Tan & Le 2021, arXiv:2104.00298).

    MBConv          1x1 expansion, 3x3 depthwise, squeeze-and-excitation, 1x1 projection
    Fused-MBConv    3x3 expansion, 1x1 projection

A depthwise convolution has few multiplications, but it moves as much memory as any: while the maps are large and have few
channels, one plain 3x3 convolution is faster than a 1x1 and a depthwise one. So the early stages are fused, the late are not.
"""

from __future__ import annotations

from torch import Tensor, nn

from lab.backbones.backbone import Average, Staged
from lab.backbones.layers import ConvNorm, Norm, stem
from lab.backbones.mobilenet import SkipConnection


class SqueezeExcitation(nn.Module):
    """Every channel times a number in (0, 1) that depends on the means of all channels (equations 2 to 4 of Hu et al.)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        """Args:
        squeezed: width of the layer between; SiLU follows it, as in EfficientNet, where Hu et al. have ReLU.
        """
        super().__init__()
        self.excite = nn.Sequential(
            Average(),
            nn.Linear(channels, squeezed),
            nn.SiLU(),
            nn.Linear(squeezed, channels),
            nn.Sigmoid(),
            nn.Unflatten(1, (channels, 1, 1)),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W), as it came."""
        scaled: Tensor = maps * self.excite(maps)
        return scaled


class MBConv(SkipConnection):
    """An inverted residual with squeeze-and-excitation and SiLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expansion: int = 4, norm: Norm = "group") -> None:
        """Args:
        stride: of the depthwise convolution.
        expansion: channels within for each channel that goes in; squeezed to a quarter of those that go in.
        """
        width = expansion * inputs
        branch = nn.Sequential(
            ConvNorm(inputs, width, 1, norm=norm, activation=nn.SiLU),
            ConvNorm(width, width, 3, stride, groups=width, norm=norm, activation=nn.SiLU),
            SqueezeExcitation(width, inputs // 4),
            ConvNorm(width, outputs, 1, norm=norm, activation=None),
        )
        super().__init__(branch, skip=stride == 1 and inputs == outputs)


class FusedMBConv(SkipConnection):
    """A plain 3x3 convolution that expands, then the projection; without expansion, the 3x3 convolution alone."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expansion: int = 4, norm: Norm = "group") -> None:
        """Args:
        stride: of the 3x3 convolution.
        expansion: channels within for each channel that goes in.
        """
        width = expansion * inputs if expansion > 1 else outputs
        expand = ConvNorm(inputs, width, 3, stride, norm=norm, activation=nn.SiLU)
        project = [ConvNorm(width, outputs, 1, norm=norm, activation=None)] if expansion > 1 else []
        super().__init__(nn.Sequential(expand, *project), skip=stride == 1 and inputs == outputs)


STAGES: tuple[tuple[tuple[type[FusedMBConv] | type[MBConv], int, int, int], ...], ...] = (
    ((FusedMBConv, 1, 16, 1),),
    ((FusedMBConv, 4, 24, 2),),
    ((MBConv, 4, 48, 2), (MBConv, 6, 64, 2)),
)
"""Block, expansion, channels and number of blocks, as in table 4 of the paper; the first block of a stage but the first halves the size."""


class EfficientNetV2(Staged):
    """A stem, fused stages, a stage of MBConv, and a head that is a 1x1 convolution and the mean over places.

    199 thousand weights and 15 M multiply-adds for 28x28 grey pixels; 202 thousand and 18 M for 84x84 with 4 frames.
    """

    # The paper's stochastic depth is left out: seven blocks train without it, and an agent's values should not be random.

    paper = "Tan & Le 2021, EfficientNetV2: smaller models and faster training, arXiv:2104.00298"
    year = 2021

    def __init__(self, in_channels: int, image_size: int, norm: Norm = "group", out_features: int = 256) -> None:
        """Args:
        out_features: channels of the head's convolution.
        """
        stages: list[nn.Sequential] = []
        width = STAGES[0][0][2]
        layers: list[nn.Module] = [stem(in_channels, width, image_size, norm, nn.SiLU)]
        for rows in STAGES:
            stride = 2 if stages else 1
            for block, expansion, outputs, count in rows:
                for _ in range(count):
                    layers.append(block(width, outputs, stride, expansion, norm))
                    width, stride = outputs, 1
            stages.append(nn.Sequential(*layers))
            layers = []
        head = nn.Sequential(ConvNorm(width, out_features, 1, norm=norm, activation=nn.SiLU), Average())
        super().__init__(stages, [rows[-1][2] for rows in STAGES], head, out_features)
