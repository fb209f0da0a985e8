"""Swin (Liu et al. 2021, "Swin Transformer: hierarchical vision transformer using shifted windows", arXiv:2103.14030): a
transformer with the maps of a CNN, since each patch looks only around itself and patches are merged on the way.

patches -> 14x14: blocks with windows of 7x7, every second one shifted by 3 -> merged by fours -> 7x7: blocks with one window
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lab.attention.windows import WindowAttention, cut
from lab.backbones.backbone import Staged

GRID = 14
"""Patches on a side of the image, whatever its size."""
WINDOW = 7
"""As in the paper."""
HEAD_WIDTH = 16
"""Channels of an attention head; 32 in the paper, whose networks are three times as wide and more."""


class Patches(nn.Module):
    """Images (N, C, H, W) to patches (N, 14, 14, width): square ones that do not overlap, each by one linear layer."""

    def __init__(self, in_channels: int, image_size: int, width: int) -> None:
        super().__init__()
        side = -(-image_size // GRID)
        self.frame = side * GRID - image_size
        self.project = nn.Conv2d(in_channels, width, side, side)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Patches (N, 14, 14, width); what is missing at the right and at the bottom is black."""
        patches: Tensor = self.norm(self.project(F.pad(images, (0, self.frame, 0, self.frame))).permute(0, 2, 3, 1))
        return patches


class Merging(nn.Module):
    """A map (N, C, H, W) to patches (N, H/2, W/2, 2 C): every 2x2 become one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Patches (N, H/2, W/2, 2 C)."""
        fours = cut(maps.permute(0, 2, 3, 1), 2).flatten(2)
        merged: Tensor = self.reduce(self.norm(fours)).unflatten(1, (maps.shape[2] // 2, maps.shape[3] // 2))
        return merged


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on maps (N, H, W, C); equation 3."""

    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, WINDOW, shift)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, maps: Tensor) -> Tensor:
        """A map of the same size."""
        maps = maps + self.attention(self.attention_norm(maps))
        changed: Tensor = maps + self.mlp(self.mlp_norm(maps))
        return changed


class ChannelsFirst(nn.Module):
    """(N, H, W, C) to (N, C, H, W)."""

    def forward(self, maps: Tensor) -> Tensor:
        """The same numbers; none is moved."""
        return maps.permute(0, 3, 1, 2)


class Swin(Staged):
    """Two stages of Swin blocks, on 14x14 patches and on 7x7; 240 thousand weights, 18 million multiply-adds an image.

    The paper has four stages and drops whole blocks at random while it trains (stochastic depth); this one does not.
    """

    paper = "Liu et al. 2021, Swin Transformer: hierarchical vision transformer using shifted windows, arXiv:2103.14030"
    year = 2021

    def __init__(self, in_channels: int, image_size: int, width: int = 32, depths: Sequence[int] = (2, 4)) -> None:
        """Args:
        in_channels: of the images.
        image_size: their pixels on a side; a patch has a fourteenth of them, rounded up.
        width: channels of the first stage; twice as many in the second one.
        depths: blocks of each stage.
        """
        shifts = [WINDOW // 2 if block % 2 else 0 for block in range(depths[0])]
        fine = [SwinBlock(width, width // HEAD_WIDTH, shift) for shift in shifts]
        coarse = [SwinBlock(2 * width, 2 * width // HEAD_WIDTH, 0) for _ in range(depths[1])]  # its window is the whole map
        stages = [
            nn.Sequential(Patches(in_channels, image_size, width), *fine, ChannelsFirst()),
            nn.Sequential(Merging(width), *coarse, nn.LayerNorm(2 * width), ChannelsFirst()),
        ]
        super().__init__(stages, (width, 2 * width))
        self.apply(begin)


def begin(module: nn.Module) -> None:
    """Small weights and no biases in every linear layer, as in the authors' code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
