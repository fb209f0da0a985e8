"""Processes that are killed at the k-th thing they ask of the disk, for every k, and what then becomes of their files.

`python -m tests.exact.crashing FOLDER MAP ...` draws maps of the crash points, and leaves them as FOLDER/MAP.json: the names of the
points, the step of the newest checkpoint after a crash at each, and whatever was wrong then. A process is killed by SIGKILL, so nothing
of Python cleans up; a power cut also takes from the disk what was never flushed to it.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from lab import checkpoint, launch, runs, status
from lab.experiment import Experiment, TrainerConfig
from lab.optimizer import OptimizerConfig
from lab.recorder import speak
from lab.runs import Run
from lab.tracking import TrackingConfig
from lab.trainer import STOPPED

REAL = SimpleNamespace(
    open=io.open, save_file=checkpoint.save_file, rename=os.rename, unlink=os.unlink, rmdir=os.rmdir, truncate=os.truncate
)


# A disk that fails


class Disk:
    """Counts what this process asks of the disk below a folder, before, within and after it; at the `stop`-th point the process ends.

    With `power`, content that was never flushed is lost then, and so are new files and renames in folders that were not flushed
    since: the least that POSIX promises, which is less than most file systems keep.
    """

    def __init__(self, root: Path, stop: int = -1, power: bool = False, without: str = ".") -> None:
        """Args:
        without: a folder below the root whose operations are not counted.
        """
        self.root, self.stop, self.power, self.without = root.resolve(), stop, power, root.resolve() / without
        self.names: list[str] = []
        self.durable: dict[int, int] = {}  # by inode: bytes that are flushed
        self.entries: dict[int, int] = {}  # by inode of what is new: that of its folder, which was not flushed since
        self.renames: list[tuple[Path, Path, bytes | None]] = []

    def point(self, name: str, torn: Callable[[], Any] = lambda: None) -> None:
        """A moment to crash at, with the operation done as far as `torn` does it."""
        if len(self.names) == self.stop:
            torn()
            if self.power:
                self.cut_power()
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def watch(self) -> None:
        """From now on every operation of this process passes here."""
        io.open = builtins.open = self.opened  # type: ignore[assignment]
        checkpoint.save_file = self.save_file
        os.open = self.around("open", os.open, self.is_new)  # type: ignore[assignment]
        os.fsync = self.around("fsync", os.fsync, self.is_flushed)  # type: ignore[assignment]
        for name, note in {"mkdir": self.is_new, "unlink": self.is_gone, "rmdir": self.is_gone, "truncate": None}.items():
            setattr(os, name, self.around(name, getattr(os, name), note))
        os.remove = os.unlink
        os.rename, os.replace = self.moved("rename", os.rename), self.moved("replace", os.replace)  # type: ignore[assignment]

    def place(self, path: Any, options: dict[str, Any]) -> Path | None:
        """Which file or folder of ours is meant, if it is one of ours."""
        folder = options.get("dir_fd")
        where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        whole = Path(os.path.abspath(where if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), where)))
        return whole if self.ours(whole) else None

    def ours(self, path: Path) -> bool:
        """Whether operations on a path count."""
        return path.is_relative_to(self.root) and (self.without == self.root or not path.is_relative_to(self.without))

    def around(self, name: str, real: Callable[..., Any], note: Callable[[Path, bool], None] | None) -> Callable[..., Any]:
        """A function of `os` with a point before and after it."""

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            place = self.place(path, options)
            reads = name == "open" and not arguments[0] & (os.O_WRONLY | os.O_RDWR)
            if place is None or reads:
                return real(path, *arguments, **options)
            existed = place.exists()
            self.point(f"before {name} {place.name}")
            if note == self.is_gone and existed:
                note(place, existed)
            result = real(path, *arguments, **options)
            if note and note != self.is_gone:
                note(place, existed)
            self.point(f"after {name} {place.name}")
            return result

        return call

    def moved(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """`rename` and `replace`, which have two paths."""

        def call(source: Any, target: Any, **options: Any) -> None:
            here, there = Path(os.path.abspath(source)), Path(os.path.abspath(target))
            if not self.ours(there):
                return real(source, target, **options)
            self.point(f"before {name} {there.name}")
            self.renames.append((here, there, there.read_bytes() if there.is_file() else None))
            real(source, target, **options)
            return self.point(f"after {name} {there.name}")

        return call

    def opened(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        """`open`, whose files have points of their own where they are written to."""
        path = None if isinstance(file, int) or not set(mode) & set("wax+") else self.place(file, {})
        if path is None:
            return REAL.open(file, mode, *arguments, **options)
        existed = path.exists()
        self.point(f"before open {path.name}")
        result = REAL.open(file, mode, *arguments, **options)
        self.is_new(path, existed)
        self.durable.setdefault(path.stat().st_ino, path.stat().st_size)
        self.point(f"after open {path.name}")
        return Written(self, result, path.name)

    def save_file(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        """safetensors' own, which writes outside of Python."""

        def half() -> None:
            REAL.save_file(tensors, path)
            REAL.truncate(path, path.stat().st_size // 2)

        if not self.ours(path):
            return REAL.save_file(tensors, path)
        existed = path.exists()
        self.point(f"before save_file {path.name}")
        self.point(f"within save_file {path.name}", half)
        REAL.save_file(tensors, path)
        self.is_new(path, existed)
        self.durable[path.stat().st_ino] = 0
        return self.point(f"after save_file {path.name}")

    # What a power cut would take

    def is_new(self, path: Path, existed: bool) -> None:
        if not existed:
            self.entries[path.stat().st_ino] = path.parent.stat().st_ino

    def is_gone(self, path: Path, existed: bool) -> None:
        inode = path.lstat().st_ino  # which another file may be given now
        self.entries.pop(inode, None)
        self.durable.pop(inode, None)

    def is_flushed(self, path: Path, existed: bool) -> None:
        inode = path.stat().st_ino
        if path.is_dir():
            self.entries = {new: folder for new, folder in self.entries.items() if folder != inode}
            self.renames = [(here, there, old) for here, there, old in self.renames if there.parent != path]
        else:
            self.durable.pop(inode, None)

    def cut_power(self) -> None:
        """Undo renames, remove files and cut contents that may not have reached the disk."""
        for here, there, old in reversed(self.renames):
            if there.exists():
                REAL.rename(there, here)
                if old is not None:
                    with REAL.open(there, "wb") as file:
                        file.write(old)
        for path in sorted(self.root.rglob("*"), reverse=True):  # what is in a folder before the folder
            inode = path.lstat().st_ino
            if inode in self.entries:
                for lost in (*sorted(path.rglob("*"), reverse=True), path):
                    (REAL.rmdir if lost.is_dir() else REAL.unlink)(lost)
            elif inode in self.durable:
                REAL.truncate(path, min(self.durable[inode], path.stat().st_size))


class Written:
    """A file that is being written to: every write has a point before it, in its middle and after it."""

    def __init__(self, disk: Disk, file: Any, name: str) -> None:
        self.disk, self.file, self.name = disk, file, name

    def write(self, data: Any) -> int:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.disk.durable.setdefault(os.fstat(self.file.fileno()).st_ino, os.fstat(self.file.fileno()).st_size)
        self.disk.point(f"before write {self.name}")
        self.disk.point(f"within write {self.name}", half)
        done: int = self.file.write(data)
        self.file.flush()
        self.disk.point(f"after write {self.name}")
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def forked(work: Callable[[], Any]) -> int:
    """Do something in a child of this process; returns how it ended, -9 for SIGKILL."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def points(root: Path, work: Callable[[], Any], without: str = ".") -> list[str]:
    """The names of all points of some work, from a run of it in which nothing fails."""
    disk, notes = Disk(root, without=without), root.parent / "points.json"

    def counted() -> None:
        disk.watch()
        work()
        disk.point("the end")
        REAL.open(notes, "w").write(json.dumps(disk.names))

    assert forked(counted) == 0
    return json.loads(notes.read_text())


def crashed(root: Path, work: Callable[[], Any], stop: int, power: bool = False, without: str = ".") -> int:
    """Do some work in a process that is killed at the `stop`-th point; returns how it ended."""

    def watched() -> None:
        disk = Disk(root, stop, power, without)
        disk.watch()
        work()
        disk.point("the end")

    return forked(watched)


def contents(root: Path, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, as bytes."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: content for name, content in found.items() if name not in without}


# Saves


class Part:
    """Any state, as it is."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Diary:
    """A part that grows: rows that follow from their number, of which the newest `ROOM` are needed."""

    ROOM = 12

    def __init__(self, rows: int = 0) -> None:
        self.numbers = dict(enumerate(range(100, 100 + rows)))
        self.written = rows

    @property
    def oldest(self) -> int:
        return max(0, self.written - self.ROOM)

    def read(self, first: int, last: int) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor([self.numbers[row] for row in range(first, last)])}

    def write(self, first: int, rows: dict[str, torch.Tensor]) -> None:
        self.numbers |= dict(enumerate(rows["number"].tolist(), first))

    def state_dict(self) -> dict[str, Any]:
        return {"written": self.written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.written = state["written"]

    @property
    def needed(self) -> list[int]:
        return [self.numbers[row] for row in range(self.oldest, self.written)]


checkpoint.SEGMENT = 3 * 8  # so that a save writes some segments


def parts(step: int, growing: bool) -> dict[str, Any]:
    """What a checkpoint of `step` holds: all follows from it."""
    plain = {"model": Part({"w": torch.full((50,), float(step))}), "optimizer": Part({"state": {0: {"step": torch.tensor(step)}}})}
    return plain | ({"diary": Diary(5 * step)} if growing else {})


def wrong(folder: Path, growing: bool) -> str:
    """What is wrong with a checkpoint as it is read back; empty if it is what was saved."""
    found, fresh = checkpoint.load(folder), parts(0, growing)
    checkpoint.restore(fresh, found.parts, found.segments)
    right = fresh["model"].state["w"].equal(torch.full((50,), float(found.step))) and found.notes == {"of": found.step}
    right = right and int(fresh["optimizer"].state["state"][0]["step"]) == found.step
    right = right and (not growing or fresh["diary"].needed == Diary(5 * found.step).needed)
    return "" if right else f"{folder.name} holds something else"


def saves(folder: Path, growing: bool, power: bool, first: bool = False) -> dict[str, Any]:
    """A map of the save of step 3, behind those of 1 and 2, or as the first one there is."""

    def save(root: Path, *steps: int) -> None:
        for step in steps:
            checkpoint.save(root / "checkpoints", step, parts(step, growing), {"of": step}, keep=2)

    def copy(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        return Path(shutil.copytree(folder / "base", folder / name))

    before = () if first else (1, 2)
    (folder / "base").mkdir()
    save(folder / "base", *before)
    save(copy("old"), 4)  # what must stand there in the end, where the crash left the old one, and where it left the new one
    save(copy("new"), 3, 4)
    in_the_end = {max(before, default=0): contents(folder / "old"), 3: contents(folder / "new")}
    dry = copy("dry")
    names, newest, bad = points(dry, lambda: save(dry, 3)), [], []
    for index in range(len(names) + 1):
        place = copy("crash")
        ended = crashed(place, lambda place=place: save(place, 3), index, power)
        found = checkpoint.load_newest(place / "checkpoints")
        newest.append(found.step if found else 0)
        problems = [wrong(checkpoint.folders(place / "checkpoints")[0], growing)] if found else []
        save(place, 4)
        problems += [wrong(kept, growing) for kept in checkpoint.folders(place / "checkpoints")]
        if ended != (-9 if index < len(names) else 0) or any(problems) or contents(place) != in_the_end.get(newest[-1]):
            bad.append([index, names[index : index + 1], ended, newest[-1], *problems, *sorted(contents(place))])
    return {"names": names, "newest": newest, "bad": bad}


# Runs


@dataclass(frozen=True, kw_only=True)
class Small(Experiment):
    """The smallest training there is."""

    experiment: ClassVar[str] = "small"

    name: str = "small"
    trainer: TrainerConfig = TrainerConfig(steps=3, log_every=1, save_every=1, preview_every=2, threads=1, milestones=0)
    optimizer: OptimizerConfig = OptimizerConfig(ema=0.0)
    tracking: TrackingConfig = TrackingConfig(mode="disabled")

    def task(self, trainer: Any) -> Any:
        return SmallTask(self, trainer)


class SmallTask:
    """A linear layer that learns a constant, and writes five rows a step into its diary."""

    facts: ClassVar[dict[str, int]] = {}

    def __init__(self, experiment: Small, trainer: Any) -> None:
        layer = nn.Linear(2, 1)
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
        self.learner, self.diary = trainer.learner(layer, experiment.optimizer), Diary()

    def parts(self) -> dict[str, Any]:
        return {**self.learner.parts(), "diary": self.diary}

    def step(self, trainer: Any) -> Any:
        self.diary.numbers |= {row: 100 + row for row in range(self.diary.written, self.diary.written + 5)}
        self.diary.written += 5

        def loss(shard: Any) -> Any:
            numbers = torch.randn(4, 2, generator=torch.Generator().manual_seed(trainer.step))
            return (self.learner.module(numbers) - 1).square().mean(), {}

        return trainer.minimise(self.learner, loss, 4)

    def hooks(self, trainer: Any) -> list[Any]:
        return []


SMALL = Small()
WITH_MILESTONES = replace(SMALL, trainer=replace(SMALL.trainer, steps=2, save_every=2, milestones=2))
"""Its first milestone is followed by no checkpoint at once."""
AGENT = {
    "game.name": "catch",
    "game.stack": "2",
    "dqn.backbone": "small",
    "dqn.hidden": "8",
    "dqn.batch-size": "8",
    "dqn.learning-starts": "16",
    "replay.capacity": "480",
    "test.games": "1",
    "test.video-every": "0",
    "trainer.steps": "2",
    "trainer.save-every": "2",
    "trainer.log-every": "1",
    "trainer.preview-every": "2",
    "trainer.threads": "1",
    "trainer.milestones": "0",
    "tracking.mode": "disabled",
}

HISTORY = ("log.txt", "command.txt", "environment.json", "timing.jsonl", "run.lock")
"""What tells how often a run was started, and when: all else must be the same after a crash."""


def start_or_resume(default: Experiment, run: Run, options: Sequence[str]) -> int:
    """What a user does after a crash: go on with a run, or begin it where there is none yet."""
    return launch.launch(default, "", ["--resume" if run.config.exists() else "--run-dir", str(run.folder), *options])


def examine(run: Run, reference: Run, default: Experiment, options: Sequence[str]) -> tuple[int, list[str]]:
    """After a crash: the newest checkpoint, and all that is wrong with the run, now or once it went on to its end."""
    problems = []
    status.status(run)  # which must bear every state of the files, as must those who read the rows
    if run.rows() != reference.rows()[: len(run.rows())]:
        problems.append("other rows")
    found = checkpoint.load_newest(run.checkpoints)
    if (code := start_or_resume(default, run, options)) == STOPPED:
        raise SystemExit("a signal asked this process to stop: the map is not drawn to its end")
    elif code:
        problems.append(f"did not go on: exit code {code}")
    commands, command = ((place.folder / "command.txt").read_text().splitlines() for place in (run, reference))
    if set(commands) != set(command):
        problems.append("command.txt")
    here, there = contents(run.folder, HISTORY), contents(reference.folder, HISTORY)
    if (
        found and found.step == reference.rows()[-1]["step"]
    ):  # nothing was left to do, so no save deletes the old one that this save was about to
        old = sorted(path.name for path in run.checkpoints.glob("step_*"))[:-2]
        here = {name: content for name, content in here.items() if name.split("/")[1:2] not in [[name] for name in old]}
    problems += sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if status.status(run).state != "finished" or json.loads(run.environment.read_text())["starts"][-1]["error"]:
        problems.append(f"is {status.status(run).state}")
    return found.step if found else 0, problems


def whole_run(
    folder: Path, default: Experiment, options: Sequence[str] = (), damaged: bool = False, without: str = ".", power: bool = False
) -> dict[str, Any]:
    """A map of a whole run; with `damaged`, of its resumption from a newest checkpoint that is damaged."""
    reference, base, run = Run(folder / "reference"), folder / "base", Run(folder / "run")
    base.mkdir()
    assert forked(lambda: start_or_resume(default, reference, options)) == 0
    if damaged:
        begun = points(folder / "begun", lambda: start_or_resume(default, Run(folder / "begun"), options))
        commits = [index for index, name in enumerate(begun) if name.startswith("after rename step_")]
        assert crashed(base, lambda: start_or_resume(default, Run(base), options), commits[-2] + 1) == -9
        (checkpoint.folders(Run(base).checkpoints)[0] / "model.json").write_text("")
    dry = Run(Path(shutil.copytree(base, folder / "dry")))
    names, newest, bad = points(dry.folder, lambda: start_or_resume(default, dry, options), without), [], []
    for index in range(len(names) + 1):
        shutil.rmtree(run.folder, ignore_errors=True)
        shutil.copytree(base, run.folder)
        ended = crashed(run.folder, lambda: start_or_resume(default, run, options), index, power, without)
        step, problems = examine(run, reference, default, options)
        newest.append(step)
        if ended != (-9 if index < len(names) else 0) or problems:
            bad.append([index, names[index : index + 1], ended, *problems])
    return {"names": names, "newest": newest, "bad": bad}


def agent(folder: Path) -> dict[str, Any]:
    """A map of a real agent's run."""
    from rl.dqn import EXPERIMENT

    return whole_run(folder, EXPERIMENT, [word for key, value in AGENT.items() for word in (f"--{key}", value)])


MAPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain": lambda folder: saves(folder, growing=False, power=False),
    "growing": lambda folder: saves(folder, growing=True, power=False),
    "first": lambda folder: saves(folder, growing=True, power=False, first=True),
    "plain-power": lambda folder: saves(folder, growing=False, power=True),
    "growing-power": lambda folder: saves(folder, growing=True, power=True),
    "first-power": lambda folder: saves(folder, growing=True, power=True, first=True),
    "run-files": lambda folder: whole_run(folder, SMALL, without="checkpoints"),
    "run-files-power": lambda folder: whole_run(folder, SMALL, without="checkpoints", power=True),
    "milestones-power": lambda folder: whole_run(folder, WITH_MILESTONES, without="checkpoints", power=True),
    "run-power": lambda folder: whole_run(folder, SMALL, power=True),
    "resume-files": lambda folder: whole_run(folder, SMALL, damaged=True, without="checkpoints"),
    "run": lambda folder: whole_run(folder, SMALL),
    "resume": lambda folder: whole_run(folder, SMALL, damaged=True),
    "agent": agent,
}


def main(folder: Path, *maps: str) -> None:
    """Draw some maps."""
    torch.set_num_threads(1)
    speak()  # or warnings of damage, which are to be, would go to stderr, where there must be nothing
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # a killed process loses nothing that it wrote, and a power cut is only played
    runs._git = lambda *words: None  # which takes longer than all the rest
    launch._draw = lambda *run: None  # as does matplotlib; the plot is drawn anew at every end
    gc.freeze()  # children that collect would copy all the memory
    for name in maps:
        (folder / name).mkdir()
        with contextlib.redirect_stdout(io.StringIO()):  # of warnings there are thousands
            drawn = MAPS[name](folder / name)
        (folder / f"{name}.json").write_text(json.dumps(drawn))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
