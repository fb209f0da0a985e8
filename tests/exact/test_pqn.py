"""PQN on two processes, each with half of the games, is the same as on one, and is killed and resumed as exactly."""

import json
import random
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, fingerprint, finish, start
from .test_kill import linger, size, wait_until

SETTINGS = {
    "game.name": "catch",
    "game.stack": "2",
    "pqn.backbone": "small",
    "pqn.hidden": "16",
    "pqn.games": "8",
    "pqn.n-steps": "8",
    "pqn.batch-size": "16",
    "exploration.steps": "1000",
    "trainer.steps": "30",
    "trainer.log-every": "1",
    "trainer.save-every": "3",
    "trainer.preview-every": "15",
    "trainer.precision": "fp32",
    "trainer.threads": "1",
    "test.games": "1",
    "test.video-every": "0",
    "tracking.mode": "disabled",
}


def command(*extra: str, processes: int = 1, **changes: str) -> list[str]:
    """The command line of a small run."""
    settings = SETTINGS | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [
        sys.executable,
        *launcher,
        str(ROOT / "scripts/train_pqn.py"),
        *extra,
        *(word for key in settings for word in (f"--{key}", settings[key])),
    ]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, which nothing interrupts."""
    folder = tmp_path_factory.mktemp("single")
    finish(command("--run-dir", "run"), folder)
    return folder / "run"


def assert_same(run: Path, reference: Path) -> None:
    found, expected = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, reference))
    assert len(expected) == 30
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    assert expected[-1]["train/loss"] > 0


def test_two_processes_have_the_losses_of_one(single: Path, tmp_path: Path) -> None:
    finish(command("--run-dir", "run", processes=2), tmp_path)
    assert_same(tmp_path / "run", single)


@pytest.mark.slow
def test_a_run_goes_from_one_process_to_two_and_back(single: Path, tmp_path: Path) -> None:
    for steps, processes in (("10", 1), ("20", 2), ("30", 1)):
        start_or_resume = "--resume" if (tmp_path / "run").exists() else "--run-dir"
        finish(command(start_or_resume, "run", processes=processes, trainer__steps=steps, trainer__preview_every="10"), tmp_path)
    finish(command("--run-dir", "whole", trainer__preview_every="10"), tmp_path)
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow  # .ci/run takes a sample of such kills
def test_a_killed_run_ends_bit_identical(single: Path, tmp_path: Path) -> None:
    chance, run = random.Random(3), tmp_path / "run"
    for _ in range(4):
        process = start(command("--resume" if (run / "config.yaml").exists() else "--run-dir", "run"), tmp_path)
        before = size(run / "metrics.jsonl")
        wait_until(lambda before=before: size(run / "metrics.jsonl") > before, process)
        linger(process, chance.uniform(0, 0.1))
        process.kill()
        process.communicate()
    finish(command("--resume", "run"), tmp_path)
    assert fingerprint(run) == fingerprint(single)
