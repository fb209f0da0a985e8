"""A run that is killed anywhere ends where an uninterrupted one does, bit for bit."""

import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from .conftest import command, fingerprint, finish, start

KILLS = 12


def wait_until(condition, process: subprocess.Popen[str]) -> bool:
    """Watch a process until the condition holds (True) or it has ended (False)."""
    while not condition():
        try:
            process.wait(timeout=0.001)
            return condition()
        except subprocess.TimeoutExpired:
            continue
    return True


def linger(process: subprocess.Popen[str], seconds: float) -> None:
    """Let a process run for a while."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_a_run_killed_at_random_moments_and_inside_saves_ends_bit_identical(reference: Path, tmp_path: Path) -> None:
    chance, run = random.Random(7), tmp_path / "run"
    kills = inside_saves = 0
    words = command("--run-dir", "run")
    while kills < KILLS or inside_saves < 2:
        assert kills < 4 * KILLS, f"only {inside_saves} of {kills} kills hit a save"
        before = size(run / "metrics.jsonl")
        process = start(words, tmp_path)
        if kills % 6 == 5:  # while it starts
            linger(process, chance.uniform(0.2, 2.0))
        elif kills % 2:  # as soon as a save has begun
            wait_until(lambda: any((run / "checkpoints").glob(".step_*")) and size(run / "metrics.jsonl") != before, process)
            linger(process, chance.uniform(0, 0.004))
        else:  # at any moment of the training
            wait_until(lambda: size(run / "metrics.jsonl") > before, process)
            linger(process, chance.uniform(0, 0.15))
        process.kill()
        process.communicate()
        kills += 1
        inside_saves += any((run / "checkpoints").glob(".step_*"))
        if (run / "config.yaml").exists():
            words = command("--resume", "run")
        if process.returncode == 0:  # it got to the end first: once more from the start
            shutil.rmtree(run)
            words = command("--run-dir", "run")
    finish(words, tmp_path)
    assert fingerprint(run) == fingerprint(reference)


def test_sigterm_finishes_the_step_saves_and_exits_75_and_the_rest_is_the_same(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(command("--resume" if run.exists() else "--run-dir", "run"), tmp_path)
        before = size(run / "metrics.jsonl")
        assert wait_until(lambda before=before: size(run / "metrics.jsonl") > before, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        assert "--resume run" in output
        assert output.strip().splitlines()[-1] == "run: run"
    finish(command("--resume", "run"), tmp_path)
    assert fingerprint(run) == fingerprint(reference)


def test_a_second_process_on_the_same_run_is_refused_and_told_who_owns_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    owner = start(command("--run-dir", "run", trainer__steps="1000000"), tmp_path)
    try:
        assert wait_until(lambda: size(run / "metrics.jsonl") > 0, owner)
        output = finish(command("--resume", "run"), tmp_path, expect=2)
        assert f"owned by pid {owner.pid} on host" in output
        assert "Traceback" not in output
    finally:
        owner.kill()
        owner.communicate()


@pytest.mark.parametrize("network", ["mlp", pytest.param("conv", marks=pytest.mark.slow)])
def test_a_resumed_run_can_be_made_longer(network: str, tmp_path: Path) -> None:
    changes = {"model__network__kind": network, "model__network__channels": "8", "optimizer__schedule": "constant"}
    finish(command("--run-dir", "run", trainer__steps="20", **changes), tmp_path)
    finish(command("--resume", "run", trainer__steps="40", **changes), tmp_path)
    finish(command("--run-dir", "whole", trainer__steps="40", **changes), tmp_path)
    extended, whole = fingerprint(tmp_path / "run"), fingerprint(tmp_path / "whole")
    del extended["metrics.jsonl"], whole["metrics.jsonl"]  # the shorter run had its last row, and a preview, at step 20
    assert extended == whole
