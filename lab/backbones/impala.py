"""The large network of IMPALA (Espeholt et al. 2018, arXiv:1802.01561, figure 3): residual, without normalisation, for agents.

Three times a convolution, max-pooling to half the size, and two residual blocks. It sees every pixel at stride 1, where the
network of the DQN paper starts with strides of 4 and 2; this costs about six times the multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lab.backbones.backbone import Staged, dense
from lab.backbones.layers import MaxPool


class ImpalaBlock(nn.Module):
    """x + two 3x3 convolutions, each after a ReLU: (N, C, H, W) as it came."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.branch = nn.Sequential(nn.ReLU(), convolutions[0], nn.ReLU(inplace=True), convolutions[1])  # the first one must not alter x

    def forward(self, maps: Tensor) -> Tensor:
        """The maps with what this block adds, not activated."""
        total: Tensor = maps + self.branch(maps)
        return total


def impala_stage(inputs: int, outputs: int) -> list[nn.Module]:
    """Convolution, pooling to half the size (rounded up), two blocks."""
    return [nn.Conv2d(inputs, outputs, 3, padding=1), MaxPool(3, 2, 1), ImpalaBlock(outputs), ImpalaBlock(outputs)]


class Impala(Staged):
    """Three stages, a ReLU, and a dense layer with ReLU over the whole map. The paper's LSTM is left out.

    229 thousand weights and 6 M multiply-adds for 28x28 grey pixels; 1.09 M and 54 M for 84x84 with 4 frames.
    """

    paper = (
        "Espeholt et al. 2018, IMPALA: scalable distributed deep-RL with importance weighted actor-learner architectures, arXiv:1802.01561"
    )
    year = 2018

    def __init__(self, in_channels: int, image_size: int, widths: Sequence[int] = (16, 32, 32), hidden: int = 256) -> None:
        """Args:
        widths: channels of each stage.
        hidden: width of the dense layer.
        """
        stages = [nn.Sequential(*impala_stage(*pair)) for pair in zip((in_channels, *widths), widths)]
        stages[-1].append(nn.ReLU())
        side = image_size
        for _ in widths:
            side = (side + 1) // 2
        super().__init__(stages, widths, dense(widths[-1] * side**2, hidden), hidden)
