"""How a run stands, told from its folder alone and quickly: a listing of hundreds asks for all of them."""

from __future__ import annotations

import math
import os
import socket
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from lab import runs
from lab.config import ConfigError, UserError, read_yaml
from lab.curves import decoded
from lab.runs import Owner, Run

State = Literal["running", "finished", "stopped", "failed", "damaged"]

QUIET = 600.0
"""Seconds after which a run of another machine that records nothing is taken for dead."""
TAIL = 32_768
"""Bytes at the end of the metrics that are read."""
KEY_METRICS = ("eval/return", "train/return", "eval/accuracy", "eval/bits", "eval/loss", "eval/", "train/loss", "train/")
"""Beginnings of the name of the metric that tells most of a run, the best one first."""


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    state: State
    """running; finished: all its steps are done; stopped: by a signal, after saving; failed: by an error or a kill; damaged: unreadable."""
    why: str
    """What happened to a run that failed or is damaged; else empty."""
    step: int
    """Steps that are recorded."""
    steps: int
    """Steps of the whole run; 0 if not known."""
    metric: str
    """The metric that tells most of the run, by its name; empty if there is none."""
    value: float
    """Its newest value."""
    seconds: float
    """Time spent at work, over all starts."""
    age: float
    """Seconds since something was recorded."""
    pid: int
    """The process at work on this machine; 0 if there is none."""

    @property
    def progress(self) -> float:
        """Part of the steps that is done, 0 to 1."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0


def status(run: Run) -> Status:
    """How a run stands; never raises, whatever state its files are in."""
    rows, age = tail(run.metrics)
    latest = {name: value for row in rows for name, value in row.items()}
    step, (metric, value) = _whole(latest.get("step")), key_metric(latest)
    starts = runs.starts_in(runs.facts(run.environment))
    owner = runs.owner_of(run)
    working = owner if owner and _at_work(run, owner, age) else None
    seconds = sum(_duration(start, age, running=bool(working) and start is starts[-1]) for start in starts)
    try:
        steps = planned_steps(run)
    except UserError as error:
        return Status("damaged", str(error), step, 0, metric, value, seconds, age, 0)
    state, why = _state(working, owner, starts, step >= steps > 0)
    pid = working.pid if working and working.host == socket.gethostname() else 0
    return Status(state, why, step, steps, metric, value, seconds, age, pid)


def _state(working: Owner | None, owner: Owner | None, starts: list[dict[str, Any]], done: bool) -> tuple[State, str]:
    """The state, and what there is to say of it."""
    error = starts[-1].get("error") if starts else None
    if working:
        return "running", ""
    if owner:
        return "failed", f"the process {owner.pid} on {owner.host} is gone: killed, or the machine went down"
    if error:
        return "failed", str(error)
    return ("finished" if done else "stopped"), ""


def _at_work(run: Run, owner: Owner, age: float) -> bool:
    """Whether the owner is alive; of another machine's all that can be told is whether it goes on recording."""
    return runs.alive(run) if owner.host == socket.gethostname() else age < QUIET


def planned_steps(run: Run) -> int:
    """The steps of the whole run, 0 where its config leaves them to the code.

    Raises:
        UserError: the config cannot be read.
    """
    try:
        given = read_yaml(run.config)[0].get("trainer.steps")
    except ConfigError as error:
        raise UserError(str(error).partition(";")[0].partition("\n")[0]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{run.config} cannot be read: {error}") from None
    return _whole(given.text if given else 0)


def key_metric(latest: dict[str, Any]) -> tuple[str, float]:
    """Of a run's newest values the one that tells most, and its name."""
    numbers = {name: float(value) for name, value in latest.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    found = (name for begin in KEY_METRICS for name in sorted(numbers) if name.startswith(begin))
    name = next(found, "")
    return name, numbers.get(name, math.nan)


def tail(path: Path) -> tuple[list[dict[str, Any]], float]:
    """The last rows of a file of JSON lines, and the seconds since it grew; lines that are not whole are left out."""
    try:
        with path.open("rb") as file:
            seen = os.fstat(file.fileno())
            file.seek(max(0, seen.st_size - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return [], math.inf
    whole = [line for line in (lines if seen.st_size <= TAIL else lines[1:]) if line]
    return [row for row in decoded(whole) if isinstance(row, dict)], max(0.0, time.time() - seen.st_mtime)


def _duration(start: dict[str, Any], age: float, running: bool) -> float:
    """Seconds of one start; of one that was killed, until the last thing it recorded."""
    try:
        began = datetime.fromisoformat(start["time"]).timestamp()
        ended = time.time() if running else datetime.fromisoformat(start["ended"]).timestamp() if "ended" in start else time.time() - age
        return max(0.0, ended - began)
    except (KeyError, ValueError, TypeError, OverflowError):
        return 0.0


def _whole(value: Any) -> int:
    """A whole number, or 0 where there is none to be found."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return 0
