"""A classifier that begins with another run's weights, frozen and thawed part by part, is the same on one process and on two."""

import json
import sys
from pathlib import Path

import pytest
import torch

from lab import checkpoint

from .conftest import ROOT, finish

SETTINGS = {
    "data.name": "digits",
    "data.batch-size": "16",
    "data.image-size": "8",
    "data.augment.shift": "1",
    "model.backbone": "small",
    "optimizer.warmup-steps": "4",
    "trainer.steps": "24",
    "trainer.log-every": "1",
    "trainer.save-every": "12",
    "trainer.precision": "fp32",
    "trainer.threads": "1",
    "tracking.mode": "disabled",
}


def command(*extra: str, processes: int = 1) -> list[str]:
    """The command line of a small run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = [word for key, value in SETTINGS.items() for word in (f"--{key}", value)]
    return [sys.executable, *launcher, str(ROOT / "scripts/train_classifier.py"), *options, *extra]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights and their average at the last step."""
    parts = checkpoint.load(checkpoint.folders(run / "checkpoints")[0]).parts
    return parts["model"] | {f"average {name}": value for name, value in parts["ema"]["module"].items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run to begin with."""
    folder = tmp_path_factory.mktemp("place")
    finish(command("--run-dir", "first"), folder)
    return folder


@pytest.mark.slow
def test_two_processes_freeze_and_thaw_as_one(place: Path) -> None:
    transfer = ["--init", "first", "--freeze", "--thaw-every", "6", "--data.classes", "1", "3", "5", "7", "9"]
    finish(command(*transfer, "--run-dir", "one"), place)
    finish(command(*transfer, "--run-dir", "two", processes=2), place)
    one, two = losses(place / "one"), losses(place / "two")
    assert len(one) == len(two) == 24
    assert max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True)) < 1e-5
    before, single, double = (weights(place / name) for name in ("first", "one", "two"))
    assert single.keys() == double.keys()
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, rtol=1e-5, atol=3e-5)
    body = [name for name in single if name.startswith("body.")]
    assert len(body) == 6
    assert not any(torch.equal(single[name], before[f"average {name}"]) for name in body)  # by the end all have learnt
