"""Weights & Biases as one more reader of `metrics.jsonl`.

The run folder's `metrics.jsonl` is the truth. W&B gets the same rows in the same order, one `log()` call a row, with the
row's index as W&B's own step. Three things follow from that:

- A resumed online run skips the rows that the server has: a resumed training writes the same rows again.
- Offline W&B cannot resume, so every process replays the whole log into one new directory before it goes on live. There
  is always exactly one `wandb/offline-run-*` directory, and it is complete.
- Losing W&B loses nothing: `replay` sends a finished or interrupted run once more, without sending a row twice.

All that W&B writes lies in the `wandb` folder of the run, apart from short-lived sockets in the system's temporary folder.
The settings that `wandb login --host` keeps in the home folder are therefore not read: a server of your own is named by
`WANDB_BASE_URL`. Code, git state, installed packages, host name, console output and system metrics are never captured.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import netrc
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lab.config import Positive, Settings, UserError
from lab.runs import recorded

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

MEDIA_PREFIX = "media/"
"""Keys of `metrics.jsonl` that start so hold the path of a file, relative to the run folder."""

SPEED = "speed/steps_per_second"
"""The one thing that W&B is sent beside the rows of `metrics.jsonl`; it stands in `timing.jsonl`, as it differs from run to run."""

_logger = logging.getLogger("dreamplay")

_IMAGES = (".png", ".jpg", ".jpeg", ".gif")
_VIDEOS = (".mp4", ".webm")

# W&B's own spellings, old and new, of the three modes that make sense here.
_MODES: Mapping[str, Mode] = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}

# wandb 0.31 made the second one its default and still takes a key that was stored for the first.
_DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")

_FINISH_SECONDS = 60.0
_UPLOAD_SECONDS = 600.0

# An empty host and program, which else is the script's whole path, and no symbolic links: a run can be moved or published.
_PRIVATE: Mapping[str, Any] = {
    "allow_val_change": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "host": "",
    "program": "",
    "sagemaker_disable": True,
    "save_code": False,
    "silent": True,
    "symlink": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Settings):
    """Whether and where a run is recorded with Weights & Biases; `metrics.jsonl` is written in any case."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto takes WANDB_MODE where it is set; else online where an API key is configured, offline otherwise."""

    project: str = "dreamplay"
    """W&B project that the run belongs to."""

    entity: str | None = None
    """W&B user or team that owns the project; none means the default of the API key."""

    tags: tuple[str, ...] = ()
    """W&B tags of the run."""

    init_timeout: Positive = 30.0
    """Seconds to wait for the W&B server at the start before this process records offline instead."""


def resolved_mode(config: TrackingConfig) -> Mode:
    """The mode that `auto` stands for here and now; never asks the user anything.

    Raises:
        UserError: online is wanted but no API key is configured, or WANDB_MODE is none that we know.
    """
    mode = _automatic_mode() if config.mode == "auto" else config.mode
    if mode == "online" and not _has_key():
        raise UserError("W&B online needs an API key: run `wandb login` or set WANDB_API_KEY, or choose --tracking.mode offline")
    return mode


def _automatic_mode() -> Mode:
    named = os.environ.get("WANDB_MODE", "")
    if named and named not in _MODES:
        raise UserError(f"WANDB_MODE={named}: expected one of online, offline, disabled")
    return _MODES[named] if named else "online" if _has_key() else "offline"


def _has_key() -> bool:
    """Whether wandb would find credentials without a prompt: it looks in the same places in the same way."""
    return any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or _has_netrc_entry()


def _has_netrc_entry() -> bool:
    try:
        entries = netrc.netrc(_netrc_file())
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(server).netloc,) if server else _DEFAULT_HOSTS
    return any(bool((entries.authenticators(host) or ("", "", ""))[2]) for host in hosts)


def _netrc_file() -> Path:
    named = os.environ.get("NETRC")
    usual = Path.home() / ".netrc"
    return Path(named).expanduser() if named else usual if usual.exists() else Path.home() / "_netrc"


@dataclass(frozen=True)
class _Subject:
    """The run that W&B is told about."""

    folder: Path
    identity: str
    name: str
    group: str
    settings: Mapping[str, Any]
    axes: Mapping[str, str]


class Tracker:
    """A run's connection to W&B. Once it has started, a failure is one warning and the end of tracking, never of the run."""

    def __init__(self) -> None:
        self._run: wandb.Run | None = None
        self._folder = Path()
        self._rows = 0

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        folder: Path,
        *,
        identity: str,
        name: str,
        group: str,
        settings: Mapping[str, Any],
        axes: Mapping[str, str],
    ) -> Tracker:
        """Connect, and send the rows that `metrics.jsonl` already holds; call it after the log is cut back on resume.

        Args:
            config: where to record.
            folder: the run folder.
            identity: W&B's id of the run, the same in every process that goes on with it.
            name: the run's name in the W&B interface.
            group: runs that are shown together, such as the seeds of one setting.
            settings: the resolved settings, shown as the run's config.
            axes: the x-axis of each glob of metrics, such as `{"*": "step", "rollout/*": "env/frames"}`. A row must
                hold the axis of the metrics in it, since nothing is added to a row.

        Raises:
            UserError: the wanted mode is not possible, see `resolved_mode`.
        """
        mode = resolved_mode(config)
        tracker = cls()
        if mode != "disabled":
            with tracker._guarded():
                tracker._connect(config, _Subject(folder, identity, name, group, settings, axes), mode)
        return tracker

    @property
    def where(self) -> str:
        """The address of the run's page, or its offline directory; empty where nothing is tracked."""
        return _where(self._run) if self._run else ""

    def log(self, row: Mapping[str, Any]) -> None:
        """Send the row that was just appended to `metrics.jsonl`."""
        index, self._rows = self._rows, self._rows + 1
        if self._run:
            with self._guarded():
                _send(self._run, self._folder, index, row)

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Set the run's headline values; they are not in `metrics.jsonl`, so a resumed process must set them again."""
        if self._run:
            with self._guarded():
                self._run.summary.update(_headlines(values))

    def finish(self, exit_code: int = 0) -> None:
        """Wait at most a minute for uploads and close; with another exit code than 0 the run is shown as failed."""
        if self._run:
            with self._guarded():
                self._run.finish(exit_code=exit_code)
        self._run = None

    def _connect(self, config: TrackingConfig, subject: _Subject, mode: Mode) -> None:
        self._folder, self._run = subject.folder, _open_or_go_offline(config, subject, mode)
        self._rows = _send_rows(self._run, self._folder)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever goes wrong in there, the training matters more
            self._run = None
            atexit.register(_stop_service)  # before wandb's own, which ends in a traceback where the service has died
            _logger.warning("W&B failed and is off; the run goes on, scripts/sync.py can send the rest later: %s", _one_line(error))


@dataclass(frozen=True)
class Replayed:
    """What `replay` did: how many rows were new to W&B, and the page or directory where the run is."""

    rows: int
    where: str


def replay(
    folder: Path,
    config: TrackingConfig,
    *,
    identity: str,
    name: str,
    group: str,
    settings: Mapping[str, Any],
    axes: Mapping[str, str],
    summary: Mapping[str, Any] | None = None,
) -> Replayed:
    """Send the whole log of a run that is not training now to its one W&B run; a second call finds nothing new.

    Goes online unless `config.mode` is offline; the other arguments are those of `Tracker.start`.

    Raises:
        UserError: no API key, no server, a damaged log, or an upload that took too long.
    """
    mode = resolved_mode(config if config.mode == "offline" else dataclasses.replace(config, mode="online"))
    subject = _Subject(folder, identity, name, group, settings, axes)
    try:
        with _open(config, subject, mode, _UPLOAD_SECONDS) as run:
            rows = _send_rows(run, folder)
            run.summary.update(_headlines(summary or {}))
            return Replayed(max(0, rows - run.starting_step), _where(run))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"W&B did not take the whole of {folder} (start it again to send the rest): {_one_line(error)}") from error


# What both share


def _open_or_go_offline(config: TrackingConfig, subject: _Subject, mode: Mode) -> wandb.Run:
    try:
        return _open(config, subject, mode, _FINISH_SECONDS)
    except Exception as error:
        if mode != "online":
            raise
        _logger.warning("W&B is not reachable, so this process records offline (scripts/sync.py uploads it): %s", _one_line(error))
        _stop_service()
        return _open(config, subject, "offline", _FINISH_SECONDS)


def _stop_service() -> None:
    """End wandb's service process: after a failed `init` it holds the run id, and refuses a second `init`, until it ends."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _open(config: TrackingConfig, subject: _Subject, mode: Mode, finish_seconds: float) -> wandb.Run:
    _confine(subject.folder)
    if mode == "offline":
        _remove_old(subject.folder)
    import wandb

    run = wandb.init(
        project=config.project,
        entity=config.entity,
        tags=config.tags,
        id=subject.identity,
        name=subject.name,
        group=subject.group,
        config=dict(subject.settings),
        mode=mode,
        resume="allow" if mode == "online" else None,
        reinit="create_new",
        settings=_settings(config, subject.folder, finish_seconds),
    )
    if mode == "online":  # only now, so that a server out of reach costs nobody an offline directory
        _remove_old(subject.folder, keep=_directory(run))
    _define_axes(run, subject.axes)
    return run


def _settings(config: TrackingConfig, folder: Path, finish_seconds: float) -> wandb.Settings:
    import wandb

    return wandb.Settings(
        root_dir=str(folder.resolve()),
        init_timeout=config.init_timeout,
        finish_timeout=finish_seconds,
        finish_timeout_raises=True,
        **_PRIVATE,
    )


def _confine(folder: Path) -> None:
    """Keep wandb's files in the run folder, and its messages to itself, for the rest of this process."""
    home = folder.resolve() / "wandb"
    home.mkdir(parents=True, exist_ok=True)
    os.environ["WANDB_DIR"] = str(home.parent)
    for name in ("data", "cache", "config", "artifact"):
        os.environ[f"WANDB_{name.upper()}_DIR"] = str(home / name)
    os.environ["WANDB_SILENT"] = "true"  # as a setting of the run alone it would come after the first messages
    os.environ["WANDB_ERROR_REPORTING"] = "false"


def _remove_old(folder: Path, keep: Path | None = None) -> None:
    """Remove what earlier processes recorded for upload; a later `wandb sync` of it would undo newer rows."""
    for pattern in ("offline-run-*", "run-*"):
        for directory in (folder.resolve() / "wandb").glob(pattern):
            if directory != keep:
                shutil.rmtree(directory, ignore_errors=True)


def _define_axes(run: wandb.Run, axes: Mapping[str, str]) -> None:
    for axis in dict.fromkeys(axes.values()):
        run.define_metric(axis, hidden=True)
    for glob, axis in axes.items():
        # With `step_sync` W&B would write the axis into rows that lack it, and its rows would not be ours.
        run.define_metric(glob, step_metric=axis, step_sync=False)


def _send_rows(run: wandb.Run, folder: Path) -> int:
    """Send what W&B lacks of the log; returns how many rows the log has."""
    count, speeds = 0, _speeds(folder / "timing.jsonl")
    for row in recorded(folder / "metrics.jsonl"):
        speed = speeds.get(row["step"]) if "step" in row else None
        _send(run, folder, count, row if speed is None else {**row, SPEED: speed})
        count += 1
    return count


def _speeds(log: Path) -> dict[int, float]:
    """Steps per second before each step; of a damaged line nothing, since it is no part of what the run found out."""
    speeds = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            entry = json.loads(line)
            speeds[entry["step"]] = entry["steps_per_second"]
    return speeds


def _send(run: wandb.Run, folder: Path, index: int, row: Mapping[str, Any]) -> None:
    if index >= run.starting_step:  # an online run that is resumed has the rows before
        # Without `commit` W&B would hold every row back until the next one comes.
        run.log(_payload(folder, row), step=index, commit=True)


def _payload(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its media opened; a medium that cannot be shown is left out."""
    sent = {key: _media(folder, value) if _is_media(key, value) else value for key, value in row.items()}
    return {key: value for key, value in sent.items() if value is not None or row[key] is None}


def _headlines(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without media, of which W&B keeps the newest in its summary by itself."""
    return {key: value for key, value in values.items() if not _is_media(key, value)}


def _is_media(key: str, value: Any) -> bool:
    return key.startswith(MEDIA_PREFIX) and isinstance(value, str)


def _media(folder: Path, relative: str) -> wandb.Image | wandb.Video | None:
    import wandb

    path = (folder / relative).resolve()
    kinds: dict[str, type[wandb.Image | wandb.Video]] = {**dict.fromkeys(_IMAGES, wandb.Image), **dict.fromkeys(_VIDEOS, wandb.Video)}
    kind = kinds.get(path.suffix.lower())
    # A run folder may come from somewhere else: its log must not send other files of this machine to a server.
    if kind is None or not path.is_relative_to(folder.resolve()) or not path.is_file():
        _logger.warning("W&B is sent no %s: not an image or video in the run folder", relative)
        return None
    try:
        return kind(str(path))
    except (OSError, ValueError) as error:
        _logger.warning("W&B is sent no %s: %s", relative, _one_line(error))
        return None


def _directory(run: wandb.Run) -> Path:
    return Path(run.dir).parent


def _where(run: wandb.Run) -> str:
    return run.url or str(_directory(run))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
