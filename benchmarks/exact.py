"""Every trainer killed again and again, resumed, and compared byte for byte with its run that nothing interrupted.

    python benchmarks/exact.py                                      20 kills of every trainer, about half an hour on 2 cores
    python benchmarks/exact.py --minutes 2                          a sample: a kill of each, and more while there is time; writes nothing
    python benchmarks/exact.py --trainers dqn_pong ppo_pong --kills 5

A trainer is a script with settings so small that a run takes seconds: real processes, started as a user starts them, with a thread each.
SIGKILL comes while a process starts, somewhere in training, as soon as a save has begun, or before the row of a test (scores, pictures,
videos), in turns and at instants drawn by `--seed`. Whoever was killed goes on by `--resume`, or begins anew where there is no run yet,
and is killed again up to five times a run. Then SHA-256 must be equal of metrics.jsonl, of every file of the last checkpoint but its
manifest (weights, optimisers, averages, games, the trainer), of the segments of the replay memory that it needs, and of the weights in
milestones/. A process that ends before its kill counts as no kill.

The figures go to benchmarks/results/exact.json and the table to docs/exact.md; with `--trainers` the rows of others are kept. Exit code 1
where anything differs: the line says what, and the folder with both runs is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lab import checkpoint, distributed
from lab.checkpoint import DamagedCheckpoint
from lab.config import UserError
from lab.launch import FAILED, guarded
from lab.recorder import console
from lab.runs import Run
from lab.trainer import DONE

ROOT = Path(__file__).resolve().parent.parent
KILLS_A_RUN = 5
LONGEST = 300.0
"""Seconds after which a process hangs for sure."""
PACKAGES = ("dreamplay", "torch", "ale-py", "stable-baselines3")
MOMENTS = ("starting", "training", "saving", "testing")


@dataclass(frozen=True)
class Options:
    """How much to kill."""

    kills: int = 20
    """Kills of each trainer at least."""
    minutes: float = 0.0
    """Take a sample instead: one kill a run, every trainer once, then more in turns until so much time is over."""
    trainers: tuple[str, ...] = ()
    """Which trainers; all by default."""
    seed: int = 0
    """Of the instants."""
    workers: int = 2
    """Runs at a time, a thread each."""
    out: Path = ROOT / "benchmarks" / "results" / "exact.json"
    """Where the figures go."""
    table: Path = ROOT / "docs" / "exact.md"
    """Where the table goes."""


# Trainers


@dataclass(frozen=True)
class Recipe:
    """A script, and settings that make it quick but leave nothing out."""

    script: str
    about: str
    settings: str
    """`key=value`, several values with commas; what stands further right wins."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Options that name the uninterrupted run of another trainer."""

    @property
    def options(self) -> dict[str, list[str]]:
        """Every option and its values."""
        return {key: value.split(",") for key, _, value in (word.partition("=") for word in self.settings.split())}

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return int(self.options["trainer.steps"][0])


EVERY = "trainer.threads=1 tracking.mode=disabled trainer.log-every=3 trainer.milestones=4 "
IMAGES = EVERY + "data.name=digits data.batch-size=8 data.augment.shift=1 trainer.steps=160 trainer.save-every=8 trainer.preview-every=61 "
HEAVY = IMAGES + "trainer.steps=64 trainer.save-every=4 trainer.preview-every=25 "
TOKENS = IMAGES + "data.augment.shift=0 model.width=16 model.layers=1 "
GAMES = EVERY + "test.games=2 test.video-every=0 trainer.save-every=4 "
CATCH = GAMES + "game.name=catch game.stack=2 trainer.steps=96 trainer.preview-every=46 "
PONG = GAMES + "game.name=pong game.max-frames=200 game.threads=1 game.sticky=0.25 trainer.steps=48 trainer.preview-every=22 "
ROSTER = {
    "autoencoder": Recipe(
        "train_autoencoder.py",
        "denoising, perceptrons",
        IMAGES + "model.network.hidden=24 model.latent=4 model.corruption=mask",
    ),
    "vae": Recipe("train_vae.py", "perceptrons", IMAGES + "model.network.hidden=24 model.latent=4"),
    "vqvae": Recipe(
        "train_vqvae.py",
        "16 codes, which begin anew where nobody chooses them",
        IMAGES + "model.channels=8 model.codes=16 model.dimensions=4 model.restart-after=5",
    ),
    "gpt": Recipe("train_tokens.py", "GPT with dropout", TOKENS + "model.dropout=0.1", {"vqvae": "vqvae"}),
    "masked": Recipe(
        "train_tokens.py",
        "masked tokens, filled in in 3 rounds",
        TOKENS + "model.kind=masked model.steps=3",
        {"vqvae": "vqvae"},
    ),
    "gan": Recipe("train_gan.py", "hinge, two updates of the critic", IMAGES + "model.channels=8 model.latent=8 model.critic-steps=2"),
    "superresolution": Recipe(
        "train_superresolution.py",
        "4x, with a critic and a classifier's features",
        HEAVY + "model.channels=8 model.blocks=1 model.critic=small",
        {"model.features": "classifier"},
    ),
    "realnvp": Recipe("train_flow.py", "RealNVP", IMAGES + "model.kind=realnvp model.levels=1 model.steps=2 model.hidden=8"),
    "glow": Recipe("train_flow.py", "Glow", IMAGES + "model.kind=glow model.levels=1 model.steps=2 model.hidden=8"),
    "diffusion": Recipe(
        "train_diffusion.py",
        "flow matching, U-Net",
        IMAGES + "model.network.widths=8,16 model.network.heads=2 model.steps=4",
    ),
    "distillation": Recipe("train_distillation.py", "2 steps for 4 of `diffusion`", HEAVY + "model.steps=2", {"teacher": "diffusion"}),
    "classifier": Recipe("train_classifier.py", "backbone `small`", IMAGES + "model.backbone=small"),
    "dqn_catch": Recipe(
        "train_dqn.py",
        "Catch, prioritised replay that wraps around, videos",
        CATCH + "test.video-every=1 test.video-steps=20 dqn.backbone=small dqn.hidden=16 dqn.batch-size=16 dqn.learning-starts=160"
        " dqn.target-every=320 replay.capacity=480 replay.prioritised=true exploration.steps=3000",
    ),
    "rainbow_catch": Recipe(
        "train_dqn.py",
        "Rainbow, Catch: noisy layers, a categorical distribution, priorities",
        CATCH + "dqn.backbone=small dqn.hidden=16 dqn.batch-size=16 dqn.learning-starts=160 dqn.target-every=320 dqn.values=categorical"
        " dqn.atoms=11 dqn.noisy=true replay.capacity=480 replay.prioritised=true",
    ),
    "dqn_pong": Recipe(
        "train_dqn.py",
        "Pong with sticky actions, Nature CNN",
        PONG + "dqn.hidden=16 dqn.games=2 dqn.train-every=8 dqn.batch-size=4 dqn.learning-starts=40 dqn.target-every=40"
        " replay.capacity=200 exploration.steps=400",
    ),
    "pqn_catch": Recipe(
        "train_pqn.py",
        "Catch",
        CATCH + "pqn.backbone=small pqn.hidden=16 pqn.games=4 pqn.n-steps=8 pqn.batch-size=16 exploration.steps=2000",
    ),
    "pqn_pong": Recipe(
        "train_pqn.py",
        "Pong with sticky actions, the next round played while one is learnt from",
        PONG + "pqn.hidden=16 pqn.games=2 pqn.n-steps=8 pqn.batch-size=8 pqn.epochs=1 pqn.overlap=true exploration.steps=400",
    ),
    "ppo_catch": Recipe(
        "train_sb3.py", "PPO of SB3, Catch", CATCH + "backbone=small ppo.games=4 ppo.n-steps=8 ppo.batch-size=16 ppo.epochs=2"
    ),
    "ppo_pong": Recipe(
        "train_sb3.py",
        "PPO of SB3, Pong with sticky actions",
        PONG + "ppo.games=2 ppo.n-steps=8 ppo.batch-size=8 ppo.epochs=1",
    ),
    "sb3_dqn_catch": Recipe(
        "train_sb3.py",
        "DQN of SB3, Catch",
        CATCH + "algorithm=dqn backbone=small dqn.actions-per-step=16 dqn.batch-size=16 dqn.learning-starts=160"
        " dqn.target-every=320 replay.capacity=480",
    ),
}
"""Every trainer there is; whose run another one needs stands anywhere."""


# Files


def fingerprint(run: Run) -> dict[str, str]:
    """SHA-256 of all that must not hang on kills, by the path in the run folder.

    Raises:
        DamagedCheckpoint: the last checkpoint is not whole.
    """
    newest = checkpoint.folders(run.checkpoints)[0]
    segments = [path for part in checkpoint.load(newest).segments.values() for _, path in part]
    files = [run.metrics, *newest.iterdir(), *segments, *run.milestones.glob("*/*")]
    chosen = {path.relative_to(run.folder).as_posix(): path for path in files if path.name != "manifest.json"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(chosen.items())}


def first_difference(run: Run, whole: Mapping[str, str]) -> str:
    """The first file that is not that of the uninterrupted run; empty where all are."""
    try:
        found = fingerprint(run)
    except (DamagedCheckpoint, LookupError) as error:
        return str(error) or "checkpoints"
    return next((name for name in sorted(found.keys() | whole.keys()) if found.get(name) != whole.get(name)), "")


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def unfinished(run: Run) -> set[Path]:
    """What a save has begun and not yet put in its place."""
    return {*run.checkpoints.glob(".step_*"), *run.checkpoints.glob("segments/.*")}


# Processes


@contextlib.contextmanager
def started(words: Sequence[str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A training process in a folder, as a user starts it; it does not outlive the block."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / words[0]), *words[1:]]
    with log.open("ab") as output, subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Watch a process until the condition holds or it has ended.

    Raises:
        TimeoutExpired: neither comes.
    """
    end = time.monotonic() + LONGEST
    while process.poll() is None and not condition():
        linger(process, 0.001)
        if time.monotonic() > end:
            raise subprocess.TimeoutExpired(process.args, LONGEST)


def linger(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Let a process run for a while."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


# Runs


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted."""

    run: Run
    files: Mapping[str, str]
    marks: Sequence[int]
    """Length of metrics.jsonl after each row, bytes."""
    gaps: Sequence[float]
    """Seconds that each row took; the first one with the start of the process."""
    tests: frozenset[int]
    """The rows that hold the scores or pictures of a test."""


def command(name: str, folder: str) -> list[str]:
    """The words that begin a run; those whose runs are needed lie beside it."""
    recipe = ROSTER[name]
    options = recipe.options | {key: [other] for key, other in recipe.needs.items()}
    return [recipe.script, "--run-dir", folder, *(word for key, values in options.items() for word in (f"--{key}", *values))]


def uninterrupted(name: str, place: Path) -> Whole:
    """Train a trainer from its first step to its last.

    Raises:
        UserError: it fails.
    """
    run, log, began = Run(place / name), place / f"{name}.txt", time.time()
    with started(command(name, name), place, log) as process:
        if code := process.wait(LONGEST):
            raise UserError(f"{name} ended with exit code {code} though nothing interrupted it:\n{log.read_text()}")
    rows = run.rows()
    times = [began, *(json.loads(line)["time"] for line in run.timing.read_text().splitlines())]
    marks = list(itertools.accumulate(len(line) for line in run.metrics.read_bytes().splitlines(keepends=True)))
    tests = {index for index, row in enumerate(rows) if any(key.startswith(("eval/", "media/")) for key in row)}
    return Whole(run, fingerprint(run), marks, [after - before for before, after in itertools.pairwise(times)], frozenset(tests))


@dataclass
class Outcome:
    """A run that was killed, resumed and compared."""

    name: str
    kills: list[str] = field(default_factory=list)
    """When each came."""
    inside_saves: int = 0
    problem: str = ""
    """The first file that differs, or what else went wrong; empty if all is the same."""


def interrupted(name: str, place: Path, whole: Whole, moments: Sequence[str], number: int, seed: int) -> Outcome:
    """A run that is killed at some moments, as far as it lasts so long, resumed and compared; its folder is kept if it differs."""
    run, log = Run(place / f"{name}_{number}"), place / f"{name}_{number}.txt"
    dice, outcome = random.Random(f"{seed}/{name}/{number}"), Outcome(name)
    for left in range(len(moments), -1, -1):
        words = [ROSTER[name].script, "--resume", run.folder.name] if run.config.exists() else command(name, run.folder.name)
        before = unfinished(run)
        with started(words, place, log) as process:
            if left:
                kill_at(moments[-left], process, run, whole, left, dice)
            code = process.wait(LONGEST)
        if code != -signal.SIGKILL:
            break
        outcome.inside_saves += bool(unfinished(run) - before)
        outcome.kills.append(f"{moments[-left]}, {len(run.rows())} rows")
    outcome.problem = f"exit code {code}: {log}" if code else first_difference(run, whole.files)
    if not outcome.problem:
        shutil.rmtree(run.folder)
        log.unlink()
    return outcome


def kill_at(moment: str, process: subprocess.Popen[bytes], run: Run, whole: Whole, left: int, dice: random.Random) -> None:
    """Kill a process at an instant that chance draws, so early that `left` kills have room in what the run still has to do."""
    done, begun = size(run.metrics), unfinished(run)
    ahead = [row for row, mark in enumerate(whole.marks[:-1]) if mark > done]
    before_tests = [row for row in ahead if row + 1 in whole.tests][:1]
    rows = before_tests if moment == "testing" and before_tests else ahead[: -(-len(ahead) // left)]
    if moment == "starting" or not rows:
        end = time.monotonic() + dice.uniform(0, whole.gaps[0])
        wait_until(lambda: time.monotonic() > end or size(run.metrics) != done, process)  # at the latest when it has started
    else:
        row = dice.choice(rows)
        wait_until(lambda: size(run.metrics) >= whole.marks[row], process)
        if moment == "saving":
            wait_until(lambda: bool(unfinished(run) - begun), process)
        linger(process, dice.uniform(0, 0.005 if moment == "saving" else whole.gaps[row + 1]))
    process.kill()


# All of them


def main() -> int:
    """Run every trainer whole, then kill and compare until there were kills enough or the time is over."""
    options = tyro.cli(Options, description=__doc__)
    if unknown := [name for name in options.trainers if name not in ROSTER]:
        raise UserError(f"--trainers {unknown[0]}: there are {', '.join(ROSTER)}")
    place = Path(tempfile.mkdtemp(prefix="exact-"))
    outcomes = Proof(options, place).outcomes()
    if not options.minutes:
        write(options, outcomes)
    failed = [outcome for outcome in outcomes if outcome.problem]
    kills, exact = sum(len(outcome.kills) for outcome in outcomes), len(outcomes) - len(failed)
    console.print(
        f"{kills} kills; {exact} of {len(outcomes)} runs exact" + (f"; the runs are in {place}" if failed else ""), soft_wrap=True
    )
    if not failed:
        shutil.rmtree(place)
    return FAILED if failed else DONE


class Proof:
    """Some trainers, killed in turns."""

    def __init__(self, options: Options, place: Path) -> None:
        self.options, self.place, self.began = options, place, time.monotonic()
        self.names = [name for name in ROSTER if name in (options.trainers or ROSTER)]
        self.done: list[Outcome] = []
        self.wholes: dict[str, Future[Whole]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} kills"), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("exact", total=None if options.minutes else options.kills * len(self.names))

    def outcomes(self) -> list[Outcome]:
        """Run, kill and compare."""
        needed = (other for name in self.names for other in ROSTER[name].needs.values())
        with self.bar, ThreadPoolExecutor(self.options.workers) as pool:
            try:
                for name in dict.fromkeys([*needed, *self.names]):  # in this order, so that nobody waits for one that has not begun
                    self.wholes[name] = pool.submit(self.whole, name)
                for number in itertools.count():
                    due = [name for name in self.names if self.wanting(name)]
                    if not due or (number and self.over):
                        return self.done
                    for job in [pool.submit(self.once, name, number) for name in due]:
                        job.result()
            finally:
                pool.shutdown(cancel_futures=True)
        raise AssertionError("counting does not end")

    def whole(self, name: str) -> Whole:
        """The uninterrupted run of a trainer, after those of whose runs it needs."""
        for other in ROSTER[name].needs.values():
            self.wholes[other].result()
        return uninterrupted(name, self.place)

    def once(self, name: str, number: int) -> None:
        """One more run of a trainer that is killed, unless the time is over."""
        if number and self.over:
            return
        kills = 1 if self.options.minutes else min(self.options.kills, KILLS_A_RUN)
        first = self.names.index(name) + number * kills  # another one for each trainer, so that a sample has all
        moments = [MOMENTS[kill % len(MOMENTS)] for kill in range(first, first + kills)]
        outcome = interrupted(name, self.place, self.wholes[name].result(), moments, number, self.options.seed)
        self.done.append(outcome)
        self.bar.update(self.task, advance=len(outcome.kills))
        console.print(line(outcome), highlight=False, soft_wrap=True, markup=False)

    @property
    def over(self) -> bool:
        """Whether the time of a sample is over."""
        return bool(self.options.minutes) and time.monotonic() - self.began > 60 * self.options.minutes

    def wanting(self, name: str) -> bool:
        """Whether a trainer has not been killed often enough; one that has failed has."""
        mine = [outcome for outcome in self.done if outcome.name == name]
        return not any(outcome.problem for outcome in mine) and sum(len(outcome.kills) for outcome in mine) < self.options.kills


# Telling


def line(outcome: Outcome) -> str:
    """An outcome in a line."""
    killed = f"{len(outcome.kills)} kills ({'; '.join(outcome.kills)})"
    return f"{outcome.name}: {killed}: " + (f"DIFFERENT: {outcome.problem}" if outcome.problem else "exact")


def write(options: Options, outcomes: Sequence[Outcome]) -> None:
    """Put the figures of each trainer in place of those it had, and write the table of all anew."""
    old = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    rows = {row["name"]: row for row in old} | {name: summed(name, outcomes) for name in {outcome.name for outcome in outcomes}}
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), **distributed.environment()}
    about |= {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, "seed": options.seed}
    report = {**about, "rows": [rows[name] for name in ROSTER if name in rows]}
    for path, text in {options.out: json.dumps(report, indent=1) + "\n", options.table: page(report)}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def summed(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of one trainer."""
    mine, recipe = [outcome for outcome in outcomes if outcome.name == name], ROSTER[name]
    return {
        "name": name,
        "script": recipe.script,
        "about": recipe.about,
        "settings": recipe.settings,
        "steps": recipe.steps,
        "kills": [kill for outcome in mine for kill in outcome.kills],
        "inside_saves": sum(outcome.inside_saves for outcome in mine),
        "restarts": sum(len(outcome.kills) for outcome in mine),
        "runs": len(mine),
        "problems": [outcome.problem for outcome in mine if outcome.problem],
    }


def page(report: Mapping[str, Any]) -> str:
    """The text of docs/exact.md."""
    rule = [":---" if title in LEFT else "---:" for title in COLUMNS]
    cells = [[str(write(row)) for write in COLUMNS.values()] for row in report["rows"]]
    place = f"{report['cores']} cores ({report['machine']}, {report['cpu']})" + (f", {report['gpu']}" if report["gpu"] else "")
    return PAGE.format(
        table="\n".join("| " + " | ".join(words) + " |" for words in [list(COLUMNS), rule, *cells]),
        kills=sum(len(row["kills"]) for row in report["rows"]),
        place=place,
        versions=", ".join(f"{name} {report[name]}" for name in ("python", *PACKAGES)),
    )


LEFT = ("trainer", "script", "what runs", "exact")
COLUMNS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "trainer": lambda row: f"`{row['name']}`",
    "script": lambda row: f"`{row['script']}`",
    "what runs": lambda row: row["about"],
    "steps": lambda row: row["steps"],
    "kills": lambda row: len(row["kills"]),
    "inside saves": lambda row: row["inside_saves"],
    "restarts": lambda row: row["restarts"],
    "runs compared": lambda row: row["runs"],
    "exact": lambda row: f"**no**: {row['problems'][0]}" if row["problems"] else "yes",
}

PAGE = """\
# Killed anywhere, resumed exactly

`make exact` (`python benchmarks/exact.py`) trains every trainer once without interruption, then again with SIGKILL at random instants:
while the process starts, in training, inside a save, before the row of a test. Each killed run is resumed (and killed again, up to five
times) until it is done. It is exact if these files are byte for byte those of the uninterrupted run: `metrics.jsonl`, every file of the
last checkpoint but its manifest (weights, optimisers, averages, games, the trainer's counters), the segments of the replay memory that it
needs, and the weights in `milestones/`.

{kills} kills, on {place}, a thread each; {versions}.

{table}

A kill counts as inside a save where it left an unfinished checkpoint or segment behind. What each trainer is set to stands in
`benchmarks/exact.py`, when each kill came in `benchmarks/results/exact.json`.

## The state of Atari games

The emulators of ale-py's vector environment cannot be copied, so a game is put back by its seed and the actions since then
(`envs/atari.py`): exact if the emulator repeats itself. `pytest -m slow tests/envs/test_atari.py` plays some hundred random actions in
each of the games that `envs.games.roms()` lists, a quarter of them sticky, puts it back in a fresh emulator and goes on in both:
observations, rewards, ends and lives are the same, byte for byte, in every game: none is an exception.
"""


if __name__ == "__main__":
    sys.exit(guarded(main))
