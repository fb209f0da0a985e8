"""Vision Transformer, ViT (Dosovitskiy et al. 2021, "An image is worth 16x16 words", arXiv:2010.11929).

A pre-norm Transformer encoder over the patches of an image, with a learned vector for each place. The vector is the mean over
all patches, as in Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k", arXiv:2205.01580, where the first paper
has a class token; the other difference there, places that are sinusoidal in two dimensions, is an option.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from lab.attention.positions import Learned, Sinusoidal2d
from lab.backbones.backbone import Average
from lab.backbones.transformer import Encoder, EncoderLayer, PatchBackbone, Patches


class ViT(PatchBackbone):
    """A small sibling of ViT: 6 layers over about 7x7 patches.

    0.30 M weights and 16.3 M multiply-adds at 28 pixels; 0.34 M and 18.1 M at 84 with 4 frames.
    """

    paper = "Dosovitskiy et al. 2021, An image is worth 16x16 words, arXiv:2010.11929"
    year = 2021

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        width: int = 64,
        layers: int = 6,
        heads: int = 4,
        positions: Literal["learned", "sinusoidal"] = "learned",
        dropout: float = 0.0,
    ) -> None:
        patches = Patches(in_channels, image_size, width)
        places: nn.Module = Learned(patches.count, width) if positions == "learned" else Sinusoidal2d(*patches.grid, width)
        stack = [EncoderLayer(width, heads, norm_first=True, activation="gelu", dropout=dropout) for _ in range(layers)]
        super().__init__(patches, places, Encoder(stack), Average())
