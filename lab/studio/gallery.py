"""Pictures and films of a run, as they appear in its media folder."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import app, ui
from starlette.responses import FileResponse, PlainTextResponse, Response

from lab.config import UserError
from lab.runs import Run
from lab.studio.overview import since, stamp
from lab.studio.shell import Studio, key

TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".mp4": "video/mp4", ".webm": "video/webm"}
"""What is shown; all else, SVG with its scripts above all, is not even served."""


@dataclass(frozen=True)
class Medium:
    """A picture or a film."""

    path: Path
    name: str
    """Without the step."""
    step: int | None
    """The step that it shows; None if it is not of one."""
    stamp: tuple[int, int]
    """Time and size: another one is another picture."""


def media(run: Run) -> list[Medium]:
    """The pictures and films of a run, the newest first; links, which may lead out of the folder, are left out."""
    try:
        paths = [path for path in run.media.iterdir() if path.suffix.lower() in TYPES and path.is_file() and not path.is_symlink()]
    except OSError:
        return []
    found = [Medium(path, *named(path.stem), stamp(path)) for path in paths if not path.name.startswith(".")]
    return sorted(found, key=lambda medium: (medium.stamp, medium.path.name), reverse=True)


def named(stem: str) -> tuple[str, int | None]:
    """The name and the step in a file's name: `samples_000002000` is `samples` at 2000."""
    match = re.fullmatch(r"(.*?)_(\d{6,})", stem, re.ASCII)
    return (match[1], int(match[2])) if match else (stem, None)


def by_name(found: list[Medium]) -> dict[str, list[Medium]]:
    """Media of the same name and kind together, in the order of their steps."""
    groups: dict[str, list[Medium]] = {}
    for medium in found:
        groups.setdefault(f"{medium.name}{medium.path.suffix if medium.step is None else ''}", []).append(medium)
    return {name: sorted(group, key=lambda medium: (medium.step or 0, medium.stamp)) for name, group in groups.items()}


def register(studio: Studio) -> None:
    """Serve the media of runs, each by the name that stands in its run's own listing."""

    @app.get("/media/{name}/{stamp}/{file}")
    def medium(name: str, stamp: str, file: str) -> Response:
        try:
            found = [one for one in media(studio.find(name, stamp)) if one.path.name == file]
        except UserError as error:
            return PlainTextResponse(str(error), 404)
        if not found:
            return PlainTextResponse("This run has no such picture or film.", 404)
        path = found[0].path
        return FileResponse(path, media_type=TYPES[path.suffix.lower()], headers={"cache-control": "no-cache"})


def address(run: Run, medium: Medium) -> str:
    """Where a browser finds a picture; another one after it was written anew."""
    return f"/media/{key(run)}/{quote(medium.path.name)}?{medium.stamp[0]}"


class Gallery:
    """The media of a run on a page: a card for each name, with a slider over the steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._groups: dict[str, list[Medium]] = {}
        self._cards: dict[str, _Card] = {}

    async def build(self) -> None:
        """Place what there is where the page stands."""
        self._told = ui.label("No pictures yet; they appear here as soon as the run draws one.").classes("studio-dim")
        self._place = ui.element("div").classes("media")
        await self.follow()
        ui.timer(2.0, self.follow, immediate=False)

    async def follow(self) -> None:
        """Add what has appeared since the last time."""
        groups = by_name(await asyncio.to_thread(media, self.run))
        self._told.set_visibility(not groups)
        if set(groups) != set(self._groups):
            self._place.clear()
            with self._place:
                self._cards = {name: _Card(self.run, name) for name in groups}
        for name, group in groups.items():
            self._cards[name].show(group)
        self._groups = groups


class _Card:
    """The pictures of one name."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self.group = run, name, list[Medium]()
        with ui.card():
            with ui.row().classes("w-full items-baseline justify-between no-wrap"):
                ui.label(name).classes("curve-title")
                self.told = ui.label().classes("studio-dim")
            self.place = ui.element("div").classes("w-full")
            self.slider = ui.slider(min=0, max=1, value=0, on_change=self._draw)
            self.slider.props["aria-label"] = f"Which {name}, from the first to the last"

    def show(self, group: list[Medium]) -> None:
        """Show these, the newest one unless somebody looks at an older one."""
        if group == self.group:
            return
        at_end = not self.group or self.slider.value >= len(self.group) - 1
        self.group = group
        self.slider.props["max"] = max(1, len(group) - 1)
        self.slider.set_visibility(len(group) > 1)
        if at_end and self.slider.value != len(group) - 1:
            self.slider.set_value(len(group) - 1)
        else:
            self._draw()

    def _draw(self, event: Any = None) -> None:
        medium = self.group[min(int(self.slider.value), len(self.group) - 1)]
        age = since(time.time() - medium.stamp[0] / 1e9)
        self.told.set_text(f"step {medium.step:,}" if medium.step is not None else age)
        self.place.clear()
        with self.place:
            if TYPES[medium.path.suffix.lower()].startswith("video"):
                film = ui.element("video").props('controls loop muted playsinline preload="metadata"')
                film.props["src"] = address(self.run, medium)
                film.props["aria-label"] = self.name
                return
            with ui.link(target=address(self.run, medium), new_tab=True):
                picture = ui.element("img").classes("pixels" if medium.step is not None else "")
                picture.props["src"] = address(self.run, medium)
                picture.props["alt"] = f"{self.name}, {self.told.text}"
