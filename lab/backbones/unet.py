"""U-Net: down to a coarse map, up again, and at every size the map from the way down beside the one on the way up.

The shape is that of Ronneberger et al. 2015, "U-Net", arXiv:1505.04597. The blocks are those of diffusion models: residual, with
group normalisation and SiLU, told the time and the class (Ho et al. 2020, "Denoising diffusion probabilistic models",
arXiv:2006.11239; Dhariwal & Nichol 2021, "Diffusion models beat GANs", arXiv:2105.05233), with attention where the map is coarsest.

    block    h = conv(SiLU(GN(x)))        out = x + conv(SiLU((1 + scale) GN(h) + shift))        (scale, shift) = linear(SiLU(condition))

Unlike both, one map per size crosses over, as in the first U-Net, where the later ones send one per block; and the coarsest
stage serves as the middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.attention.multihead import MultiHead
from lab.attention.positions import embed_times
from lab.backbones.backbone import Staged, stem_stride
from lab.backbones.layers import normalisation
from lab.backbones.upsampling import ResizeConv

# Parts


def film(maps: Tensor, parameters: Tensor) -> Tensor:
    """(1 + scale) x + shift for every channel (feature-wise linear modulation, Perez et al. 2018, arXiv:1709.07871).

    Args:
        maps: (N, C, H, W).
        parameters: scales, then shifts, (N, 2 C).
    """
    scale, shift = parameters[:, :, None, None].chunk(2, 1)
    return maps * (1 + scale) + shift


def zero(layer: nn.Module) -> None:
    """Let a layer begin as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each behind normalisation and SiLU; a condition scales and shifts between them (AdaGN).

    The last one begins as zero, so that the block begins as its shortcut (Ho et al. 2020, in their code).
    """

    def __init__(self, inputs: int, outputs: int, condition: int = 0) -> None:
        """Args:
        condition: width of the vector that says more than the maps; 0: there is none.
        """
        super().__init__()
        self.normalise = normalisation("group", inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.normalise_again = normalisation("group", outputs)
        self.modulate = nn.Linear(condition, 2 * outputs) if condition else None
        self.last = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        zero(self.last)

    def forward(self, maps: Tensor, condition: Tensor | None = None) -> Tensor:
        """Maps (N, outputs, H, W) of maps (N, inputs, H, W) and conditions (N, condition)."""
        change = self.normalise_again(self.first(F.silu(self.normalise(maps))))
        if self.modulate is not None and condition is not None:
            change = film(change, self.modulate(F.silu(condition)))
        changed: Tensor = self.shortcut(maps) + self.last(F.silu(change))
        return changed


class SelfAttention(nn.Module):
    """Every place looks at every other; where it stands it knows from the black frames of the convolutions before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.normalise = normalisation("group", width)
        self.attention = MultiHead(width, heads)
        zero(self.attention.output)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of the same shape."""
        seen: Tensor = self.attention(self.normalise(maps).flatten(2).mT)
        return maps + seen.mT.reshape(maps.shape)


class Contracting(nn.Module):
    """A stage on the way down: a convolution, which may halve the size, and residual blocks; with heads, attention after each."""

    def __init__(self, enter: nn.Conv2d, width: int, blocks: int, heads: int = 0, condition: int = 0) -> None:
        super().__init__()
        self.enter = enter
        widths = [enter.out_channels, *[width] * blocks]
        self.blocks = nn.ModuleList(ResidualBlock(before, after, condition) for before, after in pairwise(widths))
        self.attentions = nn.ModuleList(SelfAttention(width, heads) if heads else nn.Identity() for _ in range(blocks))

    def forward(self, maps: Tensor, condition: Tensor | None = None) -> Tensor:
        """The coarser maps."""
        maps = self.enter(maps)
        for block, attention in zip(self.blocks, self.attentions):
            maps = attention(block(maps, condition))
        return maps


class Expanding(nn.Module):
    """A stage on the way up: twice the size, the map from the way down beside it, and residual blocks."""

    def __init__(self, inputs: int, width: int, blocks: int, condition: int = 0) -> None:
        super().__init__()
        self.enter = ResizeConv(inputs, width)
        widths = [2 * width, *[width] * blocks]
        self.blocks = nn.ModuleList(ResidualBlock(before, after, condition) for before, after in pairwise(widths))

    def forward(self, maps: Tensor, skip: Tensor, condition: Tensor | None = None) -> Tensor:
        """The finer maps, of the size of `skip`."""
        maps = torch.cat([self.enter(maps, (skip.shape[2], skip.shape[3])), skip], 1)
        for block in self.blocks:
            maps = block(maps, condition)
        return maps


def contracting_path(
    in_channels: int, widths: Sequence[int], blocks: int, heads: int, condition: int = 0, stride: int = 1
) -> list[Contracting]:
    """The way down: one stage per width, the first of which enters with `stride`, the others with 2; attention in the last."""
    enters = [nn.Conv2d(in_channels, widths[0], 2 * stride + 1, stride, stride)]
    enters += [nn.Conv2d(width, width, 3, 2, 1) for width in widths[:-1]]
    looking = [*[0] * (len(widths) - 1), heads]
    return [Contracting(enter, width, blocks, looks, condition) for enter, width, looks in zip(enters, widths, looking)]


class Condition(nn.Module):
    """Times and labels as one vector: a perceptron over the sinusoids of the time, plus a learned vector per class."""

    def __init__(self, sinusoids: int, width: int, classes: int, time: bool) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.time = nn.Sequential(nn.Linear(sinusoids, width), nn.SiLU(), nn.Linear(width, width)) if time else None
        self.label = nn.Embedding(classes + 1, width) if classes else None  # the last one: no label

    def forward(self, times: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """Vectors (N, width), or nothing where neither is expected."""
        for name, given, layer in (("times", times, self.time), ("labels", labels, self.label)):
            if (given is None) != (layer is None):
                raise ValueError(f"{name} are missing, and this U-Net needs them" if layer else f"this U-Net takes no {name}")
        parts = [self.time(embed_times(times, self.sinusoids))] if self.time is not None and times is not None else []
        parts += [self.label(labels)] if self.label is not None else []
        return sum(parts[1:], parts[0]) if parts else None


# Whole networks


def usual_widths(image_size: int) -> tuple[int, ...]:
    """32, 64 and 128 channels, and 128 from there on: halved until at most 11 pixels a side are left (28, 14, 7), but at least once."""
    levels = 1 + max(1, math.ceil(math.log2(image_size / 11)))
    return tuple(min(32 * 2**level, 128) for level in range(levels))


class UNet(nn.Module):
    """Images to images of the same size, such as noisy ones and their times to the noise in them.

    It works at full resolution, as noise differs from pixel to pixel: for 28x28 grey pixels 661 thousand weights and 120 M
    multiply-adds, with time and 10 classes 766 thousand; for 64x64 pixels 1.7 M and 800 M. Its outputs begin as zeros.
    """

    paper = "Ronneberger et al. 2015, U-Net, arXiv:1505.04597; Ho et al. 2020, Denoising diffusion probabilistic models, arXiv:2006.11239"
    year = 2015

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: int,
        *,
        widths: Sequence[int] = (),
        blocks: int = 1,
        heads: int = 4,
        classes: int = 0,
        time: bool = False,
        fold: int = 1,
    ) -> None:
        """Args:
        image_size: pixels a side that it is meant for; it takes others too.
        widths: channels at each size, from fine to coarse; by default as many as `usual_widths` says.
        blocks: residual blocks per size, on each way.
        heads: of the attention at the coarsest size; a divisor of the last width.
        classes: how many labels there are; 0: it takes none.
        time: whether it takes times.
        fold: so many pixels a side become the channels of one place before all, and places become pixels again after all; the
            finest maps, on which a U-Net spends most, are then spared. The image must be a multiple of it.
        """
        super().__init__()
        self.fold, in_channels, out_channels = fold, in_channels * fold**2, out_channels * fold**2
        widths = tuple(widths) or usual_widths(image_size // fold)
        condition = 4 * widths[0] if classes or time else 0
        self.condition = Condition(widths[0], condition, classes, time)
        self.contracting = nn.ModuleList(contracting_path(in_channels, widths, blocks, heads, condition))
        self.expanding = nn.ModuleList(Expanding(coarse, fine, blocks, condition) for coarse, fine in pairwise(widths[::-1]))
        self.normalise = normalisation("group", widths[0])
        self.last = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        zero(self.last)

    def forward(self, images: Tensor, times: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Images (N, out_channels, H, W) on an unbounded scale.

        Args:
            images: (N, in_channels, H, W), floats.
            times: (N,), on the scale of `lab.attention.positions.embed_times`.
            labels: (N,) of 0 to classes - 1, or `classes` for no label, as classifier-free guidance (Ho & Salimans 2021) needs.

        Raises:
            ValueError: times or labels are missing, or given to a network without.
        """
        condition = self.condition(times, labels)
        maps = F.pixel_unshuffle(images, self.fold)
        skips = []
        for stage in self.contracting:
            maps = stage(maps, condition)
            skips.append(maps)
        for stage, skip in zip(self.expanding, skips[-2::-1]):
            maps = stage(maps, skip, condition)
        return F.pixel_shuffle(self.last(F.silu(self.normalise(maps))), self.fold)


class UNetBackbone(Staged):
    """The way down of a U-Net as an encoder: 28, 14 and 7 places a side, with attention at the last; a vector needs no way up.

    220 thousand weights and 23 M multiply-adds for 28x28 grey pixels, 223 thousand and 26 M for 84x84 with 4 frames.
    """

    paper = UNet.paper
    year = 2015

    def __init__(self, in_channels: int, image_size: int, widths: Sequence[int] = (16, 32, 64), blocks: int = 2, heads: int = 4) -> None:
        """Args:
        widths: channels of each stage.
        blocks: residual blocks of each stage.
        heads: of the attention in the last stage; a divisor of its width.
        """
        super().__init__(contracting_path(in_channels, widths, blocks, heads, stride=stem_stride(image_size)), widths)
