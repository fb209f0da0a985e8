"""What a backbone costs: its weights, its multiply-adds and its time.

Multiply-adds are those of convolutions, linear layers, matrix products and attention; additions, activations and normalisations
are left out, as in the tables of papers. They do not tell the time: memory traffic and the number of steps count as well.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.backbones import REGISTRY, Backbone, create


@dataclass(frozen=True)
class Cost:
    """One backbone at one size of images."""

    name: str
    family: str
    """The file in `lab/backbones` that builds it."""
    paper: str
    year: int
    parameters: int
    """Weights and biases."""
    multiplies: int
    """Multiply-adds of one image."""


def cost(name: str, in_channels: int, image_size: int) -> Cost:
    """The cost of the backbone of this name with its default options.

    Raises:
        UserError: no backbone has this name, or it cannot take such images.
    """
    backbone = create(name, in_channels, image_size)
    counted = parameters(backbone), multiplies(backbone, in_channels, image_size)
    return Cost(name, REGISTRY[name].partition(":")[0], backbone.paper, backbone.year, *counted)


def parameters(module: nn.Module) -> int:
    """Numbers that training changes; those that several parts share count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiplies(backbone: Backbone, in_channels: int, image_size: int) -> int:
    """Multiply-adds of one image through `forward`, in eval mode."""
    # The meta device computes shapes alone, by plain products: it has none of the fused kernels that the counter cannot look into.
    shapes = copy.deepcopy(backbone).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes(torch.zeros(1, in_channels, image_size, image_size, device="meta"))
    flops: int = counter.get_total_flops()
    return flops // 2


def seconds(backbone: Backbone, in_channels: int, image_size: int, batch: int = 64, repeats: int = 5) -> tuple[float, float]:
    """How long a batch takes on this machine's processor: forward in eval mode, then forward and backward in train mode.

    Medians of several after a warm-up; the backbone itself stays as it is.
    """
    network = copy.deepcopy(backbone).float().cpu()
    images = torch.rand(batch, in_channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forward = median_seconds(lambda: network.eval()(images), repeats)
    return forward, median_seconds(lambda: _learn(network.train(), images), repeats)


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of doing some work, which is done twice before for warmth."""
    times = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _learn(network: nn.Module, images: Tensor) -> None:
    network.zero_grad()
    network(images).sum().backward()
