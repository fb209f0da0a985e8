"""A diffusion run as a folder that diffusers loads and samples from, with no code of ours.

    README.md           a card: what the model is, how to load it, its scores
    model_index.json    a DDPMPipeline of the two parts below
    unet/               the averaged weights, as a UNet2DModel
    scheduler/          the schedule of noise, and how to read x0 from what the network tells

DDPMPipeline and DDIMPipeline tell the network no class, so the class is put into its weights: a class is a vector that is added to
that of the time, which ends in a linear layer, so adding it to this layer's bias once is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from generative.diffusion import DiffusersUNet, Diffusion, DiffusionExperiment
from generative.model import FAMILIES
from generative.processes import TIMES, DDPMConfig, linear_betas
from lab.config import UserError
from lab.images import Trained, load_trained
from lab.report import beyond
from lab.runs import facts

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}


def load(run: str) -> Trained[Diffusion]:
    """The diffusion model of a run: a run folder, a checkpoint folder, or `latest`."""
    return load_trained(run, {"diffusion": FAMILIES["diffusion"]})


def export(loaded: Trained[Diffusion], out: Path | None = None, label: str = "") -> Path:
    """Write a model as a pipeline with its card; returns the folder, `export/` of the run where none is given.

    Args:
        label: the class that the pipeline is to draw; by default any, as for a model that was told none.

    Raises:
        UserError: diffusers has no such model or no such class, or the folder cannot be written.
    """
    check(loaded.experiment, loaded.model)
    index = find_label(loaded.model, label)
    out = out or loaded.run.folder / "export"
    from diffusers import DDPMPipeline

    pipeline: Any = DDPMPipeline(stock_unet(loaded.model, index), stock_scheduler(loaded.model.config.ddpm))  # type: ignore[no-untyped-call]
    try:
        out.mkdir(parents=True, exist_ok=True)
        pipeline.save_pretrained(out)
        (out / "README.md").write_text(card(loaded, label, out.name), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from None
    return out


def check(experiment: DiffusionExperiment, model: Diffusion) -> None:
    """Refuse what the pipelines of diffusers cannot hold.

    Raises:
        UserError: says what they can.
    """
    if experiment.latents:
        raise UserError("this model diffuses codes, and DDPMPipeline pixels; train one without --latents to export it")
    if model.config.process != "ddpm":
        raise UserError(f"this model's process is {model.config.process}, and DDPMPipeline's ddpm; train with --model.process ddpm")
    if model.config.network.kind != "diffusers":
        kind = model.config.network.kind
        raise UserError(f"this model's network is our own ({kind}), which diffusers has not; train with --model.network.kind diffusers")


def find_label(model: Diffusion, label: str) -> int:
    """The index of a class by its name; without a name that of no class.

    Raises:
        UserError: the model knows no such class.
    """
    if not label:
        return len(model.classes)
    if not model.conditional:
        raise UserError(f"--label {label}: this model knows no classes; leave it out")
    if label not in model.classes:
        raise UserError(f"--label {label}: the classes are {', '.join(model.classes)}")
    return model.classes.index(label)


# The two parts


def stock_unet(model: Diffusion, label: int) -> UNet2DModel:
    """The network with a class put into its weights; times count steps of the chain, as pipelines tell them."""
    from diffusers import UNet2DModel

    source = cast(Any, cast(DiffusersUNet, model.network).unet)
    settings = {name: value for name, value in source.config.items() if not name.startswith("_")} | {"num_class_embeds": None}
    weights, times = dict(source.state_dict()), model.config.ddpm.times
    if model.conditional:
        bias = "time_embedding.linear_2.bias"
        weights[bias] = weights[bias] + weights.pop("class_embedding.weight")[label]
    if times != TIMES:  # ours are told on a scale of 1000: a table says what each step is
        settings |= {"time_embedding_type": "learned", "num_train_timesteps": times}
        weights["time_proj.weight"] = source.time_proj(torch.arange(times) * (TIMES / times))
    unet: Any = UNet2DModel(**settings)  # type: ignore[no-untyped-call]
    unet.eval().load_state_dict(weights)
    return cast(UNet2DModel, unet)


def stock_scheduler(config: DDPMConfig) -> DDPMScheduler:
    """The schedule of noise. Some schedulers hold x0 within [-1, 1] by `clip_sample`, others by `thresholding`, at most at 1 here."""
    from diffusers import DDPMScheduler

    betas = linear_betas(config.times)
    return DDPMScheduler(  # type: ignore[no-untyped-call]
        num_train_timesteps=config.times,
        beta_start=float(betas[0]),
        beta_end=float(betas[-1]),
        beta_schedule=SCHEDULES[config.schedule],
        rescale_betas_zero_snr=config.zero_snr,
        prediction_type=PREDICTIONS[config.prediction],
        variance_type=VARIANCES[config.variance],
        timestep_spacing="trailing",
        clip_sample=True,
        thresholding=True,
        sample_max_value=1.0,
    )


# The card

CARD = """\
---
license: mit
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusion, ddpm, dreamplay]
---

# {name}

A denoising diffusion model (Ho et al. 2020, arXiv:2006.11239) of {size} images, trained on {data} for {steps} steps with Dreamplay.
{told} The weights are {weights}.

## Use

```python
import torch
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("{folder}")        # this folder
pictures = pipeline(batch_size=16, num_inference_steps={most}, generator=torch.Generator().manual_seed(0)).images
```
{faster}
Images are [-1, 1] inside. {limits}

## Settings

| | |
|---|---|
{settings}
{scores}
"""

FASTER = """
In 20 steps, with DPM-Solver++ or with DDIM:

```python
from diffusers import DDIMPipeline, DPMSolverMultistepScheduler

pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
pictures = pipeline(batch_size=16, num_inference_steps=20).images

ddim = DDIMPipeline.from_pretrained("{folder}")
pictures = ddim(batch_size=16, num_inference_steps=20, use_clipped_model_output=True).images
```
"""
"""Only for fixed variances: the schedulers of diffusers other than DDPM's cannot part a learned one from the rest."""


def card(loaded: Trained[Diffusion], label: str, folder: str) -> str:
    """The model card, in Markdown; `folder` is what it tells people to load."""
    model, experiment, config = loaded.model, loaded.experiment, loaded.model.config.ddpm
    channels, height, width = model.shape
    any_class = "It draws any class." if model.conditional else "It knows no classes."
    return CARD.format(
        name=experiment.name + (f", class {label}" if label else ""),
        size=f"{height}x{width} {'grey' if channels == 1 else 'colour'}",
        data=experiment.data.name,
        steps=f"{loaded.step:,}",
        told=f"It draws class {label} of {', '.join(model.classes)}." if label else any_class,
        weights="averages over training (EMA)" if experiment.optimizer.ema else "those of the last step",
        folder=folder,
        most=config.times,
        faster=FASTER.format(folder=folder) if config.variance != "learned" else "",
        limits=limits(config),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings(loaded).items()),
        scores=scores(loaded),
    )


def limits(config: DDPMConfig) -> str:
    """What to know before sampling in another way."""
    if config.variance == "small":
        return "DDIM's steps should divide the number of steps trained on; `use_clipped_model_output` takes x0 as clipped throughout."
    kind = "These variances are learned: only DDPMScheduler reads them, and" if config.variance == "learned" else "With these variances"
    return f"{kind} DDPMScheduler leaves noise in the pictures if it takes fewer steps than {config.times}."


def settings(loaded: Trained[Diffusion]) -> Mapping[str, Any]:
    """What the model is, in numbers."""
    config, network = loaded.model.config.ddpm, loaded.model.config.network
    return {
        "weights": f"{sum(weight.numel() for weight in loaded.model.network.parameters()):,}",
        "channels of each size": ", ".join(map(str, network.widths)),
        "residual blocks of each size": network.blocks,
        "schedule of noise": f"{config.schedule}, {config.times} steps" + (", pure noise at the end" if config.zero_snr else ""),
        "the network tells": config.prediction,
        "variance of a step": config.variance,
    }


def scores(loaded: Trained[Diffusion]) -> str:
    """The run's last evaluation as a section, if it was of this checkpoint; empty where there is none."""
    found = facts(loaded.run.folder / "evaluation.json") or {}
    if found.get("step") != loaded.step:
        return ""
    rows = {name: value for name, value in found.items() if isinstance(value, int | float) and name != "step" and not beyond(value)}
    lines = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in rows.items()]
    return "\n".join(["\n## Scores\n", "| | |\n|---|---|", *lines, f"\n{found.get('protocol', '')}."])
