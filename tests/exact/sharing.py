"""What processes that play games in shares have of them, beside one that has all: `python -m tests.exact.sharing FOLDER` in each of them.

Every process compares what it sees with what it computes alone, and leaves figures as FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from envs.games import GameConfig
from lab import checkpoint, distributed
from lab.config import UserError
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer
from rl import replay
from rl.dqn import DQNConfig, DQNExperiment
from rl.replay import Replay, ReplayConfig, Transitions, check_room

Row = dict[str, Any]
GAMES, SHAPE, CAPACITY = 4, (3, 4, 5), 80


def main(folder: Path) -> None:
    """All of it, in every process."""
    world = distributed.join("cpu", 1, False)
    figures = {"memory": memory(world), "losses": learning(world), "refusal": refusal(world)}
    for prioritised in (False, True):
        draws_and_saves(world, prioritised, folder / f"{prioritised}")
    errors_of_the_main_process(world)
    (folder / f"{world.rank}.json").write_text(json.dumps(figures))
    world.leave()


# Memory


def memory(world: World) -> dict[str, int]:
    """Bytes of a full memory of 20,000 frames: what the frames take, and by how much the process has grown."""
    before = resident()
    store = Replay(ReplayConfig(capacity=20_000), 8, (4, 84, 84), 3, 0.99, world)
    own = len(store.own)
    for index in range(store.rows):
        no, zero = np.zeros(own, np.bool_), np.zeros(own)
        frames = np.full((own, 84, 84), index % 256, np.uint8)
        store.extend([{"frames": frames, "actions": zero, "rewards": zero, "started": no, "terminal": no, "ended": no, "playable": ~no}])
    return {"frames": store._frames.nbytes, "grown": resident() - before}


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Drawing, priorities and saving


def rows_of(numbers: np.random.Generator) -> Row:
    """A time row of all games."""
    flags = {name: numbers.random(GAMES) < 0.2 for name in ("started", "terminal", "ended")}
    return {
        "frames": numbers.integers(0, 256, (GAMES, *SHAPE[1:]), dtype=np.uint8),
        "actions": numbers.integers(0, 18, GAMES),
        "rewards": numbers.normal(size=GAMES).astype(np.float32),
        **flags,
        "playable": numbers.random(GAMES) < 0.8,
    }


def cut(row: Row, own: range) -> Row:
    """What a process knows of a row before it hears of the others."""
    return {name: values[own.start : own.stop] for name, values in row.items()}


def draws_and_saves(world: World, prioritised: bool, folder: Path) -> None:
    """A memory that is shared gives each process its part of what one gives that is not, before and after it was saved and put back."""
    config = ReplayConfig(capacity=CAPACITY, prioritised=prioritised)
    shared, alone = (Replay(config, GAMES, SHAPE, 3, 0.9, where) for where in (world, World()))
    numbers = np.random.default_rng(5)
    for turn in range(12):  # 48 rows; 20 are held
        rows = [rows_of(numbers) for _ in range(4)]
        shared.extend([cut(row, shared.own) for row in rows])
        alone.extend(rows)
        for batch in (1, 16) if turn else []:
            compare(shared, alone, batch, turn)
        if turn in (8, 11):
            world.led(lambda turn=turn: keep(folder, turn, shared, alone))
    if world.main:
        segments = checkpoint.load(folder / "step_000000011").segments["memory"]
        assert len(segments) > 1
        assert all(load_file(path)["frames"].shape[1] == GAMES for _, path in segments)
    again, alone_again = (Replay(config, GAMES, SHAPE, 3, 0.9, where) for where in (world, World()))
    found = world.from_main(lambda: checkpoint.load(folder / "step_000000011"))
    checkpoint.restore({"memory": again}, found.parts, found.segments, lambda path: world.from_main(lambda: load_file(path)))
    checkpoint.restore({"memory": alone_again}, found.parts, found.segments)  # one process goes on with what two have saved
    assert again.written == alone_again.written == alone.written
    compare(again, alone_again, 16, 100)


def keep(folder: Path, step: int, shared: Replay, alone: Replay) -> None:
    """Save the memory; what is read of it is what one process has."""
    checkpoint.save(folder, step, {"memory": shared}, {}, keep=2)
    rows, expected = shared.read(shared.oldest, shared.written), alone.read(alone.oldest, alone.written)
    assert all(rows[name].equal(expected[name]) for name in expected)


def compare(shared: Replay, alone: Replay, count: int, turn: int) -> None:
    """Draw a batch from both and tell both its errors."""

    def draw(attempt: int) -> torch.Tensor:
        return torch.rand(count, 2, generator=torch.Generator().manual_seed(1000 * turn + attempt))

    part, whole = shared.sample(count, draw, 0.5), alone.sample(count, draw, 0.5)
    mine = (whole.games >= shared.own.start) & (whole.games < shared.own.stop)
    assert len(part.times) == int(mine.sum())
    assert all(getattr(part, name).equal(values[mine]) for name, values in vars(whole).items())
    for store, batch in ((shared, part), (alone, whole)):
        store.reprioritise(batch, errors_of(batch))
    assert shared.sampleable == alone.sampleable
    if shared.tree and alone.tree:
        assert shared.tree.nodes.equal(alone.tree.nodes)
        assert shared.largest.equal(alone.largest)


def errors_of(batch: Transitions) -> torch.Tensor:
    """Errors that the process has which drew them."""
    return torch.sin(batch.times.float() * 3 + batch.games)


# Learning


def learning(world: World) -> dict[str, list[Any]]:
    """The losses of a DQN, shared and alone, and how many of the two rows of each batch were this process's."""
    config = DQNConfig(backbone="small", hidden=16, games=4, train_every=8, batch_size=2, learning_starts=40, target_every=80)
    experiment = DQNExperiment(
        trainer=TrainerConfig(steps=40, precision="fp32", log_every=1000, preview_every=1000),
        optimizer=OptimizerConfig(kind="sgd", lr=0.01, betas=(0.0, 0.0)),
        game=GameConfig(name="catch", stack=2),
        dqn=config,
        replay=ReplayConfig(capacity=2000, prioritised=True),
    )
    found: dict[str, list[Any]] = {"sizes": []}
    for name, where in (("shared", world), ("alone", World())):
        trainer = Trainer(experiment, where)
        found[name] = []
        for _ in range(40):
            metrics = trainer.advance()[0]
            if "loss" in metrics:
                found[name].append(sum(world.gather(float(metrics["loss"]))) / world.size)
                found["sizes"] += [len(batch.times) for batch, _ in trainer.task.drawn] if where is world else []
    return found


# Mistakes


def refusal(world: World) -> str:
    """What is said where the last process has no room."""
    replay.free_memory = lambda device: 10_000 if world.rank else 10**12  # type: ignore[assignment]
    try:
        check_room(ReplayConfig(), 8, (4, 84, 84), world)
    except UserError as error:
        return str(error)
    return ""


def errors_of_the_main_process(world: World) -> None:
    """A disk that is full in the middle of what processes do together is known to all, and they go on."""
    numbers = world.jointly(lambda given: given + world.rank)
    seen: list[Any] = []

    def full() -> None:
        seen.append(numbers(10))
        raise OSError(28, "No space left on device")

    for _ in range(2):
        try:
            world.led(full if world.main else None)
        except OSError as error:
            seen.append(error.errno)
    assert seen == ([[10, 11], 28] * 2 if world.main else [28, 28])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
