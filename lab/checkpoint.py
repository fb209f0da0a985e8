"""Whole-or-absent checkpoints: a folder per step, committed by one rename, every byte under a SHA-256.

    checkpoints/step_000001000/
        model.safetensors  model.json      tensors of a part, and the rest of its state with a mark where each tensor goes
        manifest.json                      step, notes of the trainer, SHA-256 of every file and of the manifest itself
    checkpoints/segments/replay_000000000000_000000002048.safetensors      rows of a part that grows; checkpoints share them

A save writes into a temporary folder beside the others, flushes it to the disk, renames it, and only then deletes old
ones, so a kill or a full disk at any moment leaves the previous checkpoint whole. What nothing goes on from may be saved
without a wait for the disk, and `settle` waits for some such saves at once. Nothing here is a pickle: loading runs no code
from the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger("dreamplay")


class Stateful(Protocol):
    """Anything a checkpoint can hold: modules, optimisers, averages, counters."""

    def state_dict(self) -> dict[str, Any]:
        """All that must be put back to go on as before."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Put back what `state_dict` gave."""


@runtime_checkable
class Growing(Stateful, Protocol):
    """A part with too many rows to be written again at every save, such as a replay memory: only new rows are written.

    Rows have the numbers 0, 1, 2, ... and never change. What `state_dict` gives beside them is small.
    """

    @property
    def written(self) -> int:
        """How many rows there have ever been."""

    @property
    def oldest(self) -> int:
        """The oldest row that is still needed."""

    def read(self, first: int, last: int) -> dict[str, Tensor]:
        """The rows `first .. last`, contiguous and on the CPU."""

    def write(self, first: int, rows: Mapping[str, Tensor]) -> None:
        """Put rows back, before `load_state_dict` puts back the rest."""


SEGMENT = 1 << 26
"""Bytes of a segment file at most, unless a single row has more: what putting back takes of memory at a time."""


@dataclass(frozen=True)
class Segment:
    """A file with the rows `first .. last` of a growing part, and the SHA-256 it must have."""

    file: str
    first: int
    last: int
    sha256: str


class DamagedCheckpoint(Exception):
    """A checkpoint that is not what was saved: says which file, and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back: the step, the trainer's notes, and the state of every part."""

    step: int
    notes: dict[str, Any]
    parts: dict[str, Any]
    segments: Mapping[str, Sequence[tuple[int, Path]]] = field(default_factory=dict)
    """Of growing parts: first row and file of each segment."""


# State <-> tensors and JSON


def pack(state: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """JSON for a nested state; its tensors go into `tensors` under their path in the state."""
    if isinstance(state, Tensor):
        while name in tensors:  # {"a.b": x, "a": {"b": y}}
            name += "_"
        tensors[name] = state.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(state, Mapping):
        # Optimiser states have integer keys, which JSON objects cannot have.
        return {"map": [[key, pack(value, tensors, f"{name}.{key}" if name else str(key))] for key, value in state.items()]}
    if isinstance(state, list | tuple):
        kind = "tuple" if isinstance(state, tuple) else "list"
        return {kind: [pack(item, tensors, f"{name}.{index}") for index, item in enumerate(state)]}
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"a checkpoint cannot hold {name}: {type(state).__name__}; give it as tensors, numbers, texts, lists or maps")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `pack` took apart."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: unpack(value, tensors) for key, value in content}
    items = [unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


# Saving


def save(root: Path, step: int, parts: Mapping[str, Stateful], notes: Mapping[str, Any], keep: int, wait: bool = True) -> Path:
    """Save every part as the checkpoint of `step`, then delete all but the newest `keep` up to it.

    Args:
        wait: until all of it is on the disk itself; else `settle` is to be called.

    Raises:
        OSError: the disk is full or fails; the checkpoints that were there are untouched and nothing half-written stays.
    """
    final, temporary = root / f"step_{step:09d}", root / f".step_{step:09d}.{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    if wait and not folders(root):
        flush(root.parent)  # or the first checkpoint could go with its whole folder when the power is cut
    for leftover in root.glob(".step_*"):  # of a process that was killed inside a save
        shutil.rmtree(leftover)
    try:
        segments = {name: _grow(root, step, name, part) for name, part in parts.items() if isinstance(part, Growing)}
        _write(temporary, step, parts, notes, segments)
        for path in (*temporary.iterdir(), temporary) if wait else ():
            flush(path)
        if final.exists():  # a damaged one, passed over when the run was resumed
            shutil.rmtree(final)
        os.rename(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        _drop_segments(root, folders(root))
        raise
    if wait:
        flush(root)
    # Later ones can only be damaged, or the run would have gone on from them.
    kept = [folder for folder in folders(root) if folder.name <= final.name][:keep]
    for folder in set(folders(root)) - set(kept):
        shutil.rmtree(folder)
    _drop_segments(root, kept)
    return final


def _grow(root: Path, step: int, name: str, part: Growing) -> list[Segment]:
    """Write the rows that no earlier checkpoint holds; returns all segments that this one needs."""
    folder = root / "segments"
    folder.mkdir(exist_ok=True)
    known = [segment for segment in _known(root, step, name) if segment.last > part.oldest]
    first = max(part.oldest, known[-1].last if known else 0)
    while first < part.written:
        row = sum(tensor.nbytes for tensor in part.read(first, first + 1).values())
        last = min(part.written, first + max(1, SEGMENT // row))
        known.append(_write_segment(folder, f"{name}_{first:012d}_{last:012d}.safetensors", first, last, part.read(first, last)))
        first = last
    flush(folder)
    return known


def _known(root: Path, step: int, name: str) -> list[Segment]:
    """The segments of the checkpoint before `step`; none, so that all is written again, where its list is damaged."""
    before = [folder for folder in folders(root) if folder.name < f"step_{step:09d}"]
    try:
        return _segments(_manifest(before[0]), name) if before else []
    except DamagedCheckpoint:
        return []


def _write_segment(folder: Path, file: str, first: int, last: int, rows: dict[str, Tensor]) -> Segment:
    temporary = folder / f".{file}"
    _save_tensors(rows, temporary)
    flush(temporary)
    os.replace(temporary, folder / file)  # of a process that was killed before its checkpoint was whole
    return Segment(file, first, last, _digest(folder / file))


def _segments(manifest: Mapping[str, Any], name: str) -> list[Segment]:
    return [Segment(**entry) for entry in manifest["segments"].get(name, [])]


def _drop_segments(root: Path, kept: Sequence[Path]) -> None:
    """Delete segments that no checkpoint needs any more."""
    try:
        needed = {entry["file"] for folder in kept for part in _manifest(folder)["segments"].values() for entry in part}
    except DamagedCheckpoint:
        return  # which may need any of them
    for path in (root / "segments").glob("*"):
        if path.name not in needed:
            path.unlink()


def drop_after(root: Path, step: int) -> None:
    """Delete the checkpoints after `step`, which were damaged, or a resumed run would build upon their rows."""
    for folder in folders(root):
        if folder.name > f"step_{step:09d}":
            shutil.rmtree(folder)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its name for every failed write
        raise OSError(f"{path.name}: {error}") from error


def _write(
    folder: Path, step: int, parts: Mapping[str, Stateful], notes: Mapping[str, Any], segments: Mapping[str, Sequence[Segment]]
) -> None:
    folder.mkdir()
    for name, part in parts.items():
        tensors: dict[str, Tensor] = {}
        tree = pack(part.state_dict(), tensors)
        _save_tensors(tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(tree))
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    grown = {name: [vars(segment) for segment in part] for name, part in segments.items()}
    manifest = {"step": step, "notes": dict(notes), "sha256": digests, "segments": grown}
    (folder / "manifest.json").write_text(json.dumps({"manifest": manifest, "sha256": _digest_json(manifest)}))


def settle(saved: Collection[Path]) -> None:
    """Wait until checkpoints that were saved without a wait are on the disk itself; one that somebody has deleted is passed over."""
    here = [folder for folder in saved if folder.is_dir()]
    roots = {folder.parent for folder in here}
    for path in (*(file for folder in here for file in folder.iterdir()), *here, *roots, *{root.parent for root in roots}):
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Loading


def folders(root: Path) -> list[Path]:
    """The checkpoints below a folder, newest first."""
    return sorted((path for path in root.glob("step_*") if path.is_dir()), reverse=True)


def load(folder: Path, only: Collection[str] = ()) -> Checkpoint:
    """Verify a checkpoint and read its parts, tensors on the CPU; where some are named, those `only`, without any segments.

    Raises:
        DamagedCheckpoint: a file is missing, left over, or not the bytes that were saved.
    """
    manifest = verify(folder, segments=not only)
    names = sorted({Path(name).stem for name in manifest["sha256"]})
    parts = {name: _read_part(folder, name) for name in names if not only or name in only}
    grown = {name: [(segment.first, _place(folder, segment)) for segment in _segments(manifest, name)] for name in manifest["segments"]}
    return Checkpoint(manifest["step"], manifest["notes"], parts, {} if only else grown)


def _place(folder: Path, segment: Segment) -> Path:
    return folder.parent / "segments" / segment.file


def _read_part(folder: Path, name: str) -> Any:
    try:
        tree = json.loads((folder / f"{name}.json").read_text())
        # Cloned: a tensor must not stay mapped to a file that a later save may delete.
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / f"{name}.safetensors").items()}
        return unpack(tree, tensors)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, SafetensorError) as error:
        # Its SHA-256 is right: whoever made the checkpoint wrote something else than `save` does.
        raise DamagedCheckpoint(f"{folder / name}.json or .safetensors is no part of a checkpoint ({type(error).__name__})") from None


def verify(folder: Path, segments: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking every byte against it (with `segments`, theirs too).

    Raises:
        DamagedCheckpoint: as in `load`.
    """
    manifest = _manifest(folder)
    expected, found = set(manifest["sha256"]) | {"manifest.json"}, {path.name for path in folder.iterdir()}
    for name in sorted(expected ^ found):
        raise DamagedCheckpoint(f"{folder / name} is {'missing' if name in expected else 'not part of the checkpoint'}")
    for name, digest in manifest["sha256"].items():
        _check(folder / name, digest)
    for segment in (segment for name in manifest["segments"] for segment in _segments(manifest, name) if segments):
        _check(_place(folder, segment), segment.sha256)
    return manifest


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if it is whole."""
    try:
        verify(folder)
    except DamagedCheckpoint as found:
        return str(found)
    return ""


def _check(path: Path, digest: str) -> None:
    try:
        found = _digest(path) if path.is_file() or not path.exists() else ""  # a pipe or a device would never end
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror})") from None
    if found != digest:
        raise DamagedCheckpoint(f"{path} is not what was saved (its SHA-256 differs from the manifest's)")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
        manifest, digest = content["manifest"], content["sha256"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({type(error).__name__})") from None
    if _digest_json(manifest) != digest:
        raise DamagedCheckpoint(f"{path} is not what was saved (its own SHA-256 differs)")
    manifest = {"segments": {}, **manifest}  # which runs from before version 0.2 have none of
    if not _well_formed(manifest):
        raise DamagedCheckpoint(f"{path} is no manifest of a checkpoint")
    return manifest


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest says what `save` writes: anybody can make one whose own SHA-256 is right."""
    try:
        digests, segments = manifest["sha256"], [Segment(**entry) for part in manifest["segments"].values() for entry in part]
        numbers = [manifest["step"], *(number for segment in segments for number in (segment.first, segment.last))]
        files = [*digests, *(segment.file for segment in segments)]
        sound = isinstance(manifest["notes"], dict) and all(isinstance(number, int) for number in numbers)
        return sound and all(name == Path(name).name and Path(name).suffix in (".json", ".safetensors") for name in files)
    except (KeyError, TypeError, AttributeError):
        return False


def load_newest(root: Path, only: Collection[str] = ()) -> Checkpoint | None:
    """The newest whole checkpoint below a folder, or None; every damaged one that is passed over is warned of."""
    for folder in folders(root):
        try:
            return load(folder, only)
        except DamagedCheckpoint as damage:
            log.warning("damaged checkpoint passed over: %s", damage)
    return None


def noted(root: Path) -> Mapping[str, Any] | None:
    """The notes of the newest checkpoint below a folder whose manifest can be read, {} if none can; None where there is no checkpoint."""
    for folder in folders(root):
        try:
            notes: Mapping[str, Any] = _manifest(folder)["notes"]
            return notes
        except DamagedCheckpoint:
            continue
    return {} if folders(root) else None


# Putting back


def restore(
    parts: Mapping[str, Stateful],
    states: Mapping[str, Any],
    segments: Mapping[str, Sequence[tuple[int, Path]]] | None = None,
    read: Callable[[Path], Mapping[str, Tensor]] = load_file,
) -> None:
    """Put every part back as it was saved.

    Args:
        read: gives the rows in a segment's file.

    Raises:
        ValueError: the checkpoint holds other parts, or shapes that the settings do not give.
    """
    if set(parts) != set(states):
        raise ValueError(f"the checkpoint holds {', '.join(sorted(states))}; this experiment has {', '.join(sorted(parts))}")
    for name, part in parts.items():
        try:
            for first, path in (segments or {}).get(name, []):
                cast(Growing, part).write(first, read(path))
            if isinstance(part, torch.optim.Optimizer):
                _restore_optimizer(part, states[name])
            else:
                part.load_state_dict(states[name])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, SafetensorError) as error:
            raise ValueError(f"'{name}' does not fit the checkpoint; its settings were other ones ({_in_short(error)})") from None


def _in_short(error: Exception) -> str:
    """What an error says; of torch's list of all weights that do not fit, the first one."""
    lines = str(error).splitlines()
    short = lines[1].strip().rstrip(".") if len(lines) > 1 else str(error)
    return f"it holds no {short}" if isinstance(error, KeyError) else short


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put moments back, but keep the hyper-parameters of now: they are settings, which a resumed run may change."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if any(set(mine) != set(theirs) - {"params"} for mine, theirs in zip(groups, state["param_groups"])):
        raise ValueError("it was another kind of optimiser")
    optimizer.load_state_dict(state)
    for group, mine in zip(optimizer.param_groups, groups):
        # The rate of the last update, as every update sets its own; and what counts updates (`lab.optimizer.RAdam`).
        group.update(mine | {key: group[key] for key in ("lr", "updates") if key in group})
    _match_layout(optimizer)


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory layout of their weights: fused kernels walk both in the order of their memory."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
