"""Draw where a classifier looks, over the pictures it looks at.

    python scripts/attention.py RUN --image 3
    python scripts/attention.py latest --image 3 7 12 --method saliency
    python scripts/attention.py RUN --image 3 --method heads             every head of every layer by itself
    python scripts/attention.py RUN --photo a.jpg b.jpg

rollout: what all layers of attention pass on to the vector that the answer is read from (Abnar & Zuidema 2020); for Transformers.
saliency: how much the answer hangs on each pixel (SmoothGrad, Smilkov et al. 2017); for every network. Photos are made ready as
scripts/classify.py does it. The picture goes to media/attention.png of the run, or to --out. RUN is a run folder, a checkpoint
folder or `latest`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from torch import Tensor

from lab import classifier
from lab.attention import maps
from lab.classifier import Loaded
from lab.config import UserError
from lab.data import as_float, photo
from lab.launch import guarded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 50
"""Rows of a picture that can still be looked at."""
COLOURS = "inferno"
"""Of the maps, from 0 to 1: evenly brighter to the eye."""


@dataclass(frozen=True)
class Options:
    """Which pictures, and how to look at them."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder, or `latest`."""
    image: tuple[int, ...] = ()
    """Images of the test set, counted from 0."""
    photo: tuple[Path, ...] = ()
    """Image files."""
    method: Literal["auto", "rollout", "saliency", "heads"] = "auto"
    """What to draw; auto: rollout where the network has attention over the whole image, else saliency."""
    invert: Literal["auto", "yes", "no"] = "auto"
    """Turn the brightness of photos round; auto: where the photo's border is then more like those of the training images."""
    out: Path | None = None
    """Where to draw, a .png; default: media/attention.png of the run."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Images with what they are, and what they were taken for."""

    images: Tensor
    """Float (N, C, H, W) in [0, 1]."""
    names: list[str]
    """What each one is."""
    answers: list[str]
    """What each one was taken for, and how surely."""


def main() -> int:
    """Draw the images that the command line names."""
    options = tyro.cli(Options, description=__doc__)
    if not 1 <= len(options.image) + len(options.photo) <= MOST:
        raise UserError(f"say what to look at, up to {MOST} in one picture: --image 0 1 2 (of the test set), or --photo FILE")
    if options.out and options.out.suffix != ".png":
        raise UserError(f"--out {options.out}: pictures are written as .png")
    loaded = classifier.load(options.run)
    seen = look(options, loaded)
    figure = draw_heads(loaded, seen) if options.method == "heads" else draw(loaded, seen, options.method)
    out = options.out or loaded.run.media / "attention.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    for name, answer in zip(seen.names, seen.answers):
        print(f"{name}: {answer}")
    print(f"picture: {out}")
    return 0


def look(options: Options, loaded: Loaded) -> Seen:
    """The images that were asked for, and the classifier's answers."""
    model = loaded.model
    images = [photo.read(path, model.shape, loaded.framing, options.invert).image for path in options.photo]
    names = [path.name for path in options.photo]
    if options.image:
        found, labels = tested(options.image, loaded)
        images, names = [*found, *images], [*(f"image {i}: {name}" for i, name in zip(options.image, labels)), *names]
    stacked = torch.stack(images)
    shares, guesses = model.probabilities(stacked).max(1)
    answers = [f"taken for {model.classes[guess]}, {100 * share:.0f} %" for share, guess in zip(shares.tolist(), guesses.tolist())]
    return Seen(stacked, names, answers)


def tested(indices: Sequence[int], loaded: Loaded) -> tuple[Tensor, list[str]]:
    """Images of the test set, and their classes.

    Raises:
        UserError: the test set is not so large.
    """
    data = loaded.experiment.dataset()
    if wrong := [index for index in indices if not 0 <= index < len(data.test)]:
        raise UserError(f"--image {wrong[0]}: the test set of {data.name} has {len(data.test)} images, 0 to {len(data.test) - 1}")
    chosen = torch.tensor(indices)
    return as_float(data.test.images[chosen]), [data.classes[label] for label in data.test.labels[chosen].tolist()]


# Drawing


def draw(loaded: Loaded, seen: Seen, method: str) -> Figure:
    """A row for each image: itself, the map, and the map over it."""
    from matplotlib.figure import Figure

    where, method = maps.where(loaded.model, seen.images, method)
    figure = Figure(figsize=(7.4, 2.6 * len(where)), layout="constrained")
    panels = figure.subplots(len(where), 3, squeeze=False)
    for (plain, alone, over), image, shares, name, answer in zip(panels, seen.images, where, seen.names, seen.answers):
        show(plain, image, name)
        shown = alone.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
        alone.set_title(method)
        show(over, image, answer)
        over.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest", alpha=0.6)
    figure.colorbar(shown, ax=panels, shrink=0.9 / len(where) ** 0.5)
    return figure


def draw_heads(loaded: Loaded, seen: Seen) -> Figure:
    """A block for each image: itself, and beside it a column for each layer and a row for each head."""
    from matplotlib.figure import Figure

    layers = maps.heads(loaded.model, seen.images)
    columns, rows = len(layers) + 1, max(layer.shape[1] for layer in layers)
    figure = Figure(figsize=(1.3 * (columns + 1), 1.4 * rows * len(seen.images)), layout="constrained")
    return figure


def show(axes: Axes, image: Tensor, title: str) -> None:
    """Draw an image as it is, pixel by pixel."""
    axes.imshow(image.movedim(0, -1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title)
    axes.axis("off")


if __name__ == "__main__":
    sys.exit(guarded(main))
