"""Labelled images as the trainer holds them: the whole set as uint8 on one device, split into train and test."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.config import UserError

RESIZE_BATCH = 4096
"""Images resized at a time: their float copies stay small beside the uint8 set."""


class DataError(UserError):
    """A data set that is missing, damaged or not what it should be: says which file, what is wrong, and what to do."""


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a set: images uint8 (N, C, H, W) from 0 to 255, and labels int64 (N,) that index the set's classes."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def at(self, index: Tensor) -> Split:
        """The images at some places, int64 (B,)."""
        return Split(self.images[index], self.labels[index])

    def only(self, labels: Sequence[int]) -> Split:
        """The images with some labels, which count from 0 in the given order."""
        wanted = torch.tensor(labels, device=self.labels.device)
        matches = self.labels[:, None] == wanted
        kept = matches.any(1)
        return Split(self.images[kept], matches[kept].int().argmax(1))

    def spread(self, count: int) -> Split:
        """`count` of the images, evenly spaced, so that a set sorted by class gives some of each; all where it has no more."""
        if count >= len(self):
            return self
        return self.at(torch.arange(count, device=self.images.device) * len(self) // count)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled set: its name, the name of every class in order of label, and its two splits."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on another device."""
        return dataclasses.replace(self, train=self.train.to(device), test=self.test.to(device))

    def only(self, classes: Sequence[str]) -> ImageSet:
        """The images of some classes alone, labelled in the order in which the set has them.

        Raises:
            DataError: the set has no such class.
        """
        if unknown := [name for name in classes if name not in self.classes]:
            raise DataError(f"data.classes: {self.name} has no class {', '.join(unknown)}; it has {', '.join(self.classes)}")
        kept = [label for label, name in enumerate(self.classes) if name in classes]
        train, test = (split.only(kept) for split in (self.train, self.test))
        return dataclasses.replace(self, classes=tuple(self.classes[label] for label in kept), train=train, test=test)

    def resized(self, side: int) -> ImageSet:
        """The same set with images of `side` x `side` pixels; the set itself where they already are."""
        if self.shape[1:] == (side, side):
            return self
        train, test = (Split(resize(split.images, side), split.labels) for split in (self.train, self.test))
        return dataclasses.replace(self, train=train, test=test)


def as_float(images: Tensor) -> Tensor:
    """Images uint8 of any shape as float32 in [0, 1], exactly `value / 255`."""
    return images.float().div_(255)


def resize(images: Tensor, side: int) -> Tensor:
    """Images uint8 (N, C, H, W) as uint8 (N, C, side, side): bilinear, antialiased when they shrink."""
    out = torch.empty((*images.shape[:2], side, side), dtype=torch.uint8, device=images.device)
    for start in range(0, len(images), RESIZE_BATCH):
        batch = images[start : start + RESIZE_BATCH].float()
        # The weights of this filter are positive and sum to 1: nothing leaves 0 to 255.
        out[start : start + RESIZE_BATCH] = F.interpolate(batch, size=(side, side), mode="bilinear", antialias=True).round_()
    return out


def held_out(keys: Sequence[str], fraction: float) -> frozenset[str]:
    """The keys that form the test part: a `fraction` of them, at least one and never all, none where it is 0.

    The keys with the smallest SHA-256 are taken, so the choice depends on the keys alone: not on their order, the
    machine or a library's random numbers, and adding a few files moves only a few others.
    """
    if not fraction or len(keys) < 2:
        return frozenset()
    count = min(max(round(len(keys) * fraction), 1), len(keys) - 1)
    return frozenset(sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:count])
