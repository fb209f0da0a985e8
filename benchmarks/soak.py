"""What long and many runs leave behind, and how fast they stop when they are told to.

    python benchmarks/soak.py                                    everything, about an hour and a half on 2 cores; needs MNIST
    python benchmarks/soak.py --parts runs --runs 12
    python benchmarks/soak.py --parts long --minutes 5
    python benchmarks/soak.py --parts stops --presets classifier/mnist rl/ppo_pong --stops 4

runs   short runs in one process, one kind of training after another, each sampled from or judged or played afterwards; when every
       kind has run twice, nothing may grow: open files, threads and child processes not at all, memory at most by a budget
long   one run of the DQN on Pong with tests, films, saves and W&B offline, looked at from outside once a second; its replay memory is
       small, so that it is full and goes round after minutes
stops  SIGTERM to runs of real presets, while they train, save, draw or test, and film: the exit code must be 75, within 5 seconds
       (99 of 100). Pauses are shortened so that each of these comes soon, nothing else. Beside the seconds stands the time of the
       processor from the signal to the end, which a busy machine does not change. A run that came to its own end first is told, not
       counted, and begun anew.

Exits with 1 where a budget was passed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.table import Table

from generative import model as generative
from generative.model import spread_labels
from lab import checkpoint, classifier, distributed
from lab.checkpoint import DamagedCheckpoint
from lab.config import read_yaml
from lab.launch import launch
from lab.recorder import console
from lab.runs import Run
from lab.trainer import DONE, STOPPED
from rl import agent
from rl.evaluate import play_games

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = generative.FAMILIES | classifier.FAMILIES | agent.FAMILIES

GROWTH, DRIFT = 1.0, 1.0
"""Budgets: megabytes that a short run may leave behind; megabytes a minute of the long one."""
SECONDS = 5.0
"""Budget: from a SIGTERM to the end, 99 of 100 times."""


@dataclass(frozen=True)
class Options:
    """What to try, and for how long."""

    parts: tuple[Literal["runs", "long", "stops"], ...] = ("runs", "long", "stops")
    """Which trials."""
    runs: int = 50
    """Short runs."""
    minutes: float = 30.0
    """Length of the long run."""
    stops: int = 16
    """SIGTERMs to each preset."""
    presets: tuple[str, ...] = (
        "generative/vae_mnist",
        "generative/diffusion_mnist",
        "generative/gan_mnist",
        "classifier/mnist",
        "rl/dqn_pong",
        "rl/ppo_pong",
        "rl/sb3_dqn_pong",
    )
    """Presets below configs/ that are stopped."""
    threads: int = 0
    """CPU threads of each run; 0: all cores."""
    seed: int = 0
    """Of the moments at which signals are sent."""
    out: Path = Path("benchmarks/results/soak.json")
    """Where the figures go; of what is not tried the old ones are kept."""


def main() -> int:
    """Try everything that was asked for, print a table of each, write the report; 1 where a budget was passed."""
    options = tyro.cli(Options, description=__doc__)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    report |= {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), **distributed.environment()}
    kept = True
    for part in options.parts:
        with tempfile.TemporaryDirectory(prefix="soak") as folder:
            report[part] = {"runs": many_runs, "long": long_run, "stops": many_stops}[part](options, Path(folder))
        kept &= report[part]["kept"]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if kept else 1


# What a process holds


@dataclass(frozen=True)
class Held:
    """What a process holds of the system."""

    files: int
    """Open files, sockets and pipes."""
    threads: int
    children: int
    """Child processes, and theirs."""
    megabytes: float
    """Resident memory, its own."""


def held(pid: int) -> Held | None:
    """What a process holds now, as Linux tells it; None where it has ended."""
    place = Path("/proc") / str(pid)
    try:
        pages = int((place / "statm").read_text().split()[1])
        threads = list((place / "task").iterdir())
        children = len(descendants(pid))
        return Held(len(list((place / "fd").iterdir())), len(threads), children, pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    except OSError:
        return None


def descendants(pid: int) -> list[int]:
    """The processes below a process."""
    found: list[int] = []
    for task in (Path("/proc") / str(pid) / "task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


@dataclass(frozen=True)
class Slope:
    """A straight line through some points: how much it rises for one step to the right, and the 95 % interval of that."""

    value: float
    low: float
    high: float


def slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Least squares."""
    places, heights = np.asarray(x, float), np.asarray(y, float)
    centred = places - places.mean()
    spread = float((centred**2).sum())
    value = float((centred * heights).sum() / spread)
    rest = heights - heights.mean() - value * centred
    error = math.sqrt(float((rest**2).sum()) / (len(places) - 2) / spread)
    return Slope(value, value - 2 * error, value + 2 * error)


# Many short runs

DIGITS = {"data.name": "digits", "data.batch-size": "16", "trainer.steps": "20"}
CATCH = {"game.name": "catch", "game.stack": "2", "test.games": "2", "test.video-steps": "10"}
PACE = {"trainer.log-every": "5", "trainer.preview-every": "20", "trainer.save-every": "10", "trainer.milestones": "2"}
KINDS_OF_RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "vae": ("vae", DIGITS | {"model.network.hidden": "32"}),
    "gan": ("gan", DIGITS | {"model.channels": "8"}),
    "classifier": ("classifier", DIGITS | {"data.image-size": "8", "model.backbone": "small"}),
    "dqn": ("dqn", CATCH | {"trainer.steps": "20", "dqn.backbone": "small", "dqn.learning-starts": "160", "replay.capacity": "4000"}),
    "ppo": ("sb3", CATCH | {"trainer.steps": "4", "backbone": "small", "ppo.n-steps": "16", "ppo.batch-size": "32"}),
    "diffusion": ("diffusion", DIGITS | {"model.network.widths": "[8, 16]", "model.steps": "5"}),
}
"""What is trained: the experiment, and settings that make it short."""
RECORDED = 5
"""One of so many runs is recorded with W&B, offline; of every kind one, in time."""


def many_runs(options: Options, folder: Path) -> dict[str, Any]:
    """Train and use one thing after another in this process; every kind twice before anything is compared."""
    names = list(KINDS_OF_RUNS)
    order = [names[number % len(names)] for number in range(options.runs)]
    warm = min(2 * len(names), options.runs // 2)
    states = []
    for number, name in enumerate(order):
        one_run(name, folder / f"{number:03d}", number, options.threads)
        gc.collect()
        state = held(os.getpid())
        assert state
        states.append(state)
        console.print(f"run {number + 1} of {len(order)}, {name}: {told(state)}", highlight=False)
    result = judged(states, warm)
    console.print(f"after the first {warm} runs: {json.dumps(result['grown'])}, {shown(result['slope'], 'MB a run')}", highlight=False)
    return {**result, "order": order, "states": [asdict(state) for state in states]}


def told(state: Held) -> str:
    """What a process holds, in words."""
    return f"{state.files} files, {state.threads} threads, {state.children} children, {state.megabytes:.0f} MB"


def shown(line: Mapping[str, float], unit: str) -> str:
    """A slope, in words."""
    return f"{line['value']:+.3f} {unit} (95 % from {line['low']:+.3f} to {line['high']:+.3f})"


def judged(states: Sequence[Held], warm: int) -> dict[str, Any]:
    """What has grown from the end of the warm-up to the last run, and whether that is within the budgets."""
    before, after = states[warm - 1], states[-1]
    grown = {name: getattr(after, name) - getattr(before, name) for name in ("files", "threads", "children")}
    line = slope(range(len(states) - warm), [state.megabytes for state in states[warm:]])
    kept = all(number <= 0 for number in grown.values()) and line.value <= GROWTH
    return {"kept": kept, "grown": grown, "slope": asdict(line), "budget": GROWTH, "warm": warm}


def one_run(name: str, folder: Path, number: int, threads: int) -> None:
    """Train something with a seed of its own, then load it and use it; some are recorded with W&B too."""
    experiment, options = KINDS_OF_RUNS[name]
    mode = "offline" if number % RECORDED == 0 else "disabled"
    given = PACE | options | {"trainer.seed": str(number), "trainer.threads": str(threads), "tracking.mode": mode}
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    with contextlib.redirect_stdout(io.StringIO()):
        status = launch(importlib.import_module(FAMILIES[experiment]).EXPERIMENT, "", [*words, "--run-dir", str(folder)])
    if status:
        raise RuntimeError(f"run {number} ({name}) ended with {status}; see {folder}")
    use(experiment, folder)
    shutil.rmtree(folder)


def use(experiment: str, folder: Path) -> None:
    """Open a run as the scripts do: sample, judge or play."""
    if experiment in agent.FAMILIES:
        loaded = agent.load(str(folder))
        play_games(loaded.agent, loaded.experiment.game, 2, policy="greedy", epsilon=0.0, seed=0)
    elif experiment in classifier.FAMILIES:
        trained = classifier.load(str(folder))
        classifier.judge(trained.model, trained.experiment.dataset().test).scores()
    else:
        model = generative.load(str(folder)).model
        model.sample(8, spread_labels(8, model.classes), torch.Generator().manual_seed(0))


# One long run

LONG = {
    "trainer.log-every": "50",
    "trainer.preview-every": "300",
    "trainer.save-every": "300",
    "trainer.steps": "100000000",
    "dqn.learning-starts": "2000",
    "replay.capacity": "10000",
    "test.games": "2",
    "test.video-steps": "300",
    "tracking.mode": "offline",
}
"""What the long run does oftener than its preset, so that a leak shows sooner; a memory that is full after minutes has no part in it."""


def long_run(options: Options, folder: Path) -> dict[str, Any]:
    """Look at one run once a second for so many minutes, then stop it."""
    changes = LONG | {"trainer.threads": str(options.threads)}
    process = started("rl/dqn_pong", folder, changes, "--run-dir", str(folder / "run"))
    samples = sampled(process, 60 * options.minutes)
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    run = Run(folder / "run")
    result = settled(samples) | {"status": status, "minutes": options.minutes}
    result["kept"] &= status == STOPPED
    last = run.last_values()
    result |= {"actions": last.get("actions"), "films": len(list(run.media.glob("*.mp4"))), "rows": len(run.rows())}
    console.print(f"long run: {json.dumps(result['grown'])}, {shown(result['slope'], 'MB a minute')}", highlight=False)
    thin = samples[:: max(1, len(samples) // 200)]
    return result | {"states": [{"second": at - samples[0][0], **asdict(state)} for at, state in thin]}


def started(preset: str, folder: Path, changes: Mapping[str, str], *extra: str) -> subprocess.Popen[bytes]:
    """A training of a preset, as a user starts it; what it prints goes to output.txt."""
    config = ROOT / f"configs/{preset}.yaml"
    script = ROOT / "scripts" / f"train_{read_yaml(config)[1]}.py"
    first = [] if "--resume" in extra else [str(config)]
    words = [word for key, value in changes.items() for word in (f"--{key}", value)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen([sys.executable, str(script), *first, *extra, *words], stdout=output, stderr=subprocess.STDOUT)


def sampled(process: subprocess.Popen[bytes], seconds: float) -> list[tuple[float, Held]]:
    """What a process holds, once a second, and when."""
    found: list[tuple[float, Held]] = []
    end = time.time() + seconds
    while time.time() < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise RuntimeError(f"the long run ended by itself, with {process.wait(timeout=1)}")
        if state := held(process.pid):
            found.append((time.time(), state))
    return found


def settled(samples: Sequence[tuple[float, Held]]) -> dict[str, Any]:
    """What has grown in the second half of the time; what a run needs at all comes in the first.

    Saves, films and W&B come and go with files and processes of their own, so that the least of each quarter is compared.
    Memory is taken as the mean of each of twenty stretches, which are nearly independent.
    """
    quarters = np.array_split(np.arange(len(samples)), 4)
    minutes, resident = np.array([[at / 60, state.megabytes] for at, state in samples]).T
    least = {name: [min(getattr(samples[i][1], name) for i in part) for part in quarters] for name in ("files", "threads", "children")}
    grown = {name: values[3] - values[1] for name, values in least.items()}
    stretches = np.array_split(np.concatenate(quarters[2:]), 20)
    line = slope([minutes[part].mean() for part in stretches], [resident[part].mean() for part in stretches])
    kept = all(number <= 0 for number in grown.values()) and line.value <= DRIFT
    return {"kept": bool(kept), "grown": grown, "least": least, "slope": asdict(line), "budget": DRIFT, "peak": float(resident.max())}


# Stops

OFTEN = {"trainer.log-every": "1", "tracking.mode": "offline"}
LATER = "1000000"
PHASES: dict[str, dict[str, str]] = {
    "train": {"trainer.preview-every": LATER, "trainer.save-every": LATER},
    "save": {"trainer.preview-every": LATER, "trainer.save-every": "1"},
    "test": {"trainer.preview-every": "2", "trainer.save-every": LATER},
    "film": {"trainer.preview-every": "2", "trainer.save-every": LATER, "test.games": "1", "test.video-every": "1"},
}
"""What comes often enough to be hit; agents only are filmed, and `test` means previews too."""
AGENTS = {"rl/dqn_pong": {"dqn.learning-starts": "320"}, "rl/sb3_dqn_pong": {"dqn.learning-starts": "256"}}
"""They learn from the beginning: updates are what is to be interrupted."""


def many_stops(options: Options, folder: Path) -> dict[str, Any]:
    """Send SIGTERM to every preset, in every phase in turn."""
    chance, stops = random.Random(options.seed), []
    for preset in options.presets:
        phases = [phase for phase in PHASES if phase != "film" or preset.startswith("rl/")]
        for number in range(options.stops):
            phase = phases[number % len(phases)]
            place = folder / preset.replace("/", "_") / phase
            stops.append(one_stop(preset, phase, place, chance, options.threads))
            console.print(json.dumps(stops[-1]), highlight=False, soft_wrap=True)
    return summed_up(stops)


def summed_up(stops: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all stops, in words and for the report, but for those that came too late for their run."""
    met = [stop for stop in stops if stop["status"] != DONE]
    late = float(np.quantile([stop["seconds"] for stop in met], 0.99)) if met else 0.0
    kept = bool(met) and late <= SECONDS and all(stop["status"] == STOPPED for stop in met)
    console.print(table(met))
    console.print(f"{len(met)} stops, 99 of 100 within {late:.2f} s; {len(stops) - len(met)} runs had come to their own end before")
    return {"kept": kept, "p99": late, "budget": SECONDS, "over": len(stops) - len(met), "stops": stops}


def one_stop(preset: str, phase: str, place: Path, chance: random.Random, threads: int) -> dict[str, Any]:
    """Begin a run or go on with it, wait until it is in the phase, send SIGTERM and see how it ends.

    In which phase the signal really came is told by what there was at that moment, and by what was saved.
    """
    run = Run(place / "run")
    again = ("--resume" if run.checkpoints.exists() else "--run-dir", str(run.folder))
    if again[0] == "--run-dir":
        shutil.rmtree(run.folder, ignore_errors=True)
    learning = AGENTS.get(preset, {})
    changes = OFTEN | PHASES[phase] | learning | {"trainer.threads": str(threads)}
    begun = len(run.rows()) if run.config.exists() else 0
    process = started(preset, place, changes, *again)
    reached = waited(process, lambda: listens(process.pid) and ready(phase, run, begun))
    if phase in ("train", "test"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.uniform(0.0, 3.0))
    told = {"preset": preset, "meant": phase, "reached": reached}
    if process.poll() is not None:
        result = {"phase": "over", "status": process.returncode, "seconds": 0.0, "work": 0.0}
    else:
        result = stopped(process, run)
    if result["status"] == DONE:
        shutil.rmtree(run.folder, ignore_errors=True)
    return told | result


def stopped(process: subprocess.Popen[bytes], run: Run) -> dict[str, Any]:
    """Send SIGTERM to a run: where it was, how it ended, and when."""
    saving, filming = any(run.checkpoints.glob(".step_*")), any(run.media.glob(".play_*"))
    work, began = spent(process.pid), time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(process.pid, 0)
    seconds, work = time.perf_counter() - began, usage.ru_utime + usage.ru_stime - work
    code = process.returncode = os.waitstatus_to_exitcode(status)
    met = "over" if code == DONE else "save" if saving else "film" if filming else "test" if unfinished(run) else "train"
    return {"phase": met, "status": code, "seconds": seconds, "work": work}


def waited(process: subprocess.Popen[bytes], condition: Callable[[], bool], seconds: float = 300.0) -> bool:
    """Whether a condition came to hold before the process ended or the time was up."""
    end = time.monotonic() + seconds
    while not condition():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.002)
            return False
        if time.monotonic() > end:
            return False
    return True


def ready(phase: str, run: Run, begun: int) -> bool:
    """Whether a run is where the phase begins."""
    if phase == "save":
        return any(run.checkpoints.glob(".step_*"))
    if phase == "film":
        return any(run.media.glob(".play_*"))
    rows = run.rows()
    return len(rows) > begun or (phase == "test" and unfinished(run))


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, as it has while it trains."""
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def spent(pid: int) -> float:
    """Seconds of the processor that a process has used."""
    fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def unfinished(run: Run) -> bool:
    """Whether the newest checkpoint was saved in the middle of a test or preview."""
    for folder in checkpoint.folders(run.checkpoints)[:1]:
        with contextlib.suppress(DamagedCheckpoint, OSError):
            return "unfinished" in checkpoint.load(folder, only=["trainer"]).parts["trainer"]
    return False


def table(stops: Sequence[Mapping[str, Any]]) -> Table:
    """How long it took, by phase and by preset."""
    shown = Table("", "stops", "median", "9 of 10", "most", "of the processor, most", "exit 75", title="seconds from SIGTERM to the end")
    for key in ("phase", "preset"):
        for name in dict.fromkeys(stop[key] for stop in stops):
            group = [stop for stop in stops if stop[key] == name]
            seconds, work = [stop["seconds"] for stop in group], max(stop["work"] for stop in group)
            figures = (statistics.median(seconds), float(np.quantile(seconds, 0.9)), max(seconds), work)
            right = sum(stop["status"] == STOPPED for stop in group)
            shown.add_row(name, str(len(group)), *(f"{figure:.2f}" for figure in figures), f"{right} of {len(group)}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
