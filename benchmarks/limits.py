"""A training step taken apart: where its time goes, and how far each part is from what the machine can do.

    python benchmarks/limits.py                                  about six minutes on 2 cores
    python benchmarks/limits.py --tasks vae_mnist --seconds 5

Of each task, a preset as it is shipped:

    parts       emulators; acting (the network's choice of actions, and what is kept of a game); data (batches, noise, the replay memory);
                forward; backward; optimiser (with the gradient's norm, clipping and averaging); the rest. Each without what lies inside
                it; on a GPU the device is waited for at every edge. The step's own time is taken without any of these watches.
    work        GFLOP of a step as torch counts them (matrix products, convolutions, attention, forward and backward), and of its updates
                alone; as a share of the peak, the products of square matrices in the task's own number format. The optimiser's bytes as a
                share of the bandwidth, a large copy; more than 100 % means that they stay in the processor's caches.
    emulators   what they would do with nobody who learns: the share of that which training reaches.

Then `formats`: an update of the Nature network (256 observations) and of the small U-Net (128 images) in fp32 and (where native) bf16,
plain and channels-last, in turns; and which of them `trainer.precision auto` and `Trainer.layout` take on this device.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from agents import shipped
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from turns import RESULTS, ROOT, alone, keep, pace, spread

from lab import distributed
from lab.config import read_yaml, resolve
from lab.distributed import World, native_bf16
from lab.experiment import Experiment
from lab.launch import guarded
from lab.learner import Learner, Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.recorder import console
from lab.trainer import Trainer
from rl.dqn import DQNConfig, QNetwork

TASKS = {"dqn_pong": "rl.dqn", "pqn_pong": "rl.pqn", "vae_mnist": "generative.vae", "diffusion_mnist": "generative.diffusion"}
PARTS = ("emulators", "acting", "data", "forward", "backward", "optimiser", "rest")
LAYOUTS = {"plain": torch.contiguous_format, "channels-last": torch.channels_last}
PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
OBSERVATIONS, ACTIONS = 256, 6
"""Of an update of the Nature network."""


@dataclass(frozen=True)
class Options:
    """What to take apart, and how long."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Presets."""
    seconds: float = 10.0
    """How long each measurement takes, about."""
    rounds: int = 5
    """Turns of each format."""
    threads: int = 0
    """CPU threads; 0 shares all cores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    out: Path = RESULTS / "limits.json"
    """Where the figures go."""
    only: str = ""
    """Take one measurement alone, a task, `machine` or `formats`, and print it as JSON."""


def main() -> int:
    """Take every measurement, print what it says and write the report."""
    options = tyro.cli(Options, description=__doc__)
    if options.only:
        print(json.dumps(measure(options)))
        return 0
    words = ["--seconds", str(options.seconds), "--rounds", str(options.rounds), "--threads", str(options.threads)]
    take = partial(alone, __file__, "--device", options.device, *words, "--only")
    report: dict[str, Any] = {"machine_limits": take("machine"), "tasks": {}}
    say(machine_sentence(report["machine_limits"]))
    for name in options.tasks:
        report["tasks"][name] = take(name)
        for line in task_lines(name, report["tasks"][name], report["machine_limits"]):
            say(line)
    report["formats"] = take("formats")
    for line in format_lines(report["formats"]):
        say(line)
    keep(options.out, report)
    return 0


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, soft_wrap=True)


def measure(options: Options) -> Any:
    """One measurement."""
    world = distributed.join(options.device, options.threads, deterministic=False)
    if options.only == "machine":
        return limits(world.device)
    if options.only == "formats":
        return formats(world, options)
    return taken_apart(preset(options.only), world, options.seconds)


def preset(name: str) -> Experiment:
    """A preset as it is shipped, without an end."""
    if TASKS[name].startswith("rl"):
        return shipped(name, TASKS[name])
    given, _ = read_yaml(ROOT / "configs" / "generative" / f"{name}.yaml")
    experiment: Any = resolve(importlib.import_module(TASKS[name]).EXPERIMENT, given).settings
    return replace(experiment, trainer=replace(experiment.trainer, steps=10**6))


# The machine


def waited(device: torch.device) -> float:
    """The time, when the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def limits(device: torch.device) -> dict[str, Any]:
    """GFLOP/s of products of square matrices in each number format, and GB/s of a copy, bytes read and bytes written: the best of some."""
    side = 8192 if device.type == "cuda" else 1024
    found: dict[str, Any] = {"bf16_native": native_bf16(device)}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        one = torch.randn(side, side, device=device).to(kind)
        found[name] = 2 * side**3 / fastest(lambda: one @ one, device) / 1e9  # noqa: B023
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / fastest(lambda: target.copy_(source), device) / 1e9
    return found


def fastest(function: Callable[[], Any], device: torch.device, times: int = 6) -> float:
    """Seconds of the fastest call of some."""
    function()
    found = []
    for _ in range(times):
        began = waited(device)
        function()
        found.append(waited(device) - began)
    return min(found)


# A step


class Stopwatch:
    """Time of each part, without that of parts inside it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = ["rest"]
        self.since = waited(device)

    def turn(self) -> None:
        """Give what has passed to the part that is running."""
        now = waited(self.device)
        self.seconds[self._running[-1]] += now - self.since
        self.since = now

    def watch(self, part: str, owner: Any, name: str) -> None:
        """From now on, calls of a function of an object or a class are a part."""
        function = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            self.turn()
            self._running.append(part)
            try:
                return function(*given, **named)
            finally:
                self.turn()
                self._running.pop()

        setattr(owner, name, timed)


def watches(task: Any) -> Iterator[tuple[str, Any, str]]:
    """The parts of a task: their names, and the functions whose calls they are."""
    yield from (("data", Shard, name) for name in ("indices", "uniform", "normal"))
    if hasattr(task, "batch"):
        yield "data", task, "batch"
    if hasattr(task, "games"):
        yield "emulators", task.games, "step"
        yield "acting", task, "play"
    if hasattr(task, "replay"):
        yield from (("data", task.replay, name) for name in ("extend", "sample", "reprioritise"))
    if hasattr(task, "learnt_from"):
        yield from (("data", task, "learnt_from"), ("data", task, "batches"), ("data", Tensor, "index_select"))
    yield from (("forward", task.learner, "forward"), ("backward", Tensor, "backward"))
    yield from (("optimiser", task.learner, name) for name in ("gradient_norm", "update"))


def taken_apart(experiment: Experiment, world: World, seconds: float) -> dict[str, Any]:
    """Everything about one task."""
    trainer = Trainer(experiment, world)
    task: Any = trainer.task
    for _ in range(getattr(task, "first_update", 0) + 5):
        trainer.advance()
    step = pace(lambda: (trainer.advance(), waited(world.device)), seconds)
    whole, learning = flops(trainer)
    found = {
        "precision": "bf16" if trainer.bf16 else "fp32",
        "seconds": step,
        "gflop": whole / 1e9,
        "learning_gflop": learning / 1e9,
        "optimiser_gb": optimiser_bytes(task.learner) * updates(trainer) / 1e9,
    }
    if hasattr(task, "games"):
        found |= {"actions": actions(task), "emulators_alone": emulators(task, seconds)}
    return found | {"parts": parts(trainer, seconds)}


def parts(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Seconds of each part of a step."""
    watch = Stopwatch(trainer.world.device)
    for part, owner, name in watches(trainer.task):
        watch.watch(part, owner, name)
    trainer.advance()
    watch.seconds.clear()
    watch.since = began = waited(trainer.world.device)
    steps = 0
    while time.perf_counter() - began < seconds or not steps:
        trainer.advance()
        steps += 1
    watch.turn()
    return {part: watch.seconds[part] / steps for part in PARTS if part in watch.seconds}


def flops(trainer: Trainer) -> tuple[float, float]:
    """Floating-point operations of a step, and of its updates alone."""
    minimise, updated = trainer.minimise, []

    def counted(*given: Any) -> Metrics:
        with FlopCounterMode(display=False) as inner:
            metrics = minimise(*given)
        updated.append(inner.get_total_flops())
        return metrics

    with FlopCounterMode(display=False) as outer:
        trainer.advance()
    trainer.minimise = counted  # type: ignore[method-assign]
    trainer.advance()
    trainer.minimise = minimise  # type: ignore[method-assign]
    return outer.get_total_flops(), sum(updated)


def updates(trainer: Trainer) -> int:
    """Updates of a step."""
    before = len(trainer._norms)
    trainer.task.step(trainer)
    return len(trainer._norms) - before


def optimiser_bytes(learner: Learner) -> int:
    """Bytes that an update of Adam reads and writes at least: weights, gradients (twice, for their norm), two moments, and the average."""
    return 4 * sum(weight.numel() for weight in learner.weights) * (8 + (3 if learner.ema else 0))


def actions(task: Any) -> int:
    """Actions of a step."""
    return int(task.config.train_every if hasattr(task.config, "train_every") else task.actions_per_round)


def emulators(task: Any, seconds: float) -> float:
    """Actions per second of the games alone, played at random."""
    games, draw = task.games, torch.Generator().manual_seed(0)
    choices = torch.randint(len(games.actions), (64, games.count), generator=draw).numpy()
    numbers = iter(range(10**9))
    return float(games.count / pace(lambda: games.step(choices[next(numbers) % 64]), seconds))


# Formats


class Laid(Trainer):
    """A trainer whose weights lie in memory as it is told."""

    layout = torch.contiguous_format


def formats(world: World, options: Options) -> dict[str, Any]:
    """Seconds of an update of two networks in every number format and layout, in turns; and what the lab takes."""
    kinds = PRECISIONS if native_bf16(world.device) else PRECISIONS[:1]  # elsewhere bf16 is emulated, a hundred times slower
    calls = {f"{kind} {layout}": laid(world, kind, layout) for kind in kinds for layout in LAYOUTS}
    found: dict[str, dict[str, list[float]]] = {network: {name: [] for name in calls} for network in ("nature", "unet")}
    for _ in range(options.rounds):
        for name, pair in calls.items():
            for network, call in pair.items():
                found[network][name].append(pace(call, options.seconds / 10))
    usual = Trainer(in_precision("auto"), world)
    layout = next(name for name, kind in LAYOUTS.items() if kind == usual.layout)
    return {"taken": f"{'bf16' if usual.bf16 else 'fp32'} {layout}", **found}


def in_precision(kind: str) -> Any:
    """The experiment of the small U-Net."""
    experiment = preset("diffusion_mnist")
    return replace(experiment, trainer=replace(experiment.trainer, precision=kind))


def laid(world: World, kind: str, layout: str) -> dict[str, Callable[[], Any]]:
    """An update of each network."""
    trainer = type("Laid", (Laid,), {"layout": LAYOUTS[layout]})(in_precision(kind), world)
    task: Any = trainer.task
    learner = trainer.learner(QNetwork(DQNConfig(), (4, 84, 84), ACTIONS), OptimizerConfig(kind="adam"))
    seen = torch.randint(256, (OBSERVATIONS, 4, 84, 84), dtype=torch.uint8, device=world.device)

    def loss(shard: Shard) -> tuple[Tensor, Metrics]:
        return learner.module(seen).square().mean(), {}

    return {
        "nature": lambda: (trainer.minimise(learner, loss, OBSERVATIONS), waited(world.device)),
        "unet": lambda: (trainer.minimise(task.learner, task.loss, task.experiment.data.batch_size), waited(world.device)),
    }


# What it says


def machine_sentence(found: dict[str, Any]) -> str:
    """The machine's limits."""
    native = "native" if found["bf16_native"] else "not native"
    return f"peak: fp32 {found['fp32']:,.0f} GFLOP/s, bf16 {found['bf16']:,.0f} ({native}); a copy moves {found['copy']:,.0f} GB/s"


def task_lines(name: str, found: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    """A task, as lines."""
    step, peak, share = found["seconds"], machine[found["precision"]], found["parts"]
    whole = sum(share.values())
    yield f"{name}: {1000 * step:.2f} ms a step; " + ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in share.items())
    learning, optimiser = (sum(share[part] for part in some) / whole * step for some in (("forward", "backward"), ("optimiser",)))
    moved = found["optimiser_gb"] / optimiser
    yield (
        f"  {found['gflop']:.2f} GFLOP in {found['precision']}, {found['gflop'] / step:,.0f} GFLOP/s, {found['gflop'] / step / peak:.0%} "
        f"of the peak; forward and backward alone {found['learning_gflop'] / learning / peak:.0%}; the optimiser moves {moved:,.0f} GB/s, "
        f"{moved / machine['copy']:.0%} of a copy"
    )
    if "actions" in found:
        rate, most = found["actions"] / step, found["emulators_alone"]
        yield f"  {rate:,.0f} actions/s; the emulators alone make {most:,.0f}: {rate / most:.0%} of that"


def format_lines(found: dict[str, Any]) -> Iterator[str]:
    """Formats, as lines."""
    for network in ("nature", "unet"):
        medians = {name: statistics.median(times) for name, times in found[network].items()}
        shown = ", ".join(f"{name} {spread([1000 * value for value in found[network][name]])}" for name in medians)
        yield f"{network}, ms an update: {shown}; fastest {min(medians, key=lambda name: medians[name])}, taken {found['taken']}"


if __name__ == "__main__":
    sys.exit(guarded(main))
