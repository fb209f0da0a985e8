"""Rainbow's noise has no state: killed and resumed, or on two processes, an agent learns with the same noise."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .conftest import finish, start
from .test_dqn import CATCH, assert_same, command
from .test_dqn_processes import assert_close, together
from .test_kill import linger, size, wait_until

SETTINGS = CATCH | {
    "dqn.values": "categorical",
    "dqn.atoms": "11",
    "dqn.v-min": "-2",
    "dqn.v-max": "8",
    "dqn.noisy": "true",
    "trainer.milestones": "0",
    "trainer.preview-every": "96",
    "trainer.save-every": "8",
    "test.games": "1",
}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("rainbow")
    finish(command(SETTINGS, "--run-dir", "run"), folder)
    return folder / "run"


@pytest.mark.slow  # .ci/run takes a sample of such kills
def test_a_rainbow_that_was_killed_ends_bit_identical(single: Path, tmp_path: Path) -> None:
    chance, run = random.Random(3), tmp_path / "run"
    words = command(SETTINGS, "--run-dir", "run")
    for _ in range(2):
        before = size(run / "metrics.jsonl")
        process = start(words, tmp_path)
        wait_until(lambda before=before: size(run / "metrics.jsonl") > before + 1000, process)
        linger(process, chance.uniform(0, 0.2))
        process.kill()
        process.communicate()
        if (run / "config.yaml").exists():
            words = command(SETTINGS, "--resume", "run")
    finish(words, tmp_path)
    assert_same(run, single, room=60, rows=384)


@pytest.mark.slow
def test_a_rainbow_on_two_processes_has_the_losses_of_one(single: Path, tmp_path: Path) -> None:
    finish(together(command(SETTINGS, "--run-dir", "run")), tmp_path)
    assert_close(tmp_path / "run", single)
