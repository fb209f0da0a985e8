"""What it costs to save and to record, and what a save of a DQN with its memory costs.

    python benchmarks/saving.py                                          everything, about 25 minutes on 2 cores; 9 GB of memory and of disk
    python benchmarks/saving.py --parts overhead --presets rl/dqn_catch  the smallest preset alone, 10 minutes
    python benchmarks/saving.py --parts memory --capacity 200000         a fifth of the memory

overhead  a preset's own steps, with its rows and checkpoints and milestones at its own pace, against the same steps with nothing
          around them; both take turns in one process, twenty from one checkpoint to the next, so that a busy machine troubles both
          alike.
          Previews and tests are left out: they are no saving. Median over the pairs, with the quartiles. Beside it, in the same
          turns, what was spent inside the calls that save and record: less noisy, as nothing is subtracted. Both also in seconds of
          the processor, which a busy machine does not change, but in which waiting for the disk is not seen.
memory    a DQN of Pong as configs/rl/dqn_pong.yaml has it, whose memory is filled with frames of noise, which no disk can press
          together, and saved after every 10,000 transitions as in training, flushed to the disk; with and without priorities.
"""

from __future__ import annotations

import gc
import importlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from generative import model as generative
from lab import classifier, distributed, runs
from lab.config import read_yaml, resolve
from lab.experiment import Experiment
from lab.recorder import Lines, Recorder, console
from lab.tracking import Tracker, TrackingConfig
from lab.trainer import Trainer
from rl import agent

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = generative.FAMILIES | classifier.FAMILIES | agent.FAMILIES
NEW = 10_000
"""Transitions from one save to the next."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[Literal["overhead", "memory"], ...] = ("overhead", "memory")
    """Which measurements."""
    presets: tuple[str, ...] = ("rl/dqn_catch", "rl/ppo_catch", "classifier/digits", "generative/vae_mnist")
    """Presets below configs/, for the overhead; the first one is the smallest of all."""
    pairs: int = 10
    """Turns of each kind."""
    memories: tuple[Literal["uniform", "prioritised"], ...] = ("uniform", "prioritised")
    """Which kinds of memory."""
    capacity: int = 1_000_000
    """Transitions of the memory."""
    threads: int = 0
    """CPU threads, where a preset does not say; 0 takes all cores."""
    place: Path = Path("runs")
    """Where to save: a folder on the disk that is asked about."""
    out: Path = Path("benchmarks/results/saving.json")
    """Where the figures go; of what is not measured the old ones are kept."""


def main() -> None:
    """Take every measurement, print a line for each and write the report."""
    options = tyro.cli(Options, description=__doc__)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    world = distributed.join("cpu", options.threads, deterministic=False)
    report |= {"machine": platform.processor() or platform.machine(), **distributed.environment()}
    options.place.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        with tempfile.TemporaryDirectory(dir=options.place) as folder:
            report[part] = overheads(options, Path(folder)) if part == "overhead" else memories(options, world, Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def settings(preset: str) -> Experiment:
    """The experiment of a preset."""
    given, named = read_yaml(ROOT / f"configs/{preset}.yaml")
    return resolve(importlib.import_module(FAMILIES[named or ""]).EXPERIMENT, given).settings


def saver(experiment: Experiment, world: distributed.World, folder: Path) -> tuple[Trainer, runs.Run, Recorder]:
    """A trainer as a user runs it, W&B apart."""
    run = runs.create(experiment.name, folder, "experiment: benchmark\n")
    tracker = Tracker.start(TrackingConfig(mode="disabled"), run.folder, identity="b", name="b", group="b", settings={}, axes={})
    return Trainer(experiment, world), run, Recorder(run, tracker, Silent(experiment.name, experiment.trainer.steps, every=1e9))


class Silent(Lines):
    """Nothing is to be seen."""

    def stop(self) -> None:
        """Say nothing either."""


# Overhead


def overheads(options: Options, folder: Path) -> dict[str, Any]:
    """The overhead of each preset."""
    results = {}
    for preset in options.presets:
        experiment = settings(preset)
        world = distributed.join("cpu", experiment.trainer.threads or options.threads, deterministic=False)
        results[preset] = overhead(experiment, options.pairs, world, folder / preset.replace("/", "_"))
        console.print(f"{preset}: {told(results[preset])}", highlight=False, soft_wrap=True)
    return results


def told(result: dict[str, Any]) -> str:
    """The figures of one preset in a line."""
    low, middle, high = statistics.quantiles(result["overhead"]["seconds"], n=4)
    work, spent = statistics.median(result["overhead"]["processor"]), {k: statistics.median(v) for k, v in result["inside"].items()}
    return (
        f"overhead {middle:+.2%} of the time (quartiles {low:+.2%} to {high:+.2%}), {work:+.2%} of the processor's; "
        f"inside saving and recording {spent['seconds']:.2%} of the time, {spent['processor']:.2%} of the processor's"
    )


def overhead(experiment: Experiment, pairs: int, world: distributed.World, folder: Path) -> dict[str, Any]:
    """What saving and recording add to a turn of steps, as a part of it: as the difference, and as what was spent inside them."""
    config = experiment.trainer
    long = replace(experiment, trainer=replace(config, steps=config.steps * (pairs + 1), milestones=config.milestones * (pairs + 1)))
    plain, (trainer, run, recorder) = Trainer(long, world), saver(long, world, folder)
    hooks = [hook for hook in trainer.task.hooks(trainer) if hook.steps == config.log_every]  # not the previews
    inside = Inside()
    recorder.write = inside.counted(recorder.write)  # type: ignore[method-assign]
    save, milestone = inside.counted(lambda: trainer._save(run, recorder, needed=True)), inside.counted(trainer._save_milestone)

    def bare() -> None:
        plain._one_step([], None)

    def whole() -> None:
        trainer._one_step(hooks, recorder)
        if trainer._passed_milestone():
            milestone(run)
        if trainer.step % config.save_every == 0:
            save()

    turns, part = [], max(config.save_every // PARTS, 1)
    for _ in range(pairs + 1):
        inside.spent = np.zeros(2)
        spent = {bare: np.zeros(2), whole: np.zeros(2)}
        for begun in range(0, config.save_every, part):
            for step in (bare, whole) if begun // part % 2 else (whole, bare):
                spent[step] += timed(step, min(part, config.save_every - begun))
        turns.append((spent[whole] / spent[bare] - 1, inside.spent / spent[bare], spent[bare]))
    recorder.close()
    parts = {name: dict(zip(("seconds", "processor"), np.array(rows[1:]).T.tolist())) for name, rows in zip(RATIOS, zip(*turns))}
    return {"steps": config.save_every, **parts}


PARTS = 20
"""Times that the two take turns between two checkpoints: a processor's speed drifts within seconds."""
RATIOS = ("overhead", "inside", "turn")
"""What a turn is told by: of the clock on the wall and of the processor's time."""


def now() -> Any:
    """Seconds on the wall, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def timed(step: Callable[[], None], times: int) -> Any:
    """Seconds of so many steps, as `now` tells them."""
    began = now()
    for _ in range(times):
        step()
    return now() - began


class Inside:
    """Adds up what is spent inside some calls."""

    def __init__(self) -> None:
        self.spent = np.zeros(2)

    def counted(self, call: Callable[..., None]) -> Callable[..., None]:
        """The same call, counted."""

        def call_and_count(*arguments: Any) -> None:
            began = now()
            call(*arguments)
            self.spent += now() - began

        return call_and_count


# Memory


def memories(options: Options, world: distributed.World, folder: Path) -> dict[str, Any]:
    """The seconds of each save, and its size, without and with priorities."""
    results: dict[str, Any] = {"capacity": options.capacity, "new": NEW}
    for kind in options.memories:
        gc.collect()  # or the one before would still be there, 7 GB of it
        results[kind] = memory(options.capacity, kind == "prioritised", world, folder / kind)
        seconds = results[kind]["seconds"]
        low, middle, high = statistics.quantiles(seconds, n=4)
        console.print(
            f"{kind}: {middle:.2f} s a save of {NEW:,} new transitions (quartiles {low:.2f} to {high:.2f}, most {max(seconds):.2f}); "
            f"the last tenth, of a full memory, {statistics.median(seconds[-len(seconds) // 10 :]):.2f} s",
            highlight=False,
            soft_wrap=True,
        )
    return results


def memory(capacity: int, prioritised: bool, world: distributed.World, folder: Path) -> dict[str, Any]:
    """Fill the memory of a DQN a tenth beyond its capacity, saving again and again."""
    preset: Any = settings("rl/dqn_pong")
    filled = replace(preset, replay=replace(preset.replay, capacity=capacity, prioritised=prioritised))
    trainer, run, recorder = saver(filled, world, folder)
    task: Any = trainer.task
    games = filled.dqn.games
    noise = np.random.default_rng(0).integers(0, 256, (NEW // games, games, 84, 84), np.uint8)
    seconds, sizes = [], []
    for _ in range(capacity * 11 // 10 // NEW):
        for frames in noise:
            remember(task.replay, frames)
        noise += 1  # other bytes, or a disk may keep one copy of all
        trainer.step += NEW // filled.dqn.train_every
        before = written(run.folder)
        seconds.append(float(timed(lambda: trainer._save(run, recorder, needed=True), 1)[0]))
        sizes.append(written(run.folder) - before)
    recorder.close()
    return {"seconds": seconds, "bytes": sizes}


def remember(replay: Any, frames: Any) -> None:
    """A row of all games in which nothing ends."""
    none = np.zeros(len(frames), np.bool_)
    rewards, actions = np.zeros(len(frames), np.float32), np.zeros(len(frames), np.int64)
    replay.append(frames=frames, actions=actions, rewards=rewards, started=none, terminal=none, ended=none, playable=~none)


def written(folder: Path) -> int:
    """Bytes that lie below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
