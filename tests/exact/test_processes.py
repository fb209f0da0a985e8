"""The same global batch gives the same run on one process and on two, in one piece and in parts, whatever is trained."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .conftest import ROOT, command, finish

STEPS = {"trainer__steps": "60", "trainer__log_every": "1", "trainer__save_every": "30"}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(first: list[float], second: list[float]) -> None:
    assert len(first) == len(second) == 60
    worst = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
    assert worst < 1e-5


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("single")
    finish(command("--run-dir", "run", **STEPS), folder)
    values = losses(folder / "run")
    assert values[-1] < values[0]
    assert all(math.isfinite(value) for value in values)
    return values


def test_two_processes_have_the_losses_of_one(single: list[float], tmp_path: Path) -> None:
    finish(command("--run-dir", "run", processes=2, **STEPS), tmp_path)
    assert_same(losses(tmp_path / "run"), single)


def test_a_run_goes_from_one_process_to_two_and_back(single: list[float], tmp_path: Path) -> None:
    # The learning rate follows the length of the run, so it is stopped by resuming to a later end with the schedule off.
    constant = STEPS | {"optimizer__schedule": "constant"}
    finish(command("--run-dir", "run", **(constant | {"trainer__steps": "20"})), tmp_path)
    finish(command("--resume", "run", processes=2, **(constant | {"trainer__steps": "40"})), tmp_path)
    finish(command("--resume", "run", **constant), tmp_path)
    finish(command("--run-dir", "whole", **constant), tmp_path)
    assert_same(losses(tmp_path / "run"), losses(tmp_path / "whole"))


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path: Path) -> None:
    output = finish(command("--run-dir", "run", trainer__accumulate="3", **STEPS), tmp_path, expect=2)
    assert "a batch of 16 cannot be cut into 1 (processes) x 3 (trainer.accumulate) equal parts" in output
    assert "Traceback" not in output


def test_accumulation_has_the_losses_of_whole_batches(single: list[float], tmp_path: Path) -> None:
    finish(command("--run-dir", "run", trainer__accumulate="4", **STEPS), tmp_path)
    assert_same(losses(tmp_path / "run"), single)


# All that is trained on images

SHARED = {
    "data.name": "digits",
    "data.image-size": "8",
    "data.batch-size": "12",
    "trainer.log-every": "1",
    "trainer.preview-every": "20",
    "trainer.save-every": "10",
    "trainer.precision": "fp32",
    "trainer.threads": "1",
    "tracking.mode": "disabled",
    "optimizer.schedule": "constant",
    "optimizer.warmup-steps": "0",
}
SMALL_UNET = "--model.network.widths 8 16 --model.network.blocks 1"
DIT = "--model.network.kind dit --model.network.width 16 --model.network.layers 1 --model.network.patch 2 --model.network.heads 2"
GAN = "--model.channels 8 --model.latent 8 --critic-optimizer.schedule constant"
SUPER = "--data.image-size 16 --model.factor 2 --model.channels 8 --model.blocks 1"
CRITICISED = f"{SUPER} --model.adversarial 0.01 --model.adversarial-after 5"


@dataclass(frozen=True)
class Case:
    """A model to train, small."""

    script: str
    options: str = ""
    before: dict[str, str] = field(default_factory=dict)
    """Options that name a run which this one is built on, and the case that makes that run."""
    steps: int = 30
    """Fewer where what is rounded differently grows fast: RealNVP's exponentials, the sign that is the slope of an absolute error."""


CASES = {
    "autoencoder": Case("autoencoder", "--model.network.hidden 24 --model.latent 4 --model.corruption gaussian --model.strength 0.3"),
    "vae": Case("vae", "--model.network.hidden 24 --model.latent 4"),
    "iwae": Case("vae", "--model.network.hidden 24 --model.latent 4 --model.importance-samples 3"),
    "vqvae": Case("vqvae", "--model.channels 8 --model.codes 16 --model.dimensions 8 --model.restart-after 3"),
    "gpt": Case("tokens", "--model.width 16 --model.layers 1 --model.heads 2", {"--vqvae": "vqvae"}),
    "masked": Case("tokens", "--model.kind masked --model.width 16 --model.layers 1 --model.heads 2", {"--vqvae": "vqvae"}),
    "hinge": Case("gan", f"{GAN}"),
    "hinge, twice": Case("gan", f"{GAN} --model.critic-steps 2"),
    "dcgan": Case("gan", f"{GAN} --model.kind dcgan"),
    "wgan_gp": Case("gan", f"{GAN} --model.kind wgan_gp"),
    "r3gan": Case("gan", f"{GAN} --model.kind r3gan"),
    "nice": Case("flow", "--model.kind nice"),
    "realnvp": Case("flow", "--model.kind realnvp --model.levels 1", steps=15),
    "glow": Case("flow", "--model.kind glow --model.levels 1"),
    "flow matching": Case("diffusion", SMALL_UNET),
    "edm": Case("diffusion", f"{SMALL_UNET} --model.process edm"),
    "ddpm": Case("diffusion", f"{SMALL_UNET} --model.process ddpm --model.ddpm.variance learned"),
    "dit": Case("diffusion", DIT),
    "latent": Case("diffusion", "--model.network.widths 8 --model.network.fold 1", {"--latents": "vqvae"}),
    "distillation": Case("distillation", "", {"--teacher": "flow matching"}),
    "superresolution": Case("superresolution", SUPER, steps=15),
    "adversarial": Case("superresolution", CRITICISED, {"--model.features": "classifier"}, steps=15),
    "classifier": Case("classifier", "--data.image-size 16 --model.backbone small"),
}

BACK_AND_FORTH = ("vqvae", "hinge", "flow matching", "distillation", "classifier")


def words(case: Case, *extra: str, steps: int, processes: int = 1) -> list[str]:
    """The command line that trains a case."""
    launcher = [str(ROOT / "scripts/torchrun.py"), "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    settings = [word for key, value in SHARED.items() for word in (f"--{key}", value)]
    script = str(ROOT / "scripts" / f"train_{case.script}.py")
    return [sys.executable, *launcher, script, *settings, *case.options.split(), *extra, "--trainer.steps", str(steps)]


@dataclass
class Singles:
    """Runs of cases on one process, each made when it is first asked for."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        run = self.folder / name.replace(" ", "_")
        if not run.exists():
            finish(words(CASES[name], *self.needs(name), "--run-dir", str(run), steps=CASES[name].steps), self.folder)
        return run

    def needs(self, name: str) -> list[str]:
        """Options for the runs that a case is built on."""
        return [word for option, before in CASES[name].before.items() for word in (option, str(self[before]))]


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> Singles:
    return Singles(tmp_path_factory.mktemp("singles"))


def difference(one: Path, other: Path, steps: int) -> float:
    """The largest difference of any loss at any step, relative to how large that loss is on average."""
    first, second = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other))
    assert [row["step"] for row in first] == [row["step"] for row in second] == list(range(1, steps + 1))
    names = [name for name in first[-1] if name.startswith("train/") and name.endswith("loss")]
    assert names
    sizes = {name: sum(abs(row[name]) for row in first if name in row) / steps for name in names}
    return max(abs(a[name] - b[name]) / sizes[name] for a, b in zip(first, second, strict=True) for name in names if name in a)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_whatever_is_trained_has_the_same_losses_on_two_processes(name: str, singles: Singles, tmp_path: Path) -> None:
    case = CASES[name]
    finish(words(case, *singles.needs(name), "--run-dir", "run", steps=case.steps, processes=2), tmp_path)
    assert difference(singles[name], tmp_path / "run", case.steps) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", BACK_AND_FORTH)
def test_whatever_is_trained_goes_from_one_process_to_two_and_back(name: str, singles: Singles, tmp_path: Path) -> None:
    case = CASES[name]
    for part, processes in ((1, 1), (2, 2), (3, 1)):
        start = ("--run-dir", "run", "--resume", "auto")
        finish(words(case, *singles.needs(name), *start, steps=part * case.steps // 3, processes=processes), tmp_path)
    assert difference(singles[name], tmp_path / "run", case.steps) < 1e-5
