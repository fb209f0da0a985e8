"""A DQN that is killed anywhere ends where an uninterrupted one does, bit for bit: networks, games, memory and metrics.

Where the memory's rows are cut into segment files follows from when it was saved, and a run that was stopped has saved at
other times. So those files are not compared, but the rows that they hold; every other file of the last checkpoint is
compared as it is, with the number of rows, the priorities and the state of every game among them.
"""

import json
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab import checkpoint

from .conftest import ROOT, fingerprint, finish, start
from .test_kill import linger, size, wait_until

KILLS = 6

CATCH = {
    "game.name": "catch",
    "game.stack": "2",
    "dqn.backbone": "small",
    "dqn.hidden": "16",
    "dqn.n-step": "3",
    "dqn.batch-size": "16",
    "dqn.learning-starts": "160",
    "dqn.target-every": "320",
    "exploration.steps": "3000",
    "exploration.end": "0.1",
    "replay.capacity": "480",  # 60 rows of 8 games, of which a round writes 4: the ring wraps around every 15 rounds
    "replay.prioritised": "true",
    "test.games": "2",
    "test.video-every": "0",
    "trainer.steps": "96",
    "trainer.save-every": "4",
    "trainer.log-every": "3",
    "trainer.preview-every": "48",
    "trainer.precision": "fp32",
    "trainer.threads": "1",
    "tracking.mode": "disabled",
}
PONG = CATCH | {
    "game.name": "pong",
    "game.stack": "4",
    "game.max-frames": "200",  # broken off after 50 actions: games end, are truncated and start again
    "game.threads": "1",
    "dqn.backbone": "nature",
    "dqn.hidden": "32",
    "dqn.games": "2",
    "dqn.train-every": "4",
    "dqn.batch-size": "4",
    "dqn.learning-starts": "40",
    "dqn.target-every": "40",
    "exploration.steps": "400",
    "replay.capacity": "200",
    "test.games": "1",
    "trainer.steps": "60",
    "trainer.save-every": "20",
    "trainer.preview-every": "60",
}


def command(settings: dict[str, str], *extra: str) -> list[str]:
    """The command line of a small run."""
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return [sys.executable, str(ROOT / "scripts/train_dqn.py"), *extra, *options]


def remembered(run: Path, room: int) -> tuple[int, dict[str, torch.Tensor]]:
    """The first and all of the newest `room` rows of the memory, as the segments of the last checkpoint hold them."""
    segments = checkpoint.load(checkpoint.folders(run / "checkpoints")[0]).segments["replay"]
    pieces = [load_file(path) for _, path in segments]
    first, written = segments[0][0], segments[0][0]
    for (begins, _), piece in zip(segments, pieces, strict=True):
        assert begins == written  # no gap and nothing twice
        written += len(piece["frames"])
    drop = max(0, written - room) - first
    assert drop >= 0
    return first + drop, {name: torch.cat([piece[name] for piece in pieces])[drop:] for name in pieces[0]}


def assert_same(run: Path, reference: Path, room: int, rows: int) -> None:
    assert fingerprint(run) == fingerprint(reference)
    (first, found), (expected_first, expected) = remembered(run, room), remembered(reference, room)
    assert first == expected_first == rows - room
    assert set(found) == set(expected)
    for name in expected:
        assert len(found[name]) == room
        assert found[name].equal(expected[name]), name


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def catch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("catch")
    finish(command(CATCH, "--run-dir", "run"), folder)
    return folder / "run"


def test_the_uninterrupted_run_wraps_around_and_drops_old_segments(catch: Path) -> None:
    """Otherwise the tests below would show less than they say."""
    first, rows = remembered(catch, 60)
    assert first == 324
    assert rows["actions"].unique().tolist() == [0, 1, 2]
    held = sorted(int(path.name.split("_")[1]) for path in (catch / "checkpoints/segments").iterdir())
    assert 264 < held[0] <= 324
    assert len(held) < 10
    assert sum("train/loss" in row for row in metrics(catch)) > 25


@pytest.mark.slow  # .ci/run takes a sample of such kills
def test_a_dqn_killed_at_random_moments_and_inside_saves_ends_bit_identical(catch: Path, tmp_path: Path) -> None:
    chance, run = random.Random(11), tmp_path / "run"
    kills = inside_saves = 0
    words = command(CATCH, "--run-dir", "run")
    while kills < KILLS or inside_saves < 1:
        assert kills < 4 * KILLS, f"only {inside_saves} of {kills} kills hit a save"
        before = size(run / "metrics.jsonl")
        process = start(words, tmp_path)
        if kills == 3:  # while it starts
            linger(process, chance.uniform(0.5, 2.0))
        elif kills % 2:  # as soon as a save has begun: rows first, then the rest
            wait_until(lambda: saving(run) and size(run / "metrics.jsonl") != before, process)
            linger(process, chance.uniform(0, 0.006))
        else:  # at any moment of the training
            wait_until(lambda: size(run / "metrics.jsonl") > before, process)
            linger(process, chance.uniform(0, 0.25))
        process.kill()
        process.communicate()
        kills += 1
        inside_saves += saving(run)
        if (run / "config.yaml").exists():
            words = command(CATCH, "--resume", "run")
        if process.returncode == 0:  # it got to the end first: once more from the start
            shutil.rmtree(run)
            words = command(CATCH, "--run-dir", "run")
    finish(words, tmp_path)
    assert_same(run, catch, room=60, rows=384)
    assert not list((run / "checkpoints").glob(".*"))
    assert not list((run / "checkpoints/segments").glob(".*"))


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*")) or any((run / "checkpoints/segments").glob(".replay_*"))


def stopped(settings: dict[str, str], folder: Path, *extra: str) -> int:
    """Send SIGTERM after the first rows; returns the step at which the process stopped."""
    run = folder / "run"
    before = size(run / "metrics.jsonl")
    process = start(command(settings, *extra), folder)
    assert wait_until(lambda: size(run / "metrics.jsonl") > before, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "--resume run" in output
    return int(checkpoint.folders(run / "checkpoints")[0].name[5:])


@pytest.mark.slow
def test_sigterm_stops_a_dqn_between_two_rounds_and_the_rest_is_the_same(catch: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = stopped(CATCH, tmp_path, "--run-dir", "run")
    assert 0 < step < 90
    finish(command(CATCH, "--resume", "run"), tmp_path)
    assert_same(run, catch, room=60, rows=384)
    # Exploring anew after a resume, or learning from an empty memory, would show here.
    rows = [row for row in metrics(run) if row["step"] > step and row["step"] % 3 == 0]
    assert rows
    for row in rows:
        shares = [1 - 0.9 * max(0, 32 * (row["step"] - offset) - 8 - 160) / 3000 for offset in range(3)]
        assert row["train/epsilon"] == pytest.approx(sum(max(0.1, share) for share in shares) / 3)
        held = min(480, 32 * row["step"])
        assert 0.25 * held < row["train/age"] < 0.75 * held


def test_a_dqn_on_an_atari_game_goes_on_exactly_from_the_middle_of_its_games(tmp_path: Path) -> None:
    finish(command(PONG, "--run-dir", "whole"), tmp_path)
    step = stopped(PONG, tmp_path, "--run-dir", "run")
    assert 0 < step < 60
    assert checkpoint.load(checkpoint.folders(tmp_path / "run/checkpoints")[0]).parts["games"]["actions"].shape == (2 * step, 2)
    finish(command(PONG, "--resume", "run"), tmp_path)
    assert_same(tmp_path / "run", tmp_path / "whole", room=100, rows=120)
    rows = metrics(tmp_path / "run")
    assert any("train/return" in row for row in rows)
    assert any("train/loss" in row for row in rows)
