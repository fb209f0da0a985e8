"""Run folders: one per experiment, with all that it read, wrote and measured.

runs/<name>/<UTC time>-<6 chars>/
    config.yaml        every setting, resolved; itself a valid config
    command.txt        the commands that started and resumed the run
    environment.json   the run's id; for every start: code version, libraries, device
    metrics.jsonl      the truth about the run, a row a line; timing.jsonl: its wall-clock side
    log.txt            what was said on the way, and why a run failed
    console.txt        all that a process printed which the studio started; output.txt: one that a sweep started
    checkpoints/  milestones/  media/  export/  wandb/
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shlex
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lab.config import UserError

RUNS = Path("runs")
MOST_FACTS = 1 << 24
"""Bytes that are read of a file of facts; such files have some thousands."""


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def config(self) -> Path:
        """Every setting of the run, as YAML."""
        return self.folder / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The rows that the run recorded."""
        return self.folder / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """What depends on the clock, kept out of the metrics so that those are repeatable."""
        return self.folder / "timing.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, a folder each."""
        return self.folder / "checkpoints"

    @property
    def milestones(self) -> Path:
        """Weights of earlier moments of training, a folder each, as checkpoints are."""
        return self.folder / "milestones"

    @property
    def log(self) -> Path:
        """Warnings and errors, as the terminal showed them."""
        return self.folder / "log.txt"

    @property
    def media(self) -> Path:
        """Pictures, plots and videos."""
        return self.folder / "media"

    @property
    def environment(self) -> Path:
        """The run's id, and where each of its starts took place."""
        return self.folder / "environment.json"

    @property
    def experiment(self) -> str:
        """The kind of experiment, from the first line of the config; empty where there is none."""
        with contextlib.suppress(OSError, UnicodeDecodeError), self.config.open(encoding="utf-8") as file:
            return file.readline(200).removeprefix("experiment:").strip()
        return ""

    @property
    def started(self) -> str:
        """When the run was last started or resumed, UTC, as ISO text that sorts; empty if that is not known."""
        with contextlib.suppress(LookupError, TypeError):
            return str((facts(self.environment) or {})["starts"][-1]["time"])
        return ""

    @property
    def identity(self) -> str:
        """The run's own name in the world, also W&B's id of it; empty before the first start."""
        return str(history(self).get("id", ""))

    def rows(self) -> list[dict[str, Any]]:
        """The recorded rows; a last line that a kill cut short is left out.

        Raises:
            UserError: another line is no row.
        """
        return list(recorded(self.metrics))

    def last_values(self) -> dict[str, Any]:
        """The newest value of every metric."""
        return {key: value for row in self.rows() for key, value in row.items()}


# Reading


def recorded(log: Path) -> Iterator[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, none where there is no such file, without a last line that a kill cut short.

    Raises:
        UserError: another line is no row.
    """
    if not log.exists():
        return
    with log.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                yield _row(line, f"{log}:{number}")


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {line[:60].decode(errors='replace')!r}")
    return row


def facts(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file such as `environment.json`; {} where there is no file, None where it is damaged."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_FACTS + 1)
        found = json.loads(content) if len(content) <= MOST_FACTS else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def starts_in(environment: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The starts that an `environment.json` tells of, the first one first; none where it is damaged."""
    starts = (environment or {}).get("starts")
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def history(run: Run) -> dict[str, Any]:
    """What `environment.json` holds: the id of a run and its starts; {} before the first one.

    Raises:
        UserError: it is damaged.
    """
    known = facts(run.environment)
    if known is None or not isinstance(known.get("starts", []), list):
        raise UserError(f"{run.environment} is damaged; put it back, or delete it: the run then gets a new id, and W&B another run")
    return known


# Making


def create(name: str, folder: Path | None, config: str) -> Run:
    """A new run folder (below `runs/`, unless one is given) holding its config.

    Raises:
        UserError: the given folder already holds a run.
    """
    run = Run(folder or RUNS / name / stamp())
    try:
        if run.config.exists():
            held = f"{run.folder} already holds a run; go on with it by --resume {run.folder}, or by --resume auto beside --run-dir"
            raise UserError(f"{held}, which also begins one; or give another --run-dir")
        run.media.mkdir(parents=True, exist_ok=True)
        write_config(run, config)
    except OSError as error:
        raise UserError(f"{run.folder}: cannot make a run folder here ({error.strerror}); give another place by --run-dir") from None
    return run


def stamp() -> str:
    """A folder name that sorts by time and is nobody else's: `20261121-080000-1f2e3d`, UTC."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def write_config(run: Run, config: str) -> None:
    """Replace the run's config."""
    _replace(run.config, config)


def _replace(path: Path, content: str) -> None:
    """Put new content into a file in one step: a kill or a power cut leaves the old or the new one."""
    from lab import checkpoint  # loads torch, which those who only read runs do without

    temporary = path.with_name(f".{path.name}")
    temporary.write_text(content, encoding="utf-8")
    checkpoint.flush(temporary)
    os.replace(temporary, path)
    checkpoint.flush(path.parent)


def note_start(run: Run, facts: dict[str, Any]) -> None:
    """Add this start of the run to `command.txt` and `environment.json`, with an id for a run that has none."""
    commands = run.folder / "command.txt"
    before = commands.read_text(encoding="utf-8", errors="replace") if commands.exists() else ""
    before = before[: before.rfind("\n") + 1]  # lines were appended once, and a kill could cut one short
    _replace(commands, before + shlex.join([Path(sys.executable).name, *sys.argv]) + "\n")
    known = history(run)
    identity = str(known.get("id") or secrets.token_hex(8))
    _write_environment(run, {"id": identity, "starts": [*known.get("starts", []), {"time": _now(), **versions(), **facts}]})


def note_end(run: Run, error: BaseException | None) -> None:
    """Add to the newest start when it ended, and by which error, if by one; a kill leaves no such note."""
    with contextlib.suppress(OSError, UserError, LookupError, TypeError):  # no reason to fail at the very end
        known = history(run)
        known["starts"][-1] |= {"ended": _now(), "error": error and (str(error) or type(error).__name__)}
        _write_environment(run, known)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_environment(run: Run, content: dict[str, Any]) -> None:
    _replace(run.environment, json.dumps(content, indent=1) + "\n")


def versions() -> dict[str, Any]:
    """Which code, and which Python on which system, this is."""
    return {
        "dreamplay": version("dreamplay"),
        "git": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _git(*words: str) -> str | None:
    """What git says of the checkout that this code runs from, or None where it is none."""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# Owning

LOCK, OWNER = "run.lock", "owner.json"


@dataclass(frozen=True)
class Owner:
    """A process that holds a run."""

    pid: int
    host: str
    since: str


@contextlib.contextmanager
def owned(run: Run) -> Iterator[None]:
    """Hold the run for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it; says which.
    """
    lock, owner = FileLock(run.folder / LOCK, timeout=1), run.folder / OWNER  # whoever asks whether it is alive lets go at once
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{run.folder} is owned by {_described(owner_of(run))}; wait for it to end, or stop it") from None
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def owner_of(run: Run) -> Owner | None:
    """Who holds the run, or held it until a kill; None if nobody does. `alive` tells one from the other."""
    try:
        owner = facts(run.folder / OWNER) or {}
        return Owner(int(owner["pid"]), str(owner["host"]), str(owner["since"]))
    except (ValueError, LookupError, TypeError, OverflowError):
        return None


def alive(run: Run) -> bool:
    """Whether a process holds the run, as the system knows it: a number of a dead process may be another one's by now."""
    try:
        with FileLock(run.folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written to
        return False


def _described(owner: Owner | None) -> str:
    return f"pid {owner.pid} on host {owner.host} since {owner.since}" if owner else "another process"


# Finding


def listing(root: Path = RUNS, experiments: Collection[str] | None = None) -> list[Run]:
    """All runs below a folder, the one last started or resumed first; `experiments` keeps only those kinds."""
    runs = [Run(path.parent) for path in root.glob("*/*/config.yaml")]
    kept = [run for run in runs if experiments is None or run.experiment in experiments]
    return sorted(kept, key=lambda run: (run.started, run.folder.name, str(run.folder)), reverse=True)


@dataclass(frozen=True)
class Found:
    """A run that a user named, and the one checkpoint of it, where a checkpoint folder was named."""

    run: Run
    checkpoint: Path | None = None


def find(text: str, experiments: Collection[str] | None = None) -> Found:
    """The run that `RUN` on a command line means: a run folder, a checkpoint folder, or `latest`.

    Raises:
        UserError: there is none; lists the newest that there are.
    """
    runs = listing(experiments=experiments)
    if text == "latest" and runs:
        return Found(runs[0])
    path = Path(text)
    checkpoint = path if path.name.startswith("step_") and path.is_dir() else None
    run = Run(path.parent.parent if checkpoint else path)
    if not run.config.exists():
        known = "; the newest runs are " + ", ".join(str(run.folder) for run in runs[:3]) if runs else f"; there is none below {RUNS}/ yet"
        raise UserError(f"{text}: no {' or '.join(sorted(experiments or []))} run here".replace("  ", " ") + known)
    if experiments is not None and run.experiment not in experiments:
        raise UserError(f"{text}: a run of '{run.experiment}'; expected {' or '.join(sorted(experiments))}")
    return Found(run, checkpoint)
