"""What all families share: the interface of a generator, training on a set of images, and loading a run.

Every family is one file with an `EXPERIMENT` (its default settings), whose `network` builds a `Generator`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lab import media
from lab.config import Count, Natural, Settings
from lab.data import ImageSet, Split, as_float
from lab.images import ImageExperiment, ImageTask, Shape, Trained, load_trained
from lab.trainer import Trainer

FAMILIES = {"autoencoder": "generative.autoencoder", "vae": "generative.vae"}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Settings):
    """How a generator is judged."""

    images: Count = 10_000
    """Images of the test set, evenly spaced; all where it has no more."""
    importance_samples: Count = 1000
    """K of the importance-sampled log-likelihood: time grows with it, the gap to the true value shrinks."""
    seed: Natural = 0
    """Seed of all that is drawn while judging."""


class Generator(ABC):
    """A model that makes images: what `sample.py`, `evaluate.py` and the studio take."""

    shape: Shape
    classes: tuple[str, ...]
    latent: int

    @property
    @abstractmethod
    def conditional(self) -> bool:
        """Whether sampling needs labels."""

    @abstractmethod
    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Codes (N, latent) of images (N, C, H, W) in [0, 1]."""

    @abstractmethod
    def decode(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of codes (N, latent)."""

    def codes(self, noise: Tensor) -> Tensor:
        """Codes (N, latent) of the model's prior, from standard normal noise (N, latent)."""
        return noise

    @abstractmethod
    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """Scores on the test set, `protocol` saying how they were taken."""

    def sample(self, count: int, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw images (count, C, H, W) in [0, 1]; labels (count,) matter to conditional models only."""
        noise = torch.randn(count, self.latent, generator=generator, device=generator.device)
        return self.decode(self.codes(noise.to(labels.device)), labels)

    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images after the way through the code and back."""
        return self.decode(self.encode(images, labels), labels)


class GeneratorModule(nn.Module, Generator):
    """A generator that is a torch module, as all of ours are."""


# Training


@dataclass(frozen=True, kw_only=True)
class GeneratorExperiment(ImageExperiment, ABC):
    """An experiment that trains a generator."""

    @abstractmethod
    def network(self, shape: Shape, classes: tuple[str, ...]) -> GeneratorModule:
        """The untrained model."""


class GeneratorTask(ImageTask):
    """Training of a generator; a family adds its loss and its test."""

    @abstractmethod
    def test(self, model: Any, images: int) -> dict[str, float]:
        """Scores of the judged model on some images of the test set."""

    @torch.no_grad()
    def preview(self, trainer: Trainer) -> dict[str, float | int | str]:
        """Test scores, a grid of samples from always the same noise, and a grid of test images above their reconstructions."""
        with self.learner.judged() as judged:
            model = cast(GeneratorModule, judged)
            labels = spread_labels(64, model.classes).to(trainer.world.device)
            samples = model.sample(64, labels, torch.Generator().manual_seed(0))
            scores = {f"eval/{name}": value for name, value in self.test(model, 2000).items()}
            pictures = trainer.picture("samples", media.grid(samples))
            return scores | pictures | trainer.picture("reconstructions", reconstructions(model, self.data))


def spread_labels(count: int, classes: Sequence[str]) -> Tensor:
    """Labels (count,) that go through all classes in turn."""
    return torch.arange(count) % max(1, len(classes))


def reconstructions(model: Generator, images: ImageSet, count: int = 32) -> Tensor:
    """One picture of test images, each above what the model makes of it."""
    chosen = images.test.spread(count)
    part = as_float(chosen.images)
    rebuilt = model.reconstruct(part, chosen.labels)
    rows = zip(part.split(8), rebuilt.split(8))
    return media.grid(torch.cat([row for pair in rows for row in pair]), columns=8)


# Judging


@torch.no_grad()
def neighbour_accuracy(model: Generator, images: ImageSet, neighbours: int = 5, limit: int = 10_000) -> dict[str, float]:
    """How well the code tells classes apart: accuracy of a k-nearest-neighbour vote among training codes, without training."""
    train, test = images.train.spread(limit), images.test.spread(limit)
    codes, queries = encode_all(model, train), encode_all(model, test)
    nearest = torch.cat([torch.cdist(part, codes).topk(min(neighbours, len(codes)), largest=False).indices for part in queries.split(1000)])
    votes = train.labels[nearest].mode(1).values
    return {"neighbour_accuracy": float((votes == test.labels).double().mean())}


def encode_all(model: Generator, split: Split, rows: int = 500) -> Tensor:
    """The codes of a whole split, (N, latent)."""
    pairs = zip(split.images.split(rows), split.labels.split(rows))
    return torch.cat([model.encode(as_float(images), labels) for images, labels in pairs])


# Loading

Loaded = Trained[GeneratorModule]


def load(name: str, device: str | torch.device = "cpu") -> Loaded:
    """The generator of a run: a run folder, a checkpoint folder, or `latest`."""
    return load_trained(name, FAMILIES, device)
