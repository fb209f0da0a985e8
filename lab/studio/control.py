"""Stopping a run of this machine, and going on with one, as a user would in a terminal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from lab import runs
from lab.config import UserError
from lab.runs import Owner, Run
from lab.status import status

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CONSOLE = "console.txt"
"""In a run's folder: what a terminal would have shown of the run since the studio went on with it."""
STOPPED = 75

_asked: set[Owner] = set()
"""Processes that were asked to stop: a second signal would end one at once, without saving."""


def stop(run: Run) -> None:
    """Ask a run to finish its step, save and end; what SIGTERM does.

    Raises:
        UserError: it is not running on this machine, or is stopping already.
    """
    owner = _owner(run)
    if owner in _asked:
        raise UserError("This run has been asked to stop already; it saves and ends after its step.")
    with _process(owner.pid) as send:
        # Only now, that the number cannot become another process's, is it sure that it is the run's.
        if _owner(run) != owner:
            raise UserError("This run has just ended.")
        _asked.add(owner)
        send(signal.SIGTERM)


def _owner(run: Run) -> Owner:
    """The process of this machine that holds the run's lock."""
    owner = runs.owner_of(run)
    if owner is None or owner.host != socket.gethostname() or not runs.alive(run):
        raise UserError("This run is not at work on this machine.")
    return owner


class _process:
    """A hold on a process: a signal reaches it or nobody, even if its number is given to another in between."""

    def __init__(self, pid: int) -> None:
        self.pid, self._handle = pid, -1

    def __enter__(self) -> Callable[[signal.Signals], None]:
        try:
            self._handle = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else -1
        except ProcessLookupError:
            raise UserError("This run has just ended.") from None
        return self._send

    def __exit__(self, *error: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    def _send(self, number: signal.Signals) -> None:
        try:
            if self._handle >= 0:
                signal.pidfd_send_signal(self._handle, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            raise UserError("This run has just ended.") from None
        except PermissionError:
            raise UserError(f"This run belongs to another user: stop process {self.pid} as that user.") from None


# Going on


def script_of(run: Run) -> Path | None:
    """The script that trains runs of this kind, out of those that there are; None if there is none."""
    wanted = f"train_{run.experiment}.py"
    return next((path for path in SCRIPTS.glob("train_*.py") if path.name == wanted), None)


def resume_command(run: Run) -> list[str]:
    """The words that go on with a run.

    Raises:
        UserError: nothing trains runs of its kind.
    """
    script = script_of(run)
    if script is None:
        raise UserError(f"There is no script here that trains a run of '{run.experiment}'.")
    return [sys.executable, str(script), "--resume", str(run.folder.resolve())]


def resume(run: Run, ended: Callable[[str], None] = lambda last: None) -> None:
    """Go on with a run in a process of its own, which lives on when the studio ends.

    Args:
        ended: called, from another thread, with the last line that was said if the process fails.

    Raises:
        UserError: it is running, or cannot be started.
    """
    if status(run).state == "running":
        raise UserError("This run is at work.")
    command = resume_command(run)
    try:
        with (run.folder / CONSOLE).open("ab") as output:
            began = output.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    except OSError as error:
        raise UserError(f"This run cannot be started: {error.strerror}.") from None
    threading.Thread(target=_wait, args=(run, process, began, ended), daemon=True).start()


def _wait(run: Run, process: subprocess.Popen[bytes], began: int, ended: Callable[[str], None]) -> None:
    """Take leave of a process when it ends, and tell of one that failed."""
    code = process.wait()
    if code not in (0, STOPPED):
        ended(last_line(run, began) or f"it ended with exit code {code}")


def last_line(run: Run, began: int) -> str:
    """The last line that was said on the terminal from byte `began` on; empty if nothing was."""
    try:
        with (run.folder / CONSOLE).open("rb") as file:
            file.seek(max(began, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
