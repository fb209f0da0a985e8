"""The 1,797 handwritten digits of 8 x 8 pixels that come inside scikit-learn: real data without a download."""

from __future__ import annotations

import torch
from torch import Tensor

from lab.data.imageset import ImageSet, Split, held_out

TEST_FRACTION = 0.2
WHITE = 16
"""The largest value of a pixel in scikit-learn's array."""


def load() -> ImageSet:
    """The set as (1, 8, 8) images; a fixed fifth of every class is its test part."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    values, labels = torch.from_numpy(bunch.images), torch.from_numpy(bunch.target).long()
    images = (values * (255 / WHITE)).round().to(torch.uint8).unsqueeze(1)
    test = _test_mask(labels)
    return ImageSet("digits", tuple(map(str, range(10))), Split(images[~test], labels[~test]), Split(images[test], labels[test]))


def _test_mask(labels: Tensor) -> Tensor:
    """Which images are for testing, bool (N,)."""
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        keys = [str(index) for index in (labels == label).nonzero().flatten().tolist()]
        mask[[int(key) for key in held_out(keys, TEST_FRACTION)]] = True
    return mask
