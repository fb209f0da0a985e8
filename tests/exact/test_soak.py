"""Short runs in one process leave nothing behind, and the benchmark that says so would notice if they did."""

import gc
import importlib.util
import json
import mmap
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lab.runs import Run

from .conftest import ROOT

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="what a process holds is told by Linux alone"),
]


@pytest.fixture(scope="module")
def soak() -> Iterator[ModuleType]:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("soak", ROOT / "benchmarks/soak.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["soak"]


def runs(soak: ModuleType, count: int, folder: Path) -> dict:
    return soak.many_runs(soak.Options(runs=count, threads=1), folder)


@pytest.mark.slow
def test_twelve_short_runs_leave_no_files_threads_or_children(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "RECORDED", 100)  # the first one: W&B's service stays as a child until the process ends
    result = runs(soak, 12, tmp_path)
    assert sorted(set(result["order"])) == sorted(soak.KINDS_OF_RUNS)
    assert max(result["grown"].values()) <= 0, result["grown"]
    first, second = (sum(state["megabytes"] for state in result["states"][part : part + 2]) / 2 for part in (6, 10))
    assert second - first < 40  # of which the second time of a kind takes some: the whole benchmark begins to count after it
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fifty_short_runs_keep_every_budget(soak: ModuleType, tmp_path: Path) -> None:
    result = runs(soak, 50, tmp_path)
    assert result["kept"], (result["grown"], result["slope"])


@pytest.mark.parametrize("leak", ["files", "threads", "children", "megabytes"])
def test_what_a_run_leaves_behind_is_noticed(soak: ModuleType, leak: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same judgement, of runs that do nothing else."""
    kept: list = []
    end = threading.Event()

    def leave(*_: object) -> None:
        if leak == "files":
            kept.append((tmp_path / "file").open("w"))
        elif leak == "threads":
            kept.append(threading.Thread(target=end.wait))
            kept[-1].start()
        elif leak == "children":
            kept.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE))
        else:
            kept.append(mmap.mmap(-1, 4 << 20))  # from the system itself: what tests before this one have freed would serve an array
            kept[-1].write(b"x" * (4 << 20))

    monkeypatch.setattr(soak, "one_run", leave)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # there is nothing to collect, and much to look through
    try:
        result = runs(soak, 16, tmp_path)
    finally:
        end.set()
        for item in kept:
            if isinstance(item, subprocess.Popen):
                item.communicate()
    assert not result["kept"]
    if leak == "megabytes":
        assert result["slope"]["value"] == pytest.approx(4.2, abs=0.5)
    else:
        assert result["grown"][leak] == 8


def test_runs_that_leave_nothing_are_not_accused(soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "one_run", lambda *_: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    assert runs(soak, 16, tmp_path)["kept"]


def test_a_process_is_looked_at_from_outside(soak: ModuleType) -> None:
    """One with a thread, a child and a file more than it had."""
    code = (
        "import subprocess, sys, threading\n"
        "print('first', flush=True); sys.stdin.readline()\n"
        "held = open(sys.executable, 'rb'), subprocess.Popen(['cat'], stdin=subprocess.PIPE)\n"
        "threading.Thread(target=sys.stdin.readline).start()\n"
        "print('second', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    process.stdout.readline()
    before, work = soak.held(process.pid), soak.spent(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    after = soak.held(process.pid)
    process.communicate("\n")
    assert (after.files - before.files, after.threads - before.threads, after.children - before.children) == (2, 1, 1)
    assert 1 < before.megabytes < 100
    assert 0 <= work < 5
    assert soak.held(process.pid) is None


def test_the_slope_is_that_of_least_squares_with_its_interval(soak: ModuleType) -> None:
    generator = np.random.default_rng(0)
    places = np.arange(200)
    heights = 3.0 + 0.5 * places + generator.normal(0, 2, 200)
    line = soak.slope(places, heights)
    assert line.value == pytest.approx(np.polyfit(places, heights, 1)[0])
    covered = 0
    for _ in range(400):
        line = soak.slope(places, 0.5 * places + generator.normal(0, 2, 200))
        covered += line.low < 0.5 < line.high
    assert 0.92 < covered / 400 < 0.98


def test_a_leak_shows_through_what_comes_and_goes(soak: ModuleType) -> None:
    """Saves open files for a moment, previews hold memory for a while: neither is a leak."""
    generator = np.random.default_rng(0)

    def samples(files: float = 0, megabytes: float = 0) -> list:
        busy, held = generator.integers(0, 4, 600), 500 + 30 * (generator.random(600) > 0.9)
        counts = [(10 + int(extra) + int(files * second), 4 + int(extra > 2), 1 + int(extra > 1)) for second, extra in enumerate(busy)]
        return [(1e9 + i, soak.Held(*count, held[i] + megabytes * i)) for i, count in enumerate(counts)]

    assert soak.settled(samples())["kept"]
    assert not soak.settled(samples(files=0.01))["kept"]
    result = soak.settled(samples(megabytes=0.2))
    assert not result["kept"]
    assert result["slope"]["value"] == pytest.approx(12, abs=1.5)


@pytest.mark.parametrize("phase", ["train", pytest.param("save", marks=pytest.mark.slow), pytest.param("test", marks=pytest.mark.slow)])
def test_a_stop_is_told_by_what_it_met(soak: ModuleType, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a VAE of the digits in place of a preset: the exit code, the seconds, and that the run is there to be resumed."""
    config = tmp_path / "configs/tiny.yaml"
    config.parent.mkdir()
    config.write_text("experiment: vae\ndata:\n  name: digits\ntrainer:\n  steps: 1000000\n")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.setattr(soak, "ROOT", tmp_path)
    stop = soak.one_stop("tiny", phase, tmp_path / "place", random.Random(0), 1)
    assert stop["status"] == 75, (tmp_path / "place/output.txt").read_text()
    assert stop["reached"]
    assert stop["phase"] in (phase, "train")
    assert 0 < stop["work"] < 60
    run = Run(tmp_path / "place/run")
    assert "go on with --resume" in (tmp_path / "place/output.txt").read_text()
    assert any(run.checkpoints.glob("step_*"))
    assert json.loads((run.folder / "environment.json").read_text())["starts"][-1]["error"] is None


def test_a_run_that_ends_before_the_signal_is_told_and_not_counted(soak: ModuleType, tmp_path: Path, monkeypatch) -> None:
    code = "import pathlib; pathlib.Path('run').mkdir()"
    monkeypatch.setattr(
        soak, "started", lambda preset, place, *_: (place.mkdir(), subprocess.Popen([sys.executable, "-c", code], cwd=place))[1]
    )
    over = soak.one_stop("tiny", "train", tmp_path / "place", random.Random(0), 1)
    assert (over["phase"], over["status"], over["reached"]) == ("over", 0, False)
    assert not (tmp_path / "place/run").exists()  # the next one begins anew
    stop = over | {"phase": "train", "status": 75, "seconds": 2.0}
    assert soak.summed_up([over, stop])["kept"]
    assert soak.summed_up([over, stop]) | {"stops": 0} == {"kept": True, "p99": 2.0, "budget": 5.0, "over": 1, "stops": 0}
    assert not soak.summed_up([over, stop | {"status": 1}])["kept"]
    assert not soak.summed_up([stop, stop | {"seconds": 6.0}])["kept"]
    assert not soak.summed_up([over])["kept"]  # which says nothing


def test_a_process_that_would_die_of_the_signal_is_not_taken_for_one_that_listens(soak: ModuleType) -> None:
    code = (
        "import signal, sys\nprint(flush=True); sys.stdin.readline()\nsignal.signal(15, print)\nprint(flush=True); sys.stdin.readline()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    process.stdout.readline()
    assert not soak.listens(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    assert soak.listens(process.pid)
    process.communicate("\n")
    assert not soak.listens(process.pid)
