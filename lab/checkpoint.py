"""Whole-or-absent checkpoints: a folder per step, committed by one rename, every byte under a SHA-256.

    checkpoints/step_000001000/
        model.safetensors  model.json      tensors of a part, and the rest of its state with a mark where each tensor goes
        manifest.json                      step, notes of the trainer, SHA-256 of every file and of the manifest itself

A save writes into a temporary folder beside the others, flushes it to the disk, renames it, and only then deletes old
ones, so a kill or a full disk at any moment leaves the previous checkpoint whole. Nothing here is a pickle: loading runs
no code from the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


class DamagedCheckpoint(Exception):
    """A checkpoint that is not what was saved: says which file, and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back: the step, the trainer's notes, and the state of every part."""

    step: int
    notes: dict[str, Any]
    parts: dict[str, Any]


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


def save(root: Path, step: int, parts: Mapping[str, Stateful], notes: Mapping[str, Any], keep: int) -> Path:
    """Save every part as the checkpoint of `step`, then delete all but the newest `keep` up to it.

    Raises:
        OSError: the disk is full or fails; the checkpoints that were there are untouched and nothing half-written stays.
    """
    final, temporary = root / f"step_{step:09d}", root / f".step_{step:09d}.{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step_*"):  # of a process that was killed inside a save
        shutil.rmtree(leftover)
    try:
        _write(temporary, step, parts, notes)
        if final.exists():  # a damaged one, passed over when the run was resumed
            shutil.rmtree(final)
        os.rename(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(root)
    # Later ones can only be damaged, or the run would have gone on from them.
    kept = [folder for folder in folders(root) if folder.name <= final.name][:keep]
    for folder in set(folders(root)) - set(kept):
        shutil.rmtree(folder)
    return final


def _write(folder: Path, step: int, parts: Mapping[str, Stateful], notes: Mapping[str, Any]) -> None:
    folder.mkdir()
    for name, part in parts.items():
        tensors: dict[str, Tensor] = {}
        tree = pack(part.state_dict(), tensors)
        try:
            save_file(tensors, folder / f"{name}.safetensors")
        except SafetensorError as error:  # its name for every failed write
            raise OSError(f"{name}.safetensors: {error}") from error
        (folder / f"{name}.json").write_text(json.dumps(tree))
    manifest = {"step": step, "notes": dict(notes), "sha256": {path.name: _digest(path) for path in sorted(folder.iterdir())}}
    (folder / "manifest.json").write_text(json.dumps({"manifest": manifest, "sha256": _digest_json(manifest)}))
    for path in (*folder.iterdir(), folder):
        _flush(path)


def _flush(path: Path) -> None:
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


def load(folder: Path, only: str | None = None) -> Checkpoint:
    """Verify a checkpoint and read its parts (or `only` one of them), tensors on the CPU.

    Raises:
        DamagedCheckpoint: a file is missing, left over, or not the bytes that were saved.
    """
    manifest = verify(folder)
    names = sorted({Path(name).stem for name in manifest["sha256"]})
    parts = {name: _read_part(folder, name) for name in names if only in (None, name)}
    return Checkpoint(manifest["step"], manifest["notes"], parts)


def _read_part(folder: Path, name: str) -> Any:
    tree = json.loads((folder / f"{name}.json").read_text())
    # Cloned: a tensor must not stay mapped to a file that a later save may delete.
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / f"{name}.safetensors").items()}
    return unpack(tree, tensors)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking every byte against it.

    Raises:
        DamagedCheckpoint: as in `load`.
    """
    manifest = _manifest(folder / "manifest.json")
    expected, found = set(manifest["sha256"]) | {"manifest.json"}, {path.name for path in folder.iterdir()}
    for name in sorted(expected ^ found):
        raise DamagedCheckpoint(f"{folder / name} is {'missing' if name in expected else 'not part of the checkpoint'}")
    for name, digest in manifest["sha256"].items():
        try:
            found_digest = _digest(folder / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name} cannot be read ({error.strerror})") from None
        if found_digest != digest:
            raise DamagedCheckpoint(f"{folder / name} is not what was saved (its SHA-256 differs from the manifest's)")
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        manifest, digest = content["manifest"], content["sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({type(error).__name__})") from None
    if _digest_json(manifest) != digest:
        raise DamagedCheckpoint(f"{path} is not what was saved (its own SHA-256 differs)")
    return dict(manifest)


def load_newest(root: Path, only: str | None = None) -> Checkpoint | None:
    """The newest whole checkpoint below a folder, or None; every damaged one that is passed over is warned of."""
    for folder in folders(root):
        try:
            return load(folder, only)
        except DamagedCheckpoint as damage:
            log.warning("damaged checkpoint passed over: %s", damage)
    return None


# Putting back


def restore(parts: Mapping[str, Stateful], states: Mapping[str, Any]) -> None:
    """Put every part back as it was saved.

    Raises:
        ValueError: the checkpoint holds other parts, or shapes that the settings do not give.
    """
    if set(parts) != set(states):
        raise ValueError(f"the checkpoint holds {', '.join(sorted(states))}; this experiment has {', '.join(sorted(parts))}")
    for name, part in parts.items():
        try:
            if isinstance(part, torch.optim.Optimizer):
                _restore_optimizer(part, states[name])
            else:
                part.load_state_dict(states[name])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"'{name}' does not fit the checkpoint; its settings were other ones ({error})") from None


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put moments back, but keep the hyper-parameters of now: they are settings, which a resumed run may change."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if any(set(mine) != set(theirs) - {"params"} for mine, theirs in zip(groups, state["param_groups"])):
        raise ValueError("it was another kind of optimiser")
    optimizer.load_state_dict(state)
    for group, mine in zip(optimizer.param_groups, groups):
        group.update(mine)
    _match_layout(optimizer)


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory layout of their weights: fused kernels walk both in the order of their memory."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
