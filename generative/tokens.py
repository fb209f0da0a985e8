"""Transformers that write pictures as tokens of a trained VQ-VAE: from left to right, or all places at once in a few rounds.

    gpt      p(t) = p(t_1 | class) p(t_2 | class, t_1) ...        a GPT that reads the class first (the idea of DALL-E, Ramesh et al. 2021)
    masked   p(hidden tokens | class, tokens that are seen)       a BERT that fills in (MaskGIT, Chang et al. 2022, arXiv:2202.04200)

A sequence is one token that tells the class and then the image's, row by row. While training the class is hidden now and then, so
that sampling can go further than it tells (classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598, here on logits):

    logits = without class + guidance * (with class - without class)

The training set is turned into tokens once, while the first epoch goes through it. The VQ-VAE stays as it is and is part of the model, so a
checkpoint needs no other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from generative.model import EvaluationConfig, Generator, GeneratorExperiment, GeneratorTask, SamplingConfig
from generative.vqvae import VQVAE, VQVAEConfig
from lab import loading, runs, seeding
from lab.attention.multihead import Cache
from lab.backbones.bert import BERT
from lab.backbones.gpt import GPT, choose
from lab.config import Count, Decay, NonNegative, Positive, Settings, UserError
from lab.data import ImageSet, Split, as_float
from lab.experiment import TrainerConfig
from lab.images import Shape, trained_weights
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer

KIND = {"vqvae": "generative.vqvae"}
ROWS = 500
"""Images encoded or judged at a time."""


@dataclass(frozen=True, kw_only=True)
class TokensConfig(Settings):
    """The Transformer, and how it is drawn from."""

    kind: Literal["gpt", "masked"] = "gpt"
    """Write one token after another, or fill in all places in a few rounds."""
    width: Count = 128
    """Numbers of each token inside the Transformer, a multiple of heads."""
    layers: Count = 4
    """Layers of attention."""
    heads: Count = 4
    """Heads of each attention."""
    dropout: Decay = 0.0
    """Share of embeddings, attention weights and layers' outputs set to zero while training."""
    label_drop: Positive = 0.1
    """Share of training images whose class is hidden."""
    guidance: NonNegative = 1.5
    """Weight of the class where sampling sets none; 1: as learnt, above: clearer and less varied."""
    temperature: Positive = 1.0
    """Logits are divided by it where sampling sets none; below 1: likelier and less varied pictures."""
    steps: Count = 12
    """Masked: rounds of filling in where sampling sets none."""
    choice_temperature: NonNegative = 4.5
    """Masked: how much chance is in which places are filled in first, falling to 0 in the last round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of heads, {self.heads}")
        if self.label_drop >= 1:
            raise ValueError(f"label_drop: a share below 1 of the images, found {self.label_drop}")


@dataclass(frozen=True, kw_only=True)
class TokensExperiment(GeneratorExperiment):
    """Train a Transformer on the tokens of a VQ-VAE."""

    experiment: ClassVar[str] = "tokens"

    name: str = "tokens"
    """What to call it: the folder below runs/, and the group on W&B."""
    vqvae: str = ""
    """Run of the VQ-VAE whose tokens are learnt: its folder, a checkpoint folder, or `latest`."""
    trainer: TrainerConfig = TrainerConfig(steps=3000)
    optimizer: OptimizerConfig = OptimizerConfig(
        lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, schedule="cosine", warmup_steps=200, ema=0.995, clip_norm=1.0
    )
    model: TokensConfig = TokensConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.augment.active:
            raise ValueError("data.augment: images become tokens once, before training; augment when the VQ-VAE is trained, and not here")

    def network(self, shape: Shape, classes: tuple[str, ...]) -> TokenPrior:
        """The untrained model around an untrained VQ-VAE."""
        return self.around(VQVAE(VQVAEConfig(), shape, classes))

    def rebuild(self, facts: Mapping[str, Any]) -> TokenPrior:
        """The model of a run whose weights are about to be loaded; the VQ-VAE's run is not needed."""
        return self.around(VQVAE(VQVAEConfig(**facts["vqvae"]), tuple(facts["shape"]), tuple(facts["classes"])))

    def around(self, vqvae: VQVAE) -> TokenPrior:
        """The untrained Transformer around a VQ-VAE."""
        return {"gpt": GPTPrior, "masked": MaskedPrior}[self.model.kind](self.model, vqvae)

    def task(self, trainer: Trainer) -> TokensTask:
        """Training by cross-entropy."""
        return TokensTask(self, trainer)


# The mathematics


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Logits (N, ...) of those with the class, followed by those without it unless guidance is 1: (2 N, ...) or (N, ...)."""
    if guidance == 1:
        return logits.float()
    told, untold = logits.float().chunk(2)
    return untold + guidance * (told - untold)


def hidden_share(progress: Tensor | float) -> Tensor:
    """The share of places that are hidden when `progress` of the way, in [0, 1], is done: a cosine (Chang et al., section 3.3)."""
    return torch.cos(torch.as_tensor(progress, dtype=torch.float64) * math.pi / 2)


def places_left(steps: int, places: int) -> list[int]:
    """How many places are still hidden after each round: by the cosine, but at least one fewer every round, and none at last."""
    left = [places]
    for step in range(1, steps + 1):
        planned = int(hidden_share(step / steps) * places) if step < steps else 0
        left.append(max(0, min(planned, left[-1] - 1)))
    return left[1 : left.index(0) + 1]


def ranks(values: Tensor) -> Tensor:
    """The place of each value among those of its row from the lowest, 0, to the highest, (N, L)."""
    return values.argsort(1).argsort(1)


def hide(tokens: Tensor, draws: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """Tokens (N, L) with some replaced by `mask`, and which ones, bool (N, L); one at least.

    Args:
        draws: uniform in [0, 1), (N, L + 1): the first tells how many are hidden, the others which.
    """
    count = (hidden_share(draws[:, :1]) * tokens.shape[1]).ceil().clamp(min=1)
    hidden = ranks(draws[:, 1:]) < count
    return tokens.masked_fill(hidden, mask), hidden


def keep_surest(tokens: Tensor, drawn: Tensor, confidence: Tensor, left: int, mask: int) -> Tensor:
    """Fill hidden places of tokens (N, L) with what was drawn, but for the `left` least confident ones; what is there already stays."""
    hidden = tokens == mask
    unsure = ranks(confidence.masked_fill(~hidden, math.inf)) < left
    return torch.where(hidden, drawn, tokens).masked_fill(unsure, mask)


class TokenPrior(Generator, ABC):
    """A Transformer over a class and an image's tokens, and the VQ-VAE that makes images of them.

    Tokens are 0 .. codes - 1, then come the classes, and then one that stands for a class that is hidden.
    """

    knobs: ClassVar[frozenset[str]] = frozenset({"guidance", "temperature", "top_k"})

    def __init__(self, config: TokensConfig, vqvae: VQVAE) -> None:
        super().__init__()
        self.config, self.shape, self.classes, self.latent = config, vqvae.shape, vqvae.classes, vqvae.latent
        self.vqvae = vqvae.requires_grad_(False)
        self.codes = vqvae.config.codes
        self.vocabulary = self.codes + len(self.classes) + 1

    @property
    def conditional(self) -> bool:
        """Whether sampling needs labels."""
        return True

    @abstractmethod
    def draw(self, uniform: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None) -> Tensor:
        """Tokens (N, places) of numbers uniform in [0, 1), one for each, and labels (N,)."""

    def class_token(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor:
        """The first token of a sequence, (N, 1), for labels (N,), some of which may be hidden, bool (N,)."""
        told = self.codes + labels
        return (told if dropped is None else told.masked_fill(dropped, self.vocabulary - 1))[:, None]

    def beginnings(self, labels: Tensor, guidance: float) -> Tensor:
        """First tokens (N, 1), and unless guidance is 1 the same number again without a class, as `guided` takes their logits."""
        told = self.class_token(labels)
        return told if guidance == 1 else torch.cat([told, torch.full_like(told, self.vocabulary - 1)])

    def generate(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        """Images of tokens, each of which is drawn by the number of the noise at its place."""
        return self.vqvae.render(self.draw(torch.special.ndtr(noise.double()), labels, how, generator))

    def settled(self, how: SamplingConfig) -> tuple[float, float, int | None]:
        """Guidance, temperature and top_k: those that are set, else the model's own."""
        return how.guidance or self.config.guidance, how.temperature or self.config.temperature, how.top_k or None


class GPTPrior(TokenPrior):
    """Writes one token after another."""

    def __init__(self, config: TokensConfig, vqvae: VQVAE) -> None:
        super().__init__(config, vqvae)
        self.network = GPT(self.vocabulary, config.width, config.layers, config.heads, self.latent, dropout=config.dropout)

    def forward(self, sequence: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Logits of the image's token after each of these, fp32, (N, L) to (N, L, codes); see `GPT`."""
        logits: Tensor = self.network(sequence, caches)[..., : self.codes]
        return logits.float()

    def nats(self, tokens: Tensor, labels: Tensor, dropped: Tensor | None = None) -> Tensor:
        """-log p of each token given the class and all before it, (N, places), all at once (teacher forcing)."""
        logits = self(torch.cat([self.class_token(labels, dropped), tokens[:, :-1]], 1))
        return F.cross_entropy(logits.mT, tokens, reduction="none")

    @torch.no_grad()
    def draw(self, uniform: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        """One token after another, with the keys and values of those before kept; nothing but `uniform` is random."""
        guidance, temperature, top_k = self.settled(how)
        sequence, caches = self.beginnings(labels, guidance), self.network.caches()
        written = []
        for numbers in uniform.unbind(1):
            token = choose(guided(self(sequence, caches)[:, -1], guidance), numbers, temperature, top_k)
            written.append(token)
            sequence = token.repeat(len(sequence) // len(token))[:, None]
        return torch.stack(written, 1)

    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """Exact bits of the test images' tokens, given the class; the VQ-VAE's own loss is not in them."""
        split = data.test.spread(config.images)
        protocol = f"{data.name} test, {len(split)} images, -log2 p(tokens | class) with every token told those before it"
        return {"protocol": protocol, **measured_bits(self, encoded(self.vqvae, split), split.labels)}


class MaskedPrior(TokenPrior):
    """Fills in hidden tokens; the one that hides is `vocabulary`."""

    knobs: ClassVar[frozenset[str]] = TokenPrior.knobs | {"steps"}

    def __init__(self, config: TokensConfig, vqvae: VQVAE) -> None:
        super().__init__(config, vqvae)
        self.network = BERT(self.vocabulary, config.width, config.layers, config.heads, self.latent + 1, config.dropout)

    def forward(self, sequence: Tensor) -> Tensor:
        """Logits of the token at each place, fp32 (N, places, codes), of a class token and the image's, (N, 1 + places)."""
        logits: Tensor = self.network(sequence)[:, 1:, : self.codes]
        return logits.float()

    def nats(self, tokens: Tensor, labels: Tensor, draws: Tensor, dropped: Tensor | None = None) -> Tensor:
        """-log p of a hidden token given the class and those that are seen, averaged over the image's hidden ones, (N,); see `hide`."""
        seen, hidden = hide(tokens, draws, self.vocabulary)
        logits = self(torch.cat([self.class_token(labels, dropped), seen], 1))
        return (F.cross_entropy(logits.mT, tokens, reduction="none") * hidden).sum(1) / hidden.sum(1)

    @torch.no_grad()
    def draw(self, uniform: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        """In every round draw all hidden tokens and keep the surest (Chang et al., section 3.2, "iterative decoding").

        Args:
            generator: of the chance in which ones are kept; without one, its numbers are the same at every call.
        """
        guidance, temperature, top_k = self.settled(how)
        start, tokens = self.beginnings(labels, guidance), torch.full_like(uniform, self.vocabulary, dtype=torch.long)
        rounds = places_left(how.steps or self.config.steps, self.latent)
        generator = generator or seeding.generator(0, "rounds", 0)
        for index, left in enumerate(rounds):
            sequence = torch.cat([start, tokens.repeat(len(start) // len(tokens), 1)], 1)
            logits = guided(self(sequence), guidance)
            # The numbers of the places turn by the golden section: as good as new ones every round, and still those of the noise.
            numbers = (uniform + index * (math.sqrt(5) - 1) / 2) % 1
            drawn = choose(logits.flatten(0, 1), numbers.flatten(), temperature, top_k).view_as(tokens)
            confidence = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            chance = self.config.choice_temperature * (1 - (index + 1) / len(rounds))
            gumbel = -torch.empty(tokens.shape, device=generator.device).exponential_(generator=generator).log()
            tokens = keep_surest(tokens, drawn, confidence + chance * gumbel.to(confidence.device), left, self.vocabulary)
        return tokens


# Judging


@torch.no_grad()
def encoded(vqvae: VQVAE, split: Split) -> Tensor:
    """A whole split in tokens, int64 (N, places); in fp32 whatever the precision of training, so that it is the same everywhere."""
    with torch.autocast(split.images.device.type, enabled=False):
        return torch.cat([vqvae.tokens(as_float(images)) for images in split.images.split(ROWS)])


@torch.no_grad()
def measured_bits(model: GPTPrior, tokens: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean bits of an image's tokens (N, places) given its label, and of each token."""
    parts = zip(tokens.split(ROWS), labels.split(ROWS))
    total = sum(float(model.nats(part, part_labels).double().sum()) for part, part_labels in parts)
    bits = total / math.log(2) / len(tokens)
    return {"bits_per_image": bits, "bits_per_token": bits / model.latent}


@torch.no_grad()
def measured_guesses(model: MaskedPrior, tokens: Tensor, labels: Tensor) -> dict[str, float]:
    """Bits of a hidden token of (N, places) as in training, with the same ones hidden at every call; not a likelihood of images."""
    draws = torch.rand(len(tokens), model.latent + 1, generator=seeding.generator(0, "judge/hidden", 0)).to(tokens.device)
    parts = zip(tokens.split(ROWS), labels.split(ROWS), draws.split(ROWS))
    total = sum(float(model.nats(*part).double().sum()) for part in parts)
    return {"bits_per_hidden_token": total / math.log(2) / len(tokens)}


# Training


class Tokens:
    """A training set in tokens, which are made when they are first asked for, so that training begins at once.

    They are made `ROWS` images at a time, in the order of the first epoch: what an image becomes depends on no batch, no process and no
    start (the last bit of a convolution, and so now and then a token, may depend on what else is computed with it).
    """

    def __init__(self, vqvae: VQVAE, split: Split, seed: int) -> None:
        self.vqvae, self.split = vqvae, split
        self.order = seeding.epoch_order(seed, 0, len(split)).to(split.images.device)
        self.block = self.order.argsort() // ROWS
        """Of each image, which lot it is encoded in."""
        self.missing = set(range(math.ceil(len(split) / ROWS)))
        """Lots that are not encoded yet."""
        self.tokens = torch.zeros(len(split), vqvae.latent, dtype=torch.long, device=split.images.device)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Tokens int64 (B, places) of some images (B,)."""
        for block in sorted(self.missing.intersection(self.block[index].tolist())) if self.missing else ():
            lot = self.order[block * ROWS : (block + 1) * ROWS]
            self.tokens[lot] = encoded(self.vqvae, self.split.at(lot))
            self.missing.remove(block)
        return self.tokens[index]


class TokensTask(GeneratorTask):
    """Minimise the cross-entropy of the training set's tokens."""

    experiment: TokensExperiment
    model: TokenPrior

    def build(self, trainer: Trainer) -> TokenPrior:
        """The Transformer at the first step around the trained VQ-VAE; a run that goes on has the weights of both in its checkpoint.

        Raises:
            UserError: no run of a VQ-VAE is named, or it saw images of another shape.
        """
        if trainer.noted is not None:
            self.facts["vqvae"] = trainer.noted["vqvae"]
            return self.experiment.rebuild(self.facts)
        name = self.experiment.vqvae
        if not name:
            raise UserError("vqvae: name the run of the VQ-VAE whose tokens are to be learnt, as in --vqvae runs/vqvae_mnist/... or latest")
        found = runs.find(name, KIND)
        self.facts["vqvae"] = dataclasses.asdict(loading.settings_of(found.run, KIND).model)
        model = self.experiment.rebuild(self.facts)
        saved = trainer.world.share(loading.saved(found, ("model", "ema")) if trainer.world.main else None)
        shape = tuple(saved.notes["facts"]["shape"]) if saved else ()
        if shape != self.data.shape:
            mine, its = (" x ".join(map(str, sides)) for sides in (self.data.shape, shape))
            raise UserError(f"vqvae {name}: it was trained on images of shape {its}, and these are {mine}; use the same data for both")
        model.vqvae.load_state_dict(trained_weights(cast(Any, saved)))
        return model

    @functools.cached_property
    def tokens(self) -> Tokens:
        """The training set in tokens; begun at the first step, when a run that goes on has its weights back."""
        return Tokens(self.model.vqvae, self.data.train, self.experiment.trainer.seed)

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """The mean cross-entropy of a shard's tokens in nats: of all of them (gpt), or of each image's hidden ones (masked)."""
        index = shard.indices(len(self.data.train))
        tokens, labels = self.tokens[index], self.data.train.labels[index]
        dropped = shard.uniform("labels") < self.experiment.model.label_drop
        if isinstance(self.model, MaskedPrior):
            return self.model.nats(tokens, labels, shard.uniform("hidden", 1 + self.model.latent), dropped).mean(), {}
        return cast(GPTPrior, self.model).nats(tokens, labels, dropped).mean(), {}

    def test(self, model: TokenPrior, images: int) -> dict[str, float]:
        """Bits of the tokens of some images of the test set."""
        split = self.data.test.spread(images)
        tokens = encoded(model.vqvae, split)
        if isinstance(model, MaskedPrior):
            return measured_guesses(model, tokens, split.labels)
        return measured_bits(cast(GPTPrior, model), tokens, split.labels)


EXPERIMENT = TokensExperiment()
