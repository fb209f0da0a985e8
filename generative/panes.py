"""The panes of the studio's Sample page: each one way to look at a model.

A pane says what it `depends` on, and draws anew when that is no longer what it shows. The work is done by `generative/easel.py`, in a
thread; the newest wish makes an older one give up (`Latest`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from nicegui import run, ui

from lab.config import UserError
from lab.recorder import log

if TYPE_CHECKING:
    from torch import Tensor

    from generative.easel import Drawing, Easel, Eyes, Neighbour, Wanted, Wish
    from generative.studio import Page

R = TypeVar("R")

# Work


class Latest:
    """Work in a thread, one after another: a newer one makes the one at work give up, and of those that wait the last is done."""

    def __init__(self, busy: Callable[[int], None]) -> None:
        self._busy, self._number = busy, 0
        self.at_work = False
        self._next: tuple[Callable[[Wanted], Any], Callable[[Any], Any]] | None = None

    async def do(self, work: Callable[[Wanted], R], show: Callable[[R], Awaitable[None] | None]) -> None:
        """Do this next, and show what comes of it unless something newer was asked for meanwhile."""
        self._number, self._next = self._number + 1, (work, show)
        if self.at_work:
            return
        self.at_work = True
        self._busy(1)
        try:
            while self._next:
                await self._one(*self._taken())
        finally:
            self.at_work = False
            self._busy(-1)

    def drop(self) -> None:
        """Give up what is at work: the page was closed."""
        self._number, self._next = self._number + 1, None

    def _taken(self) -> tuple[Callable[[Wanted], Any], Callable[[Any], Any], int]:
        assert self._next
        work, show = self._next
        self._next = None
        return work, show, self._number

    async def _one(self, work: Callable[[Wanted], Any], show: Callable[[Any], Any], number: int) -> None:
        from generative.easel import Dropped

        try:
            done = await run.io_bound(work, lambda: number == self._number)
        except Dropped:
            return
        except Exception as error:  # what a model cannot do must not take the page down
            if number == self._number:
                complain(error)
            return
        if number == self._number and (shown := show(done)) is not None:
            await shown


def complain(error: Exception) -> None:
    """Say on the page what went wrong."""
    if not isinstance(error, UserError):
        log.error("the Sample page could not do its work", exc_info=error)
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    ui.notify(text, type="negative", multi_line=True, close_button=True, timeout=10_000)


# Parts of pages


class Slider(ui.slider):
    """A slider that moves at once under the hand; NiceGUI's own waits for the server's answer to each key."""

    LOOPBACK = False


def slider(
    title: str, least: float, most: float, step: float, value: float, shown: Callable[[float], str], changed: Callable[[float], Any]
) -> ui.slider:
    """A labelled slider with its value beside it."""
    with ui.element("div").classes("sample-knob"):
        with ui.element("div"):
            ui.label(title)
            number = ui.label(shown(value)).classes("studio-dim")

        async def moved(event: Any) -> None:
            number.set_text(shown(event.value))
            await changed(event.value)

        return Slider(min=least, max=most, step=step, value=value, on_change=moved).props(f'aria-label="{title}" dense')


def put(element: ui.element, image: Tensor, alt: str = "") -> None:
    """Show an image (C, H, W) in an <img>."""
    from generative.easel import url

    with element.props.suspend_updates():
        element.props["alt"] = alt
    element.props["src"] = url(image)


def blank() -> ui.element:
    """An <img> that shows nothing yet."""
    return ui.element("img").props('alt="" src="data:image/gif;base64,R0lGODlhAQABAAAAACw="')


def figure(image: Tensor, caption: str, size: str = "6rem", name: str = "") -> None:
    """An image with a caption below."""
    with ui.element("figure").classes("sample-figure"):
        put(ui.element("img").classes("pixels").style(f"width: {size}"), image, name or caption)
        with ui.element("figcaption").classes("studio-dim"):
            ui.label(caption)


def heading(text: str) -> ui.label:
    """The title of a part of a pane."""
    return ui.label(text).classes("sample-title").props('role="heading" aria-level="2"')


def bars(shares: dict[str, float], most: int = 5) -> None:
    """The most probable classes, as bars."""
    with ui.element("div").classes("sample-bars").props('role="list" aria-label="Classes"'):
        for place, (name, share) in enumerate(list(shares.items())[:most]):
            ui.label(name).classes("font-bold" if place == 0 else "")
            with ui.element("div").classes("sample-bar" + (" first" if place == 0 else "")):
                ui.element("div").style(f"width: {100 * share:.1f}%")
            ui.label(f"{100 * share:.1f} %")


# Panes


class Pane(ABC):
    """One way to look at a model."""

    title: str
    icon: str

    def __init__(self, page: Page) -> None:
        self.page = page
        self.workers: list[Latest] = []
        self.latest = self.worker()
        self.box: ui.element
        self._drawn: Hashable = None

    def worker(self) -> Latest:
        """Something that works for this pane until the page is left."""
        self.workers.append(Latest(self.page.busy))
        return self.workers[-1]

    def fits(self) -> bool:
        """Whether the page's run can be looked at in this way."""
        return self.page.easel is not None and self.page.easel.model.latent > 0

    @abstractmethod
    def build(self) -> None:
        """Fill the pane with what does not change."""

    @abstractmethod
    def depends(self) -> Hashable:
        """All that decides what is shown."""

    @abstractmethod
    async def draw(self) -> None:
        """Show what is set now."""

    async def update(self) -> None:
        """Draw anew, unless that would give what is shown."""
        if (now := self.depends()) != self._drawn:
            self._drawn = now
            await self.draw()

    @property
    def easel(self) -> Easel:
        """The model at work."""
        assert self.page.easel
        return self.page.easel


class Saving:
    """A row with the command that draws the same, and a button that writes the picture into the run."""

    def __init__(self, page: Page, kind: str, picture: Callable[[], Tensor | None]) -> None:
        self.page, self.kind, self.picture = page, kind, picture
        with ui.element("div").classes("sample-row"):
            ui.button("Save picture", icon="save", on_click=self.save).props("outline no-caps dense padding='4px 10px'")
            with ui.element("div").classes("sample-command") as self.row:
                self.text = ui.element("code").props('aria-label="Command that draws the same"')
                with self.text:
                    self.words = ui.label("")
                ui.button(icon="content_copy", on_click=lambda: ui.clipboard.write(self.words.text)).props(
                    'flat round dense size=sm aria-label="Copy the command"'
                )
        self.row.set_visibility(False)

    def tell(self, command: str) -> None:
        """Show a command, or none where none draws the same."""
        self.words.set_text(command)
        self.row.set_visibility(bool(command))

    async def save(self) -> None:
        """Write what is shown into the run's media/, and say where."""
        from generative.easel import save

        picture = self.picture()
        if picture is None:
            ui.notify("Nothing is drawn yet.")
            return
        try:
            path = await run.io_bound(save, self.page.run, self.kind, picture)
        except UserError as error:
            complain(error)
            return
        ui.notify(f"saved as {path}", type="positive", close_button=True)


class Samples(Pane):
    """A grid of pictures of fixed noise."""

    title, icon = "Samples", "grid_view"

    def build(self) -> None:
        """The grid, whose cells can be picked."""
        self.grid = ui.element("div").classes("sample-grid").props('role="group" aria-label="Samples"')
        self.hint = ui.label("Pick a picture to see its neighbours, where a classifier looks, or the way to another one.").classes(
            "studio-dim"
        )
        self.saving = Saving(self.page, "samples", self.picture)
        self.cells: list[tuple[ui.element, ui.element]] = []

    def depends(self) -> Hashable:
        """The wish, the model and the picks."""
        return (self.page.wish, id(self.page.easel), self.page.picks)

    def picture(self) -> Tensor | None:
        """The grid as one picture."""
        from lab import media

        return None if self.page.samples is None else media.grid(self.page.samples)

    async def draw(self) -> None:
        """Draw the samples, or mark what is picked where only that changed."""
        wish, easel = self.page.wish, self.easel
        if getattr(self, "made", None) == (wish, id(easel)):
            self.mark()
            return
        await self.latest.do(partial(easel.samples, wish), lambda images: self.show(wish, easel, images))

    async def show(self, wish: Wish, easel: Easel, images: Tensor) -> None:
        """Put images (N, C, H, W) into the cells."""
        self.made = (wish, id(easel))
        self.page.samples = images
        if len(self.cells) != len(images):
            self.lay_out(len(images))
        labels = easel.labels(wish).tolist()
        for index, ((_, picture), image) in enumerate(zip(self.cells, images, strict=True)):
            put(picture, image, f"sample {index}" + (f", class {easel.model.classes[labels[index]]}" if easel.model.conditional else ""))
        if self.page.subject_name.startswith("sample "):
            index = min(int(self.page.subject_name.split()[1]), len(images) - 1)
            self.page.look_at(images[index], f"sample {index}")
        self.saving.tell(wish.command(self.page.source))
        self.mark()
        if self.page.shown and self.page.shown is not self:
            await self.page.shown.update()

    def lay_out(self, count: int) -> None:
        """Make cells for so many images, in a near-square grid as pictures are saved."""
        _, height, width = self.page.shape
        self.grid.clear()
        self.grid.style(f"grid-template-columns: repeat({math.ceil(math.sqrt(count))}, minmax(0, 1fr)); --aspect: {width} / {height}")
        self.cells = []
        with self.grid:
            for index in range(count):
                with ui.element("button").classes("sample-cell").on("click", partial(self.page.pick, index)) as cell:
                    self.cells.append((cell, blank()))

    def mark(self) -> None:
        """Show the two picks as A and B, once something was picked."""
        names = dict(zip(self.page.picks, "AB", strict=False)) if self.page.subject_name.startswith("sample ") else {}
        for index, (cell, _) in enumerate(self.cells):
            if cell.props.get("data-pick") != names.get(index):
                cell.props.set_optional("data-pick", names.get(index))
                cell.props.set_optional("aria-pressed", "true" if index in names else None)


class Way(Pane):
    """The way from noise to picture, to be scrubbed."""

    title, icon = "Trajectory", "timeline"

    def fits(self) -> bool:
        """Diffusion models have one."""
        return self.page.easel is not None and self.page.easel.moves

    def build(self) -> None:
        """The picture and the slider of its moment."""
        self.moments: list[Tensor] = []
        with ui.element("div").classes("sample-grid"):
            self.image = blank().classes("sample-picture")
        with ui.element("div").classes("w-full max-w-xl"):
            self.slider = slider("Moment", 0, 1, 1, 0, self.name, self.scrub)
        ui.label("From noise (left) to the picture (right).").classes("studio-dim")
        self.saving = Saving(self.page, "trajectory", self.picture)

    def depends(self) -> Hashable:
        """The wish and the model."""
        return (self.page.wish, id(self.page.easel))

    def name(self, value: float) -> str:
        """A moment in words."""
        return f"{int(value)} of {max(0, len(self.moments) - 1)}"

    async def scrub(self, value: float) -> None:
        """Show one moment."""
        from lab import media

        if self.moments:
            put(self.image, media.grid(self.moments[int(value)], padding=1), f"moment {self.name(value)}")

    def picture(self) -> Tensor | None:
        """The way as columns, as the script draws it."""
        from generative import drawing

        return drawing.side_by_side(drawing.thinned(self.moments, 10)) if self.moments else None

    async def draw(self) -> None:
        """Compute all moments, once."""
        wish = self.page.wish
        await self.latest.do(partial(self.easel.trajectory, wish), lambda moments: self.show(wish, moments))

    def show(self, wish: Wish, moments: list[Tensor]) -> None:
        """Keep the moments, and show the last one, or the one that the slider was at."""
        from lab import media

        place, before = int(self.slider.value), len(self.moments) - 1
        place = place if 0 < place < before == len(moments) - 1 else len(moments) - 1
        self.moments = moments
        self.slider.props["max"] = len(moments) - 1
        self.slider.set_value(place)
        put(self.image, media.grid(moments[place], padding=1), f"moment {self.name(place)}")
        self.saving.tell(wish.command(self.page.source, "trajectory"))


class Plane(Pane):
    """Two numbers of the code, to be dragged over."""

    title, icon = "Latent plane", "control_camera"

    def fits(self) -> bool:
        """Models with a small code."""
        return self.page.easel is not None and self.page.easel.plane_shown

    def build(self) -> None:
        """The plane with its marker, the image there, and which two numbers it is of."""
        self.axes: tuple[int, int] | None = None
        self.place = (0.5, 0.5)
        self.columns: list[Tensor] = []
        self.pointed = self.worker()
        with ui.element("div").classes("sample-row"):
            dimensions = list(range(self.easel.model.latent))
            self.across, self.down = (
                ui.select(dimensions, label=label, on_change=self.turned).props("dense outlined options-dense").classes("w-32")
                for label in ("Across", "Down")
            )
        with ui.element("div").classes("sample-top"):
            self._surface()
            with ui.element("figure").classes("sample-figure"):
                self.image = blank().classes("pixels").style("width: 11rem").props('data-role="decoded"')
                with ui.element("figcaption").props('aria-live="polite"'):
                    self.numbers = ui.label("").classes("studio-dim")
        ui.label("Drag over the plane, or focus it and use the arrow keys.").classes("studio-dim")
        self.saving = Saving(self.page, "plane", self.picture)

    def _surface(self) -> None:
        with ui.element("div").classes("sample-plane") as surface:
            self.background = blank()
            self.marker = ui.element("div").classes("sample-mark").style("left: 50%; top: 50%")
        surface.props('tabindex=0 role="application" aria-label="Plane of two code numbers: arrow keys move"')
        pointed = """(event) => {
            if (event.type === 'pointerdown') event.currentTarget.setPointerCapture(event.pointerId);
            if (!event.buttons) return;
            const box = event.currentTarget.getBoundingClientRect();
            emit([(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
        }"""
        for name in ("pointerdown", "pointermove"):
            surface.on(name, lambda event: self.move(*event.args), throttle=0.03, js_handler=pointed)
        pressed = """(event) => {
            const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
            if (steps) { event.preventDefault(); emit(steps); }
        }"""
        surface.on("keydown", lambda event: self.move(*(old + 0.02 * step for old, step in zip(self.place, event.args, strict=True))),
                   js_handler=pressed)  # fmt: skip

    def depends(self) -> Hashable:
        """The wish, the model and the two numbers."""
        return (self.page.wish, id(self.page.easel), self.axes)

    def picture(self) -> Tensor | None:
        """The plane as the script draws it."""
        from generative import drawing

        return drawing.side_by_side(self.columns) if self.columns else None

    async def turned(self) -> None:
        """Take two other numbers."""
        chosen = (self.across.value, self.down.value)
        if None not in chosen and chosen != self.axes:
            self.axes = chosen
            await self.update()

    async def draw(self) -> None:
        """Draw the plane, over the two most telling numbers at first, and the image at the marker."""
        wish, easel, axes = self.page.wish, self.easel, self.axes

        def work(wanted: Wanted) -> tuple[list[int], list[Tensor]]:
            telling = easel.telling(wish, wanted)
            return telling, easel.plane(wish, *(axes or (telling[0], telling[1])), wanted)

        await self.latest.do(work, partial(self.show, wish))
        await self.point()

    def show(self, wish: Wish, made: tuple[list[int], list[Tensor]]) -> None:
        """Show the plane."""
        import torch

        from generative import easel
        from lab import media

        telling, self.columns = made
        if self.axes is None:
            self.axes = (telling[0], telling[1])
            self._drawn = self.depends()
            self.across.set_value(telling[0])
            self.down.set_value(telling[1])
        put(self.background, media.grid(torch.stack(self.columns, 1).flatten(0, 1), easel.PLANE, padding=0), "plane of images")
        same = self.axes == (telling[0], telling[1])
        self.saving.tell(wish.command(self.page.source, "plane") if same else "")

    async def move(self, across: float, down: float) -> None:
        """Move the marker, and show the image there."""
        self.place = (min(max(across, 0.0), 1.0), min(max(down, 0.0), 1.0))
        self.marker.style(f"left: {100 * self.place[0]:.2f}%; top: {100 * self.place[1]:.2f}%")
        await self.point()

    async def point(self) -> None:
        """Show the image at the marker."""
        if self.axes:
            work = partial(self.easel.point, self.page.wish, *self.axes, self.place)
            await self.pointed.do(work, self.show_point)

    def show_point(self, made: tuple[Tensor, Tensor]) -> None:
        """Show an image and its two numbers."""
        image, numbers = made
        assert self.axes
        text = ", ".join(f"z{axis} = {number:+.2f}" for axis, number in zip(self.axes, numbers.tolist(), strict=True))
        put(self.image, image, f"image at {text}")
        self.numbers.set_text(text)


class Between(Pane):
    """The way from one sample to another."""

    title, icon = "Interpolation", "linear_scale"

    def build(self) -> None:
        """Which two, the picture on the way, and the strip."""
        self.line: Tensor | None = None
        with ui.element("div").classes("sample-row"):
            self.ends = [
                ui.number(f"{name}: sample", min=0, precision=0, value=index, on_change=self.chosen).props("dense outlined").classes("w-36")
                for name, index in zip("AB", self.page.picks, strict=True)
            ]
        self.image = blank().classes("pixels").style("width: 14rem")
        with ui.element("div").classes("w-full max-w-xl"):
            self.slider = slider("From A to B", 0, 1, 1 / 16, 0.5, lambda value: f"{100 * value:.0f} %", self.scrub)
        with ui.element("div").classes("sample-strip").props('role="img" aria-label="The whole way"'):
            self.strip = [blank() for _ in range(9)]
        ui.label("A and B are the last two pictures picked among the samples.").classes("studio-dim")
        self.saving = Saving(self.page, "interpolation", self.picture)

    def depends(self) -> Hashable:
        """The wish, the model and the picks."""
        return (self.page.wish, id(self.page.easel), self.page.picks)

    def picture(self) -> Tensor | None:
        """The strip as one picture."""
        from lab import media

        return None if self.line is None else media.grid(self.line[::2], columns=9)

    async def chosen(self) -> None:
        """Take other ends."""
        most = self.page.values["count"] - 1
        first, last = (min(max(int(end.value or 0), 0), most) for end in self.ends)
        self.page.picks = (first, last)
        await self.update()

    async def scrub(self, value: float) -> None:
        """Show a place on the way."""
        if self.line is not None:
            put(self.image, self.line[round(value * (len(self.line) - 1))], f"{100 * value:.0f} % from A to B")

    async def draw(self) -> None:
        """Compute the way."""
        for end, index in zip(self.ends, self.page.picks, strict=True):
            end.set_value(index)
        await self.latest.do(partial(self.easel.between, self.page.wish, *self.page.picks), self.show)

    def show(self, line: Tensor) -> None:
        """Show the strip, and the place that the slider is at."""
        self.line = line
        for element, image in zip(self.strip, line[::2], strict=True):
            put(element, image)
        place = float(self.slider.value)
        put(self.image, line[round(place * (len(line) - 1))], f"{100 * place:.0f} % from A to B")


HOLES = {
    "marked": "what I mark", "undrawn": "all that is black", "right": "the right half", "left": "the left half",
    "top": "the top half", "bottom": "the bottom half", "centre": "the centre",
}  # fmt: skip


class Draw(Pane):
    """A drawing, and what the models make of it."""

    title, icon = "Draw", "gesture"

    def fits(self) -> bool:
        """Always: any model of images has something to say of one."""
        return True

    def build(self) -> None:
        """The canvas with its tools, and what is made of the drawing."""
        with ui.element("div").classes("sample-top"):
            with ui.element("div").classes("flex flex-col gap-2 max-w-full"):
                self._canvas()
                self._tools()
                self._take()
            with ui.element("div").classes("sample-results"):
                if self.page.easel and self.page.easel.edits:
                    self.hole = ui.select(HOLES, value="right", label="Fill in", on_change=self.page.changed)
                    self.hole.props("dense outlined options-dense").classes("w-48")
                self.results = ui.element("div").classes("flex flex-col gap-3").props('aria-live="polite"')
                with self.results:
                    ui.label(
                        "Draw with the mouse or a finger, or focus the canvas: arrow keys move, Space paints, Shift with an arrow draws."
                    )

    def _canvas(self) -> None:
        _, height, width = self.page.shape
        self.canvas = ui.element("canvas").classes("sample-canvas").style(f"--aspect: {width} / {height}")
        self.canvas.props('tabindex=0 role="application" aria-label="Canvas: arrow keys move, Space paints, Shift with an arrow key draws"')
        self.canvas.on("drawn", lambda event: self.drawn(event.args), js_handler="(event) => emit(event.detail)")
        ui.run_javascript(f'studioDrawing("{self.canvas.html_id}", {width}, {height})')

    def _tools(self) -> None:
        tools = {"brush": "Brush", "erase": "Eraser"} | ({"mark": "Marker"} if self.page.easel and self.page.easel.edits else {})
        with ui.element("div").classes("sample-row"):
            ui.toggle(tools, value="brush", on_change=lambda event: self.tell(f'.tool = "{event.value}"')).props(
                'no-caps dense padding="2px 10px" aria-label="Tool"'
            )
            centre = ui.button(icon="center_focus_strong", on_click=self.centre).props('flat round dense aria-label="Centre it"')
            centre.tooltip("scale and centre it as MNIST's digits are")
            nothing = "A" * (4 * math.ceil(math.prod(self.page.shape[1:]) / 3))  # zeros in base64
            ui.button(icon="delete", on_click=lambda: self.tell(f'.put("{nothing}")')).props('flat round dense aria-label="Clear"')

    def _take(self) -> None:
        with ui.element("div").classes("sample-row"):
            self.split = (
                ui.select(["test", "training"], value="test", label="Or an image").props("dense outlined options-dense").classes("w-28")
            )
            self.number = ui.number("Number", value=0, min=0, precision=0).props("dense outlined").classes("w-24")
            ui.button("Take", on_click=self.take).props("outline no-caps dense padding='4px 10px'")

    def tell(self, what: str) -> None:
        """Let the canvas do something."""
        ui.run_javascript(f'studioDrawings["{self.canvas.html_id}"]{what}')

    async def take(self) -> None:
        """Put an image of the set on the canvas."""
        from generative.easel import greys
        from lab.data import as_float

        try:
            images = await run.io_bound(self.page.images)
            if images is None:  # the studio is being stopped
                return
            split = images.test if self.split.value == "test" else images.train
            index = int(self.number.value or 0)
            if not 0 <= index < len(split):
                raise UserError(f"the {self.split.value} images of {images.name} are 0 to {len(split) - 1}")
        except UserError as error:
            complain(error)
            return
        self.tell(f'.put("{greys(as_float(split.images[index]))}")')

    async def centre(self) -> None:
        """Scale and centre the drawing as MNIST's digits are."""
        from generative.easel import centred, greys

        if self.page.drawing:
            self.tell(f'.put("{greys(centred(self.page.drawing.image))}")')

    async def drawn(self, text: str) -> None:
        """Take what was painted."""
        from generative.easel import read_drawing

        self.page.drawing = read_drawing(text, self.page.shape)
        self.page.look_at(self.page.drawing.image, "the drawing")
        await self.page.changed()

    def depends(self) -> Hashable:
        """The drawing, the models, and what is to be filled in."""
        hole = self.hole.value if hasattr(self, "hole") else ""
        return (id(self.page.drawing), id(self.page.easel), self.page.judge, hole, self.page.wish)

    async def draw(self) -> None:
        """See what the models make of the drawing."""
        if self.page.drawing is not None:
            hole = self.hole.value if hasattr(self, "hole") else ""
            await self.latest.do(partial(self.look, self.page.drawing, hole), self.show)

    def look(self, drawing: Drawing, hole: str, wanted: Wanted) -> dict[str, Any]:
        """All that the classifier and the model say of a drawing."""
        from generative.easel import stays

        page = self.page
        found: dict[str, Any] = {}
        if page.judge:
            found["classes"] = page.judge.eyes().shares(drawing.image)
        easel = page.easel
        if easel is None:
            return found
        label = self.label(found.get("classes", {}))
        if easel.rebuilds:
            found["rebuilt"] = easel.rebuilt(drawing.image, label, wanted)
        if easel.enlarges:
            found["enlarged"] = easel.enlarged(drawing.image, wanted)
        if easel.edits and not bool((kept := stays(drawing, hole)).all()):
            found["left"] = drawing.image * kept + 0.5 * (1 - kept)
            found["filled"] = easel.filled(drawing.image, kept, label, page.wish, wanted)
        return found

    def label(self, shares: dict[str, float]) -> int:
        """The class that a model is told: the one that is set, or else the one that is seen."""
        name = self.page.values["labels"] or next((name for name in shares if name in self.page.classes), "")
        return self.page.classes.index(name) if name in self.page.classes else 0

    def show(self, found: dict[str, Any]) -> None:
        """Show what was said."""
        self.results.clear()
        with self.results:
            if "classes" in found:
                name, share = next(iter(found["classes"].items()))
                heading(f"Taken for {name}, {100 * share:.0f} %")
                bars(found["classes"])
            if "rebuilt" in found:
                heading("Through the code and back")
                figure(found["rebuilt"], "reconstruction", "9rem")
            for name in ("enlarged",) if "enlarged" in found else ():
                heading("Made small, and large again")
                with ui.element("div").classes("sample-many"):
                    for caption, image in found[name].items():
                        figure(image, caption, "9rem")
            if "filled" in found:
                heading("Filled in")
                with ui.element("div").classes("sample-many"):
                    figure(found["left"], "what is left")
                    for index, image in enumerate(found["filled"]):
                        figure(image, f"way {index + 1}")
            elif hasattr(self, "hole") and self.hole.value == "marked":
                ui.label("Choose the marker, and mark what is to be filled in.").classes("studio-dim")


class Nearest(Pane):
    """The training images nearest to the picked sample or the drawing."""

    title, icon = "Neighbours", "compare"

    def fits(self) -> bool:
        """Always: every run has training images."""
        return True

    def build(self) -> None:
        """Room for the image and its neighbours."""
        self.features = self.worker()
        self.part = 0.0
        self.asked = ui.element("div")
        self.pixels = ui.element("div").classes("flex flex-col gap-2")
        self.seen = ui.element("div").classes("flex flex-col gap-2")
        self.clock = ui.timer(0.5, self.progress, active=False)

    def depends(self) -> Hashable:
        """The image."""
        return id(self.page.subject)

    async def draw(self) -> None:
        """By pixels at once, by features when they are known."""
        from generative.easel import nearest_features, nearest_pixels
        from generative.metrics import find_features

        image = self.page.subject
        for box in (self.asked, self.pixels, self.seen):
            box.clear()
        if image is None:
            with self.asked:
                ui.label("Pick a picture among the samples, or draw one: its nearest training images are shown here.")
            return
        with self.asked:
            figure(image, self.page.subject_name, "9rem")
        await self.latest.do(lambda wanted: nearest_pixels(image, self.page.images(), wanted), partial(self.show, self.pixels, "By pixels"))

        def by_features(wanted: Wanted) -> tuple[str, list[Neighbour]]:
            images = self.page.images()
            eyes = find_features(images)
            return (eyes.name, nearest_features(image, images, eyes, partial(self.note, wanted))) if eyes else ("", [])

        self.part = 0.0
        self.clock.activate()
        await self.features.do(by_features, lambda found: self.show(self.seen, f"By the features {found[0]}", found[1]))
        if not self.features.at_work:
            self.clock.deactivate()

    def note(self, wanted: Wanted, part: float) -> None:
        """Note how far the work is, and give it up when nobody waits for it."""
        from generative.easel import Dropped

        if not wanted():
            raise Dropped
        self.part = part

    def progress(self) -> None:
        """Say how far the features of the training images are known."""
        if not self.features.at_work or not self.part:
            return
        self.seen.clear()
        with self.seen:
            ui.label(f"The features of all training images are computed, once: {100 * self.part:.0f} %").classes("studio-dim")

    def show(self, box: ui.element, title: str, found: list[Neighbour]) -> None:
        """Show a row of neighbours."""
        from lab.data import as_float

        box.clear()
        if not found:
            return
        with box:
            heading(title)
            with ui.element("div").classes("sample-many"):
                for each in found:
                    caption = f"{each.label} · {each.distance:.2f}"
                    figure(
                        as_float(each.image), caption, "5.2rem", f"training image {each.index}, class {each.label}, at {each.distance:.3f}"
                    )


class Attention(Pane):
    """Where a classifier looks in the picked sample or the drawing."""

    title, icon = "Attention", "visibility"

    def fits(self) -> bool:
        """Where there is a classifier of such images."""
        return bool(self.page.judges)

    def build(self) -> None:
        """The method, and room for the maps."""
        self.method = (
            ui.select(["auto"], value="auto", label="Map by", on_change=self.update).props("dense outlined options-dense").classes("w-40")
        )
        self.results = ui.element("div").classes("flex flex-col gap-3")

    def depends(self) -> Hashable:
        """The image, the classifier and the method."""
        return (id(self.page.subject), self.page.judge, self.method.value)

    async def draw(self) -> None:
        """Ask the classifier."""
        image, judge, method = self.page.subject, self.page.judge, self.method.value
        if image is None or judge is None:
            self.results.clear()
            with self.results:
                ui.label("Pick a picture among the samples, or draw one: where the classifier looks is shown here.")
            return

        def work(_: Wanted) -> tuple[Eyes, dict[str, float], tuple[Tensor, Tensor]]:
            eyes = judge.eyes()
            return eyes, eyes.shares(image), eyes.look(image, method if method in eyes.methods else "auto")

        await self.latest.do(work, partial(self.show, image))

    def show(self, image: Tensor, made: tuple[Eyes, dict[str, float], tuple[Tensor, Tensor]]) -> None:
        """Show the image, the map, and the map over it."""
        eyes, shares, (colours, over) = made
        self.method.set_options(["auto", *eyes.methods], value=self.method.value if self.method.value in eyes.methods else "auto")
        self.results.clear()
        with self.results:
            name, share = next(iter(shares.items()))
            heading(f"Taken for {name}, {100 * share:.0f} %")
            with ui.element("div").classes("sample-many"):
                for each, caption in ((image, self.page.subject_name), (colours, "where it looks"), (over, "over the picture")):
                    figure(each, caption, "10rem")
            bars(shares)


PANES: tuple[type[Pane], ...] = (Samples, Way, Plane, Between, Draw, Nearest, Attention)
