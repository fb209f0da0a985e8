"""A network for pictures of a dozen pixels."""

from torch import nn

from lab.backbones.backbone import ConvStack


class SmallCNN(ConvStack):
    """Two 3x3 convolutions, 16 and 32 channels, the second one with stride 2, and a dense layer."""

    paper = "after Young & Tian 2019, MinAtar, arXiv:1903.03176"
    year = 2019

    def __init__(self, in_channels: int, image_size: int, hidden: int = 128, layer_norm: bool = False) -> None:
        layers = [nn.Conv2d(in_channels, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)]
        super().__init__(layers, (image_size + 1) // 2, hidden, layer_norm)
