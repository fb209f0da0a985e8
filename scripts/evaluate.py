"""Judge a trained model on its test set and by its samples, or a trained agent by whole games.

    python scripts/evaluate.py latest
    python scripts/evaluate.py RUN --importance-samples 1000 --json
    python scripts/evaluate.py RUN RUN RUN                       generators side by side, or the seeds of one agent together
    python scripts/evaluate.py RUN --sampler dpmpp --steps 10 --guidance 1.5 --samples 2000
    python scripts/evaluate.py RUN --cas                         also what a classifier learns from samples alone
    python scripts/evaluate.py RUN --features CLASSIFIER         in the eyes of a classifier of your own
    python scripts/evaluate.py RUN --games 100 --policy greedy

For a classifier: accuracy with its 95 % interval, the confusion matrix and the surest mistakes as pictures in media/.
For a generator: what its family can tell (bound and log-likelihood of a VAE, squared error of an autoencoder, ...), then how far its
samples lie from real images, which part of them shows the class that was asked for, whether a class is missing, and how many are
copies of training images (the nearest ones in media/neighbours.png). Beside them stands the floor, which is what training images
score in place of samples, and below them a ladder of damaged images, to show what a distance means. Distances depend on the
classifier in whose eyes they are taken; its name, which ends in a checksum of it, stands with each.
For an agent: mean, median and inter-quartile mean of the real score, with a 95 % interval, beside those of people and of
random play; several runs are taken together, run by run and then game by game. The protocol is spelt out each time. The
scores of each run also go to evaluation.json in its folder (evaluation_random.json with --random). RUN is a run folder, a
checkpoint folder or `latest`.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table

from generative import metrics
from generative import model as generative
from generative.model import EvaluationConfig, SamplingConfig
from lab import classifier, data, media, runs
from lab.config import UserError
from lab.data import DataConfig, ImageSet
from lab.launch import guarded
from lab.recorder import console, speak
from rl import agent as rl
from rl import evaluate as play
from rl.evaluate import PlayConfig


@dataclass(frozen=True)
class Options:
    """Which runs to judge, and how."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folder, checkpoint folder, or `latest`; several of generators, or of agents that play the same game."""
    images: tyro.conf.OmitArgPrefixes[EvaluationConfig] = EvaluationConfig()
    how: tyro.conf.OmitArgPrefixes[SamplingConfig] = SamplingConfig()
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
    if all(each.run.experiment in generative.FAMILIES for each in found):
        each = [judge_generator(name, options) for name in options.runs]
        return each[0] if len(each) == 1 else {"generators": each}
    if len(found) > 1:
        raise UserError("several runs can be judged together only if all are agents or all are generators; name one run")
    return judge_classifier(options)


def judge_generator(name: str, options: Options) -> dict[str, Any]:
    """What a generator's own family can tell of it, and what all families are told by."""
    loaded = generative.load(name, options.device)
    options.how.check(loaded.model)
    scores = {"experiment": loaded.experiment.experiment, "step": loaded.step}
    scores |= loaded.model.evaluate(loaded.experiment.dataset().to(options.device), options.images)
    if loaded.model.latent:  # others make images of images
        real = real_images(loaded.experiment.data, options.device)
        features = metrics.find_features(real, options.images.features)
        scores |= metrics.judge(loaded.model, real, options.images, features, options.how, loaded.run.media)
        scores |= {"ladder": metrics.ladder(real, features, options.images.samples)} if features else {}
    return written(loaded.run, scores)


@functools.lru_cache(maxsize=1)
def real_images(config: DataConfig, device: str) -> ImageSet:
    """The set as it is, whatever a family makes of it before it learns."""
    return data.load(config).to(device)


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


# Printing

SILENT = ("run", "experiment", "step", "protocol", "scores", "features", "samples", "sample_protocol", "ladder", "cas_real")


def show(result: Mapping[str, Any]) -> None:
    """Print scores as a table, and under it how they were taken."""
    if "generators" in result or "sample_protocol" in result:
        return show_generators(result.get("generators", [result]))
    table = Table(title=f"{result['run']}, step {result['step']}", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in result.items():
        if name not in SILENT and value is not None:
            table.add_row(name.replace("_", " "), number(value))
    console.print(table)
    for protocol in protocols([result]):
        console.print(protocol, highlight=False, soft_wrap=True)


def show_generators(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a column for each run, the floor beside them and the ladder below; a row holds only what can be compared."""
    columns = [titled(result) for result in results]
    columns.append({title: value for result in results for title, value in titled(floor(result)).items()})
    table = Table(title="samples against real images", title_justify="left")
    table.add_column("score")
    for heading in [*(f"{result['run']}, step {result['step']}" for result in results), "floor"]:
        table.add_column(heading, justify="right", overflow="fold")
    for title in dict.fromkeys(title for column in columns[:-1] for title in column):
        table.add_row(title, *(number(column.get(title, "")) for column in columns))
    console.print(table)
    for name, ladder in {result["features"]: result["ladder"] for result in results if "ladder" in result}.items():
        show_ladder(name, ladder)
    for protocol in protocols(results):
        console.print(protocol, highlight=False, soft_wrap=True)


def show_ladder(name: str, ladder: Mapping[str, Mapping[str, float]]) -> None:
    """Print what damaged training images score."""
    scores = [score for score in ladder["floor"] if score.endswith("_test")]
    table = Table(title=f"training images in place of samples, beside test images ({name})", title_justify="left")
    table.add_column("damage")
    for score in scores:
        table.add_column(score.removesuffix("_test"), justify="right")
    for damage, values in ladder.items():
        table.add_row(damage, *(number(values[score]) for score in scores))
    console.print(table)


def titled(scores: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into a table, by its title."""
    titles = metrics.titles(scores)
    return {titles[name]: value for name, value in scores.items() if name not in SILENT}


def floor(result: Mapping[str, Any]) -> dict[str, Any]:
    """What real images score where the samples of a result stand."""
    values = {"memorised": 0.01} if "memorised" in result else {}
    values |= {"cas": result["cas_real"]} if "cas_real" in result else {}
    return {**values, **result["ladder"]["floor"], "features": result["features"]} if "ladder" in result else values


def number(value: Any) -> str:
    """A value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def protocols(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """How scores were taken, each way once."""
    return list(dict.fromkeys(result[key] for result in results for key in ("protocol", "sample_protocol") if key in result))


if __name__ == "__main__":
    sys.exit(guarded(main))
