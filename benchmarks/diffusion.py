"""A diffusion model trained by our trainer, and by a plain loop in the manner of diffusers' unconditional example, in one run.

    python benchmarks/diffusion.py                       speed, then quality against time: about 25 minutes on 2 cores
    python benchmarks/diffusion.py --minutes 0           speed alone

Both train the same UNet2DModel of diffusers (widths 32, 64, 64; no classes) on the same images with batches of 128. The plain loop
decodes a picture at a time in a `Dataset` with a `DataLoader`, adds noise by `DDPMScheduler`, predicts epsilon, and follows AdamW, a
cosine after 500 warm-up steps, gradient clipping and `EMAModel` with the example's values, in fp32. Ours is flow matching with the
settings of configs/generative/diffusion_mnist.yaml, in bf16 where the processor has it.

speed: images a second, in turns of 20 steps, each followed by one of the other loop; median and range of the ratios.
quality: the Fréchet distance of 5,000 samples from the test set, after as many steps as the plain loop takes in --minutes and ours in half
of them, at the speeds just measured, with the same sampler (DPM-Solver++ (2M), 20 steps) for both.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from generative import metrics
from generative.diffusion import Diffusion, DiffusionConfig, DiffusionExperiment, DiffusionTask, NetworkConfig
from generative.metrics import Cloud
from generative.processes import DDPMConfig
from lab import data, distributed
from lab.data import DataConfig, ImageSet
from lab.experiment import TrainerConfig
from lab.optimizer import OptimizerConfig
from lab.recorder import console
from lab.trainer import Trainer

BATCH = 128
NETWORK = NetworkConfig(kind="diffusers", widths=(32, 64, 64))
PLAIN = DiffusionConfig(
    process="ddpm",
    ddpm=DDPMConfig(schedule="linear", prediction="epsilon", zero_snr=False, min_snr=0),
    network=NETWORK,
    conditional=False,
    sampler="dpmpp",
)


@dataclass(frozen=True)
class Options:
    """What to measure, and how long."""

    turns: int = 12
    """Turns of each loop, for the speed."""
    steps: int = 20
    """Steps of a turn."""
    minutes: float = 10.0
    """Training time of the plain loop, for the quality; 0: only the speed."""
    samples: int = 5000
    """Images drawn to judge the quality."""
    data: str = "mnist"
    """The set: mnist, or digits where there is none."""
    out: Path = Path("benchmarks/results/diffusion.json")
    """Where the figures go."""


def main() -> None:
    """Measure both, print a line for each and write the report."""
    options = tyro.cli(Options, description=__doc__)
    images = data.load(DataConfig(name=options.data))  # type: ignore[arg-type]
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        **distributed.environment(),
        "speed": speed(options, images),
    }
    ratios = report["speed"]["ratios"]
    console.print(f"speed: {statistics.median(ratios):.2f} times the plain loop's ({min(ratios):.2f} to {max(ratios):.2f})")
    if options.minutes:
        medians = {name: statistics.median(rates) for name, rates in report["speed"]["images_per_second"].items()}
        report["quality"] = quality(options, images, medians)
        console.print(json.dumps(report["quality"], indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def speed(options: Options, images: ImageSet) -> dict[str, Any]:
    """Seconds of every turn, and how many times ours is faster."""
    ours, plain = our_trainer(options, 10**6), PlainLoop(images, 10**6)
    pairs = []
    for turn in range(options.turns + 1):
        pair = (timed(lambda: ours._one_step([], None), options.steps), timed(plain.step, options.steps))
        pairs += [pair] if turn else []  # the first one warms up
    rates = {"ours": [BATCH / mine for mine, _ in pairs], "plain": [BATCH / theirs for _, theirs in pairs]}
    return {"images_per_second": rates, "ratios": [theirs / mine for mine, theirs in pairs]}


def timed(function: Callable[[], Any], times: int) -> float:
    """Seconds per call."""
    began = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - began) / times


def quality(options: Options, images: ImageSet, images_per_second: dict[str, float]) -> dict[str, Any]:
    """Distances after training for so long, ours for half the time. A schedule must know its steps before; so they come from the speeds."""
    seconds = {"ours": 30 * options.minutes, "plain": 60 * options.minutes}
    steps = {name: max(1, round(seconds[name] * rate / BATCH)) for name, rate in images_per_second.items()}
    ours, plain = our_trainer(options, steps["ours"]), PlainLoop(images, steps["plain"])
    taken = {"ours": timed(ours.fit, 1), "plain": plain.steps * timed(plain.step, plain.steps)}
    task = ours.task
    assert isinstance(task, DiffusionTask)
    with task.learner.judged() as judged:
        models = {"ours": judged, "plain": plain.averaged()}
        scores = {name: distances(model, images, options.samples) for name, model in models.items()}
    return {"scores": scores, "seconds": seconds, "seconds_taken": taken, "steps": steps}


def distances(model: Any, images: ImageSet, count: int) -> dict[str, float]:
    """Scores of samples beside as many test images."""
    features = metrics.find_features(images)
    assert features is not None
    drawn = metrics.draw(model, count, 0)
    return metrics.compare(Cloud(features.vectors(drawn.images)), Cloud(features.vectors(images.test.spread(count).images)))


# The two loops


def our_trainer(options: Options, steps: int) -> Trainer:
    """Our trainer with the network of both."""
    experiment = DiffusionExperiment(
        trainer=TrainerConfig(steps=steps, precision="auto"),
        optimizer=OptimizerConfig(
            lr=2e-3, betas=(0.9, 0.99), schedule="cosine", warmup_steps=min(500, steps // 4), ema=0.999, clip_norm=1.0
        ),
        data=DataConfig(name=options.data),  # type: ignore[arg-type]
        model=DiffusionConfig(network=NETWORK, conditional=False, sampler="dpmpp"),
    )
    return Trainer(experiment, distributed.join("auto", 0, deterministic=False))


class Pictures(Dataset[Tensor]):
    """Images that are decoded one at a time, as the example's transforms do."""

    def __init__(self, images: ImageSet) -> None:
        self.images = [Image.fromarray(image[0].numpy()) for image in images.train.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        numbers = torch.from_numpy(numpy.asarray(self.images[index], dtype=numpy.float32))
        return numbers[None] / 127.5 - 1


class PlainLoop:
    """The steps of a plain training script."""

    def __init__(self, images: ImageSet, steps: int) -> None:
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_cosine_schedule_with_warmup
        from diffusers.training_utils import EMAModel

        torch.manual_seed(0)
        self.model, self.steps = Diffusion(PLAIN, images.shape, images.classes), steps
        self.scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
        network = self.model.network
        self.average: Any = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 500, steps)
        self.batches = self.endless(DataLoader(Pictures(images), BATCH, shuffle=True))

    def endless(self, loader: DataLoader[Tensor]) -> Iterator[Tensor]:
        """Epoch after epoch."""
        while True:
            yield from loader

    def step(self) -> None:
        """One update."""
        clean = next(self.batches)
        noise, times = torch.randn(clean.shape), torch.randint(0, 1000, (len(clean),))
        output = self.model.network(self.scheduler.add_noise(clean, noise, times), times, None)
        loss = F.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.network.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.network.parameters())
        loss.item()

    def averaged(self) -> Diffusion:
        """The model with its averaged weights."""
        self.average.copy_to(self.model.network.parameters())
        return self.model.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
