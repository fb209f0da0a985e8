"""Try many settings of an experiment: a sweep, as a file in W&B's own schema describes it, without W&B.

    python scripts/sweep.py configs/sweeps/dqn_catch.yaml --workers 2
    python scripts/sweep.py configs/sweeps/dqn_catch.yaml --trials 40          (20 more, learning from the first 20)
    python scripts/sweep.py configs/sweeps/vae_digits.yaml --minutes 30        (stops then; the same command goes on)
    python scripts/sweep.py configs/sweeps/dqn_catch.yaml --show               (what is known so far, while others work)

Every trial is a run of its own in runs/<name>/, which all other scripts know. Ctrl-C stops: what runs is saved, and the same command
goes on with it; so it does after a kill or a power cut. The same command in a second terminal, or on another machine with
--storage URL, shares the work. Beside the runs lie results.csv, history.png, parallel_coordinates.png and importances.png.
The same file works with an account: `wandb sweep FILE`, then `wandb agent SWEEP`.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.box import SIMPLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from generative import model as generative
from lab import classifier, runs
from lab.config import ConfigError, Count, Natural, Positive, Settings, UserError
from lab.experiment import Experiment
from lab.launch import FAILED, guarded, read_order
from lab.recorder import console
from lab.sweep import Outcome, Study, Sweep, Workers, read
from lab.trainer import DONE, STOPPED, stop_signals
from rl import agent as rl

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FAMILIES = generative.FAMILIES | rl.FAMILIES | classifier.FAMILIES
STATES = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
FEWEST = 2
"""Finished trials of which something can be drawn."""


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What to try, and how much of it."""

    file: Annotated[Path, tyro.conf.Positional]
    """The sweep, in W&B's schema."""
    workers: Count = 1
    """Trials that are trained at a time; the cores are shared among them."""
    trials: Count | None = None
    """Trials to come to, those of former times among them; default: the file's run_cap, or the whole grid."""
    minutes: Positive | None = None
    """Stop after this time, as Ctrl-C would."""
    name: str | None = None
    """Name of the sweep, whose runs lie in runs/<name>/; default: the file's own."""
    storage: str = ""
    """Database that several machines can share, such as postgresql://USER:PASSWORD@HOST/NAME; default: SQLite in runs/<name>/."""
    seed: Natural = 0
    """Decides which settings are tried."""
    show: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only show what is known so far."""


def main() -> int:
    """Run or show the sweep that the command line names."""
    options = tyro.cli(Options, description=__doc__)
    sweep = named(read(options.file), options.name)
    experiment, count = check(sweep), 0 if options.show else wanted(options, sweep)
    study = Study(sweep, runs.RUNS / sweep.name, options.storage, options.seed, create=not options.show)
    try:
        status = run(options, study, experiment, count) if count else DONE
        report(study)
    finally:
        study.close()
    return status


def named(sweep: Sweep, name: str | None) -> Sweep:
    """The sweep under another name, if one is given.

    Raises:
        UserError: no folder can be called so.
    """
    sweep = dataclasses.replace(sweep, name=name or sweep.name)
    if not re.fullmatch(r"\w[\w.-]*", sweep.name):
        raise UserError(f"name: expected letters, digits, '.', '_' and '-', since a folder is called so, found {sweep.name!r}")
    return sweep


def check(sweep: Sweep) -> Experiment:
    """Read the command of every end of every range as the program will; returns the settings of the first.

    Raises:
        ConfigError, UserError: what the program will not take, or a program that is not ours.
    """
    known, family = FAMILIES, Path(sweep.program).stem.removeprefix("train_")
    if family not in known or not Path(sweep.program).exists():
        scripts = ", ".join(f"scripts/train_{name}.py" for name in known)
        raise UserError(f"{sweep.path}: program: expected one of {scripts}, found {sweep.program}")
    default = importlib.import_module(known[family]).EXPERIMENT
    first = {parameter.key: parameter.ends[0] for parameter in sweep.parameters}
    others = [first | {parameter.key: value} for parameter in sweep.parameters for value in parameter.ends[1:]]
    problems: list[str] = []
    for values in (first, *others):
        try:
            read_order(default, sweep.arguments(values))
        except ConfigError as error:
            problems += error.problems
    if problems:
        told = [problem.replace("command line", f"{sweep.path}: parameters") for problem in dict.fromkeys(problems)]
        raise ConfigError(told)
    return read_order(default, sweep.arguments(first)).resolved.settings


# Running


def run(options: Options, study: Study, experiment: Experiment, count: int) -> int:
    """Come to `count` trials; returns the exit code."""
    study.plan(count)
    threads = max(1, cores() // options.workers)
    extras = [] if "name" in given(study.sweep) else [f"--name={study.sweep.name}"]
    extras += [] if experiment.trainer.threads else [f"--trainer.threads={threads}"]
    with Display(study, count) as display, stop_signals() as requested:
        workers = Workers(study, count, extras, threads, display.tell)
        running = workers.start(options.workers)
        ends = time.monotonic() + 60 * (options.minutes or float("inf"))
        while any(thread.is_alive() for thread in running):
            if (requested.wait(0.1) or time.monotonic() > ends) and not workers.stopping.is_set():
                console.print("stopping: what runs is saved; the same command goes on with it (once more to stop at once)")
                workers.stopping.set()
    return status(workers, study)


def wanted(options: Options, sweep: Sweep) -> int:
    """How many trials to come to.

    Raises:
        UserError: nothing says how many.
    """
    whole = len(sweep.grid()) if sweep.method == "grid" else None
    count = options.trials or sweep.run_cap or whole
    if count is None:
        raise UserError(f"{sweep.path}: how many trials? Give --trials, or run_cap in the file")
    return min(count, whole or count)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def given(sweep: Sweep) -> set[str]:
    """The settings that the file names, as parameters or in its command."""
    words = sweep.arguments({parameter.key: "" for parameter in sweep.parameters})
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def status(workers: Workers, study: Study) -> int:
    """The exit code.

    Raises:
        UserError: the database failed, or no trial came to a result.
    """
    if workers.errors:
        raise workers.errors[0]
    if workers.broken:
        print(f"error: all trials have failed, so the rest would too; the last one: {workers.broken}", file=sys.stderr)
        print(f"mend it, then start anew with another --name (or remove {study.folder})", file=sys.stderr)
        return FAILED
    return STOPPED if workers.stopping.is_set() else DONE


# Showing


class Display:
    """A line for every trial that ends, above a bar on a terminal."""

    def __init__(self, study: Study, count: int) -> None:
        self.study, self.count = study, count
        shown = (
            TextColumn("[bold]{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[best]}"),
        )
        self.bar = Progress(*shown, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(study.sweep.name, total=count, best="")

    def __enter__(self) -> Display:
        """Begin to draw."""
        self.bar.start()
        self._advance()
        return self

    def __exit__(self, *details: object) -> None:
        """Leave the bar on the screen."""
        self.bar.stop()

    def tell(self, outcome: Outcome) -> None:
        """Say how a trial ended."""
        console.print(line(self.study.sweep, outcome), markup=False, highlight=False, soft_wrap=True)
        self._advance()

    def _advance(self) -> None:
        trials = self.study.trials()
        leader = best(self.study.sweep, trials)
        said = f"best {leader.value:.4g} (trial {leader.number})" if leader else ""
        self.bar.update(self.task, completed=sum(trial.state.is_finished() for trial in trials[: self.count]), best=said)


def line(sweep: Sweep, outcome: Outcome) -> str:
    """How a trial ended, in a line: `trial 7: eval/return 5.25  optimizer.lr 0.0012  12.3 s`."""
    trial = outcome.trial
    how = {"COMPLETE": "", "PRUNED": "pruned at ", "FAIL": "failed"}[trial.state.name]
    found = "" if trial.value is None else f"{sweep.metric} {trial.value:.4g}"
    words = [how + found, *(f"{key} {text(value)}" for key, value in trial.params.items()), f"{trial.user_attrs.get('seconds', 0):.1f} s"]
    return f"trial {trial.number}: " + "  ".join(words) + (f": {outcome.message}" if outcome.message else "")


def text(value: Any) -> str:
    """A setting, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def best(sweep: Sweep, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The finished trial with the best value; None where there is none."""
    ranked = by_value(sweep, trials)
    return ranked[0] if ranked and ranked[0].state.name == "COMPLETE" else None


def by_value(sweep: Sweep, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that came to their end, the best one first, then the others by number."""
    sign = -1 if sweep.goal == "maximize" else 1
    return sorted(trials, key=lambda t: (0, sign * (t.value or 0)) if t.state.name == "COMPLETE" else (1, t.number))


def report(study: Study) -> None:
    """Print a table of all trials, and write it and the plots into the sweep's folder."""
    trials = by_value(study.sweep, study.trials())
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    console.print(table(study.sweep, trials, keys))
    if leader := best(study.sweep, trials):
        print(f"best: {study.sweep.metric} {leader.value:.6g}, {leader.user_attrs['run']}")
    write_csv(study.folder / "results.csv", study.sweep, trials, keys)
    for path in plots(study):
        print(f"plot: {path}")
    print(f"sweep: {study.folder}")


def table(sweep: Sweep, trials: Sequence[FrozenTrial], keys: Sequence[str]) -> Table:
    """The trials as rows, with the settings in which they differ under short names, and the end of their run's name."""
    leaves = [key.rpartition(".")[2] for key in keys]
    names = [leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves)]
    shown = Table(title=f"{sweep.name}: {sweep.goal} {sweep.metric}", box=SIMPLE, pad_edge=False)
    for name in ("trial", "state", sweep.metric.rpartition("/")[2], *names, "seconds", "run"):
        shown.add_column(name, justify="left" if name in ("state", "run") else "right", overflow="fold")
    for trial in trials:
        value = "" if trial.value is None else f"{trial.value:.4g}"
        settings = [text(trial.params[key]) if key in trial.params else "" for key in keys]
        seconds, run = trial.user_attrs.get("seconds", ""), trial.user_attrs.get("run", "").rpartition("-")[2]
        shown.add_row(str(trial.number), STATES[trial.state.name], value, *settings, str(seconds), run)
    return shown


def write_csv(path: Path, sweep: Sweep, trials: Sequence[FrozenTrial], keys: Sequence[str]) -> None:
    """The same table in full precision."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", sweep.metric, *keys, "seconds", "run"])
        for trial in trials:
            value, facts = "" if trial.value is None else trial.value, trial.user_attrs
            settings = [trial.params.get(key, "") for key in keys]
            writer.writerow([trial.number, STATES[trial.state.name], value, *settings, facts.get("seconds", ""), facts.get("run", "")])
    os.replace(temporary, path)


def plots(study: Study) -> Iterator[Path]:
    """Draw how the best value came about, which settings went with which values, and which of them mattered."""
    done = [trial for trial in study.trials() if trial.state.name == "COMPLETE"]
    varied = [
        key for key in dict.fromkeys(key for trial in done for key in trial.params) if len({trial.params.get(key) for trial in done}) > 1
    ]
    if len(done) < FEWEST or not varied or len({trial.value for trial in done}) == 1:
        print(f"no plots yet: they need {FEWEST} finished trials with different settings and results")
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    whole, label = study.load(), study.sweep.metric
    figures = {
        "history": lambda: draw.plot_optimization_history(whole, target_name=label),
        "parallel_coordinates": lambda: draw.plot_parallel_coordinate(whole, varied, target_name=label),
        "importances": lambda: draw.plot_param_importances(whole, params=varied, target_name=label),
    }
    for name, make in figures.items():
        figure = make().figure
        for axes in figure.axes:
            axes.grid(False)  # several scales in one picture
        figure.set_size_inches(max(7, 2.2 * len(varied)) if name == "parallel_coordinates" else 7, 4.2)
        figure.savefig(study.folder / f"{name}.png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        yield study.folder / f"{name}.png"


if __name__ == "__main__":
    sys.exit(guarded(main))
