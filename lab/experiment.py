"""What an experiment is: frozen settings, and the task they describe, whose mathematics the trainer runs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from lab.checkpoint import Stateful
from lab.config import Count, Natural, Settings
from lab.learner import Metrics
from lab.tracking import TrackingConfig

if TYPE_CHECKING:
    from lab.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Settings):
    """Time, place and persistence of a run."""

    steps: Count = 10_000
    """Steps of the whole run."""
    seed: Natural = 0
    """Everything random follows from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Number format of matrix products and convolutions; weights, losses and averages are always fp32. auto: bf16 where it is native."""
    accumulate: Count = 1
    """Parts into which a batch is cut to save memory; the result is the same."""
    compile: bool = False
    """Compile models with torch.compile: a minute slower to start, then faster; needs a C++ compiler on a CPU."""
    threads: Natural = 0
    """CPU threads of each process; 0 shares all cores. Bit-exact repetition needs the same number."""
    deterministic: bool = False
    """Ask CUDA for repeatable kernels, at some speed; on a CPU runs are repeatable anyway."""
    log_every: Count = 50
    """Steps between rows of metrics; a row holds the mean over those steps."""
    preview_every: Count = 1000
    """Steps between previews: test metrics, and pictures in media/."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    keep: Count = 2
    """Checkpoints that are kept; at least 2, since the newest one could be damaged."""
    milestones: Natural = 10
    """Moments of training, evenly spaced, whose weights are kept for good, to see later how it went; 0: none."""
    max_skipped: Count = 10
    """Updates in a row that may be skipped for non-finite gradients before the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < 2:
            raise ValueError("keep: at least 2 checkpoints must be kept, since the newest one could be damaged")


@dataclass(frozen=True, kw_only=True)
class Experiment(Settings, ABC):
    """Settings of one kind of experiment, and the task they describe."""

    experiment: ClassVar[str]
    """The kind, as the first line of a config names it."""
    axes: ClassVar[Mapping[str, str]] = {"*": "step"}
    """Which metric each pattern of metrics is drawn over."""

    name: str
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name: expected letters, digits, '.', '_' and '-', since a folder is called so, found {self.name!r}")

    @abstractmethod
    def task(self, trainer: Trainer) -> Task:
        """The task that these settings describe."""


@dataclass(frozen=True)
class Every:
    """Something to do after every so many steps, and after the last one; it returns metrics for that step's row."""

    steps: int
    do: Callable[[], Mapping[str, float | int | str]]

    def due(self, step: int, last: int) -> bool:
        """Whether it is time, `step` steps being done."""
        return step % self.steps == 0 or step == last


class Task(Protocol):
    """The mathematics of an experiment."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a saved model needs besides its settings to be built again (shapes, class names), as JSON."""

    def parts(self) -> Mapping[str, Stateful]:
        """Everything a checkpoint must hold."""

    def step(self, trainer: Trainer) -> Metrics:
        """One update; returns metrics, which are averaged until the next row."""

    def hooks(self, trainer: Trainer) -> Sequence[Every]:
        """What to do now and then; only the main process does it."""
