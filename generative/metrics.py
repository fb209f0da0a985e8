"""How good samples are: how far they lie from real images in the eyes of a frozen classifier, and what can be learnt from them.

    frechet              |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)      Heusel et al. 2017, arXiv:1706.08500, equation 6
    kernel               unbiased MMD^2 with the kernel (x.y / D + 1)^3            Binkowski et al. 2018, arXiv:1801.01401, section 4
    precision, recall    samples among real images, real images among samples      Kynkäänniemi et al. 2019, arXiv:1904.06991
    density, coverage    the same, less at the mercy of single images              Naeem et al. 2020, arXiv:2002.09797
    class accuracy       samples that show the class they were asked for, and whether any class is missing
    cas                  accuracy on real images of a classifier that saw only samples: Ravuri & Vinyals 2019, arXiv:1905.10887
    memorised            samples that lie nearer to a training image than held-out images do

Features are the numbers before the last layer of a small classifier of the set itself (features/, made by
scripts/export_features.py), since a network that knows photographs is no judge of digits. Their SHA-256 is part of their name,
and numbers of different features cannot be compared. What a distance means, its *floor* says, which is what training images score
in place of samples, and a *ladder* of damaged training images; both are measured once for a set and kept in the cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from generative.model import EvaluationConfig, Generator, SamplingConfig, spread_labels
from lab import classifier, media, optimizer, seeding
from lab.classifier import Classifier, ClassifierConfig
from lab.config import UserError
from lab.data import AugmentConfig, DataError, ImageSet, Split, as_float
from lab.data.augment import DRAWS, augment
from lab.data.files import cache_folder, write_atomically
from lab.distributed import native_bf16
from lab.learner import Shard
from lab.optimizer import OptimizerConfig
from lab.recorder import track

VERSION = 1
"""Counts up when a score would come out differently than before, so that nothing old is taken from the cache."""
SHIPPED = Path(__file__).with_name("features")
NEIGHBOURS = 5
"""k of precision, recall, density and coverage."""
FEWEST = 20
"""Test images below which a set is no reference."""
BY_FEATURES = frozenset(
    [f"{name}_{split}" for name in ("frechet", "kernel", "precision", "recall", "density", "coverage") for split in ("test", "train")]
    + ["class_accuracy", "smallest_class_share", "rare_classes"]
)
"""Scores that mean something for one and the same features only."""
CALIBRATION = 10_000
"""Training images, evenly spaced, that the scale of features is measured on."""
ROWS = 500
"""Images that are drawn, looked at or compared at a time."""
AS_TRAINED = SamplingConfig()
"""Samples drawn by a model's own settings."""
LEARN = OptimizerConfig(lr=2e-3, schedule="cosine", warmup_steps=100, weight_decay=0.02)
CHANGES = AugmentConfig(shift=2.0, rotation=10.0, zoom=0.1)
"""How the classifier of the classification accuracy score learns: fixed, since its figures are compared."""


# Features


class Features:
    """A frozen classifier; what stands before its last layer tells how alike images are."""

    def __init__(self, content: bytes, device: torch.device | str = "cpu") -> None:
        """Args:
        content: a file that `pack` made.
        device: where images will be.
        """
        self.facts = facts_of(content)
        self.name = f"{self.facts['set']}-{hashlib.sha256(content).hexdigest()[:8]}"
        self.shape, self.classes = tuple(self.facts["shape"]), tuple(self.facts["classes"])
        self.scale = float(self.facts["scale"])
        self.model = Classifier(ClassifierConfig(backbone=self.facts["backbone"]), self.shape, self.classes)
        self.model.load_state_dict(safetensors.torch.load(content))
        self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """Float32 (N, D), of unit root mean square over real images; `images` are bytes, or floats that are made 8-bit first."""
        images = images if images.dtype == torch.uint8 else media.to_uint8(images)
        return torch.cat([self.model.body(as_float(part)) for part in images.split(ROWS)]).float() / self.scale

    @torch.no_grad()
    def probabilities(self, vectors: Tensor) -> Tensor:
        """Of each class of the classifier, float32 (N, classes), given vectors (N, D)."""
        logits: Tensor = self.model.head(vectors * self.scale)
        return logits.softmax(1)

    def misfit(self, data: ImageSet) -> str:
        """Why these features cannot judge samples of a set, as the end of a sentence; empty where they can."""
        if data.shape != self.shape:
            return f"they see images of {' x '.join(map(str, self.shape))}, not of {' x '.join(map(str, data.shape))}"
        if unknown := [name for name in data.classes if name not in self.classes]:
            return f"they do not know the class {unknown[0]}"
        return f"the set has fewer than {FEWEST} test images" if len(data.test) < FEWEST else ""


def facts_of(content: bytes) -> dict[str, Any]:
    """What a file of features says of itself: set, data, backbone, classes, shape, scale, test_images, test_accuracy, command."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    facts: dict[str, Any] = json.loads(header["__metadata__"]["features"])
    return facts


def pack(loaded: classifier.Loaded) -> bytes:
    """A classifier's run as one safetensors file with its facts as JSON; the same run gives the same bytes."""
    data, settings = loaded.experiment.dataset(), loaded.experiment
    model = loaded.model.cpu()
    vectors = torch.cat([model.body(as_float(part)) for part in data.train.spread(CALIBRATION).images.split(ROWS)])
    facts = {
        "set": Path(settings.data.root).name if data.name == "folder" else data.name,
        "data": data.name,
        "backbone": settings.model.backbone,
        "classes": list(model.classes),
        "shape": list(model.shape),
        "scale": float(vectors.double().square().mean().sqrt()),
        "test_images": len(data.test),
        "test_accuracy": classifier.judge(model, data.test).scores()["accuracy"],
        "command": portable((loaded.run.folder / "command.txt").read_text()),
    }
    weights = {name: weight.float().contiguous() for name, weight in model.state_dict().items()}
    # One entry alone: safetensors writes several in an order of its own, and the checksum would change from time to time.
    return safetensors.torch.save(weights, {"features": json.dumps(facts, sort_keys=True)})


def portable(command: str) -> str:
    """A training command without what says where its run and data stood and who watched; that changes no weight."""
    return re.sub(r" --(run[-_]dir|data\.root|tracking\.\S+?)[ =]\S+", "", command).strip()


@functools.lru_cache(maxsize=4)
def find_features(data: ImageSet, run: str = "") -> Features | None:
    """The features to judge samples of a set by: those of a classifier's run, or else the ones that come with the set, if any do.

    Raises:
        UserError: there is no such run, or its classifier was made for other images.
    """
    device = data.train.images.device
    if run:
        named = Features(pack(classifier.load(run)), device)
        if reason := named.misfit(data):
            raise UserError(f"--features {run}: {reason}")
        return named
    shipped = (path.read_bytes() for path in sorted(SHIPPED.glob("*.safetensors")))
    fitting = (Features(content, device) for content in shipped if facts_of(content)["data"] == data.name)
    return next((features for features in fitting if not features.misfit(data)), None)


# Distances between sets of vectors


class Cloud:
    """The vectors (N, D) of a set of images, and what distances need of them, computed once."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def mean(self) -> Tensor:
        """Float64 (D,)."""
        return self.vectors.double().mean(0)

    @cached_property
    def covariance(self) -> Tensor:
        """Float64 (D, D)."""
        return torch.cov(self.vectors.double().T)

    @cached_property
    def kernel(self) -> float:
        """The mean of the kernel over all pairs of two different vectors."""
        own = float(polynomial((self.vectors.double() ** 2).sum(1) / self.vectors.shape[1]).sum())
        return (kernel_sum(self.vectors, self.vectors) - own) / (len(self) * (len(self) - 1))

    @cached_property
    def radii(self) -> Tensor:
        """How far from each vector its k-th nearest other one lies, (N,)."""
        rank = min(NEIGHBOURS, len(self) - 1)
        # The nearest of all is the vector itself.
        parts = [torch.cdist(part, self.vectors).topk(rank + 1, largest=False).values[:, rank] for part in self.vectors.split(ROWS)]
        return torch.cat(parts)

    def part(self, count: int) -> Cloud:
        """`count` of the vectors, drawn once and for all: evenly spaced ones could be all of one class."""
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=seeding.generator(0, "metrics/part", 0))[:count]
        return Cloud(self.vectors[chosen.to(self.vectors.device)])


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """The squared Fréchet (Wasserstein-2) distance of two Gaussians with means (D,) and covariances (D, D), in float64.

    The trace of (S1 S2)^1/2 is the sum of the roots of the eigenvalues of S1^1/2 S2 S1^1/2, which is symmetric: no root of a
    matrix that has none, and no complex numbers to be thrown away.
    """
    values, axes = torch.linalg.eigh(covariance1.double())
    root = (axes * values.clamp(min=0).sqrt()) @ axes.T
    product = root @ covariance2.double() @ root
    common = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    apart = ((mean1.double() - mean2.double()) ** 2).sum()
    return max(0.0, float(apart + covariance1.double().trace() + covariance2.double().trace() - 2 * common))


def polynomial(products: Tensor) -> Tensor:
    """The cubic kernel of scalar products that were divided by the dimension."""
    return (products + 1) ** 3


def kernel_sum(first: Tensor, second: Tensor) -> float:
    """The kernel summed over all pairs of vectors (N, D) and (M, D), in float64."""
    columns = second.double().T / second.shape[1]
    return sum(float(polynomial(part.double() @ columns).sum()) for part in first.split(ROWS))


def kernel_distance(samples: Cloud, real: Cloud) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy over all pairs; below 0 by chance where sets are alike."""
    between = kernel_sum(samples.vectors, real.vectors) / (len(samples) * len(real))
    return samples.kernel + real.kernel - 2 * between


def neighbour_scores(samples: Cloud, real: Cloud) -> dict[str, float]:
    """Precision, recall, density and coverage; around every vector there is a ball that reaches to its k-th neighbour.

    precision: samples in the ball of any real image; recall: real images in the ball of any sample; density: real balls that a
    sample lies in, as a part of k; coverage: real images with a sample in their own ball.
    """
    balls = 0
    precise = 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.vectors.device) for _ in range(2))
    for part, reach in zip(samples.vectors.split(ROWS), samples.radii.split(ROWS)):
        distances = torch.cdist(part, real.vectors)
        inside = distances <= real.radii
        balls += int(inside.sum())
        precise += int(inside.any(1).sum())
        covered |= inside.any(0)
        recalled |= (distances <= reach[:, None]).any(0)
    return {
        "precision": precise / len(samples),
        "recall": float(recalled.double().mean()),
        "density": balls / (NEIGHBOURS * len(samples)),
        "coverage": float(covered.double().mean()),
    }


def compare(samples: Cloud, real: Cloud) -> dict[str, float]:
    """All distances of samples from real images; those by neighbours, which need equally many of both, of as many as there are."""
    count = min(len(samples), len(real))
    gaussians = frechet_distance(samples.mean, samples.covariance, real.mean, real.covariance)
    return {"frechet": gaussians, "kernel": kernel_distance(samples, real), **neighbour_scores(samples.part(count), real.part(count))}


def class_shares(predicted: Tensor, classes: int) -> dict[str, float]:
    """The share of the rarest class, and how many are rare: have less than 0.4 of an even share (4 % of ten classes)."""
    shares = torch.bincount(predicted, minlength=classes)[:classes].double() / len(predicted)
    return {"smallest_class_share": float(shares.min()), "rare_classes": int((shares < 0.4 / classes).sum())}


# Real images: the floor and the ladder


class Reference:
    """The real images of a set as a frozen classifier sees them: what samples are compared with."""

    def __init__(self, data: ImageSet, features: Features, count: int) -> None:
        self.data, self.features, self.count = data, features, count
        self.train, self.test = (Cloud(features.vectors(split.spread(count).images)) for split in (data.train, data.test))
        self.known = torch.tensor([features.classes.index(name) for name in data.classes], device=data.train.images.device)

    def predicted(self, cloud: Cloud) -> Tensor:
        """Which class of the set each vector shows, (N,); the set's number of classes where it shows another one."""
        matches = self.features.probabilities(cloud.vectors).argmax(1)[:, None] == self.known
        return torch.where(matches.any(1), matches.int().argmax(1), len(self.known))

    def ladder(self) -> dict[str, dict[str, float]]:
        """What training images score in place of samples, whole (`floor`) and damaged, beside the test images."""
        scores: dict[str, dict[str, float]] = remembered(self.data, f"ladder-{self.features.name}-{self.count}", self._ladder)
        return scores

    def _ladder(self) -> dict[str, dict[str, float]]:
        rungs = damaged(self.data.train, self.count, len(self.data.classes))
        return {name: self._scores(Cloud(self.features.vectors(images))) for name, images in track(rungs.items(), len(rungs), "ladder")}

    def _scores(self, cloud: Cloud) -> dict[str, float]:
        scores = {f"{name}_test": value for name, value in compare(cloud, self.test).items()}
        return scores | class_shares(self.predicted(cloud), len(self.known))


reference = functools.lru_cache(maxsize=2)(Reference)
"""The same, not computed anew for the next model that is judged on the same set."""


def damaged(train: Split, count: int, classes: int) -> dict[str, Tensor]:
    """Training images as bytes (N, C, H, W): whole, and with damages that a good score must tell, the worse of a kind after the milder.

    blur: standard deviation in pixels; noise: standard deviation as a part of the whole grey range; classes are left out from the first on.
    """
    whole = train.spread(count).images
    images = as_float(whole)
    noise = torch.randn(images.shape, generator=seeding.generator(0, "metrics/noise", 0)).to(images.device)
    rungs = {"floor": whole}
    rungs |= {f"blur {sigma}": media.to_uint8(blur(images, sigma)) for sigma in (1, 2)}
    rungs |= {f"noise {strength}": media.to_uint8(images + strength * noise) for strength in (0.1, 0.2)}
    if classes > 2:
        rungs["a class missing"] = train.only(range(1, classes)).spread(count).images
        rungs["half missing"] = train.only(range((classes + 1) // 2, classes)).spread(count).images
    return rungs


def blur(images: Tensor, sigma: float) -> Tensor:
    """Images (N, C, H, W) under a Gaussian of standard deviation `sigma` in pixels, mirrored at their edges."""
    reach = min(int(4 * sigma + 0.5), min(images.shape[2:]) - 1)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2)
    kernel = (weights / weights.sum()).view(1, 1, -1)
    single = F.pad(images.flatten(0, 1)[:, None], [reach] * 4, mode="reflect")
    return F.conv2d(F.conv2d(single, kernel[..., None, :]), kernel[..., :, None]).view(images.shape)


def remembered(data: ImageSet, what: str, measure: Callable[[], Any]) -> Any:
    """What `measure` gives (JSON) of a set's images, from the cache where that is known; `what` names all else it depends on."""
    file = cache_folder() / "metrics" / f"{what}-v{VERSION}-{fingerprint(data)}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    measured = measure()
    with contextlib.suppress(DataError):  # no place to keep it: it will be measured again
        write_atomically(file, json.dumps(measured, indent=1).encode())
    return measured


@functools.lru_cache(maxsize=4)
def fingerprint(data: ImageSet) -> str:
    """A number of a set that changes with any of its pixels, labels or classes."""
    digest = hashlib.sha256(repr((data.shape, data.classes)).encode())
    for split in (data.train, data.test):
        for tensor in (split.images, split.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:12]


# What can be learnt from samples


def learnt_from(samples: Split, test: Split, classes: int, steps: int = 1500, batch: int = 128) -> float:
    """Accuracy on real images of a small classifier that was trained on labelled samples alone, always in the same way."""
    device = samples.images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive(0, "cas/weights", 0))
        channels, height, width = samples.images.shape[1:]
        model = Classifier(ClassifierConfig(backbone="small"), (channels, height, width), tuple(map(str, range(classes)))).to(device)
    rule = optimizer.create(LEARN, model.parameters())
    for step in track(range(steps), steps, "classifier of the samples"):
        shard = Shard(0, batch, batch, 0, step, device)
        index = shard.indices(len(samples))
        images = augment(as_float(samples.images[index]), CHANGES, shard.uniform("cas/augment", DRAWS))
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device)):
            loss = F.cross_entropy(model(images), samples.labels[index])
        rule.zero_grad()
        loss.backward()
        for group in rule.param_groups:
            group["lr"] = optimizer.learning_rate(LEARN, step, steps)
        rule.step()
    return classifier.judge(model.eval(), test).scores()["accuracy"]


def learnt_from_real(data: ImageSet, count: int) -> float:
    """The same, learnt from equally many real training images: what samples can reach."""
    number: float = remembered(data, f"cas-{count}", lambda: learnt_from(data.train.spread(count), data.test, len(data.classes)))
    return number


# Memorisation


def nearest(queries: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """How far from each query its nearest image of the pool lies, (N,), and which one it is, (N,).

    Images are bytes, (N, C, H, W) and (M, C, H, W); distances are Euclidean over pixels in [0, 1].
    """
    others = as_float(pool).flatten(1)
    squares = (others**2).sum(1)
    places = [torch.addmm(squares, as_float(part).flatten(1), others.T, alpha=-2).argmin(1) for part in queries.split(ROWS)]
    place = torch.cat(places)
    # Once more, exactly: what was left out above, and rounding, would blur the difference between near and the same.
    return (as_float(queries).flatten(1) - others[place]).square().sum(1).sqrt(), place


def held_out_distance(data: ImageSet) -> float:
    """How near to a training image one test image of a hundred comes."""
    number: float = remembered(data, "nearest", lambda: float(nearest(data.test.images, data.train.images)[0].double().quantile(0.01)))
    return number


# All together


def draw(model: Generator, count: int, seed: int, how: SamplingConfig = AS_TRAINED) -> Split:
    """Samples as they would be saved, in 8 bits, and the labels that they were drawn for: all classes in turn.

    Raises:
        UserError: the model draws something else than numbers.
    """
    labels = spread_labels(count, model.classes).to(next(model.parameters()).device)
    parts = []
    for index, part in enumerate(track(labels.split(ROWS), -(-count // ROWS), f"{count} samples")):
        with torch.no_grad():
            images = model.sample(len(part), part, seeding.generator(seed, "judge/samples", index), how)
        if not bool(images.isfinite().all()):
            raise UserError("this model draws pixels that are no numbers; its training has failed")
        parts.append(media.to_uint8(images))
    return Split(torch.cat(parts), labels)


def judge(
    model: Generator,
    data: ImageSet,
    config: EvaluationConfig,
    features: Features | None = None,
    how: SamplingConfig = AS_TRAINED,
    pictures: Path | None = None,
) -> dict[str, float | str]:
    """Every score of a model's samples beside the real images of a set; `sample_protocol` says how they were taken.

    Args:
        data: on the device of the model.
        features: from `find_features`; without any, the scores that need them are left out.
        how: how samples are drawn.
        pictures: folder for neighbours.png, the samples nearest to training images, each above its neighbour.
    """
    drawn = draw(model, config.samples, config.seed, how)
    scores: dict[str, float | str] = {"samples": len(drawn)}
    if features:
        scores |= seen(features, data, drawn, asked=model.conditional)
    distances, place = nearest(drawn.images, data.train.images)
    scores["memorised"] = float((distances <= held_out_distance(data)).double().mean())
    if pictures:
        shown = distances.topk(min(32, len(drawn)), largest=False).indices
        media.save_png(pictures / "neighbours.png", media.above(as_float(drawn.images[shown]), as_float(data.train.images[place[shown]])))
    if config.cas and model.conditional:
        scores["cas"] = learnt_from(drawn, data.test, len(data.classes))
        scores["cas_real"] = learnt_from_real(data, config.samples)
    return scores | {"sample_protocol": protocol(model, data, config, features, how)}


def seen(features: Features, data: ImageSet, drawn: Split, asked: bool) -> dict[str, float | str]:
    """The scores that features give; `asked`: whether samples were drawn for the labels they have."""
    real, cloud = reference(data, features, len(drawn)), Cloud(features.vectors(drawn.images))
    scores: dict[str, float | str] = {"features": features.name}
    for split, other in (("test", real.test), ("train", real.train)):
        scores |= {f"{name}_{split}": value for name, value in compare(cloud, other).items()}
    predicted = real.predicted(cloud)
    if asked:
        scores["class_accuracy"] = float((predicted == drawn.labels).double().mean())
    return scores | class_shares(predicted, len(data.classes))


def protocol(model: Generator, data: ImageSet, config: EvaluationConfig, features: Features | None, how: SamplingConfig) -> str:
    """How samples were drawn and judged, in one sentence after another."""
    given = [f"{name} {value}" for name, value in vars(how).items() if value != getattr(AS_TRAINED, name)]
    train, test = (len(split.spread(config.samples)) for split in (data.train, data.test))
    sentences = [f"{', '.join([f'{config.samples} samples in 8 bits', *given, f'seed {config.seed}'])}"]
    if features:
        sure = f"{100 * features.facts['test_accuracy']:.2f} % of {features.facts['test_images']} test images right"
        sentences.append(f"beside {test} test and {train} training images of {data.name} in the features {features.name} ({sure})")
        if min(train, test) < config.samples:
            sentences.append(f"precision, recall, density and coverage of {test} (test) and {train} (train) of both")
    else:
        sentences.append(
            f"no features judge this set: scores that need some are left out; --features RUN takes a classifier of {data.name}"
        )
    sentences.append("memorised: nearer to a training image than 99 % of the test images are")
    if config.cas and not model.conditional:
        sentences.append("no cas: this model knows no classes, so that nothing can be learnt of them")
    return "; ".join(sentences)


def titles(scores: Mapping[str, Any]) -> dict[str, str]:
    """What to call each number of a result in a table: those that features gave carry the name of these."""
    of = f" ({scores['features']})" if "features" in scores else ""
    return {name: name.replace("_", " ") + (of if name in BY_FEATURES else "") for name in scores}


def ladder(data: ImageSet, features: Features, count: int) -> dict[str, dict[str, float]]:
    """What training images score in place of `count` samples: see `Reference.ladder`."""
    return reference(data, features, count).ladder()
