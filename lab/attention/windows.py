"""Attention inside windows of a map (Liu et al. 2021, "Swin Transformer: hierarchical vision transformer using shifted windows",
arXiv:2103.14030, section 3.2): its price grows with the pixels, not with their square.

softmax(Q K^T / sqrt(d) + B) V        B: learned, for each head and each offset between two pixels of a window

Every second layer moves the windows by a part of their side, so that what was divided meets. To have windows of one size, the map
is rolled instead, which brings together pixels of opposite borders: a mask keeps these apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lab.attention import Attention


def cut(maps: Tensor, window: int) -> Tensor:
    """Maps (N, H, W, C) as windows (N, windows, pixels, C), row by row.

    Raises:
        ValueError: height or width are no multiples of the window.
    """
    count, height, width, channels = maps.shape
    if height % window or width % window:
        raise ValueError(f"a map of {height}x{width} has no whole number of windows of {window}x{window}")
    rows, columns = height // window, width // window
    grid = maps.view(count, rows, window, columns, window, channels)
    return grid.transpose(2, 3).reshape(count, rows * columns, window * window, channels)


def join(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Windows (N, windows, pixels, C) as maps (N, H, W, C)."""
    count, channels = len(windows), windows.shape[-1]
    grid = windows.view(count, height // window, width // window, window, window, channels)
    return grid.transpose(2, 3).reshape(count, height, width, channels)


def offsets(window: int) -> Tensor:
    """A number for the offset between any two pixels of a window, (pixels, pixels): equal offsets have equal numbers."""
    place = torch.arange(window)
    apart = place.unsqueeze(1) - place + window - 1  # (window, window), from 0 on
    both = apart[:, None, :, None] * (2 * window - 1) + apart[None, :, None, :]  # (y, x, y', x')
    return both.reshape(window**2, window**2)


def together(height: int, width: int, window: int, shift: int, device: torch.device | None = None) -> Tensor:
    """Which pixels of a window of the rolled map are not parted by the map's border, bool (windows, pixels, pixels)."""
    bottom = torch.arange(height, device=device) >= height - shift  # came from the top
    right = torch.arange(width, device=device) >= width - shift
    part = cut((2 * bottom.unsqueeze(1) + right)[None, :, :, None], window)[0, :, :, 0]
    return part.unsqueeze(2) == part.unsqueeze(1)


class WindowAttention(Attention):
    """Multi-head attention inside windows that may be shifted, with a relative position bias."""

    offsets: Tensor

    def __init__(self, width: int, heads: int, window: int = 7, shift: int = 0) -> None:
        """Args:
        width: channels of the maps; a multiple of `heads`.
        heads: attentions side by side.
        window: pixels on a side.
        shift: pixels that the windows are moved to the right and down; less than a window.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of heads {heads}")
        if not 0 <= shift < window:
            raise ValueError(f"shift must be from 0 to {window - 1}, less than the window, not {shift}")
        self.heads, self.window, self.shift = heads, window, shift
        self.inputs = nn.Linear(width, 3 * width)
        self.bias = nn.Parameter(torch.empty(heads, (2 * window - 1) ** 2))
        self.output = nn.Linear(width, width)
        self.register_buffer("offsets", offsets(window), persistent=False)
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, maps: Tensor) -> Tensor:
        """What the pixels see, (N, H, W, C), for maps (N, H, W, C) whose sides are multiples of the window."""
        height, width = maps.shape[1:3]
        query, key, value = self._split(maps)
        seen = self._weigh(query, key, height, width).to(value.dtype) @ value
        looked = join(self.output(seen.transpose(2, 3).flatten(3)), self.window, height, width)
        return looked.roll((self.shift, self.shift), (1, 2)) if self.shift else looked

    def weights(self, maps: Tensor) -> Tensor:
        """How much each pixel of a window looks at each, (N * windows, heads, pixels, pixels), window by window of image by image."""
        query, key, _ = self._split(maps)
        return self._weigh(query, key, *maps.shape[1:3]).flatten(0, 1)

    def _split(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (N, windows, heads, pixels, width / heads) each."""
        rolled = maps.roll((-self.shift, -self.shift), (1, 2)) if self.shift else maps
        parts = self.inputs(cut(rolled, self.window)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(3, 0, 1, 4, 2, 5).unbind()
        return query, key, value

    def _weigh(self, query: Tensor, key: Tensor, height: int, width: int) -> Tensor:
        bias = self.bias[:, self.offsets]
        if self.shift:
            seen = together(height, width, self.window, self.shift, query.device)
            bias = bias.masked_fill(~seen.unsqueeze(1), -math.inf)  # each pixel sees itself, so no row is empty
        return (query @ key.mT / math.sqrt(query.shape[-1]) + bias).softmax(-1)
