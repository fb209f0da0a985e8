"""Compute a past step of a run once more, and compare it with what was recorded, bit for bit.

    python scripts/replay_step.py RUN --step 37
    python scripts/replay_step.py latest --step 12013        (what happened when training stopped; its message names the step)

The batch and the noise of a step follow from the settings, so that the newest checkpoint before it is enough; where none is
kept that early, training is done again from the first step. A row is the mean over `log_every` steps: all of the row that
holds the step is compared, and the step's own numbers are shown. The run is only read: it may train meanwhile.

Exit codes: 0 the same to the last bit, or nothing was recorded to compare with; 1 something differs. RUN is a run folder or `latest`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from generative import model as generative
from lab import classifier, replaying, runs
from lab.config import Count, Settings, UserError
from lab.launch import FAILED, guarded
from lab.recorder import speak, track
from lab.replaying import Plan, Replayed, Row
from lab.runs import Run
from rl import agent as rl

FAMILIES = generative.FAMILIES | rl.FAMILIES | classifier.FAMILIES


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Which step."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, or `latest`."""
    step: Count
    """The step to compute again; the first one of a run is 1."""


def main() -> int:
    """Compute the step that the command line names; returns the exit code."""
    options = tyro.cli(Options, description=__doc__)
    speak()
    planned = replaying.plan(run_of(options), FAMILIES, options.step)
    begun = f"the checkpoint of step {planned.begun}" if planned.begin else "the first step: no checkpoint is kept that early"
    print(f"step {planned.step} of {planned.run.folder} ({planned.run.experiment}), computed again from {begun}")
    for caution in planned.cautions:
        print(f"note: {caution}")
    replayed = replaying.replay(planned, lambda steps, count: track(steps, count, "computing again"))
    show_step(planned, replayed)
    return compare(planned, replayed)


def run_of(options: Options) -> Run:
    """The run that the command line names.

    Raises:
        UserError: there is none, or a checkpoint of it was named.
    """
    found = runs.find(options.run, FAMILIES)
    if found.checkpoint:
        raise UserError(f"{options.run}: the nearest checkpoint is found by itself; give the run, {found.run.folder}")
    return found.run


def show_step(planned: Plan, replayed: Replayed) -> None:
    """Print the step's own numbers, the losses of skipped updates too, and why training stopped, if it did."""
    print(f"\nstep {planned.step} itself" + (": not reached" if replayed.own is None else ""))
    for name, value in (replayed.own or {}).items():
        print(f"  {name} {value!r}")
    for loss in replayed.refused:
        print(f"  loss {loss!r} of an update that was skipped, since its gradient is not finite")
    if replayed.stopped:
        print(f"training {replayed.stopped.partition(';')[0]}")


def compare(planned: Plan, replayed: Replayed) -> int:
    """Print the recorded and the computed row; returns the exit code."""
    logged, computed = planned.logged, replayed.computed
    if logged is None or computed is None:
        missing = "no row of it was recorded" if logged is None else "the run recorded a row of it"
        print(f"\nnothing to compare for step {planned.row}: {missing}")
        return 0 if logged is None else FAILED
    first = (planned.row - 1) // planned.experiment.trainer.log_every * planned.experiment.trainer.log_every + 1
    print(f"\nthe row of step {planned.row}, the mean over steps {first} to {planned.row}")
    unequal = replaying.unequal(logged, computed)
    show_rows(logged, computed, unequal)
    if unequal:
        print(f"different: {', '.join(unequal)}")
        return FAILED
    print("equal, bit for bit")
    return 0


def show_rows(logged: Row, computed: Row, unequal: list[str]) -> None:
    """Print both rows side by side, the loss first and every number to its last digit."""
    names = sorted({*logged, *computed}, key=lambda name: (name != "train/loss", name))
    width = max(map(len, names), default=0)
    print(f"  {'':{width}}  {'recorded':24}{'computed':24}")
    for name in names:
        recorded, again = (repr(float(row[name])) if name in row else "-" for row in (logged, computed))
        print(f"  {name:{width}}  {recorded:24}{again:24}{'different' if name in unequal else 'equal'}")


if __name__ == "__main__":
    sys.exit(guarded(main))
