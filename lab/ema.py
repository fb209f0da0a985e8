"""Averaged weights: the model that is sampled and judged."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """An exponential moving average of a module's parameters; its buffers are copied as they are.

    The decay warms up as 1 - (1 + t)^-power (Crowson's rule, as in timm), so early averages are not dominated by the
    initial weights. diffusers' EMAModel leaves buffers out, which breaks models with BatchNorm; this one does not.
    """

    def __init__(self, module: nn.Module, decay: float, power: float = 0.75) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.power, self.updates = decay, power, 0
        # Listed once: walking a module's tree at every step costs more than averaging a small one.
        self._weights: tuple[list[Tensor], list[Tensor]] = list(self.module.parameters()), list(module.parameters())
        self._buffers = list(zip(self.module.buffers(), module.buffers(), strict=True))

    def decay_at(self, update: int) -> float:
        """The weight of the old average in update number `update`, which counts from 0."""
        return float(min(self.decay, 1 - (1 + update) ** -self.power))

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Move the average one update towards the module it was made for.

        Args:
            skip: 1 where the module was not updated, so that the average stays too, float32 () on their device; the warm-up goes on.
        """
        average, current = self._weights
        share = 1 - self.decay_at(self.updates)
        if skip is None:
            torch._foreach_lerp_(average, current, share)
        else:
            torch._foreach_lerp_(average, current, [share * (1 - skip)] * len(average))
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
