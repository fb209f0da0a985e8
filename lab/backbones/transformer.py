"""The Transformer (Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762): encoder, decoder, both together, and images.

    post-norm   x = norm(x + f(x))      the paper's
    pre-norm    x = x + f(norm(x))      Baevski & Auli 2019, Xiong et al. 2020: trains without warm-up; a last norm ends the stack

where f is attention or a feed-forward network. An image is cut into patches, which are its tokens (Dosovitskiy et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.attention.multihead import Cache, MultiHead, Rotation
from lab.attention.positions import Sinusoidal
from lab.backbones.backbone import Backbone, as_numbers

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}

# Layers


class FeedForward(nn.Module):
    """Two dense layers, the same for every token (section 3.3)."""

    def __init__(self, width: int, hidden: int, activation: Literal["relu", "gelu"] = "relu") -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.last = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., width) to tokens."""
        thought: Tensor = self.last(self.activation(self.first(tokens)))
        return thought


class Sublayer(nn.Module):
    """A function of the tokens with its residual connection, its dropout and its layer normalisation, before or after it."""

    def __init__(self, width: int, dropout: float, norm_first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.norm_first = norm_first

    def forward(self, tokens: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens (N, L, width), through the function and past it."""
        if self.norm_first:
            joined: Tensor = tokens + self.dropout(function(self.norm(tokens)))
            return joined
        normed: Tensor = self.norm(tokens + self.dropout(function(tokens)))
        return normed


class EncoderLayer(nn.Module):
    """Tokens look at each other, then each one is thought over: the function of `nn.TransformerEncoderLayer(batch_first=True)`.

    Dropout is on attention weights and on what joins the residual; torch has one more in the feed-forward network.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None = None,
        *,
        norm_first: bool = False,
        activation: Literal["relu", "gelu"] = "relu",
        dropout: float = 0.0,
        causal: bool = False,
        rotation: Rotation | None = None,
    ) -> None:
        """Args:
        width: of the tokens.
        heads: of the attention.
        hidden: width within the feed-forward network; without one, 4 times the width as in the paper.
        norm_first: pre-norm instead of post-norm.
        activation: of the feed-forward network.
        dropout: share set to zero while training.
        causal: whether a token may look only at itself and at those before it, as in GPT.
        rotation: rotary positions.
        """
        super().__init__()
        self.norm_first = norm_first
        self.attention = MultiHead(width, heads, causal=causal, dropout=dropout, rotation=rotation)
        self.look = Sublayer(width, dropout, norm_first)
        self.feed = FeedForward(width, hidden or 4 * width, activation)
        self.think = Sublayer(width, dropout, norm_first)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Tokens (N, L, width) to tokens.

        Args:
            mask: bool, broadcast to (N, heads, L, S): True where a token may look.
            cache: keys and values of the tokens before these.
        """
        tokens = self.look(tokens, lambda x: self.attention(x, mask=mask, cache=cache))
        thought: Tensor = self.think(tokens, self.feed)
        return thought


class DecoderLayer(nn.Module):
    """As an encoder's layer, and in between the tokens look at a memory: the function of `nn.TransformerDecoderLayer(batch_first=True)`."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None = None,
        *,
        norm_first: bool = False,
        activation: Literal["relu", "gelu"] = "relu",
        dropout: float = 0.0,
        causal: bool = True,
    ) -> None:
        """Args: as for `EncoderLayer`; only the attention of the tokens to each other is causal."""
        super().__init__()
        self.norm_first = norm_first
        self.attention = MultiHead(width, heads, causal=causal, dropout=dropout)
        self.look = Sublayer(width, dropout, norm_first)
        self.cross = MultiHead(width, heads, dropout=dropout)
        self.read = Sublayer(width, dropout, norm_first)
        self.feed = FeedForward(width, hidden or 4 * width, activation)
        self.think = Sublayer(width, dropout, norm_first)

    def forward(
        self,
        tokens: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Tokens (N, L, width), which read a memory (N, S, width), to tokens.

        Args:
            mask: bool, broadcast to (N, heads, L, L): True where a token may look at another.
            memory_mask: bool, broadcast to (N, heads, L, S): True where a token may read the memory.
            cache: keys and values of the tokens before these.
        """
        tokens = self.look(tokens, lambda x: self.attention(x, mask=mask, cache=cache))
        tokens = self.read(tokens, lambda x: self.cross(x, memory, mask=memory_mask))
        thought: Tensor = self.think(tokens, self.feed)
        return thought


# Stacks


def last_norm(layer: EncoderLayer | DecoderLayer) -> nn.Module:
    """What ends a stack: pre-norm layers leave a sum that nobody has normalised."""
    return nn.LayerNorm(layer.attention.width) if layer.norm_first else nn.Identity()


class Encoder(nn.Module):
    """Layers one after another."""

    def __init__(self, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = last_norm(layers[-1])

    def forward(self, tokens: Tensor, mask: Tensor | None = None, caches: Sequence[Cache] | None = None) -> Tensor:
        """Tokens (N, L, width) to tokens; mask and caches (one a layer) as in `EncoderLayer`."""
        for layer, cache in zip(self.layers, caches or repeat(None)):
            tokens = layer(tokens, mask, cache)
        normed: Tensor = self.norm(tokens)
        return normed


class Decoder(nn.Module):
    """Layers one after another, all of which read the same memory."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = last_norm(layers[-1])

    def forward(
        self,
        tokens: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """Tokens (N, L, width) and memory (N, S, width) to tokens; masks and caches (one a layer) as in `DecoderLayer`."""
        for layer, cache in zip(self.layers, caches or repeat(None)):
            tokens = layer(tokens, memory, mask, memory_mask, cache)
        normed: Tensor = self.norm(tokens)
        return normed


class Transformer(nn.Module):
    """From a sequence of tokens to another one of the same vocabulary: the whole model of the paper.

    One matrix embeds the tokens of both sequences and gives the logits (section 3.4).
    """

    def __init__(self, vocabulary: int, width: int = 128, layers: int = 3, heads: int = 4, dropout: float = 0.0) -> None:
        """Args:
        vocabulary: how many different tokens there are.
        layers: of the encoder, and as many of the decoder.
        """
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # tokens are scaled back to 1, logits begin about 1
        self.positions = Sinusoidal()
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder([EncoderLayer(width, heads, dropout=dropout) for _ in range(layers)])
        self.decoder = Decoder([DecoderLayer(width, heads, dropout=dropout) for _ in range(layers)])

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Logits (N, L, vocabulary) of the token after each of the target's, all of which are given (teacher forcing).

        Args:
            source: tokens, int64 (N, S).
            target: tokens, int64 (N, L), the first of which says that the sequence begins.
            source_mask: bool (N, S), False where the source is only filled up.
        """
        return self.decode(target, self.encode(source, source_mask), source_mask)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """What is remembered of the source, (N, S, width)."""
        memory: Tensor = self.encoder(self._embed(source, 0), for_keys(source_mask))
        return memory

    def decode(self, target: Tensor, memory: Tensor, source_mask: Tensor | None = None, caches: Sequence[Cache] | None = None) -> Tensor:
        """Logits (N, L, vocabulary) after each of the target's tokens (N, L), which go on after those in the caches."""
        tokens = self._embed(target, len(caches[0]) if caches else 0)
        tokens = self.decoder(tokens, memory, memory_mask=for_keys(source_mask), caches=caches)
        return F.linear(tokens, self.embedding.weight)

    @torch.no_grad()
    def greedy(self, source: Tensor, first: int, count: int, source_mask: Tensor | None = None) -> Tensor:
        """The likeliest `count` tokens, one after another, (N, count); `first` says that the sequence begins."""
        memory = self.encode(source, source_mask)
        caches = [Cache() for _ in self.decoder.layers]
        tokens = [source.new_full((len(source), 1), first)]
        for _ in range(count):
            tokens.append(self.decode(tokens[-1], memory, source_mask, caches).argmax(-1))
        return torch.cat(tokens[1:], 1)

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        width = self.embedding.embedding_dim
        embedded: Tensor = self.dropout(self.positions(self.embedding(tokens) * width**0.5, start))
        return embedded


def for_keys(mask: Tensor | None) -> Tensor | None:
    """A mask of tokens, bool (N, S), for all heads and queries: (N, 1, 1, S)."""
    return None if mask is None else mask[:, None, None]


def normal_weights(model: nn.Module, std: float = 0.02) -> None:
    """Begin as GPT and BERT do: the weights of products and embeddings normal, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


# Images


class Patches(nn.Module):
    """Square patches of an image as tokens: a dense layer over the pixels of each, computed as a convolution that does not overlap."""

    def __init__(self, in_channels: int, image_size: int, width: int, patch: int | None = None) -> None:
        """Args:
        in_channels: of the images.
        image_size: pixels a side.
        width: of the tokens.
        patch: pixels a side; without it, so many that there are about 7x7 patches: 4 of 28 pixels, 12 of 84.
        """
        super().__init__()
        self.patch = patch or max(1, round(image_size / 7))
        side = -(-image_size // self.patch)
        self.grid = (side, side)
        self.padding = side * self.patch - image_size
        self.projection = nn.Conv2d(in_channels, width, self.patch, self.patch)
        # LeCun's, as in ViT: torch's own weights are so much smaller that the positions would drown what is seen.
        nn.init.normal_(self.projection.weight, std=(in_channels * self.patch**2) ** -0.5)

    @property
    def count(self) -> int:
        """How many patches an image has."""
        return self.grid[0] * self.grid[1]

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), bytes or numbers, to tokens (N, patches, width) row by row; black fills up at the right and below."""
        images = F.pad(images, (0, self.padding, 0, self.padding)) if self.padding else images
        maps: Tensor = self.projection(as_numbers(images))
        return tokens_of(maps)


def tokens_of(maps: Tensor) -> Tensor:
    """Maps (N, C, h, w) as tokens (N, h w, C), row by row."""
    return maps.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (N, h w, C), row by row, as a map (N, C, h, w)."""
    maps: Tensor = tokens.transpose(1, 2).unflatten(2, grid)
    return maps


class PatchBackbone(Backbone):
    """Patches with their positions through an encoder, whose tokens are the one map; the base of the Transformers that see."""

    def __init__(self, patches: Patches, positions: nn.Module, encoder: nn.Module, head: nn.Module) -> None:
        """Args:
        patches: makes tokens of images.
        positions: tells tokens (N, L, width) where they are.
        encoder: maps tokens to tokens.
        head: maps the map to a vector of the tokens' width.
        """
        super().__init__()
        self.patches, self.positions, self.encoder, self.head = patches, positions, encoder, head
        self.out_features = patches.projection.out_channels
        self.out_channels = (self.out_features,)

    def features(self, images: Tensor) -> list[Tensor]:
        """One map, a place for each patch."""
        return [as_map(self.encoder(self.positions(self.patches(images))), self.patches.grid)]

    @property
    def sequence(self) -> list[nn.Module]:
        """Each layer of the encoder is a part of its own."""
        parts = [part for child in self.encoder.children() for part in (child if isinstance(child, nn.ModuleList) else [child])]
        return [self.patches, self.positions, *parts, self.head]


class Reader(nn.Module):
    """A decoder with one learned query, which looks for what matters in a map and makes a vector of it, (N, C, h, w) to (N, C)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        width = cast(DecoderLayer, decoder.layers[0]).attention.width
        self.query = nn.Parameter(torch.randn(1, 1, width))
        self.decoder = decoder

    def forward(self, maps: Tensor) -> Tensor:
        """Vectors (N, C)."""
        read: Tensor = self.decoder(self.query.repeat(len(maps), 1, 1), tokens_of(maps))[:, 0]
        return read


class TransformerBackbone(PatchBackbone):
    """The Transformer with its source an image and its target one vector: 6 encoder layers, sinusoidal places, one decoder layer.

    0.37 M weights and 16.8 M multiply-adds at 28 pixels; 0.40 M and 18.6 M at 84 with 4 frames.
    """

    paper = "Vaswani et al. 2017, Attention is all you need, arXiv:1706.03762"
    year = 2017

    def __init__(self, in_channels: int, image_size: int, width: int = 64, layers: int = 6, heads: int = 4, dropout: float = 0.0) -> None:
        patches = Patches(in_channels, image_size, width)
        encoder = Encoder([EncoderLayer(width, heads, dropout=dropout) for _ in range(layers)])
        # One decoder layer of 6: with one query there is little to decode.
        reader = Reader(Decoder([DecoderLayer(width, heads, dropout=dropout)]))
        super().__init__(patches, Sinusoidal(), encoder, reader)
