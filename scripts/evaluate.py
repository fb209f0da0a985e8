"""Judge a trained generative model on its test set.

    python scripts/evaluate.py latest
    python scripts/evaluate.py RUN --importance-samples 1000 --json

For a VAE: the bound and the importance-sampled log-likelihood in nats per image, with the protocol spelt out. For an
autoencoder: the squared error. The scores also go to evaluation.json in the run folder. RUN is a run folder, a
checkpoint folder or `latest`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from rich.table import Table

from generative import model as families
from generative.model import EvaluationConfig
from lab.config import UserError
from lab.launch import guarded
from lab.recorder import console


@dataclass(frozen=True)
class Options:
    """Which run to judge, and how."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder, or `latest`."""
    how: tyro.conf.OmitArgPrefixes[EvaluationConfig] = EvaluationConfig()
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


def main() -> int:
    """Judge the run that the command line names."""
    options = tyro.cli(Options, description=__doc__)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use cpu")
    loaded = families.load(options.run, options.device)
    scores = loaded.model.evaluate(loaded.experiment.dataset().to(options.device), options.how)
    result = {"run": str(loaded.run.folder), "experiment": loaded.experiment.experiment, "step": loaded.step, **scores}
    (loaded.run.folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


def show(result: dict[str, float | int | str]) -> None:
    """Print scores as a table."""
    table = Table(title=f"{result['run']}, step {result['step']}", caption=str(result["protocol"]))
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in result.items():
        if name not in ("run", "experiment", "step", "protocol"):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


if __name__ == "__main__":
    sys.exit(guarded(main))
