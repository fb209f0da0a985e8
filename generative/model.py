"""What all families share: the interface of a generator, training on a set of images, and loading a run.

Every family is one file with an `EXPERIMENT` (its default settings), whose `network` builds a `Generator`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lab import media
from lab.config import Count, Natural, NonNegative, Settings, UserError, leaves
from lab.data import ImageSet, Split, as_float
from lab.images import ImageExperiment, ImageTask, Shape, Trained, load_trained
from lab.trainer import Trainer

FAMILIES = {
    "autoencoder": "generative.autoencoder",
    "vae": "generative.vae",
    "vqvae": "generative.vqvae",
    "tokens": "generative.tokens",
    "gan": "generative.gan",
    "superresolution": "generative.superresolution",
    "flow": "generative.flow",
    "diffusion": "generative.diffusion",
    "distillation": "generative.distillation",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Settings):
    """How a generator is judged."""

    images: Count = 10_000
    """Images of the test set, evenly spaced; all where it has no more."""
    importance_samples: Count = 1000
    """K of the importance-sampled log-likelihood: time grows with it, the gap to the true value shrinks."""
    samples: Count = 10_000
    """Images drawn to be compared with real ones; distances depend on how many there are."""
    features: str = ""
    """Run of a classifier in whose eyes samples are compared with real images; empty: the one that comes with the set, if any does."""
    cas: bool = False
    """Classification accuracy score too: train a classifier on samples alone, and another one on as many real images."""
    seed: Natural = 0
    """Seed of all that is drawn while judging."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 50:
            raise ValueError(f"samples: nothing can be said of fewer than 50, found {self.samples}")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """How pictures are drawn. Every family knows some of this (its `knobs`); 0 or `auto` leaves a value to the model's own settings."""

    sampler: str = "auto"
    """Diffusion: the way from noise to picture, such as ddim or dpmpp; a wrong one gets the list."""
    steps: Natural = 0
    """Steps of the sampler (diffusion), or rounds in which all tokens are filled in (masked tokens)."""
    guidance: NonNegative = 0.0
    """Weight of the class (classifier-free guidance); 1: as learnt, above: clearer and less varied."""
    temperature: NonNegative = 0.0
    """Below 1: likelier and less varied pictures."""
    top_k: Natural = 0
    """Draw each token from so many of the likeliest only."""

    def check(self, model: Generator) -> None:
        """Refuse what the model does not know.

        Raises:
            UserError: names it, and what the model knows.
        """
        given = [name for name, value in leaves(self).items() if value != leaves(SamplingConfig())[name]]
        known = [name for name in leaves(self) if name in model.knobs]
        if unknown := [name for name in given if name not in known]:
            these, those = (" ".join(f"--{name.replace('_', '-')}" for name in names) for names in (unknown, known))
            raise UserError(f"{these}: this model does not know that; of the settings for sampling it knows {those or 'none'}")


class Generator(nn.Module, ABC):
    """A model that makes images of noise: what `sample.py`, `evaluate.py` and the studio take."""

    shape: Shape
    classes: tuple[str, ...]
    latent: int
    """Standard normal numbers that an image is made of."""
    knobs: ClassVar[frozenset[str]] = frozenset()
    """Which fields of a `SamplingConfig` it knows."""

    @property
    @abstractmethod
    def conditional(self) -> bool:
        """Whether sampling needs labels."""

    @abstractmethod
    def generate(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of noise (N, latent) and labels (N,), which matter to conditional models only.

        Args:
            generator: of what else is drawn on the way, by families whose way is random.
        """

    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """What only this family can tell of the test set, such as a likelihood; `protocol` says how it was taken."""
        return {}

    def sample(self, count: int, labels: Tensor, generator: torch.Generator, how: SamplingConfig = SamplingConfig()) -> Tensor:
        """Draw images (count, C, H, W) in [0, 1] for labels (count,), some hundred at a time; the same generator draws the same."""
        noise = torch.randn(count, self.latent, generator=generator, device=generator.device).to(labels.device)
        return self.generate_all(noise, labels, how, generator)

    def generate_all(
        self,
        noise: Tensor,
        labels: Tensor,
        how: SamplingConfig = SamplingConfig(),
        generator: torch.Generator | None = None,
        rows: int = 500,
    ) -> Tensor:
        """As `generate`, `rows` images at a time."""
        parts = zip(noise.split(rows), labels.split(rows))
        return torch.cat([self.generate(part, part_labels, how, generator) for part, part_labels in parts])


class CodedGenerator(Generator):
    """A generator with a way back, from images to codes: an autoencoder, a flow, a diffusion model without chance on its way."""

    exact: ClassVar[bool] = False
    """Whether an image comes back as it was, so that there is nothing to see in reconstructions."""

    @abstractmethod
    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Codes (N, latent) of images (N, C, H, W) in [0, 1]."""

    @abstractmethod
    def decode(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of codes (N, latent)."""

    def codes(self, noise: Tensor) -> Tensor:
        """Codes (N, latent) of the model's prior, from standard normal noise (N, latent)."""
        return noise

    def generate(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        """Images of the codes that the prior makes of noise."""
        return self.decode(self.codes(noise), labels)

    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images after the way through the code and back."""
        return self.decode(self.encode(images, labels), labels)


# Training


@dataclass(frozen=True, kw_only=True)
class GeneratorExperiment(ImageExperiment, ABC):
    """An experiment that trains a generator."""

    @abstractmethod
    def network(self, shape: Shape, classes: tuple[str, ...]) -> Generator:
        """The untrained model."""


class GeneratorTask(ImageTask):
    """Training of a generator; a family adds its loss and its test."""

    @abstractmethod
    def test(self, model: Any, images: int) -> dict[str, float]:
        """Scores of the judged model on some images of the test set."""

    @torch.no_grad()
    def preview(self, trainer: Trainer) -> dict[str, float | int | str]:
        """Test scores, a grid of samples from always the same noise and, of what encodes, test images above their reconstructions."""
        with self.learner.judged() as judged:
            model = cast(Generator, judged)
            labels = spread_labels(64, model.classes).to(trainer.world.device)
            samples = model.sample(64, labels, torch.Generator().manual_seed(0))
            scores = {f"eval/{name}": value for name, value in self.test(model, 2000).items()}
            row = scores | trainer.picture("samples", media.grid(samples))
            if isinstance(model, CodedGenerator) and not model.exact:
                row |= trainer.picture("reconstructions", reconstructions(model, self.data))
            return row


def spread_labels(count: int, classes: Sequence[str]) -> Tensor:
    """Labels (count,) that go through all classes in turn."""
    return torch.arange(count) % max(1, len(classes))


def reconstructions(model: CodedGenerator, images: ImageSet, count: int = 32) -> Tensor:
    """One picture of test images, each above what the model makes of it."""
    chosen = images.test.spread(count)
    part = as_float(chosen.images)
    return media.above(part, model.reconstruct(part, chosen.labels))


# Judging


@torch.no_grad()
def neighbour_accuracy(model: CodedGenerator, images: ImageSet, neighbours: int = 5, limit: int = 10_000) -> dict[str, float]:
    """How well the code tells classes apart: accuracy of a k-nearest-neighbour vote among training codes, without training."""
    train, test = images.train.spread(limit), images.test.spread(limit)
    codes, queries = encode_all(model, train), encode_all(model, test)
    nearest = torch.cat([torch.cdist(part, codes).topk(min(neighbours, len(codes)), largest=False).indices for part in queries.split(1000)])
    votes = train.labels[nearest].mode(1).values
    return {"neighbour_accuracy": float((votes == test.labels).double().mean())}


def encode_all(model: CodedGenerator, split: Split, rows: int = 500) -> Tensor:
    """The codes of a whole split, (N, latent)."""
    pairs = zip(split.images.split(rows), split.labels.split(rows))
    return torch.cat([model.encode(as_float(images), labels) for images, labels in pairs])


# Loading

Loaded = Trained[Generator]


def load(name: str, device: str | torch.device = "cpu") -> Loaded:
    """The generator of a run: a run folder, a checkpoint folder, or `latest`."""
    return load_trained(name, FAMILIES, device)
