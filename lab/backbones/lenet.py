"""LeNet-5: convolutions and sub-sampling in turn (LeCun, Bottou, Bengio & Haffner 1998, section II).

    C1  convolution 5x5     6 maps of 28x28        S2  sub-sampling 2x2     6 maps of 14x14
    C3  convolution 5x5    16 maps of 10x10        S4  sub-sampling 2x2    16 maps of 5x5
    C5  dense              120 numbers             F6  dense               84 numbers

The same small kernel looks at every place (shared weights), what it found is kept ever more coarsely (sub-sampling), and every
number passes the squashing function. The paper's output layer, ten Euclidean distances to drawn digits, is not a backbone's.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.backbones.backbone import Staged, stem_stride

TABLE = [
    *[[(first + step) % 6 for step in range(3)] for first in range(6)],
    *[[(first + step) % 6 for step in range(4)] for first in range(6)],
    *[[0, 1, 3, 4], [1, 2, 4, 5], [0, 2, 3, 5]],
    [0, 1, 2, 3, 4, 5],
]
"""Which of the six maps of S2 each of the sixteen maps of C3 sees (table I)."""


class LeNet(Staged):
    """Six and sixteen maps, then 120 and 84 numbers.

    60,000 weights at 28x28 with one channel, as in the paper, and 0.4 million multiply-adds; at 84x84 with four channels
    60,450 and 0.8 million.

    C1 pads the image by 2, as the paper puts 28x28 digits into 32x32 (images under 12 pixels are padded to 16); of large images
    it takes every third place or so. C5 is a convolution over the whole of S4, that is a dense layer, whatever its size.
    """

    paper = "LeCun et al. 1998, Gradient-based learning applied to document recognition, Proc. IEEE 86"
    year = 1998

    def __init__(self, in_channels: int, image_size: int) -> None:
        padding, stride = max(2, (17 - image_size) // 2), stem_stride(image_size)
        side = (((image_size + 2 * padding - 5) // stride + 1) // 2 - 4) // 2
        stages = [
            nn.Sequential(nn.Conv2d(in_channels, 6, 5, stride, padding), Squash()),
            SubSampling(6),
            nn.Sequential(PartialConv(TABLE), Squash()),
            SubSampling(16),
        ]
        head = nn.Sequential(nn.Flatten(), nn.Linear(16 * side * side, 120), Squash(), nn.Linear(120, 84), Squash())
        super().__init__(stages, (6, 6, 16, 16), head, 84)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")  # LeCun et al. 1998, "Efficient BackProp", equation 16
                nn.init.constant_(cast(Tensor, layer.bias), 0)


class Squash(nn.Module):
    """f(a) = 1.7159 tanh(2a/3), with f(1) = 1 and f(-1) = -1 (equation 6 and appendix A)."""

    def forward(self, sums: Tensor) -> Tensor:
        """Numbers between -1.7159 and 1.7159, of the same shape."""
        return 1.7159 * torch.tanh(2 / 3 * sums)


class SubSampling(nn.Module):
    """The mean of 2x2 places times a weight plus a bias of the map, squashed: (N, C, h, w) to (N, C, h/2, w/2).

    The paper has the sum of the four, which is the same function with a quarter of the weight.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.squash = Squash()

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of half the height and width; an odd row or column at the end is left out."""
        coarse: Tensor = self.squash(self.weight * F.avg_pool2d(maps, 2) + self.bias)
        return coarse


class PartialConv(nn.Module):
    """A 5x5 convolution each of whose maps sees some of the maps before it: that breaks the symmetry between them and is cheap."""

    outputs: Tensor
    inputs: Tensor

    def __init__(self, table: list[list[int]]) -> None:
        """Args:
        table: for each map, the maps that it sees.
        """
        super().__init__()
        pairs = [(output, seen) for output, row in enumerate(table) for seen in row]
        outputs, inputs = torch.tensor(pairs).T
        self.register_buffer("outputs", outputs, persistent=False)
        self.register_buffer("inputs", inputs, persistent=False)
        self.shape = (len(table), int(inputs.max()) + 1, 5, 5)
        fan_in = 25 * outputs.bincount()[outputs].view(-1, 1, 1)
        self.weight = nn.Parameter(torch.randn(len(pairs), 5, 5) * fan_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(table)))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, len(table), h - 4, w - 4)."""
        kernel = self.weight.new_zeros(self.shape).index_put((self.outputs, self.inputs), self.weight)
        return F.conv2d(maps, kernel, self.bias)
