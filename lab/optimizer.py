"""Optimisers and learning-rate schedules, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lab.config import Count, Decay, Fraction, Natural, NonNegative, Positive, Settings, UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """How weights follow gradients."""

    kind: Literal["adam", "adamw", "radam", "rmsprop", "centred_rmsprop", "sgd"] = "adamw"
    """The rule: Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter 2019), RAdam, RMSProp (centred: DQN's), SGD with momentum betas[0]."""
    lr: Positive = 1e-3
    """Learning rate at the top of the schedule."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running mean of the gradient, and of its square (for RMSProp: momentum, smoothing)."""
    eps: Positive = 1e-8
    """Added to the denominator, so that it is never zero."""
    weight_decay: NonNegative = 0.0
    """Pull of the weights towards zero per unit of learning rate (decoupled for AdamW)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up, down to lr x final_lr at the last step."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate climbs linearly from 0."""
    final_lr: Fraction = 0.0
    """Where a linear or cosine schedule ends, as a part of lr."""
    ema: Decay = 0.0
    """Decay of the averaged weights, which are the ones sampled and judged; 0: no average."""
    clip_norm: NonNegative = 0.0
    """Largest norm of the whole gradient; a larger one is scaled down to it. 0: never."""


def create(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser for `parameters`. Fused where torch has it: on a CPU that alone saves a third of a small step."""
    weights = list(parameters)
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.kind == "adam":
        return torch.optim.Adam(weights, betas=config.betas, eps=config.eps, fused=True, **common)
    if config.kind == "adamw":
        return torch.optim.AdamW(weights, betas=config.betas, eps=config.eps, fused=True, **common)
    if config.kind == "radam":
        return torch.optim.RAdam(weights, betas=config.betas, eps=config.eps, foreach=True, **common)
    if config.kind == "rmsprop":
        momentum, alpha = config.betas
        return torch.optim.RMSprop(weights, momentum=momentum, alpha=alpha, eps=config.eps, foreach=True, **common)
    if config.kind == "centred_rmsprop":
        if config.weight_decay:
            raise UserError("optimizer.weight_decay: centred_rmsprop has none; leave it 0")
        return CentredRMSProp(weights, config.lr, config.betas, config.eps)
    return torch.optim.SGD(weights, momentum=config.betas[0], fused=True, **common)


def learning_rate(config: OptimizerConfig, step: Natural, steps: Count) -> float:
    """The learning rate of step number `step` (from 0) out of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    height = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * max(0.0, height))


class CentredRMSProp(torch.optim.Optimizer):
    """RMSProp of the gradient's deviation from its running mean, with eps inside the root (Graves 2013; Mnih et al. 2015).

        mean <- a mean + (1 - a) g        square <- b square + (1 - b) g^2        w <- w - lr g / sqrt(square - mean^2 + eps)

    torch's own centred RMSProp adds eps outside of the root, which at the paper's 0.01 is another rule.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(weights, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight] = {"mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
            if weights:
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        (a, b), gradients = group["betas"], [cast(Tensor, weight.grad) for weight in weights]
        means, squares = ([self.state[weight][name] for weight in weights] for name in ("mean", "square"))
        torch._foreach_lerp_(means, gradients, 1 - a)
        torch._foreach_mul_(squares, b)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b)
        spread = torch._foreach_addcmul(squares, means, means, -1)
        torch._foreach_clamp_min_(spread, 0)  # rounding may leave less than nothing
        torch._foreach_add_(spread, group["eps"])
        torch._foreach_sqrt_(spread)
        torch._foreach_addcdiv_(weights, gradients, spread, -group["lr"])
