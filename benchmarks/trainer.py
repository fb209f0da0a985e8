"""What the trainer costs, and what it gains, on the same VAE, data and batch in one run.

    python benchmarks/trainer.py                    every network and precision, about 20 minutes on 2 cores
    python benchmarks/trainer.py --rounds 3 --steps 500 --networks mlp

Three loops take turns, so that a busy machine troubles all of them alike:

    ours          Trainer.fit with its recorder, checkpoints and previews as in configs/generative/vae_mnist.yaml
    bare          the same mathematics (gathering, binarising, clipping, fused AdamW, averaging) with nothing around it
    conventional  a DataLoader over the same images as floats, torch.optim.Adam with its defaults, loss.item() every step

overhead: ours against bare, in turns of 50 steps within one process, plus what a preview and a checkpoint cost every 3000 steps.
speed-up: conventional against ours, in longer turns, each in a process of its own so that none profits from another's settings.
Medians over the turns, with the quartiles (overhead) or the range (speed-up).
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.utils.data import DataLoader, TensorDataset

from generative.networks import NetworkConfig
from generative.vae import VAE, VAEConfig, VAEExperiment, VAETask
from lab import data, distributed, runs
from lab.data import DataConfig, ImageSet, as_float
from lab.ema import EMA
from lab.experiment import TrainerConfig
from lab.learner import Shard
from lab.optimizer import OptimizerConfig, create, learning_rate
from lab.recorder import Lines, Recorder, console
from lab.tracking import Tracker, TrackingConfig
from lab.trainer import Trainer

NETWORKS = {"mlp": NetworkConfig(), "conv": NetworkConfig(kind="conv", hidden=256)}


@dataclass(frozen=True)
class Options:
    """What to time, and how long."""

    rounds: int = 3
    """Long turns of each loop, for the speed-up."""
    steps: int = 2000
    """Steps of a long turn of the perceptron; convolutions take a tenth of them."""
    networks: tuple[Literal["mlp", "conv"], ...] = ("mlp", "conv")
    """Which VAEs."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Number formats of ours and bare; the conventional loop is always fp32."""
    data: Literal["mnist", "digits"] = "mnist"
    """Images to train on."""
    out: Path = Path("benchmarks/results/trainer.json")
    """Where the figures go."""
    only: Literal["", "ours", "conventional", "overhead"] = ""
    """Take one measurement alone, and print it as JSON."""


def main() -> None:
    """Take every measurement, print a line for each and write the report."""
    options = tyro.cli(Options, description=__doc__)
    if options.only:
        print(json.dumps(measure(options)))
        return
    results = []
    for network in options.networks:
        for precision in options.precisions:
            results.append(compare(network, precision, options))
            console.print(sentence(results[-1]), highlight=False, soft_wrap=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": platform.processor() or platform.machine(), **distributed.environment(), "results": results}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def compare(network: str, precision: str, options: Options) -> dict[str, Any]:
    """Overheads of short turns, and seconds per step of long ones, each measured in a process of its own."""
    steps = options.steps if network == "mlp" else max(1, options.steps // 10)
    shared = ["--networks", network, "--precisions", precision, "--steps", str(steps), "--data", options.data]

    def alone(name: str) -> Any:
        done = subprocess.run([sys.executable, __file__, "--only", name, *shared], check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    turns = [(alone("ours"), alone("conventional")) for _ in range(options.rounds)]
    seconds = {"ours": [ours for ours, _ in turns], "conventional": [usual for _, usual in turns]}
    speed_up = [usual / ours for ours, usual in turns]
    return {"network": network, "precision": precision, "steps": steps, "seconds": seconds, "speed_up": speed_up, **alone("overhead")}


def measure(options: Options) -> Any:
    """One measurement, after a short warm-up."""
    (network,), (precision,), steps = options.networks, options.precisions, options.steps
    experiment, warm_up = (settings(network, precision, count, options.data) for count in (steps, 20))
    if options.only == "conventional":
        images = data.load(DataConfig(name=options.data))
        conventional(warm_up, images)
        return conventional(experiment, images)
    world = distributed.join("cpu", 0, deterministic=False)
    with tempfile.TemporaryDirectory() as folder:
        if options.only == "overhead":
            return overhead(experiment, world, Path(folder))
        trained(warm_up, world, Path(folder) / "warm-up")
        return trained(experiment, world, Path(folder) / "run")


def sentence(result: dict[str, Any]) -> str:
    """The figures of one comparison in a line."""
    low, middle, high = statistics.quantiles(result["overhead"], n=4)
    low, middle, high = (value + result["now_and_then"] for value in (low, middle, high))
    ratios, milliseconds = result["speed_up"], {name: 1000 * statistics.median(times) for name, times in result["seconds"].items()}
    return (
        f"{result['network']} {result['precision']}: overhead {middle:+.1%} (quartiles {low:+.1%} to {high:+.1%}), speed-up "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); ms per step: ours {milliseconds['ours']:.2f}, "
        f"conventional {milliseconds['conventional']:.2f}"
    )


def settings(network: str, precision: str, steps: int, name: str) -> VAEExperiment:
    """The experiment that all loops train, at the pace of configs/generative/vae_mnist.yaml."""
    pace = {"log_every": 100, "preview_every": 3000, "save_every": 3000}
    trainer = TrainerConfig(steps=steps, precision="bf16" if precision == "bf16" else "fp32", **pace)
    optimizer = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=200, ema=0.999, clip_norm=200.0)
    source = DataConfig(name="mnist" if name == "mnist" else "digits")
    return VAEExperiment(trainer=trainer, optimizer=optimizer, data=source, model=VAEConfig(network=NETWORKS[network]))


# The three loops


def prepared(experiment: VAEExperiment, world: distributed.World, folder: Path) -> tuple[Trainer, runs.Run, Recorder]:
    """The trainer as a user runs it, W&B apart."""
    run = runs.create("benchmark", folder, "experiment: vae\n")
    tracker = Tracker.start(TrackingConfig(mode="disabled"), run.folder, identity="b", name="b", group="b", settings={}, axes={})
    return Trainer(experiment, world), run, Recorder(run, tracker, Lines("ours", experiment.trainer.steps, every=1e9))


def trained(experiment: VAEExperiment, world: distributed.World, folder: Path) -> float:
    """Seconds per step of the trainer, with one preview and one checkpoint at the end."""
    trainer, run, recorder = prepared(experiment, world, folder)
    began = time.perf_counter()
    trainer.fit(run, recorder)
    return (time.perf_counter() - began) / experiment.trainer.steps


def overhead(experiment: VAEExperiment, world: distributed.World, folder: Path, turns: int = 40, steps: int = 50) -> dict[str, Any]:
    """What the trainer adds to a step, as parts of the bare step, a turn each; and what its previews and checkpoints add."""
    long = replace(experiment, trainer=replace(experiment.trainer, steps=10**9))
    trainer, run, recorder = prepared(long, world, folder)
    bare = bare_step(long, world)
    turns, steps = (turns, steps) if experiment.model.network.kind == "mlp" else (turns // 2, steps // 5)
    pairs = [(timed(lambda: trainer._one_step([], recorder), steps), timed(bare, steps)) for _ in range(turns)]
    trainer.media = run.media
    rare = min(timed(lambda: trainer.task.preview(trainer), 1) for _ in range(3))  # type: ignore[attr-defined]
    rare += min(timed(lambda: trainer._save(run, recorder, needed=True), 1) for _ in range(3))
    step = statistics.median(bare for _, bare in pairs)
    return {"overhead": [ours / bare - 1 for ours, bare in pairs[1:]], "now_and_then": rare / experiment.trainer.save_every / step}


def timed(function: Callable[[], Any], times: int) -> float:
    """Seconds per call."""
    began = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - began) / times


def bare_step(experiment: VAEExperiment, world: distributed.World) -> Callable[[], None]:
    """A step of the same mathematics and nothing else."""
    task = Trainer(experiment, world).task
    assert isinstance(task, VAETask)
    model, config, batch = task.model, experiment.optimizer, experiment.data.batch_size
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, average = create(config, weights), EMA(model, config.ema)
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=experiment.trainer.precision == "bf16"):
            loss, _ = task.loss(Shard(0, batch, batch, experiment.trainer.seed, number, world.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, number, experiment.trainer.steps)
        optimizer.step()
        average.update()

    return step


def conventional(experiment: VAEExperiment, images: ImageSet) -> float:
    """Seconds per step of the loop of most tutorials."""
    torch.manual_seed(0)
    model = VAE(experiment.model, images.shape, images.classes)
    loader = DataLoader(TensorDataset(as_float(images.train.images), images.train.labels), experiment.data.batch_size, shuffle=True)
    optimizer = torch.optim.Adam((weight for weight in model.parameters() if weight.requires_grad), lr=1e-3)
    done, total = 0, 0.0
    began = time.perf_counter()
    while done < experiment.trainer.steps:
        for grey, labels in loader:
            x = torch.bernoulli(grey)
            likelihood, kl = model(x, labels, torch.randn(len(x), model.latent))
            loss = (kl.sum(1) - likelihood).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            done += 1
            if done == experiment.trainer.steps:
                break
    return (time.perf_counter() - began) / done


if __name__ == "__main__":
    main()
