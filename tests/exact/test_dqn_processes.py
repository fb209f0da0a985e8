"""A DQN on two processes, each with half of the games and of the frames, is the same as on one, and is killed and resumed as exactly."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import checkpoint
from lab.distributed import World
from lab.trainer import Window

from .conftest import ROOT, finish, start
from .test_dqn import CATCH, PONG, assert_same, command, metrics, saving
from .test_kill import linger, size, wait_until

SETTINGS = CATCH | {"trainer.milestones": "0", "trainer.preview-every": "96", "trainer.keep": "30", "test.games": "1"}


def together(words: list[str]) -> list[str]:
    """The command that a user gives for two processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words[1:]]


def two(words: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Two processes, started as `torchrun` would, and nobody above them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    place = ["MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2"]
    return [start(["env", *place, f"RANK={rank}", f"LOCAL_RANK={rank}", *words], folder) for rank in range(2)]


def ended(processes: list[subprocess.Popen[str]], expect: int) -> str:
    """Wait for all; what they printed."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [expect] * len(processes), "".join(outputs)
    return "".join(outputs)


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in metrics(run) if "train/loss" in row]


def assert_close(run: Path, reference: Path, bounds: tuple[float, ...] = (1e-5,)) -> None:
    """The same course of training but for rounding: in each of so many equal parts of it the losses are as close as the bound says."""
    found, expected = metrics(run), metrics(reference)
    assert [list(row) for row in found] == [list(row) for row in expected]
    values = losses(reference)
    assert len(values) > 20
    assert all(math.isfinite(value) and value > 0 for value in values)
    apart = [abs(a - b) / b for a, b in zip(losses(run), values, strict=True)]
    for index, bound in enumerate(bounds):
        assert max(apart[len(apart) * index // len(bounds) : len(apart) * (index + 1) // len(bounds)]) < bound
    for row, other in zip(found, expected, strict=True):  # the same games with the same ends, and the same draws from the memory
        for name in ("train/return", "train/length", "train/age", "train/epsilon", "eval/return", "frames", "updates"):
            assert row.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=1e-9)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("single")
    finish(command(SETTINGS, "--run-dir", "run"), folder)
    return folder / "run"


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of two processes, which nothing interrupts."""
    folder = tmp_path_factory.mktemp("double")
    finish(together(command(SETTINGS, "--run-dir", "run")), folder)
    return folder / "run"


# The same losses


def test_two_processes_have_the_losses_of_one(single: Path, double: Path) -> None:
    assert_close(double, single)
    files = [{path.name for path in checkpoint.folders(run / "checkpoints")[0].iterdir()} for run in (single, double)]
    assert files[0] == files[1]


def until_stopped(processes: list[subprocess.Popen[str]], run: Path) -> int:
    """Send SIGTERM to one process after some rows of a run; returns the step at which all stopped."""
    before = size(run / "metrics.jsonl")
    assert wait_until(lambda: size(run / "metrics.jsonl") > before, processes[0])
    processes[-1].send_signal(signal.SIGTERM)
    assert f"--resume {run.name}" in ended(processes, 75)
    return int(checkpoint.folders(run / "checkpoints")[0].name[5:])


def cut_back(run: Path, step: int) -> None:
    """Make a run what it was when it had saved that step."""
    for folder in checkpoint.folders(run / "checkpoints"):
        if folder.name > f"step_{step:09d}":
            shutil.rmtree(folder)
    with (run / "metrics.jsonl").open("r+b") as file:
        file.truncate(checkpoint.load(run / f"checkpoints/step_{step:09d}").notes["metrics_bytes"])


@pytest.mark.slow
def test_a_run_goes_from_one_process_to_two_which_sigterm_stops_and_back(single: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(single, run)
    cut_back(run, 16)
    step = until_stopped(two(command(SETTINGS, "--resume", "run"), tmp_path), run)
    assert 16 < step < 96
    finish(command(SETTINGS, "--resume", "run"), tmp_path)
    assert_close(run, single)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"replay.prioritised": "false"}, {"trainer.accumulate": "2"}, {"exploration.ladder": "3"}])
def test_other_settings_have_the_losses_of_one_process_too(changes: dict[str, str], tmp_path: Path) -> None:
    settings = SETTINGS | changes
    finish(command(settings, "--run-dir", "one"), tmp_path)
    finish(together(command(settings, "--run-dir", "two")), tmp_path)
    assert_close(tmp_path / "two", tmp_path / "one")


# The loss falls to a hundredth of what it was: the square of small differences of values, whose rounding weighs the more in it.
ATARI_BOUNDS = 1e-5, 1e-4
ATARI = PONG | {"dqn.batch-size": "16", "trainer.log-every": "1", "trainer.milestones": "0"}


@pytest.mark.slow
def test_an_atari_game_has_the_losses_of_one_process_and_goes_from_one_to_two_and_back(tmp_path: Path) -> None:
    one, both, run = (tmp_path / name for name in ("one", "two", "run"))
    finish(command(ATARI, "--run-dir", "one"), tmp_path)
    finish(together(command(ATARI, "--run-dir", "two")), tmp_path)
    assert_close(both, one, ATARI_BOUNDS)
    states = [checkpoint.load(checkpoint.folders(folder / "checkpoints")[0]).parts["games"] for folder in (one, both)]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    until_stopped([start(command(ATARI, "--run-dir", "run"), tmp_path)], run)
    until_stopped(two(command(ATARI, "--resume", "run"), tmp_path), run)
    finish(command(ATARI, "--resume", "run"), tmp_path)
    assert_close(run, one, ATARI_BOUNDS)


# The same bits


def kill_inside_a_save(words: list[str], run: Path) -> bool:
    """Kill both processes as soon as a save has begun; tells whether they were inside of it."""
    before = size(run / "metrics.jsonl")
    processes = two(words, run.parent)
    wait_until(lambda: saving(run) and size(run / "metrics.jsonl") != before, processes[0])
    return kill(processes) and saving(run)


def kill(processes: list[subprocess.Popen[str]]) -> bool:
    """Kill both; tells whether they had not come to their end."""
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    return any(process.returncode for process in processes)


@pytest.mark.slow
def test_two_processes_killed_inside_a_save_end_with_the_bits_of_those_that_were_not(double: Path, tmp_path: Path) -> None:
    run, words = tmp_path / "run", command(SETTINGS, "--run-dir", "run")
    for _ in range(12):  # a save is soon over
        inside = kill_inside_a_save(words, run)
        words = command(SETTINGS, "--resume", "run")
        if inside:
            break
    assert inside
    ended(two(words, tmp_path), 0)
    assert_same(run, double, room=60, rows=384)


@pytest.mark.slow
def test_two_processes_killed_at_random_moments_end_with_the_bits_of_those_that_were_not(double: Path, tmp_path: Path) -> None:
    chance, run = random.Random(4), tmp_path / "run"
    words = command(SETTINGS, "--run-dir", "run")
    for index in range(8):
        before = size(run / "metrics.jsonl")
        processes = two(words, tmp_path)
        if index % 4 < 3:
            wait_until(lambda before=before: size(run / "metrics.jsonl") > before, processes[0])
        linger(processes[0], chance.uniform(0, 0.3 if index % 4 < 3 else 3))
        if not kill(processes):
            break
        if (run / "config.yaml").exists():
            words = command(SETTINGS, "--resume", "run")
    finish(together(words), tmp_path)
    assert_same(run, double, room=60, rows=384)


def window(**metrics: list[float]) -> dict[str, Any]:
    """The state of a window that has seen these values of metrics."""
    made = Window()
    for name, values in metrics.items():
        for value in values:
            made.add({name: value})
    return made.state_dict()


def test_metrics_since_the_last_row_are_put_back_for_any_number_of_processes() -> None:
    states = [window(loss=[1.0, 2.0], score=[7.0]), window(loss=[6.0, 7.0])]
    for rank in range(2):
        kept = Window()
        kept.take_up(states, World(rank, 2))
        assert kept.state_dict() == states[rank]
    alone = Window()
    alone.take_up(states, World())
    alone.add({"loss": 10.0})  # one step of one process, after two of two
    assert alone.means(World()) == {"loss": pytest.approx((4.0 * 2 + 10) / 3), "score": 7.0}
    several = [Window(), Window()]
    for rank, kept in enumerate(several):
        kept.take_up([window(loss=[4.0, 4.0])], World(rank, 2))
        kept.add({"loss": 10.0 + rank})
    told = [kept.state_dict() for kept in several]
    totals = [sum(float(state["sums"]["loss"]) for state in told), sum(state["counts"]["loss"] for state in told)]
    assert totals[0] / totals[1] == pytest.approx((4.0 + 4.0 + 10.5) / 3)


# What is where


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, after it has compared what it shares with what one has alone."""
    folder = tmp_path_factory.mktemp("sharing")
    ended(two([sys.executable, "-m", "tests.exact.sharing", str(folder)], ROOT), 0)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_frame_is_in_one_process_only(figures: list[dict[str, Any]]) -> None:
    frames = 20_000 * 84 * 84
    for one in figures:
        assert one["memory"]["frames"] == frames // 2 + 84 * 84
        assert one["memory"]["grown"] < 0.65 * frames


def test_processes_without_any_row_of_a_batch_take_part_in_its_update(figures: list[dict[str, Any]]) -> None:
    sizes = [one["losses"]["sizes"] for one in figures]
    assert [sum(pair) for pair in zip(*sizes, strict=True)] == [2] * 35
    assert all(0 in each for each in sizes)
    for one in figures:
        assert one["losses"]["shared"] == pytest.approx(one["losses"]["alone"], rel=1e-5)


def test_memory_that_one_process_lacks_is_refused_by_all_alike(figures: list[dict[str, Any]]) -> None:
    said = {one["refusal"] for one in figures}
    assert len(said) == 1
    assert "1,000,000 transitions take 3.6 GB in each of 2 processes and 0.0 MB of memory are free in each" in said.pop()


@pytest.mark.slow
def test_a_mistake_that_all_processes_find_is_told_once(tmp_path: Path) -> None:
    told = ended(two(command(SETTINGS | {"replay.capacity": "30"}, "--run-dir", "run"), tmp_path), 2)
    assert told.count("error: ") == told.count("replay.capacity: 30 is too small for 8 games; give at least 56") == 1
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()
