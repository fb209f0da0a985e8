"""Send a run's whole log to Weights & Biases, as one W&B run however often the training was interrupted.

    python scripts/sync.py latest
    python scripts/sync.py RUN --mode offline --project teaching

Rows that W&B has already are not sent again. It needs an API key (`wandb login`, or WANDB_API_KEY); with mode offline it
writes wandb/offline-run-* in the run folder instead, for `wandb sync` on another machine.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from generative import model as generative
from lab import classifier, loading, runs
from lab.launch import guarded, tracked
from lab.tracking import replay
from rl import agent as rl

FAMILIES = generative.FAMILIES | rl.FAMILIES | classifier.FAMILIES


@dataclass(frozen=True)
class Options:
    """Which run to send, and where to."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, or `latest`."""
    mode: Literal["online", "offline"] = "online"
    """Upload, or write a directory for `wandb sync`."""
    project: str | None = None
    """W&B project; the one in the run's settings if not given."""
    entity: str | None = None
    """W&B user or team; the one in the run's settings if not given."""


def main() -> int:
    """Send the run that the command line names."""
    options = tyro.cli(Options, description=__doc__)
    run = runs.find(options.run, FAMILIES).run
    experiment = loading.settings_of(run, FAMILIES)
    named = {name: value for name in ("project", "entity") if (value := getattr(options, name))}
    tracking = dataclasses.replace(experiment.tracking, mode=options.mode, **named)
    with runs.owned(run):
        sent = replay(run.folder, tracking, summary=run.last_values(), **tracked(experiment, run))
    print(f"rows sent: {sent.rows}")
    print(f"w&b run: {sent.where}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
