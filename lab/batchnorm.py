"""Batch normalisation over several processes: means and variances of the whole batch, not of the part that a process sees."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, distributed, nn


class Sum(torch.autograd.Function):
    """The sum of every process's tensor, on every process; so is its gradient the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        """Add up."""
        whole = part.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """What every process's loss says of the sum; `apply` lets it be differentiated again."""
        return cast(Tensor, Sum.apply(gradient))  # type: ignore[no-untyped-call]


class WholeBatchNorm2d(nn.BatchNorm2d):
    """As `nn.BatchNorm2d` of the batches of all processes together, which are of one size (torch's SyncBatchNorm knows no CPU)."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W), normalised channel by channel."""
        if not self.training:
            return super().forward(maps)
        mean, variance, count = moments(maps)
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = torch.rsqrt(variance + self.eps) * (1 if self.weight is None else self.weight.double())
        shift = (0 if self.bias is None else self.bias.double()) - mean * scale
        wide = (maps.float() * as_channels(scale) + as_channels(shift)).to(maps.dtype)
        return wide

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running means, as `nn.BatchNorm2d` does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.float(), share)
        self.running_var.lerp_(variance.float(), share)


def moments(maps: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and variance of each channel over all processes, fp64 (C,), and how many numbers they were taken of."""
    count = maps.numel() // maps.shape[1] * distributed.get_world_size()
    wide = maps.double()  # a variance by its squares is exact enough in fp64 only
    sums = Sum.apply(torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]))  # type: ignore[no-untyped-call]
    mean, square = cast(Tensor, sums) / count
    return mean, square - mean.square(), count


def as_channels(values: Tensor) -> Tensor:
    """Values (C,) as fp32 (1, C, 1, 1)."""
    return values.float()[None, :, None, None]


def see_whole_batches(module: nn.Module) -> None:
    """Have all batch normalisations inside a module see the batches of all processes."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            whole = WholeBatchNorm2d(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            whole.load_state_dict(child.state_dict())
            setattr(module, name, whole.train(child.training))
        else:
            see_whole_batches(child)
