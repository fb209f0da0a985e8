"""Normalising flows: an invertible map from images to noise, hence the exact likelihood of every image.

    log p(x) = log N(f(x); 0, 1) + log |det df/dx|                                      (the change of variables)

NICE (Dinh et al. 2015, arXiv:1410.8516), RealNVP (Dinh et al. 2017, arXiv:1605.08803) and Glow (Kingma & Dhariwal 2018,
arXiv:1807.03039) are built of couplings, which change one half of the numbers by a function of the other half:

    b' = b + t(a)                    additive: NICE                    log |det| = 0
    b' = s(a) b + t(a)               affine: RealNVP, Glow             log |det| = sum log s(a)

Whatever s and t are, this is inverted by arithmetic. Pixels are whole numbers k from 0 to 255; a flow sees (k + u) / 256 with u
uniform in [0, 1), so that its density bounds the probability of the pixel (Theis et al. 2016), in bits per dimension
-log2 p(x) / D + 8. Only the networks inside couplings and priors may compute in half precision; the maps themselves never do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generative.model import CodedGenerator, EvaluationConfig, GeneratorExperiment, GeneratorTask, SamplingConfig, neighbour_accuracy
from lab import seeding
from lab.config import Count, Positive, Settings, UserError
from lab.data import ImageSet, Split, as_float
from lab.experiment import TrainerConfig
from lab.images import Shape
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer

LOG_2PI = math.log(2 * math.pi)
LARGEST = 2.0
"""The largest log scale of a coupling, either way (Glow's code has sigmoid(s + 2), at most 1, which learns more slowly)."""
DRAWS = 4
"""Draws of the dequantising noise that an evaluation's likelihood is the mean over."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Settings):
    """The flow."""

    kind: Literal["nice", "realnvp", "glow"] = "glow"
    """Additive couplings of perceptrons; affine ones of convolutions by checkerboards and channels; affine ones between learned mixings."""
    levels: Count = 2
    """RealNVP, Glow: foldings of the image to a quarter of its places (28 -> 14 -> 7); half the numbers leave at all but the last."""
    steps: Count = 6
    """Couplings of a level (RealNVP: twice as many), or of all (NICE); Glow's each have a normalisation and a mixing before them."""
    hidden: Count = 64
    """Channels, or units (NICE), of the network in each coupling."""
    pixels: Literal["curve", "logit"] = "curve"
    """What takes pixels from [0, 1) to the whole line: the curve that makes the set's grey values normal, or the logit."""
    alpha: Positive = 0.2
    """curve: part of an even histogram mixed into the set's; logit: it is taken of alpha + (1 - 2 alpha) x."""
    conditional: bool = False
    """A prior for each class: the likelihood is then that of an image given its class, and samples can be asked for by class."""
    temperature: Positive = 1.0
    """Samples are drawn from noise of this standard deviation; below 1 they are likelier and more alike (of MNIST: darker)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha >= 0.5:
            raise ValueError("alpha: must be below 0.5, where the logit would take all pixels to one value")


@dataclass(frozen=True, kw_only=True)
class FlowExperiment(GeneratorExperiment):
    """Train a normalising flow."""

    experiment: ClassVar[str] = "flow"

    name: str = "flow"
    """What to call it: the folder below runs/, and the group on W&B."""
    trainer: TrainerConfig = TrainerConfig(steps=10_000)
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-3, schedule="cosine", warmup_steps=200, ema=0.999, clip_norm=1.0)
    model: FlowConfig = FlowConfig()

    def network(self, shape: Shape, classes: tuple[str, ...]) -> Flow:
        """The untrained model."""
        return Flow(self.model, shape, classes)

    def task(self, trainer: Trainer) -> FlowTask:
        """Training by exact likelihood."""
        return FlowTask(self, trainer)


# Invertible maps


class Bijection(nn.Module, ABC):
    """An invertible map of tensors (N, ...), which knows how it changes volumes."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image of x, and log |det| of the map at x, (N,)."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """The x whose image is z."""


def total(terms: Tensor) -> Tensor:
    """The sum over all but the first dimension, (N,)."""
    return terms.flatten(1).sum(1)


def unchanged(x: Tensor) -> Tensor:
    """The log |det| of a map that keeps volumes, (N,)."""
    return x.new_zeros(len(x))


class Fitted(Bijection, ABC):
    """A map that begins as the first images want it."""

    fitting = False
    """Whether the next images are those."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fit if it is time to, then map."""
        if self.fitting:
            self.fit(x)
        return self.transform(x)

    @abstractmethod
    def fit(self, x: Tensor) -> None:
        """Begin as these images want it."""

    @abstractmethod
    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image of x, and log |det|, (N,)."""


class Logit(Bijection):
    """logit(alpha + (1 - 2 alpha) x): from [0, 1] to the whole line (RealNVP, section 4.1)."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] to the whole line."""
        inner = self.alpha + (1 - 2 * self.alpha) * x
        return torch.logit(inner), total(math.log(1 - 2 * self.alpha) - torch.log(inner) - torch.log1p(-inner))

    def inverse(self, z: Tensor) -> Tensor:
        """Back to pixels; what no pixel leads to comes out below 0 or above 1."""
        return (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)


class Curve(Fitted):
    """Pixels through their own distribution function, then through the normal's inverse: alone, every pixel becomes standard normal.

    Four pixels of five in MNIST are black, and their dequantising noise lies within 1/256 of the range. Here it becomes
    nearly normal at once; behind a logit, couplings must learn to stretch it, and it stays uniform. (Gaussianisation of
    each dimension: Chen & Gopinath 2001.)
    """

    share: Tensor
    below: Tensor
    MARGIN = 1e-5
    """What is left of [0, 1] at both ends, so that black and white do not go to infinity."""

    def __init__(self, alpha: float) -> None:
        """Args:
        alpha: part of an even histogram in the one that counts, so that every grey value keeps a place.
        """
        super().__init__()
        self.alpha = alpha
        self.register_buffer("share", torch.full((256,), 1 / 256))
        self.register_buffer("below", torch.arange(256) / 256)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1) to normal numbers, with log |det| = sum log p(x) / N(z; 0, 1)."""
        step = (256 * x).long().clamp(0, 255)
        share = self.share[step]
        inner = self.MARGIN + (1 - 2 * self.MARGIN) * (self.below[step] + share * (256 * x - step))
        z = torch.special.ndtri(inner)
        return z, total(torch.log(256 * (1 - 2 * self.MARGIN) * share) + 0.5 * (z**2 + LOG_2PI))

    def inverse(self, z: Tensor) -> Tensor:
        """Back to pixels in [0, 1], whatever the number."""
        inner = (torch.special.ndtr(z) - self.MARGIN) / (1 - 2 * self.MARGIN)
        step = torch.searchsorted(self.below, inner, right=True).sub(1).clamp(0, 255)
        x: Tensor = (step + ((inner - self.below[step]) / self.share[step]).clamp(0, 1)) / 256
        return x

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take the histogram of these images."""
        histogram = torch.histc((256 * x).floor().float(), 256, 0, 256).double()
        share = (1 - self.alpha) * histogram / histogram.sum() + self.alpha / 256
        self.share.copy_(share)
        self.below.copy_(share.cumsum(0) - share)


class Fold(Bijection):
    """Every 2x2 places become one with four times the channels (RealNVP's squeeze)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) to (N, 4 C, H/2, W/2), channels last: convolutions of few channels are faster so, on every device."""
        return F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last), unchanged(x)

    def inverse(self, z: Tensor) -> Tensor:
        """(N, 4 C, H/2, W/2) to (N, C, H, W)."""
        return F.pixel_shuffle(z, 2)


class Flatten(Bijection):
    """Images as vectors."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) to (N, C H W)."""
        return x.flatten(1), unchanged(x)

    def inverse(self, z: Tensor) -> Tensor:
        """(N, C H W) to (N, C, H, W)."""
        return z.view(-1, *self.shape)


class ActNorm(Fitted):
    """A scale and a shift for each channel, such that the first images come out with mean 0 and variance 1 (Glow, section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x + shift) scale, of maps (N, C, H, W)."""
        return (x + self.shift) * self.log_scale.exp(), x[0, 0].numel() * self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """z / scale - shift."""
        return z * (-self.log_scale).exp() - self.shift

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set shift and scale by these images."""
        std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
        self.shift.copy_(-mean[0])
        self.log_scale.copy_(-(std[0] + 1e-3).log())


class Mixing(Bijection):
    """A learned invertible 1x1 convolution, W = P L (U + diag(s)) (Glow, section 3.2): it begins as a random rotation.

    P is fixed; L and U are triangular, so that log |det W| is the sum of log |s| and costs nothing.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels))
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("signs", diagonal.sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(diagonal.abs().log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W x at every place of maps (N, C, H, W)."""
        return mixed(x, self.matrix()), x[0, 0].numel() * self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """W^-1 z, inverted in fp64."""
        return mixed(z, torch.linalg.inv(self.matrix().double()).to(z.dtype))

    def matrix(self) -> Tensor:
        """W, (channels, channels); never in half precision, whatever the rest is computed in."""
        with torch.autocast(self.signs.device.type, enabled=False):
            upper = self.upper.triu(1) + torch.diag(self.signs * self.log_scale.exp())
            return self.permutation @ (self.lower.tril(-1) + torch.eye(len(upper), dtype=upper.dtype, device=upper.device)) @ upper


def mixed(maps: Tensor, matrix: Tensor) -> Tensor:
    """Maps (N, C, H, W) with their channels mixed by a matrix (C, C); never in half precision."""
    with torch.autocast(maps.device.type, enabled=False):
        return F.conv2d(maps, matrix[:, :, None, None])


# Couplings

Parting = Literal["channels", "checkerboard", "parity"]


def part(x: Tensor, how: Parting) -> tuple[Tensor, Tensor]:
    """Two halves: the first and last channels; black and white fields, folded (N, 2 C, H/2, W/2); even and odd places of vectors."""
    if how == "parity":
        return x[:, ::2], x[:, 1::2]
    if how == "channels":
        first, last = x.chunk(2, 1)
        return first, last
    fields = F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4))
    black, white = fields[:, :, [0, 3]].flatten(1, 2), fields[:, :, [1, 2]].flatten(1, 2)
    return black, white


def joined(first: Tensor, last: Tensor, how: Parting) -> Tensor:
    """The whole of what `part` gave."""
    if how == "parity":
        return torch.stack([first, last], 2).flatten(1)
    if how == "channels":
        return torch.cat([first, last], 1)
    black, white = first.unflatten(1, (-1, 2)), last.unflatten(1, (-1, 2))
    fields = torch.stack([black[:, :, 0], white[:, :, 0], white[:, :, 1], black[:, :, 1]], 2)
    return F.pixel_shuffle(fields.flatten(1, 2), 2)


class Coupling(Bijection):
    """One half moves as the other half says: b' = s(a) b + t(a), or b + t(a) alone. log s lies between -LARGEST and LARGEST."""

    def __init__(self, network: nn.Module, how: Parting, swapped: bool, affine: bool) -> None:
        """Args:
        network: maps the half that stays to shifts and, if affine, as many raw scales; it should begin as zero.
        how: which halves.
        swapped: whether the second half stays, not the first.
        affine: whether the other half is scaled, too.
        """
        super().__init__()
        self.network, self.how, self.swapped, self.affine = network, how, swapped, affine

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Move one half as the other says."""
        still, moved = self._halves(x)
        shift, log_scale = self._motion(still)
        return self._whole(still, moved * log_scale.exp() + shift), total(log_scale)

    def inverse(self, z: Tensor) -> Tensor:
        """Move it back: what stayed says the same again."""
        still, moved = self._halves(z)
        shift, log_scale = self._motion(still)
        return self._whole(still, (moved - shift) * (-log_scale).exp())

    def _motion(self, still: Tensor) -> tuple[Tensor, Tensor]:
        numbers = self.network(still).to(still.dtype)
        if not self.affine:
            return numbers, torch.zeros_like(numbers)
        shift, raw = numbers.chunk(2, 1)
        return shift, LARGEST * torch.tanh(raw / LARGEST)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, last = part(x, self.how)
        return (last, first) if self.swapped else (first, last)

    def _whole(self, still: Tensor, moved: Tensor) -> Tensor:
        return joined(moved, still, self.how) if self.swapped else joined(still, moved, self.how)


L = TypeVar("L", nn.Conv2d, nn.Linear)


def from_zero(layer: L) -> L:
    """A layer that gives nothing at first: every coupling then begins as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


def convolutions(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """3x3, 1x1, 3x3 with ReLU between, as in Glow (section 3.3)."""
    first, last = nn.Conv2d(inputs, hidden, 3, padding=1), nn.Conv2d(hidden, outputs, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU(), from_zero(last))


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three hidden layers with ReLU, as in NICE two to five."""
    body = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*body, from_zero(nn.Linear(hidden, outputs)))


# Whole flows


class Chain(Bijection):
    """Maps one after another."""

    def __init__(self, maps: Sequence[Bijection]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From the first map to the last."""
        change = unchanged(x)
        for each in self.maps:
            x, more = each(x)
            change = change + more
        return x, change

    def inverse(self, z: Tensor) -> Tensor:
        """From the last to the first."""
        for each in reversed(self.maps):
            z = cast(Bijection, each).inverse(z)
        return z


class Leave(Bijection):
    """Half of the channels leave for the code, as noise around what the other half expects of them; the other half goes on.

    The multi-scale architecture of RealNVP (section 3.6), with the learned expectation of Glow's code.
    """

    def __init__(self, channels: int, rest: Bijection) -> None:
        """Args:
        channels: before the parting.
        rest: the map of the half that goes on, to vectors.
        """
        super().__init__()
        self.rest = rest
        self.prior = from_zero(nn.Conv2d(channels // 2, channels, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (N, D): first what the rest makes, then what left."""
        going, leaving = x.chunk(2, 1)
        mean, log_std = self._expected(going)
        codes, change = self.rest(going)
        return torch.cat([codes, ((leaving - mean) * (-log_std).exp()).flatten(1)], 1), change - total(log_std)

    def inverse(self, z: Tensor) -> Tensor:
        """The half that went on tells what was expected of the half that left."""
        codes, left = z.chunk(2, 1)
        going = self.rest.inverse(codes)
        mean, log_std = self._expected(going)
        return torch.cat([going, left.view_as(mean) * log_std.exp() + mean], 1)

    def _expected(self, going: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.prior(going).to(going.dtype).chunk(2, 1)
        return mean, log_std


def nice(config: FlowConfig, shape: Shape) -> Bijection:
    """NICE: additive couplings of even and odd pixels in turn. Its scale for each number is the prior's."""
    half = math.prod(shape) // 2
    couplings = [Coupling(perceptron(half, config.hidden, half), "parity", bool(step % 2), False) for step in range(config.steps)]
    return Chain([Flatten(shape), *couplings])


def realnvp_level(config: FlowConfig, channels: int) -> list[Bijection]:
    """Couplings by checkerboard, a fold, couplings by channels; each with a normalisation before it."""
    maps: list[Bijection] = []
    for step in range(config.steps):
        maps += [ActNorm(channels), affine(config, 2 * channels, "checkerboard", bool(step % 2))]
    maps.append(Fold())
    for step in range(config.steps):
        maps += [ActNorm(4 * channels), affine(config, 2 * channels, "channels", bool(step % 2))]
    return maps


def glow_level(config: FlowConfig, channels: int) -> list[Bijection]:
    """A fold, and steps of normalisation, mixing and coupling."""
    maps: list[Bijection] = [Fold()]
    for _ in range(config.steps):
        maps += [ActNorm(4 * channels), Mixing(4 * channels), affine(config, 2 * channels, "channels", False)]
    return maps


def affine(config: FlowConfig, half: int, how: Parting, swapped: bool) -> Coupling:
    """An affine coupling of convolutions; `half` is the channels of each half."""
    return Coupling(convolutions(half, config.hidden, 2 * half), how, swapped, True)


def multi_scale(config: FlowConfig, shape: Shape) -> Bijection:
    """Levels, at the end of each of which but the last half of the numbers leave; each finds twice the channels and half the size."""
    channels, height, width = shape
    level = realnvp_level if config.kind == "realnvp" else glow_level
    last = config.levels - 1
    rest = Chain([*level(config, channels << last), Flatten((4 * channels << last, height >> config.levels, width >> config.levels))])
    for depth in reversed(range(last)):
        rest = Chain([*level(config, channels << depth), Leave(4 * channels << depth, rest)])
    return rest


class Flow(CodedGenerator):
    """Pixels to noise and back."""

    exact = True
    knobs = frozenset({"temperature"})

    def __init__(self, config: FlowConfig, shape: Shape, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.shape, self.classes, self.latent = config, shape, classes, math.prod(shape)
        check_size(config, shape)
        pixels = Curve(config.alpha) if config.pixels == "curve" else Logit(config.alpha)
        self.bijection = Chain([pixels, nice(config, shape) if config.kind == "nice" else multi_scale(config, shape)])
        self.last = self.latent if config.kind == "nice" else self.latent >> (config.levels - 1)
        self.prior = nn.Embedding(len(classes) if config.conditional else 1, 2 * self.last)
        nn.init.zeros_(self.prior.weight)

    @property
    def conditional(self) -> bool:
        """Whether every class has a prior of its own."""
        return self.config.conditional

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """log p(x) in nats of dequantised images (N, C, H, W) in [0, 1), or log p(x|label) if conditional, (N,)."""
        noise, change = self.to_noise(x, labels)
        return change - 0.5 * total(noise**2 + LOG_2PI)

    def to_noise(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The noise (N, C H W) that dequantised images come from, and log |det| of the way there, (N,)."""
        codes, change = self.bijection(x)
        mean, log_std = self.ground(labels)
        return (codes - mean) * (-log_std).exp(), change - total(log_std)

    def from_noise(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Dequantised images (N, C, H, W) in [0, 1)."""
        mean, log_std = self.ground(labels)
        return self.bijection.inverse(noise * log_std.exp() + mean)

    def ground(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of all numbers, (N, C H W) each: learned for those of the last level, which come first."""
        numbers = self.prior(labels if self.conditional else torch.zeros_like(labels))
        mean, log_std = F.pad(numbers.unflatten(1, (2, self.last)), (0, self.latent - self.last)).unbind(1)
        return mean, log_std

    def bits_per_dim(self, x: Tensor, labels: Tensor) -> Tensor:
        """Bits for each number of an image of 8 bits, (N,), at dequantised images (N, C, H, W)."""
        nats: Tensor = self(x, labels)
        return 8 - nats / (self.latent * math.log(2))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Let the curve and every normalisation begin as these dequantised images want it, from the first to the last."""
        maps = [module for module in self.modules() if isinstance(module, Fitted)]
        for each in maps:
            each.fitting = True
        self.bijection(x)
        for each in maps:
            each.fitting = False

    # Generator

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Noise (N, C H W) that the images come from, each pixel taken at the middle of its step."""
        return self.to_noise(dequantised(images, torch.full_like(images, 0.5)), labels)[0]

    def decode(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1]."""
        return (self.from_noise(codes, labels) * 256 / 255 - 0.5 / 255).clamp(0, 1)

    def codes(self, noise: Tensor) -> Tensor:
        """Noise of the set temperature."""
        return noise * self.config.temperature

    def generate(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        """Images of noise of the temperature asked for."""
        return self.decode(noise * (how.temperature or self.config.temperature), labels)

    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """Exact bits per dimension of the test images, and how well the code tells classes apart."""
        known = ", given the class" if self.conditional else ""
        images = min(len(data.test), config.images)
        protocol = f"{data.name} test, {images} images{known}, uniform dequantisation, mean of {DRAWS} draws, seed {config.seed}"
        scores: dict[str, float | str] = {"protocol": protocol}
        return scores | measured_bits(self, data.test, config, DRAWS) | neighbour_accuracy(self, data)


def check_size(config: FlowConfig, shape: Shape) -> None:
    """Refuse images that cannot be halved or folded.

    Raises:
        UserError: says which sizes can.
    """
    channels, height, width = shape
    if config.kind == "nice":
        if math.prod(shape) % 2:
            raise UserError(f"model.kind nice needs an even number of pixels, and {channels} x {height}x{width} are odd")
        return
    folds = 2**config.levels
    if height % folds or width % folds:
        raise UserError(f"model.levels {config.levels} needs images whose sides are multiples of {folds}, and {height}x{width} is none")


def dequantised(images: Tensor, uniform: Tensor) -> Tensor:
    """(k + u) / 256 of images in [0, 1] that were bytes k, and u in [0, 1)."""
    return ((images * 255).round() + uniform) / 256


@torch.no_grad()
def measured_bits(model: Flow, split: Split, config: EvaluationConfig, draws: int, rows: int = 500) -> dict[str, float]:
    """The mean bits per dimension of a split, over some draws of the dequantising noise."""
    chosen, found = split.spread(config.images), []
    for draw in range(draws):
        for index, (images, labels) in enumerate(zip(chosen.images.split(rows), chosen.labels.split(rows))):
            uniform = torch.rand(images.shape, generator=seeding.generator(config.seed, f"judge/dequantise/{draw}", index))
            found.append(model.bits_per_dim(dequantised(as_float(images), uniform.to(images.device)), labels))
    return {"bits_per_dim": float(torch.cat(found).double().mean())}


# Training


class FlowTask(GeneratorTask):
    """Minimise the bits per dimension on the training set."""

    experiment: FlowExperiment
    model: Flow

    def build(self, trainer: Trainer) -> Flow:
        """The untrained model, normalised by some images of the training set."""
        model: Flow = super().build(trainer)
        images = as_float(self.data.train.spread(512).images).cpu()
        model.fit(dequantised(images, torch.rand(images.shape, generator=seeding.generator(trainer.config.seed, "fit", 0))))
        return model

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """The mean bits per dimension of a shard."""
        images, labels = self.batch(shard)
        x = dequantised(images, shard.uniform("dequantise", *images.shape[1:]))
        return self.model.bits_per_dim(x, labels).mean(), {}

    def test(self, model: Flow, images: int) -> dict[str, float]:
        """Bits per dimension of some images of the test set."""
        return measured_bits(model, self.data.test, EvaluationConfig(images=images), 1)


EXPERIMENT = FlowExperiment()
