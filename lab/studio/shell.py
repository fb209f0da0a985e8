"""What all pages of the studio share: the frame around them, the runs they may name, and the server."""

from __future__ import annotations

import functools
import inspect
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import app, ui

from lab import runs
from lab.config import UserError
from lab.recorder import log
from lab.runs import Run
from lab.studio.guard import LOOPBACK, Guard, is_loopback

STYLE = (Path(__file__).parent / "studio.css").read_text()
SCRIPT = (Path(__file__).parent / "studio.js").read_text()


@dataclass(frozen=True)
class Tab:
    """A part of the studio, as its header names it."""

    title: str
    path: str
    """Where it begins; the page of a run is below it, at `path/NAME/STAMP`."""
    icon: str
    """A name of Google's Material icons, which come with NiceGUI."""
    experiments: Collection[str]
    """The kinds of runs that it shows."""


@dataclass(frozen=True)
class Studio:
    """The runs below a folder, and the parts in which they are shown."""

    root: Path
    tabs: tuple[Tab, ...]

    def runs(self, experiments: Collection[str] | None = None) -> list[Run]:
        """The runs, the one last started first."""
        return runs.listing(self.root, experiments)

    def find(self, name: str, stamp: str) -> Run:
        """The run of that name, taken from the listing: no path that a browser sends ever reaches the disk.

        Raises:
            UserError: there is none.
        """
        for path in self.root.glob("*/*/config.yaml"):
            if (path.parent.parent.name, path.parent.name) == (name, stamp):
                return Run(path.parent)
        raise UserError(f"no run {name}/{stamp} below {self.root}; it may have been moved or deleted")

    # Pages

    def page(self, path: str, tab: Tab) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a page: a function, plain or async, that fills it. What goes wrong in it is told on the page, in a sentence."""

        def register(build: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(build)
            async def shown(**parts: str) -> None:
                with self.frame(tab):
                    try:
                        filled = build(**parts)
                        if inspect.isawaitable(filled):
                            await filled
                    except UserError as error:
                        notice(str(error))
                    except Exception as error:  # a damaged run must not take the page down
                        log.exception("%s could not be shown", path)
                        notice(f"This cannot be shown: {type(error).__name__}: {error}")

            return ui.page(path, title=f"{tab.title} · Dreamplay", response_timeout=60)(shown)

        return register

    @contextmanager
    def frame(self, tab: Tab) -> Iterator[None]:
        """The header and the column that a page fills."""
        ui.add_css(STYLE)
        ui.add_body_html(f"<script>{SCRIPT}</script>")
        ui.colors(primary="#3d5a98", secondary="#cd6914", accent="#cd6914")
        ui.dark_mode(None)
        with ui.header().classes("studio-header"):
            ui.link("Dreamplay", "/").classes("studio-name")
            with ui.element("nav").props('aria-label="Parts of the studio"'):
                for part in self.tabs:
                    link = ui.link(target=part.path).classes("studio-tab")
                    link.props('aria-current="page"' if part == tab else "")
                    with link:
                        ui.icon(part.icon).props('aria-hidden="true"')
                        ui.label(part.title)
            ui.button(icon="contrast", on_click=lambda: ui.run_javascript("studioTurn()")).props(
                'flat round dense color=white aria-label="Light or dark"'
            ).classes("studio-turn")
        with ui.column().classes("studio-page"):
            yield

    def tabs_of(self, run: Run) -> list[Tab]:
        """The parts that show a run."""
        return [tab for tab in self.tabs if run.experiment in tab.experiments]

    # Serving

    def serve(self, host: str, port: int, token: str, browser: bool) -> None:
        """Listen until Ctrl-C.

        Raises:
            UserError: others would reach it without a token, or the port is taken.
        """
        if not is_loopback(host) and len(token) < 8:
            raise UserError(f"--host {host} lets other machines in: give a secret of 8 or more characters by --token as well")
        check_port(host, port)
        app.add_middleware(Guard, hosts=LOOPBACK if is_loopback(host) else (), token=token)
        name = "localhost" if is_loopback(host) else socket.gethostname() if host in ("0.0.0.0", "::") else host
        address = f"http://{name}:{port}/{f'?token={quote(token)}' if token else ''}"
        app.on_startup(lambda: print(f"studio: {address}", flush=True))  # noqa: T201
        ui.run(
            host=host,
            port=port,
            title="Dreamplay",
            favicon=Path(__file__).parent / "favicon.svg",
            dark=None,
            reload=False,
            show=browser,
            show_welcome_message=False,
            reconnect_timeout=30,
            gzip_middleware_factory=None,  # packing takes longer than the way within this machine
        )


def check_port(host: str, port: int) -> None:
    """Make sure that nobody listens there.

    Raises:
        UserError: somebody does, or this machine cannot listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"the studio cannot listen at {host}:{port} ({error}); give another place by --port or --host") from None


def notice(text: str) -> None:
    """A sentence that says what is not as it should be."""
    with ui.card().classes("studio-notice").props('role="alert"'):
        ui.label(text)


def key(run: Run) -> str:
    """How addresses name a run: its two folders."""
    return f"{quote(run.folder.parent.name)}/{quote(run.folder.name)}"
