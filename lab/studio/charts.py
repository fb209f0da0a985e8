"""Learning curves on a page: a chart for each metric, of one run or of several, drawn anew as the runs go on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nicegui import ui

from lab.config import UserError
from lab.curves import FRAMES, STEP, TIME, Floats, Series, Tail, band, seeds, settings, smooth, thin
from lab.runs import Run
from lab.studio.shell import key

COLOURS = ("#4f7fd9", "#d9741a", "#2f9e6e", "#b455c9", "#d14b57", "#1b9fb5", "#9a8414", "#7f8695")
DASHES = ("solid", "dashed", "dotted")
"""Told apart by these too, where colours cannot be: after all colours come the next dashes."""
POINTS = 500
"""Most points of a line; a curve is at most two lines."""
FEW = 20
"""A curve of fewer points than these shows each of them, and is not smoothed."""
FIRST = ("train", "eval", "rollout")
"""Groups of metrics, in their order; others follow."""
UNITS = ((2 * 3600.0, "hours", 3600.0), (2 * 60.0, "minutes", 60.0), (0.0, "seconds", 1.0))
"""Of times on an axis that reaches so far: their name, and their seconds."""


@dataclass(frozen=True)
class View:
    """How curves are drawn."""

    axis: str = STEP
    """What they stand over."""
    smoothing: float = 0.6
    """How much of what came before counts, 0 to 0.99."""
    log: bool = False
    """Whether values stand on a logarithmic scale; those that are not above zero are then left out."""
    banded: bool = True
    """Whether runs that differ only in their seed are one curve with a band."""


@dataclass(frozen=True)
class Curve:
    """A metric of a run, or of several that differ only in their seed."""

    name: str
    style: int
    """The place of its colour and dashes; the same for all metrics."""
    members: tuple[Series, ...]


# Options of a chart


def options(curves: Sequence[Curve], view: View) -> dict[str, Any]:
    """What ECharts draws for a metric."""
    drawn = [(curve, [curve_over(series, view) for series in curve.members]) for curve in curves]
    unit, size = ("", 1.0) if view.axis != TIME else unit_of(max((x[-1] for _, lines in drawn for x, _ in lines if len(x)), default=0.0))
    lines = [line for curve, points in drawn for line in lines_of(curve, [(x / size, y) for x, y in points], view)]
    faint = {"lineStyle": {"color": "#8888884a"}}
    return {
        "animation": False,
        "grid": {"left": 8, "right": 18, "top": 12, "bottom": 24, "containLabel": True},
        "xAxis": {
            "type": "value",
            "name": unit or view.axis,
            "nameLocation": "middle",
            "nameGap": 24,
            "min": "dataMin",
            "max": "dataMax",
            "splitNumber": 4,
            "splitLine": {"show": False},
            "axisLabel": {"hideOverlap": True},
        },
        "yAxis": {"type": "log" if view.log else "value", "scale": True, "splitNumber": 4, "splitLine": faint},
        "tooltip": {"trigger": "axis", "confine": True, "className": "curve-tip", ":valueFormatter": "v => Number(v).toPrecision(5)"},
        "series": lines,
    }


def unit_of(longest: float) -> tuple[str, float]:
    """The unit in which times up to `longest` seconds are told, and its seconds."""
    return next((name, size) for least, name, size in UNITS if longest >= least)


def curve_over(series: Series, view: View) -> tuple[Floats, Floats]:
    """The points of a curve that can be drawn."""
    x, y = series.over(view.axis)
    return x, np.where(y > 0, y, np.nan) if view.log else y


def lines_of(curve: Curve, points: Sequence[tuple[Floats, Floats]], view: View) -> list[dict[str, Any]]:
    """A run's smoothed line over its pale raw one; of several seeds their mean over the range of all."""
    if len(points) > 1:
        return band_of(curve, [(x, smoothed(y, view)) for x, y in points])
    (x, y) = points[0]
    if not view.smoothing or len(y) < FEW:
        return [line(curve, x, y)]
    return [line(curve, x, y, pale=True), line(curve, x, smoothed(y, view))]


def smoothed(values: Floats, view: View) -> Floats:
    """Values as they are drawn: few, as those of tests are, stay what they are."""
    return smooth(values, view.smoothing) if len(values) >= FEW else values


def line(curve: Curve, x: Floats, y: Floats, pale: bool = False) -> dict[str, Any]:
    """A line of a chart, of no more points than can be seen."""
    x, y = thin(x, y, POINTS)
    colour, dashes = COLOURS[curve.style % len(COLOURS)], DASHES[curve.style // len(COLOURS) % len(DASHES)]
    return {
        "type": "line",
        "name": curve.name + (" (as recorded)" if pale else ""),
        "data": np.column_stack((x, y)).tolist(),
        "showSymbol": len(x) < FEW and not pale,
        "symbolSize": 5,
        "color": colour,
        "lineStyle": {"width": 1 if pale else 2, "opacity": 0.3 if pale else 1, "type": dashes},
        "emphasis": {"disabled": True},
        "z": 1 if pale else 3,
    }


def band_of(curve: Curve, points: Sequence[tuple[Floats, Floats]]) -> list[dict[str, Any]]:
    """The mean of several seeds, and between their least and greatest values an area, which is a line stacked upon a line."""
    whole = band(points)
    chosen = thin(np.arange(len(whole.x), dtype=np.float64), whole.mean, POINTS)[0].astype(int)
    x, mean, low, high = (values[chosen] for values in (whole.x, whole.mean, whole.low, whole.high))
    edge = line(curve, x, low) | {"stack": curve.name, "stackStrategy": "all", "showSymbol": False, "z": 1}
    edge |= {"lineStyle": {"width": 0}, "tooltip": {"show": False}, "name": f"{curve.name}, least"}
    area = edge | {"name": f"{curve.name}, range", "data": np.column_stack((x, high - low)).tolist(), "areaStyle": {"opacity": 0.2}}
    return [edge, area, line(curve, x, mean) | {"name": f"{curve.name}, mean of {len(points)}"}]


def ranked(metrics: Sequence[str]) -> dict[str, list[str]]:
    """Metrics by the group before their slash, the groups as people look at them, the loss first in each."""
    groups = sorted({name.partition("/")[0] for name in metrics}, key=lambda group: (_place(group), group))
    return {group: sorted((name for name in metrics if name.startswith(f"{group}/")), key=_importance) for group in groups}


def _place(group: str) -> int:
    return FIRST.index(group) if group in FIRST else len(FIRST)


def _importance(metric: str) -> tuple[int, str]:
    name = metric.partition("/")[2]
    return (0 if name == "loss" else 1 if name in ("score", "return", "accuracy") else 2), metric


# The charts of some runs


def grouped(runs: Sequence[Run], banded: bool) -> list[tuple[str, list[int]]]:
    """Curves to draw: their names, and the places of the runs in them; one for each run unless seeds are taken together."""
    if not banded:
        return [(label(run), [index]) for index, run in enumerate(runs)]
    known = [settings_or_none(run) or {"folder": str(run.folder)} for run in runs]
    return [
        (label(runs[group[0]]) if len(group) == 1 else f"{runs[group[0]].folder.parent.name}, {len(group)} seeds", group)
        for group in seeds(known)
    ]


def settings_or_none(run: Run) -> Mapping[str, str] | None:
    """The settings of a run, None where its config is damaged."""
    try:
        return settings(run)
    except (UserError, OSError, ValueError):
        return None


def label(run: Run) -> str:
    """A run's name in a legend."""
    return f"{run.folder.parent.name}/{run.folder.name}"


class Charts:
    """The charts of one run or of several, with the tools to look at them, and with what is told of damaged lines."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, self.view = runs, View()
        self._tails = [Tail(run) for run in runs]
        self._charts: dict[str, ui.echart] = {}
        self._drawn: dict[str, tuple[object, ...]] = {}
        self._axes: set[str] = {STEP}
        self._groups: list[tuple[str, list[int]]] = []
        self._turn = asyncio.Lock()  # of the clock and of whoever moves a slider

    async def build(self) -> None:
        """Place tools and charts where the page stands."""
        await asyncio.to_thread(self._read)
        self._tools()
        self._told = ui.label().classes("studio-dim")
        if len(self.runs) > 1:
            self._legend = ui.element("div").classes("legend")
        self._place = ui.column().classes("w-full gap-2")
        await self._draw()
        ui.timer(1.5, self.follow, immediate=False)

    async def follow(self) -> None:
        """Draw what was recorded since the last time."""
        async with self._turn:
            if await asyncio.to_thread(self._read):
                await self._draw()

    def _read(self) -> bool:
        changed = [tail.update() for tail in self._tails]  # all of them, not only until one has
        return any(changed)

    def _tools(self) -> None:
        with ui.element("div").classes("curve-tools"):
            with ui.row().classes("items-center gap-3"):
                ui.label("Smoothing").props('aria-hidden="true"')
                slider = ui.slider(min=0, max=0.99, step=0.01, value=self.view.smoothing).props('label aria-label="Smoothing"')
                slider.on_value_change(lambda event: self._look(smoothing=event.value))
            self._axis = ui.toggle([STEP], value=STEP, on_change=lambda event: self._look(axis=event.value))
            self._axis.props('no-caps dense unelevated padding="4px 10px" aria-label="What the curves stand over"')
            ui.switch("log scale", on_change=lambda event: self._look(log=event.value))
            if len(self.runs) > 1:
                ui.switch("seeds as a band", value=True, on_change=lambda event: self._look(banded=event.value))

    async def _look(self, **changes: Any) -> None:
        self.view = replace(self.view, **changes)
        async with self._turn:
            await self._draw()

    async def _draw(self) -> None:
        """Bring every chart up to date; those in which nothing changed are left alone."""
        groups, found = await asyncio.to_thread(self._changed)
        damaged = sum(tail.damaged for tail in self._tails)
        told = f"{damaged} damaged lines of metrics are left out." if damaged else ""
        names = {name for tail in self._tails for name in tail.keys}
        self._told.set_text(told if names else "Nothing is recorded yet; curves appear here as soon as something is.")
        self._told.set_visibility(bool(self._told.text))
        self._offer_axes()
        if names != set(self._charts):
            self._lay_out(sorted(names))
        self._show_legend(groups)
        for name, wanted in found.items():
            chart = self._charts[name]
            chart.options.clear()
            chart.options.update(wanted)
            chart.update()

    def _changed(self) -> tuple[list[tuple[str, list[int]]], dict[str, dict[str, Any]]]:
        """The curves, and the options of the charts that must be drawn anew."""
        groups = grouped(self.runs, self.view.banded)
        all_series = [tail.series() for tail in self._tails]
        found = {}
        for name in {name for series in all_series for name in series}:
            have = [series.get(name) for series in all_series]
            signature = (self.view, *(one is not None and (len(one.values), *one.values[-1:]) for one in have))
            if self._drawn.get(name) != signature:
                self._drawn[name] = signature
                curves = [Curve(title, style, tuple(one for i in group if (one := have[i]))) for style, (title, group) in enumerate(groups)]
                found[name] = options([curve for curve in curves if curve.members], self.view)
        self._axes = {axis for series in all_series for one in series.values() for axis in one.axes} | {STEP}
        return groups, found

    def _offer_axes(self) -> None:
        offered = [axis for axis in (STEP, FRAMES, TIME) if axis in self._axes]
        if offered != self._axis.options:
            self._axis.set_options(offered, value=self.view.axis)

    def _lay_out(self, names: Sequence[str]) -> None:
        """A chart for each metric, below the name of its group."""
        self._place.clear()
        before, self._charts = self._charts, {}
        with self._place:
            for group, metrics in ranked(names).items():
                ui.label(group).classes("curve-group").props('role="heading" aria-level="2"')
                with ui.element("div").classes("curve-grid"):
                    for name in metrics:
                        with ui.element("figure").classes("curve").props(f'data-metric="{len(self._charts)}"') as figure:
                            figure.props["aria-label"] = f"Curve of {name}"
                            ui.label(name).classes("curve-title")
                            self._charts[name] = ui.echart(before[name].options if name in before else {}, renderer="svg")

    def _show_legend(self, groups: list[tuple[str, list[int]]]) -> None:
        if len(self.runs) < 2 or groups == self._groups:
            return
        self._groups = list(groups)
        self._legend.clear()
        with self._legend:
            for style, (title, group) in enumerate(groups):
                with ui.link(target=f"/run/{key(self.runs[group[0]])}"):
                    dashes = DASHES[style // len(COLOURS) % len(DASHES)]
                    ui.element("i").style(f"border-color: {COLOURS[style % len(COLOURS)]}; border-top-style: {dashes}")
                    ui.label(title)
