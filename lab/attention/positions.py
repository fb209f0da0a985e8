"""Positional encodings: attention sees a set, these tell it an order (Vaswani et al. 2017, Su et al. 2021, arXiv:2104.09864).

sinusoidal   PE(p, 2i) = sin(p / 10000^(2i/width)), PE(p, 2i+1) = cos(p / 10000^(2i/width))       added to the tokens
learned      a table of weights, a row for each place                                               added to the tokens
rotary       pairs of numbers of queries and keys turned by the angle p / 10000^(2i/d)              q . k knows p_q - p_k only
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BASE = 10_000.0
"""The longest wave is nearly so many times longer than the shortest one, which is 2 pi places long."""


def angles(positions: Tensor, count: int) -> Tensor:
    """p / 10000^(i/count) for i below count: (L,) to (L, count), in float32 or better."""
    places = positions.to(torch.promote_types(positions.dtype, torch.float32))
    powers = torch.arange(count, device=places.device, dtype=places.dtype) / count
    return places[:, None] * BASE**-powers


def embed_times(times: Tensor, width: int) -> Tensor:
    """The sinusoidal encoding of places that need not be whole numbers, (N,) to (N, width).

    So diffusion models read a time or a noise level (Ho et al. 2020, arXiv:2006.11239); the waves suit times from 0 to about
    1000, and times from 0 to 1 must be scaled to that before.

    Raises:
        ValueError: the width is odd.
    """
    if width % 2:
        raise ValueError(f"sinusoidal encodings have pairs of a sine and a cosine, and width {width} is odd")
    turned = angles(times, width // 2)
    return torch.stack([turned.sin(), turned.cos()], -1).flatten(-2)


def sinusoidal(length: int, width: int, start: int = 0, device: torch.device | None = None) -> Tensor:
    """The encodings of `length` places from place `start` on, (length, width) (Vaswani et al. 2017, section 3.5)."""
    return embed_times(torch.arange(start, start + length, device=device), width)


def sinusoidal_2d(height: int, width: int, channels: int) -> Tensor:
    """The encodings of a map's places, (height, width, channels): half of the channels tell the row, the others the column.

    Raises:
        ValueError: the channels are no multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"rows and columns need pairs of a sine and a cosine, and {channels} channels are no multiple of 4")
    rows, columns = sinusoidal(height, channels // 2), sinusoidal(width, channels // 2)
    return torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], -1)


class Sinusoidal(nn.Module):
    """Adds to each token the encoding of its place in a sequence of any length."""

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens (N, L, width), the first of which stands at place `start`."""
        length, width = tokens.shape[-2:]
        return tokens + sinusoidal(length, width, start, tokens.device)


class Sinusoidal2d(nn.Module):
    """Adds to each place of a map, given row by row as tokens, the encoding of its row and column."""

    table: Tensor

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoidal_2d(height, width, channels).flatten(0, 1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, height * width, channels)."""
        return tokens + self.table


class Learned(nn.Module):
    """Adds to each token a vector of weights for its place, which begin normal with standard deviation 0.02 as in GPT and BERT."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens (N, L, width), the first of which stands at place `start`.

        Raises:
            ValueError: the tokens go on past the last place that there is.
        """
        end = start + tokens.shape[-2]
        if end > len(self.table):
            raise ValueError(f"a sequence of {end} tokens is longer than the {len(self.table)} places that were learned")
        return tokens + self.table[start:end]


class Rotary(nn.Module):
    """Turns each pair of numbers of a query or key in its plane (Su et al. 2021, equations 14, 15 and 34), for `MultiHead(rotation=...)`.

    The product of a query at place m and a key at place n then depends on them and on m - n only. Nothing is learned.
    """

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Queries or keys (N, heads, L, d), d even, the first of which stands at place `start`; same shape and format."""
        length, width = x.shape[-2:]
        turned = angles(torch.arange(start, start + length, device=x.device), width // 2)
        cos, sin = turned.cos(), turned.sin()
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).to(x.dtype)
