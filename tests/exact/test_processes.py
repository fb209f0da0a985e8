"""The same global batch gives the same run on one process and on two, in one piece and in parts."""

import json
import math
from pathlib import Path

import pytest

from .conftest import command, finish

STEPS = {"trainer__steps": "60", "trainer__log_every": "1", "trainer__save_every": "30"}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(first: list[float], second: list[float]) -> None:
    assert len(first) == len(second) == 60
    worst = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
    assert worst < 1e-5


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("single")
    finish(command("--run-dir", "run", **STEPS), folder)
    values = losses(folder / "run")
    assert values[-1] < values[0]
    assert all(math.isfinite(value) for value in values)
    return values


def test_two_processes_have_the_losses_of_one(single: list[float], tmp_path: Path) -> None:
    finish(command("--run-dir", "run", processes=2, **STEPS), tmp_path)
    assert_same(losses(tmp_path / "run"), single)


def test_a_run_goes_from_one_process_to_two_and_back(single: list[float], tmp_path: Path) -> None:
    # The learning rate follows the length of the run, so it is stopped by resuming to a later end with the schedule off.
    constant = STEPS | {"optimizer__schedule": "constant"}
    finish(command("--run-dir", "run", **(constant | {"trainer__steps": "20"})), tmp_path)
    finish(command("--resume", "run", processes=2, **(constant | {"trainer__steps": "40"})), tmp_path)
    finish(command("--resume", "run", **constant), tmp_path)
    finish(command("--run-dir", "whole", **constant), tmp_path)
    assert_same(losses(tmp_path / "run"), losses(tmp_path / "whole"))


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path: Path) -> None:
    output = finish(command("--run-dir", "run", trainer__accumulate="3", **STEPS), tmp_path, expect=2)
    assert "a batch of 16 cannot be cut into 1 (processes) x 3 (trainer.accumulate) equal parts" in output
    assert "Traceback" not in output


def test_accumulation_has_the_losses_of_whole_batches(single: list[float], tmp_path: Path) -> None:
    finish(command("--run-dir", "run", trainer__accumulate="4", **STEPS), tmp_path)
    assert_same(losses(tmp_path / "run"), single)
