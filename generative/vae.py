"""Variational autoencoders (Kingma & Welling 2014), and what grew from them.

    encoder  q(z|x) = N(mean(x), std(x)^2)        decoder  p(x|z), Bernoulli or Gaussian        prior  p(z) = N(0, 1)

    bound    log p(x) >= E_q[log p(x|z)] - KL(q(z|x) || p(z))                                   (the evidence lower bound, ELBO)

Settings turn it into a beta-VAE (Higgins et al. 2017), one with free bits (Kingma et al. 2016) or KL warm-up (Sonderby et
al. 2016), a conditional VAE (Sohn et al. 2015) or an importance-weighted autoencoder (Burda et al. 2016). All terms are in
nats, summed over pixels and latent dimensions and averaged over the batch; averaging over pixels instead would multiply
beta by their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generative.model import CodedGenerator, EvaluationConfig, GeneratorExperiment, GeneratorTask, neighbour_accuracy
from generative.networks import Decoder, Encoder, NetworkConfig
from lab import seeding
from lab.config import Count, Natural, NonNegative, Settings
from lab.data import ImageSet, Split, as_float
from lab.experiment import TrainerConfig
from lab.images import Shape
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.recorder import track
from lab.trainer import Trainer

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Settings):
    """The model and its bound."""

    latent: Count = 32
    """Dimensions of the code; 2 makes a plane that can be drawn."""
    network: NetworkConfig = NetworkConfig()
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """Distribution of a pixel: black or white, or a grey value around a mean."""
    binarisation: Literal["dynamic", "fixed", "none"] = "dynamic"
    """Bernoulli: draw black or white from each grey value anew at every visit, or once for all, or take grey values as they are."""
    sigma: NonNegative = 0.0
    """Gaussian: standard deviation of a pixel, in units of the whole grey range; 0: one that is learned."""
    conditional: bool = False
    """Tell encoder and decoder the class of the image."""
    beta: NonNegative = 1.0
    """Weight of the KL term; above 1 for codes that are independent of each other."""
    warmup_steps: Natural = 0
    """Steps over which the weight of the KL term climbs from 0."""
    free_bits: NonNegative = 0.0
    """Nats of KL per latent dimension that cost nothing."""
    importance_samples: Count = 1
    """K of the importance-weighted bound; 1: the ELBO with its KL in closed form."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_samples > 1 and (self.beta, self.warmup_steps, self.free_bits) != (1, 0, 0):
            raise ValueError("importance_samples above 1 has no KL term to weigh: leave beta 1, warmup_steps 0 and free_bits 0")


@dataclass(frozen=True, kw_only=True)
class VAEExperiment(GeneratorExperiment):
    """Train a variational autoencoder."""

    experiment: ClassVar[str] = "vae"

    name: str = "vae"
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig = TrainerConfig(steps=20_000)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=200, ema=0.999, clip_norm=200.0)
    model: VAEConfig = VAEConfig()

    def network(self, shape: Shape, classes: tuple[str, ...]) -> VAE:
        """The untrained model."""
        return VAE(self.model, shape, classes)

    def dataset(self) -> ImageSet:
        """The images; binarised here where that happens once for all."""
        data = super().dataset()
        if self.model.likelihood == "gaussian" or self.model.binarisation != "fixed":
            return data
        return replace(data, train=binarised_once(data.train, "train"), test=binarised_once(data.test, "test"))

    def task(self, trainer: Trainer) -> VAETask:
        """Training by the bound."""
        return VAETask(self, trainer)


# The mathematics


def kl_to_standard_normal(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of each dimension, in nats (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean**2 + torch.exp(2 * log_std) - 1) - log_std


def log_normal(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; mean, std^2) of each element."""
    return -0.5 * ((x - mean) * torch.exp(-log_std)) ** 2 - log_std - 0.5 * LOG_2PI


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log Bernoulli(x; sigmoid(logits)) summed over all but the first dimension, (N,); x may be grey."""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def importance_weighted(log_weights: Tensor) -> Tensor:
    """log of the mean of K importance weights p(x, z) / q(z|x), (K, N) -> (N,) (Burda et al. 2016, equation 8)."""
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))


def binarise(images: Tensor, uniform: Tensor) -> Tensor:
    """Black or white pixels, white with the grey value as probability."""
    return (uniform < images).to(images.dtype)


def binarised_once(split: Split, stream: str) -> Split:
    """A set made black and white by one draw that no setting changes, not even the seed."""
    uniform = torch.rand(split.images.shape, generator=seeding.generator(0, f"fixed/{stream}", 0))
    white = binarise(as_float(split.images), uniform.to(split.images.device))
    return replace(split, images=white.mul(255).to(torch.uint8))


def dequantise(images: Tensor, uniform: Tensor) -> Tensor:
    """Grey values k/255 spread evenly over [k/256, (k+1)/256), so that a density over them means something."""
    return (images * 255 + uniform) / 256


class VAE(CodedGenerator):
    """Encoder, decoder and the pixels' distribution."""

    def __init__(self, config: VAEConfig, shape: Shape, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.shape, self.classes, self.latent = config, shape, classes, config.latent
        known = len(classes) if config.conditional else 0
        self.encoder = Encoder(config.network, shape, known, 2 * config.latent)
        self.decoder = Decoder(config.network, shape, known, config.latent)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(config.sigma or 0.2)), requires_grad=config.sigma == 0)
        if config.likelihood == "bernoulli":
            self.log_sigma.requires_grad_(False)

    @property
    def conditional(self) -> bool:
        """Whether sampling needs labels."""
        return self.config.conditional

    def posterior(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z|x), (N, latent) each, in fp32."""
        mean, log_std = self.encoder(x, labels).float().chunk(2, 1)
        return mean, log_std

    def log_likelihood(self, x: Tensor, decoded: Tensor) -> Tensor:
        """log p(x|z) of whole images, (N,), given what the decoder made of z."""
        if self.config.likelihood == "bernoulli":
            return log_bernoulli(x, decoded.float())
        return log_normal(x, decoded.float(), self.log_sigma).flatten(1).sum(1)

    def forward(self, x: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Terms of the bound with one sample: log p(x|z), (N,), and the KL of each latent dimension, (N, latent)."""
        mean, log_std = self.posterior(x, labels)
        decoded = self.decoder(mean + torch.exp(log_std) * noise, labels)
        return self.log_likelihood(x, decoded), kl_to_standard_normal(mean, log_std)

    def log_weights(self, x: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """log p(x, z) - log q(z|x) for K samples, (K, N), from noise (K, N, latent)."""
        mean, log_std = self.posterior(x, labels)
        codes = mean + torch.exp(log_std) * noise
        count, rows = noise.shape[:2]
        decoded = self.decoder(codes.flatten(0, 1), labels.repeat(count))
        likelihood = self.log_likelihood(x.repeat(count, 1, 1, 1), decoded).view(count, rows)
        # log p(z) - log q(z|x), with z = mean + std * noise put into both densities.
        return likelihood + (0.5 * (noise**2 - codes**2) + log_std).sum(2)

    def observe(self, images: Tensor, uniform: Tensor) -> Tensor:
        """What the model sees of images in [0, 1]: black and white, grey, or dequantised."""
        if self.config.likelihood == "gaussian":
            return dequantise(images, uniform)
        return images if self.config.binarisation == "none" else binarise(images, uniform)

    # Generator

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Means of the codes, (N, latent)."""
        return self.posterior(images, labels)[0]

    def decode(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Mean images of the pixels' distributions, in [0, 1]."""
        decoded: Tensor = self.decoder(codes, labels)
        return torch.sigmoid(decoded) if self.config.likelihood == "bernoulli" else decoded.clamp(0, 1)

    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """Test bound and importance-sampled log-likelihood, in nats per image, with their protocol."""
        x, labels = observed(self, data.test, config)
        pixels = f"{self.config.binarisation} binarisation" if self.config.likelihood == "bernoulli" else "uniform dequantisation"
        protocol = f"{data.name} test, {len(x)} images, {pixels}, K={config.importance_samples}, seed {config.seed}"
        scores: dict[str, float | str] = {"protocol": protocol}
        scores |= measured_bound(self, x, labels, config.seed)
        scores["nll"] = nll = importance_sampled_nll(self, x, labels, config.importance_samples, config.seed)
        if self.config.likelihood == "gaussian":
            scores["bits_per_dim"] = nll / math.log(2) / math.prod(self.shape)
        return scores | neighbour_accuracy(self, data)


# Judging


def observed(model: VAE, split: Split, config: EvaluationConfig) -> tuple[Tensor, Tensor]:
    """`config.images` images as the model sees them, (N, C, H, W), and their labels; the same at every call."""
    chosen = split.spread(config.images)
    images = as_float(chosen.images)
    return model.observe(images, _draw(torch.rand, config.seed, "pixels", 0, images)), chosen.labels


@torch.no_grad()
def measured_bound(model: VAE, x: Tensor, labels: Tensor, seed: int, rows: int = 500) -> dict[str, float]:
    """The negative ELBO in nats, its two terms, and how many latent dimensions are in use (KL above 0.01 nats)."""
    distortion, kl = 0.0, torch.zeros(model.latent, dtype=torch.float64, device=x.device)
    for index, (part, part_labels) in enumerate(zip(x.split(rows), labels.split(rows))):
        likelihood, divergence = model(part, part_labels, _draw(torch.randn, seed, "codes", index, part, model.latent))
        distortion -= float(likelihood.double().sum())
        kl += divergence.double().sum(0)
    distortion, kl = distortion / len(x), kl / len(x)
    rate = float(kl.sum())
    return {"bound": distortion + rate, "distortion": distortion, "kl": rate, "active_units": int((kl > 0.01).sum())}


@torch.no_grad()
def importance_sampled_nll(model: VAE, x: Tensor, labels: Tensor, samples: int, seed: int, rows: int = 50, chunk: int = 100) -> float:
    """-log p(x) in nats per image, from `samples` draws of q(z|x) for each image (Burda et al. 2016, section 5).

    The estimate lies above the true value on average, and comes down to it as the number of samples grows.
    """
    total = 0.0
    for index, (part, part_labels) in enumerate(track(zip(x.split(rows), labels.split(rows)), len(x) // rows, f"nll, K={samples}")):
        noise = [
            _draw(torch.randn, seed, f"importance/{start}", index, part, min(chunk, samples - start), model.latent).movedim(1, 0)
            for start in range(0, samples, chunk)
        ]
        weights = torch.cat([model.log_weights(part, part_labels, piece) for piece in noise])
        total -= float(importance_weighted(weights.double()).sum())
    return total / len(x)


def _draw(kind: Callable[..., Tensor], seed: int, stream: str, index: int, like: Tensor, *shape: int) -> Tensor:
    """Numbers for judging, a row for each row of `like`; drawn on the CPU, so that every device judges alike."""
    numbers = kind((len(like), *(shape or like.shape[1:])), generator=seeding.generator(seed, f"judge/{stream}", index))
    return numbers.to(like.device)


# Training


class VAETask(GeneratorTask):
    """Maximise the bound on the training set."""

    experiment: VAEExperiment
    model: VAE

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """The negative bound of a shard, weighted as the settings say."""
        config = self.experiment.model
        images, labels = self.batch(shard)
        x = self.model.observe(images, shard.uniform("pixels", *images.shape[1:]))
        if config.importance_samples > 1:
            noise = shard.normal("codes", config.importance_samples, config.latent).movedim(1, 0)
            return -importance_weighted(self.model.log_weights(x, labels, noise)).mean(), {}
        likelihood, kl = self.model(x, labels, shard.normal("codes", config.latent))
        distortion, kl = -likelihood.mean(), kl.mean(0)
        loss = distortion + self.beta(shard.step) * kl.clamp(min=config.free_bits).sum()
        return loss, {"distortion": distortion, "kl": kl.sum()}

    def beta(self, step: int) -> float:
        """The weight of the KL term at a step."""
        config = self.experiment.model
        return config.beta * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else config.beta

    def test(self, model: VAE, images: int) -> dict[str, float]:
        """The bound on some images of the test set."""
        config = EvaluationConfig(images=images)
        return measured_bound(model, *observed(model, self.data.test, config), config.seed)


EXPERIMENT = VAEExperiment()
