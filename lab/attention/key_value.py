"""Key-value and key-value-predict attention (Daniluk et al. 2017, "Frustratingly short attention spans in neural language
modeling", arXiv:1702.04521, sections 2.2 and 2.3): no number serves two purposes, so each state has a part for each purpose.

    [k; v; p] = h                       key, value and prediction are parts of the state h of, say, an LSTM
    a = softmax(w^T tanh(W k_i + U k))  over the keys k_i of the `window` states before
    r = sum of a_i v_i
    h* = tanh(R r + X p)                in key-value attention p is v

The scores are Bahdanau's, of a key instead of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lab.attention import Attention
from lab.attention.additive import additive_scores
from lab.attention.masks import masked_softmax


def earlier(length: int, window: int, device: torch.device | None = None) -> Tensor:
    """Each state may look at the `window` ones before it, not at itself, bool (length, length)."""
    back = torch.ones(length, length, dtype=torch.bool, device=device)
    return back.tril(-1) & back.triu(-window)


class KeyValue(Attention):
    """States (N, L, width) to states (N, L, width / parts) that have seen some of those before."""

    def __init__(self, width: int, window: int = 5, *, predict: bool = True) -> None:
        """Args:
        width: of a state; a multiple of its parts.
        window: states before it that each one sees; the paper found five to be what its models use.
        predict: three parts, key, value and prediction; or only the first two.
        """
        super().__init__()
        self.parts, self.window = 3 if predict else 2, window
        if width % self.parts:
            raise ValueError(f"width {width} is no multiple of the {self.parts} parts of a state")
        size = width // self.parts
        self.key = nn.Linear(size, size, bias=False)
        self.query = nn.Linear(size, size, bias=False)
        self.vector = nn.Linear(size, 1, bias=False)
        self.seen = nn.Linear(size, size, bias=False)
        self.own = nn.Linear(size, size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """tanh(R r + X p), (N, L, width / parts); the first state, with none before it, has r = 0."""
        _, value, *predict = states.chunk(self.parts, -1)
        seen = self.weights(states).to(value.dtype) @ value
        return torch.tanh(self.seen(seen) + self.own(predict[0] if predict else value))

    def weights(self, states: Tensor) -> Tensor:
        """How much each state looks at each earlier one, (N, L, L); the first row is all 0."""
        key = states.chunk(self.parts, -1)[0]
        return masked_softmax(additive_scores(self.query(key), self.key(key), self.vector), earlier(key.shape[1], self.window, key.device))
