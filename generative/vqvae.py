"""Vector-quantised autoencoders (van den Oord et al. 2017, arXiv:1711.00937): an image becomes a small map of tokens.

    encoder  x -> z, a vector for each of 7x7 places        token  k = argmin_j |z - e_j|        decoder  e_k -> image

    loss     -log p(x | e_k) + beta |z - sg(e_k)|^2          (equation 3; sg stops the gradient)

The choice of a code has no gradient, so the one that reaches e_k is handed straight through to z. The codebook e does not follow a
gradient either: each code is the running mean of the vectors that chose it (appendix A.1), and a code that nobody has chosen
for a while starts anew at a vector of the current batch (Dhariwal et al. 2020, Zeghidour et al. 2021). So it gets its first
values too: at the beginning all codes count as unused. Vectors and codes lie on the unit sphere, where none is out of
reach (Yu et al. 2022, arXiv:2110.04627).

What is told of a batch for the codebook adds up over its parts: cut into micro-batches or over processes it gives the same codes.
Sampling draws every token by itself, as often as it was used; that pictures fall apart so shows what a prior over all tokens together is
for, see tokens.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from generative.model import CodedGenerator, EvaluationConfig, GeneratorExperiment, GeneratorTask, neighbour_accuracy
from lab import seeding
from lab.backbones.layers import ConvNorm, normalisation
from lab.backbones.transformer import as_map, tokens_of
from lab.backbones.upsampling import ResizeConv
from lab.config import Count, Decay, NonNegative, Settings, UserError
from lab.data import ImageSet, as_float
from lab.experiment import TrainerConfig
from lab.images import Shape
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer

SHRINK = 4
"""Pixels a side that one token stands for."""


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(Settings):
    """The networks and the codebook."""

    channels: Count = 32
    """Channels of the maps at half the image size; those at a quarter of it have twice as many."""
    blocks: Count = 1
    """Residual blocks on each side of the codes."""
    codes: Count = 128
    """Codes in the codebook: what a token may be."""
    dimensions: Count = 32
    """Numbers of a code."""
    normalised: bool = True
    """Put vectors and codes on the unit sphere, so that only their direction counts."""
    decay: Decay = 0.99
    """Weight of the past in the running means that the codes are, per step."""
    commitment: NonNegative = 0.25
    """beta: weight of the squared distance between vector and code, summed over all places."""
    restart_after: Count = 20
    """Steps after which a code that no vector has chosen starts anew at one."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """Distance between image and rebuilt image, summed over pixels: cross-entropy of grey values in nats, or the squared error."""


@dataclass(frozen=True, kw_only=True)
class VQVAEExperiment(GeneratorExperiment):
    """Train a vector-quantised autoencoder."""

    experiment: ClassVar[str] = "vqvae"

    name: str = "vqvae"
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig = TrainerConfig(steps=3000)
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, schedule="cosine", warmup_steps=100, ema=0.995)
    model: VQVAEConfig = VQVAEConfig()

    def network(self, shape: Shape, classes: tuple[str, ...]) -> VQVAE:
        """The untrained model."""
        return VQVAE(self.model, shape, classes)

    def task(self, trainer: Trainer) -> VQVAETask:
        """Training by reconstruction."""
        return VQVAETask(self, trainer)


# The mathematics


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of how often each code is used, (K,): as many codes, used equally, would tell as much."""
    share = counts.double() / counts.sum()
    return torch.exp(torch.special.entr(share).sum())


def straight_through(vectors: Tensor, quantised: Tensor) -> Tensor:
    """The value of `quantised`, whose gradient goes to `vectors` as it is (section 3.2)."""
    return vectors + (quantised - vectors).detach()


class Quantiser(nn.Module):
    """The codebook: which code is nearest, and how codes follow the vectors that choose them."""

    codes: Tensor
    counts: Tensor
    sums: Tensor
    unused: Tensor

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("codes", self.on_sphere(torch.randn(config.codes, config.dimensions)))
        self.register_buffer("counts", torch.zeros(config.codes))
        self.register_buffer("sums", torch.zeros(config.codes, config.dimensions))
        self.register_buffer("unused", torch.full((config.codes,), config.restart_after))

    def on_sphere(self, vectors: Tensor) -> Tensor:
        """Vectors (..., D), in fp32, of length 1 if the settings say so."""
        return F.normalize(vectors.float(), dim=-1) if self.config.normalised else vectors.float()

    def nearest(self, vectors: Tensor) -> Tensor:
        """The token of each vector, (..., D) to int64 (...)."""
        with torch.autocast(vectors.device.type, enabled=False):
            # |z - e|^2 = |z|^2 - 2 z e + |e|^2, whose first term is the same for all codes.
            return (self.codes.square().sum(1) - 2 * vectors @ self.codes.T).argmin(-1)

    def statistics(self, vectors: Tensor, tokens: Tensor, picks: Tensor) -> Tensor:
        """What vectors (M, D) and their tokens (M,) tell of each code, (K, 1 + 2 D); that of a batch is the sum of its parts'.

        Args:
            picks: which vector each code would start anew at, int64 (K,); those outside 0 .. M - 1 lie in another part.

        Returns:
            How many vectors chose the code, their sum, and the vector that it would start anew at (0 if that one lies in another part).
        """
        chosen = (tokens[:, None] == torch.arange(self.config.codes, device=tokens.device)).float()  # one_hot looks at all tokens first
        here = (picks >= 0) & (picks < len(vectors))
        starts = vectors[picks.clamp(0, len(vectors) - 1)] * here[:, None]
        with torch.autocast(vectors.device.type, enabled=False):
            return torch.cat([chosen.sum(0)[:, None], chosen.T @ vectors, starts], 1)

    @torch.no_grad()
    def learn(self, statistics: Tensor) -> Metrics:
        """Move the codes by what the whole batch tells (equations 6 to 8), and start those anew that are out of use.

        Returns:
            The perplexity of the batch's tokens, and how many codes started anew.
        """
        counts, sums, starts = statistics.split([1, self.config.dimensions, self.config.dimensions], 1)
        counts = counts[:, 0]
        self.counts.lerp_(counts, 1 - self.config.decay)
        self.sums.lerp_(sums, 1 - self.config.decay)
        self.unused.add_(1).masked_fill_(counts > 0, 0)
        dead = self.unused >= self.config.restart_after
        self.counts.masked_fill_(dead, 1.0)
        self.sums.copy_(torch.where(dead[:, None], starts, self.sums))
        self.unused.masked_fill_(dead, 0)
        used = self.counts[:, None] > 1e-12  # one that was never chosen yet has no mean
        self.codes.copy_(torch.where(used, self.on_sphere(self.sums / self.counts[:, None].clamp_min(1e-12)), self.codes))
        return {"perplexity": perplexity(counts), "restarted": dead.double().sum()}


# The networks


class Residual(nn.Module):
    """x + f(x) with a 3x3 and a 1x1 convolution, as in the paper (section 4.1); groups are normalised before each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            normalisation("group", channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            normalisation("group", channels), nn.SiLU(), nn.Conv2d(channels, channels, 1),
        )  # fmt: skip

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) to maps."""
        joined: Tensor = maps + self.layers(maps)
        return joined


def encoder(config: VQVAEConfig, channels: int) -> nn.Sequential:
    """From images to a vector for each place, (N, C, H, W) to (N, D, H / 4, W / 4)."""
    width = config.channels
    return nn.Sequential(
        ConvNorm(channels, width, 3, 2, activation=nn.SiLU),
        ConvNorm(width, 2 * width, 3, 2, activation=nn.SiLU),
        *[Residual(2 * width) for _ in range(config.blocks)],
        nn.Conv2d(2 * width, config.dimensions, 1),
    )


def decoder(config: VQVAEConfig, channels: int) -> nn.Sequential:
    """From a vector for each place to logits of pixels; convolutions on resized maps leave no checkerboards (Odena et al. 2016)."""
    width = config.channels
    return nn.Sequential(
        ConvNorm(config.dimensions, 2 * width, 3, activation=nn.SiLU),
        *[Residual(2 * width) for _ in range(config.blocks)],
        ResizeConv(2 * width, width), normalisation("group", width), nn.SiLU(),
        ResizeConv(width, width // 2), normalisation("group", width // 2), nn.SiLU(),
        nn.Conv2d(width // 2, channels, 3, padding=1),
    )  # fmt: skip


class VQVAE(CodedGenerator):
    """Encoder, codebook and decoder. A code in the sense of a `CodedGenerator` is all of an image's quantised vectors, (N, places * D)."""

    def __init__(self, config: VQVAEConfig, shape: Shape, classes: tuple[str, ...]) -> None:
        """Raises:
        UserError: the image cannot be halved twice, or the channels not once.
        """
        super().__init__()
        channels, height, width = shape
        if height % SHRINK or width % SHRINK:
            raise UserError(f"a VQ-VAE halves an image twice; {height}x{width} is not a multiple of {SHRINK}, set data.image_size")
        if config.channels % 2:
            raise UserError(f"model.channels must be even, since the decoder's last maps have half of them; found {config.channels}")
        self.config, self.shape, self.classes = config, shape, classes
        self.grid = (height // SHRINK, width // SHRINK)
        self.latent = self.grid[0] * self.grid[1]
        self.encoder, self.decoder = encoder(config, channels), decoder(config, channels)
        self.quantiser = Quantiser(config)

    @property
    def conditional(self) -> bool:
        """It knows no labels."""
        return False

    def vectors(self, images: Tensor) -> Tensor:
        """The vector at each place before it is replaced by a code, row by row, fp32 (N, places, D)."""
        return self.quantiser.on_sphere(tokens_of(self.encoder(images)))

    def logits(self, vectors: Tensor) -> Tensor:
        """Logits of the pixels, fp32 (N, C, H, W), of a vector for each place, (N, places, D)."""
        decoded: Tensor = self.decoder(as_map(vectors, self.grid))
        return decoded.float()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the rebuilt images, the vectors (N, places, D), and their tokens (N, places)."""
        vectors = self.vectors(images)
        tokens = self.quantiser.nearest(vectors.detach())
        return self.logits(straight_through(vectors, self.quantiser.codes[tokens])), vectors, tokens

    # Tokens

    def tokens(self, images: Tensor) -> Tensor:
        """What an image is in tokens, row by row: (N, C, H, W) in [0, 1] to int64 (N, places)."""
        return self.quantiser.nearest(self.vectors(images))

    def render(self, tokens: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of tokens (N, places)."""
        return torch.sigmoid(self.logits(self.quantiser.codes[tokens]))

    # Generator

    def encode(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The quantised vectors of all places, (N, places * D)."""
        return self.quantiser.codes[self.tokens(images)].flatten(1)

    def decode(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of vectors (N, places * D), which need not be in the codebook."""
        return torch.sigmoid(self.logits(codes.unflatten(1, (self.latent, -1))))

    def codes(self, noise: Tensor) -> Tensor:
        """Vectors (N, places * D) of tokens drawn each by itself, with the shares in which training used them."""
        usage = self.quantiser.counts.double().cumsum(0)
        uniform = torch.special.ndtr(noise.double())
        tokens = torch.searchsorted(usage, uniform * usage[-1], right=True).clamp(max=self.config.codes - 1)
        return self.quantiser.codes[tokens].flatten(1)

    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """Squared error of test images, how the codes are used, and how well they tell classes apart."""
        scores: dict[str, float | str] = {"protocol": f"{data.name} test, {min(len(data.test), config.images)} images"}
        return scores | measured(self, as_float(data.test.spread(config.images).images)) | neighbour_accuracy(self, data)


@torch.no_grad()
def measured(model: VQVAE, images: Tensor, rows: int = 500) -> dict[str, float]:
    """Squared error per image and per pixel, perplexity of the tokens, and the share of the codes that are used at all."""
    tokens = torch.cat([model.tokens(part) for part in images.split(rows)])
    rebuilt = torch.cat([model.render(part) for part in tokens.split(rows)])
    error = float((images - rebuilt).double().square().flatten(1).sum(1).mean())
    counts = torch.bincount(tokens.flatten(), minlength=model.config.codes)
    return {
        "error": error,
        "error_per_pixel": error / images[0].numel(),
        "perplexity": float(perplexity(counts)),
        "used_codes": float((counts > 0).double().mean()),
    }


# Training


class VQVAETask(GeneratorTask):
    """Minimise distortion and commitment, and move the codes after every update."""

    experiment: VQVAEExperiment
    model: VQVAE

    def step(self, trainer: Trainer) -> Metrics:
        """One update of the networks and then of the codebook, by what all parts of the batch told of it together.

        The averaged model takes the codebook over with its next update.
        """
        self.told = torch.zeros(())
        metrics, quantiser = super().step(trainer), self.model.quantiser
        if trainer.world.size > 1:
            distributed.all_reduce(self.told)
        skipped, before = cast(Tensor, metrics["loss"]).isnan(), [buffer.clone() for buffer in quantiser.buffers()]
        learnt = quantiser.learn(self.told)
        for buffer, kept in zip(quantiser.buffers(), before):  # an update that was skipped moves no codes either
            buffer.copy_(torch.where(skipped, kept, buffer))
        return {**metrics, **{name: cast(Tensor, value).masked_fill(skipped, math.nan) for name, value in learnt.items()}}

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """Distortion and weighted commitment of a shard, per image (equation 3 without its second term)."""
        images, _ = self.batch(shard)
        logits, vectors, tokens = self.model(images)
        self.tell(shard, vectors.detach(), tokens)
        distortion = self.distortion(logits, images)
        commitment = (vectors - self.model.quantiser.codes[tokens]).square().sum((1, 2)).mean()
        loss = distortion + self.experiment.model.commitment * commitment
        return loss, {"distortion": distortion, "commitment": commitment}

    def distortion(self, logits: Tensor, images: Tensor) -> Tensor:
        """How far rebuilt images are from images, summed over pixels, on average."""
        if self.experiment.model.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1).sum(1).mean()
        return (images - torch.sigmoid(logits)).square().flatten(1).sum(1).mean()

    def tell(self, shard: Shard, vectors: Tensor, tokens: Tensor) -> None:
        """Add what a shard tells of the codebook; where codes start anew is drawn for the whole batch, as one process would."""
        places = self.model.latent
        generator = seeding.generator(shard.seed, "restart", shard.step)
        picks = torch.randint(shard.batch * places, (self.model.config.codes,), generator=generator) - shard.first * places
        told = self.model.quantiser.statistics(vectors.flatten(0, 1), tokens.flatten(), picks.to(vectors.device, non_blocking=True))
        self.told = self.told.to(told.device, non_blocking=True) + told

    def test(self, model: VQVAE, images: int) -> dict[str, float]:
        """The error and the use of the codes on some images of the test set."""
        return measured(model, as_float(self.data.test.spread(images).images))


EXPERIMENT = VQVAEExperiment()
