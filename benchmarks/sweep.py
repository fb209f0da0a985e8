"""What a second worker saves: the same short trials of DQN on Catch, made by one worker and by two.

    python benchmarks/sweep.py                  20 trials of 50 rounds
    python benchmarks/sweep.py --steps 500      trials as long as those of configs/sweeps/dqn_catch.yaml

Both draw the same settings, and no trial is stopped early. Most of a short trial is the start of a Python process with torch.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
import yaml

from lab import distributed
from lab.sweep import Study, read

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    """What to time."""

    trials: int = 20
    """Trials of each sweep."""
    steps: int = 50
    """Rounds of 32 actions of each trial."""
    out: Path = ROOT / "benchmarks" / "results" / "sweep.json"
    """Where the figures go."""


def main() -> None:
    """Time both sweeps, print their ratio and write the report."""
    options = tyro.cli(Options, description=__doc__)
    seconds = {workers: timed(options, workers) for workers in (1, 2)}
    ratio = seconds[2] / seconds[1]
    print(f"{options.trials} trials: {seconds[1]:.1f} s with one worker, {seconds[2]:.1f} s with two: {100 * ratio:.0f} %")
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), **distributed.environment()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {**about, "trials": options.trials, "steps": options.steps, "seconds": seconds, "ratio": round(ratio, 3)}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def timed(options: Options, workers: int) -> float:
    """Seconds of a whole sweep, from the command to its plots."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("scripts", "configs"):
            (place / name).symlink_to(ROOT / name)
        (place / "sweep.yaml").write_text(yaml.safe_dump(sweep(options)))
        command = [sys.executable, "scripts/sweep.py", "sweep.yaml", "--workers", str(workers)]
        start = time.perf_counter()
        subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        study = Study(read(place / "sweep.yaml"), place / "runs" / "timed")
        assert [trial.state.name for trial in study.trials()] == ["COMPLETE"] * options.trials
        study.close()
        return round(seconds, 1)


def sweep(options: Options) -> dict[str, object]:
    """Random search, so that what is tried does not hang on what ends first."""
    fixed = {"trainer.steps": options.steps, "trainer.preview_every": options.steps, "dqn.learning_starts": 500}
    return {
        "name": "timed",
        "program": "scripts/train_dqn.py",
        "command": ["${env}", "${interpreter}", "${program}", "configs/rl/dqn_catch.yaml", "${args}"],
        "method": "random",
        "metric": {"name": "eval/return", "goal": "maximize"},
        "parameters": {key: {"value": value} for key, value in fixed.items()} | {"optimizer.lr": {"min": 0.0001, "max": 0.01}},
        "run_cap": options.trials,
    }


if __name__ == "__main__":
    main()
