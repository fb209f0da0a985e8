"""What it costs to judge samples: seconds of each part, for images that are ready.

    python benchmarks/metrics.py                     10,000 images of MNIST
    python benchmarks/metrics.py --data digits --samples 2000 --threads 1

`distances` is all that evaluate.py computes in the eyes of the frozen classifier, beside the test and the training images: features of
the samples, the two distances, precision, recall, density, coverage, classes. What does not depend on the samples (features of the real
images, the ladder, the distances of the test images) is taken once for a set and stands apart. `cas` trains a classifier.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro

from generative import metrics
from generative.metrics import Cloud, Reference
from lab import data, distributed
from lab.config import UserError
from lab.data import DataConfig, Split
from lab.recorder import console


@dataclass(frozen=True)
class Options:
    """What to time."""

    data: Literal["mnist", "digits"] = "mnist"
    """Images to judge, and to judge by."""
    samples: int = 10_000
    """How many."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


def main() -> None:
    """Time every part once and print its seconds."""
    options = tyro.cli(Options, description=__doc__)
    world = distributed.join(options.device, options.threads, deterministic=False)
    images = data.load(DataConfig(name=options.data)).to(world.device)
    features = metrics.find_features(images)
    if features is None:
        raise UserError(f"{options.data}: no features come with this set")
    # Any images will do in place of samples: what they show does not change the time.
    place = torch.randint(len(images.train), (options.samples,), generator=torch.Generator().manual_seed(0)).to(world.device)
    samples = Split(images.train.images[place], images.train.labels[place])
    features.vectors(samples.images[:500])
    real = timed("once: features of the real images", lambda: Reference(images, features, options.samples))
    timed("once: their own pairs and neighbours", lambda: [(one.radii, one.kernel, one.covariance) for one in (real.test, real.train)])
    start = time.perf_counter()
    cloud = timed("  features of the samples", lambda: Cloud(features.vectors(samples.images)))
    timed("  distances from the test images", lambda: metrics.compare(cloud, real.test))
    timed("  distances from the training images", lambda: metrics.compare(cloud, real.train))
    timed("  classes", lambda: real.predicted(cloud))
    console.print(f"{'distances':45} {time.perf_counter() - start:7.2f} s", highlight=False)
    timed("memorised", lambda: metrics.nearest(samples.images, images.train.images))
    timed("cas", lambda: metrics.learnt_from(samples, images.test, len(images.classes)))


def timed(name: str, part: Callable[[], Any]) -> Any:
    """What a part gives, after its seconds were printed."""
    start = time.perf_counter()
    result = part()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    console.print(f"{name:45} {time.perf_counter() - start:7.2f} s", highlight=False)
    return result


if __name__ == "__main__":
    main()
