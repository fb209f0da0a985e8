"""The table of all runs: what stands in its rows, read again only where the files of a run have changed."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import ui

from lab.runs import Run
from lab.status import Status, status

ICONS = {"running": "play_circle", "finished": "check_circle", "stopped": "pause_circle", "failed": "error", "damaged": "broken_image"}
"""Of each state, so that its colour is not all that tells it."""


@dataclass(frozen=True)
class Entry:
    """A run, and how it stood when its files were read."""

    run: Run
    experiment: str
    started: str
    status: Status


class Overview:
    """How all runs stand. Pages ask from several threads; each run is read once for all of them."""

    def __init__(self, runs: Callable[[], Collection[Run]]) -> None:
        self._runs, self._lock = runs, threading.Lock()
        self._known: dict[Path, tuple[object, float, Entry]] = {}

    def entries(self) -> list[Entry]:
        """All runs as they stand now, in the order of the listing."""
        with self._lock:
            folders = {run.folder: self._entry(run) for run in self._runs()}
            self._known = {folder: known for folder, known in self._known.items() if folder in folders}
            return list(folders.values())

    def _entry(self, run: Run) -> Entry:
        signature, now = written(run), time.time()
        before, when, entry = self._known.get(run.folder, (None, now, None))
        if entry is None or signature != before or entry.status.pid or entry.status.state == "running":
            entry = Entry(run, run.experiment, run.started, status(run))
            self._known[run.folder] = signature, now, entry
            return entry
        return replace(entry, status=replace(entry.status, age=entry.status.age + now - when))


def written(run: Run) -> object:
    """What changes whenever a run writes: the times and sizes of its files."""
    return tuple(stamp(path) for path in (run.config, run.metrics, run.environment, run.folder / "owner.json"))


def stamp(path: Path) -> tuple[int, int]:
    """When a file was last written, and how long it is; zeros where there is none."""
    try:
        seen = path.stat()
    except OSError:
        return 0, 0
    return seen.st_mtime_ns, seen.st_size


# What is shown of it


class RunTable(ui.element, component="runs.js"):
    """The table in the browser, which searches, sorts and selects by itself: new rows change only what is new in them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__()
        self.rows = self._props["rows"] = rows

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Show other rows in place of the ones before."""
        if rows != self.rows:
            self.rows = self._props["rows"] = rows
            self.update()


def row(entry: Entry) -> dict[str, Any]:
    """What the table shows of a run: texts, and beside them the numbers by which it sorts."""
    now, folder = entry.status, entry.run.folder
    return {
        "key": f"{quote(quote(folder.parent.name))}/{quote(quote(folder.name))}",
        "address": f"/run/{quote(folder.parent.name)}/{quote(folder.name)}",
        "name": folder.parent.name,
        "stamp": folder.name,
        "experiment": entry.experiment,
        "started": entry.started,
        "state": now.state,
        "icon": ICONS[now.state],
        "why": now.why,
        "progress": now.progress,
        "steps": steps(now),
        "metric": now.metric,
        "value": now.value if math.isfinite(now.value) else None,
        "figure": figure(now.value) if now.metric else "",
        "seconds": now.seconds,
        "duration": span(now.seconds),
        "age": now.age if math.isfinite(now.age) else None,
        "ago": since(now.age),
    }


def steps(now: Status) -> str:
    """How far a run has come: `4,000 of 16,000`."""
    return f"{now.step:,} of {now.steps:,}" if now.steps else f"{now.step:,}"


def figure(value: float) -> str:
    """A metric's value to four digits, and never as a power of ten where that is not needed."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def span(seconds: float) -> str:
    """A time by its two largest units: `1 h 03 min`; a dash where it is not known."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def since(seconds: float) -> str:
    """A time ago by its largest unit, `4 min ago`; a dash where it is not known."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return "just now"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"
