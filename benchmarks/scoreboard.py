"""One table of all generative families: how good their samples are, what they cost, how fast they draw.

    python benchmarks/scoreboard.py RUN [RUN ...]            judge these runs; the rows of others are kept
    python benchmarks/scoreboard.py --train                  train the presets of every family first, about two hours on 2 cores
    python benchmarks/scoreboard.py --train --presets gan_mnist vqvae_mnist tokens_mnist

Every run is judged by `scripts/evaluate.py RUN --cas`, so that the figures are those that anybody gets, beside what training images
score in place of samples (the floor). Images per second are those of a batch of 500 with the model's own settings, after one that is
not counted. Minutes are those of training, previews included, and after a plus those of the run that a model was built on (the VQ-VAE
of tokens, the teacher of a student); reading the data and starting are left out.

The figures go to benchmarks/results/scoreboard.json, samples to scoreboard/ beside it, the table to docs/scoreboard.md and all samples
in one picture to docs/families.png.
With --train the runs stand below runs/scoreboard/; what was trained there before is taken up where it stopped.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from generative import model as families
from generative.model import Generator, Loaded, spread_labels
from lab import distributed, media, runs, seeding
from lab.config import UserError, read_yaml
from lab.launch import guarded
from lab.recorder import console
from lab.runs import Run

ROOT = Path(__file__).resolve().parent.parent
HOME = runs.RUNS / "scoreboard"
BATCH, SHOWN = 500, 25
ROSTER = {
    "autoencoder_mnist": [],
    "vae_mnist": [],
    "vae_conv_mnist": [],
    "vqvae_mnist": [],
    "tokens_mnist": ["--vqvae", "vqvae_mnist"],
    "masked_mnist": ["--vqvae", "vqvae_mnist"],
    "gan_mnist": [],
    "glow_mnist": [],
    "ddpm_mnist": [],
    "diffusion_mnist": [],
    "distillation_mnist": ["--teacher", "diffusion_mnist"],
}
"""Presets that are trained, in this order, and the runs among them that some are built on."""


@dataclass(frozen=True)
class Options:
    """Which runs to judge."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")] = ()
    """Run folders; their rows replace those of the same name."""
    train: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train presets first, and judge those as well."""
    presets: tuple[str, ...] = tuple(ROSTER)
    """Presets to train."""
    samples: int = 10_000
    """Samples of each model; distances depend on how many there are."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to judge."""
    out: Path = ROOT / "benchmarks" / "results" / "scoreboard.json"
    """Where the figures go, and into a folder of the same name the samples."""
    table: Path = ROOT / "docs" / "scoreboard.md"
    """Where the table goes."""
    picture: Path = ROOT / "docs" / "families.png"
    """Where the picture goes."""


def main() -> int:
    """Train, judge every run and write the board anew after each."""
    options = tyro.cli(Options, description=__doc__)
    if not options.runs and not options.train:
        raise UserError("give the runs to judge, or --train")
    distributed.join(options.device, 0, deterministic=False)
    trained = [str(train(preset)) for preset in options.presets] if options.train else []
    for name in [*options.runs, *trained]:
        enter(options, judge(options, name))
    return 0


# Training


def train(preset: str) -> Path:
    """Train a preset by its script, or go on with it, to its last step; returns the run's folder.

    Raises:
        UserError: there is no such preset on the board, or training failed.
    """
    if preset not in ROSTER:
        raise UserError(f"--presets {preset}: the board trains {', '.join(ROSTER)}")
    folder, config = HOME / preset, ROOT / "configs" / "generative" / f"{preset}.yaml"
    start = ["--resume", str(folder)] if (folder / "config.yaml").exists() else [str(config), "--run-dir", str(folder)]
    given = [str(HOME / word) if word in ROSTER else word for word in ROSTER[preset]]
    script = ROOT / "scripts" / f"train_{read_yaml(config)[1]}.py"
    done = subprocess.run([sys.executable, str(script), *start, *given])
    if done.returncode:
        raise UserError(f"{preset}: training ended with exit code {done.returncode}; the rest was not begun")
    return folder


def minutes(run: Run) -> float:
    """Minutes of training, from the pace of each row; what was done twice because of a stop counts once.

    Raises:
        UserError: nothing is known of the run's pace.
    """
    rows: list[Mapping[str, float]] = []
    for line in run.timing.read_text().splitlines() if run.timing.exists() else []:
        row = json.loads(line)
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    if not rows:
        raise UserError(f"{run.timing}: no row yet, so that nothing is known of the time that training took")
    steps = [0, *(row["step"] for row in rows)]
    return sum((after - before) / row["steps_per_second"] for before, after, row in zip(steps, steps[1:], rows)) / 60


def minutes_before(loaded: Loaded) -> float:
    """Minutes of the run that a model is built on; 0 if there is none, or only `latest` was noted, which may be another by now."""
    named = (getattr(loaded.experiment, field, "") for field in ("vqvae", "teacher", "latents"))
    return sum(minutes(runs.find(name, families.FAMILIES).run) for name in named if name not in ("", "latest"))


# Judging


def judge(options: Options, name: str) -> dict[str, Any]:
    """A row of the board, after samples of the model were drawn beside the figures.

    Raises:
        UserError: there is no such run, or it cannot be judged by its samples.
    """
    loaded = families.load(name, options.device)
    if loaded.model.latent == 0:
        raise UserError(f"{name}: this model makes images of smaller ones, not of noise; scripts/evaluate.py judges it by itself")
    console.print(f"{loaded.experiment.name}: {loaded.run.folder}", highlight=False, soft_wrap=True)
    row = {"name": loaded.experiment.name, "family": loaded.experiment.experiment, "data": loaded.experiment.data.name}
    row |= {"parameters": sum(weight.numel() for weight in loaded.model.parameters()), "images_per_second": pace(loaded.model)}
    row |= {"minutes": minutes(loaded.run), "minutes_before": minutes_before(loaded)}
    row |= evaluated(options, name)
    media.save_png(tile(options, row), media.grid(drawn(loaded.model, SHOWN)), scale=1)
    return row


def evaluated(options: Options, name: str) -> dict[str, Any]:
    """What scripts/evaluate.py says of a run, without where it stands."""
    words = [str(ROOT / "scripts" / "evaluate.py"), name, "--json", "--cas", "--samples", str(options.samples), "--device", options.device]
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{name}: scripts/evaluate.py ended with exit code {done.returncode}")
    return {key: value for key, value in json.loads(done.stdout).items() if key not in ("run", "experiment")}


def pace(model: Generator) -> float:
    """Images that a model draws in a second, in a batch of 500 as it does by itself."""
    seconds = []
    for index in range(2):
        started = time.perf_counter()
        drawn(model, BATCH, index)
        seconds.append(time.perf_counter() - started)
    return BATCH / seconds[-1]


@torch.no_grad()
def drawn(model: Generator, count: int, index: int = 0) -> torch.Tensor:
    """Samples (count, C, H, W) on the CPU, of all classes in turn."""
    labels = spread_labels(count, model.classes).to(next(model.parameters()).device)
    return model.sample(count, labels, seeding.generator(0, "board", index)).cpu()


# Showing


def enter(options: Options, row: Mapping[str, Any]) -> None:
    """Put a row into the figures in place of the one of the same name, and write the table and the picture of all."""
    report = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    report |= {"machine": platform.processor() or platform.machine(), **distributed.environment()}
    rows = [other for other in report.pop("rows") if other["name"] != row["name"]] + [row]
    rows.sort(key=lambda row: (row.get("features", ""), row.get("frechet_test", math.inf), row["name"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text("\n".join(tables(rows)))
    panels(options, rows)


def tile(options: Options, row: Mapping[str, Any]) -> Path:
    """The picture of a model's samples."""
    return options.out.with_suffix("") / f"{row['name']}.png"


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: a table for each set and its features, whose figures can be compared, the best first, the floor at its end."""
    lines: list[str] = []
    for group in dict.fromkeys((row["data"], row.get("features", "no features")) for row in rows):
        members = [row for row in rows if (row["data"], row.get("features", "no features")) == group]
        lines += [f"### {group[0]} ({group[1]})", "", *table(members), ""]
        protocols = dict.fromkeys(row["sample_protocol"] for row in members)
        lines += [*(f"Protocol: {protocol}." for protocol in protocols), ""]
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of one Markdown table."""
    floor: Mapping[str, float] = next((row["ladder"]["floor"] for row in rows if "ladder" in row), {})
    real = next((row["cas_real"] for row in rows if "cas_real" in row), None)
    last = {"name": "training images", "family": "the floor", **floor, "memorised": 0.01} | ({"cas": real} if real else {})
    cells = [[write(row, floor) for write in COLUMNS.values()] for row in [*rows, last]]
    rule = [":---" if title in ("model", "family") else "---:" for title in COLUMNS]
    return ["| " + " | ".join(line) + " |" for line in [list(COLUMNS), rule, *cells]]


def number(key: str, form: str, scale: float = 1) -> Callable[[Mapping[str, Any], Mapping[str, float]], str]:
    """Writes one figure of a row; nothing where it has none."""
    return lambda row, floor: format(scale * row[key], form) if key in row else ""


def times_floor(row: Mapping[str, Any], floor: Mapping[str, float]) -> str:
    """How many times the Fréchet distance of training images a model's is."""
    return f"{row['frechet_test'] / floor['frechet_test']:.1f}" if "frechet_test" in row else ""


def time_spent(row: Mapping[str, Any], floor: Mapping[str, float]) -> str:
    """Minutes of training, and those of what a model is built on."""
    if "minutes" not in row:
        return ""
    return f"{row['minutes']:.1f}" + (f" + {row['minutes_before']:.1f}" if row["minutes_before"] else "")


def likelihood(row: Mapping[str, Any], floor: Mapping[str, float]) -> str:
    """What a family tells of the likelihood of test images, with its unit; most know a bound only."""
    if "bits_per_dim" in row:
        return f"{'' if row['family'] == 'flow' else '≤ '}{row['bits_per_dim']:.2f} bits/dim"
    return f"≤ {row['nll']:.1f} nats, binarised" if "nll" in row else ""


COLUMNS: dict[str, Callable[[Mapping[str, Any], Mapping[str, float]], str]] = {
    "model": lambda row, floor: f"`{row['name']}`" if "parameters" in row else row["name"],
    "family": lambda row, floor: row["family"],
    "Fréchet": number("frechet_test", ".3g"),
    "x floor": times_floor,
    "kernel": number("kernel_test", ".2g"),
    "precision": number("precision_test", ".3f"),
    "recall": number("recall_test", ".3f"),
    "density": number("density_test", ".2f"),
    "coverage": number("coverage_test", ".3f"),
    "class shown (%)": number("class_accuracy", ".1f", 100),
    "learnt from samples (%)": number("cas", ".1f", 100),
    "memorised (%)": number("memorised", ".1f", 100),
    "likelihood": likelihood,
    "parameters": number("parameters", ",d"),
    "minutes": time_spent,
    "images/s": number("images_per_second", ",.0f"),
}


def panels(options: Options, rows: Sequence[Mapping[str, Any]], columns: int = 4) -> None:
    """One picture of the samples of all models, each under its name."""
    from matplotlib.figure import Figure

    columns = min(columns, len(rows))
    high = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(2.1 * columns, 2.35 * high), layout="constrained")
    for axes in figure.subplots(high, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, row in zip(figure.axes, rows):
        with Image.open(tile(options, row)) as picture:
            axes.imshow(np.array(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(row["name"], fontsize=9, parse_math=False)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, dpi=160)


if __name__ == "__main__":
    sys.exit(guarded(main))
