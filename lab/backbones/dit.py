"""Diffusion Transformer, DiT (Peebles & Xie 2023, "Scalable diffusion models with Transformers", arXiv:2212.09748).

    adaLN-zero   x = x + g_1 attention(norm(x) (1 + s_1) + b_1)
                 x = x + g_2 feed(norm(x) (1 + s_2) + b_2)

Shifts b, scales s and gates g are a dense layer of what the model is told, the time and the class; it begins as zero, so
that every block begins as the identity and the whole model as zero. Products within the blocks begin as torch's do; the paper
draws them by Xavier's rule.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.attention.multihead import MultiHead
from lab.attention.positions import Sinusoidal2d, embed_times
from lab.backbones.backbone import Average
from lab.backbones.transformer import FeedForward, PatchBackbone, Patches, as_map, normal_weights


def modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens (N, L, width), scaled and shifted by numbers (N, 1, width)."""
    return tokens * (1 + scale) + shift


def zeros(inputs: int, outputs: int) -> nn.Linear:
    """A dense layer that begins as zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class DiTBlock(nn.Module):
    """A pre-norm Transformer layer whose normalisations and residuals are told what to do (adaLN-zero, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = zeros(width, 6 * width)
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = MultiHead(width, heads)
        self.feed_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.feed = FeedForward(width, 4 * width, "gelu")  # the paper's GELU is an approximation with tanh

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Tokens (N, L, width) to tokens, as a condition (N, width) says."""
        told = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        shift, scale, gate, feed_shift, feed_scale, feed_gate = told
        tokens = tokens + gate * self.attention(modulated(self.attention_norm(tokens), shift, scale))
        thought: Tensor = tokens + feed_gate * self.feed(modulated(self.feed_norm(tokens), feed_shift, feed_scale))
        return thought


class Condition(nn.Module):
    """What the blocks are told: a time and a class as one vector."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        normal_weights(self)

    def forward(self, times: Tensor, labels: Tensor) -> Tensor:
        """Times (N,) and labels (N,) to vectors (N, width)."""
        told: Tensor = self.time(embed_times(times, self.width)) + self.label(labels)
        return told


class DiT(nn.Module):
    """Maps of numbers for noisy images, such as the noise in them, given the time and the class."""

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        out_channels: int,
        classes: int = 0,
        width: int = 128,
        layers: int = 6,
        heads: int = 4,
        patch: int | None = None,
    ) -> None:
        """Args:
        in_channels: of the images.
        image_size: pixels a side.
        out_channels: of the maps.
        classes: how many there are; one more label stands for no class, as classifier-free guidance needs (Ho & Salimans 2022).
        patch: pixels a side of a patch; without it, so many that there are about 7x7 of them.
        """
        super().__init__()
        self.image_size = image_size
        self.patches = Patches(in_channels, image_size, width, patch)
        self.positions = Sinusoidal2d(*self.patches.grid, width)
        self.condition = Condition(classes, width)
        self.blocks = nn.ModuleList([DiTBlock(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeros(width, 2 * width)
        self.output = zeros(width, out_channels * self.patches.patch**2)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Maps (N, out_channels, image_size, image_size); zeros before any training.

        Args:
            images: numbers (N, in_channels, image_size, image_size).
            times: (N,), whole or not, from 0 to about 1000 (see `embed_times`).
            labels: int64 (N,), 0 .. classes - 1, or `classes` for none.
        """
        condition = self.condition(times, labels)
        tokens = self.positions(self.patches(images))
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        maps = unpatchify(self.output(modulated(self.norm(tokens), shift, scale)), self.patches.grid, self.patches.patch)
        return maps[:, :, : self.image_size, : self.image_size]


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Tokens (N, h w, C patch^2), the pixels of one patch each in the order (C, y, x), as images (N, C, h patch, w patch)."""
    return F.pixel_shuffle(as_map(tokens, grid), patch)


class Constant(nn.Module):
    """A learned vector (1, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(1, width))

    def forward(self) -> Tensor:
        """The vector."""
        return self.value


class DiTEncoder(nn.Module):
    """Blocks that are all told the same learned constant."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.condition = Constant(width)
        self.blocks = nn.ModuleList([DiTBlock(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L, width) to tokens."""
        for block in self.blocks:
            tokens = block(tokens, self.condition())
        normed: Tensor = self.norm(tokens)
        return normed


class DiTBackbone(PatchBackbone):
    """The blocks of DiT on images without a time or a class; the vector is the mean over all patches.

    0.45 M weights and 16.5 M multiply-adds at 28 pixels; 0.49 M and 18.3 M at 84 with 4 frames.
    """

    paper = "Peebles & Xie 2023, Scalable diffusion models with Transformers, arXiv:2212.09748"
    year = 2023

    def __init__(self, in_channels: int, image_size: int, width: int = 64, layers: int = 6, heads: int = 4) -> None:
        patches = Patches(in_channels, image_size, width)
        super().__init__(patches, Sinusoidal2d(*patches.grid, width), DiTEncoder(width, layers, heads), Average())
