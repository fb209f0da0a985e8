"""Write a report of runs to hand to somebody: one HTML file that holds everything it shows and opens by a double click.

    python scripts/report.py latest                                  to report.html in the run's folder
    python scripts/report.py RUN RUN RUN --out comparison.html       runs over each other, seeds of one setting as a band
    python scripts/report.py RUN --no-video                          a smaller file

It tells what was trained on what, key figures (run scripts/evaluate.py before for the best ones), learning curves, the settings in
which runs differ, samples, the agent at play, the commands to do the same, and what is damaged or missing in a run. An agent
of which there is no film yet plays half a minute for it, a generator without pictures draws some; both stay in media/ of the run.
RUN is a run folder, a checkpoint folder or `latest`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lab import report, runs
from lab.config import UserError
from lab.launch import guarded
from lab.recorder import log, speak
from lab.runs import Run

FILMED = 30
"""Seconds of play that are filmed at most."""


@dataclass(frozen=True)
class Options:
    """Of which runs, and where to."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folder, checkpoint folder, or `latest`; several are laid over each other."""
    out: Path | None = None
    """Where to write; default: report.html in the run's folder, of several runs in the working folder."""
    video: bool = True
    """Put films into the report, each of up to 8 MiB."""


def main() -> int:
    """Write what the command line asks for."""
    options = tyro.cli(Options, description=__doc__)
    if not options.runs:
        raise UserError("give a run to report on: its folder, a checkpoint folder of it, or `latest`")
    speak()
    told = list(dict.fromkeys(found(name) for name in options.runs))
    out = options.out or (told[0].folder / "report.html" if len(told) == 1 else Path("report.html"))
    report.check(out)
    for run in told:
        complete(run, options.video)
    report.write(report.html(told, options.video), out)
    print(f"report: {out}")
    return 0


def found(name: str) -> Run:
    """The run that a word means; one that has lost its config is a run too.

    Raises:
        UserError: there is none.
    """
    run = Run(Path(name))
    return run if run.metrics.exists() or run.environment.exists() else runs.find(name).run


def complete(run: Run, films: bool) -> None:
    """Draw what a report shows and nobody has drawn yet; whatever comes in its way is said and stops nothing."""
    from generative import model as generative
    from rl import agent as rl

    try:
        if run.experiment in rl.FAMILIES and films and not any(list(run.media.glob(f"*{suffix}")) for suffix in (".mp4", ".gif")):
            film(run)
        if run.experiment in generative.FAMILIES and not list(run.media.glob("*.png")):
            draw(run)
    except Exception as error:  # runs may be damaged in any way, and the rest of the report matters more
        log.warning("%s: nothing could be drawn for the report: %s", run.folder, error)


def film(run: Run) -> None:
    """Film the agent of a run at play."""
    from rl import agent, play

    loaded = agent.load(str(run.folder))
    path = run.media / f"play_{loaded.step:09d}.mp4"
    log.info("%s has no film yet: filming %s", run.folder, path.name)
    game, most = loaded.experiment.game, round(FILMED * play.pace(loaded.experiment.game))
    play.film(loaded.agent, game, path, policy=loaded.experiment.usual_policy, epsilon=0.05, seed=0, most=most)


def draw(run: Run) -> None:
    """Draw samples of the generator of a run, those that its previews show."""
    import torch

    from generative import model
    from lab import media

    loaded = model.load(str(run.folder))
    if not loaded.model.latent:  # it makes images of images
        return
    path = run.media / f"samples_{loaded.step:09d}.png"
    log.info("%s has no pictures yet: drawing %s", run.folder, path.name)
    with torch.no_grad():
        samples = loaded.model.sample(64, model.spread_labels(64, loaded.model.classes), torch.Generator().manual_seed(0))
    media.save_png(path, media.grid(samples))


if __name__ == "__main__":
    sys.exit(guarded(main))
