"""What every backbone learns in a minute, how our blocks compare with torch's own layers, and how fast agents learn with them.

    python benchmarks/backbones.py                           everything, about 45 minutes on 2 cores
    python benchmarks/backbones.py --parts minute --pattern "*res*" --seconds 20
    python benchmarks/backbones.py --parts blocks agents

    minute   each backbone as a classifier of MNIST, trained for a minute with the settings of configs/classifier/mnist_minute.yaml
             (the learning rate comes down to 0 at the end of the minute): test accuracy, images per second, parameters, multiply-adds
    blocks   forward and backward of our Transformer layer beside nn.TransformerEncoderLayer, of our residual block beside the same
             block of bare nn layers, of our LSTM and GRU beside nn.LSTM and nn.GRU, of our multi-head attention beside
             nn.MultiheadAttention: ratios of times, taken in turns
    agents   actions per second of the DQN of configs/rl/dqn_pong.yaml, learning Pong, with each of some torsos, in turns

A minute is a minute of training steps: reading the images, starting and testing are left out. `scripts/backbones.py --plot` draws
accuracy against cost from these figures.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from agents import shipped, trained
from torch import Tensor, nn

from lab import distributed
from lab.attention.multihead import MultiHead
from lab.backbones import list_backbones
from lab.backbones.cost import multiplies, parameters
from lab.backbones.recurrent import GRUCell, LSTMCell, Recurrent
from lab.backbones.resnet import Basic
from lab.backbones.transformer import EncoderLayer
from lab.classifier import EXPERIMENT, ClassifierExperiment, ClassifierTask, judge
from lab.config import read_yaml, resolve
from lab.recorder import console
from lab.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
Part = Literal["minute", "blocks", "agents"]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[Part, ...] = ("minute", "blocks", "agents")
    """Which comparisons; the figures of the others are kept."""
    pattern: str = "*"
    """Backbones of the part `minute`, as in *conv*."""
    seconds: float = 60.0
    """Training time of each of them."""
    rounds: int = 60
    """Turns of each pair of blocks."""
    torsos: tuple[str, ...] = ("nature", "impala", "resnet_small")
    """Backbones of the part `agents`."""
    out: Path = ROOT / "benchmarks" / "results" / "backbones.json"
    """Where the figures go."""


def main() -> None:
    """Take every measurement, print a line for each and write the report."""
    options = tyro.cli(Options, description=__doc__)
    distributed.join("cpu", 0, deterministic=False)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    report |= {"machine": platform.processor() or platform.machine(), **distributed.environment()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        for key, rows in {"minute": minute, "blocks": blocks, "agents": agents}[part](options, report).items():
            report[key] = rows
        options.out.write_text(json.dumps(report, indent=1) + "\n")


# A minute of MNIST


def minute(options: Options, report: dict[str, Any]) -> dict[str, Any]:
    """Every backbone's accuracy after so many seconds; rows of others that were measured before stay."""
    rows = {row["name"]: row for row in report.get("rows", [])}
    for name in list_backbones(options.pattern):
        rows[name] = row = learnt(name, options.seconds)
        speed = f"{row['images_per_second']:7,.0f} images/s  {row['seconds']:4.0f} s"
        size = f"{row['parameters'] / 1e3:6,.0f} k  {row['multiplies'] / 1e6:5.1f} M"
        console.print(f"{name:18} {100 * row['accuracy']:6.2f} %  {speed}  {size}", highlight=False)
    return {"rows": [rows[name] for name in sorted(rows)]}


def learnt(name: str, seconds: float, warm_up: int = 10, timed: int = 20) -> dict[str, Any]:
    """Train one backbone for about so long, and test it."""
    given, _ = read_yaml(ROOT / "configs" / "classifier" / "mnist_minute.yaml")
    preset = resolve(EXPERIMENT, given).settings
    preset = replace(preset, model=replace(preset.model, backbone=name))
    trainer = trainer_for(preset, warm_up + timed)
    turn(trainer, warm_up)
    trainer = trainer_for(preset, max(1, round(seconds / turn(trainer, timed) * timed)))
    passed = turn(trainer, trainer.config.steps)
    task = cast(ClassifierTask, trainer.task)
    with task.learner.judged() as model:
        scores = judge(cast(Any, model), task.data.test).scores()
    body, (channels, size, _) = task.model.body, task.data.shape
    return {
        "name": name,
        "accuracy": scores["accuracy"],
        "seconds": passed,
        "images_per_second": trainer.config.steps * preset.data.batch_size / passed,
        "parameters": parameters(body),
        "multiplies": multiplies(body, channels, size),
    }


def trainer_for(preset: ClassifierExperiment, steps: int) -> Trainer:
    """A trainer of a preset that ends after so many steps."""
    experiment = replace(preset, trainer=replace(preset.trainer, steps=steps))
    return Trainer(experiment, distributed.join("cpu", 0, deterministic=False))


def turn(trainer: Trainer, steps: int) -> float:
    """Seconds of some steps."""
    began = time.perf_counter()
    for _ in range(steps):
        trainer._one_step([], None)
    return time.perf_counter() - began


# Blocks


class PlainBlock(nn.Module):
    """A residual block as one writes it with nothing but nn."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_again = nn.GroupNorm(channels // 8, channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, C, h, w) to the same."""
        out = self.relu(self.norm(self.first(maps)))
        return cast(Tensor, self.relu(self.norm_again(self.second(out)) + maps))


def blocks(options: Options, report: dict[str, Any]) -> dict[str, Any]:
    """Ours beside torch's, each pair on the same input."""
    tokens, maps, rows = torch.rand(64, 49, 128), torch.rand(64, 32, 14, 14), torch.rand(64, 28, 28)
    theirs = nn.TransformerEncoderLayer(128, 4, 512, 0.0, "gelu", batch_first=True, norm_first=True)
    attention = nn.MultiheadAttention(128, 4, batch_first=True)
    pairs: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], nn.Module, Callable[[Tensor], Tensor], Tensor]] = {}

    def pair(name: str, ours: nn.Module, peer: nn.Module, inputs: Tensor, peers_call: Any = None, our_call: Any = None) -> None:
        pairs[name] = (ours, our_call or ours, peer, peers_call or peer, inputs)

    pair("transformer layer", EncoderLayer(128, 4, 512, activation="gelu", norm_first=True), theirs, tokens)
    pair("multi-head attention", MultiHead(128, 4), attention, tokens, lambda x: attention(x, x, x, need_weights=False)[0])
    pair("residual block", Basic(32, 32), PlainBlock(32), maps)
    for name, cell, kind in (("LSTM", LSTMCell, nn.LSTM), ("GRU", GRUCell, nn.GRU)):
        peer = kind(28, 128, batch_first=True)
        ours = Recurrent(cell, 28, 128)
        pair(name, ours, peer, rows, lambda x, peer=peer: peer(x)[0], lambda x, ours=ours: ours(x)[0])
    return {"blocks": {name: compared(name, *each, rounds=options.rounds) for name, each in pairs.items()}}


def compared(name: str, ours: nn.Module, our_call: Any, peer: nn.Module, peers_call: Any, inputs: Tensor, rounds: int) -> list[float]:
    """The ratio of our time to the peer's, turn by turn, without the first ones."""
    inputs = inputs.requires_grad_()
    ratios = []
    for index in range(rounds + 5):
        pair = [(ours, our_call), (peer, peers_call)]
        times = {id(module): learn_once(module, call, inputs) for module, call in (pair if index % 2 else pair[::-1])}
        ratios.append(times[id(ours)] / times[id(peer)])
    low, middle, high = statistics.quantiles(ratios[5:], n=4)
    console.print(f"{name}: {middle:.3f} of torch's time (quartiles {low:.3f} to {high:.3f})", highlight=False)
    return [low, middle, high]


def learn_once(module: nn.Module, call: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    module.zero_grad()
    inputs.grad = None
    began = time.perf_counter()
    call(inputs).square().mean().backward()
    return time.perf_counter() - began


# Agents


def agents(options: Options, report: dict[str, Any]) -> dict[str, Any]:
    """Actions per second of learning Pong with each torso, in three turns."""
    preset: Any = shipped("dqn_pong", "rl.dqn")
    rates: dict[str, list[float]] = {name: [] for name in options.torsos}
    for _ in range(3):
        for name in rates:
            rates[name].append(trained(replace(preset, dqn=replace(preset.dqn, backbone=name)), 15))
    for name, found in rates.items():
        console.print(
            f"DQN with {name}: {statistics.median(found):,.0f} actions/s ({min(found):,.0f} to {max(found):,.0f})", highlight=False
        )
    return {"agents": rates}


if __name__ == "__main__":
    main()
