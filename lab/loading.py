"""Opening a run again: its settings, and what a checkpoint of it holds."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lab import checkpoint
from lab.checkpoint import Checkpoint, DamagedCheckpoint
from lab.config import UserError, read_yaml, resolve
from lab.runs import Found, Run


def settings_of(run: Run, families: Mapping[str, str]) -> Any:
    """The settings that a run was made with; `families` names the module of each kind of experiment."""
    default = importlib.import_module(families[run.experiment]).EXPERIMENT
    return resolve(default, read_yaml(run.config)[0]).settings


def moments(run: Run) -> dict[int, Path]:
    """The steps whose weights a run still has, in order, and the folder of each: its milestones and its checkpoints."""
    found = {folder.name: folder for root in (run.milestones, run.checkpoints) for folder in checkpoint.folders(root)}
    return {int(name.removeprefix("step_")): found[name] for name in sorted(found) if name.removeprefix("step_").isdecimal()}


def saved(found: Found, only: Collection[str] = ()) -> Checkpoint:
    """The named checkpoint, or the newest whole one; of its parts, where some are named, those `only`.

    Raises:
        UserError: there is none, or the named one is damaged.
    """
    try:
        read = checkpoint.load(found.checkpoint, only) if found.checkpoint else checkpoint.load_newest(found.run.checkpoints, only)
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}; name the run's folder to take its newest whole checkpoint") from None
    if read is None:
        raise UserError(f"{found.run.folder} has no whole checkpoint yet; train it with --resume {found.run.folder}")
    return read
