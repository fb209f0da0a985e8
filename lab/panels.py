"""Pictures of learning curves as SVG: where every line, mark and word stands; `report.html` draws them.

A panel is `WIDTH` x `HEIGHT` units large, scales with the page, and tells values without any script: narrow stripes over its
whole width show a box with the values there as long as somebody points at them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab import curves
from lab.curves import Floats

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 410, 10, 206
"""Edges of the field that curves are drawn in."""
DRAWN = 400
"""Points of a curve at most."""
HOVERS = 40
"""Places along the x-axis that tell their values."""


@dataclass(frozen=True)
class Curve:
    """A curve of a panel, in the units of its metric."""

    kind: str
    """What stands before the slash in its metric's name: train, eval, ..."""
    colour: int
    dashed: bool
    x: Floats
    y: Floats
    pale: tuple[Floats, Floats] | None = None
    """The same before it was smoothed."""
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True)
class Scale:
    """Where values stand on the picture, and the round ones that are marked."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, values: Floats) -> Floats:
        """Places of values."""
        return self.start + (values - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Places of round values, and the values."""
        raw = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(raw))
        step = power * next(times for times in (1, 2, 5, 10) if times * power >= raw * (1 - 1e-9))
        values: Floats = step * np.arange(math.ceil(self.low / step), math.floor(self.high / step) + 1, dtype=np.float64)
        return list(zip(self(values).tolist(), beside_axis(values, step)))


def beside_axis(values: Floats, step: float) -> list[str]:
    """Round values that lie `step` apart, with as many decimals as that needs: `2k`, `1.5M`, `0.25`, `2e-07`."""
    greatest = float(abs(values).max(initial=0))
    size, sign = next(((size, sign) for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if greatest >= size), (1.0, ""))
    decimals = max(0, -math.floor(math.log10(step / size) + 1e-9))
    if decimals > 5 or greatest >= 1e15:
        return [f"{value:.3g}" if value else "0" for value in values]
    return [f"{value / size:.{decimals}f}{sign}" if abs(value) > step / 2 else "0" for value in values]


def span(drawn: Sequence[Curve]) -> tuple[float, float]:
    """The values that a panel shows: all but the first, steep part of its curves and the rarest peaks before smoothing."""
    parts = []
    for curve in drawn:
        late = slice(len(curve.y) // 20, None)
        parts += [each[late] for each in (curve.y, curve.low, curve.high) if each is not None]
        if curve.pale and (kept := curve.pale[1][late][np.isfinite(curve.pale[1][late])]).size:
            parts.append(np.percentile(kept, [2, 98]))
    values = np.concatenate(parts)
    values = values[np.isfinite(values)].clip(-1e300, 1e300)  # so that their distance is finite too
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


class Panel:
    """The picture of a metric: what the template draws, in places of `WIDTH` x `HEIGHT`."""

    def __init__(self, name: str, axis: str, drawn: Sequence[Curve]) -> None:
        self.name, self.axis, self.drawn = name, axis, drawn
        ends = [float(end) for curve in drawn for end in (curve.x[0], curve.x[-1])]
        self.across = Scale(min(0.0, *ends), max(*ends, 1e-9), LEFT, RIGHT)
        self.up = Scale(*span(drawn), BOTTOM, TOP)
        self.begins_outside = any(curve.y[0] > self.up.high or curve.y[0] < self.up.low for curve in drawn)
        kinds = dict.fromkeys((one.kind, one.dashed) for one in drawn)
        self.parts = " · ".join(f"{'dashed' if dashed else 'solid'}: {kind}" if len(kinds) > 1 else kind for kind, dashed in kinds)

    def path(self, x: Floats, y: Floats) -> str:
        """A line as SVG, broken where a value is not finite."""
        x, y = curves.thin(x, y, DRAWN)
        words, pen = [], "M"
        for across, up in zip(self.across(x), np.clip(self.up(y), -1e4, 1e4)):
            words += [f"{pen}{across:.1f} {up:.1f}"] if math.isfinite(up) else []
            pen = "L" if math.isfinite(up) else "M"
        return "".join(words)

    def area(self, curve: Curve) -> str:
        """The band of a curve as SVG, or nothing."""
        if curve.low is None or curve.high is None:
            return ""
        below, above = self.path(curve.x, curve.low), self.path(curve.x[::-1], curve.high[::-1])
        return f"{below}L{above[1:]}Z"

    def dots(self, curve: Curve) -> list[tuple[float, float]]:
        """The points of a curve that has few."""
        places = zip(self.across(curve.x).tolist(), self.up(curve.y).tolist()) if len(curve.x) <= 20 else []
        return [(x, y) for x, y in places if TOP <= y <= BOTTOM]

    @property
    def hovers(self) -> Iterator[Hover]:
        """Places that tell the values there, next to each other over the whole width."""
        longest = max((curve.x for curve in self.drawn), key=len)
        chosen: Floats = np.unique(longest[np.linspace(0, len(longest) - 1, min(len(longest), HOVERS)).astype(int)])
        places = self.across(chosen)
        edges = [LEFT, *((places[1:] + places[:-1]) / 2).tolist(), RIGHT]
        for at, place, (left, right) in zip(chosen, places, itertools.pairwise(edges)):
            yield Hover(float(place), left, right - left, f"{self.axis} {number(float(at))}", list(self._values(at)))

    def _values(self, at: float) -> Iterator[tuple[Curve, float, str]]:
        """Each curve's newest value up to a place, and how high it stands."""
        for curve in self.drawn:
            index = int(np.searchsorted(curve.x, at, side="right")) - 1
            if index >= 0 and at <= curve.x[-1] and math.isfinite(curve.y[index]):
                y = float(self.up(curve.y[index : index + 1])[0])
                yield curve, min(max(y, TOP), BOTTOM), number(float(curve.y[index]))


@dataclass(frozen=True)
class Hover:
    """A place along the x-axis, and what is told of it."""

    place: float
    left: float
    width: float
    title: str
    values: Sequence[tuple[Curve, float, str]]

    @property
    def box(self) -> tuple[float, float, float]:
        """Left edge, width and height of the box that the values stand in: on the side where there is more room."""
        letters = max(len(self.title), *(len(text) + 3 for _, _, text in self.values), 0)
        width = 6.4 * letters + 14
        return (self.place - width - 8 if self.place > (LEFT + RIGHT) / 2 else self.place + 8), width, 15 * len(self.values) + 22


def number(value: Any) -> str:
    """A value as people read it: `14,000`, `0.2050`, `1e-05`; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.2f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
