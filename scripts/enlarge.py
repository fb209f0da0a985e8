"""Enlarge pictures by a trained super-resolution model.

    python scripts/enlarge.py latest                                     (test images: small, bicubic, enlarged, original)
    python scripts/enlarge.py RUN picture.png                            (media/picture_4x.png of the run)
    python scripts/enlarge.py RUN picture.png --out large.png
    python scripts/enlarge.py RUN *.png --out folder

A picture may have any size up to half a million pixels; it becomes grey where the model knows grey alone. The model knows what it was
trained on: one of digits draws strokes into a photograph. RUN is a run folder, a checkpoint folder or `latest`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import ImageOps
from torch import Tensor

from generative.superresolution import SuperResolution, comparison
from lab import media
from lab.config import UserError
from lab.data import as_float
from lab.images import Trained, load_trained
from lab.launch import guarded

FAMILIES = {"superresolution": "generative.superresolution"}
LARGEST = 2**19
"""Pixels of a picture to be enlarged: the maps of so many take some gigabytes."""


@dataclass(frozen=True)
class Options:
    """What to enlarge, and where to."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder, or `latest`."""
    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PICTURE ...]")] = ()
    """Image files; none: test images of the run's own set."""
    count: int = 16
    """Test images to show, where no picture is given."""
    out: Path | None = None
    """Where to write: a .png or, for several pictures, a folder; default: media/ of the run."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


def main() -> int:
    """Enlarge what the command line names."""
    options = tyro.cli(Options, description=__doc__)
    check(options)
    loaded: Trained[SuperResolution] = load_trained(options.run, FAMILIES, options.device)
    out = options.out or loaded.run.media
    if not options.pictures:
        target = out if out.suffix == ".png" else out / "enlarged.png"
        images = loaded.experiment.dataset().to(options.device)
        media.save_png(target, comparison(loaded.model, images.test, options.count))
        print(f"picture: {target}")
    for path in options.pictures:
        target = out if out.suffix == ".png" else out / f"{path.stem}_{loaded.model.config.factor}x.png"
        media.save_png(target, enlarged(loaded.model, read(path, loaded.model.shape[0]).to(options.device)), scale=1)
        print(f"picture: {target}")
    return 0


def check(options: Options) -> None:
    """Refuse what cannot be done.

    Raises:
        UserError: says what can be.
    """
    if options.count < 1:
        raise UserError(f"--count {options.count}: show at least one test image")
    if options.out and options.out.suffix not in ("", ".png"):
        raise UserError(f"--out {options.out}: pictures are written as .png")
    if len(options.pictures) > 1 and options.out and options.out.suffix:
        raise UserError(f"--out {options.out}: {len(options.pictures)} pictures need a folder")
    if len({path.stem for path in options.pictures}) < len(options.pictures):
        raise UserError("two of the pictures have one name, and would be written to one file; enlarge them one by one, with --out")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use cpu")


def read(path: Path, channels: int) -> Tensor:
    """A picture as float (C, H, W) in [0, 1], upright as its camera noted it.

    Raises:
        UserError: it cannot be read as a picture, or is too large.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        with media.opened(path) as image:
            if image.width * image.height > LARGEST:
                raise UserError(f"{path}: {image.width} x {image.height} pixels are too many; cut out or shrink it to {LARGEST} at most")
            if image.mode.startswith(("I", "F")):  # Pillow would cut these off at 255, to plain white
                raise UserError(f"{path}: it has more than 8 bits a pixel; save it with 8")
            pixels = np.array(ImageOps.exif_transpose(image).convert(mode))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None
    return as_float(torch.from_numpy(pixels)).reshape(*pixels.shape[:2], channels).movedim(2, 0)


@torch.no_grad()
def enlarged(model: SuperResolution, image: Tensor) -> Tensor:
    """A picture (C, H, W) in [0, 1] as a large one."""
    return model.enlarge(image[None])[0]


if __name__ == "__main__":
    sys.exit(guarded(main))
