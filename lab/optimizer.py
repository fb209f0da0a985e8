"""Optimisers and learning-rate schedules, by name."""

from __future__ import annotations

import inspect
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
        return Adam(weights, betas=config.betas, eps=config.eps, fused=True, **common)
    if config.kind == "adamw":
        return AdamW(weights, betas=config.betas, eps=config.eps, fused=True, **common)
    if config.kind == "radam":
        return RAdam(weights, betas=config.betas, eps=config.eps, fused=True, **common)
    if config.kind == "rmsprop":
        return RMSProp(weights, betas=config.betas, eps=config.eps, **common)
    if config.kind == "centred_rmsprop":
        if config.weight_decay:
            raise UserError("optimizer.weight_decay: centred_rmsprop has none; leave it 0")
        return CentredRMSProp(weights, config.lr, config.betas, config.eps)
    sgd = SGD(weights, momentum=config.betas[0], fused=True, **common)
    for weight in weights if config.betas[0] else []:  # torch makes them in the first update, of anything if that is left out
        sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return sgd


def follow(optimizer: torch.optim.Optimizer, rate: float, skip: Tensor, shrink: Tensor | None) -> None:
    """Take one update, or leave it out as if it had never been; what is decided is decided on the device, which nobody waits for.

    torch's fused rules read both numbers from these two attributes, which its `GradScaler` sets; ours do as they do.

    Args:
        skip: 1 to leave the update out, else 0, float32 ().
        shrink: what gradients are divided by, float32 ().
    """
    told = cast(Any, optimizer)
    told.found_inf, told.grad_scale = skip, shrink
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def learning_rate(config: OptimizerConfig, step: Natural, steps: Count) -> float:
    """The learning rate of step number `step` (from 0) out of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    height = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * max(0.0, height))


# torch's own rules, which would import its compiler, for two to three seconds, only to be left alone by it: `step` and some methods of
# `Optimizer` are wrapped so that compiled code never goes into them, and nothing that is compiled here calls any. The plain functions
# are below the wrappers; of the methods, the wrapper keeps what it would call in an attribute (torch/_compile.py). With a torch that
# names it otherwise, programs only start more slowly.
for _method in vars(torch.optim.Optimizer).values():
    if _plain := getattr(_method, "__wrapped__", None):
        _plain.__dict__.setdefault("__dynamo_disable", _plain)


class Adam(torch.optim.Adam):
    """Adam (Kingma & Ba 2015)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class SGD(torch.optim.SGD):
    """Stochastic gradient descent, with momentum."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class RAdam(Adam):
    """Rectified Adam (Liu et al. 2020, algorithm 2): no step by the square of the gradient before enough of them were seen.

        rho = 2 / (1 - b2) - 1        rho_t = rho - 2 t b2^t / (1 - b2^t)
        r_t = sqrt((rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t))
        w <- w - lr r_t m^ sqrt(1 - b2^t) / (sqrt(v) + eps)    where rho_t > 5, else    w <- w - lr m^

    It is Adam with another rate and another eps in every update, so that torch's fused Adam computes it: in a third of the time that its
    own RAdam takes. Adam adds its eps to sqrt(v) / sqrt(1 - b2^t); and beside an eps that is large enough v does not count. One t counts
    for all weights, and goes on over updates that are left out, as schedules do.
    """

    LARGE = 1e20
    """An eps beside which sqrt(v) is nothing."""

    def __init__(self, weights: Iterable[nn.Parameter], **settings: Any) -> None:
        super().__init__(weights, **settings)
        for group in self.param_groups:
            group["updates"] = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        given = [(group["lr"], group["eps"]) for group in self.param_groups]
        for group in self.param_groups:
            group["updates"] += 1
            group["lr"], group["eps"] = self._as_adam(group)
        super().step()
        for group, (rate, eps) in zip(self.param_groups, given):
            group["lr"], group["eps"] = rate, eps

    def _as_adam(self, group: dict[str, Any]) -> tuple[float, float]:
        """The rate and the eps with which Adam does this update."""
        beta, t = group["betas"][1], group["updates"]
        left, most = 1 - beta**t, 2 / (1 - beta) - 1
        rho = most - 2 * t * beta**t / left
        if rho <= 5:
            return group["lr"] * self.LARGE, self.LARGE
        rectified = math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
        return group["lr"] * rectified, group["eps"] / math.sqrt(left)


class Skipping(torch.optim.Optimizer):
    """A rule that, as torch's fused ones, can leave an update out and shrink gradients by what lies on the device; see `follow`."""

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    names: tuple[str, ...]
    """What is remembered of each weight, of its shape, at first 0."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight] = {name: torch.zeros_like(weight) for name in self.names}
            if weights:
                states = [[self.state[weight][name] for weight in weights] for name in self.names]
                self.update(weights, self._gradients(weights, group["weight_decay"]), states, group)

    def update(self, weights: list[Tensor], gradients: list[Tensor], states: list[list[Tensor]], group: dict[str, Any]) -> None:
        """The rule itself, which must move nothing where gradients are 0 and `kept` is 1."""
        raise NotImplementedError

    def _gradients(self, weights: list[Tensor], decay: float) -> list[Tensor]:
        """What to follow: 0 where the update is left out."""
        gradients = [cast(Tensor, weight.grad) for weight in weights]
        if self.grad_scale is not None:
            gradients = list(torch._foreach_div(gradients, self.grad_scale))
        if decay:
            gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
        return gradients if self.found_inf is None else [gradient.masked_fill(self.found_inf > 0, 0) for gradient in gradients]

    def kept(self, share: float, skipped: float = 1.0) -> Tensor | float:
        """A share, or `skipped` where the update is left out."""
        return share if self.found_inf is None else share * (1 - self.found_inf) + skipped * self.found_inf


class RMSProp(Skipping):
    """RMSProp with momentum, as torch has it: the momentum of gradients over their root mean square.

    square <- b square + (1 - b) g^2        speed <- a speed + g / (sqrt(square) + eps)        w <- w - lr speed
    """

    names = ("square", "speed")

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(weights, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, weights: list[Tensor], gradients: list[Tensor], states: list[list[Tensor]], group: dict[str, Any]) -> None:
        """All weights at once."""
        (a, b), (squares, speeds) = group["betas"], states
        torch._foreach_mul_(squares, self.kept(b))
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b)
        roots = list(torch._foreach_sqrt(squares))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(speeds, self.kept(a))
        torch._foreach_addcdiv_(speeds, gradients, roots)
        torch._foreach_add_(weights, torch._foreach_mul(speeds, self.kept(-group["lr"], 0.0)))


class CentredRMSProp(Skipping):
    """RMSProp of the gradient's deviation from its running mean, with eps inside the root (Graves 2013; Mnih et al. 2015).

        mean <- a mean + (1 - a) g        square <- b square + (1 - b) g^2        w <- w - lr g / sqrt(square - mean^2 + eps)

    torch's own centred RMSProp adds eps outside of the root, which at the paper's 0.01 is another rule.
    """

    names = ("mean", "square")

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(weights, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def update(self, weights: list[Tensor], gradients: list[Tensor], states: list[list[Tensor]], group: dict[str, Any]) -> None:
        """All weights at once."""
        (a, b), (means, squares) = group["betas"], states
        torch._foreach_mul_(means, self.kept(a))
        torch._foreach_add_(means, gradients, alpha=1 - a)
        torch._foreach_mul_(squares, self.kept(b))
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b)
        spread = list(torch._foreach_addcmul(squares, means, means, -1))
        torch._foreach_clamp_min_(spread, 0)  # rounding may leave less than nothing
        torch._foreach_add_(spread, group["eps"])
        torch._foreach_sqrt_(spread)
        torch._foreach_addcdiv_(weights, gradients, spread, -group["lr"])
