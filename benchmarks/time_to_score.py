"""How long learning takes until an agent plays well: our PQN beside stable-baselines3's PPO, one after the other on the same machine.

    python benchmarks/time_to_score.py                              Pong to a mean of 18, three seeds of ours: hours on 2 cores
    python benchmarks/time_to_score.py --game catch                 Catch to a mean of 9: a minute
    python benchmarks/time_to_score.py --only pqn --seeds 3 4       ours alone, with seeds of its own

    pqn    configs/rl/pqn_<game>.yaml through our trainer
    ppo    stable-baselines3's PPO: on Pong by itself, with the settings of its zoo and its own wrappers, a process for each of 8 games; on
           Catch, which is too small for its network, configs/rl/ppo_catch.yaml through our trainer and games, in which it is twice as fast

Every --every seconds of learning the agent plays 20 whole games under no rule of training (no clipped rewards, no ends at lost lives, no
sticky actions): ours takes the best action, PPO draws its actions. The clock runs from the making of games and network (what comes
before, Python's imports, takes some seconds more of both), and stands still in these games. A contestant ends when it has the score, at
the end of its preset, or after --cap minutes: then the board says that it did not arrive, and what it had reached. Figures are kept
after every run, and what is there is not run again.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from agents import read_preset, their_ppo_model, their_vec_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from turns import RESULTS, alone, keep

from lab import distributed
from lab.launch import guarded
from lab.recorder import console
from lab.trainer import Trainer
from rl.agent import Agent, Policy
from rl.evaluate import play_games
from rl.stable_baselines import ActorAgent
from rl.values import QAgent

CPU = torch.device("cpu")
GAMES = 20
WANTED = {"pong": 18.0, "catch": 9.0}
Contestant = Literal["pqn", "ppo"]


@dataclass(frozen=True)
class Options:
    """Who plays what, and for how long."""

    game: Literal["pong", "catch"] = "pong"
    """The game to learn."""
    only: tuple[Contestant, ...] = ("pqn", "ppo")
    """Which contestants."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds of ours."""
    peer_seeds: tuple[int, ...] = (0,)
    """Training seeds of the peer."""
    every: float = 0.0
    """Seconds of learning between two judgements; 0: a minute on Pong, 2 seconds on Catch."""
    cap: float = 72.0
    """Minutes after which a contestant is stopped."""
    out: Path = RESULTS / "time_to_score.json"
    """Where the figures go."""
    run: str = ""
    """Do one run alone, such as `pqn/0`, and print it."""

    @property
    def pause(self) -> float:
        """Seconds of learning between two judgements."""
        return self.every or (60.0 if self.game == "pong" else 2.0)


class Course:
    """What a run reached when: a clock that stands still while it is judged."""

    def __init__(self, options: Options, began: float, judge: Callable[[], list[float]]) -> None:
        self.options, self.began, self.judge = options, began, judge
        self.judged_for = self.last = 0.0
        self.rows: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        """Since the run began, without the games that only judge."""
        return time.monotonic() - self.began - self.judged_for

    def ends(self, actions: int, last: bool = False) -> bool:
        """Judge if it is time; whether the run is to end."""
        seconds = self.seconds
        over = last or seconds > 60 * self.options.cap
        if over or seconds - self.last >= self.options.pause:
            began = time.monotonic()
            scores = self.judge()
            self.judged_for += time.monotonic() - began
            self.rows.append({"seconds": seconds, "actions": actions, "mean": statistics.fmean(scores), "scores": scores})
            self.last = seconds
            print(f"{seconds:.0f} s, {actions:,} actions: {self.rows[-1]['mean']:.2f}", file=sys.stderr, flush=True)
            return over or self.rows[-1]["mean"] >= WANTED[self.options.game]
        return False


def main() -> int:
    """Do what is missing, and print the board."""
    options = tyro.cli(Options, description=__doc__)
    if options.run:
        name, seed = options.run.split("/")
        print(json.dumps({"pqn": ours, "ppo": theirs}[name](options, int(seed))))
        return 0
    board: dict[str, Any] = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    runs = board.setdefault(options.game, {})
    for name in options.only:
        for seed in options.seeds if name == "pqn" else options.peer_seeds:
            if (which := f"{name}/{seed}") not in runs:
                given = ["--game", options.game, "--every", str(options.every), "--cap", str(options.cap)]
                runs[which] = alone(__file__, "--run", which, *given)
                keep(options.out, {"results": board})
            console.print(sentence(options.game, which, runs[which]), highlight=False, soft_wrap=True)
    return 0


def sentence(game: str, which: str, rows: list[dict[str, Any]]) -> str:
    """How a run ended."""
    end, wanted = rows[-1], WANTED[game]
    best = max(row["mean"] for row in rows)
    how = f"reached {wanted:g}" if end["mean"] >= wanted else f"did not reach {wanted:g} (best {best:.2f})"
    return (
        f"{game}, {which}: {how} after {end['seconds'] / 60:.1f} minutes and {end['actions']:,} actions; {GAMES} games: {end['mean']:.2f}"
    )


def ours(options: Options, seed: int) -> list[dict[str, Any]]:
    """The course of a run of our PQN."""
    return by_our_trainer(options, f"pqn_{options.game}", "rl.pqn", seed, "greedy", lambda task: QAgent(task.learner.module, CPU))


def theirs(options: Options, seed: int) -> list[dict[str, Any]]:
    """The course of a run of stable-baselines3's PPO."""
    if options.game == "catch":
        return by_our_trainer(options, "ppo_catch", "rl.sb3", seed, "sampled", lambda task: ActorAgent(task.model.policy))
    return by_itself(options, seed)


def by_our_trainer(
    options: Options, preset: str, module: str, seed: int, policy: Policy, agent_of: Callable[[Any], Agent]
) -> list[dict[str, Any]]:
    """The course of a preset, to its end at most."""
    began, experiment = time.monotonic(), read_preset(preset, module)
    experiment = replace(experiment, trainer=replace(experiment.trainer, seed=seed))
    trainer = Trainer(experiment, distributed.join("cpu", experiment.trainer.threads, deterministic=False))
    task: Any = trainer.task

    def judge() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.bf16):
            played = play_games(agent_of(task), experiment.game, GAMES, policy=policy, epsilon=0.0, seed=1000 + seed)
        return [game.score for game in played]

    course = Course(options, began, judge)
    while not course.ends(int(task.progress(trainer)["actions"]), last=trainer.step == experiment.trainer.steps):
        trainer.advance()
    return course.rows


def by_itself(options: Options, seed: int) -> list[dict[str, Any]]:
    """The course of stable-baselines3's PPO on Pong, with nothing of ours."""
    began, model, judged = time.monotonic(), their_ppo_model(seed), their_vec_env("Pong", 8, 1000 + seed, judging=True)

    def judge() -> list[float]:
        scores, _ = evaluate_policy(model, judged, GAMES, deterministic=False, return_episode_rewards=True, warn=False)
        return [float(cast(float, score)) for score in scores]

    course = Course(options, began, judge)

    class Watch(BaseCallback):
        over = False

        def _on_rollout_start(self) -> None:
            self.over = course.ends(self.num_timesteps)

        def _on_step(self) -> bool:
            return not self.over

    model.learn(10**9, callback=Watch())
    return course.rows


if __name__ == "__main__":
    sys.exit(guarded(main))
