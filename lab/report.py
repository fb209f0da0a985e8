"""A report of runs to hand to somebody: one HTML file that holds everything it shows and loads nothing from anywhere.

html        the report of some runs, as text; what is missing or damaged in a run is told in it
write       to a file, which may replace an older report but nothing else
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lab import checkpoint, curves, runs
from lab.config import UserError
from lab.curves import Series, Tail
from lab.media import opened
from lab.panels import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, Panel, number
from lab.runs import Run, facts
from lab.status import Status, status

MARK = '<meta name="generator" content="dreamplay report">'
"""Stands at the top of every report, so that no other file is taken for one."""
MOST_FILM, MOST_PICTURE = 8 << 20, 4 << 20
"""Bytes of a film and of a picture that are still put into a report."""
COLOURS = 8
"""Runs that have colours of their own; after them they come again."""
WARNING = re.compile(r"\S+ \S+ (WARNING|ERROR|CRITICAL) ")
"""How a line of a log begins that says more than how it goes on: date, time, level."""
MOST_WARNINGS = 30

CAPTIONS = {
    "samples": "Samples",
    "reconstructions": "Test images, each above what the model makes of it",
    "neighbours": "The samples nearest to training images, each above its neighbour",
    "enlarged": "Test images enlarged",
    "confusion": "Which class was taken for which",
    "mistakes": "The surest mistakes",
    "play": "The agent at play",
    "watch": "The agent at play",
}
"""What the pictures of a run show, those first that tell most."""


# What a run tells of itself


@dataclass(frozen=True)
class Exhibit:
    """A picture or a film of a run, ready to be shown."""

    caption: str
    source: str
    """All of it, as a `data:` address."""
    film: bool = False


class Told:
    """What there is to be told of a run; `problems` has a sentence for all that is missing or damaged."""

    def __init__(self, run: Run, films: bool = True) -> None:
        self.run, self.problems = run, list[str]()
        self.tail = Tail(run)
        self.tail.update()
        self.series = self.tail.series()
        self.status: Status = status(run)
        self.settings = self._settings()
        self.name = self.settings.get("name") or run.folder.resolve().name
        self.environment = self._json(run.environment)
        self.judged = self._json(run.folder / "evaluation.json")
        self.commands = _lines(run.folder / "command.txt")
        self.warnings = [line for line in _lines(run.log) if WARNING.match(line)][-MOST_WARNINGS:]
        self._check()
        self.exhibits = [*(self._films() if films else ()), *self._pictures()]

    def _settings(self) -> dict[str, str]:
        if not self.run.config.exists():
            self.problems.append("Its config.yaml is missing.")
            return {}
        try:
            return curves.settings(self.run)
        except (UserError, OSError, ValueError) as error:
            self.problems.append(f"Its settings cannot be told: {error}")
            return {}

    def _json(self, path: Path) -> dict[str, Any]:
        """What a file of facts holds; nothing where there is no such file or it is damaged."""
        known = facts(path)
        if known is None:
            self.problems.append(f"{path.name} is damaged and left out.")
        return known or {}

    def _check(self) -> None:
        """Say what is wrong with the run and its metrics."""
        if self.status.state in ("failed", "damaged") and self.settings:
            self.problems.append(f"The run has {self.status.state}: {self.status.why}.")
        if not self.tail.rows:
            self.problems.append("It has recorded no metrics.")
        if self.tail.damaged:
            self.problems.append(f"{counted(self.tail.damaged, 'line')} of metrics.jsonl cannot be read: left out.")
        if self.tail.cut and self.status.state != "running":
            self.problems.append("The last line of metrics.jsonl was cut short and is left out.")
        for shown in self.tail.media.values():
            if not os.path.isfile(self.run.folder / shown[max(shown)]):  # which bears any name
                self.problems.append(f"{shown[max(shown)]}, which the metrics name, is not there.")

    @property
    def experiment(self) -> str:
        """The kind of experiment."""
        return self.settings.get("experiment") or "unknown experiment"

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Facts of each start of the run, the first one first."""
        return runs.starts_in(self.environment)

    @property
    def settings_rows(self) -> list[tuple[str, list[str]]]:
        """Its settings for a table."""
        return [(key, [value]) for key, value in self.settings.items()]

    @property
    def environment_rows(self) -> list[tuple[str, list[str]]]:
        """Facts of its last start for a table."""
        return [(key, [str(value)]) for key, value in self.starts[-1].items()]

    # Pictures and films

    def _pictures(self) -> Iterator[Exhibit]:
        """Of each kind of picture the newest one."""
        newest: dict[str, Path] = {}
        for path in sorted(self.run.media.glob("*.png")):
            name, step = named(path)
            newest[name if step else f"{name}.png"] = path  # one that was drawn by hand is a kind of its own
        newest.pop("curves.png", None)  # drawn anew here
        for path in sorted(newest.values(), key=rank):
            if source := self._embedded(path, MOST_PICTURE, "image/png", is_picture):
                yield Exhibit(caption(*named(path)), source)

    def _films(self) -> Iterator[Exhibit]:
        """The newest film that can be shown, if there is one."""
        films = [path for path in self.run.media.glob("*") if path.suffix in (".mp4", ".gif") and path.is_file()]
        for path in sorted(films, key=lambda path: path.stat().st_mtime, reverse=True):
            moving = path.suffix == ".mp4"
            kind, check = ("video/mp4", is_film) if moving else ("image/gif", is_picture)
            if source := self._embedded(path, MOST_FILM, kind, check):
                yield Exhibit(caption(*named(path)), source, moving)
                return

    def _embedded(self, path: Path, most: int, kind: str, check: Callable[[Path], bool]) -> str:
        """A file as a `data:` address; empty, with a sentence why, where it is too large or damaged."""
        shown = path.relative_to(self.run.folder)
        try:
            if path.stat().st_size > most:
                size = f"{path.stat().st_size / (1 << 20):.1f} MiB"
                self.problems.append(f"{shown} has {size} and stays out: a report takes up to {most >> 20} MiB of one file.")
                return ""
            if check(path):
                return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        except OSError:
            pass
        self.problems.append(f"{shown} is damaged and left out.")
        return ""


def _lines(path: Path) -> list[str]:
    """The lines of a text file that may be missing or damaged."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def named(path: Path) -> tuple[str, int]:
    """What a picture is called, and the step it is of, 0 if its name tells none."""
    found = re.fullmatch(r"(.+?)_(\d{9})(_.*)?", path.stem)
    return (found[1], int(found[2])) if found else (path.stem, 0)


def rank(path: Path) -> tuple[int, int]:
    """Sorts pictures: those first that tell most, and those of training before those that were drawn by hand."""
    order, (name, step) = list(CAPTIONS), named(path)
    return order.index(name) if name in order else len(order), -step


def caption(name: str, step: int) -> str:
    """A line below a picture."""
    words = CAPTIONS.get(name, name.replace("_", " ").capitalize())
    return f"{words}, after {step:,} steps" if step else words


def is_picture(path: Path) -> bool:
    """Whether a picture can be read to its end."""
    try:
        with opened(path) as picture:
            picture.load()
    except ValueError:
        return False
    return True


def is_film(path: Path) -> bool:
    """Whether a file is MP4 to its end: boxes, each of which begins with its length, and one of them the table of contents."""
    data, place, kinds = path.read_bytes(), 0, list[bytes]()
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        kinds.append(data[place + 4 : place + 8])
        place += max(length, 8)
    return place == len(data) and kinds[:1] == [b"ftyp"] and b"moov" in kinds


# In words and numbers


def counted(count: int, word: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """`35 s`, `48 min`, `2 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def parameters(run: Run) -> int:
    """Numbers that the model of the newest readable checkpoint consists of, 0 where there is none."""
    from safetensors import SafetensorError, safe_open

    for folder in checkpoint.folders(run.checkpoints):
        with contextlib.suppress(OSError, SafetensorError), safe_open(folder / "model.safetensors", "numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - it is no dict
    return 0


def paragraph(told: Told) -> str:
    """What was trained on what, how long, and with what."""
    settings, run_status = told.settings, told.status
    subject = "the game " + settings["game.name"] if "game.name" in settings else settings.get("data.name", "")
    steps = f"{run_status.step:,} of {counted(run_status.steps, 'step')}" if run_status.steps else counted(run_status.step, "step")
    facts = [f"{told.experiment}{' on ' if subject else ''}{subject}: {steps} ({run_status.state})"]
    facts += [f"a model of {size:,} parameters"] if (size := parameters(told.run)) else []
    facts += [f"{duration(told.tail.seconds)} of training"] if math.isfinite(told.tail.seconds) else []
    facts += [device(told.starts[-1])] if told.starts else []
    facts += [f"seed {settings['trainer.seed']}"] if "trainer.seed" in settings else []
    return ", ".join(facts) + "." + history(told.starts)


def device(start: Mapping[str, Any]) -> str:
    """Where a start took place."""
    threads, processes = start.get("threads"), start.get("processes")
    cpu = f"on a CPU with {counted(threads, 'thread')}" if isinstance(threads, int) else "on a CPU"
    where = f"on a {start['gpu']}" if start.get("gpu") else cpu
    return f"{where} in {processes} processes" if isinstance(processes, int) and processes > 1 else where


def history(starts: Sequence[Mapping[str, Any]]) -> str:
    """When it was started, and by which versions."""
    if not starts:
        return ""
    last, words = starts[-1], [f" Started {moment(starts[0])}"]
    words += [f"resumed {'once' if len(starts) == 2 else f'{len(starts) - 1} times'}, last {moment(last)}"] if len(starts) > 1 else []
    versions = [
        f"{name} {last[key]}" for name, key in (("Dreamplay", "dreamplay"), ("Python", "python"), ("PyTorch", "torch")) if last.get(key)
    ]
    if last.get("git"):
        versions.insert(1, f"commit {str(last['git'])[:10]}{' with changes' if last.get('changed') else ''}")
    return f"{', '.join(words)}; {', '.join(versions)}."


def moment(start: Mapping[str, Any]) -> str:
    """When a start was, to the minute."""
    return str(start.get("time", "at an unknown time"))[:16].replace("T", " ")


# Tables


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, shown as one curve."""

    title: str
    runs: Sequence[Told]
    colour: int

    @property
    def line(self) -> str:
        """What stands beside its colour."""
        seeds = [told.settings.get("trainer.seed", "?") for told in self.runs if told.series]
        if len(seeds) < 2:
            return self.title
        return f"{self.title}: mean of {len(seeds)} seeds ({', '.join(seeds)}), in a band from the least to the greatest"


def grouped(runs: Sequence[Told]) -> list[Group]:
    """The runs by what they have in common; a run whose settings are not known stands alone."""
    known = [told.settings or {"": str(told.run.folder)} for told in runs]
    places = curves.seeds(known)
    names = [runs[place[0]].name for place in places]
    titles = [name if names.count(name) == 1 else f"{name} {runs[place[0]].run.folder.name}" for name, place in zip(names, places)]
    return [Group(title, [runs[one] for one in place], index) for index, (title, place) in enumerate(zip(titles, places))]


@dataclass(frozen=True)
class Table:
    """A table with a heading above each column and a name before each row."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def compared(groups: Sequence[Group], values: Callable[[Told], Mapping[str, Any]]) -> Table:
    """A row for each value that runs have, a column for each run, and before those of several seeds one for all of them."""
    found = {told: values(told) for group in groups for told in group.runs}
    columns: list[tuple[str, Sequence[Told]]] = []
    for group in groups:
        known = [told for told in group.runs if found[told]]
        columns += [(f"{group.title}, mean (range)", known)] if len(known) > 1 else []
        columns += [(title_of(group, told), [told]) for told in group.runs]
    keys = dict.fromkeys(key for one in found.values() for key in one)
    rows = [(key, [ranged([found[told].get(key) for told in runs]) for _, runs in columns]) for key in keys]
    return Table([title for title, _ in columns], rows)


def title_of(group: Group, told: Told) -> str:
    """How a run is called beside others."""
    return group.title if len(group.runs) == 1 else f"{group.title} seed {told.settings.get('trainer.seed', '?')}"


def ranged(values: Sequence[Any]) -> str:
    """One value, or the mean of several with their range."""
    if len(values) == 1:
        return number(values[0])
    known = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(known) < len(values):
        return "–"
    mean, least, greatest = number(sum(known) / len(known)), number(min(known)), number(max(known))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"


def scores(told: Told) -> dict[str, Any]:
    """What `evaluation.json` says in single numbers, by names that people read."""
    fit = {key: value for key, value in told.judged.items() if isinstance(value, int | float) and not beyond(value)}
    return {key.replace("_", " "): value for key, value in fit.items()}


def beyond(value: float) -> bool:
    """Whether a whole number, which JSON may write with any number of digits, is larger than any float."""
    return isinstance(value, int) and abs(value) > sys.float_info.max


def newest(told: Told) -> dict[str, Any]:
    """The newest value of every metric."""
    return {key: told.tail.last[key] for key in ordered(told.tail.keys)}


def extremes(told: Told) -> Table:
    """Of every metric of a run the newest, the least and the greatest value, the last two with their steps."""
    rows = []
    for key in ordered(told.series):
        steps, values = told.series[key].over(curves.STEP)
        finite = np.flatnonzero(np.isfinite(values))
        ends = [finite[pick(values[finite])] for pick in (np.argmin, np.argmax)] if len(finite) else []
        cells = [f"{number(float(values[at]))} (step {number(float(steps[at]))})" for at in ends] or ["–", "–"]
        rows.append((key, [number(float(values[-1])), *cells]))
    return Table(["newest", "least", "greatest"], rows)


def ordered(keys: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Metrics as people look for them: tests before training, losses first, the learning rate last."""

    def place(key: str) -> tuple[bool, bool, bool, str]:
        group, _, name = key.partition("/")
        return name.endswith("lr"), group == "train", name != "loss", key

    return sorted(keys, key=place)


# Curves


MANY = 200
"""Points from which on a curve is smoothed."""


def curve_of(group: Group, key: str, axis: str, dashed: bool) -> Curve | None:
    """A metric of a group of runs, smoothed where it has many points; None where there is no point."""
    found = [told.series[key].over(axis) for told in group.runs if key in told.series]
    found = [(x, y) for x, y in found if len(x)]
    kind = key.partition("/")[0]
    if len(found) == 1:
        (x, y), long = found[0], len(found[0][0]) > MANY
        smoothed = curves.smooth(y, 1 - 50 / len(y)) if long else y
        return Curve(kind, group.colour, dashed, x, smoothed, (x, y) if long else None)
    band = curves.band(found)
    return Curve(kind, group.colour, dashed, band.x, band.mean, None, band.low, band.high) if len(band.x) else None


def panels(groups: Sequence[Group]) -> list[Panel]:
    """A panel for each metric; those of the same name, measured in training and in tests, share one.

    Losses of different experiments mean different things and are kept apart.
    """
    runs = [told for group in groups for told in group.runs if told.series]
    axis = curves.FRAMES if runs and all(has_frames(told.series) for told in runs) else curves.STEP
    mixed = len({told.experiment for told in runs}) > 1
    shared: dict[str, list[tuple[Group, str]]] = {}
    for key in ordered({key: None for told in runs for key in told.series}):
        for group in groups:
            name = key.partition("/")[2]
            apart = mixed and name.endswith("loss")
            shared.setdefault(f"{name} of {group.runs[0].experiment}" if apart else name, []).append((group, key))
    drawn = {name: [curve_of(*pair, axis, dashed=dashed(pair[1], pairs)) for pair in pairs] for name, pairs in shared.items()}
    kept = {name: [curve for curve in found if curve] for name, found in drawn.items()}
    return [Panel(name, axis, found) for name, found in kept.items() if found]


def dashed(key: str, beside: Sequence[tuple[Group, str]]) -> bool:
    """Whether a metric is drawn dashed: one of training, beside a test."""
    return key.startswith("train/") and any(other in told.series and other != key for group, other in beside for told in group.runs)


def has_frames(series: Mapping[str, Series]) -> bool:
    """Whether a run, an agent's, counts frames."""
    return any(curves.FRAMES in one.axes for one in series.values())


# The page


def html(runs: Sequence[Run], films: bool = True) -> str:
    """The report of runs, one or more, as a page of HTML that loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    told = [Told(run, films) for run in runs]
    groups = grouped(told)
    place = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=place, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    settings = [one.settings for one in told if one.settings]
    keys = [key for key in curves.differing(settings) if all(key in one for one in settings)]  # others belong to one kind of experiment
    drawn = panels(groups)
    return environment.get_template("report.html").render(
        mark=MARK,
        title=", ".join(dict.fromkeys(one.name for one in told)),
        groups=groups,
        told=told,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        shown=[(title_of(group, one), it) for group in groups for one in group.runs for it in one.exhibits],
        judged=compared(groups, scores),
        protocols=dict.fromkeys(str(one.judged[key]) for one in told for key in ("protocol", "sample_protocol") if key in one.judged),
        newest=compared(groups, newest),
        panels=drawn,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        colours=COLOURS,
        smoothed=any(curve.pale for panel in drawn for curve in panel.drawn),
        outside=any(panel.begins_outside for panel in drawn),
        names=[title_of(group, one) for group in groups for one in group.runs],
        differing=[(key, [one.settings.get(key, "–") for group in groups for one in group.runs]) for key in keys],
        paragraph=paragraph,
        extremes=extremes,
        title_of=title_of,
        counted=counted,
    )


def check(path: Path) -> None:
    """Refuse a place where something stands that is no report.

    Raises:
        UserError: says so.
    """
    try:
        if path.exists() and not (path.is_file() and MARK.encode() in path.read_bytes()[:1000]):
            raise UserError(f"{path} is no report and stays as it is; give another place by --out")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give another place by --out") from None


def write(page: str, path: Path) -> None:
    """Write a report, whole or not at all, over an older one or where nothing is.

    Raises:
        UserError: something else stands there, or nothing can be written there.
    """
    check(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace")  # half a character, which JSON can hold
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: a report cannot be written here ({error.strerror}); give another place by --out") from None
