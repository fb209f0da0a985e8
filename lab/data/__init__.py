"""Labelled image sets: found, checked, and held whole on the device as uint8. Use `load(DataConfig(...))`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lab.config import Count, Fraction, Settings
from lab.data import asl, digits, folder, mnist
from lab.data.augment import AugmentConfig
from lab.data.imageset import DataError, ImageSet, Split, as_float

__all__ = ["AugmentConfig", "DataConfig", "DataError", "ImageSet", "Split", "as_float", "load"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Which images to train on, and how they are prepared."""

    name: Literal["mnist", "asl", "digits", "folder"] = "mnist"
    """The set: mnist, asl (Sign Language MNIST), digits (inside scikit-learn, no download), folder (your own images)."""
    root: str = ""
    """Folder with the files; empty: $LAB_DATA, then the cache, then (mnist) a download. For folder: one with a sub-folder per class."""
    batch_size: Count = 128
    """Images per update, over all processes and accumulation steps."""
    image_size: Count = 28
    """Pixels a side; images of another size are resized with antialiasing, those that are not square cropped at the centre."""
    greyscale: bool = True
    """One channel; false keeps three colours, which only folder has."""
    classes: tuple[str, ...] = ()
    """Only the images of these classes; empty: all that the set has."""
    test_fraction: Fraction = 0.1
    """Share of every class that is kept for testing, for folder alone: the other sets have their own test part."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images."""

    def __post_init__(self) -> None:
        """Check what no single field can tell."""
        super().__post_init__()
        if self.name != "folder" and not self.greyscale:
            raise ValueError(f"greyscale: {self.name} has no colours; leave it true, or use colour images with name folder")
        if not 0 < self.test_fraction < 1:
            raise ValueError("test_fraction: must lie between 0 and 1, both excluded, since training and testing both need images")
        if self.name == "folder" and not self.root:
            raise ValueError("root: the set 'folder' needs the folder that holds a sub-folder of images for each class")


def load(config: DataConfig) -> ImageSet:
    """The set that the settings name, in main memory; `.to(device)` moves it.

    Raises:
        DataError: files are missing, damaged or not what they should be; the text says which, and what to do.
    """
    images = _whole(config)
    return images.only(config.classes) if config.classes else images


def _whole(config: DataConfig) -> ImageSet:
    if config.name == "folder":
        return folder.load(config.root, config.image_size, config.greyscale, config.test_fraction)
    if config.name == "digits":
        return digits.load().resized(config.image_size)
    return {"mnist": mnist.load, "asl": asl.load}[config.name](config.root).resized(config.image_size)
