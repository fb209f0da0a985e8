"""What the trainer costs, and what it gains, on the same VAE, data and batch in one run.

    python benchmarks/trainer.py                    every network and precision, about 20 minutes on 2 cores
    python benchmarks/trainer.py --rounds 3 --steps 500 --networks mlp

Three loops take turns, round by round and each in a process of its own, so that a busy machine troubles all of them alike
and none profits from another's settings:

    ours          Trainer.fit with its recorder, checkpoints and previews as in configs/generative/vae_mnist.yaml
    bare          the same mathematics (gathering, binarising, clipping, fused AdamW, averaging) with nothing around it
    conventional  a DataLoader over the same images as floats, torch.optim.Adam with its defaults, loss.item() every step

overhead = ours / bare - 1 in seconds per step; speed-up = conventional / ours. Medians over rounds, with their range.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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

    rounds: int = 5
    """Times that each loop has its turn."""
    steps: int = 3000
    """Steps of a turn of the perceptron; convolutions take a tenth of them."""
    networks: tuple[Literal["mlp", "conv"], ...] = ("mlp", "conv")
    """Which VAEs."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Number formats of ours and bare; the conventional loop is always fp32."""
    data: Literal["mnist", "digits"] = "mnist"
    """Images to train on."""
    out: Path = Path("benchmarks/results/trainer.json")
    """Where the figures go."""
    only: Literal["", "ours", "bare", "conventional"] = ""
    """Time one turn of this loop alone and print its seconds per step."""


def main() -> None:
    """Time every pairing and print the table."""
    options = tyro.cli(Options, description=__doc__)
    if options.only:
        print(one_turn(options))
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
    """Seconds per step of the three loops, a list of rounds each, and their ratios."""
    steps = options.steps if network == "mlp" else max(1, options.steps // 10)
    shared = ["--networks", network, "--precisions", precision, "--steps", str(steps), "--data", options.data]
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "conventional": []}
    for _ in range(options.rounds):
        for name, turns in seconds.items():
            done = subprocess.run([sys.executable, __file__, "--only", name, *shared], check=True, capture_output=True, text=True)
            turns.append(float(done.stdout.split()[-1]))
    overhead = [ours / bare - 1 for ours, bare in zip(seconds["ours"], seconds["bare"])]
    speed_up = [usual / ours for usual, ours in zip(seconds["conventional"], seconds["ours"])]
    return {"network": network, "precision": precision, "steps": steps, "seconds": seconds, "overhead": overhead, "speed_up": speed_up}


def one_turn(options: Options) -> float:
    """Seconds per step of one loop, after a short warm-up."""
    (network,), (precision,), steps = options.networks, options.precisions, options.steps
    experiment = settings(network, precision, steps, options.data)
    warm_up = settings(network, precision, 20, options.data)
    if options.only == "conventional":
        images = data.load(DataConfig(name=options.data))
        conventional(warm_up, images)
        return conventional(experiment, images) / steps
    world = distributed.join("cpu", 0, deterministic=False)
    loop = ours if options.only == "ours" else bare
    bare(warm_up, world)
    return loop(experiment, world) / steps


def sentence(result: dict[str, Any]) -> str:
    """The figures of one comparison in a line."""
    overhead, speed_up = summary(result["overhead"], "+.1%"), summary(result["speed_up"], ".2f")
    milliseconds = ", ".join(f"{name} {1000 * statistics.median(times):.2f}" for name, times in result["seconds"].items())
    return f"{result['network']} {result['precision']}: overhead {overhead}, speed-up {speed_up}; ms per step: {milliseconds}"


def summary(values: list[float], form: str) -> str:
    """The median of some figures, and their range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def settings(network: str, precision: str, steps: int, name: str) -> VAEExperiment:
    """The experiment that all three loops train."""
    trainer = TrainerConfig(
        steps=steps, precision="bf16" if precision == "bf16" else "fp32", log_every=100, preview_every=3000, save_every=3000
    )
    optimizer = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=200, ema=0.999, clip_norm=200.0)
    source = DataConfig(name="mnist" if name == "mnist" else "digits")
    return VAEExperiment(trainer=trainer, optimizer=optimizer, data=source, model=VAEConfig(network=NETWORKS[network]))


# The three loops; each returns the seconds of its steps


def ours(experiment: VAEExperiment, world: distributed.World) -> float:
    """The trainer as a user runs it, W&B apart."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(experiment, world)
        run = runs.create("benchmark", Path(folder), "experiment: vae\n")
        tracker = Tracker.start(TrackingConfig(mode="disabled"), run.folder, identity="b", name="b", group="b", settings={}, axes={})
        recorder = Recorder(run, tracker, Lines("ours", experiment.trainer.steps, every=1e9))
        began = time.perf_counter()
        trainer.fit(run, recorder)
        seconds = time.perf_counter() - began
        recorder.close()
        return seconds


def bare(experiment: VAEExperiment, world: distributed.World) -> float:
    """The same mathematics in a plain loop."""
    task = Trainer(experiment, world).task
    assert isinstance(task, VAETask)
    model, config = task.model, experiment.optimizer
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, average = create(config, weights), EMA(model, config.ema)
    batch = experiment.data.batch_size
    began = time.perf_counter()
    for step in range(experiment.trainer.steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=experiment.trainer.precision == "bf16"):
            loss, _ = task.loss(Shard(0, batch, batch, experiment.trainer.seed, step, world.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, experiment.trainer.steps)
        optimizer.step()
        average.update()
    return time.perf_counter() - began


def conventional(experiment: VAEExperiment, images: ImageSet) -> float:
    """The loop of most tutorials."""
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
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
