"""How costs grow: with environments, batch, width, memory and processes. The figures, and a picture of them.

    python benchmarks/growth.py                            everything, five minutes on 2 cores; 7.1 GB of memory for a while
    python benchmarks/growth.py --parts batch width --seconds 3
    python benchmarks/growth.py --parts                    draw the picture of what was measured before

    envs    actions per second of 1 to 128 games of Breakout: random actions; and with the networks of our DQN and PQN acting
    batch   transitions per second of an update of the Nature network, batches of 16 to 1024, fp32 and bf16
    width   the same of an update of a batch of 256 with 1/4 to 2 times as many channels and units, and images per second of training the
            U-Net of configs/generative/diffusion_mnist.yaml, narrower and wider
    replay  microseconds per transition of sampling batches of 32 and 256, uniformly and by priority, from 10,000 to 1,000,000
    world   steps per second of the VAE of configs/generative/vae_mnist.yaml by torchrun, in processes of one thread each

An update is all that the trainer does in one: forward, backward, clipping, optimiser. Every part is measured in a process of its own,
every point for --seconds after a short warm-up. The figures go to benchmarks/results/growth.json, the picture to docs/growth.png.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from replay import our_fetch, our_memory
from torch import Tensor, nn
from turns import RESULTS, ROOT, alone, keep, pace, said

from envs import games
from envs.games import GameConfig
from generative import diffusion, vae
from lab import backbones, data, distributed
from lab.config import UserError, read_yaml, resolve
from lab.experiment import TrainerConfig
from lab.launch import guarded
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.recorder import console
from lab.runs import Run
from lab.trainer import Trainer
from rl import dqn, pqn

Part = Literal["envs", "batch", "width", "replay", "world"]
Curves = dict[str, list[tuple[float, float]]]
"""Points of each curve."""
STACK, ACTIONS = (4, 84, 84), 4
DIGITS = data.DataConfig(name="digits")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[Part, ...] = ("envs", "batch", "width", "replay", "world")
    """Which parts; the figures of the others are kept."""
    seconds: float = 1.5
    """How long each point is measured."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    out: Path = RESULTS / "growth.json"
    """Where the figures go."""
    picture: Path = ROOT / "docs" / "growth.png"
    """Where the picture goes."""
    only: str = ""
    """Measure one part here, and print it."""


def main() -> int:
    """Measure the parts, print a line for each curve, write the report and draw it."""
    options = tyro.cli(Options, description=__doc__)
    distributed.join("cpu", options.threads, deterministic=False)
    if options.only:
        print(json.dumps(MEASURES[options.only](options.seconds)))
        return 0
    results: dict[str, Curves] = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    for part in options.parts:
        results[part] = alone(__file__, "--only", part, "--seconds", str(options.seconds), "--threads", str(options.threads))
        for name, points in results[part].items():
            shown = "  ".join(f"{x:g}: {y:,.4g}" for x, y in points)
            console.print(f"{part}, {name}, {AXES[part][1]}: {shown}", highlight=False, soft_wrap=True)
        keep(options.out, {"seconds": options.seconds, "results": results})
    if not results:
        raise UserError(f"{options.out} holds no figures yet; name some --parts")
    draw(options.picture, results)
    return 0


# The parts


def envs(seconds: float) -> Curves:
    """Actions per second for every number of games."""
    curves: Curves = {"random": [], "DQN acts": [], "PQN acts": []}
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        world = games.make(GameConfig(name="breakout"), count, 0)
        world.reset()
        fixed = np.random.default_rng(0).integers(0, ACTIONS, count)
        choices: dict[str, Callable[[], Any]] = {
            "random": lambda: fixed,  # noqa: B023
            "DQN acts": chooser(dqn.EXPERIMENT.network(STACK, ACTIONS), world),
            "PQN acts": chooser(pqn.EXPERIMENT.network(STACK, ACTIONS), world),
        }
        for name, choose in choices.items():
            curves[name].append((count, count / pace(lambda: world.step(choose()), seconds, 10)))  # noqa: B023
    return curves


def chooser(network: nn.Module, world: games.Games) -> Callable[[], Any]:
    """The best actions by a network, as an agent that plays takes them."""
    bf16 = distributed.native_bf16(torch.device("cpu"))

    @torch.no_grad()
    def choose() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return network(torch.from_numpy(world.last.observations)).argmax(1).numpy()

    return choose


def batch(seconds: float) -> Curves:
    """Transitions per second of an update, in both formats."""
    formats: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    sizes = (16, 32, 64, 128, 256, 512, 1024)
    return {each: [(size, size / pace(update(size, precision=each), seconds)) for size in sizes] for each in formats}


def update(size: int, scale: float = 1.0, precision: Literal["fp32", "bf16", "auto"] = "auto") -> Callable[[], Any]:
    """An update of the Nature network, each layer `scale` times as wide, on one batch of random transitions."""
    numbers, hidden = torch.Generator().manual_seed(0), round(scale * 512)
    widths = tuple(round(scale * channels) for channels in (32, 64, 64))
    network = nn.Sequential(backbones.create("nature", STACK[0], STACK[1], hidden=hidden, widths=widths), nn.Linear(hidden, ACTIONS))
    observations = torch.randint(0, 256, (size, *STACK), dtype=torch.uint8, generator=numbers)
    actions, goals = torch.randint(0, ACTIONS, (size, 1), generator=numbers), torch.randn(size, generator=numbers)
    # Of the experiment only the trainer is used.
    trainer = Trainer(replace(vae.EXPERIMENT, data=DIGITS, trainer=TrainerConfig(precision=precision)), distributed.World())
    learner = trainer.learner(network, OptimizerConfig(kind="adam", lr=1e-4, clip_norm=10.0))

    def loss(shard: Shard) -> tuple[Tensor, Metrics]:
        values = learner.module(observations).float()
        return (goals - values.gather(1, actions)[:, 0]).square().mean(), {}

    return lambda: trainer.minimise(learner, loss, size)


def width(seconds: float) -> Curves:
    """Samples per second of networks of several widths, 1 being ours."""
    given, _ = read_yaml(ROOT / "configs" / "generative" / "diffusion_mnist.yaml")
    preset: Any = resolve(diffusion.EXPERIMENT, given).settings
    preset = replace(preset, trainer=replace(preset.trainer, precision="auto"), data=data.DataConfig(name="mnist"))
    curves: Curves = {"Nature network": [], "U-Net": []}
    for scale in (0.25, 0.5, 1.0, 2.0):
        curves["Nature network"].append((scale, 256 / pace(update(256, scale), seconds)))
        network = replace(preset.model.network, widths=tuple(round(scale * channels) for channels in preset.model.network.widths))
        trainer = Trainer(replace(preset, model=replace(preset.model, network=network)), distributed.World())
        curves["U-Net"].append((scale, preset.data.batch_size / pace(partial(trainer._one_step, [], None), seconds)))
    return curves


def replay(seconds: float) -> Curves:
    """Microseconds per transition, for memories that are full."""
    curves: Curves = {}
    for capacity in (10_000, 30_000, 100_000, 300_000, 1_000_000):
        for shipped in (False, True):
            fetch = our_fetch(our_memory(shipped, capacity))
            for size in (32, 256):
                name = f"{'by priority' if shipped else 'uniform'}, {size}"
                curves.setdefault(name, []).append((capacity, 1e6 * pace(partial(fetch, size), seconds / 2, 10) / size))
            del fetch
            gc.collect()  # a memory holds itself, and there is room for one at a time
    return curves


def world(seconds: float) -> Curves:
    """Steps per second of one process and of two."""
    return {f"batch {size}": [(count, parallel(count, size, round(100 * seconds))) for count in (1, 2)] for size in (128, 1024)}


def parallel(processes: int, size: int, steps: int) -> float:
    """Steps per second of training the VAE by so many processes, without start and end."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(ROOT / "scripts" / "train_vae.py")]
        words += [str(ROOT / "configs" / "generative" / "vae_mnist.yaml"), "--run-dir", f"{folder}/run", "--tracking.mode", "disabled"]
        words += ["--trainer.threads", "1", "--data.batch-size", str(size), "--trainer.log-every", str(max(1, steps // 10))]
        said([*words, "--trainer.steps", str(steps)])
        rows: list[float] = [json.loads(line)["steps_per_second"] for line in Run(Path(folder, "run")).timing.read_text().splitlines()]
    return statistics.median(rows[1:-1])  # the first one warms up, and to the last one belong the pictures


MEASURES: dict[str, Callable[[float], Curves]] = {"envs": envs, "batch": batch, "width": width, "replay": replay, "world": world}


# The picture

AXES = {
    "envs": ("games of Breakout side by side", "actions/s"),
    "batch": ("transitions of an update, Nature network", "transitions/s"),
    "width": ("width, as a part of ours", "samples/s of training"),
    "replay": ("transitions in memory", "microseconds per transition sampled"),
    "world": ("processes of one thread", "steps/s of the VAE"),
}


def draw(path: Path, results: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """A panel for each part, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    parts = [part for part in AXES if part in results]
    columns = min(3, len(parts))
    figure = Figure(figsize=(4.4 * columns, 3.5 * -(-len(parts) // columns)), layout="constrained")
    panels = list(figure.subplots(-(-len(parts) // columns), columns, squeeze=False).flat)
    for axes in panels[len(parts) :]:
        axes.remove()
    for axes, part in zip(panels, parts):
        for name, points in results[part].items():
            axes.plot(*zip(*points), marker="o", markersize=3.5, label=name)
        axes.set(xscale="log", yscale="log", xlabel=AXES[part][0], ylabel=AXES[part][1])
        places = sorted({x for points in results[part].values() for x, _ in points})
        axes.set_xticks(places, [short(place) for place in places])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high / 10), high)  # so that what hardly grows looks so
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def short(value: float) -> str:
    """A number for an axis: 0.25, 1024, 300k, 1M."""
    size, letter = (1e6, "M") if value >= 1e6 else (1e3, "k") if value >= 2e3 else (1, "")
    return f"{value / size:g}{letter}"


if __name__ == "__main__":
    sys.exit(guarded(main))
