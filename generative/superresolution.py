"""Super-resolution: pictures from small pictures (SRResNet and SRGAN, Ledig et al. 2017, arXiv:1609.04802).

    made = bicubic(small) + net(small)                net: residual blocks at the small size, then pixel shuffle (Shi et al. 2016)

    loss = |made - image| + adversarial softplus(D(image) - D(made)) + perceptual |phi(made) - phi(image)|^2

The absolute error alone gives the likeliest grey where an edge could lie here or there, which is a blur, and has the best scores. The
critic D asks for a picture that could be real: sharper, at some cost in PSNR. It is relativistic (Jolicoeur-Martineau 2018): it compares
each original with what was made of the same small picture, by minimising softplus(D(made) - D(image)) + gamma/2 |dD/dx|^2. phi are the
maps of a frozen classifier that this repository trained.

Blocks have no normalisation, which would wash out the contrast of the picture (Lim et al. 2017), and the critic joins when the network
already can enlarge, as in the paper (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generative.model import EvaluationConfig, Generator, GeneratorExperiment, GeneratorTask, SamplingConfig
from lab import backbones, classifier, media, seeding
from lab.backbones import Backbone
from lab.checkpoint import Stateful
from lab.config import Count, Natural, NonNegative, Settings, UserError
from lab.data import ImageSet, Split, as_float
from lab.experiment import TrainerConfig
from lab.images import Shape
from lab.learner import Learner, Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig(Settings):
    """The network and the terms of its loss."""

    factor: Literal[2, 4] = 4
    """How many times as wide and as high a picture becomes."""
    channels: Count = 32
    """Channels of every map."""
    blocks: Count = 4
    """Residual blocks, at the size of the small picture."""
    adversarial: NonNegative = 0.01
    """Weight of the critic's opinion; 0: no critic, which is SRResNet. The paper's 0.001 is for a critic that no penalty holds back."""
    adversarial_after: Natural = 0
    """Steps until the critic joins."""
    critic: str = "impala"
    """Backbone of the critic, by name; `python scripts/backbones.py` lists all."""
    penalty: NonNegative = 1.0
    """Weight of the critic's squared slope at real images (gamma of R1), without which it soon is always right and too steep to follow."""
    perceptual: NonNegative = 0.01
    """Weight of the distance between a classifier's maps, where `features` names one."""
    features: str = ""
    """Run of the classifier, trained on images of the same shape; empty: no perceptual term. The trained model does not need it."""


@dataclass(frozen=True, kw_only=True)
class SuperResolutionExperiment(GeneratorExperiment):
    """Train a network that enlarges pictures."""

    experiment: ClassVar[str] = "superresolution"

    name: str = "superresolution"
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig = TrainerConfig(steps=4_000)
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, schedule="cosine", warmup_steps=100, ema=0.998, clip_norm=1.0)
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.99))
    model: SuperResolutionConfig = SuperResolutionConfig()

    def network(self, shape: Shape, classes: tuple[str, ...]) -> SuperResolution:
        """The untrained model."""
        return SuperResolution(self.model, shape, classes)

    def task(self, trainer: Trainer) -> SuperResolutionTask:
        """Training on pairs of a picture and itself made small."""
        return SuperResolutionTask(self, trainer)


# Small and large


def quantised(images: Tensor) -> Tensor:
    """Images rounded to 8-bit values and cut off at black and white, as float32 in [0, 1]."""
    return as_float(media.to_uint8(images))


def shrink(images: Tensor, factor: int) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as small ones (N, C, H / factor, W / factor), as a file would hold them: bicubic, 8 bit."""
    height, width = images.shape[2:]
    return quantised(F.interpolate(images, (height // factor, width // factor), mode="bicubic", antialias=True))


def bicubic(small: Tensor, factor: int) -> Tensor:
    """Pictures enlarged with Keys' cubic kernel (a = -0.5, Pillow's: torch takes it with antialias alone); may leave [0, 1] at edges."""
    height, width = small.shape[2:]
    return F.interpolate(small, (height * factor, width * factor), mode="bicubic", antialias=True)


def nearest(small: Tensor, factor: int) -> Tensor:
    """Pictures enlarged by repeating every pixel."""
    return small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


# Scores


def psnr(made: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,), of images (N, C, H, W) in [0, 1]; 100 where they are the same."""
    error = (made.double() - images.double()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


WINDOW = 11
"""Pixels a side of SSIM's window."""


def ssim(made: Tensor, images: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, equation 13), (N,), of images (N, C, H, W) in [0, 1], at least 11 pixels a side.

    Means, variances and covariance are taken under a Gaussian window of 11 x 11 pixels with sigma 1.5 that lies inside the image.
    """
    x, y = (each.double().flatten(0, 1)[:, None] for each in (made, images))
    mean_x, mean_y, xx, yy, xy = (_windowed(each) for each in (x, y, x * x, y * y, x * y))
    steady, contrast = 0.01**2, 0.03**2
    similar = (2 * mean_x * mean_y + steady) * (2 * (xy - mean_x * mean_y) + contrast)
    most = (mean_x**2 + mean_y**2 + steady) * (xx - mean_x**2 + yy - mean_y**2 + contrast)
    return (similar / most).view(len(made), -1).mean(1)


def _windowed(planes: Tensor) -> Tensor:
    """Gaussian means of planes (N, 1, H, W) at every place where the window fits, (N, 1, H - 10, W - 10)."""
    line = torch.exp(-0.5 * (torch.arange(-5, 6, device=planes.device, dtype=planes.dtype) / 1.5) ** 2)
    line = line / line.sum()
    return F.conv2d(F.conv2d(planes, line.view(1, 1, 11, 1)), line.view(1, 1, 1, 11))


@torch.no_grad()
def measured(model: SuperResolution, split: Split, rows: int = 500) -> dict[str, float]:
    """Mean PSNR and SSIM of a split after shrinking and enlarging: by the model, bicubic, and by repeating pixels."""
    factor = model.config.factor
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "": model.enlarge,
        "_bicubic": partial(bicubic, factor=factor),
        "_nearest": partial(nearest, factor=factor),
    }
    totals: dict[str, float] = {}
    for images in map(as_float, split.images.split(rows)):
        small = shrink(images, factor)
        for name, enlarge in ways.items():
            made = quantised(enlarge(small))
            for score in (psnr, ssim):
                key = score.__name__ + name
                totals[key] = totals.get(key, 0.0) + float(score(made, images).sum())
    return {key: total / len(split) for key, total in totals.items()}


@torch.no_grad()
def comparison(model: SuperResolution, split: Split, count: int = 16) -> Tensor:
    """One picture (C, H, W) of some images, a column each: small, enlarged bicubic, by the model, and as they were."""
    images, factor = as_float(split.spread(count).images), model.config.factor
    small = shrink(images, factor)
    rows = [nearest(small, factor), bicubic(small, factor), model.enlarge(small), images]
    return media.grid(torch.cat(rows), columns=len(images))


# The network


class Block(nn.Module):
    """x + conv(silu(conv(x))); the second convolution begins small, so that many blocks begin near the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(cast(Tensor, self.second.bias))
        with torch.no_grad():
            self.second.weight.mul_(0.1)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        change: Tensor = self.second(F.silu(self.first(maps)))
        return maps + change


class Double(nn.Sequential):
    """Maps (N, C, H, W) to (N, C, 2H, 2W): a convolution makes four numbers for each one, and they become its four pixels.

    The four begin alike (Aitken et al. 2017, arXiv:1707.02937): different at first, they leave a checkerboard in the picture.
    """

    def __init__(self, channels: int) -> None:
        convolution = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        for weights in (convolution.weight, cast(Tensor, convolution.bias)):
            with torch.no_grad():
                weights.copy_(weights[:channels].repeat_interleave(4, 0))  # channel 4c + i goes to pixel i of channel c
        super().__init__(convolution, nn.PixelShuffle(2), nn.SiLU())


class SuperResolution(Generator):
    """Enlarges pictures of any size; untrained it is bicubic interpolation."""

    def __init__(self, config: SuperResolutionConfig, shape: Shape, classes: tuple[str, ...]) -> None:
        super().__init__()
        if shape[1] % config.factor or shape[2] % config.factor:
            raise UserError(f"data.image_size: {shape[1]} x {shape[2]} pixels cannot be divided by model.factor {config.factor}")
        if min(shape[1:]) < WINDOW:
            raise UserError(f"data.image_size: {shape[1]} x {shape[2]} pixels are too few to judge by SSIM; give at least {WINDOW}")
        self.config, self.shape, self.classes, self.latent = config, shape, classes, 0
        width, doublings = config.channels, {2: 1, 4: 2}[config.factor]
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], width, 3, padding=1),
            *[Block(width) for _ in range(config.blocks)],
            *[Double(width) for _ in range(doublings)],
            last := nn.Conv2d(width, shape[0], 3, padding=1),
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))

    @property
    def conditional(self) -> bool:
        """It needs no labels."""
        return False

    def forward(self, small: Tensor) -> Tensor:
        """Enlarged pictures (N, C, factor H, factor W) in fp32, of any (N, C, H, W) in [0, 1]; may leave [0, 1] a little."""
        detail: Tensor = self.layers(small)
        return bicubic(small, self.config.factor) + detail.float()

    def enlarge(self, small: Tensor) -> Tensor:
        """Enlarged pictures in [0, 1], (N, C, factor H, factor W), of any (N, C, H, W)."""
        made: Tensor = self(small)
        return made.clamp(0, 1)

    def generate(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        """Refuse: there is no noise that it makes pictures of.

        Raises:
            UserError: always; says what to use.
        """
        raise UserError("a super-resolution model makes pictures of small pictures, not of noise; use scripts/enlarge.py")

    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """PSNR in dB and SSIM of test images, beside those of bicubic interpolation and of repeated pixels."""
        split = data.test.spread(config.images)
        (_, height, width), factor = self.shape, self.config.factor
        sizes = f"{height // factor} x {width // factor} to {height} x {width} pixels"
        return {"protocol": f"{data.name} test, {len(split)} images, {sizes}, 8-bit values", **measured(self, split)}


# Training


def perceptual_distance(body: Backbone, made: Tensor, images: Tensor) -> Tensor:
    """Mean squared difference of a network's maps, over all its scales (Johnson et al. 2016, equation 2; SRGAN's equation 5)."""
    with torch.no_grad():
        wanted = body.features(images)
    errors = [F.mse_loss(mine.float(), theirs.float()) for mine, theirs in zip(body.features(made), wanted, strict=True)]
    return torch.stack(errors).mean()


def squared_slope(critic: nn.Module, images: Tensor) -> Tensor:
    """|dD/dx|^2 at each image, (N,), in fp32, to be differentiated again (R1 of Mescheder et al. 2018, equation 9)."""
    with torch.autocast(images.device.type, enabled=False):
        x = images.detach().requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return slope.square().flatten(1).sum(1)


def critic_for(config: SuperResolutionConfig, shape: Shape) -> nn.Module:
    """The untrained critic: images (N, C, H, W) to (N, 1), larger for what looks real."""
    body = backbones.create(config.critic, shape[0], shape[1])
    return nn.Sequential(body, nn.Linear(body.out_features, 1))


class SuperResolutionTask(GeneratorTask):
    """Rebuild training images from small ones, under the eyes of a critic that learns beside."""

    experiment: SuperResolutionExperiment
    model: SuperResolution

    def __init__(self, experiment: SuperResolutionExperiment, trainer: Trainer) -> None:
        super().__init__(experiment, trainer)
        self.critic = self._critic_learner(trainer) if experiment.model.adversarial else None
        self.features = self._features(trainer) if experiment.model.features else None

    def _critic_learner(self, trainer: Trainer) -> Learner:
        torch.manual_seed(seeding.derive(trainer.config.seed, "weights/critic", 0))
        return trainer.learner(critic_for(self.experiment.model, self.data.shape), self.experiment.critic_optimizer)

    def _features(self, trainer: Trainer) -> Backbone:
        """The maps of the classifier that `features` names."""
        run = self.experiment.model.features
        model = classifier.load(run, trainer.world.device).model
        if model.shape != self.data.shape:
            seen, wanted = (" x ".join(map(str, shape)) for shape in (model.shape, self.data.shape))
            raise UserError(f"model.features {run}: that classifier sees images of {seen}; train one on images of {wanted}")
        return model.body

    def parts(self) -> Mapping[str, Stateful]:
        """Both learners, and the classifier's weights: a resumed run sees with the eyes it began with."""
        critic = self.critic.parts("critic_") if self.critic else {}
        return {**super().parts(), **critic, **({"features": self.features} if self.features else {})}

    def step(self, trainer: Trainer) -> Metrics:
        """One update of the critic, once it has joined, and one of the network."""
        if not (self.critic and self.criticised(trainer.step)):
            return super().step(trainer)
        judged = trainer.minimise(self.critic, self.critic_loss, self.experiment.data.batch_size)
        with self.critic.at_rest():
            made = super().step(trainer)
        return {**made, **{f"critic_{name}": value for name, value in judged.items()}}

    def criticised(self, step: int) -> bool:
        """Whether the critic has joined at a step."""
        return self.critic is not None and step >= self.experiment.model.adversarial_after

    def pairs(self, shard: Shard) -> tuple[Tensor, Tensor]:
        """A shard's images in [0, 1], (N, C, H, W), and the same made small."""
        images, _ = self.batch(shard)
        return images, shrink(images, self.experiment.model.factor)

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """The weighted sum of the terms, and each term by itself."""
        config = self.experiment.model
        images, small = self.pairs(shard)
        made = self.model(small)
        terms = {"absolute": F.l1_loss(made, images)}
        loss = terms["absolute"]
        if self.criticised(shard.step):
            terms["adversarial"] = F.softplus(-self.margin(made, images)).mean()
            loss = loss + config.adversarial * terms["adversarial"]
        if self.features:
            terms["perceptual"] = perceptual_distance(self.features, made, images)
            loss = loss + config.perceptual * terms["perceptual"]
        return loss, terms

    def critic_loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """How badly the critic tells originals from pictures made of them, with its penalty; and how often it is right."""
        images, small = self.pairs(shard)
        with torch.no_grad():
            made = self.model(small)
        margin = self.margin(images, made)
        slope = squared_slope(cast(Learner, self.critic).module, images).mean()
        metrics = {"accuracy": (margin > 0).double().mean(), "slope": slope}
        return F.softplus(-margin).mean() + self.experiment.model.penalty / 2 * slope, metrics

    def margin(self, one: Tensor, other: Tensor) -> Tensor:
        """By how much the critic finds the images of one batch more real than those of the other, (N,), pair by pair."""
        critic = cast(Learner, self.critic).module
        difference: Tensor = critic(one).float() - critic(other).float()
        return difference[:, 0]

    def test(self, model: SuperResolution, images: int) -> dict[str, float]:
        """PSNR and SSIM of some images of the test set."""
        return measured(model, self.data.test.spread(images))

    @torch.no_grad()
    def preview(self, trainer: Trainer) -> dict[str, float | int | str]:
        """Test scores, and test images small, enlarged and as they were."""
        with self.learner.judged() as judged:
            model = cast(SuperResolution, judged)
            scores = {f"eval/{name}": value for name, value in self.test(model, 2000).items()}
            return scores | trainer.picture("enlarged", comparison(model, self.data.test))


EXPERIMENT = SuperResolutionExperiment()
