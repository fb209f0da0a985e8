"""The one place a metric goes to: `metrics.jsonl` first, then Weights & Biases and the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import track as rich_track
from rich.table import Column
from rich.text import Text

from lab.runs import Run
from lab.tracking import SPEED, Tracker

log = logging.getLogger("dreamplay")
console = Console()
T = TypeVar("T")

Row = Mapping[str, float | int | str]


def speak() -> None:
    """Send the project's log to the terminal, above any progress bar."""
    log.handlers[:] = [RichHandler(console=console, show_path=False, show_time=False)]
    log.setLevel(logging.INFO)
    log.propagate = False


class Forgiving(logging.FileHandler):
    """A log file that says nothing more where it cannot be written: a full disk must not end a run."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the line."""


@contextlib.contextmanager
def logged(run: Run) -> Iterator[None]:
    """Keep the log in the run's `log.txt` too, and there also the traceback of what ends it."""
    handler = Forgiving(run.log, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        kind, trace = type(error), error.__traceback__
        handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "training ended by an error", (), (kind, error, trace)))
        raise
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # what a full disk had no room for
            handler.close()


class Recorder:
    """Rows of one run, in the order of their steps.

    A row that the disk has no room for is kept in memory and written with the next one; the file never holds half a row
    for longer than that.
    """

    def __init__(self, run: Run, tracker: Tracker, display: Display) -> None:
        self.tracker, self.display = tracker, display
        self._file = run.metrics.open("ab", buffering=0)
        self._written = self._file.tell()
        self._pending = b""
        self._timing = run.timing.open("a", encoding="utf-8")
        self._last = (time.monotonic(), 0)

    def write(self, step: int, row: Row) -> None:
        """Record the metrics of a step, under `step` and their names."""
        whole = {"step": step, **row}
        self._pending += json.dumps(whole).encode() + b"\n"
        speed = self._time(step)
        try:
            self._flush()
        except OSError as error:
            log.warning("metrics.jsonl cannot be written (%s); the rows are kept in memory until it can", error.strerror)
        self.tracker.log({**whole, SPEED: speed})
        self.display.show(step, whole)

    def sync(self) -> int:
        """Force every row to the disk; returns the length of `metrics.jsonl` in bytes.

        Raises:
            OSError: the disk is full or fails.
        """
        self._flush()
        os.fsync(self._file.fileno())
        return self._written

    def _flush(self) -> None:
        if not self._pending:
            return
        try:
            done = self._file.write(self._pending)
            if done != len(self._pending):
                raise OSError(28, "No space left on device")
        except OSError:
            self._file.truncate(self._written)
            raise
        self._written += len(self._pending)
        self._pending = b""

    def _time(self, step: int) -> float:
        """Note when the row was written; returns the steps per second since the last one."""
        now, (before, last) = time.monotonic(), self._last
        self._last = (now, step)
        speed = round((step - last) / max(now - before, 1e-9), 3)
        entry = {"step": step, "time": round(time.time(), 3), "steps_per_second": speed}
        try:
            self._timing.write(json.dumps(entry) + "\n")
            self._timing.flush()
        except OSError:
            pass  # a full disk is reported by the metrics; a lost timing loses nothing else
        return speed

    def start(self, step: int) -> None:
        """Begin to count time at `step`."""
        self._last = (time.monotonic(), step)
        self.display.start(step)

    def close(self, failed: bool = False) -> None:
        """Write what is pending, and let go of the files, the tracker (which shows a failed run as such) and the terminal."""
        self.display.stop()
        try:
            self._flush()
        except OSError as error:
            log.error("the last rows of metrics.jsonl could not be written (%s)", error.strerror)
        self._file.close()
        with contextlib.suppress(OSError):
            self._timing.close()
        self.tracker.finish(exit_code=int(failed))


def cut(run: Run, length: int) -> None:
    """Cut `metrics.jsonl` back to what a checkpoint knows; what came after it will be computed and written again."""
    run.metrics.touch()
    os.truncate(run.metrics, min(length, run.metrics.stat().st_size))


# Terminal


def track(items: Iterable[T], total: int, title: str) -> Iterable[T]:
    """The items, with a progress bar on a terminal while they are gone through."""
    return rich_track(items, title, total, console=console, transient=True, disable=not console.is_terminal)


class Display(Protocol):
    """What a user sees while a run goes on."""

    def start(self, step: int) -> None:
        """Begin at `step`."""

    def advance(self, step: int) -> None:
        """A step is done."""

    def show(self, step: int, row: Row) -> None:
        """A row was recorded."""

    def stop(self) -> None:
        """The run has ended."""


def display(title: str, steps: int) -> Display:
    """A progress bar on a terminal, plain lines in a log file."""
    return Bar(title, steps) if console.is_terminal else Lines(title, steps)


def brief(row: Row) -> str:
    """The metrics of a row that fit a line, the loss first: `loss 93.21  kl 25.3`."""
    shown = {key.partition("/")[2]: value for key, value in row.items() if key.startswith("train/") and isinstance(value, float)}
    shown.pop("gradient_norm", None)
    names = sorted(shown, key=lambda name: name != "loss")[:5]
    return "  ".join(f"{name} {shown[name]:.4g}" for name in names)


class Speed(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        """The recent rate, once there is one."""
        return Text(f"{task.speed:.1f} steps/s" if task.speed else "- steps/s", style="progress.data.speed")


class Latest(ProgressColumn):
    """The latest metrics, as many as there is room for."""

    def render(self, task: Task) -> Text:
        """One line of them."""
        return Text(task.fields["metrics"], style="cyan", no_wrap=True, overflow="ellipsis")


class Bar:
    """A live bar: part done, steps per second, time left, the latest metrics."""

    def __init__(self, title: str, steps: int) -> None:
        whole = Column(no_wrap=True)  # on a narrow terminal only the metrics are cut
        name = TextColumn("{task.description}", style="bold", markup=False, table_column=whole)
        left = TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=whole)
        columns = (name, BarColumn(12), MofNCompleteColumn(table_column=whole), Speed(whole), left, Latest())
        self.progress = Progress(*columns, console=console, speed_estimate_period=10)
        self.task = self.progress.add_task(title, total=steps, metrics="")
        self._drawn = 0.0

    def start(self, step: int) -> None:
        """Begin at `step`."""
        self.progress.update(self.task, completed=step)
        self.progress.start()

    def advance(self, step: int) -> None:
        """Draw at most ten times a second: a step may be far shorter than that."""
        now = time.monotonic()
        if now - self._drawn > 0.1:
            self.progress.update(self.task, completed=step)
            self._drawn = now

    def show(self, step: int, row: Row) -> None:
        """Put the row's metrics behind the bar."""
        self.progress.update(self.task, completed=step, metrics=brief(row) or self.progress.tasks[0].fields["metrics"])

    def stop(self) -> None:
        """Leave the finished bar on the screen."""
        self.progress.stop()


class Lines:
    """A plain line every ten seconds."""

    def __init__(self, title: str, steps: int, every: float = 10.0) -> None:
        self.title, self.steps, self.every = title, steps, every
        self._said = self._began = time.monotonic()
        self._first = self._step = 0
        self._latest: dict[str, Any] = {}

    def start(self, step: int) -> None:
        """Begin at `step`."""
        self._first = self._step = step
        self._said = self._began = time.monotonic()

    def advance(self, step: int) -> None:
        """Print a line if it is time to."""
        self._step = step
        if time.monotonic() - self._said > self.every:
            self._say()

    def show(self, step: int, row: Row) -> None:
        """Keep the row for the next line."""
        self._latest |= row

    def stop(self) -> None:
        """Print the last line."""
        self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        rate = (self._step - self._first) / max(self._said - self._began, 1e-9)
        left = f"{(self.steps - self._step) / rate:.0f} s left" if rate else "- left"
        done = f"{self.title} {self._step}/{self.steps} ({100 * self._step // self.steps} %)"
        console.print(
            f"{done}  {rate:.1f} steps/s  {left}  {brief(self._latest)}", markup=False, emoji=False, highlight=False, soft_wrap=True
        )
