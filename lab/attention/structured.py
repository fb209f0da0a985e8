"""Structured self-attention (Lin et al. 2017, "A structured self-attentive sentence embedding", arXiv:1703.03130): a sequence of
any length becomes a matrix with a few rows, each of which is a mean of the states that looks for another thing.

A = softmax(W2 tanh(W1 H^T))        M = A H        penalty = ||A A^T - 1||_F^2
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lab.attention import Attention
from lab.attention.masks import masked_softmax


class Structured(Attention):
    """States (N, S, width) to an embedding (N, hops, width); the queries are learned, one for each hop."""

    def __init__(self, width: int, hidden: int, hops: int) -> None:
        """Args:
        width: of a state.
        hidden: units of the network that scores the states.
        hops: rows of the embedding.
        """
        super().__init__()
        self.hidden = nn.Linear(width, hidden, bias=False)
        self.hops = nn.Linear(hidden, hops, bias=False)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """M = A H, equation 7.

        Args:
            states: (N, S, width).
            mask: bool (N, S), True for the states that are no padding.
        """
        return self.weights(states, mask).to(states.dtype) @ states

    def weights(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """A = softmax(W2 tanh(W1 H^T)), (N, hops, S), equation 6."""
        scores: Tensor = self.hops(torch.tanh(self.hidden(states)))
        return masked_softmax(scores.mT, None if mask is None else mask.unsqueeze(1))


def penalty(weights: Tensor) -> Tensor:
    """||A A^T - 1||_F^2 of weights (N, hops, S), (N,), equation 8: 0 when each hop looks at one state, which no other looks at."""
    return (weights @ weights.mT - torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)).square().sum((1, 2))
