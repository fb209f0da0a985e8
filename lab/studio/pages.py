"""The Runs part of the studio: the table of all runs, the page of one, and several compared."""

from __future__ import annotations

import asyncio
import importlib.util
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from nicegui import app, background_tasks, ui
from starlette.responses import PlainTextResponse, Response

from lab import curves, status
from lab.config import UserError
from lab.runs import Run
from lab.status import Status
from lab.studio import control, gallery
from lab.studio.charts import Charts, label
from lab.studio.gallery import Gallery
from lab.studio.overview import ICONS, Overview, RunTable, row, since, span, steps
from lab.studio.shell import Studio, Tab, key, notice

TAB = Tab("Runs", "/", "table_rows", ())
STYLE = (Path(__file__).parent / "pages.css").read_text()
LOG_LINES = 500


def register(studio: Studio) -> None:
    """Add the table, the page of a run, the comparison, and what these load."""
    overview = Overview(studio.runs)

    async def read_ahead() -> None:
        background_tasks.create(asyncio.to_thread(overview.entries))

    app.on_startup(read_ahead)
    gallery.register(studio)
    register_report(studio)

    @studio.page("/", TAB)
    async def table() -> None:
        ui.add_css(STYLE)
        await show_table(studio, overview)

    @studio.page("/run/{name}/{stamp}", TAB)
    async def one(name: str, stamp: str) -> None:
        ui.add_css(STYLE)
        await RunPage(studio, studio.find(name, stamp)).build()

    @studio.page("/compare", TAB)
    async def compare(runs: str = "") -> None:
        ui.add_css(STYLE)
        await show_comparison([studio.find(*names(part)) for part in runs.split(",") if part])


def names(part: str) -> tuple[str, str]:
    """The two folder names in an address's `NAME/STAMP`."""
    name, _, stamp = part.partition("/")
    return unquote(name), unquote(stamp)


# All runs


async def show_table(studio: Studio, overview: Overview) -> None:
    """The table of all runs, which follows them; where there are none, how to make one."""

    def rows() -> list[dict[str, Any]]:
        return [row(entry) for entry in overview.entries()]

    found = await asyncio.to_thread(rows)
    empty = ui.column().classes("w-full")
    with empty:
        first_steps(studio)
    table = RunTable(found)

    async def follow() -> None:
        shown = await asyncio.to_thread(rows)
        empty.set_visibility(not shown)
        table.set_visibility(bool(shown))
        table.show(shown)

    empty.set_visibility(not found)
    table.set_visibility(bool(found))
    ui.timer(2.0, follow, immediate=False)


def first_steps(studio: Studio) -> None:
    """What to do where there is no run yet."""
    with ui.card().classes("w-full"):
        ui.label(f"There is no run below {studio.root} yet.").classes("text-lg")
        ui.label("Start one in a terminal, and it appears here as it begins:")
        for command in ("python scripts/train_vae.py --data.name digits", "python scripts/train_dqn.py configs/rl/dqn_catch.yaml"):
            with ui.row().classes("items-center no-wrap w-full"):
                ui.label(command).classes("run-command")
                copy_button(command)


def copy_button(text: str) -> ui.button:
    """A button that puts a text into the clipboard."""

    def copy() -> None:
        ui.clipboard.write(text)
        ui.notify("Copied.")

    return ui.button(icon="content_copy", on_click=copy).props('flat dense no-caps aria-label="Copy the command"')


# One run


class RunPage:
    """The page of a run: how it stands and what can be done with it, then its curves, pictures, settings and log."""

    def __init__(self, studio: Studio, run: Run) -> None:
        self.studio, self.run = studio, run
        self._builders = {
            "Curves": Charts([run]).build,
            "Media": Gallery(run).build,
            "Settings": self._settings,
            "Log": self._log,
        }
        self._panels: dict[str, ui.tab_panel] = {}
        self._stopping = False

    async def build(self) -> None:
        """Fill the page."""
        self._head()
        await self._refresh()
        tabs = ui.tabs().props('dense no-caps align="left" inline-label').classes("w-full")
        with tabs:
            for title in self._builders:
                ui.tab(title)
        with ui.tab_panels(tabs, value="Curves", animated=False, keep_alive=True).classes("w-full"):
            for title in self._builders:
                self._panels[title] = ui.tab_panel(title)
        tabs.on_value_change(lambda event: self._fill(event.value))
        await self._fill("Curves")
        ui.timer(1.0, self._refresh, immediate=False)

    async def _fill(self, title: str) -> None:
        """Make what a tab shows when it is first looked at."""
        builder = self._builders.pop(title, None)
        if builder is None:
            return
        with self._panels[title]:
            try:
                await builder()
            except (UserError, OSError, ValueError) as error:
                notice(str(error))

    # Its head

    def _head(self) -> None:
        with ui.card().classes("run-head w-full"):
            with ui.element("div").classes("run-line"):
                with ui.element("h1"):
                    ui.label(label(self.run))
                self._state = ui.element("span").props('role="status"')
                with self._state:
                    self._icon = ui.icon("help").props('aria-hidden="true"')
                    self._word = ui.label()
                ui.label(self.run.experiment).classes("studio-dim")
            with ui.element("div").classes("bar").props('role="progressbar" aria-label="Progress"') as bar:
                self._bar = bar
                self._done = ui.element("i")
            self._line = ui.label().classes("run-line studio-dim")
            self._why = ui.label().classes("state failed").style("white-space: normal; overflow-wrap: anywhere").props('role="alert"')
            self._buttons()
            with ui.row().classes("items-center w-full gap-1"):
                command = command_of(self.run)
                ui.label(command or "It is not known by which command it was started.").classes("run-command")
                if command:
                    copy_button(command)

    def _buttons(self) -> None:
        with ui.element("div").classes("run-tools"):
            self._stop = ui.button("Stop", icon="stop", on_click=self._ask_to_stop).props("no-caps unelevated color=negative")
            self._resume = ui.button("Resume", icon="play_arrow", on_click=self._go_on).props("no-caps unelevated")
            for tab in self.studio.tabs_of(self.run):
                link = f"{tab.path}/{key(self.run)}"
                ui.button(tab.title, icon=tab.icon, on_click=lambda link=link: ui.navigate.to(link)).props("no-caps outline")
            if importlib.util.find_spec("lab.report"):
                address = f"/report/{key(self.run)}"
                ui.button("Report", icon="description", on_click=lambda: ui.download.from_url(address)).props("no-caps outline")

    async def _refresh(self) -> None:
        """Bring the head up to date."""
        now, speed = await asyncio.to_thread(lambda: (status.status(self.run), rate(self.run)))
        self._stopping = self._stopping and now.state == "running"
        self._state.classes(replace=f"state {now.state}")
        self._icon.set_name(ICONS[now.state])
        self._word.set_text("stopping: it saves first" if self._stopping else now.state)
        self._done.style(f"width: {100 * now.progress:.2f}%")
        self._bar.props["aria-valuenow"] = round(100 * now.progress)
        self._line.set_text(told(now, speed))
        self._why.set_text(now.why)
        self._why.set_visibility(bool(now.why))
        self._stop.set_visibility(now.state == "running" and bool(now.pid))
        self._stop.set_enabled(not self._stopping)
        self._resume.set_visibility(now.state in ("stopped", "failed") and control.script_of(self.run) is not None)

    async def _ask_to_stop(self) -> None:
        try:
            await asyncio.to_thread(control.stop, self.run)
            self._stopping = True
        except UserError as error:
            ui.notify(str(error), type="warning")
        await self._refresh()

    async def _go_on(self) -> None:
        client, loop = ui.context.client, asyncio.get_running_loop()

        def failed(last: str) -> None:
            with client:
                ui.notify(f"It did not go on: {last}", type="negative", timeout=0, close_button="Close")

        def told_later(last: str) -> None:
            loop.call_soon_threadsafe(failed, last)

        try:
            await asyncio.to_thread(control.resume, self.run, told_later)
            ui.notify("Going on: it takes some seconds to start.")
        except UserError as error:
            ui.notify(str(error), type="warning")

    # What its tabs show

    async def _settings(self) -> None:
        show_settings([label(self.run)], [await asyncio.to_thread(curves.settings, self.run)])

    async def _log(self) -> None:
        empty = ui.label("Nothing was said on the way; warnings and errors would stand here.").classes("studio-dim")
        view, news = ui.log(max_lines=LOG_LINES).classes("log").props('tabindex="0" aria-label="Log"'), curves.Lines(self.run.log)

        async def follow() -> None:
            anew, lines = await asyncio.to_thread(news.news)
            if anew:
                view.clear()
            for line in deque(lines, LOG_LINES):
                view.push(line.decode(errors="replace").rstrip() or " ")
            empty.set_visibility(not view.default_slot.children)
            view.set_visibility(bool(view.default_slot.children))

        await follow()
        ui.timer(1.0, follow, immediate=False)


def command_of(run: Run) -> str:
    """The command that started a run; empty if it is not known."""
    try:
        lines = (run.folder / "command.txt").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[0] if lines else ""


def rate(run: Run) -> float:
    """The newest steps per second of a run; 0 if it is not known."""
    rows, _ = status.tail(run.timing)
    speed = rows[-1].get("steps_per_second") if rows else 0
    return float(speed) if isinstance(speed, (int, float)) else 0.0


def told(now: Status, speed: float) -> str:
    """How a run stands, in a line."""
    parts = [f"{steps(now)} steps", f"at work for {span(now.seconds)}"]
    if now.state == "running" and speed:
        parts += [f"{speed:,.4g} steps/s"] + ([f"{span((now.steps - now.step) / speed)} left"] if now.steps else [])
    elif now.state != "running":
        parts += [f"last sign {since(now.age)}"]
    return " · ".join(parts)


# Several runs


class SettingsTable(ui.element, component="settings.js"):
    """Settings of runs side by side, in the browser."""


def show_settings(titles: Sequence[str], configs: Sequence[dict[str, str]]) -> None:
    """The settings of runs (one config for each title), those that differ marked and, of several runs, alone until all are asked for."""
    differing = set(curves.differing(configs))
    keys = dict.fromkeys(name for config in configs for name in config)
    table = SettingsTable()
    table.props["names"] = list(titles)
    table.props["rows"] = [{"key": name, "values": [one.get(name, "–") for one in configs], "differs": name in differing} for name in keys]


async def show_comparison(runs: Sequence[Run]) -> None:
    """Curves of several runs over each other, and their settings side by side.

    Raises:
        UserError: none was named.
    """
    if not runs:
        raise UserError("Choose runs to compare: mark them in the table of runs, then press Compare.")
    ui.label(f"{len(runs)} runs compared").classes("text-lg")
    await Charts(runs).build()
    ui.label("Settings that differ").classes("curve-group").props('role="heading" aria-level="2"')
    titles, configs = [], []
    for run in runs:
        try:
            configs.append(await asyncio.to_thread(curves.settings, run))
            titles.append(label(run))
        except UserError as error:
            notice(str(error))
    show_settings(titles, configs)


# Its report


def register_report(studio: Studio) -> None:
    """Make the report of a run when it is asked for."""

    @app.get("/report/{name}/{stamp}")
    def made(name: str, stamp: str) -> Response:
        from lab import report

        try:
            page = report.html([studio.find(name, stamp)])
        except UserError as error:
            return PlainTextResponse(str(error), 404)
        return Response(page, media_type="text/html", headers={"content-disposition": 'attachment; filename="report.html"'})
