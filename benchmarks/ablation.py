"""What each part of Rainbow is worth: a plain DQN, Rainbow, Rainbow without each part, and the plain DQN with each part alone.

    python benchmarks/ablation.py                          16 agents over three seeds on Catch, 20 to 30 seconds of one core each
    python benchmarks/ablation.py --only rainbow plain --seeds 0 1 2 3 4
    python benchmarks/ablation.py --game pong --actions 500000         hours
    python benchmarks/ablation.py --show                   print the tables as they stand

All agents have the settings of configs/rl/rainbow_<game>.yaml but for the parts that are switched off: the same network, optimiser, memory,
and number of actions per update. The score is the mean of 40 whole games at the end, as each agent is judged (greedy where its layers are
noisy, else with one action in twenty at random). Its mean over training seeds stands with a 95 % interval of that mean (Student's t).

Every run is a training script in a process of its own, with one thread, below runs/ablation/; what was stopped there is gone on with,
and what is done is not done again. Figures go to benchmarks/results/ablation.json, tables to docs/ablation.md.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from scipy import stats
from turns import ROOT, said

from lab import distributed, runs
from lab.config import UserError
from lab.launch import guarded
from lab.recorder import console
from lab.runs import Run

HOME = ROOT / runs.RUNS / "ablation"
ROUND = 32
"""Actions of a step of the trainer, in both presets."""
ACTIONS = {"catch": 20_480, "pong": 1_000_000}
SWITCHES = {
    "double": ("dqn.double", "true", "false"),
    "dueling": ("dqn.dueling", "true", "false"),
    "3 steps": ("dqn.n-step", "3", "1"),
    "prioritised": ("replay.prioritised", "true", "false"),
    "noisy": ("dqn.noisy", "true", "false"),
}
"""Parts that are on or off: the setting, and its two values."""
VALUES = ("categorical", "quantile")
"""Parts of which one is on at most: what is learnt of the return."""
RAINBOW = (*SWITCHES, "categorical")


def line_up() -> dict[str, tuple[str, ...]]:
    """Every agent and its parts."""
    less = {f"rainbow - {part}": tuple(other for other in RAINBOW if other != part) for part in RAINBOW}
    more = {f"plain + {part}": (part,) for part in (*RAINBOW, "quantile")}
    return {"plain": (), "rainbow": RAINBOW} | less | {"rainbow, quantile": (*SWITCHES, "quantile")} | more


AGENTS = line_up()
OPENING = """# What each part of Rainbow is worth

Made by `python benchmarks/ablation.py`, which says how. Scores are means over training seeds, with a 95 % interval of the mean where
there are three or more (Student's t; wide for three seeds)."""


@dataclass(frozen=True)
class Options:
    """What to train."""

    game: Literal["catch", "pong"] = "catch"
    """On which game."""
    actions: int = 0
    """Of each run, a multiple of 32; 0: 20,480 on Catch, a million on Pong."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds of each agent; all agents have the first one before any has the next."""
    only: tuple[str, ...] = tuple(AGENTS)
    """Which agents."""
    show: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only print the tables."""
    out: Path = ROOT / "benchmarks" / "results" / "ablation.json"
    """Where the figures go."""
    table: Path = ROOT / "docs" / "ablation.md"
    """Where the tables go."""


def main() -> int:
    """Train what is missing, and print the tables."""
    options = tyro.cli(Options, description=__doc__)
    if unknown := sorted(set(options.only) - set(AGENTS)):
        raise UserError(f"--only {', '.join(unknown)}: there are {', '.join(AGENTS)}")
    actions = options.actions or ACTIONS[options.game]
    if actions < ROUND or actions % ROUND:
        raise UserError(f"--actions {actions}: give a multiple of {ROUND}, the actions of a round")
    boards: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not options.show:
        fill(options, boards, actions)
    console.print(document(boards), highlight=False, soft_wrap=True)
    return 0


def fill(options: Options, boards: dict[str, Any], actions: int) -> None:
    """Train what is missing, saving after each run."""
    fresh = {"game": options.game, "actions": actions, "machine": distributed.environment(), "scores": {}}
    board = boards.setdefault(f"{options.game}, {actions:,} actions", fresh)
    for seed in options.seeds:
        for agent in options.only:
            known = board["scores"].setdefault(agent, {})
            if str(seed) not in known:
                known[str(seed)] = score(options.game, agent, seed, actions)
                console.print(f"{agent}, seed {seed}: {known[str(seed)]:.2f}", highlight=False)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(boards, indent=1) + "\n")
                options.table.write_text(document(boards) + "\n")


# One run


def settings(parts: Sequence[str]) -> dict[str, str]:
    """The settings that switch these parts on and all others off."""
    switched = {name: on if part in parts else off for part, (name, on, off) in SWITCHES.items()}
    return switched | {"dqn.values": next((part for part in VALUES if part in parts), "mean")}


def score(game: str, agent: str, seed: int, actions: int) -> float:
    """Train an agent, or go on where that was stopped; the mean score of its games at the end.

    Raises:
        UserError: it failed; what is on the board stays.
    """
    run = Run(HOME / game / f"{actions}" / agent.replace(" ", "_").replace(",", "") / f"seed_{seed}")
    steps = actions // ROUND
    given = settings(AGENTS[agent]) | {"trainer.seed": f"{seed}", "trainer.steps": f"{steps}", "trainer.threads": "1"}
    given |= {"trainer.preview-every": f"{steps}", "test.games": "40", "test.video-every": "0", "tracking.mode": "disabled"}
    words = [str(ROOT / "scripts" / "train_dqn.py")]
    if (run.folder / "config.yaml").exists():
        words += ["--resume", str(run.folder)]
    else:
        options = [word for name, value in given.items() for word in (f"--{name}", value)]
        words += [str(ROOT / "configs" / "rl" / f"rainbow_{game}.yaml"), "--run-dir", str(run.folder), *options]
    said(words)
    return float(run.rows()[-1]["eval/return"])


# The tables


def document(boards: Mapping[str, Any]) -> str:
    """All tables in Markdown."""
    return "\n\n".join([OPENING, *(table(name, board) for name, board in boards.items())])


def table(name: str, board: Mapping[str, Any]) -> str:
    """The agents of one game, the best one first."""
    found = {agent: [each[seed] for seed in sorted(each, key=int)] for agent, each in board["scores"].items() if each}
    lines = [f"## {name.capitalize()}", "", "| agent | score | seeds |", "| :--- | ---: | :--- |"]
    for agent, scores in sorted(found.items(), key=lambda pair: -statistics.fmean(pair[1])):
        lines.append(f"| {agent} | {shown(scores)} | {', '.join(f'{each:.2f}' for each in scores)} |")
    return "\n".join(lines)


def shown(scores: Sequence[float]) -> str:
    """The mean of the seeds, with its interval where there are enough."""
    middle = statistics.fmean(scores)
    if len(scores) < 3:
        return f"{middle:.2f}"
    reach = float(stats.t.ppf(0.975, len(scores) - 1)) * statistics.stdev(scores) / math.sqrt(len(scores))
    return f"{middle:.2f} ({middle - reach:.2f} to {middle + reach:.2f})"


if __name__ == "__main__":
    sys.exit(guarded(main))
