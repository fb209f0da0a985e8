"""What the studio's Sample page computes, without a page: one model at a time, given up as soon as nobody waits for it any more."""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import io
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from generative import drawing, metrics
from generative import model as families
from generative.drawing import Editor, Trajectory
from generative.metrics import Features
from generative.model import CodedGenerator, Generator, Loaded, SamplingConfig
from generative.samplers import FLOW, SAMPLERS
from generative.superresolution import SuperResolution, bicubic, nearest, shrink
from lab import checkpoint, classifier, data, media
from lab.attention import maps
from lab.classifier import Classifier
from lab.config import UserError, leaves
from lab.data import DataError, ImageSet, Split, as_float, photo
from lab.data.files import cache_folder, write_atomically
from lab.runs import Run

PLANE = 10
"""Images a side of the plane of codes."""
LINE = 17
"""Places of the way between two samples."""
MOMENTS = 60
"""Pictures of a trajectory that are kept, evenly spaced."""
NEIGHBOURS = 8
FILLINGS = 4
"""Ways in which a hole is filled in."""
MNIST_EXTENT = 20 / 28
"""The longer side of a figure as a part of the image's side, as MNIST was made."""

Wanted = Callable[[], bool]
"""Whether somebody still waits for the work."""


class Dropped(Exception):
    """Nobody waits for this work any more."""


def always() -> bool:
    """For work that is not given up."""
    return True


@dataclass(frozen=True)
class Wish:
    """What is to be drawn; the same wish gives the same pictures, and the same as `scripts/sample.py` with these settings."""

    seed: int = 0
    count: int = 16
    labels: str = ""
    """A class, or all in turn."""
    how: SamplingConfig = SamplingConfig()

    def command(self, source: Path, kind: str = "samples", **more: object) -> str:
        """The command line that draws the same from a run folder or a checkpoint folder."""
        changed = {name: value for name, value in leaves(self.how).items() if value != leaves(SamplingConfig())[name]}
        given: dict[str, object] = {} if kind == "samples" else {"kind": kind}
        given |= {"count": self.count, "seed": self.seed} | ({"labels": self.labels} if self.labels else {}) | changed | more
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return shlex.join(["python", "scripts/sample.py", str(source), *words])


# A model at work


class Easel:
    """A trained generator and what the page draws by it."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.model = loaded, loaded.model
        self._lock = threading.Lock()
        self._telling: tuple[Wish, list[int]] | None = None

    @contextmanager
    def at_work(self, wanted: Wanted) -> Iterator[Generator]:
        """The model for one thread alone; its next layer raises `Dropped` when nobody wants the work any more."""

        def look_up(*_: Any) -> None:
            if not wanted():
                raise Dropped

        with self._lock, torch.no_grad(), ExitStack() as hooks:
            look_up()
            for module in self.model.modules():
                hooks.enter_context(module.register_forward_pre_hook(look_up))
            yield self.model

    # What it can do

    @property
    def plane_shown(self) -> bool:
        """Whether its code has two numbers that mean something."""
        return drawing.small_code(self.model) and self.model.latent >= 2

    @property
    def moves(self) -> bool:
        """Whether there is a way from noise to picture to show."""
        return isinstance(self.model, Trajectory)

    @property
    def rebuilds(self) -> bool:
        """Whether images come back from the code a little different."""
        return isinstance(self.model, CodedGenerator) and not self.model.exact

    @property
    def edits(self) -> bool:
        """Whether holes can be filled in."""
        return isinstance(self.model, Editor) and getattr(self.model, "coder", None) is None

    @property
    def enlarges(self) -> bool:
        """Whether it makes large images of small ones, and none of noise."""
        return isinstance(self.model, SuperResolution)

    def knob(self, name: str) -> float | None:
        """The model's own value of a setting of a `SamplingConfig`; None where it does not know the setting."""
        if name not in self.model.knobs or (name == "guidance" and not self.model.conditional):
            return None
        config = getattr(self.model, "config", None)
        return float(getattr(config, name, 0 if name == "top_k" else 1))

    @property
    def codes(self) -> int:
        """Different tokens there are to draw; 0 for models without tokens."""
        return int(getattr(self.model, "codes", 0)) if "top_k" in self.model.knobs else 0

    @property
    def samplers(self) -> list[str]:
        """Samplers that fit the model; none where there is no choice."""
        if "sampler" not in self.model.knobs:
            return []
        straight = getattr(self.model.config, "process", "") == "flow"
        return [name for name in SAMPLERS if straight or name not in FLOW]

    # Drawing

    def samples(self, wish: Wish, wanted: Wanted = always) -> Tensor:
        """Images (count, C, H, W) in [0, 1]."""
        with self.at_work(wanted) as model:
            noise = drawing.noise_for(model, wish.seed, wish.count)
            return model.generate_all(noise, self.labels(wish), wish.how, drawing.way(wish.seed))

    def labels(self, wish: Wish) -> Tensor:
        """The label of each image of a wish."""
        return drawing.labels_for(wish.labels, self.model.classes, wish.count)

    def trajectory(self, wish: Wish, wanted: Wanted = always) -> list[Tensor]:
        """Images (count, C, H, W) of moments on the way from noise to picture, noise first."""
        with self.at_work(wanted) as model:
            assert isinstance(model, Trajectory)
            noise = drawing.noise_for(self.model, wish.seed, wish.count)
            return drawing.thinned(model.trajectory(noise, self.labels(wish), wish.how, drawing.way(wish.seed)), MOMENTS)

    def between(self, wish: Wish, first: int, last: int, wanted: Wanted = always) -> Tensor:
        """Images (LINE, C, H, W) from one sample of a wish to another, each with the label of the nearer one."""
        with self.at_work(wanted) as model:
            noise, labels = drawing.noise_for(model, wish.seed, wish.count), self.labels(wish)
            start, end = noise[first : first + 1], noise[last : last + 1]
            places = drawing.places(LINE)
            line = torch.cat([drawing.spherical(start, end, place) for place in places])
            if first == last:
                line = start.expand(LINE, -1)
            told = torch.stack([labels[first] if place <= 0.5 else labels[last] for place in places])
            return model.generate_all(line, told, wish.how, drawing.way(wish.seed))

    # The plane of codes

    def telling(self, wish: Wish, wanted: Wanted = always) -> list[int]:
        """Code dimensions, the one that changes the picture most first; those of the last wish are kept."""
        with self.at_work(wanted) as model:
            if self._telling is None or self._telling[0] != wish:
                self._telling = (wish, drawing.sensitive(model, wish.how, wish.seed))
            return self._telling[1]

    def plane(self, wish: Wish, across: int, down: int, wanted: Wanted = always) -> list[Tensor]:
        """The plane of two code dimensions as columns (PLANE, C, H, W)."""
        with self.at_work(wanted) as model:
            codes = drawing.plane(model.latent, across, down, PLANE)
            labels = drawing.labels_for(wish.labels, model.classes, PLANE)
            return [model.generate_all(column, labels, wish.how, drawing.way(wish.seed)) for column in codes.unbind(1)]

    def point(self, wish: Wish, across: int, down: int, place: tuple[float, float], wanted: Wanted = always) -> tuple[Tensor, Tensor]:
        """The image (C, H, W) at a place of that plane, 0 to 1 across and down, and the two numbers there, (2,)."""
        with self.at_work(wanted) as model:
            numbers = drawing.quantile(((torch.tensor(place) * PLANE - 0.5) / (PLANE - 1)).clamp(0, 1))
            code = torch.zeros(1, model.latent)
            code[0, across], code[0, down] = numbers
            row = round(min(max(place[1] * PLANE - 0.5, 0), PLANE - 1))
            label = drawing.labels_for(wish.labels, model.classes, PLANE)[row : row + 1]
            return model.generate_all(code, label, wish.how, drawing.way(wish.seed))[0], numbers

    # What it makes of an image

    def rebuilt(self, image: Tensor, label: int, wanted: Wanted = always) -> Tensor:
        """An image (C, H, W) after the way through the code and back."""
        with self.at_work(wanted) as model:
            assert isinstance(model, CodedGenerator)
            return model.reconstruct(image[None], torch.tensor([label]))[0]

    def filled(self, image: Tensor, stays: Tensor, label: int, wish: Wish, wanted: Wanted = always) -> Tensor:
        """Images (FILLINGS, C, H, W) of other noise each, as they were where `stays` (H, W) is 1 and made anew where it is 0."""
        with self.at_work(wanted) as model:
            assert isinstance(model, Editor)
            noise = drawing.noise_for(self.model, wish.seed, FILLINGS)
            labels = torch.full((FILLINGS,), label)
            return model.inpaint(image.expand(FILLINGS, -1, -1, -1), stays[None, None], noise, labels, wish.how, drawing.way(wish.seed))

    def enlarged(self, image: Tensor, wanted: Wanted = always) -> dict[str, Tensor]:
        """An image (C, H, W) made small, by name: small, enlarged bicubic and by the model, and as it is; and itself enlarged."""
        with self.at_work(wanted) as model:
            assert isinstance(model, SuperResolution)
            factor = model.config.factor
            small = shrink(image[None], factor)
            ways = {"small": nearest(small, factor), "bicubic": bicubic(small, factor), "by the model": model.enlarge(small)}
            whole = model.enlarge(image[None])
            return {name: made[0] for name, made in ways.items()} | {"as it is": image, f"{factor} times its size": whole[0]}


@functools.lru_cache(maxsize=6)
def _opened(source: Path, newest: str) -> Easel:
    return Easel(families.load(str(source)))


def opened(run: Run, moment: Path | None = None) -> Easel:
    """The generator of a run, at its newest whole checkpoint or at another moment; opened once, and again when there is a newer one.

    Raises:
        UserError: there is no whole checkpoint, or the moment's is damaged.
    """
    newest = checkpoint.folders(run.checkpoints)
    return _opened(moment or run.folder, "" if moment or not newest else newest[0].name)


@functools.lru_cache(maxsize=2)
def images_of(config: data.DataConfig) -> ImageSet:
    """The images that a run was trained and tested on, read once."""
    return data.load(config)


# Who says what an image shows


@dataclass(frozen=True)
class Judge:
    """Where a classifier is to be had: a file of features that comes with a set, or a run folder."""

    title: str
    path: Path
    newest: str = ""
    """The run's newest checkpoint."""

    def eyes(self) -> Eyes:
        """The classifier, opened once."""
        return _eyes(self)


class Eyes:
    """A classifier that looks at one image at a time."""

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.methods = [method for method in maps.methods(model.body) if method != "heads"]
        self._lock = threading.Lock()

    def shares(self, image: Tensor) -> dict[str, float]:
        """How probable each class is for an image (C, H, W), the most probable first."""
        with self._lock:
            shares = self.model.probabilities(image[None])[0]
        return {self.model.classes[index]: float(shares[index]) for index in shares.argsort(descending=True).tolist()}

    def look(self, image: Tensor, method: str) -> tuple[Tensor, Tensor]:
        """Where it looks in an image (C, H, W): a map in colours, and that map over the dimmed image, (3, H, W) each."""
        from matplotlib import colormaps

        with self._lock:
            where, _ = maps.where(self.model, image[None], method)
        colours = torch.from_numpy(colormaps["inferno"](where[0].numpy())[..., :3]).float().movedim(-1, 0)
        opacity = 0.8 * where
        return colours, (1 - opacity) * 0.6 * image + opacity * colours


@functools.lru_cache(maxsize=6)
def _eyes(judge: Judge) -> Eyes:
    if judge.path.is_file():
        return Eyes(Features(judge.path.read_bytes()).model)
    return Eyes(classifier.load(str(judge.path)).model)


def judges(shape: Sequence[int], classes: Sequence[str], name: str, runs: Sequence[Run]) -> list[Judge]:
    """Classifiers of images of a shape that know all these classes: features, those of the set `name` first, then runs."""
    known = {path: metrics.facts_of(path.read_bytes()) for path in sorted(metrics.SHIPPED.glob("*.safetensors"))}
    fitting = [path for path, facts in known.items() if facts["shape"] == list(shape) and set(classes) <= set(facts["classes"])]
    fitting.sort(key=lambda path: known[path]["data"] != name)
    found = [Judge(f"features of {known[path]['set']} (come with it)", path) for path in fitting]
    for run in runs:
        facts = (checkpoint.noted(run.checkpoints) or {}).get("facts", {})
        if facts.get("shape") == list(shape) and set(classes) <= set(facts["classes"]):
            newest = checkpoint.folders(run.checkpoints)[0].name
            found.append(Judge(f"{run.folder.parent.name} · {run.folder.name}", run.folder, newest))
    return found


# Neighbours


@dataclass(frozen=True)
class Neighbour:
    """A training image near to another image."""

    index: int
    label: str
    distance: float
    image: Tensor
    """Bytes (C, H, W)."""


def nearest_pixels(image: Tensor, images: ImageSet, wanted: Wanted = always) -> list[Neighbour]:
    """The training images nearest to an image (C, H, W) in [0, 1], made 8-bit first, by Euclidean distance of pixels in [0, 1]."""
    query, parts = as_float(media.to_uint8(image)), []
    for part in images.train.images.split(5000):
        if not wanted():
            raise Dropped
        parts.append((as_float(part) - query).square().flatten(1).sum(1).sqrt())
    return _listed(torch.cat(parts), images)


def nearest_features(image: Tensor, images: ImageSet, features: Features, told: Callable[[float], None]) -> list[Neighbour]:
    """The same by the distance of features; `told` is called with the part, 0 to 1, that is known of the training images' features."""
    others = seen(images, features, told)
    return _listed((others - features.vectors(media.to_uint8(image)[None])).square().sum(1).sqrt(), images)


def _listed(distances: Tensor, images: ImageSet) -> list[Neighbour]:
    train: Split = images.train
    order = distances.argsort(stable=True)[:NEIGHBOURS].tolist()
    return [Neighbour(i, images.classes[int(train.labels[i])], float(distances[i]), train.images[i]) for i in order]


_seen: dict[tuple[ImageSet, Features], Tensor] = {}


def seen(images: ImageSet, features: Features, told: Callable[[float], None]) -> Tensor:
    """The features of all training images, (N, D): looked at once, which takes half a minute for MNIST, and then kept in the cache."""
    if (images, features) not in _seen:
        file = cache_folder() / "metrics" / f"vectors-{features.name}-{metrics.fingerprint(images)}.safetensors"
        _seen.clear()
        try:
            _seen[images, features] = safetensors.torch.load_file(file)["vectors"]
        except (OSError, safetensors.SafetensorError, KeyError):
            parts = []
            for place in range(0, len(images.train), metrics.ROWS):
                told(place / len(images.train))
                parts.append(features.vectors(images.train.images[place : place + metrics.ROWS]))
            vectors = _seen[images, features] = torch.cat(parts)
            with contextlib.suppress(DataError):  # no place to keep it: it will be computed again
                write_atomically(file, safetensors.torch.save({"vectors": vectors}))
    return _seen[images, features]


# To and from a browser


def url(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1] as the address of a PNG that holds it itself."""
    file = io.BytesIO()
    media.picture(image.cpu()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True, eq=False)
class Drawing:
    """What somebody painted."""

    image: Tensor
    """(C, H, W) in [0, 1]; all channels alike unless it is an image of the set."""
    marked: Tensor
    """Bool (H, W): what is to be filled in."""


def read_drawing(text: str, shape: tuple[int, int, int]) -> Drawing:
    """A drawing as the page sends it: two base64 texts of H W bytes, greys and marks, with a comma between.

    Raises:
        UserError: it is none.
    """
    channels, height, width = shape
    try:
        greys, marks = (base64.b64decode(part, validate=True) for part in text.split(","))
    except (ValueError, binascii.Error):
        raise UserError("the page sent a drawing that cannot be read; open the page again") from None
    if not len(greys) == len(marks) == height * width:
        raise UserError(f"the page sent a drawing that has not {height} x {width} pixels; open the page again")
    grey, marked = (torch.frombuffer(bytearray(part), dtype=torch.uint8).view(height, width) for part in (greys, marks))
    return Drawing(as_float(grey).expand(channels, -1, -1), marked > 0)


def greys(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1] as the page takes it to paint on: base64 of its greys."""
    return base64.b64encode(media.to_uint8(image.mean(0)).numpy().tobytes()).decode()


def centred(image: Tensor) -> Tensor:
    """A drawing (C, S, S) on black scaled and centred as MNIST's figures are; as it is where nothing is drawn."""
    return photo.cut_out(image, image.shape[-1], MNIST_EXTENT) if float(image.amax()) > 0 else image


def stays(drawing_: Drawing, what: str) -> Tensor:
    """Float (H, W): 0 where a drawing is to be filled in, as `what` names it: marked, undrawn, or a part of `drawing.holes`."""
    if what == "marked":
        return 1 - drawing_.marked.float()
    if what == "undrawn":
        return (drawing_.image.amax(0) > 0).float()
    height, width = drawing_.marked.shape
    return drawing.without(drawing.holes(height, width)[what], height, width)[0, 0]


def save(run: Run, kind: str, picture: Tensor) -> Path:
    """Write a picture (C, H, W) where `scripts/sample.py` does; returns its path.

    Raises:
        UserError: it cannot be written.
    """
    path = run.media / f"{kind}.png"
    try:
        media.save_png(path, picture)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path
