"""A past step of a run computed once more, from the nearest checkpoint before it, to see what happened there.

Batches and noise follow from (seed, stream, step), so that settings and a checkpoint are all it takes. Nothing is
written and nothing locked: the run may be training meanwhile, or lie in a folder that is only to be read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from lab import checkpoint, distributed, loading, runs
from lab.checkpoint import Checkpoint, DamagedCheckpoint
from lab.config import UserError
from lab.curves import decoded
from lab.distributed import World
from lab.experiment import Experiment, TrainerConfig
from lab.learner import Learner, Loss, Metrics, Shard
from lab.runs import Run
from lab.trainer import Trainer, TrainingStopped

log = logging.getLogger("dreamplay")

Row = dict[str, float]
"""The metrics of training in a row of `metrics.jsonl`, by their names there."""
Watch = Callable[[Iterable[int], int], Iterable[int]]
"""Gives items on as they are gone through, and shows how many of so many are done."""

FACTS = {
    "code": "the code",
    "dreamplay": "Dreamplay",
    "torch": "torch",
    "gpu": "the GPU",
    "cpu": "the CPU's vector instructions",
    "native_bf16": "bfloat16 in hardware",
    "threads": "CPU threads",
    "processes": "processes",
}
"""What bits depend on, of what a run notes down of each of its starts, and what to call it."""


@dataclass(frozen=True)
class Plan:
    """What there is to compute, and from where."""

    run: Run
    experiment: Experiment
    world: World
    step: int
    """The step that is asked for; the first one of a run is 1."""
    row: int
    """The step of the row that holds it: the mean over the steps after the row before."""
    logged: Row | None
    """That row as it was recorded; None where it was not, because the run has not come so far."""
    begin: Checkpoint | None
    """Where to go on from; None: from the first step."""
    cautions: list[str]
    """Why bits may differ, a sentence each."""

    @property
    def begun(self) -> int:
        """The steps that need not be computed."""
        return self.begin.step if self.begin else 0


@dataclass(frozen=True)
class Replayed:
    """What came of it."""

    own: Row | None
    """The metrics of the step itself; None where training stopped before it."""
    refused: list[float]
    """The losses of those of its updates that had to be skipped."""
    computed: Row | None
    """The row; None where training stopped before it."""
    stopped: str
    """Why training stopped, as it did in the run; empty if it did not."""


# What there is to compute


def plan(run: Run, families: Mapping[str, str], step: int) -> Plan:
    """Find what a step is computed from; sets this process's device and threads to those of the run.

    Args:
        families: the module of each kind of experiment.

    Raises:
        UserError: the run has not come to that step, or its settings cannot be read.
    """
    experiment: Experiment = loading.settings_of(run, families)
    config = experiment.trainer
    rows = {int(entry["step"]): entry for entry in _entries(run.metrics)}
    check(run, step, max(rows, default=0), config)
    row = row_of(step, config)
    logged = {name: float(value) for name, value in rows[row].items() if name.startswith("train/")} if row in rows else None
    starts = starts_until(run, row)
    world = join(config, starts[-1] if starts else {})
    begin = nearest(run, step)
    concerned = starts[-1:] if begin else starts  # from the first step on, every start's numbers are computed again
    return Plan(run, experiment, world, step, row, logged, begin, [*differences(concerned), *changes(run)])


def row_of(step: int, config: TrainerConfig) -> int:
    """The step whose row holds a step."""
    return min(-(-step // config.log_every) * config.log_every, config.steps)


def check(run: Run, step: int, recorded: int, config: TrainerConfig) -> None:
    """Refuse a step that the run cannot have come to: it may be as far as the next row, which a failed one never wrote.

    Raises:
        UserError: says how far it came.
    """
    last = row_of(recorded + 1, config)
    if step > last:
        raise UserError(f"--step {step}: {run.folder} has recorded {recorded} of its {config.steps} steps; give a step from 1 to {last}")


def nearest(run: Run, step: int) -> Checkpoint | None:
    """The newest whole checkpoint before a step, None where there is none; damaged ones that are passed over are warned of."""
    for folder in checkpoint.folders(run.checkpoints):
        if folder.name >= f"step_{step:09d}":
            continue
        try:
            return checkpoint.load(folder)
        except (DamagedCheckpoint, OSError) as damage:  # a run that trains deletes old ones meanwhile
            log.warning("checkpoint passed over: %s", damage)
    return None


def _entries(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a line that is cut short or damaged is left out."""
    try:
        rows = [row for row in decoded(path.read_bytes().splitlines()) if isinstance(row, dict)]
    except OSError:
        return []
    return [row for row in rows if isinstance(row.get("step"), float) and row["step"].is_integer()]


# Why bits may differ


def starts_until(run: Run, row: int) -> list[dict[str, Any]]:
    """What the run noted of its starts, up to the one that recorded the row; all of them where that is not known."""
    times = [entry["time"] for entry in _entries(run.timing) if entry.get("step") == row and isinstance(entry.get("time"), float)]
    try:
        starts = [dict(start) for start in json.loads(run.environment.read_text())["starts"]]
        return [start for start in starts if not times or datetime.fromisoformat(start["time"]).timestamp() <= times[-1]]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def join(config: TrainerConfig, start: Mapping[str, Any]) -> World:
    """Compute as that start did, as far as it can be done here: on a GPU or not, and with as many threads."""
    threads = start.get("threads")
    device = "auto" if config.device != "cpu" and start.get("gpu") else "cpu"
    return distributed.join(device, threads if isinstance(threads, int) and threads > 0 else config.threads, config.deterministic)


def differences(starts: Iterable[Mapping[str, Any]]) -> list[str]:
    """What was different when a run was computed, a sentence for each thing."""
    theirs, ours = [_facts(start) for start in starts], _facts({**runs.versions(), **distributed.environment()})
    if not theirs:
        return ["environment.json does not tell where the run was computed, so bits may differ"]
    found = {
        f"{title}: the run had {start[name]}, here it is {ours[name]}, so bits may differ"
        for name, title in FACTS.items()
        for start in theirs
        if start[name] != ours[name]
    }
    return sorted(found) + (
        ["a GPU repeats itself bit for bit only with trainer.deterministic"] if ours["gpu"] and theirs[-1]["gpu"] else []
    )


def _facts(start: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `FACTS`, the code by its commit."""
    code = f"{str(start.get('git') or 'unknown')[:7]}{' with changes' if start.get('changed') else ''}"
    return {name: start.get(name, "unknown") for name in FACTS} | {"code": code}


def changes(run: Run) -> list[str]:
    """The commands that went on with the run by other settings, a sentence each: `config.yaml` has only the newest ones."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in run.folder.joinpath("command.txt").read_text(encoding="utf-8").splitlines():
            words = shlex.split(line)[2:]
            options = [word for place, word in enumerate(words) if "--resume" not in (word.partition("=")[0], *words[place - 1 : place])]
            if options and len(options) < len(words):
                found.append(f"the run went on with other settings ({shlex.join(options)}), so what came before may differ")
    return found


# Computing it


class Replayer(Trainer):
    """A trainer that remembers the losses of updates that its newest step had to skip."""

    def __init__(self, experiment: Experiment, world: World, noted: Mapping[str, Any] | None) -> None:
        self.refused: list[float] = []
        super().__init__(experiment, world, noted)

    def advance(self) -> tuple[Metrics, dict[str, float]]:
        """One step, as always."""
        self.refused = []
        return super().advance()

    def minimise(self, learner: Learner, loss: Loss, batch: int) -> Metrics:
        """One update, as always."""
        seen: list[float] = []

        def watched(shard: Shard) -> tuple[Tensor, Metrics]:
            value, metrics = loss(shard)
            seen.append(float(value.detach()))
            return value, metrics

        metrics = super().minimise(learner, watched, batch)
        self.refused += seen if math.isnan(metrics["loss"]) else []
        return metrics


def replay(planned: Plan, watch: Watch) -> Replayed:
    """Train from the checkpoint to the row, recording nothing.

    Raises:
        UserError: the checkpoint does not fit the settings, or the run deleted it meanwhile.
    """
    begin = planned.begin
    trainer = Replayer(planned.experiment, planned.world, begin.notes.get("facts", {}) if begin else None)
    if begin:
        _put_back(trainer, begin, planned.run)
    own: Row | None = None
    refused: list[float] = []
    row: Row | None = None
    for step in watch(range(planned.begun + 1, planned.row + 1), planned.row - planned.begun):
        try:
            metrics, row = trainer.advance()
        except TrainingStopped as stop:
            return Replayed({} if step == planned.step else own, trainer.refused if step == planned.step else refused, None, str(stop))
        if step == planned.step:
            measured = {name: float(value) for name, value in metrics.items()}
            own, refused = {name: value for name, value in measured.items() if not math.isnan(value)}, trainer.refused
    return Replayed(own, refused, row, "")


def _put_back(trainer: Trainer, begin: Checkpoint, run: Run) -> None:
    try:
        trainer.put_back(begin)
    except ValueError as error:
        raise UserError(f"step {begin.step} of {run.folder} cannot be put back: {error}") from None
    except OSError as error:
        raise UserError(f"step {begin.step} of {run.folder} was deleted while it was read ({error.strerror}); try once more") from None


def unequal(logged: Row, computed: Row) -> list[str]:
    """The metrics that are not the same to the last bit, or that one of both lacks."""
    return [name for name in sorted({*logged, *computed}) if _bits(logged.get(name)) != _bits(computed.get(name))]


def _bits(value: float | None) -> str:
    """All that a number is; numbers that are none are alike, unlike by `==`."""
    return "" if value is None else float(value).hex()
