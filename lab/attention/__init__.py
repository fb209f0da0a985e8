"""Attention: where a model looks, from Bahdanau's scores to the masks of BigBird. One topic, one file.

Every kind is a module whose `forward` gives values and whose `weights`, called with the same arguments, gives how much each
query looks at each key; `recorded` collects the weights of all attention inside a model while it runs.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["Attention", "recorded"]


class Attention(nn.Module, ABC):
    """Weighs values by how well their keys fit a query."""

    @abstractmethod
    def weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """How much each query looks at each key: (N, queries, keys) or (N, heads, queries, keys).

        A row sums to 1, or to 0 where a query may look nowhere. It takes the arguments of `forward`, and leaves out dropout.
        """


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, every call of the model also notes the weights of each attention module inside, by its name, call by call.

    The weights are computed a second time for this, so `forward` can take whichever fast way never writes them down.
    """
    notes: dict[str, list[Tensor]] = {name: [] for name, module in model.named_modules() if isinstance(module, Attention)}

    def listener(name: str) -> Any:
        def note(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            notes[name].append(module.weights(*args, **kwargs).detach())

        return note

    # Before forward: a cache of keys must not hold the new ones yet.
    hooks = [model.get_submodule(name).register_forward_pre_hook(listener(name), with_kwargs=True) for name in notes]
    try:
        yield notes
    finally:
        for hook in hooks:
            hook.remove()
