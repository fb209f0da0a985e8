"""Additive attention (Bahdanau et al. 2015, "Neural machine translation by jointly learning to align and translate",
arXiv:1409.0473): a small network with one hidden layer says how well a key fits a query.

score(q, k) = v^T tanh(W q + U k)        weights = softmax over the keys        what is seen = weights V
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lab.attention import Attention
from lab.attention.masks import masked_softmax


class Scored(Attention):
    """Attention by any score of a query and a key: the frame that Bahdanau's and Luong's scores share."""

    @abstractmethod
    def score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """How well each key fits each query, (N, L, S), any numbers."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What the queries see, (N, L, width of the values).

        Args:
            queries: (N, L, width of queries).
            keys: (N, S, width of keys).
            values: (N, S, any width); without them, the keys.
            mask: bool, broadcast to (N, L, S): True where a query may look. A query that may look nowhere sees zeros.
        """
        values = keys if values is None else values
        return self.weights(queries, keys, values, mask).to(values.dtype) @ values

    def weights(self, queries: Tensor, keys: Tensor, values: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """How much each query looks at each key, (N, L, S)."""
        return masked_softmax(self.score(queries, keys), mask)


def additive_scores(queries: Tensor, keys: Tensor, vector: nn.Linear) -> Tensor:
    """v^T tanh(q + k) for every query (N, L, hidden) and every key (N, S, hidden), already projected: (N, L, S)."""
    scores: Tensor = vector(torch.tanh(queries.unsqueeze(2) + keys.unsqueeze(1)))
    return scores.squeeze(-1)


class Additive(Scored):
    """Bahdanau's score (appendix A.1.2); its weights begin as those of any linear layer, not near zero as in the paper."""

    def __init__(self, query_width: int, key_width: int, hidden: int) -> None:
        """Args:
        query_width: numbers in a query.
        key_width: numbers in a key.
        hidden: units of the small network.
        """
        super().__init__()
        self.query = nn.Linear(query_width, hidden, bias=False)
        self.key = nn.Linear(key_width, hidden, bias=False)
        self.vector = nn.Linear(hidden, 1, bias=False)

    def score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """v^T tanh(W q + U k), (N, L, S)."""
        return additive_scores(self.query(queries), self.key(keys), self.vector)
