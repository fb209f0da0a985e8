"""Our VAE and diffusion beside those of pythae and denoising-diffusion-pytorch: training speed, and samples after equal time.

    python benchmarks/peers.py                           speed, then quality: about 20 minutes on 2 cores
    python benchmarks/peers.py --minutes 0 --rounds 5    speed alone
    python benchmarks/peers.py --data digits --minutes 0.2 --rounds 1 --samples 300

    vae        pythae's VAE in its BaseTrainer, beside ours with the settings of configs/generative/vae_mnist.yaml; both with one hidden
               layer of 512 on each side of a code of 32, as pythae has it
    diffusion  the Unet, GaussianDiffusion and Trainer of denoising-diffusion-pytorch, beside ours with the settings of
               configs/generative/diffusion_mnist.yaml, without classes. Theirs has widths 24, 48, 48: as many weights as ours (0.83 and
               0.82 M), but 2.3 times as many operations, as ours folds 2x2 pixels into one place first. `ours, unfolded` works pixel by
               pixel with widths 40, 80, 80: as many operations as theirs

Batches of 128; all else is each one's default, such as fp32 and Adam at 1e-4 of both peers. The peers are no dependencies of ours: they
are installed at first into a folder of their own (--home), which only their processes look into. Of torchvision, which does not come
for every torch, denoising-diffusion-pytorch uses only what reads and writes image files: its process gets an empty module by that
name, and its Trainer a data set that holds the images, decoded. Its flips are off, as a digit in a mirror is none.

speed: training images a second, start and warm-up left out, each measurement in a process of its own, in turns.
quality: the Fréchet distance of samples from the test set after --minutes of training, beside that of training images (the floor). How
many steps these are follows from the speeds. Each draws with its own sampler: ours as shipped, pythae from the prior, GaussianDiffusion
by DDIM in 50 steps (its default, 1000 steps, would take an hour on two cores).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from turns import RESULTS, ROOT, alone, keep, spread

from generative import diffusion, metrics, vae
from generative.metrics import Cloud
from lab import data, distributed, media
from lab.backbones.cost import parameters
from lab.config import read_yaml, resolve
from lab.data import DataConfig, ImageSet, as_float
from lab.data.files import cache_folder
from lab.launch import guarded
from lab.recorder import console
from lab.trainer import Trainer

Family = Literal["vae", "diffusion"]
BATCH, WARM_UP = 128, 5
UNFOLDED = diffusion.NetworkConfig(fold=1, widths=(40, 80, 80))
CONTESTANTS = {
    "vae": ("ours", "ours, fp32", "pythae"),
    "diffusion": ("ours", "ours, unfolded", "ours, unfolded, fp32", "denoising-diffusion-pytorch"),
}
REQUIRED = {
    "pythae": ("pythae==0.1.2", "imageio==2.38.1"),
    "denoising-diffusion-pytorch": (
        "denoising-diffusion-pytorch==2.3.4",
        "accelerate==1.15.0",
        "einops==0.8.2",
        "ema-pytorch==0.8.3",
    ),
}
"""What each peer needs besides that which we need ourselves."""


@dataclass(frozen=True)
class Options:
    """What to measure, and how long."""

    families: tuple[Family, ...] = ("vae", "diffusion")
    """Which comparisons."""
    rounds: int = 3
    """Turns of each, for the speed."""
    seconds: float = 10.0
    """How long a turn lasts."""
    minutes: float = 2.0
    """Training time, for the quality; 0: only the speed."""
    samples: int = 1000
    """Images drawn to judge the quality."""
    data: Literal["mnist", "digits"] = "mnist"
    """Images to train on."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    home: Path = cache_folder() / "peers"
    """Where the peers are installed."""
    out: Path = RESULTS / "peers.json"
    """Where the figures go."""
    only: str = ""
    """Take one measurement alone, such as `vae/ours`, and print it."""
    steps: int = 0
    """With --only: train for so many steps and judge; 0: measure the speed."""


def main() -> int:
    """Take every measurement, print a line for each and write the report."""
    options = tyro.cli(Options, description=__doc__)
    if options.only:
        print(json.dumps(measure(options)))
        return 0
    distributed.join("cpu", options.threads, deterministic=False)
    report = {}
    for family in options.families:
        names = [name for name in CONTESTANTS[family] if name not in REQUIRED or installed(name, options.home)]
        report[family] = found = {"speed": speeds(family, names, options)}
        console.print(f"{family}, training images/s: {told(found['speed'])}", highlight=False, soft_wrap=True)
        if options.minutes:
            found["quality"] = qualities(family, found["speed"], options)
            console.print(f"{family}, Fréchet distance: {judged(found['quality'])}", highlight=False, soft_wrap=True)
    keep(options.out, {"data": options.data, "minutes": options.minutes, "samples": options.samples, "results": report})
    return 0


def words(options: Options, *more: str) -> list[str]:
    """The command line of one measurement."""
    named = ("seconds", "samples", "data", "home")
    given = [word for name in named for word in (f"--{name}", str(getattr(options, name)))]
    return [*more, *given, "--threads", str(torch.get_num_threads())]  # as many for the peers as for us


def speeds(family: str, names: list[str], options: Options) -> dict[str, Any]:
    """Images per second of every contestant, round by round, and what its network is."""
    found: dict[str, Any] = {name: {"images_per_second": []} for name in names}
    for _ in range(options.rounds):
        for name in names:
            rate, network = alone(__file__, *words(options, "--only", f"{family}/{name}"))
            found[name]["images_per_second"].append(rate)
            found[name] |= network
    return found


def told(found: dict[str, Any]) -> str:
    """The rates, and the ratios to the peer's."""
    rates = {name: row["images_per_second"] for name, row in found.items()}
    peer = next((name for name in rates if name in REQUIRED), None)
    shown = []
    for name, mine in rates.items():
        ratio = f" = {spread([one / other for one, other in zip(mine, rates[peer])])} times" if peer not in (None, name) else ""
        shown.append(f"{name} {statistics.median(mine):,.0f}{ratio}")
    return "; ".join(shown)


def qualities(family: str, speed: dict[str, Any], options: Options) -> dict[str, Any]:
    """Distances after equal time, of our shipped model and of the peer's."""
    found = {}
    for name in speed:
        if name == "ours" or name in REQUIRED:
            steps = max(1, round(60 * options.minutes * statistics.median(speed[name]["images_per_second"]) / BATCH))
            found[name] = alone(__file__, *words(options, "--only", f"{family}/{name}", "--steps", str(steps)))
    return found


def judged(found: dict[str, Any]) -> str:
    """The distances."""
    floor = next(iter(found.values()))["floor"]
    shown = [f"{name} {row['frechet']:.3g} after {row['steps']:,} steps in {row['seconds']:.0f} s" for name, row in found.items()]
    return "; ".join([*shown, f"training images {floor:.3g}"])


# The peers


def installed(peer: str, home: Path) -> bool:
    """Whether a peer is there, or can be installed; says so if it cannot. A folder that is there is whole."""
    if (home / peer).exists():
        return True
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as place:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{place}/{peer}", *REQUIRED[peer]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
            console.print(f"{peer} cannot be installed ({reason}); going on without it", highlight=False, soft_wrap=True)
            return False
        os.replace(f"{place}/{peer}", home / peer)
    return True


@contextlib.contextmanager
def empty_torchvision() -> Iterator[None]:
    """Within, `torchvision` can be imported, and has nothing in it."""
    names = ("torchvision", "torchvision.transforms", "torchvision.utils")
    modules = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        setattr(modules["torchvision"], name.partition(".")[2], modules[name])
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class Enough(BaseException):
    """The measurement is over. No `Exception`: no trainer shall forgive it."""


class Clock:
    """Told of every step that a loop has done, which it leaves by `Enough`: after so many steps, or seconds after the first few."""

    def __init__(self, seconds: float, steps: int) -> None:
        self.seconds, self.steps = seconds, steps
        self.done, self.began, self.passed = 0, 0.0, 0.0

    def tick(self) -> None:
        """A step is done."""
        self.done += 1
        now = time.perf_counter()
        if not self.steps and self.done == WARM_UP:
            self.began = now
        self.passed = now - self.began
        if self.done == self.steps if self.steps else self.done > WARM_UP and self.passed > self.seconds:
            raise Enough

    def between(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; when the next one is asked for, the step of the last one is done."""
        for batch in batches:
            yield batch
            self.tick()

    def watch(self, loop: Callable[[], Any]) -> None:
        """Run a loop until it has been seen enough of."""
        self.began = time.perf_counter()
        with contextlib.suppress(Enough):
            loop()

    @property
    def rate(self) -> float:
        """Images per second, without the first few steps."""
        return (self.done - WARM_UP) * BATCH / self.passed


# One measurement


@dataclass(frozen=True)
class Trained:
    """What a contestant has made."""

    module: nn.Module
    """The whole network."""
    call: Callable[[Tensor], Any]
    """What training does with images (N, C, H, W), forwards."""
    draw: Callable[[int], Tensor]
    """Samples, uint8."""


def measure(options: Options) -> Any:
    """The speed of one contestant and the size of its network; or, with --steps, how good its samples are then."""
    family, _, name = options.only.partition("/")
    images, clock = data.load(DataConfig(name=options.data)), Clock(options.seconds, options.steps)
    torch.manual_seed(0)
    if name in REQUIRED:
        sys.path.append(str(options.home / name))  # last, so that what we have ourselves is ours
        torch.set_num_threads(options.threads)
        trained = {"vae": their_vae, "diffusion": their_diffusion}[family](clock, images)
    else:
        distributed.join("cpu", options.threads, deterministic=False)
        trained = ours(family, name, clock, images)
    with torch.no_grad():
        if not options.steps:
            return clock.rate, size(trained, images.shape)
        samples = trained.draw(min(options.samples, len(images.test), len(images.train)))
        return {**frechet(samples, images), "steps": options.steps, "seconds": clock.passed}


def size(trained: Trained, shape: tuple[int, int, int]) -> dict[str, int]:
    """Weights of a network, and multiply-adds of one image through it."""
    with FlopCounterMode(display=False) as counter:
        trained.call(torch.zeros(1, *shape))
    return {"parameters": parameters(trained.module), "multiplies": counter.get_total_flops() // 2}


def frechet(samples: Tensor, images: ImageSet) -> dict[str, float]:
    """The Fréchet distance of samples, uint8, from as many test images, and that of as many training images."""
    features = metrics.find_features(images)
    assert features is not None
    sets = (samples, images.train.spread(len(samples)).images, images.test.spread(len(samples)).images)
    drawn, floor, real = (Cloud(features.vectors(each)) for each in sets)
    return {"frechet": metrics.compare(drawn, real)["frechet"], "floor": metrics.compare(floor, real)["frechet"]}


def ours(family: str, name: str, clock: Clock, images: ImageSet) -> Trained:
    """Our trainer at work."""
    trainer = Trainer(our_experiment(family, name, clock.steps or 10**6, images.name), distributed.World())

    def loop() -> None:
        while True:
            trainer._one_step([], None)
            clock.tick()

    clock.watch(loop)
    task: Any = trainer.task
    model, calls = task.model, {"vae": our_vae_call, "diffusion": our_diffusion_call}

    def draw(count: int) -> Tensor:
        with task.learner.judged() as judged:
            return metrics.draw(judged, count, 0).images

    return Trained(model, calls[family](model), draw)


def our_vae_call(model: Any) -> Callable[[Tensor], Any]:
    """Encoder and decoder."""
    return lambda images: model(images, torch.zeros(len(images), dtype=torch.int64), torch.zeros(len(images), model.latent))


def our_diffusion_call(model: Any) -> Callable[[Tensor], Any]:
    """The U-Net."""
    return lambda images: model.network(images, torch.zeros(len(images)), None)


def our_experiment(family: str, name: str, steps: int, source: str) -> Any:
    """A preset, with the network of a contestant."""
    given, _ = read_yaml(ROOT / "configs" / "generative" / f"{family}_mnist.yaml")
    preset: Any = resolve({"vae": vae.EXPERIMENT, "diffusion": diffusion.EXPERIMENT}[family], given).settings
    if family == "vae":
        model: Any = replace(preset.model, network=replace(preset.model.network, layers=1))
    else:
        network = UNFOLDED if "unfolded" in name else preset.model.network
        model = replace(preset.model, network=network, conditional=False, guidance=1.0)
    trainer = replace(preset.trainer, steps=steps, precision="fp32" if name.endswith("fp32") else "auto")
    return replace(preset, trainer=trainer, data=replace(preset.data, name=source, batch_size=BATCH), model=model)


def their_vae(clock: Clock, images: ImageSet) -> Trained:
    """pythae's trainer at work."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.samplers import NormalSampler
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    class Ticking(TrainingCallback):
        def on_train_step_end(self, training_config: Any, **others: Any) -> None:
            clock.tick()

    model = VAE(VAEConfig(input_dim=images.shape, latent_dim=32))
    pictures = BaseDataset(as_float(images.train.images), images.train.labels)
    with tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(output_dir=folder, per_device_train_batch_size=BATCH, num_epochs=10**6)
        clock.watch(BaseTrainer(model, pictures, training_config=config, callbacks=[Ticking()]).train)
    sampler = NormalSampler(model.eval())
    return Trained(model, lambda images: model({"data": images}), lambda count: media.to_uint8(sampler.sample(count)))


def their_diffusion(clock: Clock, images: ImageSet) -> Trained:
    """denoising-diffusion-pytorch's trainer at work."""
    with empty_torchvision():
        from denoising_diffusion_pytorch import denoising_diffusion_pytorch as peer

    network = peer.Unet(dim=24, dim_mults=(1, 2, 2), channels=1)
    model = peer.GaussianDiffusion(network, image_size=images.shape[1], sampling_timesteps=50)
    peer.Dataset = lambda folder, size, **how: as_float(images.train.images)  # in place of its reader of files
    with tempfile.TemporaryDirectory() as folder:
        steps = {"train_num_steps": 10**9, "save_and_sample_every": 10**9}
        trainer = peer.Trainer(model, folder, train_batch_size=BATCH, results_folder=folder, calculate_fid=False, **steps)
        trainer.dl = clock.between(trainer.dl)
        clock.watch(trainer.train)
    average = trainer.ema.ema_model.eval()

    def draw(count: int) -> Tensor:
        return media.to_uint8(torch.cat([average.sample(batch_size=len(part)) for part in torch.arange(count).split(500)]))

    return Trained(network, lambda images: network(images, torch.zeros(len(images), dtype=torch.int64)), draw)


if __name__ == "__main__":
    sys.exit(guarded(main))
