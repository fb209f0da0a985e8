"""The memory of an agent beside that of stable-baselines3: time of a batch that is ready to train on, bytes of a transition.

    python benchmarks/replay.py                        about four minutes; takes 7.1 GB of memory at a time
    python benchmarks/replay.py --capacity 200000 --their-capacity 50000 --rounds 1

Transitions are pairs of stacks of four 84x84 frames, as bytes. Each memory is filled through its own `append` or `add`, in a process of
its own; they take turns.

    ours              rl/replay.py as a plain DQN uses it: uniform, one step
    ours, as shipped  prioritised, three steps, as configs/rl/dqn_pong.yaml has it; the new priorities of the batch are put back, too
    stable-baselines3 ReplayBuffer as its DQN makes it by default: both stacks of every transition
    ... optimised     the same with optimize_memory_usage, which keeps one stack of every transition

fetched: from the call to tensors of bytes. ready: also turned into the numbers that the first convolution multiplies, for both stacks, as
each does it: theirs by `preprocess_obs`, ours as the Nature network does, in bf16 where that is native. stored: writing one transition.
Bytes are those by which the process grew, over the transitions it holds; stable-baselines3 holds fewer here, and its million is
extrapolated.
"""

from __future__ import annotations

import importlib
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from turns import RESULTS, alone, keep, pace, spread

from lab import distributed
from lab.backbones.nature import blocks
from lab.distributed import native_bf16
from lab.launch import guarded
from lab.learner import Shard
from lab.recorder import console
from rl.replay import Replay, ReplayConfig, Transitions, check_room

STACK = (4, 84, 84)
GAMES, EPISODE, ROWS = 16, 500, 8
OURS, SHIPPED, THEIRS, OPTIMISED = "ours", "ours, as shipped", "stable-baselines3", "stable-baselines3, optimised"
CONTESTANTS = (OURS, SHIPPED, THEIRS, OPTIMISED)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    capacity: int = 1_000_000
    """Transitions in our memory."""
    their_capacity: int = 100_000
    """Transitions in that of stable-baselines3, 56 kB each."""
    batches: tuple[int, ...] = (32, 256)
    """Transitions of a batch."""
    rounds: int = 3
    """Turns of each memory."""
    seconds: float = 3.0
    """How long each timing of a turn lasts."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    out: Path = RESULTS / "replay.json"
    """Where the figures go."""
    only: str = ""
    """Take one measurement alone, such as `ours`, and print it."""


def main() -> int:
    """Take every measurement, print a line for each and write the report."""
    options = tyro.cli(Options, description=__doc__)
    if options.only:
        print(json.dumps(measure(options)))
        return 0
    distributed.join("cpu", options.threads, deterministic=False)
    words = ["--capacity", str(options.capacity), "--their-capacity", str(options.their_capacity), "--seconds", str(options.seconds)]
    words += ["--threads", str(torch.get_num_threads()), "--batches", *map(str, options.batches)]  # as many threads for theirs as for ours
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.rounds):
        for name in rows:
            rows[name].append(alone(__file__, "--only", name, *words))
    for line in sentences(rows, options.batches):
        console.print(line, highlight=False, soft_wrap=True)
    keep(options.out, {"results": rows})
    return 0


def sentences(rows: dict[str, list[dict[str, Any]]], batches: tuple[int, ...]) -> Iterator[str]:
    """What was found, a line for each size of batch and one for the bytes."""
    for batch in batches:
        for kind in ("ready", "fetched"):
            found = {name: [row[kind][str(batch)] for row in turns] for name, turns in rows.items()}
            ratios = [mine / theirs for mine, theirs in zip(found[OURS], found[THEIRS])]
            shown = "; ".join(f"{name} {1000 * statistics.median(times):.2f} ms" for name, times in found.items())
            yield f"{batch} transitions {kind}: {shown}; ours takes {spread(ratios)} of stable-baselines3's time"
    sizes = {name: (turns[0]["bytes"], turns[0]["transitions"]) for name, turns in rows.items()}
    yield "bytes of a transition: " + "; ".join(f"{name} {size:,.0f} (of {count:,})" for name, (size, count) in sizes.items())
    yield "a million of them: " + "; ".join(f"{name} {size / 1e3:.2f} GB" for name, (size, _) in sizes.items())
    stored = {name: statistics.median(row["stored"] for row in turns) for name, turns in rows.items()}
    yield "one transition stored: " + "; ".join(f"{name} {1e6 * seconds:.1f} us" for name, seconds in stored.items())


def measure(options: Options) -> dict[str, Any]:
    """Every figure of one memory."""
    fetch: Callable[[int], Any]
    ready: Callable[[Any], Any]
    if options.only in (THEIRS, OPTIMISED):
        importlib.import_module("stable_baselines3.common.buffers")  # now, so that only the memory itself is counted
        torch.set_num_threads(options.threads or torch.get_num_threads())
    else:
        distributed.join("cpu", options.threads, deterministic=False)
    begun, before = time.perf_counter(), resident()
    if options.only in (OURS, SHIPPED):
        memory = our_memory(options.only == SHIPPED, options.capacity)
        fetch, ready, held = our_fetch(memory), our_numbers, memory.sampleable
    else:
        theirs = their_memory(options.only == OPTIMISED, options.their_capacity)
        fetch, ready, held = theirs.sample, their_numbers(theirs), theirs.buffer_size
    filled, grown = time.perf_counter() - begun, resident() - before
    return {
        "transitions": held,
        "bytes": grown / held,
        "stored": filled / held,
        "fetched": {batch: pace(lambda: fetch(batch), options.seconds, 20) for batch in options.batches},  # noqa: B023
        "ready": {batch: pace(lambda: ready(fetch(batch)), options.seconds, 20) for batch in options.batches},  # noqa: B023
    }


def resident() -> int:
    """Bytes of memory that this process has held at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


# Ours


def our_memory(shipped: bool, capacity: int) -> Replay:
    """A full memory of 16 games."""
    config = ReplayConfig(capacity=capacity, prioritised=shipped)
    check_room(config, GAMES, STACK)
    memory = Replay(config, GAMES, STACK, n_step=3 if shipped else 1, discount=0.99)
    numbers = np.random.default_rng(0)
    frames = numbers.integers(0, 256, (ROWS, GAMES, *STACK[1:]), dtype=np.uint8)
    rewards, actions = numbers.normal(size=GAMES).astype(np.float32), numbers.integers(0, 6, GAMES)
    for row in range(memory.rows + 1):
        moments = [np.full(GAMES, row % EPISODE == moment) for moment in (0, EPISODE - 2, EPISODE - 1)]
        started, ended, last = moments
        memory.append(
            frames=frames[row % ROWS], actions=actions, rewards=rewards, started=started, terminal=ended, ended=ended, playable=~last
        )
    return memory


def our_fetch(memory: Replay) -> Callable[[int], Transitions]:
    """How a DQN of ours gets its next batch; where sampling follows priorities, the batch gets new ones."""
    steps = itertools.count()

    def fetch(batch: int) -> Transitions:
        shard = Shard(0, batch, batch, seed=0, step=next(steps), device=CPU)
        drawn = memory.sample(batch, lambda attempt: shard.uniform(f"replay/{attempt}", 2), 0.4)
        if memory.tree:
            memory.reprioritise(drawn, torch.randn(batch))
        return drawn

    return fetch


def our_numbers(batch: Transitions) -> list[torch.Tensor]:
    """What the first convolution of our Nature network multiplies, of both stacks."""
    kind = torch.bfloat16 if native_bf16(CPU) else torch.float32
    return [blocks(stacks).to(kind) for stacks in (batch.observations, batch.next_observations)]


# Theirs


def their_memory(optimised: bool, capacity: int) -> Any:
    """A full ReplayBuffer of one game, with the arguments that their DQN gives it."""
    from gymnasium import spaces
    from stable_baselines3.common.buffers import ReplayBuffer

    seen = spaces.Box(0, 255, STACK, np.uint8)
    memory = ReplayBuffer(
        capacity, seen, spaces.Discrete(6), "cpu", n_envs=1, optimize_memory_usage=optimised, handle_timeout_termination=not optimised
    )
    stacks = np.random.default_rng(0).integers(0, 256, (ROWS + 1, 1, *STACK), dtype=np.uint8)
    action, reward = np.zeros((1, 1), np.int64), np.zeros(1, np.float32)
    for index in range(capacity):
        before, after, over = stacks[index % ROWS], stacks[index % ROWS + 1], np.array([index % EPISODE == EPISODE - 1])
        memory.add(before, after, action, reward, over, [{}])
    return memory


def their_numbers(memory: Any) -> Callable[[Any], list[Any]]:
    """What their policy makes of both stacks before its network."""
    from stable_baselines3.common.preprocessing import preprocess_obs

    return lambda batch: [preprocess_obs(stacks, memory.observation_space) for stacks in (batch.observations, batch.next_observations)]


if __name__ == "__main__":
    sys.exit(guarded(main))
