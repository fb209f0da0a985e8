"""Runs for the Runs part to show, and its curves as a browser draws them."""

import json
import math
from pathlib import Path

import torch

from lab import media, runs
from lab.config import Given, dump, resolve
from lab.runs import Run


def write_run(folder: Path, rows: int, steps: int = 400, **given: str) -> Run:
    """A run as a training leaves it: 10 steps a row, an evaluation every ten rows, a picture at steps 100 and 200."""
    from generative.vae import EXPERIMENT

    values = {"trainer.steps": str(steps), **{key.replace("__", "."): value for key, value in given.items()}}
    config = dump(resolve(EXPERIMENT, {key: Given(value, "test") for key, value in values.items()}).settings, "vae")
    run = runs.create(folder.parent.name, folder, config)
    runs.note_start(run, {})
    with run.metrics.open("w") as metrics, run.timing.open("w") as timing:
        for row in range(1, rows + 1):
            values = {"step": 10 * row, "train/loss": 50 / row + math.sin(row) / 10, "train/kl": row / 7}
            metrics.write(json.dumps(values | ({"eval/bound": 90.5 - row} if row % 10 == 0 else {})) + "\n")
            timing.write(json.dumps({"step": 10 * row, "time": 1.7e9 + row, "steps_per_second": 10.0}) + "\n")
    for step in (100, 200):
        media.save_png(run.media / f"samples_{step:09d}.png", torch.full((1, 8, 8), step / 400))
    runs.note_end(run, None)
    return run


def curve(page, metric: str):
    """The chart of a metric."""
    return page.locator(f'figure[aria-label="Curve of {metric}"]')


def line(page, metric: str) -> str:
    """The last line that the chart of a metric draws, as SVG has it."""
    lines = curve(page, metric).locator('path[fill="none"][stroke-width="2"]')
    lines.last.wait_for(state="attached")
    return lines.last.get_attribute("d")


def wait_for_other_line(page, metric: str, before: str) -> str:
    page.wait_for_function(
        """([metric, before]) => {
            const lines = document.querySelectorAll(`figure[aria-label="Curve of ${metric}"] path[fill="none"][stroke-width="2"]`);
            return lines.length && lines[lines.length - 1].getAttribute("d") !== before;
        }""",
        arg=[metric, before],
    )
    return line(page, metric)
