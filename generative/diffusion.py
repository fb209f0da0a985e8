"""Diffusion models: a network learns to tell the clean image in a noisy one; from pure noise, step by step, that makes images.

    x = alpha x0 + sigma noise          loss = w |F(inp x, time, class) - target|^2          target = (x0 - skip x) / out

What alpha, sigma, F and w are is the process's matter (processes.py): DDPM (Ho et al. 2020, arXiv:2006.11239) with all its later
settings, EDM (Karras et al. 2022, arXiv:2206.00364), or flow matching (Lipman et al. 2023, arXiv:2210.02747). How to walk from
noise to image is the sampler's (samplers.py), and any sampler serves any model that its mathematics allows.

A model that knows classes was told none for some of its training images, so that it can be guided (Ho & Salimans 2021,
arXiv:2207.12598):    x0 = x0(no class) + w (x0(class) - x0(no class)).

With `latents`, images are first encoded by a VQ-VAE, and the codes are what is diffused (Rombach et al. 2022, arXiv:2112.10752).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from generative import model as families
from generative.model import CodedGenerator, EvaluationConfig, GeneratorExperiment, GeneratorTask, SamplingConfig
from generative.processes import DDPMConfig, EDMConfig, FlowMatchingConfig, Moment, Process
from generative.samplers import Denoise, Guess, Noise, Point, find, inpainting
from generative.vqvae import VQVAE, VQVAEConfig
from lab import seeding
from lab.backbones.dit import DiT
from lab.backbones.transformer import as_map, tokens_of
from lab.backbones.unet import UNet
from lab.config import Count, Decay, NonNegative, Settings, UserError
from lab.data import ImageSet, Split, as_float
from lab.experiment import TrainerConfig
from lab.images import Shape
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.recorder import track
from lab.trainer import Trainer

# Settings


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Settings):
    """The network that looks at noisy images."""

    kind: Literal["unet", "dit", "diffusers"] = "unet"
    """Our U-Net, our Diffusion Transformer, or the U-Net of diffusers, which alone can be exported to it."""
    widths: tuple[Count, ...] = (64, 128)
    """Channels of a U-Net at each size, from fine to coarse; with diffusers, multiples of 8."""
    blocks: Count = 1
    """Residual blocks of a U-Net at each size, on each way."""
    fold: Count = 2
    """Pixels a side that our U-Net folds into the channels of one place before all, as patches are; 1: it works pixel by pixel."""
    width: Count = 128
    """Numbers of each token of a DiT."""
    layers: Count = 6
    """Layers of a DiT."""
    patch: Count = 4
    """Pixels a side of a DiT's patches."""
    heads: Count = 4
    """Heads of every attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = {"unet": 2, "diffusers": 8, "dit": 4}[self.kind]
        wrong = [width for width in ([self.width] if self.kind == "dit" else self.widths) if width % parts]
        last = self.width if self.kind == "dit" else self.widths[-1] if self.widths else 0
        if wrong or not last:
            raise ValueError(f"{self.kind} needs widths that are multiples of {parts}, at least one; found {wrong or 'none'}")
        if last % self.heads:
            raise ValueError(f"heads: {self.heads} heads cannot share {last} channels evenly; set heads to a divisor")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Settings):
    """The model."""

    process: Literal["ddpm", "edm", "flow"] = "flow"
    """How images turn to noise."""
    ddpm: DDPMConfig = DDPMConfig()
    edm: EDMConfig = EDMConfig()
    flow: FlowMatchingConfig = FlowMatchingConfig()
    network: NetworkConfig = NetworkConfig()
    conditional: bool = True
    """Tell the network the class."""
    drop: Decay = 0.1
    """Share of training images whose class is not told, which guidance needs."""
    sampler: str = "auto"
    """How to walk from noise to image; auto: unipc."""
    steps: Count = 20
    """Steps of the sampler."""
    guidance: NonNegative = 1.0
    """Weight of the class when sampling; 1: as learnt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler != "auto":
            find(self.sampler)

    @property
    def chosen(self) -> Process:
        """The process with its settings."""
        return {"ddpm": self.ddpm, "edm": self.edm, "flow": self.flow}[self.process]


@dataclass(frozen=True, kw_only=True)
class DiffusionExperiment(GeneratorExperiment):
    """Train a diffusion model."""

    experiment: ClassVar[str] = "diffusion"

    name: str = "diffusion"
    """What to call it: the folder below runs/, and the group on W&B."""
    latents: str = ""
    """Run of a VQ-VAE whose codes are to be diffused in place of pixels."""
    trainer: TrainerConfig = TrainerConfig(steps=12_000, precision="auto")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), schedule="cosine", warmup_steps=500, ema=0.999, clip_norm=1.0)
    model: DiffusionConfig = DiffusionConfig()

    def network(self, shape: Shape, classes: tuple[str, ...]) -> Diffusion:
        """The untrained model, with the VQ-VAE that it diffuses the codes of.

        Raises:
            UserError: `latents` names a run of something else, or one for other images.
        """
        if not self.latents:
            return Diffusion(self.model, shape, classes)
        coder = families.load(self.latents).model
        if not isinstance(coder, VQVAE):
            raise UserError(f"latents: {self.latents} is no run of scripts/train_vqvae.py, whose codes alone can be diffused")
        if coder.shape != shape:
            raise UserError(f"latents: {self.latents} was trained on images of {coder.shape}, these are {shape}; set data as there")
        return Diffusion(self.model, shape, classes, coder)

    def rebuild(self, facts: Mapping[str, Any]) -> Diffusion:
        """The model of a run; its VQ-VAE's weights are among its own."""
        shape, classes = tuple(facts["shape"]), tuple(facts["classes"])
        coder = VQVAE(VQVAEConfig(**facts["coder"]), shape, classes) if facts["coder"] else None
        return Diffusion(self.model, shape, classes, coder)

    def task(self, trainer: Trainer) -> DiffusionTask:
        """Training by noise."""
        return DiffusionTask(self, trainer)


# Networks


class DiffusersUNet(nn.Module):
    """The `UNet2DModel` of diffusers, called as ours is."""

    def __init__(self, config: NetworkConfig, channels: int, outputs: int, size: int, classes: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        levels = len(config.widths)
        if size % 2 ** (levels - 1):
            raise UserError(f"model.network.widths: {levels} sizes would halve {size} pixels to a fraction; take at most 3 for 28 pixels")
        unet = UNet2DModel(  # type: ignore[no-untyped-call]
            sample_size=size,
            in_channels=channels,
            out_channels=outputs,
            block_out_channels=config.widths,
            layers_per_block=config.blocks,
            down_block_types=["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
            norm_num_groups=8,
            attention_head_dim=max(8, config.widths[-1] // config.heads),
            num_class_embeds=classes + 1 if classes else None,
        )
        self.unet = cast(nn.Module, unet)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
        """Maps (N, outputs, H, W)."""
        short = images.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        # For few places torch's fused kernel is slow in bf16 on a CPU.
        with sdpa_kernel(SDPBackend.MATH) if short else nullcontext():
            maps: Tensor = self.unet(images, times, labels).sample
        return maps


def build_network(config: NetworkConfig, channels: int, outputs: int, size: int, classes: int) -> nn.Module:
    """A network from noisy images (N, channels, size, size), times and labels to (N, outputs, size, size); label `classes`: none."""
    if config.kind == "diffusers":
        return DiffusersUNet(config, channels, outputs, size, classes)
    if config.kind == "dit":
        return DiT(channels, size, outputs, classes, config.width, config.layers, config.heads, config.patch)
    if size % config.fold:
        raise UserError(f"model.network.fold: {size} pixels are no multiple of {config.fold}; take 1")
    options = {"widths": config.widths, "blocks": config.blocks, "heads": config.heads, "fold": config.fold}
    return UNet(channels, outputs, size, classes=classes, time=True, **options)  # type: ignore[arg-type]


# The model


class Diffusion(CodedGenerator):
    """A network, the process that it undoes, and the scale of what it sees."""

    exact = True
    knobs = frozenset({"sampler", "steps", "guidance"})
    mean: Tensor
    scale: Tensor

    def __init__(self, config: DiffusionConfig, shape: Shape, classes: tuple[str, ...], coder: VQVAE | None = None) -> None:
        super().__init__()
        self.config, self.shape, self.classes, self.coder = config, shape, classes, coder
        if coder:
            coder.eval().requires_grad_(False)
        self.inner: Shape = (coder.config.dimensions, *coder.grid) if coder else shape
        self.latent, self.process = math.prod(self.inner), config.chosen
        self.learned_variance = config.process == "ddpm" and config.ddpm.variance == "learned"
        channels = self.inner[0]
        known = len(classes) if config.conditional else 0
        self.network = build_network(config.network, channels, channels * (1 + self.learned_variance), self.inner[1], known)
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("scale", torch.full((channels, 1, 1), 0.5))

    @property
    def conditional(self) -> bool:
        """Whether sampling needs labels."""
        return self.config.conditional

    # Between images and what is diffused

    @torch.no_grad()
    def fit_scale(self, split: Split) -> None:
        """EDM, flow matching and codes: such that mean and variance are 0 and 1. DDPM on pixels stays at [-1, 1], as everywhere."""
        if self.config.process == "ddpm" and not self.coder:
            return
        chosen = split.spread(10_000)
        inner = self.inner_of(as_float(chosen.images), chosen.labels)
        self.mean.copy_(inner.mean((0, 2, 3))[:, None, None])
        self.scale.copy_(inner.std((0, 2, 3))[:, None, None].clamp(min=1e-3))

    def inner_of(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images, or their codes as maps, not yet scaled."""
        return as_map(self.coder.encode(images, labels).unflatten(1, (self.coder.latent, -1)), self.coder.grid) if self.coder else images

    def scaled(self, images: Tensor, labels: Tensor) -> Tensor:
        """x0 of images in [0, 1]."""
        return (self.inner_of(images, labels) - self.mean) / self.scale

    def images_of(self, x0: Tensor) -> Tensor:
        """Images in [0, 1] of x0; codes are replaced by the nearest of the codebook."""
        inner = x0 * self.scale + self.mean
        return self.coder.render(self.coder.quantiser.nearest(tokens_of(inner))) if self.coder else inner.clamp(0, 1)

    # What the network tells

    def forward(self, x: Tensor, moment: Moment, labels: Tensor) -> Tensor:
        """F of noisy x (N, C, H, W), in fp32; label `len(classes)` tells nothing."""
        known = labels if self.conditional else labels.new_zeros(len(labels)) if self.config.network.kind == "dit" else None
        output: Tensor = self.network(x * wide(self.process.scales(moment).inp), moment.time, known)
        return output.float()

    def guess(self, x: Tensor, point: Point, labels: Tensor) -> Guess:
        """What the network makes of x (N, C, H, W), all at one point."""
        return self.guess_at(x, Moment.of(point, len(x), x.device), labels)

    def guess_at(self, x: Tensor, moment: Moment, labels: Tensor) -> Guess:
        """The expected clean x0, held within black and white where pixels are diffused, and the learned part of the variance."""
        output, scales = self(x, moment, labels), self.process.scales(moment)
        output, fraction = self.parted(output)
        x0 = wide(scales.skip) * x + wide(scales.out) * output
        return Guess(x0 if self.coder else x0.clamp(-self.mean / self.scale, (1 - self.mean) / self.scale), fraction)

    def missed(self, x: Tensor, moment: Moment, labels: Tensor, x0: Tensor) -> tuple[Tensor, Guess]:
        """Mean squared error of F where it should have told `x0`, (N,), and what was guessed, not held within black and white."""
        scales = self.process.scales(moment)
        output, fraction = self.parted(self(x, moment, labels))
        error = (output - (x0 - wide(scales.skip) * x) / wide(scales.out)).square().flatten(1).mean(1)
        return error, Guess(wide(scales.skip) * x + wide(scales.out) * output, fraction)

    def parted(self, output: Tensor) -> tuple[Tensor, Tensor | float]:
        """F itself, and how far the variance is from the smallest to the largest."""
        if self.learned_variance:
            output, raw = output.chunk(2, 1)
            return output, (raw + 1) / 2
        return output, float(self.config.process == "ddpm" and self.config.ddpm.variance == "large")

    def denoise(self, labels: Tensor, guidance: float) -> Denoise:
        """The guess for these labels, guided; both halves go through the network as one batch."""
        if guidance == 1 or not self.conditional:
            return lambda x, point: self.guess(x, point, labels)
        both = torch.cat([labels, torch.full_like(labels, len(self.classes))])

        def guided(x: Tensor, point: Point) -> Guess:
            found = self.guess(torch.cat([x, x]), point, both)
            told, untold = found.x0.chunk(2)
            fraction = found.fraction if isinstance(found.fraction, float) else found.fraction.chunk(2)[0]
            return Guess(untold + guidance * (told - untold), fraction)

        return guided

    def denoise_as(self, labels: Tensor, how: SamplingConfig) -> Denoise:
        """The same with the guidance that is set, or else the model's own."""
        return self.denoise(labels, how.guidance or self.config.guidance)

    # Generator

    def walk(
        self, start: Tensor, points: Sequence[Point], denoise: Denoise, how: SamplingConfig, generator: torch.Generator | None
    ) -> list[Tensor]:
        """All x that a sampler passes, from `start` on."""
        sampler = find(self.sampler(how))
        with precisely(start.device):
            return [start, *sampler(denoise, start, points, noise_like(start, generator))]

    def sampler(self, how: SamplingConfig) -> str:
        """The name of the sampler."""
        chosen = how.sampler if how.sampler != "auto" else self.config.sampler
        return "unipc" if chosen == "auto" else chosen

    def points(self, how: SamplingConfig) -> list[Point]:
        """Where the sampler stops. Those that reckon in log(alpha / sigma) begin a hair before pure noise, as those of diffusers do."""
        points = self.process.points(how.steps or self.config.steps)
        if points[0].alpha == 0 and self.sampler(how) in ("dpmpp", "unipc"):
            points[0] = Point(2**-12, math.sqrt(1 - 2**-24), points[0].time)
        return points

    def start(self, noise: Tensor) -> Tensor:
        """Where sampling begins, of noise (N, latent)."""
        return self.process.start(noise.view(-1, *self.inner))

    @torch.no_grad()
    def generate(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        """Images of noise, by the sampler."""
        denoise = self.denoise_as(labels, how)
        return self.images_of(self.walk(self.start(noise), self.points(how), denoise, how, generator)[-1])

    @torch.no_grad()
    def trajectory(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> list[Tensor]:
        """Images at every step on the way; noise is drawn as grey."""
        denoise, points = self.denoise_as(labels, how), self.points(how)
        passed = self.walk(self.start(noise), points, denoise, how, generator)
        return [self.images_of(x / math.hypot(point.alpha, point.sigma)) for x, point in zip(passed, points)]

    @torch.no_grad()
    def inpaint(
        self, images: Tensor, mask: Tensor, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images (N, C, H, W) with what `mask` (1, 1, H, W) leaves out, where it is 0, made anew."""
        if self.coder:
            raise UserError("inpainting works on pixels, and this model diffuses codes; take one that was trained without --latents")
        known = self.scaled(images, labels)
        denoise = inpainting(self.denoise_as(labels, how), known, mask)
        made = self.images_of(self.walk(self.start(noise), self.points(how), denoise, how, generator)[-1])
        return torch.where(mask.bool(), images, made)

    @torch.no_grad()
    def vary(
        self, images: Tensor, strength: float, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images made noisy by `strength`, from 0 to 1 of the way, and clean again (SDEdit, Meng et al. 2022, arXiv:2108.01073)."""
        points = self.points(how)
        left = points[len(points) - 1 - round(strength * (len(points) - 1)) :]
        if len(left) < 2:
            return images
        start = self.start(noise)
        if len(left) < len(points):
            start = left[0].alpha * self.scaled(images, labels) + left[0].sigma * noise.view(-1, *self.inner)
        denoise = self.denoise_as(labels, how)
        return self.images_of(self.walk(start, left, denoise, how, generator)[-1])

    @torch.no_grad()
    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """The noise (N, latent) that leads to images: DDIM run backwards (Song et al. 2021, section 4.3), 5 times as finely."""
        points = self.process.points(min(self.process.most, 5 * self.config.steps))[-2::-1]
        x, denoise = points[0].alpha * self.scaled(images, labels), self.denoise(labels, 1)
        with precisely(x.device):
            for here, there in pairwise(points):
                x0 = denoise(x, here).x0
                x = there.alpha * x0 + there.sigma * (x - here.alpha * x0) / here.sigma
        return (x / float(self.process.start(torch.ones(())))).flatten(1)

    def decode(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Images of noise (N, latent), by the model's own sampler."""
        return self.generate(codes, labels, SamplingConfig())

    def chain(self) -> list[Point]:
        """The steps whose bound is taken: until noise is a quarter of a byte, where images are told apart by what they are."""
        return self.process.chain(1 / 255 / 4 / float(self.scale.min()))

    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """A bound on the bits per dimension of the test images."""
        if self.coder:
            return {}
        split = data.test.spread(config.images)
        protocol = f"{data.name} test, {len(split)} images, {BOUND_DRAWS} of {len(self.chain())} steps for each, seed {config.seed}"
        return {"protocol": protocol, **measured_bound(self, split, config.seed)}


def wide(numbers: Tensor) -> Tensor:
    """A number for each image, (N,), to be multiplied with images: (N, 1, 1, 1)."""
    return numbers[:, None, None, None]


def noise_like(x: Tensor, generator: torch.Generator | None) -> Noise:
    """Draws fresh noise of the shape of x, on the generator's device, so that every device draws the same."""
    device = generator.device if generator else x.device
    return lambda: torch.randn(x.shape, generator=generator, device=device).to(x.device)


def precisely(device: torch.device) -> Any:
    """Samplers add up many small steps: never in bf16."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


# Likelihood

BOUND_DRAWS = 20
"""Steps that are drawn for each image."""


def step_kl(x0: Tensor, guess: Guess, here: Moment, there: Moment) -> Tensor:
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) of every number in nats, for steps from `here`, t, to `there`, s, whose sigma is not 0.

    Both are normal; their means differ by the error of x0 alone (Kingma et al. 2021, arXiv:2107.00630, appendix A).
    """
    ratio = here.alpha / there.alpha
    step = here.sigma**2 - (ratio * there.sigma) ** 2
    smallest = step * (there.sigma / here.sigma) ** 2
    shift = wide(there.alpha * step / here.sigma**2) * (x0 - guess.x0)
    grown = guess.fraction * wide((step / smallest).log())  # log of the model's variance over the true one
    return 0.5 * (grown + torch.exp(-grown) * (1 + shift**2 / wide(smallest)) - 1)


def prior_kl(x0: Tensor, point: Point, largest: float) -> Tensor:
    """KL of x at the noisiest point from where sampling begins, normal with standard deviation `largest`, of every number in nats."""
    return 0.5 * ((point.sigma**2 + (point.alpha * x0) ** 2) / largest**2 - 1) - math.log(point.sigma / largest)


def log_bytes(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log of a normal density's share of the byte that each pixel is, among all 256, for images, means and stds in units of [0, 1].

    The outermost bytes take the tails (Ho et al. 2020, equation 13).
    """
    upper = torch.where(images > 0.999, math.inf, (images + 0.5 / 255 - mean) / std)
    lower = torch.where(images < 0.001, -math.inf, (images - 0.5 / 255 - mean) / std)
    share: Tensor = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    return share.clamp(min=1e-12).log()


@torch.no_grad()
def measured_bound(model: Diffusion, split: Split, seed: int, rows: int = 250) -> dict[str, float]:
    """Bits per dimension of images by the variational bound of the ancestral sampler with very many steps, with its three parts.

    Of the steps, some are drawn for each image, one from each of as many equal stretches.
    """
    parts = zip(split.images.split(rows), split.labels.split(rows))
    found = [
        bound_parts(model, as_float(images), labels, seeding.generator(seed, "judge/bound", index))
        for index, (images, labels) in enumerate(track(parts, -(-len(split) // rows), "bound"))
    ]
    prior, steps, last = (float(torch.cat(column).double().mean()) / math.log(2) for column in zip(*found))
    return {"bits_per_dim": prior + steps + last, "prior_bits": prior, "step_bits": steps, "last_bits": last}


def bound_parts(model: Diffusion, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Nats per dimension of each image, (N,): of the prior, of all steps but the last, and of the last."""
    points = model.chain()
    x0, end, count = model.scaled(images, labels), points[-1], len(images)
    table = torch.tensor([(point.alpha, point.sigma, point.time) for point in points], dtype=torch.float64, device=x0.device)
    draws = noise_like(x0, generator)

    def looked(moment: Moment) -> Guess:
        x = wide(moment.alpha) * x0 + wide(moment.sigma) * draws()
        return model.guess_at(x.float(), Moment(*(numbers.float() for numbers in moment)), labels)

    steps, width = torch.zeros(count, dtype=torch.float64, device=x0.device), (len(points) - 1) / BOUND_DRAWS
    for stretch in range(BOUND_DRAWS):
        # Each image takes another part of the stretch: the terms of one stretch differ much more than those of two images.
        places = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        index = ((stretch + places) * width).long().clamp(max=len(points) - 2)
        here, there = Moment(*table[index].T), Moment(*table[index + 1].T)
        steps += step_kl(x0, looked(here), here, there).flatten(1).mean(1) * width
    guess = looked(Moment.of(end, count, x0.device))
    mean, std = guess.x0 * model.scale + model.mean, end.sigma / end.alpha * model.scale
    largest = float(model.process.start(torch.ones(())))
    return prior_kl(x0, points[0], largest).flatten(1).mean(1), steps, -log_bytes(images, mean, std).flatten(1).mean(1)


# Training


class DiffusionTask(GeneratorTask):
    """Minimise the weighted error of what the network tells, at random moments."""

    experiment: DiffusionExperiment
    model: Diffusion

    def build(self, trainer: Trainer) -> Diffusion:
        """The untrained model, with its scale."""
        if trainer.noted is not None:
            self.facts["coder"] = trainer.noted["coder"]
            return self.experiment.rebuild(self.facts)
        model: Diffusion = super().build(trainer)
        model.fit_scale(self.data.train)
        self.facts["coder"] = dataclasses.asdict(model.coder.config) if model.coder else {}
        return model

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """The mean error of a shard; the times of a batch are spread evenly, which makes it vary less (Kingma et al. 2021, appendix I)."""
        model = self.model
        images, labels = self.batch(shard)
        x0 = model.scaled(images, labels)
        moment = model.process.draw((shard.uniform("time") + shard.places) / shard.batch)
        x = wide(moment.alpha) * x0 + wide(moment.sigma) * shard.normal("noise", *model.inner)
        untold = shard.uniform("drop") < self.experiment.model.drop
        error, guess = model.missed(x, moment, labels.masked_fill(untold, len(model.classes)), x0)
        loss = (model.process.weight(moment) * error).mean()
        if model.learned_variance:
            guess = guess._replace(x0=guess.x0.detach())
            loss = loss + 0.001 * variance_loss(self.experiment.model.ddpm, x0, guess, moment)
        return loss, {"error": error.mean()}

    def test(self, model: Diffusion, images: int) -> dict[str, float]:
        """The weighted error on some test images, at evenly spread moments."""
        split = self.data.test.spread(min(images, 1000))
        x0 = model.scaled(as_float(split.images), split.labels)
        moment = model.process.draw((torch.arange(len(x0), device=x0.device) * 0.618034) % 1)
        noise = torch.randn(x0.shape, generator=seeding.generator(0, "judge/noise", 0)).to(x0.device)
        x = wide(moment.alpha) * x0 + wide(moment.sigma) * noise
        error, _ = model.missed(x, moment, split.labels, x0)
        return {"loss": float((model.process.weight(moment) * error).mean())}


def variance_loss(config: DDPMConfig, x0: Tensor, guess: Guess, moment: Moment) -> Tensor:
    """The bound as a loss of the variance alone, in bits as in the paper's code, times the steps (Nichol & Dhariwal 2021, equation 16)."""
    index = (moment.time * config.times / 1000).round().long()
    later = index.clamp(min=1)  # the first step has no variance to learn: it takes the second's place, and does not count
    terms = step_kl(x0, guess, config.moments(later), config.moments(later - 1)).flatten(1).mean(1)
    return torch.where(index > 0, terms, 0).mean() * config.times / math.log(2)


EXPERIMENT = DiffusionExperiment()
