"""Autoencoders: squeeze an image into a short code and rebuild it (Hinton & Salakhutdinov 2006).

A denoising one (Vincent et al. 2008) sees a damaged image and must rebuild the clean one, so it cannot just copy. The
squared error is summed over pixels and averaged over the batch. An autoencoder has no prior of its own; to sample from it,
a Gaussian is laid over the codes of the training set after training (ex-post density estimation, Ghosh et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from generative.model import (
    CodedGenerator,
    EvaluationConfig,
    GeneratorExperiment,
    GeneratorTask,
    encode_all,
    neighbour_accuracy,
)
from generative.networks import Decoder, Encoder, NetworkConfig
from lab import seeding
from lab.config import Count, NonNegative, Settings
from lab.data import ImageSet, Split, as_float
from lab.experiment import TrainerConfig
from lab.images import Shape
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Settings):
    """The model and the damage it learns to mend."""

    latent: Count = 32
    """Numbers in the code; 2 makes a plane that can be drawn."""
    network: NetworkConfig = NetworkConfig()
    corruption: Literal["none", "gaussian", "mask"] = "none"
    """What is done to the input while training: nothing, normal noise added, or pixels set to black."""
    strength: NonNegative = 0.3
    """Standard deviation of the noise (1 is the whole grey range), or the part of the pixels that is masked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.corruption == "mask" and self.strength >= 1:
            raise ValueError("strength: with corruption 'mask' it is a part of the pixels and must be below 1")


@dataclass(frozen=True, kw_only=True)
class AutoencoderExperiment(GeneratorExperiment):
    """Train an autoencoder."""

    experiment: ClassVar[str] = "autoencoder"

    name: str = "autoencoder"
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig = TrainerConfig(steps=10_000)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=200, ema=0.999)
    model: AutoencoderConfig = AutoencoderConfig()

    def network(self, shape: Shape, classes: tuple[str, ...]) -> Autoencoder:
        """The untrained model."""
        return Autoencoder(self.model, shape, classes)

    def task(self, trainer: Trainer) -> AutoencoderTask:
        """Training by reconstruction."""
        return AutoencoderTask(self, trainer)


# The mathematics


def squared_error(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Squared error summed over channels and pixels, (N,)."""
    return (images - rebuilt).square().flatten(1).sum(1)


def corrupt(images: Tensor, noise: Tensor, kind: str, strength: float) -> Tensor:
    """Damage images (N, C, H, W): add normal noise, or set to black each pixel whose normal noise is among the lowest `strength`."""
    if kind == "gaussian":
        return images + strength * noise
    if kind == "mask":
        return images.masked_fill(torch.special.ndtr(noise[:, :1]) < strength, 0.0)
    return images


class Autoencoder(CodedGenerator):
    """Encoder and decoder, and the Gaussian over codes that sampling draws from."""

    mean: Tensor
    factor: Tensor

    def __init__(self, config: AutoencoderConfig, shape: Shape, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.shape, self.classes, self.latent = config, shape, classes, config.latent
        self.encoder = Encoder(config.network, shape, 0, config.latent)
        self.decoder = Decoder(config.network, shape, 0, config.latent)
        self.register_buffer("mean", torch.zeros(config.latent))
        self.register_buffer("factor", torch.eye(config.latent))

    @property
    def conditional(self) -> bool:
        """Autoencoders know no labels."""
        return False

    def forward(self, images: Tensor) -> Tensor:
        """Rebuilt images (N, C, H, W), in [0, 1]."""
        decoded: Tensor = self.decoder(self.encoder(images))
        return torch.sigmoid(decoded.float())

    def encode(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Codes (N, latent)."""
        codes: Tensor = self.encoder(images).float()
        return codes

    def decode(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) in [0, 1]."""
        decoded: Tensor = self.decoder(codes)
        return torch.sigmoid(decoded.float())

    def codes(self, noise: Tensor) -> Tensor:
        """Codes of the Gaussian laid over the training set's codes, from standard normal noise."""
        return self.mean + noise @ self.factor.T

    @torch.no_grad()
    def fit_codes(self, split: Split, limit: int = 10_000) -> None:
        """Lay the Gaussian over the codes of a split, or of `limit` of its images."""
        codes = encode_all(self, split.spread(limit)).double()
        # A code dimension that never moves would make the covariance singular.
        covariance = torch.cov(codes.T).reshape(self.latent, self.latent) + 1e-6 * torch.eye(self.latent, device=codes.device)
        self.mean.copy_(codes.mean(0))
        self.factor.copy_(torch.linalg.cholesky(covariance))

    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """Squared error of test images, and how well the code tells classes apart."""
        scores: dict[str, float | str] = {"protocol": f"{data.name} test, {min(len(data.test), config.images)} images, seed {config.seed}"}
        return scores | measured_errors(self, data.test, config) | neighbour_accuracy(self, data)


@torch.no_grad()
def measured_errors(model: Autoencoder, split: Split, config: EvaluationConfig, rows: int = 500) -> dict[str, float]:
    """Mean squared error per image and per pixel; for a denoising model also that of damaged images."""
    images, damage = as_float(split.spread(config.images).images), model.config
    scores = {"error": _error(model, images, images, rows)}
    scores["error_per_pixel"] = scores["error"] / images[0].numel()
    if damage.corruption != "none":
        noise = torch.randn(images.shape, generator=seeding.generator(config.seed, "judge/corruption", 0)).to(images.device)
        damaged = corrupt(images, noise, damage.corruption, damage.strength)
        scores |= {"denoised_error": _error(model, damaged, images, rows), "damaged_error": float(squared_error(damaged, images).mean())}
    return scores


def _error(model: Autoencoder, inputs: Tensor, targets: Tensor, rows: int) -> float:
    errors = [squared_error(model(x), y) for x, y in zip(inputs.split(rows), targets.split(rows))]
    return float(torch.cat(errors).double().mean())


# Training


class AutoencoderTask(GeneratorTask):
    """Minimise the squared error on the training set."""

    experiment: AutoencoderExperiment
    model: Autoencoder

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """The mean squared error of a shard."""
        config = self.experiment.model
        images, _ = self.batch(shard)
        damaged = images
        if config.corruption != "none":
            damaged = corrupt(images, shard.normal("corruption", *images.shape[1:]), config.corruption, config.strength)
        return squared_error(images, self.model(damaged)).mean(), {}

    def test(self, model: Autoencoder, images: int) -> dict[str, float]:
        """The error on some images of the test set."""
        return measured_errors(model, self.data.test, EvaluationConfig(images=images))

    def preview(self, trainer: Trainer) -> dict[str, float | int | str]:
        """As for every family, after laying the Gaussian over the codes of the moment."""
        with self.learner.judged() as judged:
            average = cast(Autoencoder, judged)
            average.fit_codes(self.data.train)
        # The average takes its buffers from the model at every update, so both must have them.
        self.model.mean.copy_(average.mean)
        self.model.factor.copy_(average.factor)
        return super().preview(trainer)


EXPERIMENT = AutoencoderExperiment()
