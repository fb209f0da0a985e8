"""Multi-head attention (Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762): self, cross, causal, and with a cache.

attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.attention import Attention
from lab.attention.masks import masked_softmax

Rotation = Callable[[Tensor, int], Tensor]
"""Turns queries or keys (N, heads, L, d), the first of which stands at the given position."""


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Values (..., L, d) for queries (..., L, d), keys (..., S, d) and values (..., S, d); by torch's fused kernel where that is faster.

    Args:
        mask: bool, broadcast to (..., L, S): True where a query may look. A query that may look nowhere has no value.
    """
    # On a CPU in bf16 the fused kernel takes six to ten times as long for short sequences, backwards; from some 300 keys on it is ahead.
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[-2] <= 256 and not dropout:
        return scaled_dot_product_weights(query, key, mask).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, mask, dropout)


def scaled_dot_product_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)), (..., L, S): what the fused kernel never writes down."""
    return masked_softmax((query @ key.mT).float() / math.sqrt(query.shape[-1]), mask)


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Nobody sees the future, bool (queries, keys): the last query stands at the last key, each sees what is not after it."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class Cache:
    """The keys and values of a sequence so far, so that one more token costs one query."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and all values, (N, heads, S, d), with the new ones at the end."""
        if self.keys is None or self.values is None:
            return keys, values
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `extended`, and remember them."""
        self.keys, self.values = self.extended(keys, values)
        return self.keys, self.values


class MultiHead(Attention):
    """Several attentions side by side, each in a slice of the width; the same function as `nn.MultiheadAttention(batch_first=True)`."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, dropout: float = 0.0, rotation: Rotation | None = None) -> None:
        """Args:
        width: of queries, keys and values; a multiple of `heads`.
        causal: whether a query may look only at what is not after it.
        dropout: share of the weights set to zero while training.
        rotation: rotary position encoding of queries and keys (Su et al. 2021), see `lab.attention.positions`.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of heads {heads}")
        self.width, self.heads, self.causal, self.dropout, self.rotation = width, heads, causal, dropout, rotation
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.inputs.weight)  # as torch's does
        nn.init.zeros_(self.inputs.bias)
        nn.init.zeros_(self.output.bias)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the queries see, (N, L, width).

        Args:
            queries: (N, L, width).
            keys: (N, S, width); without them the queries look at each other.
            values: (N, S, width); without them, those of the keys.
            mask: bool, broadcast to (N, heads, L, S): True where a query may look.
            cache: keys and values of the tokens before these, which it then takes in.
        """
        query, key, value = self._split(queries, keys, values, len(cache) if cache else 0)
        if cache is not None:
            key, value = cache.extend(key, value)
        seen = scaled_dot_product(query, key, value, self._mask(query, key, mask), self.dropout if self.training else 0.0)
        looked: Tensor = self.output(seen.transpose(1, 2).flatten(2))
        return looked

    def weights(
        self,
        queries: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """How much each query looks at each key, (N, heads, L, S)."""
        query, key, value = self._split(queries, keys, values, len(cache) if cache else 0)
        if cache is not None:
            key, _ = cache.extended(key, value)
        return scaled_dot_product_weights(query, key, self._mask(query, key, mask))

    def _split(self, queries: Tensor, keys: Tensor | None, values: Tensor | None, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Projected queries, keys and values, (N, heads, length, width / heads) each."""
        if keys is None and values is None:
            parts = self.inputs(queries).chunk(3, -1)  # one product instead of three
        else:
            keys = queries if keys is None else keys
            given = (queries, keys, keys if values is None else values)
            matrices = zip(self.inputs.weight.chunk(3), self.inputs.bias.chunk(3))
            parts = tuple(F.linear(each, weight, bias) for each, (weight, bias) in zip(given, matrices))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if self.rotation:
            query, key = self.rotation(query, start), self.rotation(key, start)
        return query, key, value

    def _mask(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        if not self.causal:
            return mask
        past = causal_mask(query.shape[2], key.shape[2], query.device)
        return past if mask is None else past & mask
