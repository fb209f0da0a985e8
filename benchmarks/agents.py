"""Environments and agents beside those of stable-baselines3, in one run on one machine.

    python benchmarks/agents.py                        everything, about 15 minutes on 2 cores
    python benchmarks/agents.py --parts envs --rounds 5

    envs   actions per second of 8 games of Breakout, random actions: ale-py's own AtariVectorEnv, ours on top of it, and
           stable-baselines3's make_atari_env in a SubprocVecEnv, all with the same preprocessing
    dqn    actions per second while learning Pong, 8 transitions learnt from per action: our DQN with the mathematics of
           stable-baselines3's, our DQN as configs/rl/dqn_pong.yaml ships it, and stable-baselines3's DQN on its own wrappers
    pqn    actions per second while learning Pong: our PQN as configs/rl/pqn_pong.yaml ships it, stable-baselines3's PPO and its DQN
    ppo    actions per second of stable-baselines3's PPO on Pong, 8 games: through scripts/train_sb3.py on our environments,
           and by itself on its own ones

Each measurement runs in a process of its own; they take turns, so that a busy machine troubles all alike. Start-up, warm-up
and saving are left out. Medians of the rounds, with the range.
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from envs import games
from envs.games import GameConfig
from lab import distributed
from lab.config import read_yaml, resolve
from lab.experiment import Experiment
from lab.recorder import console
from lab.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "envs": ("native", "ours", "stable-baselines3"),
    "dqn": ("ours", "ours, as shipped", "stable-baselines3"),
    "pqn": ("ours", "stable-baselines3's PPO", "stable-baselines3's DQN"),
    "ppo": ("ours", "stable-baselines3"),
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[Literal["envs", "dqn", "pqn", "ppo"], ...] = ("envs", "dqn", "pqn", "ppo")
    """Which comparisons."""
    rounds: int = 3
    """Turns of each."""
    seconds: float = 20.0
    """How long a turn lasts, about."""
    out: Path = Path("benchmarks/results/agents.json")
    """Where the figures go."""
    only: str = ""
    """Take one measurement alone, such as `dqn/ours`, and print it."""


def main() -> None:
    """Take every measurement, print the ratios and write the report."""
    options = tyro.cli(Options, description=__doc__)
    if options.only:
        print(measure(options.only, options.seconds))
        return
    results = {}
    for part in options.parts:
        results[part] = compare(part, options)
        console.print(sentence(part, results[part]), highlight=False, soft_wrap=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": platform.processor() or platform.machine(), **distributed.environment(), "results": results}
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def compare(part: str, options: Options) -> dict[str, list[float]]:
    """Actions per second of every contestant, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in PARTS[part]}
    for _ in range(options.rounds):
        for name in rates:
            words = [sys.executable, __file__, "--only", f"{part}/{name}", "--seconds", str(options.seconds)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            rates[name].append(float(done.stdout.splitlines()[-1]))
    return rates


def sentence(part: str, rates: dict[str, list[float]]) -> str:
    """The rates of one comparison, and the ratios of ours to those of each peer."""
    peers = [name for name in rates if name.startswith("stable-baselines3")]
    shown = []
    for name, found in rates.items():
        ratios = [] if name in peers else [f" = {ratio(found, rates[peer])} {peer}" for peer in peers]
        shown.append(f"{name} {statistics.median(found):,.0f}{','.join(ratios)}")
    return f"{part}, actions/s: " + "; ".join(shown)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """How many times as many, round by round: median and range."""
    ratios = [mine / other for mine, other in zip(ours, theirs)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def measure(what: str, seconds: float) -> float:
    """Actions per second of one contestant."""
    contestants: dict[str, Callable[[float], float]] = {
        "envs/native": native_envs,
        "envs/ours": our_envs,
        "envs/stable-baselines3": their_envs,
        "dqn/ours": lambda seconds: trained(plain_dqn(), seconds),
        "dqn/ours, as shipped": lambda seconds: trained(shipped("dqn_pong", "rl.dqn"), seconds),
        "dqn/stable-baselines3": their_dqn,
        "pqn/ours": lambda seconds: trained(shipped("pqn_pong", "rl.pqn"), seconds),
        "pqn/stable-baselines3's PPO": their_ppo,
        "pqn/stable-baselines3's DQN": their_dqn,
        "ppo/ours": lambda seconds: trained(shipped("ppo_pong", "rl.sb3"), seconds),
        "ppo/stable-baselines3": their_ppo,
    }
    return contestants[what](seconds)


# Environments


def rate_of(step: Callable[[Any], Any], kinds: int, seconds: float, count: int = 8) -> float:
    """Actions per second of stepping `count` games with random actions."""
    actions = np.random.default_rng(0).integers(0, kinds, (1000, count))
    for row in actions[:50]:
        step(row)
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        step(actions[done % 1000])
        done += 1
    return done * count / passed


def native_envs(seconds: float) -> float:
    """ale-py's vector environment, used directly."""
    from ale_py.vector_env import AtariVectorEnv

    distributed.join("cpu", 0, deterministic=False)
    env = AtariVectorEnv("breakout", 8, reward_clipping=False)
    env.reset(seed=np.arange(8))
    return rate_of(env.step, 4, seconds)


def our_envs(seconds: float) -> float:
    """Ours on top of it."""
    distributed.join("cpu", 0, deterministic=False)
    world = games.make(GameConfig(name="breakout"), 8, 0)
    world.reset()
    return rate_of(world.step, 4, seconds)


def their_vec_env(name: str, count: int, seed: int = 0, judging: bool = False) -> Any:
    """stable-baselines3's wrappers as its documentation and its zoo use them; for judging without the rules of training."""
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack

    kind = SubprocVecEnv if count > 1 else DummyVecEnv
    rules = {"terminal_on_life_loss": False, "clip_reward": False} if judging else {}
    name = f"ale_py:{name}NoFrameskip-v4"
    return VecFrameStack(make_atari_env(name, n_envs=count, seed=seed, vec_env_cls=kind, wrapper_kwargs=rules), 4)


def their_envs(seconds: float) -> float:
    """stable-baselines3's wrappers, a process for each of 8 games."""
    env = their_vec_env("Breakout", 8)
    env.reset()
    rate = rate_of(env.step, 4, seconds)
    env.close()
    return rate


# Agents


def read_preset(preset: str, module: str) -> Any:
    """The settings of a preset."""
    given, _ = read_yaml(ROOT / "configs" / "rl" / f"{preset}.yaml")
    return resolve(importlib.import_module(module).EXPERIMENT, given).settings


def shipped(preset: str, module: str) -> Experiment:
    """A preset, at most with a smaller memory and an earlier start of learning, which cost no speed afterwards."""
    experiment = read_preset(preset, module)
    if module == "rl.dqn":
        dqn = replace(experiment.dqn, learning_starts=2000)
        exploration = replace(experiment.exploration, start=0.5)  # as many actions by the network as there are in the middle of a run
        experiment = replace(experiment, dqn=dqn, exploration=exploration, replay=replace(experiment.replay, capacity=100_000))
    return replace(experiment, trainer=replace(experiment.trainer, steps=10**6))


def plain_dqn() -> Experiment:
    """Our DQN with the mathematics of stable-baselines3's: no double, no dueling, one step, uniform sampling."""
    experiment: Any = shipped("dqn_pong", "rl.dqn")
    dqn = replace(experiment.dqn, double=False, dueling=False, n_step=1)
    return replace(experiment, dqn=dqn, replay=replace(experiment.replay, prioritised=False))


def trained(experiment: Experiment, seconds: float) -> float:
    """Actions per second of the trainer's loop, once learning is under way."""
    trainer = Trainer(experiment, distributed.join("cpu", experiment.trainer.threads, deterministic=False))
    task: Any = trainer.task
    actions = lambda: int(task.progress(trainer)["actions"])  # noqa: E731
    while int(task.progress(trainer)["updates"]) < 20:
        trainer._one_step([], None)
    first, began = actions(), time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        trainer._one_step([], None)
    return (actions() - first) / passed


def watch_learning(model: Any, warm_up: int, seconds: float) -> float:
    """Actions per second of `model.learn` after `warm_up` actions."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        began, first, rate = 0.0, 0, 0.0

        def _on_rollout_start(self) -> None:
            now = time.perf_counter()
            if self.num_timesteps >= warm_up and not self.began:
                self.began, self.first = now, self.num_timesteps
            elif self.began and now - self.began > seconds:
                self.rate = (self.num_timesteps - self.first) / (now - self.began)

        def _on_step(self) -> bool:
            return not self.rate

    clock = Clock()
    model.learn(10**9, callback=clock)
    return clock.rate


def their_dqn(seconds: float) -> float:
    """stable-baselines3's DQN with the hyper-parameters of its zoo: a batch of 32 every 4 actions."""
    from stable_baselines3 import DQN

    model = DQN(
        "CnnPolicy",
        their_vec_env("Pong", 1),
        learning_rate=1e-4,
        buffer_size=20_000,
        learning_starts=1000,
        batch_size=32,
        train_freq=4,
        gradient_steps=1,
        target_update_interval=1000,
        exploration_initial_eps=0.5,
        device="cpu",
    )
    return watch_learning(model, 1200, seconds)


def their_ppo(seconds: float) -> float:
    """Actions per second of stable-baselines3's PPO."""
    return watch_learning(their_ppo_model(0), 1024, seconds)


def their_ppo_model(seed: int) -> Any:
    """Their PPO with the hyper-parameters of its zoo: 8 games, 128 actions each, 4 epochs in batches of 256."""
    from stable_baselines3 import PPO

    return PPO(
        "CnnPolicy",
        their_vec_env("Pong", 8, seed),
        learning_rate=2.5e-4,
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        clip_range=0.1,
        ent_coef=0.01,
        vf_coef=0.5,
        seed=seed,
        device="cpu",
    )


if __name__ == "__main__":
    main()
