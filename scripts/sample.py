"""Draw pictures from a trained generative model of any family.

    python scripts/sample.py latest
    python scripts/sample.py RUN --count 100 --seed 7 --out grid.png
    python scripts/sample.py RUN --labels 0-4,7 --count 60                   models that know classes
    python scripts/sample.py RUN --out dream.gif                             a slow walk from dream to dream
    python scripts/sample.py RUN --kind interpolation [--image 3 17]         ways between samples, or between test images
    python scripts/sample.py RUN --kind traversal | plane                    what single numbers of the code mean
    python scripts/sample.py RUN --kind reconstructions                      models that encode

Diffusion and flow matching, by any sampler, and some of it for other families:

    python scripts/sample.py RUN --sampler dpmpp --steps 20 --guidance 2
    python scripts/sample.py RUN --kind trajectory --out noise_to_picture.gif
    python scripts/sample.py RUN --kind inpainting --image 3 17 --mask right
    python scripts/sample.py RUN --kind variations --image 3 --strength 0.6

The same seed draws the same picture, bit for bit. RUN is a run folder, a checkpoint folder or `latest`. A setting that the
model does not know is refused, with the list of those that it knows.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from generative import drawing
from generative import model as families
from generative.drawing import Editor, Trajectory, places, side_by_side, small_code, spherical, thinned, way
from generative.model import CodedGenerator, Generator, Loaded, SamplingConfig
from lab import media, seeding
from lab.config import UserError
from lab.data import Split, as_float
from lab.launch import guarded

MOVING = ("samples", "interpolation", "trajectory")
OF_IMAGES = ("interpolation", "inpainting", "variations")
LONGEST_FILM = 60
"""Frames of a trajectory's GIF; of a longer way some are left out, evenly."""


@dataclass(frozen=True)
class Options:
    """What to draw, and where to."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder, or `latest`."""
    kind: Literal[
        "samples", "interpolation", "traversal", "plane", "reconstructions", "trajectory", "inpainting", "variations"
    ] = "samples"  # fmt: skip
    """Fresh samples; ways from one to another; one code dimension varied a row; a plane of codes; test images rebuilt;
    from noise to picture; test images with a part filled in; test images half lost in noise and brought back."""
    count: int | None = None
    """Images (samples and reconstructions: 64 if not given), or rows (the others: 8)."""
    columns: int = 10
    """Images a row, or frames per image of a GIF."""
    how: tyro.conf.OmitArgPrefixes[SamplingConfig] = SamplingConfig()
    labels: str = ""
    """Classes to draw, where the model knows classes: names, commas and ranges, as in 3 or 0-4,7. Default: all in turn, or the image's."""
    image: tuple[int, ...] = ()
    """Test images, counted from 0, to fill in or to vary; of an interpolation the two ends. Default: some of them all."""
    mask: str = "right"
    """What to fill in: left, right, top, bottom, centre, or a picture that is white there."""
    strength: float = 0.5
    """How far into noise variations go: near 0 nearly the image itself, 1 a new one."""
    seed: int = 0
    """Seed of the noise."""
    out: Path | None = None
    """Where to write, .png or .gif (samples, interpolation and trajectory move in a GIF); default: media/<kind>.png of the run."""
    scale: int = 2
    """Pixels drawn for each pixel."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""

    @property
    def rows(self) -> int:
        """Images, or rows of images."""
        return self.count or (64 if self.kind in ("samples", "reconstructions") else 8)


def main() -> int:
    """Draw what the command line asks for."""
    options = tyro.cli(Options, description=__doc__)
    check(options)
    loaded = families.load(options.run, options.device)
    check_model(options, loaded.model)
    out = options.out or loaded.run.media / f"{options.kind}.png"
    with torch.no_grad():
        frames = draw(options, loaded, moving=out.suffix == ".gif")
    if out.suffix == ".gif":
        media.save_gif(out, frames, seconds=len(frames) / 12, scale=options.scale)
    else:
        media.save_png(out, frames[0], options.scale)
    print(f"step {loaded.step} of {loaded.run.folder}")
    print(f"picture: {out}")
    return 0


def check(options: Options) -> None:
    """Refuse what no model can draw.

    Raises:
        UserError: says what can be.
    """
    if options.out and options.out.suffix not in (".png", ".gif"):
        raise UserError(f"--out {options.out}: pictures are written as .png or .gif")
    if min(1 if options.count is None else options.count, options.columns, options.scale) < 1:
        raise UserError("--count, --columns and --scale must be at least 1")
    if options.out and options.out.suffix == ".gif" and options.kind not in MOVING:
        raise UserError(f"--kind {options.kind} does not move; write it as .png")
    if options.image and options.kind not in OF_IMAGES:
        raise UserError(f"--image: --kind {options.kind} starts from no image; {', '.join(OF_IMAGES)} do")
    if options.image and options.kind == "interpolation" and len(options.image) % 2:
        raise UserError("--image: an interpolation needs two images for each row, as in --image 3 17")
    if not 0 < options.strength <= 1:
        raise UserError(f"--strength {options.strength}: a part of the way into noise, above 0 and up to 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use cpu")


def check_model(options: Options, model: Generator) -> None:
    """Refuse what this model cannot draw.

    Raises:
        UserError: says what can be.
    """
    if model.latent == 0:
        raise UserError("this model makes images of smaller ones, not of noise: use scripts/enlarge.py")
    if options.labels and not model.conditional:
        raise UserError("this model knows no classes: leave out --labels, or train one with --model.conditional true")
    if options.kind in ("traversal", "plane") and not small_code(model):
        raise UserError(f"--kind {options.kind}: the code is as large as the image, so that one number means little; see interpolation")
    if options.kind == "plane" and model.latent < 2:
        raise UserError("--kind plane needs a model with at least 2 code dimensions")
    options.how.check(model)
    if (options.image and options.kind == "interpolation") or options.kind == "reconstructions":
        if not isinstance(model, CodedGenerator):
            raise UserError("this model has no way back from images to codes; diffusion models, flows and autoencoders have one")
        if options.how != SamplingConfig():
            raise UserError("there and back goes by the model's own settings: leave out --sampler, --steps and the like")
    if options.kind == "trajectory" and not isinstance(model, Trajectory):
        raise UserError("--kind trajectory: this model has no way from noise to picture to show; diffusion models have one")
    if options.kind in ("inpainting", "variations") and not isinstance(model, Editor):
        raise UserError(f"--kind {options.kind}: this model cannot start from an image; diffusion models can")


# What is drawn. Most pictures are columns of images: a PNG lays them side by side, a GIF shows them one after another.


def draw(options: Options, loaded: Loaded, moving: bool) -> list[Tensor]:
    """The frames (C, H, W) of the picture; one, unless it moves."""
    model = loaded.model
    if isinstance(model, CodedGenerator) and options.kind == "reconstructions":
        return [families.reconstructions(model, loaded.experiment.dataset().to(options.device), options.rows)]
    if isinstance(model, Editor) and options.kind in ("inpainting", "variations"):
        return [side_by_side(edited(options, model, *test_images(options, loaded)))]
    if isinstance(model, Trajectory) and options.kind == "trajectory":
        return trajectory(options, model, moving)
    if options.kind == "samples":
        return walk(options, model) if moving else [media.grid(make(options, model, noise_for(options, model, options.rows)))]
    if options.kind == "interpolation":
        columns = between_images(options, loaded) if options.image else between_samples(options, model)
        frames = [media.grid(images) for images in columns]
        return frames + frames[-2:0:-1] if moving else [side_by_side(columns)]
    codes = traversal(options, model) if options.kind == "traversal" else plane(options, model)
    return [side_by_side([make(options, model, column) for column in codes.unbind(1)])]


def make(options: Options, model: Generator, noise: Tensor) -> Tensor:
    """Images of noise (N, latent), image n always with the same label and, for a model whose way is random, the same way."""
    return model.generate_all(noise, labels_for(options, model, len(noise)), options.how, way(options.seed))


def walk(options: Options, model: Generator) -> list[Tensor]:
    """Frames of each image's noise going round a great circle through itself and another one's."""
    noise = noise_for(options, model, options.rows)
    other = torch.randn(noise.shape, generator=seeding.generator(options.seed, "walk", 0)).to(noise.device)
    angles = [2 * math.pi * index / (6 * options.columns) for index in range(6 * options.columns)]
    return [media.grid(make(options, model, math.cos(angle) * noise + math.sin(angle) * other)) for angle in angles]


def between_samples(options: Options, model: Generator) -> list[Tensor]:
    """Columns from one sample of each row to another."""
    starts, ends = noise_for(options, model, 2 * options.rows).chunk(2)
    return [make(options, model, spherical(starts, ends, place)) for place in places(options.columns)]


def between_images(options: Options, loaded: Loaded) -> list[Tensor]:
    """Columns from one test image of each row to another, by way of their codes, with the label of the nearer end or the given ones."""
    model = loaded.model
    assert isinstance(model, CodedGenerator)
    images, labels = test_images(options, loaded)
    starts, ends = model.encode(images, labels).chunk(2)
    between = spherical if model.exact else torch.lerp  # only where codes are normal numbers is the middle of a straight line empty
    given = labels_for(options, model, len(starts)) if options.labels else None
    near, far = labels.chunk(2)
    told = [given if given is not None else near if place <= 0.5 else far for place in places(options.columns)]
    return [model.decode(between(starts, ends, place), label) for place, label in zip(places(options.columns), told)]


def trajectory(options: Options, model: Trajectory, moving: bool) -> list[Tensor]:
    """The way of each row's image from noise; as a film it holds its end for a second."""
    assert isinstance(model, Generator)
    noise = noise_for(options, model, options.rows)
    moments = model.trajectory(noise, labels_for(options, model, len(noise)), options.how, way(options.seed))
    shown = thinned(moments, LONGEST_FILM if moving else options.columns)
    frames = [media.grid(images) for images in shown]
    return frames + 12 * frames[-1:] if moving else [side_by_side(shown)]


def edited(options: Options, model: Editor, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Columns: the images, what is left of them (inpainting), and what the model makes of that, each time of other noise."""
    assert isinstance(model, Generator)
    labels = labels_for(options, model, len(images)) if options.labels else labels
    rest = [
        (noise_for(options, model, len(images), index), labels, options.how, way(options.seed, index)) for index in range(options.columns)
    ]
    if options.kind == "variations":
        return [images, *(model.vary(images, options.strength, *each) for each in rest)]
    mask = kept(options.mask, *model.shape[1:]).to(images.device)
    return [images, images * mask + 0.5 * (1 - mask), *(model.inpaint(images, mask, *each) for each in rest)]


# What it is made of


def noise_for(options: Options, model: Generator, rows: int, index: int = 0) -> Tensor:
    """Standard normal noise (rows, latent), for each index another."""
    return drawing.noise_for(model, options.seed, rows, index).to(options.device)


def test_images(options: Options, loaded: Loaded) -> tuple[Tensor, Tensor]:
    """The chosen test images in [0, 1] and their labels; for an interpolation the first ends, then the second ends.

    Raises:
        UserError: there is no such image.
    """
    split: Split = loaded.experiment.dataset().test
    if wrong := [index for index in options.image if not 0 <= index < len(split)]:
        raise UserError(f"--image {wrong[0]}: the test images are 0 to {len(split) - 1}")
    if options.image:
        order = options.image[::2] + options.image[1::2] if options.kind == "interpolation" else options.image
        split = Split(split.images[list(order)], split.labels[list(order)])
    chosen = split.spread(len(split) if options.image else options.rows).to(options.device)
    return as_float(chosen.images), chosen.labels


def labels_for(options: Options, model: Generator, count: int) -> Tensor:
    """A label for each of `count` images."""
    return drawing.labels_for(options.labels, model.classes, count).to(options.device)


def kept(mask: str, height: int, width: int) -> Tensor:
    """1 where an image is to stay and 0 where it is to be filled in, (1, 1, H, W).

    Raises:
        UserError: no such side, and no such picture.
    """
    holes = drawing.holes(height, width)
    if mask in holes:
        return drawing.without(holes[mask], height, width)
    try:
        with media.opened(Path(mask)) as picture:
            white = picture.convert("L").resize((width, height), Image.Resampling.BOX)
    except ValueError as error:
        sides = ", ".join(holes)
        raise UserError(f"--mask {mask}: neither one of {sides} nor a picture that is white where to fill in ({error})") from None
    return torch.from_numpy(np.array(white) < 128).float()[None, None]


def sensitive(options: Options, model: Generator) -> list[int]:
    """Code dimensions, the one that changes the picture most first."""
    return drawing.sensitive(model, options.how, options.seed, options.device)


def traversal(options: Options, model: Generator) -> Tensor:
    """Noise (rows, columns, latent): each row moves one dimension from -3 to 3, the others rest at 0."""
    dimensions = sensitive(options, model)[: options.rows]
    rows = torch.zeros(len(dimensions), options.columns, model.latent, device=options.device)
    for row, dimension in enumerate(dimensions):
        rows[row, :, dimension] = torch.linspace(-3, 3, options.columns)
    return rows


def plane(options: Options, model: Generator) -> Tensor:
    """Noise (columns, columns, latent) over the two most telling dimensions."""
    return drawing.plane(model.latent, *sensitive(options, model)[:2], options.columns).to(options.device)


if __name__ == "__main__":
    sys.exit(guarded(main))
