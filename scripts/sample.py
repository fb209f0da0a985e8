"""Draw pictures from a trained generative model.

    python scripts/sample.py latest
    python scripts/sample.py runs/vae_mnist/20261121-080000-abc123 --count 100 --seed 7 --out grid.png
    python scripts/sample.py RUN --labels 0-9 --count 80                     (models that know classes)
    python scripts/sample.py RUN --out dream.gif                             (a slow walk through the codes)
    python scripts/sample.py RUN --kind interpolation | traversal | plane | reconstructions

The same seed draws the same picture, bit for bit. RUN is a run folder, a checkpoint folder or `latest`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from generative import model as families
from generative.model import Generator, Loaded, spread_labels
from lab import media, seeding
from lab.config import UserError
from lab.launch import guarded


@dataclass(frozen=True)
class Options:
    """What to draw, and where to."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder, or `latest`."""
    kind: Literal["samples", "interpolation", "traversal", "plane", "reconstructions"] = "samples"
    """Fresh samples; ways from one sample to another; one code dimension varied a row; a plane of codes; test images rebuilt."""
    count: int = 64
    """Images (samples, reconstructions), or rows (interpolation, traversal)."""
    steps: int = 10
    """Images a row (interpolation, traversal, plane), or frames per image of a GIF."""
    labels: str = ""
    """Classes to draw, for models that know classes: names, commas and ranges, as in 3 or 0-4,7. Default: all in turn."""
    seed: int = 0
    """Seed of the noise."""
    out: Path | None = None
    """Where to write, .png or .gif (samples and interpolation move in a GIF); default: media/<kind>.png of the run."""
    scale: int = 2
    """Pixels drawn for each pixel."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


def main() -> int:
    """Draw what the command line asks for."""
    options = tyro.cli(Options, description=__doc__)
    loaded = families.load(options.run, options.device)
    out = options.out or loaded.run.media / f"{options.kind}.png"
    check(options, out, loaded.model)
    with torch.no_grad():
        frames = draw(options, loaded, moving=out.suffix == ".gif")
    if out.suffix == ".gif":
        media.save_gif(out, frames, seconds=len(frames) / 12, scale=options.scale)
    else:
        media.save_png(out, frames[0], options.scale)
    print(f"step {loaded.step} of {loaded.run.folder}")
    print(f"picture: {out}")
    return 0


def check(options: Options, out: Path, model: Generator) -> None:
    """Refuse what cannot be drawn.

    Raises:
        UserError: says what can be.
    """
    if out.suffix not in (".png", ".gif"):
        raise UserError(f"--out {out}: pictures are written as .png or .gif")
    if min(options.count, options.steps, options.scale) < 1:
        raise UserError("--count, --steps and --scale must be at least 1")
    if out.suffix == ".gif" and options.kind not in ("samples", "interpolation"):
        raise UserError(f"--kind {options.kind} does not move; write it as .png")
    if options.kind == "plane" and model.latent < 2:
        raise UserError("--kind plane needs a model with at least 2 code dimensions")
    if options.labels and not model.conditional:
        raise UserError("this model knows no classes: leave out --labels, or train one with --model.conditional true")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use cpu")


def draw(options: Options, loaded: Loaded, moving: bool) -> list[Tensor]:
    """The frames (C, H, W) of the picture; one, unless it moves."""
    model, noise = loaded.model, noise_for(options, loaded.model)
    if options.kind == "reconstructions":
        return [families.reconstructions(model, loaded.experiment.dataset().to(options.device), options.count)]
    if options.kind == "samples" and not moving:
        return [media.grid(decode(model, noise, labels_for(options, model, len(noise))))]
    if options.kind == "samples":
        return walk(options, model, noise)
    if options.kind == "interpolation":
        rows = between(noise[: options.count], noise[options.count :], torch.linspace(0, 1, options.steps, device=options.device))
        return animate(options, model, rows) if moving else [lay_rows(options, model, rows)]
    if options.kind == "traversal":
        return [lay_rows(options, model, traversal(model, options))]
    return [lay_rows(options, model, plane(model, options.steps, options.device))]


def noise_for(options: Options, model: Generator) -> Tensor:
    """Standard normal noise for every image, and a second helping for the far ends of interpolations and walks."""
    generator = seeding.generator(options.seed, "sample", 0)
    noise = torch.randn(2 * options.count, model.latent, generator=generator).to(options.device)
    return noise if options.kind == "interpolation" else noise[: options.count]


def labels_for(options: Options, model: Generator, count: int) -> Tensor:
    """A label for each of `count` images."""
    if not options.labels:
        return spread_labels(count, model.classes).to(options.device)
    chosen = [label for part in options.labels.split(",") for label in read_range(part.strip(), model.classes)]
    return torch.tensor(chosen)[torch.arange(count) % len(chosen)].to(options.device)


def read_range(text: str, classes: tuple[str, ...]) -> list[int]:
    """The class indices that `3`, `0-4` or `A-F` names.

    Raises:
        UserError: no such class.
    """
    first, dash, last = (text, "", text) if text in classes else text.partition("-")
    try:
        start, stop = classes.index(first.strip()), classes.index(last.strip() if dash else first.strip())
    except ValueError:
        raise UserError(f"--labels {text}: the classes are {', '.join(classes)}") from None
    return list(range(start, stop + 1)) or list(range(start, stop - 1, -1))


def decode(model: Generator, noise: Tensor, labels: Tensor) -> Tensor:
    """Images of standard normal noise, a few hundred at a time."""
    parts = zip(noise.split(500), labels.split(500))
    return torch.cat([model.decode(model.codes(part), label) for part, label in parts])


def between(starts: Tensor, ends: Tensor, places: Tensor) -> Tensor:
    """Spherical interpolation (N, len(places), latent): straight lines would cut through the empty middle of the prior."""
    cosine = torch.nn.functional.cosine_similarity(starts, ends, dim=1).clamp(-0.9999, 0.9999)
    angle, t = torch.acos(cosine)[:, None, None], places[None, :, None]
    return (torch.sin((1 - t) * angle) * starts[:, None] + torch.sin(t * angle) * ends[:, None]) / torch.sin(angle)


def sensitive(model: Generator, device: str) -> list[int]:
    """Code dimensions, the one that changes the picture most first."""
    steps = 2 * torch.eye(model.latent, device=device)
    labels = torch.zeros(model.latent, dtype=torch.long, device=device)
    change = (decode(model, steps, labels) - decode(model, -steps, labels)).abs().flatten(1).sum(1)
    return [int(index) for index in change.argsort(descending=True)]


def traversal(model: Generator, options: Options) -> Tensor:
    """Noise (rows, steps, latent): each row moves one dimension from -3 to 3, the others rest at 0."""
    dimensions = sensitive(model, options.device)[: options.count]
    rows = torch.zeros(len(dimensions), options.steps, model.latent, device=options.device)
    for row, dimension in enumerate(dimensions):
        rows[row, :, dimension] = torch.linspace(-3, 3, options.steps)
    return rows


def plane(model: Generator, steps: int, device: str) -> Tensor:
    """Noise (steps, steps, latent) at evenly spaced quantiles of the two most telling dimensions (Kingma & Welling 2014, figure 4)."""
    across, down = sensitive(model, device)[:2]
    quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, steps, dtype=torch.float64)).float()
    rows = torch.zeros(steps, steps, model.latent, device=device)
    rows[:, :, across], rows[:, :, down] = quantiles[None, :], quantiles[:, None]
    return rows


def lay_rows(options: Options, model: Generator, rows: Tensor) -> Tensor:
    """One picture of noise (rows, steps, latent); a row keeps its label."""
    labels = labels_for(options, model, len(rows)).repeat_interleave(rows.shape[1])
    return media.grid(decode(model, rows.flatten(0, 1), labels), columns=rows.shape[1])


def animate(options: Options, model: Generator, rows: Tensor) -> list[Tensor]:
    """Frames of noise (images, frames, latent), there and back."""
    labels = labels_for(options, model, len(rows))
    frames = [media.grid(decode(model, rows[:, index], labels)) for index in range(rows.shape[1])]
    return frames + frames[-2:0:-1]


def walk(options: Options, model: Generator, noise: Tensor) -> list[Tensor]:
    """Frames of each image's code going round a great circle through its own noise and another one's."""
    other = torch.randn(noise.shape, generator=seeding.generator(options.seed, "walk", 0)).to(noise.device)
    angles = torch.arange(6 * options.steps, device=noise.device) * (2 * math.pi / (6 * options.steps))
    labels = labels_for(options, model, len(noise))
    return [media.grid(decode(model, torch.cos(angle) * noise + torch.sin(angle) * other, labels)) for angle in angles]


if __name__ == "__main__":
    sys.exit(guarded(main))
