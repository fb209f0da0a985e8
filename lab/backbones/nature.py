"""The network of the DQN paper: Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518."""

from torch import nn

from lab.backbones.backbone import ConvStack
from lab.config import UserError


class NatureCNN(ConvStack):
    """Three convolutions (32 of 8x8 every 4, 64 of 4x4 every 2, 64 of 3x3) and a dense layer; 1.68 M weights at 84x84 with 4 frames.

    Weights and biases begin uniform within 1/sqrt(fan-in), as in the authors' Torch code; so do those of torch by default.
    """

    def __init__(self, in_channels: int, image_size: int, hidden: int = 512) -> None:
        if image_size < 36:
            raise UserError(f"the backbone 'nature' needs images of at least 36 pixels, not {image_size}; take 'small'")
        side = (((image_size - 8) // 4 + 1) - 4) // 2 + 1 - 2
        layers = [nn.Conv2d(in_channels, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)]
        super().__init__(layers, side, hidden)
