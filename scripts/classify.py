"""Say what photos show, by a trained classifier.

    python scripts/classify.py RUN photo.jpg
    python scripts/classify.py latest *.png --top 5
    python scripts/classify.py RUN photo.jpg --invert no --json

Any photo will do: it is turned upright, cropped square, made grey and small as the model's images are. Where those are figures
drawn on black, as in MNIST, ink on paper is turned round in brightness, cut out, scaled and centred. What the model saw is drawn
beside each photo in classified.png (media/ of the run, or --out). RUN is a run folder, a checkpoint folder or `latest`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from lab import classifier, media
from lab.classifier import Loaded
from lab.config import UserError
from lab.data import photo
from lab.data.photo import Photo
from lab.launch import guarded


@dataclass(frozen=True)
class Options:
    """Which photos to look at, and how."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder, or `latest`."""
    photos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO [PHOTO ...]")]
    """Image files."""
    top: int = 3
    """Classes to name for each photo, the most probable first."""
    invert: Literal["auto", "yes", "no"] = "auto"
    """Turn brightness round; auto: where the photo's border is then more like those of the training images."""
    out: Path | None = None
    """Where to draw what the model saw; default: media/classified.png of the run."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object for each photo and nothing else."""


def main() -> int:
    """Classify the photos that the command line names."""
    options = tyro.cli(Options, description=__doc__)
    if not options.photos:
        raise UserError("give a photo to look at, or several")
    if options.top < 1:
        raise UserError(f"--top {options.top}: name at least one class")
    if options.out and options.out.suffix != ".png":
        raise UserError(f"--out {options.out}: pictures are written as .png")
    loaded = classifier.load(options.run)
    photos = [photo.read(path, loaded.model.shape, loaded.framing, options.invert) for path in options.photos]
    answers = [answer(options, loaded, path, ready) for path, ready in zip(options.photos, photos)]
    out = options.out or loaded.run.media / "classified.png"
    captions = [f"{path.name[:16]}: {next(iter(each['classes']))}" for path, each in zip(options.photos, answers)]
    media.save_png(out, media.captioned(torch.stack([ready.image for ready in photos]), captions), 1)
    for each in answers:
        print(json.dumps(each) if options.json else in_words(each))
    if not options.json:
        print(f"what the model saw: {out}")
    return 0


def answer(options: Options, loaded: Loaded, path: Path, ready: Photo) -> dict[str, object]:
    """The most probable classes of a photo."""
    probabilities = loaded.model.probabilities(ready.image[None])[0]
    best = probabilities.topk(min(options.top, len(loaded.model.classes)))
    classes = {loaded.model.classes[index]: share for share, index in zip(best.values.tolist(), best.indices.tolist())}
    return {"photo": str(path), "classes": classes, "inverted": ready.inverted}


def in_words(each: dict[str, object]) -> str:
    """One line for a photo."""
    classes = each["classes"]
    assert isinstance(classes, dict)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in classes.items())
    return f"{each['photo']}: {shares}" + (" (brightness turned round)" if each["inverted"] else "")


if __name__ == "__main__":
    sys.exit(guarded(main))
