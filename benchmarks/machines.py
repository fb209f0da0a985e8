"""What scales over machines and what does not: bytes and work of a step, all-reduces, training on two machines, runs side by side.

    python benchmarks/machines.py                      some minutes; as root, with iproute2 (`ip`, `tc`)
    python benchmarks/machines.py --rounds 3 --seconds 6
    python benchmarks/machines.py --only bytes         a part of it; the report keeps what the others found before

Two network namespaces on a bridge stand for two machines; `tc` gives their cable a rate. A process is tied to one core and has one thread,
so that two machines have twice the cores of one. The work of a step is taken in seconds of the processor, which others on the machine
hardly change; from it and from the time of an all-reduce follows the plain model of two machines,

    strong scaling (the same batch)    speed-up = work of the batch / (work of half the batch + all-reduce of all gradients)
    weak scaling (twice the batch)     speed-up = 2 work of the batch / (work of the batch + all-reduce of all gradients)

and beside it stands what was measured by the clock, which needs a quiet machine. The report is benchmarks/results/machines.json.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, distributed, nn

from lab import distributed as places
from lab.launch import read_order
from lab.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {
    "autoencoder": "generative/autoencoder_mnist",
    "vae": "generative/vae_mnist",
    "vqvae": "generative/vqvae_mnist",
    "tokens": "generative/tokens_mnist",
    "gan": "generative/gan_mnist",
    "flow": "generative/glow_mnist",
    "diffusion": "generative/diffusion_mnist",
    "superresolution": "generative/superresolution_mnist",
    "classifier": "classifier/mnist",
}
TRAINED = {"vae": 256, "gan": 64, "diffusion": 64, "classifier": 128}
"""What is trained here, and with which batch on one machine."""
CABLES = {
    "unlimited": [],
    "1 Gbit/s": ["tbf", "rate", "1gbit", "burst", "256kb", "latency", "50ms"],
    "100 Mbit/s": ["tbf", "rate", "100mbit", "burst", "256kb", "latency", "50ms"],
    "1 Gbit/s, 1 ms": ["netem", "rate", "1gbit", "delay", "1ms"],
}
SIZES = (8, 500_000, 2_000_000, 8_000_000)
"""Bytes of the all-reduces."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    only: Literal["all", "bytes", "reduce", "work", "train"] = "all"
    """A part of it."""
    rounds: int = 1
    """Times that everything is measured, in turns; the medians count."""
    seconds: float = 3.0
    """Seconds of each measurement, after some steps to warm up."""
    out: Path = ROOT / "benchmarks" / "results" / "machines.json"
    """Where the figures go."""


def main() -> None:
    """Measure, print and write the report."""
    options = tyro.cli(Options, description=__doc__)
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    report |= {"cores": os.cpu_count(), **places.environment(), "load": os.getloadavg()[0]}
    if options.only in ("all", "bytes"):
        report["bytes"] = {family: bytes_of(family) for family in PRESETS}
    if options.only in ("all", "work"):
        report["work"] = {family: work_of(family, batch, options) for family, batch in TRAINED.items()}
    cables = usable_cables() if options.only in ("all", "reduce", "train") else []
    if options.only in ("all", "reduce"):
        report["reduce"] = {cable: reduces(cable, options) for cable in cables}
    if options.only in ("all", "train"):
        report["train"] = {family: training(family, batch, cables, options) for family, batch in TRAINED.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(tables(report)))


# Bytes


def settings(family: str, *options: str) -> Any:
    """The settings of a preset."""
    package = "lab" if family == "classifier" else "generative"
    default = importlib.import_module(f"{package}.{family}").EXPERIMENT
    return read_order(default, [str(ROOT / "configs" / f"{PRESETS[family]}.yaml"), *options]).resolved.settings


def bytes_of(family: str) -> dict[str, int]:
    """Weights that learn, and the bytes of their gradients, which are averaged over the machines at every step."""
    experiment, shape, classes = settings(family), (1, 28, 28), tuple("0123456789")
    weights, times = learning(experiment.network(shape, classes)), 1
    critic = 0
    if family == "gan":
        gan = importlib.import_module("generative.gan")
        critic, times = learning(gan.Critic(experiment.model, shape, len(classes))), experiment.model.critic_steps
    if family == "superresolution" and experiment.model.adversarial:
        critic = learning(importlib.import_module("generative.superresolution").critic_for(experiment.model, shape))
    return {"weights": weights + critic, "bytes": 4 * (weights + times * critic)}


def learning(module: nn.Module) -> int:
    """How many weights of a module learn."""
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


# Two machines


def run(*words: str) -> None:
    """A command that must succeed."""
    subprocess.run(words, check=True, capture_output=True)


@contextlib.contextmanager
def two_machines(cable: str) -> Iterator[list[str]]:
    """Names of two network namespaces, 10.84.0.1 and 10.84.0.2, that hang on one bridge by cables of some kind; they are gone at the end.

    Raises:
        subprocess.CalledProcessError: this is not root, or the kernel has no such cable.
    """
    bridge, names = f"bm{os.getpid()}", [f"machine{os.getpid()}-{number}" for number in (1, 2)]
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "set", bridge, "up")
        for number, name in enumerate(names, start=1):
            run("ip", "netns", "add", name)
            run("ip", "link", "add", f"{bridge}-{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", f"{bridge}-{number}", "master", bridge, "up")
            run("ip", "-n", name, "addr", "add", f"10.84.0.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", name, "link", "set", device, "up")
            if CABLES[cable]:
                run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", *CABLES[cable])
        yield names
    finally:
        for number, name in enumerate(names, start=1):
            subprocess.run(["ip", "link", "delete", f"{bridge}-{number}"], capture_output=True)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


def usable_cables() -> list[str]:
    """The cables that this kernel has; says which are left out.

    Raises:
        SystemExit: two machines cannot be made here at all.
    """
    usable = []
    for cable in CABLES:
        try:
            with two_machines(cable):
                usable.append(cable)
        except subprocess.CalledProcessError as error:
            print(f"{cable}: left out, {error.stderr.decode().strip()}", file=sys.stderr)
        except FileNotFoundError:
            sys.exit("iproute2 is missing (`ip`, `tc`): two machines cannot be made here")
    if not usable:
        sys.exit("two machines cannot be made here; run this as root")
    return usable


def started(order: dict[str, Any], core: int, machine: str = "", rank: int = 0, size: int = 1) -> subprocess.Popen[str]:
    """A worker on a core of its own."""
    meeting = {"MASTER_ADDR": "10.84.0.1", "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    ranks = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": "1"}
    words = ["taskset", "--cpu-list", str(core), sys.executable, __file__, "--worker", json.dumps(order)]
    inside = ["ip", "netns", "exec", machine, *words] if machine else words
    return subprocess.Popen(inside, env={**os.environ, **meeting, **ranks}, stdout=subprocess.PIPE, text=True)


def results(workers: list[subprocess.Popen[str]]) -> list[Any]:
    """What workers found, when all have ended.

    Raises:
        SystemExit: one has failed.
    """
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit("a worker has failed, see above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def on_two(cable: str, order: dict[str, Any]) -> Any:
    """What the first of two machines found."""
    with two_machines(cable) as names:
        return results([started(order, rank, name, rank, 2) for rank, name in enumerate(names)])[0]


def reduces(cable: str, options: Options) -> dict[int, float]:
    """Seconds of an all-reduce of each size."""
    rounds = [on_two(cable, {"work": "reduce", "seconds": options.seconds}) for _ in range(options.rounds)]
    return {size: statistics.median(found[str(size)] for found in rounds) for size in SIZES}


def order_for(family: str, batch: int, options: Options, clock: str = "wall") -> dict[str, Any]:
    """What a worker is told that trains."""
    return {"work": family, "batch": batch, "seconds": options.seconds, "clock": clock}


def work_of(family: str, batch: int, options: Options) -> dict[int, float]:
    """Seconds of the processor for a step with half the batch and with all of it."""
    sizes = [batch // 2, batch]
    rounds = [[results([started(order_for(family, size, options, "cpu"), 0)])[0] for size in sizes] for _ in range(options.rounds)]
    return {size: statistics.median(found) for size, found in zip(sizes, zip(*rounds, strict=True), strict=True)}


def training(family: str, batch: int, cables: list[str], options: Options) -> dict[str, float]:
    """Seconds of a step by the clock: alone, side by side with a second run, and on two machines."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    order = order_for(family, batch, options)
    for _ in range(options.rounds):
        found["alone"] += results([started(order, 0)])
        found["side by side"].append(statistics.mean(results([started(order, core) for core in (0, 1)])))
        for cable in cables:
            found[f"{cable}, strong"].append(on_two(cable, order))
            found[f"{cable}, weak"].append(on_two(cable, order_for(family, 2 * batch, options)))
    return {name: statistics.median(values) for name, values in found.items()}


# The worker


def worker(order: dict[str, Any]) -> Any:
    """What one process of a measurement does."""
    if order["work"] == "reduce":
        world = places.join("cpu", 1, False)
        return {size: seconds_of(world, order["seconds"], "wall", torch.zeros(size // 4)) for size in SIZES}
    options = ("--data.name", "digits", "--data.batch-size", str(order["batch"]), "--trainer.steps", "1000000", "--trainer.device", "cpu")
    experiment = settings(order["work"], *options)
    world = places.join("cpu", 1, False)
    return seconds_of(world, order["seconds"], order["clock"], Trainer(experiment, world))


def seconds_of(world: places.World, seconds: float, clock: str, what: Tensor | Trainer) -> float:
    """The median time of an all-reduce of a tensor, or of a step of training with what the loop asks of the others after it."""
    now = time.process_time if clock == "cpu" else time.perf_counter

    def once() -> float:
        start = now()
        if isinstance(what, Tensor):
            distributed.all_reduce(what)
        else:
            what.advance()
            world.any(False)
        return now() - start

    warm = min(once() for _ in range(4))
    times = world.share(max(4, int(seconds / warm)))
    return statistics.median(once() for _ in range(times))


# The report


def tables(report: dict[str, Any]) -> Iterator[str]:
    """What was measured, as Markdown."""
    if "bytes" in report:
        yield from ("| preset | weights that learn | MB per step |", "|---|---|---|")
        for family, count in report["bytes"].items():
            yield f"| `{Path(PRESETS[family]).name}` | {count['weights']:,} | {count['bytes'] / 1e6:.1f} |"
    if "reduce" in report:
        yield from ("", "| all-reduce of | " + " | ".join(report["reduce"]) + " |", "|---" * (1 + len(report["reduce"])) + "|")
        for size in SIZES:
            times = [found.get(size, found.get(str(size))) for found in report["reduce"].values()]
            yield f"| {size:,} bytes | " + " | ".join(f"{1000 * value:.2f} ms" for value in times) + " |"
    if {"reduce", "work"} <= report.keys():
        yield from (
            "",
            "| preset, batch, cable | strong: model | measured | weak: model | measured | two runs side by side |",
            "|---" * 6 + "|",
        )
        for family in report["work"]:
            for cable in report["reduce"]:
                yield row(report, family, cable)


def row(report: dict[str, Any], family: str, cable: str) -> str:
    """How much faster two machines are than one, in images per second, by one cable: as the model has it and as it was measured."""
    half, whole = report["work"][family].values()
    wire = reduce_time(report["reduce"][cable], bytes_of(family)["bytes"])
    seconds = report.get("train", {}).get(family, {})

    def measured(name: str, times: int) -> str:
        return f"{times * seconds['alone'] / seconds[name]:.2f}x" if name in seconds else ""

    strong, weak = f"{whole / (half + wire):.2f}x", f"{2 * whole / (whole + wire):.2f}x"
    cells = (strong, measured(f"{cable}, strong", 1), weak, measured(f"{cable}, weak", 2), measured("side by side", 2))
    return f"| {family}, {TRAINED[family]}, {cable} | {' | '.join(cells)} |"


def reduce_time(measured: dict[Any, float], size: int) -> float:
    """Seconds of an all-reduce of some bytes, on the line through the smallest and the largest that were measured."""
    small, large = (measured.get(size, measured.get(str(size), 0.0)) for size in (SIZES[0], SIZES[-1]))
    return small + (large - small) * size / SIZES[-1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(json.loads(sys.argv[2]))), flush=True)
        os._exit(0)  # as lab.launch ends one process of several
    else:
        main()
