"""The Watch page of the studio: an agent plays live, and people look over its shoulder or take over.

The page asks for a state when it has drawn the last one (rl/studio.js), so it never lags behind. Each page has a session of its own, in
which one thread plays; a second one finds the saliency and writes videos, and neither keeps the server from its other pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar
from urllib.parse import quote

from fastapi import HTTPException, Query
from fastapi.responses import FileResponse, Response
from nicegui import app, ui

from lab.config import UserError, read_yaml
from lab.runs import Run
from lab.status import status
from lab.studio.shell import Studio, Tab, key, notice

if TYPE_CHECKING:
    from rl.live import Excerpt, Session

T = TypeVar("T")

TAB = Tab("Watch", "/watch", "sports_esports", ("dqn", "pqn", "sb3"))
STYLE, SCRIPT = ((Path(__file__).parent / name).read_text() for name in ("studio.css", "studio.js"))

MOST = 6
"""Sessions at once; one more closes the oldest."""
IDLE = 60.0
"""Seconds after which a session that nobody asks for anything is closed."""
LEAP = 16
"""Actions that a page may ask for at once."""
GONE = "This game was closed: nobody looked at it for a minute, or several newer ones were opened. Load the page again to go on."


# Sessions


def worker(patient: bool = False) -> ThreadPoolExecutor:
    """One thread, of which torch takes one core; a `patient` one lets all others go first."""

    def begin() -> None:
        from rl.live import use_one_core

        use_one_core()
        if patient and sys.platform == "linux":  # where each thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)

    return ThreadPoolExecutor(1, initializer=begin)


@dataclass
class Visit:
    """A session and its threads: one plays, the other works aside."""

    session: Session
    playing: ThreadPoolExecutor
    aside: ThreadPoolExecutor = field(default_factory=partial(worker, patient=True))
    asked: float = field(default_factory=time.monotonic)
    """When somebody last asked for something."""

    async def do(self, work: Callable[[Session], T]) -> T:
        """Let the session do something, in its turn.

        Raises:
            UserError: it was closed.
        """
        self.asked = time.monotonic()
        return await in_turn(self.playing, lambda: work(self.session))

    async def do_aside(self, work: Callable[[], T]) -> T:
        """Work on something while the session plays."""
        return await in_turn(self.aside, work)

    def close(self) -> None:
        """Let go of everything, as soon as what is being done is done."""
        with contextlib.suppress(RuntimeError):  # closed before
            self.playing.submit(self.session.close)
        for thread in (self.playing, self.aside):
            thread.shutdown(wait=False)


async def in_turn(thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Wait for a piece of work in a thread; the server goes on meanwhile."""
    try:
        future = thread.submit(work)
    except RuntimeError:
        raise UserError(GONE) from None
    return await asyncio.wrap_future(future)


class Visits:
    """The sessions of all pages, by identities that nobody can guess."""

    def __init__(self) -> None:
        self.known: dict[str, Visit] = {}

    def enter(self, visit: Visit) -> str:
        """Keep a session, and close the oldest where there are too many."""
        while len(self.known) >= MOST:
            self.leave(next(iter(self.known)))
        identity = secrets.token_urlsafe(16)
        self.known[identity] = visit
        return identity

    def leave(self, identity: str) -> None:
        """Close a session, if it is still open."""
        if visit := self.known.pop(identity, None):
            visit.close()

    def tidy(self) -> None:
        """Close the sessions that nobody has asked for anything."""
        for identity, visit in list(self.known.items()):
            if time.monotonic() - visit.asked > IDLE:
                self.leave(identity)

    def find(self, identity: str) -> Visit:
        """A session, for a request.

        Raises:
            HTTPException: 410, it is closed.
        """
        if identity not in self.known:
            raise HTTPException(410, GONE)
        return self.known[identity]


async def opened(run_of: Run) -> Visit:
    """A session of a run; loading happens in its own thread.

    Raises:
        UserError: the run has no agent that can be loaded.
    """

    def load() -> Session:
        from rl.live import Session

        return Session(run_of)

    thread = worker()
    try:
        return Visit(await in_turn(thread, load), thread)
    except BaseException:
        thread.shutdown(wait=False)
        raise


# What pages ask for


def register(studio: Studio) -> None:
    """Add the pages, and what they ask for, to the studio."""
    visits = Visits()
    app.timer(IDLE / 4, visits.tidy)

    @studio.page(TAB.path, TAB)
    def choice() -> None:
        offer(studio.runs(TAB.experiments))

    @studio.page(TAB.path + "/{name}/{stamp}", TAB)
    async def watch(name: str, stamp: str) -> None:
        await show(studio.find(name, stamp), visits)

    @app.post("/watching/{identity}/next")
    async def next_moment(
        identity: str, actions: Annotated[int, Query(ge=0, le=LEAP)] = 1, hand: Annotated[int | None, Query(ge=0)] = None
    ) -> Response:
        with told():
            packet = await visits.find(identity).do(lambda session: session.advance(actions, hand))
            return binary(packet, {"Content-Encoding": "deflate"})

    @app.post("/watching/{identity}/leave", status_code=204)
    async def leave(identity: str) -> None:
        visits.leave(identity)

    @app.get("/watching/{identity}/saliency")
    async def saliency(identity: str) -> Response:
        from rl.live import glow

        visit = visits.find(identity)
        with told():
            agent, moment = await visit.do(lambda session: (session.agent, session.moment))
            return binary(await visit.do_aside(partial(glow, agent, moment)), {})

    @app.get("/watching/{name}/{stamp}/{file}")
    def video(name: str, stamp: str, file: str) -> FileResponse:
        with told():
            for path in studio.find(name, stamp).media.glob("watch_*.mp4"):
                if path.name == file:
                    return FileResponse(path)
        raise HTTPException(404, "There is no such video.")


def binary(content: bytes, headers: dict[str, str]) -> Response:
    """Bytes that no browser keeps."""
    return Response(content, headers={"Cache-Control": "no-store", **headers}, media_type="application/octet-stream")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A user's mistake becomes an answer of one sentence."""
    try:
        yield
    except UserError as error:
        raise HTTPException(410 if str(error) == GONE else 400, str(error)) from None


# Choosing


def offer(found: list[Run]) -> None:
    """A link to each run of an agent."""
    ui.add_css(STYLE)
    ui.label("Whom do you want to watch?").classes("text-h6")
    if not found:
        return notice("There is no agent yet. In half a minute there is one: python scripts/train_dqn.py configs/rl/dqn_catch.yaml")
    with ui.element("div").classes("watch-choice"):
        for one in found:
            now = status(one)
            with ui.link(target=f"{TAB.path}/{key(one)}").classes("watch-run"):
                ui.label(game_of(one)).classes("watch-run-game")
                ui.label(f"{one.folder.parent.name} / {one.folder.name}").classes("studio-dim")
                value = f" · {now.metric} {now.value:.4g}" if now.metric else ""
                ui.label(f"{now.state} · step {now.step:,} of {now.steps:,}{value}").classes("studio-dim")


def game_of(one: Run) -> str:
    """The game of a run as people write it, without loading anything."""
    try:
        given = read_yaml(one.config)[0].get("game.name")
    except UserError:
        given = None
    return str(given.text).replace("_", " ").title() if given else "?"


# Watching


async def show(one: Run, visits: Visits) -> None:
    """The page of an agent."""
    ui.add_css(STYLE)
    ui.add_body_html(f"<script>{SCRIPT}</script>")
    waiting = ui.label("Loading the agent …").classes("studio-dim")
    client = ui.context.client
    await client.connected()  # a game begins only when somebody is there to see it
    try:
        visit = await opened(one)
    finally:
        waiting.delete()
    identity = visits.enter(visit)
    client.on_delete(lambda: visits.leave(identity))
    if client.is_deleted:
        return visits.leave(identity)
    session = visit.session
    heading(one, session)
    with ui.element("div").classes("watch"):
        stage()
        thoughts()
        Settings(one, visit).show()
    setup = {"address": f"/watching/{identity}", "names": session.names, "pace": session.pace, "leap": LEAP}
    ui.run_javascript(f"watching.begin({json.dumps(setup)})")


def heading(one: Run, session: Session) -> None:
    """Who is at play."""
    from rl import play

    with ui.row().classes("watch-heading"):
        ui.label(play.game_title(session.game)).classes("text-h6")
        ui.label(f"{session.experiment.experiment.upper()} · {one.folder.parent.name} / {one.folder.name}").classes("studio-dim")


def pressed(icon: str, label: str, action: str) -> ui.button:
    """A button of the stage, which the page acts on by itself."""
    button = ui.button(icon=icon).props(f'flat round dense aria-label="{label}"').classes(f"watch-{action}")
    return button.on("click", js_handler=f"() => watching.{action}()").tooltip(label)


def stage() -> None:
    """The game and the buttons below it; the page fills it, by the classes."""
    with ui.element("section").classes("watch-stage").props('aria-label="The game"'):
        with ui.element("div").classes("watch-screen"):
            ui.element("canvas").classes("watch-game pixels").props('tabindex=0 role=img aria-label="Picture of the game"')
            ui.element("canvas").classes("watch-heat").props('aria-hidden="true"')
            ui.element("div").classes("watch-over").props("role=status")
        with ui.element("div").classes("watch-buttons"):
            pressed("pause", "Pause or go on (space)", "pause")
            pressed("skip_next", "One action (n)", "step")
            pressed("remove", "Slower (-)", "slower")
            ui.element("output").classes("watch-speed").props('aria-label="Speed"')
            pressed("add", "Faster (+)", "faster")
            ui.button("Take over", icon="pan_tool").props("flat no-caps").classes("watch-turns").on(
                "click", js_handler="() => watching.turns()"
            )
        ui.label("Space or P pauses, N takes one action, + and - change the speed, T takes over and hands back.").classes("studio-dim")
        ui.label("When you play: arrows or W A S D, and space to fire.").classes("studio-dim")


def thoughts() -> None:
    """What the agent makes of the game; the page fills it, by the classes."""
    with ui.element("section").classes("watch-thoughts").props('aria-label="What the agent thinks"'):
        ui.element("dl").classes("watch-numbers")
        ui.element("h2").classes("watch-meaning")
        ui.element("ul").classes("watch-values")
        ui.element("div").classes("watch-key studio-dim")
        ui.element("h2").classes("watch-worth")
        ui.element("canvas").classes("watch-plot").props('role=img aria-label="Value over the last actions"')
        ui.element("h2").classes("watch-seen")
        ui.element("div").classes("watch-frames")


@dataclass
class Settings:
    """What can be changed about a session, and the video of it."""

    run: Run
    visit: Visit

    def show(self) -> None:
        """The controls, each with its name."""
        session = self.visit.session
        with ui.element("section").classes("watch-settings").props('aria-label="Settings"'):
            self._checkpoint(session)
            self._play(session)
            ui.switch("Saliency: what the values hang on").on("update:model-value", js_handler="on => watching.saliency(on)")
            ui.label("").classes("watch-salient studio-dim")
            self.save = ui.button("Save the last minute", icon="movie", on_click=self._film).props("outline no-caps")
            self.videos = ui.column().classes("watch-videos")

    def _checkpoint(self, session: Session) -> None:
        """Chance at the left, then all that is kept of the training, by steps."""
        steps: list[int | None] = [None, *session.saved]
        names = ["random actions" if step is None else f"step {step:,}" for step in steps]
        with ui.element("div").classes("watch-field"):
            ui.label("Trained for")
            name = ui.label().classes("watch-amount")
        slider = ui.slider(min=0, max=len(steps) - 1, step=1, value=steps.index(session.step)).props('aria-label="Trained for"')
        name.bind_text_from(slider, "value", lambda place: names[round(place)])
        slider.on("change", lambda: self._do(lambda session: session.switch(steps[round(slider.value)])))

    def _play(self, session: Session) -> None:
        """Seed, policy, random actions and sticky ones."""
        with ui.element("div").classes("watch-field"):
            seed = ui.number("Seed", value=session.rules.seed, min=0, precision=0, format="%d").props("dense outlined")
            again = ui.button("Begin again", icon="replay").props("flat no-caps")
        for source, event in ((seed, "keydown.enter"), (again, "click")):
            source.on(event, lambda: self._do(lambda session: session.begin(seed=int(seed.value or 0))))
        policy = ui.select(list(session.policies), value=session.rules.policy, label="Policy").props("dense outlined")
        policy.on_value_change(lambda: self._do(lambda session: session.change(policy=policy.value)))
        self._share("Random actions (policy epsilon)", session.rules.epsilon, lambda value: lambda session: session.change(epsilon=value))
        self._share("Sticky actions (begins a new game)", session.rules.sticky, lambda value: lambda session: session.begin(sticky=value))

    def _share(self, title: str, value: float, change: Callable[[float], Callable[[Session], None]]) -> None:
        """A number from 0 to 1."""
        with ui.element("div").classes("watch-field"):
            ui.label(title)
            shown = ui.label().classes("watch-amount")
        slider = ui.slider(min=0, max=1, step=0.01, value=value).props(f'aria-label="{title}"')
        shown.bind_text_from(slider, "value", lambda share: f"{share:.2f}")
        slider.on("change", lambda: self._do(change(slider.value)))

    async def _do(self, work: Callable[[Session], None]) -> None:
        """Change the session, and let the page look at it."""
        try:
            await self.visit.do(work)
            ui.run_javascript("watching.look()")
        except UserError as error:
            ui.notify(str(error), type="warning")

    async def _film(self) -> None:
        """Write the video while the game goes on, then offer it."""
        self.save.props("loading")
        try:
            excerpt: Excerpt = await self.visit.do(lambda session: session.excerpt())
            path = await self.visit.do_aside(excerpt.write)
            with self.videos:
                ui.link(f"Video of {len(excerpt.packets):,} moments", f"/watching/{key(self.run)}/{quote(path.name)}", new_tab=True)
        except UserError as error:
            ui.notify(str(error), type="warning")
        finally:
            self.save.props(remove="loading")
