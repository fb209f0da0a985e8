"""Classifiers: any backbone with one linear layer on top, from scratch or from another run's weights.

    logits = W dropout(backbone(x)) + b        loss = cross-entropy with the label smoothed over all classes (Szegedy et al. 2015)

Transfer (`init`) takes the backbone of another classifier. With `freeze` only the last layer learns at first; with `thaw_every` the
frozen parts join one by one, from the last to the first (gradual unfreezing, Howard & Ruder 2018), so that the noisy gradients of
an untrained last layer do not wreck what was learnt before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab import backbones, loading, media, runs
from lab.checkpoint import Checkpoint
from lab.config import Decay, Natural, Settings, UserError
from lab.data import AugmentConfig, DataConfig, Split, as_float, photo
from lab.data.photo import Framing
from lab.experiment import TrainerConfig
from lab.images import ImageExperiment, ImageTask, Shape, Trained, load_trained, trained_weights
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer

FAMILIES = {"classifier": "lab.classifier"}
ROWS = 500
"""Images judged at a time."""


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Settings):
    """The network."""

    backbone: str = "resnet_small"
    """Network that sees, by name; `python scripts/backbones.py` lists all."""
    dropout: Decay = 0.0
    """Share of the backbone's numbers that are hidden from the last layer while training."""
    label_smoothing: Decay = 0.0
    """Share of the target that is spread over all classes."""


@dataclass(frozen=True, kw_only=True)
class ClassifierExperiment(ImageExperiment):
    """Train a classifier."""

    experiment: ClassVar[str] = "classifier"

    name: str = "classifier"
    """What to call it: the folder below runs/, and the group on W&B."""
    init: str = ""
    """Run of a classifier whose backbone this one begins with (and whose last layer too, where the classes are the same)."""
    freeze: bool = False
    """Hold the backbone that came from `init`: at first only the last layer learns."""
    thaw_every: Natural = 0
    """Steps after which one more frozen part learns too, from the last to the first; 0: they stay frozen."""
    trainer: TrainerConfig = TrainerConfig(steps=4_000, precision="auto")
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, schedule="cosine", warmup_steps=200, weight_decay=0.02, ema=0.998)
    data: DataConfig = DataConfig(augment=AugmentConfig(shift=2.0, rotation=10.0, zoom=0.1))
    model: ClassifierConfig = ClassifierConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze and not self.init:
            raise ValueError("freeze: there is nothing to hold without init, the run whose backbone this one begins with")
        if self.thaw_every and not self.freeze:
            raise ValueError("thaw_every: nothing is frozen; set freeze too")

    def network(self, shape: Shape, classes: tuple[str, ...]) -> Classifier:
        """The untrained model."""
        return Classifier(self.model, shape, classes)

    def task(self, trainer: Trainer) -> ClassifierTask:
        """Training by cross-entropy."""
        return ClassifierTask(self, trainer)


# The mathematics


class Classifier(nn.Module):
    """A backbone and a linear layer."""

    def __init__(self, config: ClassifierConfig, shape: Shape, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.shape, self.classes = shape, classes
        self.body = backbones.create(config.backbone, shape[0], shape[1])
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.body.out_features, len(classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 (N, classes), of images (N, C, H, W) in [0, 1] or bytes."""
        logits: Tensor = self.head(self.dropout(self.body(images)))
        return logits.float()

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Float32 (N, classes), a part of the images at a time."""
        return torch.cat([self(part).softmax(1) for part in images.split(ROWS)])


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a classifier made of labelled images."""

    probabilities: Tensor
    """(N, classes)."""
    labels: Tensor
    """(N,)."""

    @property
    def predicted(self) -> Tensor:
        """The most probable class of each image, (N,)."""
        return self.probabilities.argmax(1)

    @property
    def confusion(self) -> Tensor:
        """How many images of each class (row) were taken for each class (column)."""
        classes = self.probabilities.shape[1]
        return torch.bincount(self.labels * classes + self.predicted, minlength=classes**2).view(classes, classes)

    @property
    def wrong(self) -> Tensor:
        """Indices of the mistakes, the surest first."""
        mistakes = (self.predicted != self.labels).nonzero().flatten()
        sure = self.probabilities.max(1).values[mistakes]
        return mistakes[sure.argsort(descending=True, stable=True)]

    def scores(self) -> dict[str, float]:
        """Accuracy with its 95 % interval, negative log-likelihood in nats, and the expected calibration error."""
        count, errors = len(self.labels), len(self.wrong)
        low, high = wilson(count - errors, count)
        chosen = self.probabilities[torch.arange(count, device=self.labels.device), self.labels]
        return {
            "accuracy": 1 - errors / count,
            "accuracy_low": low,
            "accuracy_high": high,
            "errors": errors,
            "nll": float(-chosen.double().clamp(min=1e-12).log().mean()),
            "calibration_error": calibration_error(self.probabilities.max(1).values, self.predicted == self.labels),
        }


def wilson(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): right also near 0 and 1, where the usual one leaves the possible."""
    share, spread = successes / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """How far confidence is from accuracy, on average over `bins` equal bins of confidence (Guo et al. 2017, equation 3)."""
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gaps.index_add_(0, place, confidence.double() - right.double())
    return float(gaps.abs().sum() / len(confidence))


def judge(model: Classifier, split: Split) -> Judgement:
    """What a model makes of a split."""
    parts = [model.probabilities(as_float(images)) for images in split.images.split(ROWS)]
    return Judgement(torch.cat(parts), split.labels)


# Training


class ClassifierTask(ImageTask):
    """Minimise the cross-entropy on the training set."""

    experiment: ClassifierExperiment
    model: Classifier

    def __init__(self, experiment: ClassifierExperiment, trainer: Trainer) -> None:
        super().__init__(experiment, trainer)
        if not len(self.data.test):
            raise UserError(f"{self.data.name}: no image is left for testing; every class needs two at least")
        self.facts |= {"framing": dataclasses.asdict(photo.framing(self.data.train))}

    def build(self, trainer: Trainer) -> Classifier:
        """The model at the first step: untrained, or with the weights of another run."""
        model: Classifier = super().build(trainer)
        if (init := self.experiment.init) and trainer.noted is None:
            saved = trainer.world.share(source(init) if trainer.world.main else None)
            begin(model, cast(Checkpoint, saved), init)
        return model

    def step(self, trainer: Trainer) -> Metrics:
        """One update of what is not frozen at this step."""
        if self.experiment.freeze:
            trainer.freeze(self.learner, self.frozen(trainer.step))
        return super().step(trainer)

    def frozen(self, step: int) -> list[nn.Module]:
        """The parts that are held at a step."""
        parts = [part for part in self.model.body.sequence if any(True for _ in part.parameters())]  # others have nothing to thaw
        thawed = step // self.experiment.thaw_every if self.experiment.thaw_every else 0
        return parts[: max(0, len(parts) - thawed)]

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """The mean cross-entropy of a shard, and its accuracy."""
        images, labels = self.batch(shard)
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.experiment.model.label_smoothing)
        return loss, {"accuracy": (logits.argmax(1) == labels).double().mean()}

    def preview(self, trainer: Trainer) -> dict[str, float | int | str]:
        """Test scores, the confusion matrix, and the mistakes that the model was surest of."""
        with self.learner.judged() as judged:
            result = judge(cast(Classifier, judged), self.data.test)
        scores = {f"eval/{name}": value for name, value in result.scores().items() if name in ("accuracy", "errors", "nll")}
        pictures = trainer.picture("mistakes", mistakes(result, self.data.test, self.data.classes), 1)
        return scores | pictures | trainer.picture("confusion", confusion(result, self.data.classes), 1)


def confusion(result: Judgement, classes: Sequence[str]) -> Tensor:
    """The confusion matrix as a picture (3, H, W)."""
    return media.matrix(result.confusion.tolist(), classes, "predicted", "true")


def mistakes(result: Judgement, split: Split, classes: Sequence[str], count: int = 20) -> Tensor:
    """The surest mistakes as a picture (3, H, W): each image with what it is, what it was taken for and how surely."""
    chosen = result.wrong[:count]
    rows = zip(result.labels[chosen].tolist(), result.predicted[chosen].tolist(), result.probabilities[chosen].amax(1).tolist())
    captions = [f"{classes[label]} → {classes[guess]} {100 * sure:.0f} %" for label, guess, sure in rows]
    return media.captioned(as_float(split.images[chosen]), captions)


# Transfer and loading


def source(init: str) -> Checkpoint:
    """The newest checkpoint of the run to begin with, or the one that is named."""
    return loading.saved(runs.find(init, FAMILIES), ("model", "ema"))


def begin(model: Classifier, saved: Checkpoint, init: str) -> None:
    """Put in the weights of another classifier: of its backbone, and of its last layer where the classes are the same.

    Raises:
        UserError: the backbones are not of one kind, or see images of another shape.
    """
    weights, same = trained_weights(saved), tuple(saved.notes["facts"]["classes"]) == model.classes
    own = model.state_dict()
    taken = {name: weight for name, weight in weights.items() if same or not name.startswith("head.")}
    both = own.keys() & weights.keys()
    if misfit := [name for name in {**own, **weights} if name not in both or (name in taken and taken[name].shape != own[name].shape)]:
        channels, height, width = saved.notes["facts"]["shape"]
        raise UserError(
            f"init {init}: its weights do not fit this network (first at {misfit[0]}); use the same model.backbone, and images of its "
            f"shape, {channels} x {height} x {width}"
        )
    model.load_state_dict(own | taken)


class Loaded(Trained[Classifier]):
    """A trained classifier and where it comes from."""

    @property
    def framing(self) -> Framing:
        """How the images are framed that it was trained on."""
        return Framing(**self.facts["framing"])


def load(name: str, device: str | torch.device = "cpu") -> Loaded:
    """The classifier of a run: a run folder, a checkpoint folder, or `latest`."""
    return Loaded(**vars(load_trained(name, FAMILIES, device)))


EXPERIMENT = ClassifierExperiment()
