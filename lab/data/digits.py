"""The 1,797 handwritten digits of 8 x 8 pixels that come inside scikit-learn: real data without a download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lab.data.imageset import ImageSet, Split, held_out

TEST_FRACTION = 0.2
WHITE = 16
"""The largest value of a pixel in scikit-learn's array."""


def load() -> ImageSet:
    """The set as (1, 8, 8) images; a fixed fifth of every class is its test part."""
    table = torch.from_numpy(np.loadtxt(_file(), delimiter=","))
    labels = table[:, -1].long()
    images = (table[:, :-1] * (255 / WHITE)).round().to(torch.uint8).view(-1, 1, 8, 8)
    test = _test_mask(labels)
    return ImageSet("digits", tuple(map(str, range(10))), Split(images[~test], labels[~test]), Split(images[test], labels[test]))


def _file() -> Path:
    """The file inside scikit-learn, a row of 64 values and a label for each digit; to import scikit-learn takes a second and more."""
    package = find_spec("sklearn")
    assert package
    assert package.origin
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"


def _test_mask(labels: Tensor) -> Tensor:
    """Which images are for testing, bool (N,)."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        keys = [str(index) for index in (labels == label).nonzero().flatten().tolist()]
        mask[[int(key) for key in held_out(keys, TEST_FRACTION)]] = True
    return mask
