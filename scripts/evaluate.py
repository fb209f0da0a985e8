"""Judge a trained model on its test set, or a trained agent by whole games.

    python scripts/evaluate.py latest
    python scripts/evaluate.py RUN --importance-samples 1000 --json
    python scripts/evaluate.py RUN --games 100 --policy greedy
    python scripts/evaluate.py RUN RUN RUN                       the seeds of one setting together

For a classifier: accuracy with its 95 % interval, the confusion matrix and the surest mistakes as pictures in media/.
For a VAE: the bound and the importance-sampled log-likelihood in nats per image. For an autoencoder: the squared error.
For an agent: mean, median and inter-quartile mean of the real score, with a 95 % interval, beside those of people and of
random play; several runs are taken together, run by run and then game by game. The protocol is spelt out each time. The
scores of each run also go to evaluation.json in its folder (evaluation_random.json with --random). RUN is a run folder, a
checkpoint folder or `latest`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table

from generative import model as generative
from generative.model import EvaluationConfig
from lab import classifier, media, runs
from lab.config import UserError
from lab.launch import guarded
from lab.recorder import console, speak
from rl import agent as rl
from rl import evaluate as play
from rl.evaluate import PlayConfig


@dataclass(frozen=True)
class Options:
    """Which runs to judge, and how."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folder, checkpoint folder, or `latest`; several only of agents that play the same game."""
    images: tyro.conf.OmitArgPrefixes[EvaluationConfig] = EvaluationConfig()
    agents: tyro.conf.OmitArgPrefixes[PlayConfig] = PlayConfig()
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


def main() -> int:
    """Judge the runs that the command line names."""
    options = tyro.cli(Options, description=__doc__)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use cpu")
    if not options.json:
        speak()
    result = judge(options)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


def judge(options: Options) -> dict[str, Any]:
    """The scores of the runs together; those of each run are also written to its folder."""
    if not options.runs:
        raise UserError("give a run to judge: its folder, a checkpoint folder of it, or `latest`")
    found = [runs.find(name, generative.FAMILIES | rl.FAMILIES | classifier.FAMILIES) for name in options.runs]
    if all(each.run.experiment in rl.FAMILIES for each in found):
        return judge_agents(options)
    if len(found) > 1:
        raise UserError("several runs can be judged together only if all are agents; name one run")
    if found[0].run.experiment in classifier.FAMILIES:
        return judge_classifier(options)
    loaded = generative.load(options.runs[0], options.device)
    scores = loaded.model.evaluate(loaded.experiment.dataset().to(options.device), options.images)
    return written(loaded.run, {"experiment": loaded.experiment.experiment, "step": loaded.step, **scores})


def judge_classifier(options: Options) -> dict[str, Any]:
    """A classifier on its test set, with pictures of what it takes for what."""
    loaded = classifier.load(options.runs[0], options.device)
    images = loaded.experiment.dataset().to(options.device)
    split = images.test.spread(options.images.images)
    result = classifier.judge(loaded.model, split)
    media.save_png(loaded.run.media / "confusion.png", classifier.confusion(result, images.classes), 1)
    media.save_png(loaded.run.media / "mistakes.png", classifier.mistakes(result, split, images.classes), 1)
    scores = {"protocol": f"{images.name} test, {len(split)} images; 95 % interval by Wilson's formula", **result.scores()}
    return written(loaded.run, {"experiment": "classifier", "step": loaded.step, **scores})


def judge_agents(options: Options) -> dict[str, Any]:
    """Every agent by itself, then all together."""
    how, seed, name = options.agents, options.images.seed, "evaluation_random.json" if options.agents.random else "evaluation.json"
    loaded = [rl.load(run, options.device) for run in options.runs]
    played = play.judge(loaded, how, seed)
    each = [written(one.run, {**kind(one), **play.report([one], [games], how, seed)}, name) for one, games in zip(loaded, played)]
    if len(loaded) == 1:
        return each[0]
    return {"run": ", ".join(str(one.run.folder) for one in loaded), **kind(loaded[0]), **play.report(loaded, played, how, seed)}


def kind(loaded: rl.Loaded) -> dict[str, Any]:
    """What was judged."""
    return {"experiment": loaded.experiment.experiment, "step": loaded.step}


def written(run: runs.Run, scores: Mapping[str, Any], name: str = "evaluation.json") -> dict[str, Any]:
    """The scores of a run with its name, after they were written to its folder."""
    result = {"run": str(run.folder), **scores}
    (run.folder / name).write_text(json.dumps(result, indent=1) + "\n")
    return result


def show(result: Mapping[str, Any]) -> None:
    """Print scores as a table, and under it how they were taken."""
    table = Table(title=f"{result['run']}, step {result['step']}", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in result.items():
        if name not in ("run", "experiment", "step", "protocol", "scores") and value is not None:
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    console.print(result["protocol"], highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
