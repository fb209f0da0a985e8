"""Train an autoencoder, a VAE and an agent, and show what they learnt: what `make demo` runs, in under ten minutes.

Every command it starts is printed, and can be typed by itself.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from lab import data, runs
from lab.data import DataConfig, DataError
from lab.launch import guarded
from lab.recorder import console, speak

SCRIPTS = Path(__file__).resolve().parent
PRESETS = SCRIPTS.parent / "configs"


@dataclass(frozen=True)
class Lesson:
    """One model of the demo: how to train it, what to draw, what to measure."""

    title: str
    script: str
    preset: str
    steps: int
    pictures: tuple[str, ...]
    scores: tuple[tuple[str, str], ...]


NEIGHBOURS = ("neighbour_accuracy", "class, told by the 5 nearest codes")
LESSONS = (
    Lesson(
        "autoencoder", "train_autoencoder.py", "generative/autoencoder_mnist.yaml", 5000, ("reconstructions", "samples"),
        (("error", "squared error per image"), NEIGHBOURS),
    ),
    Lesson(
        "VAE", "train_vae.py", "generative/vae_mnist.yaml", 15000, ("samples", "reconstructions", "interpolation"),
        (("bound", "test bound, nats"), ("nll", "-log p(x), 100 samples each, nats"), NEIGHBOURS),
    ),
)  # fmt: skip


def main() -> int:
    """Train, draw and judge every lesson, then say where everything is."""
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0
    speak()
    began, name = time.monotonic(), images()
    table = Table(title="What was learnt", title_justify="left")
    for column in ("model", "score", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    files: list[tuple[str, Path]] = []
    for lesson in LESSONS:
        run = train(lesson, name)
        scores = judge(run)
        for key, meaning in lesson.scores:
            table.add_row(lesson.title, meaning, f"{scores[key]:.4g}")
        files += [(f"{lesson.title}: {kind}", draw(run, kind)) for kind in lesson.pictures]
        files += [(f"{lesson.title}: loss", run / "media" / "curves.png"), (f"{lesson.title}: the whole run", run)]
    files += agent(table)
    console.print(table)
    show(files)
    console.print(f"done in {time.monotonic() - began:.0f} s; next: the README, or any of these scripts with --help")
    return 0


def images() -> str:
    """MNIST, or the digits inside scikit-learn where MNIST cannot be had; which one, in a line."""
    try:
        found = data.load(DataConfig(name="mnist"))
        console.print(f"images: MNIST, {len(found.train):,} to train on and {len(found.test):,} to test on")
        return "mnist"
    except DataError:
        why = "MNIST is neither at hand (in LAB_DATA or the cache) nor to be downloaded"
        console.print(f"images: scikit-learn's 1,797 real digits, since {why}", soft_wrap=True, highlight=False)
        return "digits"


def train(lesson: Lesson, images: str) -> Path:
    """Train one model in a run folder of its own; returns the folder."""
    folder = runs.RUNS / "demo" / runs.stamp()
    options = [
        "--run-dir",
        str(folder),
        "--trainer.steps",
        str(lesson.steps),
        "--trainer.save-every",
        "2500",
        "--trainer.preview-every",
        "2500",
    ]
    call(lesson.script, str(PRESETS / lesson.preset), "--data.name", images, *options)
    return folder


def judge(run: Path) -> dict[str, float]:
    """The scores of a run on its test set."""
    call("evaluate.py", str(run), "--images", "1000", "--importance-samples", "100", "--json", quiet=True)
    scores: dict[str, float] = json.loads((run / "evaluation.json").read_text())
    return scores


def draw(run: Path, kind: str) -> Path:
    """Draw one kind of picture from a run; returns its file."""
    path = run / "media" / f"{kind}.png"
    count = "8" if kind == "interpolation" else "64"
    call("sample.py", str(run), "--kind", kind, "--count", count, "--out", str(path), quiet=True)
    return path


def agent(table: Table) -> list[tuple[str, Path]]:
    """Train an agent on an Atari game, judge it beside random play, and film both; returns the files."""
    run = runs.RUNS / "demo" / runs.stamp()
    call("train_dqn.py", str(PRESETS / "rl" / "demo.yaml"), "--run-dir", str(run))
    for title, option, name in (("random play", ["--random"], "evaluation_random"), ("agent", [], "evaluation")):
        call("evaluate.py", str(run), "--games", "20", *option, "--json", quiet=True)
        scores = json.loads((run / f"{name}.json").read_text())
        table.add_row(title, f"mean score in {scores['games']} games", f"{scores['mean']:.4g}")
        call("watch.py", str(run), *option, "--out", str(run / "media" / f"{title.replace(' ', '_')}.mp4"), quiet=True)
    media = run / "media"
    return [("agent: a game", media / "agent.mp4"), ("random play: a game", media / "random_play.mp4"), ("agent: the whole run", run)]


def call(script: str, *options: str, quiet: bool = False) -> None:
    """Run one of the other scripts, saying so; the demo ends with its exit code where it fails."""
    words = [str(SCRIPTS / script), *options]
    shown = shlex.join(["python", *(word.removeprefix(f"{SCRIPTS.parent}/") for word in words)])
    console.print(f"$ {shown}", style="bold", highlight=False, soft_wrap=True)
    done = subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL if quiet else None)
    if done.returncode:
        raise SystemExit(done.returncode)


def show(files: list[tuple[str, Path]]) -> None:
    """Print where everything is, a line each, so that a path can be clicked or copied."""
    console.print("Where it is", style="italic")
    width = max(len(what) for what, _ in files)
    for what, path in files:
        console.print(f"  {what:{width}}  {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
