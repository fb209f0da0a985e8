"""What diffusers makes of an exported folder, with no code of ours, against our own samplers: from the same noise the same pictures."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from generative import export as exporting
from generative import model as families
from generative.diffusion import EXPERIMENT, Diffusion, DiffusionConfig, DiffusionExperiment, NetworkConfig
from generative.export import export, load
from generative.model import Loaded, SamplingConfig
from generative.processes import DDPMConfig
from lab.config import UserError
from lab.data import DataConfig
from lab.experiment import TrainerConfig
from lab.images import Trained
from lab.launch import launch
from lab.optimizer import OptimizerConfig
from lab.runs import Run
from tests.scripts.test_scripts import call

pytestmark = pytest.mark.usefixtures("one_thread")

EPSILON = {"schedule": "linear", "prediction": "epsilon", "zero_snr": False}
MODELS: dict[str, tuple[bool, dict]] = {
    "v": (True, {}),
    "epsilon": (True, EPSILON),
    "x0": (False, {"prediction": "x0", "zero_snr": False}),
    "short": (True, {"schedule": "linear", "times": 200}),
    "large": (False, {"times": 25, "variance": "large"}),
    "learned": (True, {"times": 25, "variance": "learned"}),
}
COUNT, TOLERANCE = 6, {"rtol": 0, "atol": 1e-5}


def settings(conditional: bool, ddpm: dict) -> DiffusionExperiment:
    network = NetworkConfig(kind="diffusers", widths=(8, 16), heads=2)
    return DiffusionExperiment(
        model=DiffusionConfig(process="ddpm", ddpm=DDPMConfig(**ddpm), network=network, conditional=conditional),
        data=DataConfig(name="digits", image_size=8, batch_size=16),
        trainer=TrainerConfig(steps=12, save_every=12, preview_every=12, log_every=12),
        optimizer=OptimizerConfig(lr=3e-3, ema=0.5),
    )


def untrained(name: str, folder: Path) -> Trained[Diffusion]:
    """A model whose weights all matter, as if it had been loaded from a run in `folder`."""
    experiment = settings(*MODELS[name])
    torch.manual_seed(0)
    model = experiment.network((1, 8, 8), tuple("0123456789")).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape)
    return Trained(model, experiment, Run(folder), 12, {})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, trained for a moment."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert launch(settings(True, {}), "", ["--tracking.mode", "disabled", "--run-dir", str(folder)]) == 0
    return folder


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def ours(loaded: Loaded, sampler: str, steps: int, label: int | None = None) -> Tensor:
    labels = torch.full((COUNT,), len(loaded.model.classes) if label is None else label)
    return loaded.model.sample(COUNT, labels, seeded(), SamplingConfig(sampler=sampler, steps=steps))


def piped(kind: type, folder: Path, steps: int, **options) -> Tensor:
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(batch_size=COUNT, num_inference_steps=steps, generator=seeded(), output_type="pt", **options).images


@torch.no_grad()
def stepped(kind: type, folder: Path, steps: int) -> Tensor:
    """A loop such as people write around a scheduler."""
    unet, scheduler = UNet2DModel.from_pretrained(folder, subfolder="unet"), kind.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    x = torch.randn(COUNT, 1, 8, 8, generator=seeded())
    for time in scheduler.timesteps:
        x = scheduler.step(unet(x, time).sample, time, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def agree(loaded: Loaded, folder: Path, label: int | None = None, tolerance: float = 1e-5) -> None:
    pairs = [
        (piped(DDPMPipeline, folder, 20), ours(loaded, "ancestral", 20, label)),
        (piped(DDIMPipeline, folder, 10, use_clipped_model_output=True), ours(loaded, "ddim", 10, label)),
        (stepped(DPMSolverMultistepScheduler, folder, 10), ours(loaded, "dpmpp", 10, label)),
        (stepped(UniPCMultistepScheduler, folder, 10), ours(loaded, "unipc", 10, label)),
    ]
    for theirs, mine in pairs:
        assert float(mine.std()) > 0.1
        torch.testing.assert_close(theirs, mine, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "label"), [("v", ""), ("v", "3"), ("epsilon", ""), ("epsilon", "0"), ("short", "9"), ("x0", "")])
def test_diffusers_draws_what_we_draw(name: str, label: str, tmp_path: Path) -> None:
    loaded = untrained(name, tmp_path)
    # An untrained network that tells x0 itself is asked again and again about its own answers, which makes rounding grow.
    agree(loaded, export(loaded, label=label), int(label) if label else None, tolerance=5e-5 if name == "x0" else 1e-5)


def test_of_a_run_the_averaged_weights_are_exported(run: Path, tmp_path: Path) -> None:
    agree(families.load(str(run)), export(load(str(run)), tmp_path), None)


def test_the_class_matters(tmp_path: Path) -> None:
    loaded = untrained("v", tmp_path)
    drawn = [piped(DDPMPipeline, export(loaded, tmp_path / f"of{label}", label), 5) for label in ("", "0", "3")]
    assert all(float((drawn[a] - drawn[b]).abs().max()) > 1e-2 for a, b in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("name", ["large", "learned"])
def test_other_variances_are_diffusers_own_over_the_whole_chain(name: str, tmp_path: Path) -> None:
    loaded = untrained(name, tmp_path)
    folder = export(loaded)
    torch.testing.assert_close(piped(DDPMPipeline, folder, 25), ours(loaded, "ancestral", 25), **TOLERANCE)
    card = (folder / "README.md").read_text()
    assert "leaves noise in the pictures if it takes fewer steps than 25" in card
    assert ("DDIMPipeline" in card) == (name == "large")


def test_the_pipeline_may_change_its_scheduler_as_the_card_says(tmp_path: Path) -> None:
    loaded = untrained("v", tmp_path)
    pipeline = DDPMPipeline.from_pretrained(export(loaded))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    drawn = pipeline(batch_size=COUNT, num_inference_steps=20, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(drawn, ours(loaded, "dpmpp", 20), **TOLERANCE)


def test_the_code_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(untrained("v", tmp_path))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in (folder / "README.md").read_text().split("```python\n")[1:]:
        code = block.split("```")[0].replace("batch_size=16", "batch_size=2").replace("=1000", "=5").replace("=20", "=2")
        exec(code, names)
        assert [picture.size for picture in names["pictures"]] == [(8, 8), (8, 8)]
    assert type(names["ddim"].scheduler) is DDIMScheduler


# The scheduler, as numbers


@pytest.mark.parametrize(
    "config",
    [DDPMConfig(), DDPMConfig(**EPSILON), DDPMConfig(times=200), DDPMConfig(times=100, schedule="linear"), DDPMConfig(prediction="x0")],
    ids=repr,
)
def test_the_scheduler_has_our_table_our_points_and_our_variances(config: DDPMConfig) -> None:
    for variance, fraction in (("small", 0.0), ("large", 1.0)):
        scheduler = exporting.stock_scheduler(dataclasses.replace(config, variance=variance))
        assert type(scheduler) is DDPMScheduler
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), config.alphas**2, rtol=2e-4, atol=1e-7)
        scheduler.set_timesteps(config.times)
        assert scheduler.timesteps.tolist() == list(reversed(range(config.times)))
        for index in (1, 2, config.times // 2, config.times - 1):  # the step to the image, of index 0, draws none
            here, there = config.at(index), config.at(index - 1)
            step = here.sigma**2 - (here.alpha / there.alpha * there.sigma) ** 2
            expected = step * (there.sigma / here.sigma) ** (2 * (1 - fraction))
            assert float(scheduler._get_variance(index)) == pytest.approx(expected, rel=5e-3)


def test_the_guess_is_held_between_black_and_white_by_every_scheduler() -> None:
    config = exporting.stock_scheduler(DDPMConfig(prediction="x0")).config
    wild = 3 * torch.randn(4, 1, 8, 8, generator=seeded())
    for kind in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        scheduler = kind.from_config(config)
        scheduler.set_timesteps(1)
        # The only step leads to the image: it is the guess.
        x = scheduler.step(wild, scheduler.timesteps[0], torch.zeros_like(wild)).prev_sample
        torch.testing.assert_close(x, wild.clamp(-1, 1), rtol=0, atol=1e-5)


# The folder


def test_the_folder_is_whole_plain_and_says_what_it_is(run: Path) -> None:
    (run / "evaluation.json").write_text(json.dumps({"run": "x", "step": 12, "protocol": "digits test", "bits_per_dim": 3.25}))
    folder = export(load(str(run)))
    assert folder == run / "export"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert names == {"README.md", "model_index.json", "unet/config.json", weights, "scheduler/scheduler_config.json"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert (index["unet"], index["scheduler"]) == (["diffusers", "UNet2DModel"], ["diffusers", "DDPMScheduler"])
    assert json.loads((folder / "unet/config.json").read_text())["num_class_embeds"] is None
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "| bits per dim | 3.25 |" in card
    assert 'from_pretrained("export")' in card
    assert "8x8 grey images, trained on digits for 12 steps" in card
    assert str(folder) not in "".join((folder / name).read_text() for name in names if not name.endswith(".safetensors"))


def test_the_scores_of_another_step_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": 6, "protocol": "digits test", "bits_per_dim": 3.25}))
    assert "Scores" not in (export(untrained("v", tmp_path)) / "README.md").read_text()


def test_the_script_exports_and_refuses_in_one_sentence(run: Path, tmp_path: Path) -> None:
    assert call("export.py", run, "--label", "3", "--out", tmp_path / "three") == f"pipeline: {tmp_path / 'three'}\n"
    assert "It draws class 3 of 0, 1, 2" in (tmp_path / "three" / "README.md").read_text()
    (tmp_path / "file").write_text("")
    for words, expected in [
        (["nowhere"], "nowhere: no diffusion run here"),
        ([run, "--label", "x"], "--label x: the classes are 0, 1"),
        ([run, "--out", tmp_path / "file"], "cannot write there"),
    ]:
        printed = call("export.py", *words, expect=2)
        assert printed.startswith("error: ")
        assert expected in printed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"process": "flow"}, "train with --model.process ddpm"),
        ({"process": "ddpm"}, "train with --model.network.kind diffusers"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(changes: dict, expected: str) -> None:
    config = DiffusionConfig(**changes, network=NetworkConfig(widths=(8, 16), heads=2))
    model = DiffusionExperiment(model=config).network((1, 8, 8), ("a", "b"))
    with pytest.raises(UserError, match=expected):
        exporting.check(EXPERIMENT, model)


def test_codes_of_another_model_are_no_pixels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffuses codes"):
        exporting.check(DiffusionExperiment(latents="some/run"), untrained("v", tmp_path).model)


def test_a_model_without_classes_draws_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--label 3: this model knows no classes"):
        export(untrained("x0", tmp_path), label="3")
