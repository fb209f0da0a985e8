"""Inception-ResNet: Inception branches that only add to what is there (Szegedy et al. 2016, arXiv:1602.07261).

    x  ->  relu(x + scale * projection(branches(x)))

The branches are cheaper than those of a pure Inception; a 1x1 convolution without activation brings them to the width of x
(section 3.2), and what they add is scaled down, as wide residuals made training die (section 3.3).
"""

from __future__ import annotations

from torch import Tensor, nn

from lab.backbones.backbone import Staged
from lab.backbones.inception import Branches, chain, reduction
from lab.backbones.layers import Norm, stem


class InceptionResNet(Staged):
    """Two residual modules A, three B and two C of 32, 80 and 160 channels; the paper's v1 has 256, 896 and 1792.

    0.14 million weights and 20.5 million multiply-adds at 28x28 with one channel, 0.15 and 25.2 at 84x84 with four.
    """

    # Reductions are those of Inception-v3; the paper's second one has one more branch. All convolutions pad, so that small maps last.

    paper = "Szegedy et al. 2016, Inception-v4, Inception-ResNet and the impact of residual connections on learning, arXiv:1602.07261"
    year = 2016

    def __init__(self, in_channels: int, image_size: int, norm: Norm = "group", scale: float = 0.2) -> None:
        """Args:
        scale: of what the branches add, 0.1 to 0.3 in the paper.
        """
        stages = [
            nn.Sequential(stem(in_channels, 32, image_size, norm), *(block_a(32, norm, scale) for _ in range(2))),
            nn.Sequential(reduction(32, 80, norm), *(block_b(80, norm, scale) for _ in range(3))),
            nn.Sequential(reduction(80, 160, norm), *(block_c(160, norm, scale) for _ in range(2))),
        ]
        super().__init__(stages, (32, 80, 160))


class Residual(nn.Module):
    """Branches, a projection to the width of what came in, and the sum; the same shape (N, C, h, w)."""

    def __init__(self, width: int, branches: Branches, joined: int, scale: float) -> None:
        """Args:
        joined: channels of all branches together.
        """
        super().__init__()
        self.branches = branches
        self.projection = nn.Conv2d(joined, width, 1)  # no normalisation on top of sums (section 3.2)
        self.scale = scale

    def forward(self, maps: Tensor) -> Tensor:
        """relu(x + scale * projection(branches(x)))."""
        total: Tensor = maps + self.scale * self.projection(self.branches(maps))
        return total.relu_()


def block_a(width: int, norm: Norm, scale: float) -> Residual:
    """For the largest maps: 1x1, 3x3, and two 3x3 in place of 5x5 (figure 10)."""
    part = width // 4
    branches = Branches(
        chain(norm, width, (part, 1)),
        chain(norm, width, (part, 1), (part, 3)),
        chain(norm, width, (part, 1), (part, 3), (part, 3)),
    )
    return Residual(width, branches, 3 * part, scale)


def block_b(width: int, norm: Norm, scale: float) -> Residual:
    """For the middle maps: 1x1, and 1x7 then 7x1 in place of 7x7 (figure 11)."""
    return asymmetric(width, 7, norm, scale)


def block_c(width: int, norm: Norm, scale: float) -> Residual:
    """For the coarsest maps: 1x1, and 1x3 then 3x1 in place of 3x3 (figure 13)."""
    return asymmetric(width, 3, norm, scale)


def asymmetric(width: int, n: int, norm: Norm, scale: float) -> Residual:
    """1x1, and nxn as 1xn then nx1."""
    part = width // 4
    branches = Branches(chain(norm, width, (part, 1)), chain(norm, width, (part, 1), (part, (1, n)), (part, (n, 1))))
    return Residual(width, branches, 2 * part, scale)
