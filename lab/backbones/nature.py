"""The network of the DQN paper: three convolutions over a stack of frames."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.backbones.backbone import ConvStack, computed_in

SMALLEST = 36
"""Pixels a side below which nothing would be left for the third convolution."""


class NatureCNN(ConvStack):
    """Three convolutions (32 of 8x8 every 4, 64 of 4x4 every 2, 64 of 3x3) and a dense layer; 1.68 M weights at 84x84 with 4 frames.

    Weights and biases begin uniform within 1/sqrt(fan-in), as in the authors' Torch code; so do those of torch by default.
    Images of fewer than 36 pixels get a black frame.
    """

    paper = "Mnih et al. 2015, Human-level control through deep reinforcement learning, Nature 518"
    year = 2015

    def __init__(
        self, in_channels: int, image_size: int, hidden: int = 512, widths: tuple[int, int, int] = (32, 64, 64), layer_norm: bool = False
    ) -> None:
        self.frame = max(0, SMALLEST - image_size)
        side = (((image_size + self.frame - 8) // 4 + 1) - 4) // 2 + 1 - 2
        a, b, c = widths
        layers = [nn.Conv2d(in_channels, a, 8, 4), nn.Conv2d(a, b, 4, 2), nn.Conv2d(b, c, 3, 1)]
        super().__init__(layers, side, hidden, layer_norm)

    def first(self, images: Tensor) -> Tensor:
        """The first convolution; of bytes it is computed as 2x2 over blocks of 4x4, which is the same sum in another order.

        Few channels and a large stride suit no processor's kernels: on a CPU with bf16 the blocks save a tenth of an update.
        """
        before = self.frame // 2
        images = F.pad(images, (before, self.frame - before) * 2) if self.frame else images
        if images.dtype != torch.uint8 or images.shape[-1] % 4 or images.shape[-2] % 4:
            return super().first(images)
        layer = cast(nn.Conv2d, self.layers[0])
        return F.conv2d(blocks(images).to(computed_in(images.device)), block_kernel(layer.weight) / 255, layer.bias)


def blocks(images: Tensor) -> Tensor:
    """Every 4x4 pixels of bytes (N, C, H, W) as 16 C channels of one: (N, 16 C, H/4, W/4), channels-last, ordered (C, y, x).

    In two moves, of 4 and of 16 bytes: a complex number is what torch moves 16 bytes as, and it is no number here.
    """
    count, channels, height, width = images.shape
    whole = images if images.stride()[2:] == (width, 1) else images.contiguous()  # stacks may be views of frames that they share
    fours = whole.view(torch.int32).view(count, channels, height // 4, 4, width // 4)
    sixteens = fours.mT.reshape(count, channels, height // 4, width).view(torch.complex128)  # (N, C, H/4, W/4), a block each
    mixed = sixteens.permute(0, 2, 3, 1).reshape(count, height // 4, width // 4 * channels)
    return mixed.view(torch.uint8).view(count, height // 4, width // 4, 16 * channels).permute(0, 3, 1, 2)


def block_kernel(weight: Tensor) -> Tensor:
    """The kernel (O, C, 8, 8) as one over blocks, (O, 16 C, 2, 2)."""
    outputs, channels = weight.shape[:2]
    return weight.reshape(outputs, channels, 2, 4, 2, 4).permute(0, 1, 3, 5, 2, 4).reshape(outputs, 16 * channels, 2, 2)
