"""Parts that grow: each save writes only new rows, checkpoints share them, and what is put back is what there was."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from lab import checkpoint
from lab.checkpoint import DamagedCheckpoint, Growing, folders, load, load_newest, restore, save
from lab.config import UserError
from lab.distributed import World
from lab.experiment import Experiment, TrainerConfig
from lab.recorder import Lines, Recorder
from lab.runs import Run, create
from lab.tracking import Tracker, TrackingConfig
from lab.trainer import Trainer


class Part:
    """Any state, as it is."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Diary:
    """Rows that follow from their number and a `flavour`; the newest `room` of them are needed."""

    def __init__(self, room=1000, flavour=0):
        self.room, self.flavour = room, flavour
        self.rows: list[tuple[int, int]] = []
        self.asked: list[tuple[int, int]] = []

    def grow(self, count):
        self.rows += [(row, self.flavour) for row in range(self.written, self.written + count)]
        return self

    @property
    def written(self):
        return len(self.rows)

    @property
    def oldest(self):
        return max(0, self.written - self.room)

    @property
    def needed(self):
        return self.rows[self.oldest :]

    def read(self, first, last):
        assert self.oldest <= first < last <= self.written
        self.asked.append((first, last))
        rows = torch.tensor(self.rows[first:last])
        return {"number": rows[:, 0].clone(), "picture": rows[:, 1:].expand(-1, 6).to(torch.uint8).contiguous()}

    def write(self, first, rows):
        assert first <= self.written  # no gap behind the rows that are needed
        self.rows += [(-1, -1)] * (first + len(rows["number"]) - self.written)
        for index, (number, picture) in enumerate(zip(rows["number"].tolist(), rows["picture"].tolist(), strict=True)):
            assert picture == picture[:1] * 6
            self.rows[first + index] = (number, picture[0])

    def state_dict(self):
        return {"written": self.written}

    def load_state_dict(self, state):
        assert self.written == state["written"]


ROW = 8 + 6
"""Bytes of a row."""


class Resumed(Diary):
    """A fresh one to put rows back into, which begins at any of them."""

    def write(self, first, rows):
        if not self.rows:
            self.rows = [(-1, -1)] * first
        super().write(first, rows)


def put_back(folder: Path, room=1000) -> Diary:
    found, diary = load(folder), Resumed(room)
    restore({part: diary if part == "diary" else Part({}) for part in found.parts}, found.parts, found.segments)
    return diary


def keep_diary(root: Path, step: int, diary: Diary, keep=2) -> Path:
    return save(root, step, {"diary": diary, "model": Part({"w": torch.ones(2) * step})}, {"metrics_bytes": 0}, keep)


def segments(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "segments").iterdir())


def name(first: int, last: int) -> str:
    return f"diary_{first:012d}_{last:012d}.safetensors"


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


# Saving


def test_what_has_rows_is_known_from_what_has_none():
    assert isinstance(Diary(), Growing)
    assert not isinstance(Part({}), Growing)
    assert not isinstance(torch.nn.Linear(1, 1), Growing)


def test_a_save_writes_only_the_rows_that_are_new(tmp_path):
    diary = Diary().grow(5)
    keep_diary(tmp_path, 1, diary)
    old = tmp_path / "segments" / name(0, 5)
    before = (old.read_bytes(), old.stat().st_mtime_ns, old.stat().st_ino)
    diary.asked.clear()
    keep_diary(tmp_path, 2, diary.grow(3))
    assert segments(tmp_path) == [name(0, 5), name(5, 8)]
    assert (old.read_bytes(), old.stat().st_mtime_ns, old.stat().st_ino) == before
    assert min(first for first, _ in diary.asked) == 5
    assert (tmp_path / "segments" / name(5, 8)).stat().st_size < old.stat().st_size


def test_nothing_new_writes_no_segment(tmp_path):
    diary = Diary().grow(5)
    keep_diary(tmp_path, 1, diary)
    keep_diary(tmp_path, 2, diary)
    assert segments(tmp_path) == [name(0, 5)]
    assert put_back(tmp_path / "step_000000002").rows == diary.rows


def test_a_part_without_rows_yet_has_no_segments(tmp_path):
    folder = keep_diary(tmp_path, 1, Diary())
    assert segments(tmp_path) == []
    assert put_back(folder).rows == []


def test_rows_come_back_from_every_checkpoint_that_is_kept(tmp_path):
    diary, known = Diary(), {}
    for step in range(1, 8):
        known[f"step_{step:09d}"] = list(diary.grow(step).rows)
        keep_diary(tmp_path, step, diary, keep=4)
    assert len(folders(tmp_path)) == 4
    for folder in folders(tmp_path):
        assert put_back(folder).rows == known[folder.name]


def test_two_parts_that_grow_keep_their_rows_apart(tmp_path):
    parts = {"diary": Diary(flavour=1).grow(4), "other": Diary(flavour=2).grow(6)}
    for step in (1, 2):
        save(tmp_path, step, parts, {}, 2)
        for part in parts.values():
            part.grow(3)
    found, fresh = load(tmp_path / "step_000000002"), {"diary": Diary(), "other": Diary()}
    restore(fresh, found.parts, found.segments)
    assert fresh["diary"].rows == parts["diary"].rows[:7]
    assert fresh["other"].rows == parts["other"].rows[:9]


def test_old_segments_go_only_when_no_checkpoint_that_is_kept_needs_them(tmp_path):
    diary, needed = Diary(room=10), {}
    for step in range(1, 30):
        needed[step] = list(diary.grow(1 + step % 4).needed)
        keep_diary(tmp_path, step, diary, keep=3)
        listed = {entry["file"] for folder in folders(tmp_path) for entry in manifest(folder)["segments"]["diary"]}
        assert set(segments(tmp_path)) == listed
        for folder in folders(tmp_path):
            assert put_back(folder, room=10).needed == needed[int(folder.name[5:])]
    assert diary.written > 5 * diary.room
    assert name(0, 2) not in segments(tmp_path)
    assert len(segments(tmp_path)) < 12


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["manifest"]


def test_rows_that_were_overwritten_before_they_were_ever_saved_leave_no_gap(tmp_path):
    diary = Diary(room=10).grow(8)
    keep_diary(tmp_path, 1, diary)
    folder = keep_diary(tmp_path, 2, diary.grow(95))
    assert [(entry["first"], entry["last"]) for entry in manifest(folder)["segments"]["diary"]] == [(93, 103)]
    assert put_back(folder, room=10).needed == diary.needed


def test_a_segment_is_cut_where_it_would_take_too_much_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SEGMENT", 3 * ROW)
    diary = Diary().grow(8)
    folder = keep_diary(tmp_path, 1, diary)
    assert segments(tmp_path) == [name(0, 3), name(3, 6), name(6, 8)]
    assert max(last - first for first, last in diary.asked) == 3
    assert put_back(folder).rows == diary.rows


def test_a_row_larger_than_a_segment_gets_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SEGMENT", ROW - 1)
    diary = Diary().grow(3)
    folder = keep_diary(tmp_path, 1, diary)
    assert segments(tmp_path) == [name(0, 1), name(1, 2), name(2, 3)]
    assert put_back(folder).rows == diary.rows


def test_segments_are_on_the_disk_before_the_rename_that_commits_the_checkpoint(tmp_path, monkeypatch):
    flushed, fsync, rename = set(), os.fsync, os.rename

    def watched_fsync(descriptor):
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def watched_rename(source, target):
        assert {path.stat().st_ino for path in (root / "segments", *(root / "segments").iterdir())} <= flushed
        flushed.add("renamed")
        rename(source, target)

    root = tmp_path.resolve()
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    keep_diary(root, 1, Diary().grow(4))
    assert "renamed" in flushed


# Damage


@pytest.fixture
def two(tmp_path):
    """The newest of two checkpoints; they share the rows 0 to 5, and 5 to 8 belong to it alone."""
    diary = Diary().grow(5)
    keep_diary(tmp_path, 1, diary)
    return keep_diary(tmp_path, 2, diary.grow(3))


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes() + b"x")]
)
def test_a_damaged_or_missing_segment_is_named_and_only_the_checkpoints_that_need_it_are_lost(two, damage):
    damage(two.parent / "segments" / name(5, 8))
    with pytest.raises(DamagedCheckpoint, match=name(5, 8)):
        load(two)
    assert load_newest(two.parent).step == 1
    damage(two.parent / "segments" / name(0, 5))
    with pytest.raises(DamagedCheckpoint, match=name(0, 5)):
        load(two.parent / "step_000000001")
    assert load_newest(two.parent) is None


def test_another_segment_in_place_of_the_right_one_is_noticed(two):
    shutil.copy(two.parent / "segments" / name(0, 5), two.parent / "segments" / name(5, 8))
    with pytest.raises(DamagedCheckpoint, match="is not what was saved"):
        load(two)


def test_whoever_wants_only_some_parts_does_not_need_the_rows(two, monkeypatch):
    shutil.rmtree(two.parent / "segments")
    with pytest.raises(DamagedCheckpoint, match="segments"):
        load(two)
    found = load(two, only=["model"])
    assert list(found.parts) == ["model"]
    assert not found.segments
    assert found.parts["model"]["w"].tolist() == [2.0, 2.0]
    assert load_newest(two.parent, only=["model"]).step == 2


def test_what_killed_saves_left_among_the_segments_is_replaced_or_removed(tmp_path):
    diary = Diary().grow(5)
    keep_diary(tmp_path, 1, diary)
    for leftover in (name(5, 8), name(5, 6), f".{name(5, 8)}"):
        (tmp_path / "segments" / leftover).write_bytes(b"half a segment")
    folder = keep_diary(tmp_path, 2, diary.grow(3))
    assert segments(tmp_path) == [name(0, 5), name(5, 8)]
    assert put_back(folder).rows == diary.rows


def test_all_is_written_again_where_the_list_before_is_damaged(tmp_path):
    diary = Diary().grow(5)
    flip(keep_diary(tmp_path, 1, diary) / "manifest.json")
    diary.asked.clear()
    folder = keep_diary(tmp_path, 2, diary.grow(3))
    assert min(first for first, _ in diary.asked) == 0
    assert put_back(folder).rows == diary.rows


def test_nothing_is_dropped_while_a_list_is_damaged(two):
    """Its file could be mended, or be the only thing that is wrong."""
    diary = put_back(two)
    flip(two.parent / "step_000000001" / "manifest.json")
    (two.parent / "segments" / "unknown").write_bytes(b"")
    keep_diary(two.parent, 3, diary.grow(1), keep=3)
    assert "unknown" in segments(two.parent)
    keep_diary(two.parent, 4, diary.grow(1), keep=2)  # by now it is gone
    assert "unknown" not in segments(two.parent)


def test_saves_that_fail_leave_no_rows_behind(tmp_path, monkeypatch):
    """On a full disk every failed save would otherwise leave its rows and make the disk fuller still."""

    def full(*_):
        raise OSError("no space left on device")

    diary = Diary().grow(5)
    keep_diary(tmp_path, 1, diary)
    for place in ("_write", "flush"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, place, full)
            for step in (2, 3, 4):
                with pytest.raises(OSError, match="no space left"):
                    keep_diary(tmp_path, step, diary.grow(3))
        assert segments(tmp_path) == [name(0, 5)]
        assert [folder.name for folder in folders(tmp_path)] == ["step_000000001"]
    folder = keep_diary(tmp_path, 5, diary)
    assert put_back(folder).rows == diary.rows


# Resuming


@dataclass(frozen=True, kw_only=True)
class Writing(Experiment):
    experiment: ClassVar[str] = "writing"

    name: str = "writing"
    trainer: TrainerConfig = TrainerConfig(steps=8, log_every=100, save_every=4, preview_every=100)
    tracking: TrackingConfig = TrackingConfig(mode="disabled")
    flavour: int = 0

    def task(self, trainer):
        return WritingTask(self)


class WritingTask:
    """Writes two rows a step."""

    facts: ClassVar[dict[str, int]] = {}

    def __init__(self, experiment):
        self.diary, self.model = Diary(flavour=experiment.flavour), Part({"w": torch.ones(1)})

    def parts(self):
        return {"diary": self.diary, "model": self.model}

    def step(self, trainer):
        self.diary.grow(2)
        return {"written": float(self.diary.written)}

    def hooks(self, trainer):
        return []


def written(run: Run, experiment: Writing) -> Trainer:
    """Resume a run, or begin it, and train to its last step."""
    trainer = Trainer(experiment, World())
    trainer.resume(run)
    tracker = Tracker.start(experiment.tracking, run.folder, identity="x", name="x", group="x", settings={}, axes={})
    recorder = Recorder(run, tracker, Lines("writing", experiment.trainer.steps))
    try:
        trainer.fit(run, recorder)
    finally:
        recorder.close()
    return trainer


def longer(steps: int, flavour: int, save_every: int) -> Writing:
    return Writing(flavour=flavour, trainer=TrainerConfig(steps=steps, log_every=100, save_every=save_every, preview_every=100))


def test_a_run_that_is_resumed_has_its_rows_and_goes_on_with_them(tmp_path):
    run = create("writing", tmp_path / "run", "experiment: writing\n")
    written(run, Writing())
    trainer = written(run, longer(12, flavour=3, save_every=4))
    assert trainer.task.diary.rows == [(row, 0 if row < 16 else 3) for row in range(24)]
    assert put_back(folders(run.checkpoints)[0]).rows == trainer.task.diary.rows


def test_a_checkpoint_that_was_passed_over_as_damaged_does_not_lend_its_rows_to_the_resumed_run(tmp_path):
    run = create("writing", tmp_path / "run", "experiment: writing\n")
    written(run, Writing())
    flip(run.checkpoints / "step_000000008" / "model.safetensors")  # its rows, and their list, are whole
    trainer = written(run, longer(12, flavour=7, save_every=12))
    assert trainer.task.diary.rows == [(row, 0 if row < 8 else 7) for row in range(24)]
    assert put_back(run.checkpoints / "step_000000012").rows == trainer.task.diary.rows


def test_a_run_whose_rows_are_lost_is_not_begun_anew_over_what_is_left_of_it(tmp_path):
    run = create("writing", tmp_path / "run", "experiment: writing\n")
    written(run, Writing())
    shutil.rmtree(run.checkpoints / "segments")
    with pytest.raises(UserError, match="segments"):
        Trainer(Writing(), World()).resume(run)
    assert len(folders(run.checkpoints)) == 2
