"""Generative adversarial networks (Goodfellow et al. 2014): one network draws, another judges, and each learns from the other.

    G(z, y)   an image of noise z and class y        D(x, y)   a number, the higher the more the image x looks real (the critic)

    kind         loss of D, minimised                                 loss of G                      paper
    hinge        relu(1 - D(x)) + relu(1 + D(G(z)))                   -D(G(z))                       Miyato et al. 2018 (SNGAN)
    dcgan        softplus(-D(x)) + softplus(D(G(z)))                  softplus(-D(G(z)))             Radford et al. 2016
    wgan_gp      D(G(z)) - D(x) + w (|grad D(x')| - 1)^2              -D(G(z))                       Gulrajani et al. 2017
    r3gan        softplus(D(G(z)) - D(x))                             softplus(D(x) - D(G(z)))       Huang et al. 2024
                   + w/2 (|grad D(x)|^2 + |grad D(G(z))|^2)

All are means over the batch; x' lies evenly drawn between a real image and a drawn one. Spectral normalisation keeps the slope
of every layer of the hinge critic at 1; the penalties do that for the other two; DCGAN has batch normalisation in both networks
and nothing else. Only G is sampled and judged: a checkpoint holds both, so that training goes on exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import ParametrizationList

from generative.model import Generator, GeneratorExperiment, GeneratorTask, SamplingConfig
from lab import backbones, seeding
from lab.backbones.unet import zero
from lab.backbones.upsampling import PixelShuffleConv, ResizeConv
from lab.checkpoint import Stateful
from lab.config import Count, NonNegative, Settings, UserError
from lab.experiment import TrainerConfig
from lab.images import Shape
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer

Kind = Literal["hinge", "dcgan", "wgan_gp", "r3gan"]
PENALISED = ("wgan_gp", "r3gan")


@dataclass(frozen=True, kw_only=True)
class GANConfig(Settings):
    """The two networks and their game."""

    kind: Kind = "hinge"
    """Losses, and how the critic is kept smooth: spectral normalisation, batch normalisation or a penalty on its gradient."""
    latent: Count = 64
    """Standard normal numbers that an image is made of."""
    channels: Count = 48
    """Channels of both networks' maps at half the image's size (a multiple of 4); twice as many at a quarter of it (7x7)."""
    conditional: bool = True
    """Tell both networks the class of the image."""
    critic: str = ""
    """A backbone, by name, that judges in place of the critic of this file."""
    critic_steps: Count = 1
    """Updates of the critic for each one of the generator; each of them sees other images."""
    penalty: NonNegative = 10.0
    """wgan_gp, r3gan: weight of the penalty on the critic's gradient (lambda, gamma); images have values from -1 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % 4:
            raise ValueError(f"channels must be a multiple of 4, since maps of full size have a quarter as many; found {self.channels}")


@dataclass(frozen=True, kw_only=True)
class GANExperiment(GeneratorExperiment):
    """Train a generative adversarial network."""

    experiment: ClassVar[str] = "gan"

    name: str = "gan"
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig = TrainerConfig(steps=10_000)
    optimizer: OptimizerConfig = OptimizerConfig(kind="adam", lr=1e-3, betas=(0.0, 0.9), schedule="linear", ema=0.999)
    critic_optimizer: OptimizerConfig = OptimizerConfig(kind="adam", lr=2e-3, betas=(0.0, 0.9), schedule="linear")
    model: GANConfig = GANConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_optimizer.ema:
            raise ValueError("critic_optimizer.ema: nobody samples from the critic; set optimizer.ema, the generator's, and leave this 0")
        if self.trainer.compile and self.model.kind in PENALISED:
            raise ValueError(f"trainer.compile: {self.model.kind} needs gradients of gradients, which torch.compile lacks; leave it false")

    def network(self, shape: Shape, classes: tuple[str, ...]) -> GAN:
        """The untrained generator."""
        return GAN(self.model, shape, classes)

    def task(self, trainer: Trainer) -> GANTask:
        """Training of two networks in turn."""
        return GANTask(self, trainer)


# Losses: of scores (N,), D(x) of real images and D(G(z)) of drawn ones


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss of Lim & Ye 2017 and Miyato et al. 2018, equation 16: what is told apart clearly costs nothing."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss of Goodfellow et al. 2014, equation 1: -log s(D(x)) - log(1 - s(D(G(z)))) with the logistic function s."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss of Arjovsky et al. 2017; with slopes of at most 1 its least value is minus the Wasserstein distance."""
    return fake.mean() - real.mean()


def relativistic(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss of Jolicoeur-Martineau 2019, RpGAN: each real image against the drawn one of its row."""
    return F.softplus(fake - real).mean()


CRITIC_LOSSES = {"hinge": hinge, "dcgan": cross_entropy, "wgan_gp": wasserstein, "r3gan": relativistic}


def generator_loss(kind: Kind, real: Tensor, fake: Tensor) -> Tensor:
    """The generator's loss; only the relativistic one looks at the scores of real images."""
    if kind == "r3gan":
        return relativistic(fake, real)
    return F.softplus(-fake).mean() if kind == "dcgan" else -fake.mean()


# Penalties on the critic's gradient


def squared_slopes(critic: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """|grad D(x)|^2 of each image, over all its pixels, (N,), in fp32; can be differentiated again."""
    images = images.detach().float().requires_grad_(True)
    # Fused attention has no second derivative, and squares of bf16 gradients are too coarse.
    with torch.autocast(images.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        scores = critic(images, labels)
        (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, labels: Tensor, uniform: Tensor) -> Tensor:
    """Mean of (|grad D(x')| - 1)^2 at x' = u real + (1 - u) fake, u (N,) drawn from [0, 1) (Gulrajani et al. 2017, equation 3)."""
    between = torch.lerp(fake, real, uniform[:, None, None, None])
    # The root has no derivative at zero: a critic that is flat there must not get NaN.
    return ((squared_slopes(critic, between, labels) + 1e-12).sqrt() - 1).square().mean()


def zero_centred_penalty(critic: nn.Module, real: Tensor, fake: Tensor, labels: Tensor) -> Tensor:
    """Half of R1 + R2: mean of |grad D|^2 / 2 at real and at drawn images (Mescheder et al. 2018; Huang et al. 2024, equation 3)."""
    return (squared_slopes(critic, real, labels) + squared_slopes(critic, fake, labels)).mean() / 2


# The network that draws


class GAN(Generator):
    """The generator: images of noise and labels."""

    knobs = frozenset({"temperature"})

    def __init__(self, config: GANConfig, shape: Shape, classes: tuple[str, ...]) -> None:
        super().__init__()
        _require_quarters(shape)
        self.config, self.shape, self.classes, self.latent = config, shape, classes, config.latent
        self.embedding = nn.Embedding(len(classes), config.latent) if config.conditional else None
        style = config.latent * (2 if config.conditional else 1)
        self.painter = dcgan_painter(config, shape, style) if config.kind == "dcgan" else ResidualPainter(config, shape, style)

    @property
    def conditional(self) -> bool:
        """Whether sampling needs labels."""
        return self.config.conditional

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images (N, C, H, W), black -1 and white 1, in fp32, of noise (N, latent) and labels (N,)."""
        style = noise if self.embedding is None else torch.cat([noise, self.embedding(labels)], 1)
        images: Tensor = self.painter(style).float()
        # A tanh that saturates at black leaves next to no gradient, and R3GAN has no normalisation to bring it back.
        return images if self.config.kind == "r3gan" else torch.tanh(images)

    def generate(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        """Images in [0, 1]; a temperature below 1 draws the noise in, towards the mean picture of a class."""
        images: Tensor = self(noise * (how.temperature or 1.0), labels)
        return ((images + 1) / 2).clamp(0, 1)


class ResidualPainter(nn.Module):
    """A residual block from 7x7 to 14x14 and a sub-pixel convolution to 28x28; every layer is told the style: noise and class."""

    def __init__(self, config: GANConfig, shape: Shape, style: int) -> None:
        super().__init__()
        width, normalised = config.channels, config.kind != "r3gan"
        self.start = (2 * width, shape[1] // 4, shape[2] // 4)
        self.first = nn.Linear(style, 2 * width * self.start[1] * self.start[2])
        self.block = UpBlock(2 * width, width, style, normalised)
        self.norm = Styled(width, style, normalised)
        # Most of the work is done at 14x14, where a convolution costs a quarter of what it does at 28x28.
        self.finest = nn.Sequential(PixelShuffleConv(width, width // 4), nn.ReLU(), nn.Conv2d(width // 4, shape[0], 3, padding=1))

    def forward(self, style: Tensor) -> Tensor:
        """Images (N, C, H, W) on an unbounded scale, of styles (N, style)."""
        maps = self.block(self.first(style).unflatten(1, self.start), style)
        images: Tensor = self.finest(F.relu(self.norm(maps, style)))
        return images


class UpBlock(nn.Module):
    """A pre-activated residual block that doubles height and width: every place is repeated, then convolved."""

    def __init__(self, inputs: int, outputs: int, style: int, normalised: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Styled(inputs, style, normalised), Styled(outputs, style, normalised)])
        self.up, self.convolution = ResizeConv(inputs, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)
        if not normalised:
            zero(self.convolution)

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, 2H, 2W)."""
        branch = self.up(F.relu(self.norms[0](maps, style)))
        branch = self.convolution(F.relu(self.norms[1](branch, style)))
        # A 1x1 convolution of repeated places is the repeated convolution, at a quarter of the cost.
        finer: Tensor = branch + F.interpolate(self.shortcut(maps), scale_factor=2.0)
        return finer


class Styled(nn.Module):
    """Maps, normalised if asked to, then scaled and shifted channel by channel as the style says.

    Class and noise enter every layer so: conditional normalisation (Dumoulin et al. 2017) with self-modulation (Chen et al. 2019).
    It is by batch, which forces drawings that are alike apart. By groups, a generator without classes was seen to draw nothing
    but black for its first 400 steps; by batch it drew digits by then.
    """

    def __init__(self, channels: int, style: int, normalised: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False) if normalised else nn.Identity()
        self.affine = nn.Linear(style, 2 * channels)
        zero(self.affine)

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        """(N, C, H, W) to the same; begins as the bare normalisation."""
        scale, shift = self.affine(style)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(shift, self.norm(maps), 1 + scale)


def dcgan_painter(config: GANConfig, shape: Shape, style: int) -> nn.Sequential:
    """DCGAN's generator, with resized convolutions in place of transposed ones, which leave checkerboards (Odena et al. 2016)."""
    width, height, breadth = config.channels, shape[1] // 4, shape[2] // 4
    painter = nn.Sequential(
        nn.Linear(style, 2 * width * height * breadth), nn.Unflatten(1, (2 * width, height, breadth)), nn.BatchNorm2d(2 * width), nn.ReLU(),
        ResizeConv(2 * width, width), nn.BatchNorm2d(width), nn.ReLU(),
        ResizeConv(width, shape[0]),
    )  # fmt: skip
    return begin_as_dcgan(painter)


# The network that judges


class Critic(nn.Module):
    """D(x, y) = w f(x) + e_y f(x) + b: one number for each image, with a vector of its own for each class.

    The second term is the projection of Miyato & Koyama 2018 (equation 7); unconditional critics have only the first.
    """

    def __init__(self, config: GANConfig, shape: Shape, classes: int) -> None:
        """Args:
        classes: how many there are; 0 for an unconditional critic.
        """
        super().__init__()
        self.features, width = critic_features(config, shape)
        self.score = nn.Linear(width, 1)
        self.embedding = nn.Embedding(classes, width) if classes else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if config.kind == "hinge":
            normalise_spectra(self)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scores (N,) in fp32 of images (N, C, H, W) with values from -1 to 1."""
        vectors: Tensor = self.features(images).float()
        with torch.autocast(images.device.type, enabled=False):
            scores: Tensor = self.score(vectors)[:, 0]
            return scores if self.embedding is None else scores + (self.embedding(labels) * vectors).sum(1)


def critic_features(config: GANConfig, shape: Shape) -> tuple[nn.Module, int]:
    """The critic's body, images to vectors, and their length."""
    if config.critic:
        backbone = backbone_without_norm(config.critic, shape)
        return backbone, backbone.out_features
    _require_quarters(shape)
    if config.kind == "dcgan":
        return dcgan_features(config, shape)
    width, silent = config.channels, config.kind == "r3gan"
    body = nn.Sequential(
        nn.Conv2d(shape[0], width, 4, 2, 1),
        CriticBlock(width, 2 * width, stride=2, silent=silent),
        CriticBlock(2 * width, 2 * width, silent=silent),
        nn.ReLU(), SumOfPlaces(),
    )  # fmt: skip
    return body, 2 * width


class CriticBlock(nn.Module):
    """A pre-activated residual block without normalisation, which would tie an image's score to others or to its own contrast."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, silent: bool = False) -> None:
        """Args:
        stride: 2 halves height and width.
        silent: begin by adding nothing, as blocks without any normalisation need (after Zhang et al. 2019, "Fixup").
        """
        super().__init__()
        first = nn.Conv2d(inputs, outputs, 4, 2, 1) if stride == 2 else nn.Conv2d(inputs, outputs, 3, padding=1)
        self.branch = nn.Sequential(nn.ReLU(), first, nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        pool = nn.AvgPool2d(2) if stride == 2 else nn.Identity()
        self.shortcut = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1)) if inputs != outputs else pool
        if silent:
            zero(self.branch[3])

    def forward(self, maps: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        total: Tensor = self.branch(maps) + self.shortcut(maps)
        return total


class SumOfPlaces(nn.Module):
    """The sum over all places of a map, in fp32, as SNGAN's critic has it."""

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C)."""
        return maps.sum((2, 3), dtype=torch.float32)


def dcgan_features(config: GANConfig, shape: Shape) -> tuple[nn.Module, int]:
    """DCGAN's critic up to its last layer: strided convolutions, batch normalisation after all but the first."""
    width, places = config.channels, (shape[1] // 4) * (shape[2] // 4)
    body = nn.Sequential(
        nn.Conv2d(shape[0], width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
        nn.Flatten(),
    )  # fmt: skip
    return begin_as_dcgan(body), 2 * width * places


def backbone_without_norm(name: str, shape: Shape) -> backbones.Backbone:
    """A backbone for the images, without normalisation where its family can do without."""
    try:
        return backbones.create(name, shape[0], shape[1], norm="none")
    except TypeError:  # its family has no such option
        return backbones.create(name, shape[0], shape[1])


# How weights begin, and what holds them


def begin_as_dcgan(network: nn.Sequential) -> nn.Sequential:
    """Kernels from N(0, 0.02^2), gains of normalisations from N(1, 0.02^2) (Radford et al. 2016, section 4, and their code)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
            nn.init.zeros_(cast(Tensor, module.bias))
    return network


def normalise_spectra(network: nn.Module) -> None:
    """Divide every kernel and table by its largest singular value from now on (Miyato et al. 2018, section 2.1)."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            if not module.weight.any():  # a silent layer of a backbone has no spectrum to divide by
                nn.init.xavier_uniform_(module.weight)
            spectral_norm(module)
    follow_spectra(network)


@torch.no_grad()
def follow_spectra(network: nn.Module) -> None:
    """One power iteration for each largest singular value, after weights have moved.

    torch does one in every pass; but then a batch in two parts would give another critic than in one, and the generator's
    update would change it too.
    """
    for module in network.modules():
        if isinstance(module, ParametrizationList):
            module.train()()
            module.eval()


def _require_quarters(shape: Shape) -> None:
    if shape[1] % 4 or shape[2] % 4:
        raise UserError(f"a GAN doubles its maps twice; {shape[1]}x{shape[2]} is not a multiple of 4, set data.image_size")


# Training


class GANTask(GeneratorTask):
    """The critic learns to tell images from drawings, the generator to please the critic; each has its own optimiser."""

    experiment: GANExperiment
    model: GAN

    def __init__(self, experiment: GANExperiment, trainer: Trainer) -> None:
        super().__init__(experiment, trainer)
        torch.manual_seed(seeding.derive(trainer.config.seed, "weights", 1))
        config, data = experiment.model, self.data
        self.critic = Critic(config, data.shape, len(data.classes) if config.conditional else 0)
        self.critic_learner = trainer.learner(self.critic, experiment.critic_optimizer)

    def parts(self) -> Mapping[str, Stateful]:
        """Both networks, both optimisers, and the generator's average."""
        return self.learner.parts() | self.critic_learner.parts("critic_")

    def step(self, trainer: Trainer) -> Metrics:
        """Some updates of the critic, then one of the generator."""
        metrics: dict[str, Tensor | float] = {}
        for turn in range(self.experiment.model.critic_steps):
            follow_spectra(self.critic)
            judged = trainer.minimise(self.critic_learner, partial(self.critic_loss, turn=turn), self.experiment.data.batch_size)
            metrics |= {f"critic_{name}": value for name, value in judged.items()}
        return {**metrics, **super().step(trainer)}

    def critic_loss(self, shard: Shard, turn: int = 0) -> tuple[Tensor, Metrics]:
        """How badly the critic tells a shard's images from drawings of the same classes, and its penalty.

        Args:
            turn: which of the critic's updates within a step this is; each sees other images and other noise.
        """
        shard = replace(shard, step=shard.step * self.experiment.model.critic_steps + turn)
        kind, real, labels = self.experiment.model.kind, *self.scaled_batch(shard)
        with torch.no_grad():
            fake = self.model(shard.normal("critic/noise", self.model.latent), labels)
        # Two passes, never one: batch normalisation would tell the two kinds apart by the company they keep.
        scores, fake_scores = self.critic(real, labels), self.critic(fake, labels)
        loss = CRITIC_LOSSES[kind](scores, fake_scores)
        metrics = {"real": scores.mean(), "fake": fake_scores.mean()}
        if kind not in PENALISED:
            return loss, metrics
        if kind == "wgan_gp":
            penalty = gradient_penalty(self.critic, real, fake, labels, shard.uniform("critic/between"))
        else:
            penalty = zero_centred_penalty(self.critic, real, fake, labels)
        return loss + self.experiment.model.penalty * penalty, metrics | {"penalty": penalty}

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """How little the critic likes what the generator draws."""
        kind, real, labels = self.experiment.model.kind, *self.scaled_batch(shard)
        fake = self.model(shard.normal("noise", self.model.latent), labels)
        with self.critic_learner.at_rest():
            scores = self.critic(fake, labels)
            real_scores = self.critic(real, labels) if kind == "r3gan" else scores
        return generator_loss(kind, real_scores, scores), {}

    def scaled_batch(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """A shard's images with values from -1 to 1, as the generator draws them, and labels."""
        images, labels = self.batch(shard)
        return 2 * images - 1, labels

    def test(self, model: GAN, images: int) -> dict[str, float]:
        """Nothing: a GAN gives no likelihood; scripts/evaluate.py judges its samples."""
        return {}


EXPERIMENT = GANExperiment()
