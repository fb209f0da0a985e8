"""What a user waits for: seconds from Enter to the first training step, and to the end of `--help`.

    python benchmarks/startup.py                         a preset of every training script, `--help` of every script: 7 minutes on 2 cores
    python benchmarks/startup.py --presets vae_mnist dqn_pong --rounds 5 --no-help

first step: from starting `python scripts/train_X.py PRESET` to the moment at which metrics.jsonl has its first row, with a row for every
step and W&B recording offline, as it does without an account. For an agent a step is a round of playing (and learning, where learning
has begun). The process is then stopped.
help: from starting `python scripts/X.py --help` to its end.

Medians of the rounds; the first round of all, for which the files come from the disk, is not counted. The targets are 5 s and 2 s; what
misses them is named.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro
from turns import RESULTS, ROOT, keep, said, spread

from lab import distributed
from lab.config import UserError, read_yaml
from lab.launch import guarded
from lab.recorder import console
from lab.runs import Run

PRESETS = (
    "autoencoder_mnist",
    "vae_mnist",
    "vqvae_mnist",
    "tokens_mnist",
    "gan_mnist",
    "superresolution_mnist",
    "glow_mnist",
    "diffusion_mnist",
    "distillation_mnist",
    "mnist",
    "dqn_catch",
    "dqn_pong",
    "pqn_catch",
    "ppo_catch",
    "ppo_pong",
)
BUILT_ON = {"tokens": ("--vqvae", "vqvae"), "distillation": ("--teacher", "diffusion"), "latent_mnist": ("--latents", "vqvae")}
"""A preset, or all of an experiment, that needs a run of another preset of the same set, and the option that names it."""
FIRST_STEP, HELP, PATIENCE = 5.0, 2.0, 300.0


@dataclass(frozen=True)
class Options:
    """What to measure."""

    presets: tuple[str, ...] = PRESETS
    """Presets, by name."""
    help: bool = True
    """Measure `--help` of every script as well."""
    rounds: int = 3
    """Turns of each that count."""
    out: Path = RESULTS / "startup.json"
    """Where the figures go."""


def main() -> int:
    """Take every measurement, print a line for each and write the report."""
    options = tyro.cli(Options, description=__doc__)
    distributed.join("cpu", 0, deterministic=False)
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        starts = {preset: starter(preset, Path(folder)) for preset in options.presets}
        report["first_step"] = told("first step", timed(starts, options.rounds), FIRST_STEP)
    if options.help:
        scripts = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
        report["help"] = told("--help", timed({name: helper(name) for name in scripts}, options.rounds), HELP)
    keep(options.out, report)
    return 0


def presets() -> dict[str, Path]:
    """The files of all presets, by name."""
    return {path.stem: path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "sweeps"}


def timed(starts: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of everything, round by round, without the first one."""
    taken: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(rounds + 1):
        for name, start in starts.items():
            taken[name].append(start())
    return {name: seconds[1:] for name, seconds in taken.items()}


def told(what: str, taken: dict[str, list[float]], target: float) -> dict[str, list[float]]:
    """The same seconds, after they were printed: a line for each and one for all."""
    for name, seconds in sorted(taken.items(), key=lambda item: -statistics.median(item[1])):
        console.print(f"  {what} {name:28} {spread(seconds)} s", highlight=False, soft_wrap=True)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    slow = [name for name, seconds in medians.items() if seconds > target]
    missed = f"; above {target:g} s: {', '.join(slow)}" if slow else f"; all within {target:g} s"
    console.print(f"{what}: {spread([*medians.values()])} s{missed}", highlight=False, soft_wrap=True)
    return taken


# Starting


def helper(script: str) -> Callable[[], float]:
    """Starts a script for its help and gives the seconds until it ended."""

    def start() -> float:
        began = time.perf_counter()
        said([str(ROOT / "scripts" / script), "--help"])
        return time.perf_counter() - began

    return start


def starter(preset: str, folder: Path) -> Callable[[], float]:
    """Starts a preset and gives the seconds until its first step was done."""
    words = command(preset, folder)
    place = folder / "timed"

    def start() -> float:
        began = time.perf_counter()
        seconds = until_first_row([*words, "--run-dir", str(place)], place, began)
        shutil.rmtree(place)
        return seconds

    return start


def command(preset: str, folder: Path) -> list[str]:
    """The command line of a preset, after the run was made that it is built on.

    Raises:
        UserError: there is no such preset.
    """
    if (config := presets().get(preset)) is None:
        raise UserError(f"--presets {preset}: there is no such file below configs/")
    experiment = str(read_yaml(config)[1])
    words = [sys.executable, str(ROOT / "scripts" / f"train_{experiment}.py"), str(config)]
    words += ["--trainer.log-every", "1", "--tracking.mode", "offline"]
    option, family = BUILT_ON.get(preset) or BUILT_ON.get(experiment) or ("", "")
    if not option:
        return words
    base = f"{family}_{preset.rpartition('_')[2]}"
    if not (folder / base).exists():
        ready = [*command(base, folder), "--trainer.steps", "1", "--run-dir", str(folder / base)]
        said(ready[1:])
    return [*words, option, str(folder / base)]


def until_first_row(words: list[str], place: Path, began: float) -> float:
    """Seconds since `began` until a training process has recorded its first step; then it is ended.

    Raises:
        UserError: it ended before, or took too long.
    """
    rows = Run(place).metrics
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            while not (rows.exists() and rows.stat().st_size):
                if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                    log.seek(0)
                    raise UserError(f"{' '.join(words)}: no step was done; it said: {log.read().strip()[-300:]}")
                time.sleep(0.005)
            return time.perf_counter() - began
        finally:
            process.kill()


if __name__ == "__main__":
    sys.exit(guarded(main))
