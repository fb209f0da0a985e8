"""Draw where a classifier looks, over the pictures it looks at.

    python scripts/attention.py RUN --image 3
    python scripts/attention.py latest --image 3 7 12 --method saliency
    python scripts/attention.py RUN --image 3 --method heads             every head of every layer by itself
    python scripts/attention.py RUN --photo a.jpg b.jpg

rollout: what all layers of attention together pass on to the vector that the answer is read from; for Transformers.
gradcam: which places of the last map speak for the answer; for networks that end in the mean over all places, as most CNNs do.
saliency: how much the answer hangs on each pixel; for every network. lab/attention/maps.py has the formulas and the papers.
Each map is drawn from 0 to its own maximum, 1. Photos are made ready as scripts/classify.py does it. The picture goes to
media/attention.png of the run, or to --out. RUN is a run folder, a checkpoint folder or `latest`.
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
    from matplotlib.image import AxesImage

DIM = 0.6
"""Brightness of an image under a map, whose colours would be lost on white."""
OPACITY = 0.8
"""Of a map over an image, where it is 1."""
MOST = 50
"""Rows of a picture that can still be looked at."""


@dataclass(frozen=True)
class Options:
    """Which pictures, and how to look at them."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder, or `latest`."""
    image: tuple[int, ...] = ()
    """Images of the test set, counted from 0."""
    photo: tuple[Path, ...] = ()
    """Image files."""
    method: Literal["auto", "rollout", "gradcam", "saliency", "heads"] = "auto"
    """What to draw; auto: the first of rollout, gradcam and saliency that the network has."""
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
    names = [path.name[:28] for path in options.photo]
    if options.image:
        found, labels = tested(options.image, loaded)
        images, names = [*found, *images], [*(f"image {i}, true: {name}" for i, name in zip(options.image, labels)), *names]
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

    shares, method = maps.where(loaded.model, seen.images, method)
    figure = Figure(figsize=(7.6, 2.5 * len(shares)), layout="constrained")
    panels = figure.subplots(len(shares), 3, squeeze=False)
    for row, image, each, name, answer in zip(panels, seen.images, shares, seen.names, seen.answers):
        show(row[0], image, name)
        scale = colour(row[1], each, method)
        show(row[2], DIM * image, answer)
        colour(row[2], each, answer, opacity=OPACITY * each)
        figure.colorbar(scale, ax=row, ticks=(0, 0.5, 1))
    return figure


def draw_heads(loaded: Loaded, seen: Seen) -> Figure:
    """A block for each image: itself, and beside it a column for each layer with a row for each head."""
    from matplotlib.figure import Figure

    layers = maps.heads(loaded.model, seen.images)
    rows = max(layer.shape[1] for layer in layers.values())
    figure = Figure(figsize=(1.2 * (len(layers) + 2), (1.25 * rows + 0.5) * len(seen.images)), layout="constrained")
    blocks = figure.subfigures(len(seen.images), 1, squeeze=False, hspace=0.05)[:, 0]
    for index, (block, image, name, answer) in enumerate(zip(blocks, seen.images, seen.names, seen.answers)):
        left, right = block.subfigures(1, 2, width_ratios=(2, len(layers)))
        show(left.subplots(), image, f"{name}\n{answer}")
        panels = right.subplots(rows, len(layers), squeeze=False)
        for head, row in enumerate(panels):
            row[0].text(-0.06, 0.5, f"head {head + 1}", transform=row[0].transAxes, rotation=90, ha="right", va="center")
            for axes, (title, layer) in zip(row, layers.items()):
                if head < layer.shape[1]:
                    colour(axes, layer[index, head], "" if head else title)
                axes.axis("off")
    return figure


def show(axes: Axes, image: Tensor, title: str) -> None:
    """Draw an image as it is, pixel by pixel."""
    axes.imshow(image.movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.axis("off")


def colour(axes: Axes, shares: Tensor, title: str, opacity: Tensor | None = None) -> AxesImage:
    """Draw a map in colours, whole or as far as it is opaque."""
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.axis("off")
    alpha = None if opacity is None else opacity.numpy()
    return axes.imshow(shares.numpy(), cmap="inferno", vmin=0, vmax=1, interpolation="nearest", alpha=alpha)


if __name__ == "__main__":
    sys.exit(guarded(main))
