"""Layers whose weights are noisy, so that an agent explores by being of another mind each time (Fortunato et al. 2018, arXiv:1706.10295).

    y = (mu + sigma * e) x + b + sigma_b * f(e_out)        e = f(e_out) f(e_in)^T,  f(x) = sign(x) sqrt |x|

mu and sigma are learnt; where noise does not help, sigma falls. The noise is factorised (section 3, variant b): two vectors a layer of
standard normal numbers, whose outer product is the noise of the weights. So

    y = mu x + b + f(e_out) * (sigma (f(e_in) * x) + sigma_b)

which never builds a matrix of noise, and lets every row of a batch have noise of its own.

Without noise a layer computes with the means of its weights: that is how an agent is judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class NoisyLinear(nn.Module):
    """A linear layer with noise of size `sigma`, sigma_0 of the paper: at first sigma / sqrt(inputs) for every weight and bias."""

    def __init__(self, inputs: int, outputs: int, sigma: float) -> None:
        super().__init__()
        self.mean = nn.Linear(inputs, outputs)
        self.spread = nn.Linear(inputs, outputs)
        bound = inputs**-0.5
        for tensor in self.mean.parameters():
            nn.init.uniform_(tensor, -bound, bound)
        for tensor in self.spread.parameters():
            nn.init.constant_(tensor, sigma * bound)
        self.noise: tuple[Tensor, Tensor] | None = None
        """f of the noise of inputs (N or 1, inputs) and of outputs (N or 1, outputs); it is drawn, never saved."""

    def draw(self, generator: torch.Generator, rows: int, own: slice) -> None:
        """Draw the noise of `rows` rows and keep that of `own`."""
        sizes = self.mean.in_features, self.mean.out_features
        inner, outer = (scaled(torch.randn(rows, size, generator=generator, device=generator.device)[own]) for size in sizes)
        self.noise = inner, outer

    def forward(self, features: Tensor) -> Tensor:
        """(N, outputs) of (N, inputs)."""
        means: Tensor = self.mean(features)
        if self.noise is None:
            return means
        inner, outer = self.noise
        spread: Tensor = self.spread(features * inner)
        return means + outer * spread


def scaled(noise: Tensor) -> Tensor:
    """f(x) = sign(x) sqrt |x|."""
    return noise.sign() * noise.abs().sqrt()


@contextlib.contextmanager
def noise(network: nn.Module, generator: torch.Generator, rows: int = 1, own: slice = slice(None)) -> Iterator[None]:
    """Within, the noisy layers of a network compute with noise; nothing happens where it has none.

    Args:
        generator: on the network's device.
        rows: 1 for the same noise in every row of a batch, else that many rows of noise, one for each of the batch's.
        own: which of these rows the batch has.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, NoisyLinear)]
    for layer in layers:
        layer.draw(generator, rows, own)
    try:
        yield
    finally:
        for layer in layers:
            layer.noise = None
