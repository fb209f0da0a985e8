"""Modules that learn, and the part of a batch that a process computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lab import optimizer, seeding
from lab.checkpoint import Stateful
from lab.distributed import World
from lab.ema import EMA
from lab.optimizer import OptimizerConfig

Metrics = Mapping[str, Tensor | float]
Loss = Callable[["Shard"], tuple[Tensor, Metrics]]
"""Maps a shard to the mean loss over its rows, and to metrics that are means too."""


class Learner(nn.Module):
    """A module, the optimiser that trains it, and the average of its weights."""

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        super().__init__()
        self.module, self.config = module, config
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.optimizer = optimizer.create(config, self.weights)
        self.ema = EMA(module, config.ema) if config.ema else None

    @contextlib.contextmanager
    def judged(self) -> Iterator[nn.Module]:
        """The module to sample from and to test, in evaluation mode: the averaged one where there is one."""
        module = self.ema.module if self.ema else self.module
        training = module.training
        try:
            yield module.eval()
        finally:
            module.train(training)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Within, gradients pass through the module but none is computed for its weights."""
        for weight in self.weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in self.weights:
                weight.requires_grad_(True)

    def parts(self, prefix: str = "") -> dict[str, Stateful]:
        """What a checkpoint must hold of it."""
        parts: dict[str, Stateful] = {f"{prefix}model": self.module, f"{prefix}optimizer": self.optimizer}
        return parts | ({f"{prefix}ema": self.ema} if self.ema else {})

    def forward(self, loss: Loss, shard: Shard) -> tuple[Tensor, Metrics]:
        """A loss as the forward pass of the module it trains, which is what DistributedDataParallel watches."""
        return loss(shard)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, (); not finite if any part of it is not."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        return nn.utils.get_total_norm(gradients, foreach=True)

    def update(self, rate: float, norm: Tensor) -> None:
        """Clip, follow the gradient, move the average; a gradient that is not finite moves nothing. The device is not waited for."""
        skip = norm.isfinite().logical_not().float()
        shrink = (norm / self.config.clip_norm).clamp(min=1).float() if self.config.clip_norm else None
        optimizer.follow(self.optimizer, rate, skip, shrink)
        if self.ema:
            self.ema.update(skip)


@dataclass(frozen=True)
class Shard:
    """One process's part of one micro-batch: rows `first .. first + count` of the step's batch of `batch`."""

    first: int
    count: int
    batch: int
    seed: int
    step: int
    device: torch.device
    processes: int = 1
    """How many compute these rows together; see `common`."""

    def common(self, world: World) -> Shard:
        """The rows of all processes together: where each holds other data, it computes those whose data it has."""
        return replace(self, first=self.first - world.rank * self.count, count=self.count * world.size, processes=world.size)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the rows, of their values; of those that this process has, its part of it: the mean of all parts is that mean."""
        return values.sum() / self.count * self.processes

    def indices(self, size: int) -> Tensor:
        """Which items of a shuffled set of `size` these rows are, int64 (count,), each epoch in an order of its own."""
        order = seeding.shuffled(self.seed, size, self.step * self.batch + self.first, self.count)
        return order.to(self.device, non_blocking=True)

    def uniform(self, stream: str, *shape: int) -> Tensor:
        """Numbers uniform in [0, 1), (count, *shape): this shard's rows of the whole batch's draw."""
        return torch.rand(self.batch, *shape, generator=self._generator(stream), device=self.device)[self._rows]

    def normal(self, stream: str, *shape: int) -> Tensor:
        """Standard normal numbers, (count, *shape): this shard's rows of the whole batch's draw."""
        return torch.randn(self.batch, *shape, generator=self._generator(stream), device=self.device)[self._rows]

    @property
    def places(self) -> Tensor:
        """Which rows of the batch these are, int64 (count,)."""
        return torch.arange(self.first, self.first + self.count, device=self.device)

    @property
    def _rows(self) -> slice:
        return slice(self.first, self.first + self.count)

    def _generator(self, stream: str) -> torch.Generator:
        return seeding.generator(self.seed, stream, self.step, self.device)
