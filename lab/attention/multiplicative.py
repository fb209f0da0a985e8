"""Multiplicative attention (Luong et al. 2015, "Effective approaches to attention-based neural machine translation",
arXiv:1508.04025, section 3.1): products instead of Bahdanau's small network.

dot      score(q, k) = q^T k
general  score(q, k) = q^T W k
concat   score(q, k) = v^T tanh(W [q; k]), which is Bahdanau's with W and U side by side in one matrix
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lab.attention.additive import Scored, additive_scores


class Dot(Scored):
    """q^T k, for queries and keys of one width; nothing to learn. Divided by the root of the width it is Vaswani's."""

    def score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """q^T k, (N, L, S)."""
        return queries @ keys.mT


class General(Scored):
    """q^T W k, for queries and keys of any widths."""

    def __init__(self, query_width: int, key_width: int) -> None:
        super().__init__()
        self.key = nn.Linear(key_width, query_width, bias=False)

    def score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """q^T W k, (N, L, S)."""
        projected: Tensor = self.key(keys)
        return queries @ projected.mT


class Concat(Scored):
    """v^T tanh(W [q; k]), for queries and keys of any widths."""

    def __init__(self, query_width: int, key_width: int, hidden: int) -> None:
        super().__init__()
        self.widths = (query_width, key_width)
        self.pair = nn.Linear(query_width + key_width, hidden, bias=False)
        self.vector = nn.Linear(hidden, 1, bias=False)

    def score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """v^T tanh(W [q; k]), (N, L, S); W [q; k] is a sum, so the pairs need not be written down."""
        for_queries, for_keys = self.pair.weight.split(self.widths, 1)
        return additive_scores(F.linear(queries, for_queries), F.linear(keys, for_keys), self.vector)
