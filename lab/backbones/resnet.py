"""Residual networks (He et al. 2015, arXiv:1512.03385; He et al. 2016, arXiv:1603.05027).

    y = relu(x + branch(x))                                      2015: basic and bottleneck
    y = x + branch(relu(norm(x)))                                2016: pre-activation, so that nothing stands in the way of x

A layer that is not needed learns to add nothing, and the gradient has a way through any number of blocks. Where channels or
size change, a 1x1 convolution takes the place of x. Every branch starts as zero, hence every block as the identity: by the
gain of its last normalisation (Goyal et al. 2017, arXiv:1706.02677, section 5.1) or, where none ends it, by its last kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from lab.backbones.backbone import Staged
from lab.backbones.layers import ConvNorm, Norm, normalisation, stem

IN_PLACE = partial(nn.ReLU, inplace=True)
"""For what a convolution or normalisation has just made and nobody else reads."""


# Blocks


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)), equations 1 and 2 of the paper of 2015."""

    expansion: ClassVar[int] = 1
    """Channels of the block's map for each one of its 3x3 convolution."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', h, w)."""
        total: Tensor = self.branch(maps) + self.shortcut(maps)
        return total.relu_()


class Basic(Residual):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, width: int, stride: int = 1, norm: Norm = "group") -> None:
        """Args:
        width: channels within and of the map that comes out.
        stride: of the first convolution and of the shortcut.
        """
        last = silent(ConvNorm(width, width, norm=norm, activation=None))
        branch = nn.Sequential(ConvNorm(inputs, width, stride=stride, norm=norm, activation=IN_PLACE), last)
        super().__init__(branch, projection(inputs, width, stride, norm))


class Bottleneck(Residual):
    """1x1 down to `width` channels, 3x3, 1x1 up to four times as many."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1, norm: Norm = "group") -> None:
        """Args:
        width: channels of the 3x3 convolution.
        stride: of the 3x3 convolution; the paper's is at the first 1x1, which throws three places of four away unseen.
        """
        outputs = self.expansion * width
        branch = nn.Sequential(
            ConvNorm(inputs, width, 1, norm=norm, activation=IN_PLACE),
            ConvNorm(width, width, 3, stride, norm=norm, activation=IN_PLACE),
            silent(ConvNorm(width, outputs, 1, norm=norm, activation=None)),
        )
        super().__init__(branch, projection(inputs, outputs, stride, norm))


class PreActivation(nn.Module):
    """Normalisation and ReLU come before each of two 3x3 convolutions; the sum stays as it is (figure 4e of the paper of 2016)."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, width: int, stride: int = 1, norm: Norm = "group") -> None:
        """Args:
        width: channels of the map that comes out.
        stride: of the first convolution and of the shortcut.
        """
        super().__init__()
        self.activation = nn.Sequential(normalisation(norm, inputs), nn.ReLU())  # not in place: without a norm it would alter x
        self.branch = nn.Sequential(
            ConvNorm(inputs, width, stride=stride, norm=norm, activation=IN_PLACE),
            silent(ConvNorm(width, width, norm="none", activation=None)),
        )
        self.projection = None if same_shape(inputs, width, stride) else ConvNorm(inputs, width, 1, stride, norm="none", activation=None)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', h, w); a projection sees the activated map, as the branch does."""
        active = self.activation(maps)
        total: Tensor = self.branch(active) + (maps if self.projection is None else self.projection(active))
        return total


Block = type[Basic] | type[Bottleneck] | type[PreActivation]


def same_shape(inputs: int, outputs: int, stride: int) -> bool:
    """Whether what comes out of a block can be added to what went in."""
    return inputs == outputs and stride == 1


def projection(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    """The shortcut: the identity or, where the shape changes, a 1x1 convolution (option B of the paper of 2015)."""
    return nn.Identity() if same_shape(inputs, outputs, stride) else ConvNorm(inputs, outputs, 1, stride, norm=norm, activation=None)


def silent(layer: ConvNorm) -> ConvNorm:
    """The same layer, giving zero at first: by the gain of its normalisation, or by its kernel where it has none."""
    last = layer[0] if isinstance(layer[1], nn.Identity) else layer[1]
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return layer


# Networks


class ResNet(Staged):
    """A stem and stages of residual blocks; every stage but the first halves the size in its first block."""

    paper = "He et al. 2015, Deep residual learning for image recognition, arXiv:1512.03385"
    year = 2015

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        block: Block = Basic,
        widths: Sequence[int] = (16, 32, 64),
        depths: Sequence[int] = (1, 2, 2),
        norm: Norm = "group",
    ) -> None:
        """Args:
        widths: channels of the 3x3 convolutions of each stage; its map has `block.expansion` times as many.
        depths: blocks of each stage.
        """
        first, *rest = residual_stages(block, widths, depths, norm)
        first.insert(0, stem(in_channels, widths[0], image_size, norm, IN_PLACE))
        super().__init__([nn.Sequential(*blocks) for blocks in (first, *rest)], [width * block.expansion for width in widths])


class PreActResNet(Staged):
    """The same of pre-activation blocks: its stem is a bare convolution, and a last normalisation and ReLU end the last stage."""

    paper = "He et al. 2016, Identity mappings in deep residual networks, arXiv:1603.05027"
    year = 2016

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        widths: Sequence[int] = (16, 32, 64),
        depths: Sequence[int] = (1, 2, 2),
        norm: Norm = "group",
    ) -> None:
        """Args:
        widths: channels of each stage.
        depths: blocks of each stage.
        """
        stages = residual_stages(PreActivation, widths, depths, norm)
        stages[0].insert(0, stem(in_channels, widths[0], image_size, "none", None))
        stages[-1] += [normalisation(norm, widths[-1]), nn.ReLU()]
        super().__init__([nn.Sequential(*blocks) for blocks in stages], widths)


def residual_stages(block: Block, widths: Sequence[int], depths: Sequence[int], norm: Norm) -> list[list[nn.Module]]:
    """The blocks of each stage; the first one is given maps of `widths[0]` channels."""
    stages: list[list[nn.Module]] = []
    inputs = widths[0]
    for width, depth in zip(widths, depths, strict=True):
        stages.append([])
        for index in range(depth):
            stages[-1].append(block(inputs, width, 2 if len(stages) > 1 and index == 0 else 1, norm))
            inputs = width * block.expansion
    return stages


def resnet_small(in_channels: int, image_size: int, norm: Norm = "group") -> ResNet:
    """Five basic blocks.

    170 thousand weights and 17 M multiply-adds for 28x28 grey pixels; 173 thousand and 19 M for 84x84 with 4 frames.
    """
    return ResNet(in_channels, image_size, Basic, norm=norm)


def resnet_bottleneck(in_channels: int, image_size: int, norm: Norm = "group") -> ResNet:
    """Five bottleneck blocks.

    213 thousand weights and 22 M multiply-adds for 28x28 grey pixels; 216 thousand and 25 M for 84x84 with 4 frames.
    """
    return ResNet(in_channels, image_size, Bottleneck, norm=norm)


def resnet_preact(in_channels: int, image_size: int, norm: Norm = "group") -> PreActResNet:
    """Five pre-activation blocks; as many weights and multiply-adds as in `resnet_small`, within a thousandth."""
    return PreActResNet(in_channels, image_size, norm=norm)
