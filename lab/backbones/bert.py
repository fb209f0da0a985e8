"""BERT (Devlin et al. 2018, "Pre-training of deep bidirectional Transformers", arXiv:1810.04805): to fill in what was hidden.

Of 15 in 100 tokens the model must tell what stood there; 8 in 10 of these are replaced by [MASK], 1 by a random token, and
1 is left as it is. It sees what comes before and after.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.attention.positions import Learned
from lab.backbones.backbone import Average
from lab.backbones.transformer import Encoder, EncoderLayer, PatchBackbone, Patches, for_keys, normal_weights


class Embeddings(nn.Module):
    """What stands before the layers: positions, layer normalisation, dropout. There is one kind of sentence, so no segments."""

    def __init__(self, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.positions = Learned(length, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L, width) to tokens."""
        placed: Tensor = self.dropout(self.norm(self.positions(tokens)))
        return placed


def bert_layers(width: int, layers: int, heads: int, dropout: float) -> Encoder:
    """Post-norm layers with GELU."""
    return Encoder([EncoderLayer(width, heads, activation="gelu", dropout=dropout) for _ in range(layers)])


class BERT(nn.Module):
    """Tells the token at each place from all others; tokens are 0 .. vocabulary - 1, and [MASK] is the one after them."""

    def __init__(self, vocabulary: int, width: int = 128, layers: int = 4, heads: int = 4, context: int = 64, dropout: float = 0.0) -> None:
        """Args:
        vocabulary: how many different tokens there are, without [MASK].
        context: the most tokens of a sequence.
        """
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary + 1, width)
        self.embeddings = Embeddings(context, width, dropout)
        self.encoder = bert_layers(width, layers, heads, dropout)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        normal_weights(self)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of what stands at each place, (N, L) to (N, L, vocabulary); no token is ever [MASK].

        Args:
            tokens: int64 (N, L), up to `vocabulary` inclusive.
            mask: bool (N, L), False where the sequence is only filled up.

        Raises:
            ValueError: there are more tokens than the context has places.
        """
        seen = self.encoder(self.embeddings(self.embedding(tokens)), for_keys(mask))
        return F.linear(self.transform(seen), self.embedding.weight[: self.vocabulary], self.bias)


def mask_tokens(tokens: Tensor, draws: Tensor, vocabulary: int, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """Tokens (N, L) with some of them hidden, and which ones are to be told, bool (N, L) (section 3.1, task 1).

    Args:
        tokens: int64 (N, L), below `vocabulary`, which itself stands for [MASK].
        draws: uniform in [0, 1), (N, 2, L): the first number decides what happens to a token, the second one picks a random token.
        vocabulary: how many different tokens there are.
        share: of the tokens that are to be told.
    """
    fate, pick = draws.unbind(1)
    random = (pick * vocabulary).long()
    hidden = torch.where(fate < 0.9 * share, random, tokens)
    return torch.where(fate < 0.8 * share, vocabulary, hidden), fate < share


class BERTBackbone(PatchBackbone):
    """BERT over patches instead of words, as BEiT (Bao et al. 2022) has it; the vector is the pooler's.

    0.31 M weights and 16.4 M multiply-adds at 28 pixels; 0.34 M and 18.1 M at 84 with 4 frames.
    """

    paper = "Devlin et al. 2018, BERT, arXiv:1810.04805"
    year = 2018

    def __init__(self, in_channels: int, image_size: int, width: int = 64, layers: int = 6, heads: int = 4, dropout: float = 0.0) -> None:
        patches = Patches(in_channels, image_size, width)
        # The paper's pooler reads the token [CLS]; a map has no place for one, so here it reads the mean.
        pooler = nn.Sequential(Average(), nn.Linear(width, width), nn.Tanh())
        super().__init__(patches, Embeddings(patches.count, width, dropout), bert_layers(width, layers, heads, dropout), pooler)
        normal_weights(self)
