"""The leaderboard: what each method reaches on a game or a data set, over seeds, in how long, and the command that does it.

    python benchmarks/leaderboard.py                       train and judge what is missing, every row over three seeds (hours on 2 cores)
    python benchmarks/leaderboard.py --rows pqn_catch dqn_catch
    python benchmarks/leaderboard.py --verify pqn_catch    run a row once more with a new seed; fails outside of the row's interval
    python benchmarks/leaderboard.py --show                print the board as it stands

A score is the mean over training seeds; its interval is where one more run is expected with a probability of 95 % (Student's t, from the
spread between the seeds or, where that is less, from the error of judging one run). `--verify` runs a seed that is not on the board, so
it asks whether the figure holds for anybody, not whether the same bits come out: for that there is `make exact`.

Minutes are those of the whole training script, from start to end, tests on the way included. The runs stand below
runs/leaderboard/, and what was stopped there is gone on with. Figures go to benchmarks/results/leaderboard.json, the table to
docs/leaderboard.md.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from scipy import stats

from lab import distributed, runs
from lab.config import UserError
from lab.launch import guarded
from lab.recorder import console

ROOT = Path(__file__).resolve().parent.parent
HOME = runs.RUNS / "leaderboard"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """A line of the board: what is trained, and which figure of its evaluation counts."""

    method: str
    on: str
    """The game or the data set."""
    script: str
    config: str
    figure: str
    """The key in what `scripts/evaluate.py --json` prints; of agents, the mean score."""
    judging: tuple[str, ...]
    """Options of scripts/evaluate.py, which are the protocol."""
    scale: float = 1.0
    unit: str = ""
    best: float = math.inf
    """No score can be beyond it."""

    def training(self, seed: int) -> list[str]:
        """The command line that trains it, without the Python in front."""
        return [f"scripts/{self.script}", f"configs/{self.config}", "--trainer.seed", str(seed)]


GAMES = ("--games", "20")
ROWS = {
    "pqn_catch": Row("PQN", "Catch", "train_pqn.py", "rl/pqn_catch.yaml", "mean", GAMES, best=10),
    "dqn_catch": Row("DQN", "Catch", "train_dqn.py", "rl/dqn_catch.yaml", "mean", GAMES, best=10),
    "ppo_catch": Row("PPO (stable-baselines3)", "Catch", "train_sb3.py", "rl/ppo_catch.yaml", "mean", GAMES, best=10),
    "pqn_pong": Row("PQN", "Pong", "train_pqn.py", "rl/pqn_pong.yaml", "mean", GAMES, best=21),
    "dqn_road_runner": Row("DQN", "Road Runner", "train_dqn.py", "rl/demo.yaml", "mean", GAMES),
    "vit_digits": Row("classifier", "digits", "train_classifier.py", "classifier/digits.yaml", "accuracy", (), 100, " %", best=100),
    "resnet_mnist": Row("classifier", "MNIST", "train_classifier.py", "classifier/mnist_minute.yaml", "accuracy", (), 100, " %", best=100),
    "vae_mnist": Row("VAE", "MNIST", "train_vae.py", "generative/vae_mnist.yaml", "bound", (), unit=" nats"),
}


@dataclass(frozen=True)
class Options:
    """What to do."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Lines of the board to fill in."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds of each line."""
    verify: str = ""
    """Run this line once more, with a seed of its own."""
    show: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only print the board."""
    out: Path = ROOT / "benchmarks" / "results" / "leaderboard.json"
    """Where the figures go."""
    table: Path = ROOT / "docs" / "leaderboard.md"
    """Where the table goes."""


@dataclass(frozen=True)
class Result:
    """One trained run on the board."""

    seed: int
    score: float
    error: float
    """Standard error of judging this run; 0 where the whole test set was judged."""
    minutes: float


def main() -> int:
    """Fill in the board, verify a line of it, or show it."""
    options = tyro.cli(Options, description=__doc__)
    if unknown := sorted({*options.rows, *([options.verify] if options.verify else [])} - set(ROWS)):
        raise UserError(f"no line of the board is called {', '.join(unknown)}; there are {', '.join(ROWS)}")
    board = read(options.out)
    if options.verify:
        return verify(options.verify, board)
    if not options.show:
        fill(options, board)
    console.print(table(board), highlight=False, soft_wrap=True)
    return 0


def read(path: Path) -> dict[str, Any]:
    """The board as it stands: rows by name, each with its machine and its results."""
    board: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return board


def fill(options: Options, board: dict[str, Any]) -> None:
    """Train and judge what is missing, saving after each run."""
    for name in options.rows:
        entry = board.setdefault(name, {"machine": distributed.environment(), "results": []})
        for seed in options.seeds:
            if all(result["seed"] != seed for result in entry["results"]):
                entry["results"].append(vars(run(name, seed)))
                entry["results"].sort(key=lambda result: result["seed"])
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(board, indent=1) + "\n")
                options.table.write_text(table(board) + "\n")


# One run


def run(name: str, seed: int) -> Result:
    """Train a line with a seed, or go on where that was stopped, and judge it."""
    row, folder = ROWS[name], HOME / name / f"seed_{seed}"
    if not (folder / "minutes.json").exists():
        resumed = (folder / "config.yaml").exists()
        began = time.monotonic()
        call(["scripts/" + row.script, "--resume", str(folder)] if resumed else [*row.training(seed), "--run-dir", str(folder)])
        # The time of a run that was stopped is not known; its row must say so rather than flatter it.
        (folder / "minutes.json").write_text(json.dumps(math.nan if resumed else (time.monotonic() - began) / 60))
    printed = call(["scripts/evaluate.py", str(folder), *row.judging, "--json"], capture=True)
    found = json.loads(printed.splitlines()[-1])
    if row.figure not in found:
        raise UserError(f"{name}: scripts/evaluate.py told no {row.figure!r}, only {', '.join(found)}")
    scores = found.get("scores", [])
    error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return Result(seed, found[row.figure] * row.scale, error * row.scale, json.loads((folder / "minutes.json").read_text()))


def call(words: Sequence[str], capture: bool = False) -> str:
    """Run a script to its end.

    Raises:
        UserError: it failed.
    """
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE if capture else None, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError(f"{' '.join(words)} ended with exit code {done.returncode}; what is on the board stays")
    return done.stdout or ""


# The interval


def interval(results: Sequence[Result], best: float = math.inf) -> tuple[float, float]:
    """Where one more run is expected with a probability of 95 %: mean -+ t s sqrt(1 + 1/n), s at least the error of judging one run.

    Raises:
        UserError: fewer than three runs tell nothing of the spread.
    """
    count = len(results)
    if count < 3:
        raise UserError(f"{count} runs are too few for an interval; give at least 3 --seeds")
    scores = [result.score for result in results]
    spread = max(statistics.stdev(scores), math.sqrt(statistics.fmean(result.error**2 for result in results)))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread * math.sqrt(1 + 1 / count)
    middle = statistics.fmean(scores)
    return middle - reach, min(best, middle + reach)


def results_of(board: dict[str, Any], name: str) -> list[Result]:
    """The runs of a line.

    Raises:
        UserError: it has none yet.
    """
    if not board.get(name, {}).get("results"):
        raise UserError(f"{name} is not on the board yet: python benchmarks/leaderboard.py --rows {name}")
    return [Result(**result) for result in board[name]["results"]]


def verify(name: str, board: dict[str, Any]) -> int:
    """Run a line with the next seed; 0 if its score is within the interval, else 1."""
    results = results_of(board, name)
    low, high = interval(results, ROWS[name].best)
    found = run(name, max(result.seed for result in results) + 1)
    inside = low <= found.score <= high
    verdict = "within" if inside else "OUTSIDE of"
    console.print(f"{name}, seed {found.seed}: {found.score:.4g}, {verdict} the interval {low:.4g} to {high:.4g}", highlight=False)
    return 0 if inside else 1


# The table


def table(board: dict[str, Any]) -> str:
    """The board in Markdown."""
    lines = ["| method | on | score (interval of one more run) | seeds | minutes | command |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(line(name, results_of(board, name)) for name in ROWS if name in board)])


def line(name: str, results: Sequence[Result]) -> str:
    """One line of it."""
    row = ROWS[name]
    scores = statistics.fmean(result.score for result in results)
    span = " to ".join(f"{end:.4g}" for end in interval(results, row.best)) if len(results) > 2 else "too few seeds"
    minutes = [result.minutes for result in results if not math.isnan(result.minutes)]
    took = f"{min(minutes):.1f} to {max(minutes):.1f}" if minutes else "stopped on the way"
    seeds = ", ".join(str(result.seed) for result in results)
    return f"| {row.method} | {row.on} | {scores:.4g}{row.unit} ({span}) | {seeds} | {took} | `python {' '.join(row.training(0))}` |"


if __name__ == "__main__":
    sys.exit(guarded(main))
