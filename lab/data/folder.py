"""Anybody's images: one sub-folder per class, each with its pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lab.data.files import progress
from lab.data.imageset import DataError, ImageSet, Split, held_out

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class Picture:
    """One file and the number of its class."""

    path: Path
    label: int


def load(root: str, image_size: int, greyscale: bool, test_fraction: float) -> ImageSet:
    """The pictures below `root` as square images, each cropped at its centre and then resized with antialiasing.

    Args:
        root: a folder with one sub-folder per class, here or below $LAB_DATA; hidden files and files that are no pictures are left out.
        image_size: pixels a side.
        greyscale: one channel, else three.
        test_fraction: how much of every class is for testing, 0 to 1; which pictures, their names alone decide.

    Raises:
        DataError: the folder is missing, has no sub-folders or an empty one, or a picture cannot be read.
    """
    folders = _class_folders(_found(Path(root).expanduser()))
    train: list[Picture] = []
    test: list[Picture] = []
    for label, folder in enumerate(folders):
        names = _picture_names(folder)
        chosen = held_out(names, test_fraction)
        for name in names:
            (test if name in chosen else train).append(Picture(folder / name, label))
    with progress("Reading images", len(train) + len(test)) as advance:
        splits = [_read(part, image_size, greyscale, advance) for part in (train, test)]
    return ImageSet("folder", tuple(folder.name for folder in folders), *splits)


def _found(root: Path) -> Path:
    """The folder itself or, where there is none, the one of this name below $LAB_DATA."""
    below = Path(os.environ.get("LAB_DATA") or ".").expanduser() / root
    return below if not root.is_dir() and below.is_dir() else root


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; --data.root must name one that has a sub-folder of images for each class")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"{root}: has no sub-folders; put the images of each class in a sub-folder that is named after the class")
    return folders


def _picture_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: has no images ({', '.join(SUFFIXES)}); add some or remove the folder")
    return names


def _read(pictures: Sequence[Picture], side: int, greyscale: bool, advance: Callable[[float], None]) -> Split:
    """All pictures, decoded by several threads (Pillow lets go of Python's lock while it decodes)."""
    images = torch.empty((len(pictures), 1 if greyscale else 3, side, side), dtype=torch.uint8)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        decoded = pool.map(lambda picture: decode(picture.path, side, greyscale), pictures)
        for index, image in enumerate(decoded):
            images[index] = image
            advance(1)
    return Split(images, torch.tensor([picture.label for picture in pictures], dtype=torch.int64))


def decode(path: Path, side: int, greyscale: bool) -> Tensor:
    """One picture as uint8 (C, side, side), upright as its camera noted it, without its transparency."""
    import numpy as np
    from PIL import Image, ImageOps

    from lab.media import opened

    mode = "L" if greyscale else "RGB"
    try:
        with opened(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut these off at 255, to plain white
                raise ValueError("it has more than 8 bits a pixel; save it with 8")
            image.draft(mode, (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size, but not below this
            upright = ImageOps.exif_transpose(image).convert(mode)
            square = ImageOps.fit(upright, (side, side), Image.Resampling.BILINEAR)
    except ValueError as error:
        raise DataError(f"{path}: cannot be used as an image ({error}); replace or remove it") from None
    return torch.from_numpy(np.array(square)).reshape(side, side, -1).permute(2, 0, 1)
