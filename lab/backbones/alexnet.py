"""AlexNet: what made deep networks win (Krizhevsky, Sutskever & Hinton 2012).

Rectified units, which train several times faster than tanh (section 3.1); responses normalised by those of neighbouring maps
(3.3); overlapping pooling (3.4); dropout of dense units (4.2).
"""

from __future__ import annotations

from torch import nn

from lab.backbones.backbone import Staged, stem_stride
from lab.backbones.layers import ConvNorm, MaxPool

NEIGHBOURS = 5
"""Maps that share a normalisation, n in section 3.3."""


class AlexNet(Staged):
    """Five convolutions and two dense layers, a quarter as wide as the paper's and sixteen times narrower where dense.

    0.56 million weights and 17.8 million multiply-adds at 28x28 with one channel, 0.57 and 23.4 at 84x84 with four.
    """

    # The paper splits its maps over two processors (grouped convolutions), as one could not hold them; ours are whole. It begins with
    # weights of 0.01 and biases of 1, so that rectified units start alive; ours begin with the variance of He et al. 2015.

    paper = "Krizhevsky et al. 2012, ImageNet classification with deep convolutional neural networks, NeurIPS"
    year = 2012

    def __init__(self, in_channels: int, image_size: int, dropout: float = 0.5) -> None:
        """Args:
        dropout: share of the dense units set to zero while training.
        """
        stride = stem_stride(image_size)
        first = ConvNorm(in_channels, 24, 2 * stride + 3, stride, norm="none")  # 11x11 at the paper's stride of 4
        middle = [ConvNorm(inputs, outputs, norm="none") for inputs, outputs in ((64, 96), (96, 96), (96, 64))]
        stages = [
            nn.Sequential(first, response_norm()),
            nn.Sequential(overlapping_pool(), ConvNorm(24, 64, 5, norm="none"), response_norm()),
            nn.Sequential(overlapping_pool(), *middle),
        ]
        side = -(-image_size // (8 * stride))
        super().__init__(
            stages, (24, 64, 64), nn.Sequential(overlapping_pool(), *dropped(64 * side * side, 256, 256, dropout=dropout)), 256
        )


def response_norm() -> nn.LocalResponseNorm:
    """Each response is divided by (2 + alpha * sum of the squares of itself and its four neighbours in other maps) ** 0.75.

    The paper's alpha, 1e-4, is for pixels from 0 to 255. Of pixels 255 times smaller, one 255^2 times larger makes the same.
    """
    return nn.LocalResponseNorm(NEIGHBOURS, alpha=NEIGHBOURS * 1e-4 * 255**2, beta=0.75, k=2.0)  # torch takes the mean of the squares


def overlapping_pool() -> MaxPool:
    """The largest of 3x3 places at every second one, (N, C, h, w) to (N, C, h/2, w/2) rounded up: windows share a row with the next."""
    return MaxPool(3, 2, 1)


def dropped(inputs: int, *widths: int, dropout: float) -> nn.Sequential:
    """Maps (N, C, h, w) of `inputs` numbers flattened and through dense layers, each with ReLU and dropout."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in widths:
        linear = nn.Linear(inputs, width)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*layers)
