"""Three ways from a coarse map to a finer one, and the checkerboards that the first of them leaves.

A transposed convolution (Zeiler et al. 2010) adds a kernel into the output at every input place. Where kernel and stride do
not divide, neighbouring outputs get differently many terms: 3 every 2 gives 1, 2, 1, 2 ... in each direction, a checkerboard
that training has to unlearn (Odena et al. 2016, "Deconvolution and checkerboard artifacts", Distill). The other two ways begin
without it, and all three bring (N, C, H, W) to (N, outputs, factor * H, factor * W).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TransposedConv(nn.Module):
    """The gradient of a strided convolution, used as a layer (Zeiler et al. 2010, "Deconvolutional networks", CVPR)."""

    def __init__(self, inputs: int, outputs: int, factor: int = 2, kernel: int = 3) -> None:
        """Args:
        factor: the stride: output places per input place, in each direction.
        kernel: places that an input reaches, at least `factor`; a multiple of it, such as 4 at factor 2, evens out their numbers.
        """
        super().__init__()
        if kernel < factor:
            raise ValueError(f"a kernel of {kernel} leaves gaps at factor {factor}; it must be at least as large")
        padding = (kernel - factor + 1) // 2
        self.convolution = nn.ConvTranspose2d(inputs, outputs, kernel, factor, padding, output_padding=factor + 2 * padding - kernel)

    def forward(self, maps: Tensor) -> Tensor:
        """The finer maps."""
        finer: Tensor = self.convolution(maps)
        return finer


class ResizeConv(nn.Module):
    """Every place repeated, then a 3x3 convolution (Odena et al. 2016): all outputs get equally many terms."""

    def __init__(self, inputs: int, outputs: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The finer maps; `size` is their height and width where the halving on the way down had rounded, 15 to 8."""
        height, width = size or (self.factor * maps.shape[2], self.factor * maps.shape[3])
        finer: Tensor = self.convolution(F.interpolate(maps, (height, width)))
        return finer


class PixelShuffleConv(nn.Module):
    """A 3x3 convolution on the coarse map to factor^2 times the channels, which become places.

    Shi et al. 2016, "Real-time single image and video super-resolution using an efficient sub-pixel convolutional neural network",
    arXiv:1609.05158, begun as by Aitken et al. 2017, "Checkerboard artifact free sub-pixel convolution", arXiv:1707.02937 (ICNR):
    the channels that become one place's neighbours start with the same kernel, so that it starts as a convolution resized.
    """

    def __init__(self, inputs: int, outputs: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.convolution = nn.Conv2d(inputs, outputs * factor**2, 3, padding=1)
        with torch.no_grad():
            for parameter in self.convolution.parameters():
                parameter.copy_(parameter[:: factor**2].repeat_interleave(factor**2, 0))

    def forward(self, maps: Tensor) -> Tensor:
        """The finer maps."""
        return F.pixel_shuffle(self.convolution(maps), self.factor)


def checkerboard(maps: Tensor) -> Tensor:
    """How much of what varies in a map flips from each place to the next: a share in [0, 1] for every image, float32 (N,).

    It is the energy of the spectrum (without the mean of each channel, all channels together) on the two lines of the highest
    frequency, half a cycle per place, vertical or horizontal. A checkerboard or stripes one place wide give 1; a map of places repeated
    in pairs gives 0; white noise gives (H + W - 1) / (H W - 1). Only the mean brightness has its pattern exactly on the lines: of a
    dark map they tell little. Odd sides lose their last row or column; a constant map gives 0.
    """
    height, width = (side // 2 for side in maps.shape[2:])
    even = maps[..., : 2 * height, : 2 * width].float()
    energy = torch.fft.fft2(even - even.mean((2, 3), keepdim=True)).abs().square().sum(1)
    lines = energy[:, height].sum(1) + energy[:, :, width].sum(1) - energy[:, height, width]
    rounding = 1e-10 * even[0, 0].numel() * even.square().sum((1, 2, 3))  # what is left of a constant map, well above float32's
    share: Tensor = lines / torch.maximum(energy.sum((1, 2)), rounding).clamp_min(1e-30)
    return share
