"""Training one module on a labelled set of images, and opening it again: what generators and classifiers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lab import data, loading, runs, seeding
from lab.checkpoint import Checkpoint, Stateful
from lab.config import UserError
from lab.data import DataConfig, ImageSet, as_float
from lab.data.augment import augment
from lab.experiment import Every, Experiment
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.runs import Run
from lab.trainer import Trainer

M = TypeVar("M", bound=nn.Module)
Shape = tuple[int, int, int]
"""Channels, height and width of an image."""


@dataclass(frozen=True, kw_only=True)
class ImageExperiment(Experiment, ABC):
    """An experiment that trains a module on a set of images."""

    optimizer: OptimizerConfig
    data: DataConfig = DataConfig()

    @abstractmethod
    def network(self, shape: Shape, classes: tuple[str, ...]) -> nn.Module:
        """The untrained model."""

    def dataset(self) -> ImageSet:
        """The images to train and test on, on the CPU."""
        return data.load(self.data)

    def rebuild(self, facts: Mapping[str, Any]) -> nn.Module:
        """The model of a run whose weights are about to be loaded, from what its task noted down (`facts`)."""
        return self.network(tuple(facts["shape"]), tuple(facts["classes"]))


class ImageTask(ABC):
    """Training of one module on a set of images; a kind of model adds its loss and its preview."""

    def __init__(self, experiment: Any, trainer: Trainer) -> None:
        self.experiment = experiment
        self.data = experiment.dataset().to(trainer.world.device)
        self.facts: dict[str, Any] = {"shape": list(self.data.shape), "classes": list(self.data.classes)}
        torch.manual_seed(seeding.derive(trainer.config.seed, "weights", 0))
        self.model = self.build(trainer)
        self.learner = trainer.learner(self.model, experiment.optimizer)

    def build(self, trainer: Trainer) -> Any:
        """The module at the first step."""
        return self.experiment.network(self.data.shape, self.data.classes)

    @abstractmethod
    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """The mean loss over a shard, and metrics."""

    @abstractmethod
    def preview(self, trainer: Trainer) -> dict[str, float | int | str]:
        """Test scores and pictures of this moment."""

    def parts(self) -> Mapping[str, Stateful]:
        """The module, its optimiser and its average."""
        return self.learner.parts()

    def step(self, trainer: Trainer) -> Metrics:
        """One update."""
        return trainer.minimise(self.learner, self.loss, self.experiment.data.batch_size)

    def hooks(self, trainer: Trainer) -> Sequence[Every]:
        """Test scores and pictures, now and then."""
        return [Every(trainer.config.preview_every, lambda: self.preview(trainer))]

    def batch(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """A shard's images in [0, 1], (N, C, H, W), augmented if the settings say so, and labels, (N,)."""
        index = shard.indices(len(self.data.train))
        images, labels = as_float(self.data.train.images[index]), self.data.train.labels[index]
        config = self.experiment.data.augment
        return augment(images, config, shard.uniform("augment", 5)) if config.active else images, labels


# Opening it again


@dataclass(frozen=True)
class Trained(Generic[M]):
    """A trained module and where it comes from."""

    model: M
    experiment: Any
    run: Run
    step: int
    facts: Mapping[str, Any]
    """What was saved of its images: `shape`, `classes` and what else its task knows."""


def load_trained(name: str, families: Mapping[str, str], device: str | torch.device = "cpu") -> Trained[Any]:
    """The module of a run, with averaged weights where it has them.

    Args:
        name: a run folder, a checkpoint folder, or `latest`.
        families: kinds of experiments that it may be of, and their modules.

    Raises:
        UserError: no such run, or none of its checkpoints is whole.
    """
    found = runs.find(name, families)
    experiment = loading.settings_of(found.run, families)
    saved = loading.saved(found, ("model", "ema"))
    try:
        facts = saved.notes["facts"]
        model = experiment.rebuild(facts)
        model.load_state_dict(trained_weights(saved))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # somebody has changed one of them
        raise UserError(f"{found.run.folder}: its checkpoint and its config.yaml do not belong together ({_first(error)})") from None
    model.to(device=device, memory_format=torch.channels_last)  # where convolutions are faster, on a GPU and on a CPU in fp32
    return Trained(model.eval().requires_grad_(False), experiment, found.run, saved.step, facts)


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def trained_weights(saved: Checkpoint) -> dict[str, Tensor]:
    """The averaged weights where there are some, else the plain ones."""
    weights: dict[str, Tensor] = saved.parts["ema"]["module"] if "ema" in saved.parts else saved.parts["model"]
    return weights
