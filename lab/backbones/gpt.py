"""GPT (Radford et al. 2018 and 2019): a Transformer that reads a sequence from left to right and tells the next token.

    p(x) = p(x_1) p(x_2 | x_1) p(x_3 | x_1, x_2) ...

Each factor is a softmax over the vocabulary, computed from the tokens before; a causal mask lets one pass compute all of
them. Keys and values of what was read are kept, so that writing one more token costs one query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.attention.multihead import Cache
from lab.attention.positions import Learned, Rotary
from lab.backbones.backbone import LastPlace
from lab.backbones.transformer import Encoder, EncoderLayer, PatchBackbone, Patches, normal_weights


def gpt_layers(width: int, layers: int, heads: int, dropout: float, rotary: bool) -> Encoder:
    """Pre-norm causal layers with GELU (the exact one; GPT-2's is an approximation with tanh)."""
    rotation = Rotary() if rotary else None
    stack = [
        EncoderLayer(width, heads, norm_first=True, activation="gelu", dropout=dropout, causal=True, rotation=rotation)
        for _ in range(layers)
    ]
    return Encoder(stack)


def initialise(model: nn.Module) -> None:
    """As in GPT-2: standard deviation 0.02, and 0.02 / sqrt(2 n) for what joins the residual stream at 2 points in each of n layers."""
    normal_weights(model)
    layers = [module for module in model.modules() if isinstance(module, EncoderLayer)]
    for layer in layers:
        for product in (layer.attention.output, layer.feed.last):
            nn.init.normal_(product.weight, std=0.02 / math.sqrt(2 * len(layers)))


class GPT(nn.Module):
    """A language model over tokens 0 .. vocabulary - 1; the matrix that embeds them also gives the logits."""

    def __init__(
        self,
        vocabulary: int,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        context: int = 64,
        positions: Literal["learned", "rotary"] = "learned",
        dropout: float = 0.0,
    ) -> None:
        """Args:
        vocabulary: how many different tokens there are.
        context: the most tokens of a sequence.
        positions: a learned vector for each place (the paper's), or rotary (Su et al. 2021), which knows distances only.
        dropout: share of embeddings, attention weights and layers' outputs set to zero while training.
        """
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = Learned(context, width) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.encoder = gpt_layers(width, layers, heads, dropout, positions == "rotary")
        initialise(self)

    def forward(self, tokens: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Logits of the token after each of these, (N, L) to (N, L, vocabulary).

        Args:
            tokens: int64 (N, L).
            caches: one a layer, of the tokens before these; they take these in.

        Raises:
            ValueError: there are more tokens than the context has places.
        """
        start = len(caches[0]) if caches else 0
        if start + tokens.shape[1] > self.context:
            raise ValueError(f"a sequence of {start + tokens.shape[1]} tokens is longer than the context of {self.context}")
        embedded = self.embedding(tokens)
        embedded = self.positions(embedded, start) if self.positions else embedded
        return F.linear(self.encoder(self.dropout(embedded), caches=caches), self.embedding.weight)

    def caches(self) -> list[Cache]:
        """Empty caches, one for each layer."""
        return [Cache() for _ in self.encoder.layers]

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Go on writing: the next `count` tokens, int64 (N, count).

        Args:
            tokens: what is there already, at least one token (one that tells the class, say), int64 (N, L).
            temperature: logits are divided by it; 0 takes the likeliest token.
            top_k: only so many of the likeliest tokens are drawn from; without it, all.
            generator: of the draws, one number for each token.
        """
        caches, written = self.caches(), [tokens]
        for _ in range(count):
            logits = self(written[-1], caches)[:, -1].float()
            uniform = torch.rand(len(tokens), generator=generator, device=generator.device if generator else None)
            written.append(choose(logits, uniform.to(logits.device), temperature, top_k)[:, None])
        return torch.cat(written[1:], 1)


def choose(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """The tokens (N,) that numbers uniform in [0, 1), (N,), draw from softmax(logits / temperature), (N, vocabulary).

    It is the token whose stretch of the summed-up probabilities holds the number: one draw, the same on every device.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    summed = (logits.double() / temperature).softmax(-1).cumsum(-1)  # in fp32 the sum could end below the number
    return (summed <= uniform[:, None].double() * summed[:, -1:]).sum(-1)


class GPTBackbone(PatchBackbone):
    """GPT reads the patches of an image row by row; what it knows at the last one is the vector.

    Chen et al. 2020, "Generative pretraining from pixels", did so with pixels. 0.30 M weights and 16.3 M multiply-adds at 28
    pixels; 0.34 M and 18.1 M at 84 with 4 frames.
    """

    paper = "Radford et al. 2019, Language models are unsupervised multitask learners (GPT-2)"
    year = 2019

    def __init__(self, in_channels: int, image_size: int, width: int = 64, layers: int = 6, heads: int = 4, dropout: float = 0.0) -> None:
        patches = Patches(in_channels, image_size, width)
        super().__init__(patches, Learned(patches.count, width), gpt_layers(width, layers, heads, dropout, False), LastPlace())
        initialise(self)
