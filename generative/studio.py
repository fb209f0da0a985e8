"""The studio's Sample part: what a trained model draws, under its sliders, and what it makes of what you draw.

Here are the list of runs and the page of one, with its settings; `generative/panes.py` has what is seen beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nicegui import app, run, ui
from starlette.responses import FileResponse, Response

from generative.panes import PANES, Pane, complain, slider
from lab import runs
from lab.config import UserError
from lab.runs import Run
from lab.status import status
from lab.studio.shell import Studio, Tab, key, notice

if TYPE_CHECKING:
    from torch import Tensor

    from generative.easel import Drawing, Easel, Judge, Wish
    from lab.data import ImageSet

GENERATORS = ("autoencoder", "vae", "vqvae", "tokens", "gan", "superresolution", "flow", "diffusion", "distillation")
"""`FAMILIES` of generative/model.py, which is not imported here: torch would hold up the first page."""
TAB = Tab("Sample", "/sample", "brush", (*GENERATORS, "classifier"))
STYLE, SCRIPT = ((Path(__file__).parent / f"studio.{kind}").read_text() for kind in ("css", "js"))
COUNTS = (4, 9, 16, 36, 64)
ALL = "all in turn"


def register(studio: Studio) -> None:
    """Add the pages to the studio."""

    @studio.page(TAB.path, TAB)
    def overview() -> None:
        ui.add_css(STYLE)
        listed(studio)

    @studio.page(TAB.path + "/{name}/{stamp}", TAB)
    async def of_run(name: str, stamp: str) -> None:
        ui.add_css(STYLE)
        ui.add_body_html(f"<script>{SCRIPT}</script>")
        found = studio.find(name, stamp)
        if found.experiment not in TAB.experiments:
            raise UserError(f"{name}/{stamp} is a run of '{found.experiment}', which makes and judges no images")
        await Page(studio, found).open()

    @app.get("/sample-picture/{name}/{stamp}")
    def picture(name: str, stamp: str) -> Response:
        try:
            found = preview(studio.find(name, stamp))
        except UserError as error:
            return Response(str(error), 404)
        return FileResponse(found) if found else Response("no picture yet", 404)


# All runs


def listed(studio: Studio) -> None:
    """The runs to choose from, the one last started first."""
    found = studio.runs(TAB.experiments)
    if not found:
        notice(f"There is no generative model below {studio.root} yet: python scripts/train_vae.py configs/generative/vae_mnist.yaml")
        return
    cards: list[tuple[str, ui.link]] = []

    def search(text: str) -> None:
        for told, card in cards:
            card.set_visibility(text.lower() in told)

    ui.input("Search", on_change=lambda event: search(event.value or "")).props("dense outlined clearable").classes("sample-search")
    with ui.element("div").classes("sample-cards"):
        for one in found:
            cards.append((f"{one.folder.parent.name} {one.folder.name} {one.experiment}".lower(), card_of(one)))


def card_of(one: Run) -> ui.link:
    """A run as a link with a picture of it."""
    now = status(one)
    with ui.link(target=f"{TAB.path}/{key(one)}").classes("sample-card") as card:
        with ui.element("div").classes("sample-thumb"):
            if preview(one):
                ui.element("img").props(f'src="/sample-picture/{key(one)}" alt="" loading="lazy"')
            else:
                ui.icon("image", size="2rem").classes("studio-dim").props('aria-hidden="true"')
        with ui.element("div"):
            ui.label(one.folder.parent.name).classes("sample-title")
            ui.label(f"{one.experiment}, {now.state}, step {now.step:,}")
            ui.label(one.folder.name).classes("studio-dim")
    return card


def preview(one: Run) -> Path | None:
    """The newest picture that training left of what the model makes, or of what it gets wrong."""
    found = sorted(one.media.glob("*_[0-9]*.png"))
    return next((path for path in reversed(found) if path.name.startswith(("samples_", "enlarged_", "mistakes_"))), None)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.partition("_")[2])


# One run


class Page:
    """The page of a run in one browser: what is set, what is picked, and the panes that show it."""

    def __init__(self, studio: Studio, found: Run) -> None:
        self.studio, self.run = studio, found
        self.easel: Easel | None = None
        self.shape: tuple[int, int, int] = (1, 28, 28)
        self.classes: tuple[str, ...] = ()
        self.data_config: Any = None
        self.moments: list[Path] = []
        self.moment: Path | None = None
        self.judges: list[Judge] = []
        self.judge: Judge | None = None
        self.values: dict[str, Any] = {"seed": 0, "count": 16, "labels": "", "how": {}}
        self.samples: Tensor | None = None
        self.picks = (0, 1)
        self.subject: Tensor | None = None
        self.subject_name = ""
        self.drawing: Drawing | None = None
        self.panes: list[Pane] = []
        self.shown: Pane | None = None
        self.at_work = 0

    async def open(self) -> None:
        """Show that the run is being read, read it, and fill the page."""
        self._head()
        with ui.row().classes("items-center") as waiting:
            ui.spinner(size="md")
            ui.label("The model is being read …")
        with ui.element("div").classes("w-full") as body:
            pass
        await ui.context.client.connected()
        try:
            await run.io_bound(self._read)
        finally:
            waiting.delete()
        with body:
            await self._fill()

    @property
    def wish(self) -> Wish:
        """What is to be drawn, as the panel has it."""
        from generative.easel import Wish
        from generative.model import SamplingConfig

        how = SamplingConfig(**self.values["how"])
        return Wish(self.values["seed"], self.values["count"], self.values["labels"], how)

    @property
    def source(self) -> Path:
        """What a command line names to draw from the same weights."""
        return self.run.folder if self.moment is None or self.moment == self.moments[-1] else self.moment

    def images(self) -> ImageSet:
        """The set of the run; to be called in a thread."""
        from generative.easel import images_of

        return images_of(self.data_config)

    # Reading

    def _read(self) -> None:
        from generative import easel
        from lab import classifier, loading

        if self.run.experiment == "classifier":
            loaded: Any = classifier.load(str(self.run.folder))
        else:
            self.easel = easel.opened(self.run)
            loaded = self.easel.loaded
            self.moments = list(loading.moments(self.run).values())
            self.moment = next((path for path in self.moments if step_of(path) == loaded.step), None)
        self.shape, self.classes, self.data_config = loaded.model.shape, loaded.model.classes, loaded.experiment.data
        found = easel.judges(self.shape, self.classes, self.data_config.name, runs.listing(self.studio.root, ["classifier"]))
        self.judges = sorted(found, key=lambda judge: judge.path != self.run.folder)
        self.judge = self.judges[0] if self.judges else None

    # Building

    def _head(self) -> None:
        with ui.element("div").classes("sample-head"):
            with ui.element("h1"):
                ui.label(self.run.folder.parent.name)
            ui.label(f"{self.run.experiment} · {self.run.folder.name}").classes("studio-dim")
            ui.link("curves and settings", f"/run/{key(self.run)}").classes("studio-dim")

    async def _fill(self) -> None:
        self.panes = [pane for kind in PANES if (pane := kind(self)).fits()]
        with ui.element("div").classes("sample"):
            self._panel()
            with ui.element("section").classes("sample-main"):
                self._tabs()
        ui.context.client.on_disconnect(self.leave)
        await self.show(self.panes[0].title)

    def _tabs(self) -> None:
        with ui.tabs(on_change=lambda event: self.show(event.value)).props("dense no-caps inline-label align=left outside-arrows") as tabs:
            for pane in self.panes:
                ui.tab(pane.title, icon=pane.icon)
        tabs.set_value(self.panes[0].title)
        self.bar = ui.element("div").classes("sample-busy").props('role="status"')
        for pane in self.panes:
            with ui.element("div").classes("sample-pane").props(f'role="tabpanel" aria-label="{pane.title}"') as pane.box:
                pane.build()
            pane.box.set_visibility(False)

    def leave(self) -> None:
        """Give up all work: nobody looks any more."""
        for pane in self.panes:
            for worker in pane.workers:
                worker.drop()

    def busy(self, change: int) -> None:
        """One piece of work more or less is being done."""
        self.at_work += change
        (self.bar.classes(add="on") if self.at_work else self.bar.classes(remove="on"))
        self.bar.props('aria-label="drawing"' if self.at_work else 'aria-label="done"')

    async def show(self, title: str) -> None:
        """Bring a pane to the front."""
        self.shown = next(pane for pane in self.panes if pane.title == title)
        for pane in self.panes:
            pane.box.set_visibility(pane is self.shown)
        await self.changed()

    async def changed(self) -> None:
        """Something was set or picked: draw the shown pane anew if that matters to it, and the samples where one of them is looked at."""
        if self.subject_name.startswith("sample "):
            await self.panes[0].update()
        if self.shown:
            await self.shown.update()

    # The panel

    def _panel(self) -> None:
        with ui.element("aside").classes("sample-panel").props('aria-label="Settings"'):
            with ui.element("h2"):
                ui.label("Settings")
            if len(self.moments) > 1:
                self._moments()
            if self.easel and self.easel.model.latent:
                self._noise()
                self._knobs(self.easel)
            if self.judges:
                titles = {judge: judge.title for judge in self.judges}
                ui.select(titles, value=self.judge, label="Classifier", on_change=lambda event: self.set_judge(event.value)).props(
                    "dense outlined options-dense"
                )

    def _moments(self) -> None:
        steps = [step_of(path) for path in self.moments]
        place = self.moments.index(self.moment) if self.moment in self.moments else len(steps) - 1
        slider(
            "Checkpoint",
            0,
            len(steps) - 1,
            1,
            place,
            lambda value: f"step {steps[int(value)]:,}",
            lambda value: self.set_moment(int(value)),
        )

    def _noise(self) -> None:
        with ui.row().classes("no-wrap w-full gap-2"):
            ui.number(
                "Seed", value=0, min=0, max=2**31 - 1, precision=0, on_change=lambda event: self.set(seed=int(event.value or 0))
            ).props('dense outlined debounce="200"').classes("flex-1")
            ui.select(list(COUNTS), value=16, label="Pictures", on_change=lambda event: self.set_count(event.value)).props(
                "dense outlined options-dense"
            ).classes("w-28")
        assert self.easel
        if self.easel.model.conditional:
            ui.select(
                [ALL, *self.classes],
                value=ALL,
                label="Class",
                on_change=lambda event: self.set(labels="" if event.value == ALL else event.value),
            ).props("dense outlined options-dense")

    def _knobs(self, easel: Easel) -> None:
        if easel.samplers:
            names = ["auto", *easel.samplers]
            chosen = ui.select(names, value="auto", label="Sampler", on_change=lambda event: self.set_how("sampler", event.value, "auto"))
            chosen.props("dense outlined options-dense")
        if (steps := easel.knob("steps")) is not None:
            self._knob("steps", "Steps", 1, max(100, int(steps)), 1, steps)
        if (guidance := easel.knob("guidance")) is not None:
            self._knob("guidance", "Guidance", 0.25, 8, 0.25, guidance)
        if (temperature := easel.knob("temperature")) is not None:
            self._knob("temperature", "Temperature", 0.05, 1.5, 0.05, temperature)
        if easel.knob("top_k") is not None:
            every = easel.codes
            slider("Top k", 1, every, 1, every, lambda value: "all" if value == every else f"{value:.0f}",
                   lambda value: self.set_how("top_k", int(value), every))  # fmt: skip

    def _knob(self, name: str, title: str, least: float, most: float, step: float, own: float) -> None:
        kind: Callable[[float], float] = int if step == 1 else lambda value: round(float(value), 4)
        slider(title, least, most, step, own, lambda value: f"{value:g}", lambda value: self.set_how(name, kind(value), kind(own)))

    async def set(self, **values: Any) -> None:
        """Change what is to be drawn."""
        self.values |= values
        await self.changed()

    async def set_count(self, count: int) -> None:
        """Draw so many pictures; what was picked beyond them is no longer."""
        self.picks = (min(self.picks[0], count - 1), min(self.picks[1], count - 1))
        await self.set(count=count)

    async def set_how(self, name: str, value: Any, own: Any) -> None:
        """Change a setting of the sampler; the model's own value is left out."""
        rest = {other: known for other, known in self.values["how"].items() if other != name}
        await self.set(how=rest if value == own else rest | {name: value})

    async def set_judge(self, judge: Judge) -> None:
        """Ask another classifier."""
        self.judge = judge
        await self.changed()

    async def set_moment(self, place: int) -> None:
        """Take the weights of another moment of training."""
        from generative.easel import opened

        moment = self.moments[place]
        try:
            found = await run.io_bound(opened, self.run, moment)
        except UserError as error:
            complain(error)
            return
        self.easel, self.moment = found, moment
        await self.changed()

    async def pick(self, index: int) -> None:
        """Pick a sample: it is what other panes look at, and the way between two goes from the one before to it."""
        if self.samples is not None and index < len(self.samples):
            if index != self.picks[1]:
                self.picks = (self.picks[1], index)
            self.look_at(self.samples[index], f"sample {index}")
            await self.changed()

    def look_at(self, image: Tensor, name: str) -> None:
        """Make an image the one that is compared, judged and explained."""
        self.subject, self.subject_name = image, name
