"""Learning curves: what a run recorded as arrays, read as it grows, smoothed, thinned, and taken together over seeds.

read        every metric of a run, over steps, frames or time
Tail        the same of a run that goes on: reads only what was added
smooth      a moving average, as TensorBoard and Weights & Biases draw it
thin        as few points as a picture can show, with every peak
band        several seeds as one curve with its range
settings    of a run, by dotted keys; `seeds` groups runs by them, `differing` tells them apart
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.config import read_yaml
from lab.runs import Run

Floats = NDArray[np.float64]

STEP, TIME, FRAMES = "step", "time", "frames"
"""Axes: updates of the run (always there), seconds of training without the pauses between restarts, frames that an agent has seen."""

DECODER = json.JSONDecoder(parse_int=float)
"""Reads whole numbers as floats, which none is too large for."""


@dataclass(frozen=True)
class Series:
    """A metric of a run: its values (N,) and, over each axis that the run knows, where they stand (N,)."""

    values: Floats
    axes: Mapping[str, Floats]

    def over(self, axis: str) -> tuple[Floats, Floats]:
        """The points of the curve: x and y, as many as stand somewhere on the axis; none where the run does not know it."""
        x = self.axes.get(axis, np.full(len(self.values), np.nan))
        known = np.isfinite(x)
        return x[known], self.values[known]


def read(run: Run, keys: Iterable[str] | None = None) -> dict[str, Series]:
    """The metrics of a run by their names, all or those of `keys` that it has; none where nothing was recorded yet."""
    tail = Tail(run)
    tail.update()
    return tail.series(keys)


# Reading a file that grows


class Lines:
    """The whole lines of a file, each told once, as they are written; `rest` is what stands after the last one so far."""

    def __init__(self, path: Path) -> None:
        self.path, self.rest = path, b""
        self._offset, self._last = 0, b""

    def news(self) -> tuple[bool, list[bytes]]:
        """The lines since the last call; True before them if the file was cut back or rewritten, and they are all of it."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                anew = file.read(len(self._last)) != self._last
                if anew:
                    file.seek(0)
                text = file.read()
        except OSError:
            anew, text = self._offset > 0, b""
        if anew:
            self._offset, self._last = 0, b""
        whole = text[: text.rfind(b"\n") + 1]  # a line that is being written, or that a kill cut short, has no end
        self.rest, lines = text[len(whole) :], whole.splitlines(keepends=True)
        self._offset += len(whole)
        self._last = lines[-1] if lines else self._last
        return anew, lines


def decoded(lines: Sequence[bytes]) -> list[Any]:
    """The JSON values of lines, None for one that is none."""
    try:
        together = DECODER.decode("[" + ",".join(line.decode() for line in lines) + "]")  # twice as fast as one by one
        if len(together) == len(lines):
            return list(together)
    except (ValueError, RecursionError):
        pass
    return [_decoded(line) for line in lines]


def _decoded(line: bytes) -> Any:
    try:
        return DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None


@dataclass
class _Column:
    """The values of one key, and the rows that hold them."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))


class Tail:
    """What a run has recorded, followed while it goes on.

    Each `update` reads what was appended since the last one; where the file was cut back, as a resumed run does, all of it.

    Attributes:
        rows: how many there are.
        damaged: lines that are no row of metrics.
        media: by key and step the pictures and films that rows name, as paths within the run folder; nobody has checked them.
    """

    def __init__(self, run: Run) -> None:
        self._metrics, self._timing = Lines(run.metrics), Lines(run.timing)
        self._clock: dict[float, tuple[float, float]] = {}
        self._forget()

    def _forget(self) -> None:
        self.rows = self.damaged = 0
        self.media: dict[str, dict[int, str]] = {}
        self._columns: dict[str, _Column] = {}

    def update(self) -> bool:
        """Read what is new; returns whether anything was."""
        anew, lines = self._metrics.news()
        if anew:
            self._forget()
        for row in decoded(lines):
            self._take(row)
        again, entries = self._timing.news()
        if again:
            self._clock.clear()
        self._set_clock(decoded(entries))
        return bool(anew or lines or entries)

    def _take(self, row: Any) -> None:
        """Add a row, a value to each of its columns."""
        if not isinstance(row, dict) or not isinstance(row.get(STEP), float) or not math.isfinite(row[STEP]):
            self.damaged += 1
            return
        for key, value in row.items():
            if isinstance(value, float):
                column = self._columns.get(key) or self._columns.setdefault(key, _Column())
                column.rows.append(self.rows)
                column.values.append(value)
            elif isinstance(value, str):
                self.media.setdefault(key, {})[int(row[STEP])] = value
        self.rows += 1

    def _set_clock(self, entries: Sequence[Any]) -> None:
        """Note when steps were done, and how fast; of a step that was done again after a restart the later time."""
        for entry in entries:
            known = entry if isinstance(entry, dict) else {}
            step, time, speed = (known.get(key) for key in (STEP, TIME, "steps_per_second"))
            if isinstance(step, float) and isinstance(time, float) and isinstance(speed, float) and math.isfinite(step + time + speed):
                self._clock[step] = time, speed

    @property
    def keys(self) -> list[str]:
        """The names of all metrics; axes, which have no slash, are none."""
        return sorted(key for key in self._columns if "/" in key)

    @property
    def cut(self) -> bool:
        """Whether the last line has no end: it is being written, or whoever wrote it was killed."""
        return bool(self._metrics.rest)

    @property
    def seconds(self) -> float:
        """How long the run has trained, without pauses; NaN where that is not known."""
        return float(np.interp(self.last[STEP], *trained_seconds(self._clock))) if self.rows and self._clock else math.nan

    @property
    def last(self) -> dict[str, float]:
        """The newest value of every metric and axis."""
        return {key: column.values[-1] for key, column in self._columns.items()}

    def series(self, keys: Iterable[str] | None = None) -> dict[str, Series]:
        """The metrics by their names, all or those of `keys` that there are."""
        axes = {key: self._whole(column) for key, column in self._columns.items() if "/" not in key}
        if self._clock and STEP in axes:
            axes[TIME] = np.interp(axes[STEP], *trained_seconds(self._clock))
        wanted = self.keys if keys is None else [key for key in keys if key in self._columns]
        found = {key: self._columns[key] for key in wanted}
        return {key: Series(np.array(one.values), {axis: x[one.rows] for axis, x in axes.items()}) for key, one in found.items()}

    def _whole(self, column: _Column) -> Floats:
        """A column with a value for each row, NaN where it has none."""
        values = np.full(self.rows, np.nan)
        values[column.rows] = column.values
        return values


def trained_seconds(clock: Mapping[float, tuple[float, float]]) -> tuple[Floats, Floats]:
    """Steps in order, and how many seconds of training each took to reach.

    The clock on the wall tells it, but for the first row after a start: there it tells the pause too, and the speed since
    the start, which every row has, tells more.

    Args:
        clock: for each step when its row was written, seconds, and the steps per second until then, to three decimals.
    """
    steps = np.array(sorted(clock))
    times, speeds = np.array([clock[step] for step in steps]).T
    done = np.diff(steps, prepend=0.0)
    passed = np.diff(times, prepend=np.nan)
    estimated = done / np.maximum(speeds, 1e-9)
    longest = done / np.maximum(speeds - 0.0005, 1e-9) + 0.01
    seconds = np.where((passed >= 0) & (passed <= longest), passed, np.where(speeds > 0, estimated, 0.0))
    return steps, np.cumsum(seconds)


# What is drawn of it


def smooth(values: Floats, weight: float) -> Floats:
    """The moving average of values (N,) that weighs each `weight` times as much as the one after it, without a bias to zero.

    Values that are not finite stay as they are and count for nothing.

    Args:
        weight: 0, which changes nothing, to below 1.
    """
    if not 0 <= weight < 1:
        raise ValueError(f"weight: at least 0 and below 1, found {weight}")
    smoothed, total, share = np.array(values, dtype=np.float64), 0.0, 0.0
    for index in np.flatnonzero(np.isfinite(smoothed)):
        total = weight * total + (1 - weight) * smoothed[index]
        share = weight * share + (1 - weight)
        smoothed[index] = total / share
    return smoothed


def thin(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """At most `most` points of a curve: the first, the last, and of each of equal stretches between them the lowest and the highest.

    A stretch without a finite value keeps one of its points, so that the gap is seen.

    Args:
        most: at least 4.
    """
    if most < 4:
        raise ValueError(f"most: at least 4 points, found {most}")
    if len(x) <= most:
        return x, y
    edges = np.linspace(1, len(x) - 1, (most - 2) // 2 + 1).astype(int)
    low, high = np.where(np.isfinite(y), y, np.inf), np.where(np.isfinite(y), y, -np.inf)
    kept = {0, len(x) - 1}
    for start, end in itertools.pairwise(edges):
        kept |= {int(start + low[start:end].argmin()), int(start + high[start:end].argmax())}
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


@dataclass(frozen=True)
class Band:
    """Several curves as one: where all of them are, (N,), their mean, their least and their greatest value there."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def band(curves: Sequence[tuple[Floats, Floats]]) -> Band:
    """Take curves (x, y), one or more, together, at every x of any of them that lies within them all; between points they are straight.

    Points that are not finite are left out; so are curves without any.
    """
    finite = [(x[known], y[known]) for x, y in curves for known in [np.isfinite(x) & np.isfinite(y)] if known.any()]
    if not finite:
        return Band(*(np.empty(0) for _ in range(4)))
    start, end = max(x[0] for x, _ in finite), min(x[-1] for x, _ in finite)
    grid = np.unique(np.concatenate([x for x, _ in finite]))
    grid = grid[(start <= grid) & (grid <= end)]
    values = np.stack([np.interp(grid, x, y) for x, y in finite])
    return Band(grid, values.mean(0), values.min(0), values.max(0))


# Which runs belong together


def settings(run: Run) -> dict[str, str]:
    """Every setting of a run by its dotted key, as its config writes it, and `experiment`.

    Raises:
        ConfigError: the config is missing or damaged.
    """
    given, experiment = read_yaml(run.config)
    return {"experiment": experiment or ""} | {key: _text(value.text) for key, value in given.items()}


def _text(text: str | tuple[str, ...]) -> str:
    return text if isinstance(text, str) else f"[{', '.join(text)}]"


def seeds(configs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Groups of settings, as positions in `configs`, that differ in `trainer.seed` alone, or in what is tracked where (`tracking.`)."""
    groups: dict[frozenset[tuple[str, Any]], list[int]] = {}
    for index, config in enumerate(configs):
        rest = frozenset((key, value) for key, value in config.items() if key != "trainer.seed" and not key.startswith("tracking."))
        groups.setdefault(rest, []).append(index)
    return list(groups.values())


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all settings, or that some have not, in the order of the settings."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if any(key not in config or config[key] != configs[0].get(key) for config in configs)]
