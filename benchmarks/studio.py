"""How fast the studio opens: from its start to the first paint, and a page with many long runs.

    python benchmarks/studio.py
    python benchmarks/studio.py --runs 200 --rows 10000 --repeats 5

Makes a folder of runs (about 1.1 MB each), starts scripts/studio.py over it, and opens pages in chromium: the first one at once after
the start, when nothing has been read yet. Needs chromium and what `pip install -e ".[dev,studio]"` brings.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("vae", "gan", "diffusion", "dqn")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    runs: int = 200
    """Run folders."""
    rows: int = 10_000
    """Rows of metrics in each."""
    repeats: int = 3
    """Measurements of each figure; the middle one is told, and the range."""


def make_runs(root: Path, count: int, rows: int) -> None:
    """Run folders as trainings leave them: noisy falling losses, a rising score, a clock, finished or stopped."""
    for index in range(count):
        chance, experiment = random.Random(index), EXPERIMENTS[index % len(EXPERIMENTS)]
        folder = root / f"{experiment}_{index % 12}" / f"20261121-{index // 60:02d}{index % 60:02d}00-{index:06x}"
        (folder / "media").mkdir(parents=True)
        steps = 100 * rows * (1 if index % 5 else 2)
        (folder / "config.yaml").write_text(
            f"experiment: {experiment}\nname: {experiment}_{index % 12}\ntrainer:\n  steps: {steps}\n  seed: {index}\n"
        )
        start = {"time": f"2026-11-{1 + index % 20:02d}T{index % 24:02d}:00:00+00:00", "ended": "2026-11-21T08:00:00+00:00", "error": None}
        (folder / "environment.json").write_text(json.dumps({"id": f"{index:016x}", "starts": [start]}))
        (folder / "command.txt").write_text(f"python scripts/train_{experiment}.py --trainer.seed {index}\n")
        with (folder / "metrics.jsonl").open("w") as metrics, (folder / "timing.jsonl").open("w") as timing:
            for row in range(1, rows + 1):
                loss = 3 / math.sqrt(row) + chance.random() / 10
                values = {"step": 100 * row, "train/loss": loss, "train/gradient_norm": 2 * loss, "train/lr": 1e-3}
                metrics.write(json.dumps(values | ({"eval/score": 9 - loss} if row % 100 == 0 else {})) + "\n")
                timing.write(json.dumps({"step": 100 * row, "time": 1.7e9 + row, "steps_per_second": 100.0}) + "\n")


# Measuring


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Served:
    """A studio that has just been started."""

    def __init__(self, root: Path) -> None:
        self.began, port = time.perf_counter(), free_port()
        command = [
            sys.executable,
            "scripts/studio.py",
            "--runs",
            str(root),
            "--port",
            str(port),
            "--no-browser",
        ]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}"
        while not _answers(port):
            time.sleep(0.005)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def opened(browser: Any, url: str, sign: str) -> float:
    """Seconds from asking for a page, in a browser that has seen none yet, to the sign (a selector) being painted."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_selector(sign, state="attached")
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    seconds = time.perf_counter() - began
    page.context.close()
    return seconds


def measured(root: Path, repeats: int, browser: Any, options: Options) -> dict[str, list[float]]:
    """Seconds of each figure."""
    last = f".runs-table tbody tr:nth-child({options.runs})"
    one = next(root.glob("*/*"))
    found: dict[str, list[float]] = {"start to first paint": [], "table, nothing read yet": [], "table again": [], "a run's curves": []}
    for _ in range(repeats):
        with Served(root) as studio:
            found["table, nothing read yet"].append(opened(browser, studio.url, last))
            found["start to first paint"].append(time.perf_counter() - studio.began)
            found["table again"].append(opened(browser, studio.url, last))
            found["a run's curves"].append(opened(browser, f"{studio.url}/run/{one.parent.name}/{one.name}", ".curve svg path[stroke]"))
    return found


def told(name: str, seconds: list[float]) -> str:
    """A line of the result."""
    return f"{name:28}{statistics.median(seconds):7.2f} s   ({min(seconds):.2f} to {max(seconds):.2f})"


def main(show: Callable[[str], None] = print) -> None:
    """Make the runs, measure, tell."""
    options = tyro.cli(Options, description=__doc__)
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("error: there is no chromium here (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = Path(folder)
        make_runs(root, options.runs, options.rows)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        show(f"{options.runs} runs of {options.rows:,} rows each; a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        for name, seconds in measured(root, options.repeats, browser, options).items():
            show(told(name, seconds))
        browser.close()


if __name__ == "__main__":
    main()
