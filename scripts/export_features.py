"""Make a classifier's run into frozen features, in which samples are compared with real images.

    python scripts/train_classifier.py configs/classifier/mnist.yaml
    python scripts/export_features.py latest mnist

writes generative/features/mnist.safetensors: the weights as 32-bit floats and, as JSON in the file's head, the network, its classes,
what it scored on its test set, the scale of its features and the command that trained it. The file's SHA-256, the beginning of which
is part of the features' name, is printed. A run can also be used as it is: scripts/evaluate.py RUN --features CLASSIFIER.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from generative.metrics import SHIPPED, Features, pack
from lab import classifier
from lab.config import UserError
from lab.launch import guarded

LARGEST = 1_000_000
"""Bytes of a file, since it is kept with the code."""


@dataclass(frozen=True)
class Options:
    """Which run, and what to call it."""

    run: Annotated[str, tyro.conf.Positional]
    """Run of a classifier: its folder, a checkpoint folder, or `latest`."""
    name: Annotated[str, tyro.conf.Positional]
    """Name of the file, without its ending."""
    folder: Path = SHIPPED
    """Where to write it."""


def main() -> int:
    """Write the file and say what it is."""
    options = tyro.cli(Options, description=__doc__)
    content = pack(classifier.load(options.run))
    if len(content) > LARGEST:
        raise UserError(f"{options.run}: {len(content):,} bytes are more than the {LARGEST:,} allowed; train a smaller backbone")
    features = Features(content)
    target = options.folder / f"{options.name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    print(f"{target}: {len(content):,} bytes")
    print(f"SHA-256 {hashlib.sha256(content).hexdigest()}")
    print(f"features {features.name}: {100 * features.facts['test_accuracy']:.2f} % of {features.facts['test_images']} test images right")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
