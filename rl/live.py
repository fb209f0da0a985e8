"""A game that goes on when somebody asks for more of it: an agent plays, or a person by hand, and both can be looked at.

Whoever shows a game pulls: the next state is made when it is asked for, so what is seen is never old. Nothing here knows about pages
or threads; `rl.studio` gives every session one thread in which all of this happens, and lets another one find the saliency and
write the video.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from envs.games import GameConfig
from lab import loading, runs
from lab.config import Fraction, Natural, Settings, UserError
from lab.runs import Run
from rl import agent as agents
from rl import evaluate, play
from rl.agent import Agent, Policy, RandomAgent
from rl.play import Moment

MINUTE = 60.0
"""Seconds of play, at the pace of people, that are remembered for a video."""


def use_one_core() -> None:
    """Let torch compute in this thread alone, and all other threads go on as they were: one observation leaves nothing to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread, but also for all that have not computed yet
    again = threading.Thread(target=torch.set_num_threads, args=(before,))  # which puts it back for those
    again.start()
    again.join()


# A moment as bytes

ARRAYS: dict[str, Any] = {"values": np.float32, "picture": np.uint8, "observation": np.uint8}
"""What of a moment is no number, and what it consists of."""


def packed(moment: Moment, meaning: str) -> bytes:
    """A moment as a page can read it: what `zlib` makes of a length (uint32), so many bytes of JSON, values, picture and observation.

    The values are float32, the pictures uint8, all little-endian and in the order of their dimensions. The JSON says the rest, the
    `meaning` of the values (`Agent.meaning`), and when the moment was `made` (Unix time, seconds). A tenth of a millisecond makes
    2 to 5 KB of the 130 KB of an Atari game.
    """
    arrays: dict[str, NDArray[Any]] = {name: getattr(moment, name) for name in ARRAYS}
    told = {**vars(moment), **{name: array.shape for name, array in arrays.items()}}
    head = json.dumps({**told, "meaning": meaning, "made": time.time()}).encode()
    return zlib.compress(b"".join([struct.pack("<I", len(head)), head, *(array.tobytes() for array in arrays.values())]), 1)


def unpacked(packet: bytes) -> Moment:
    """The moment that `packed` made bytes of."""
    content = zlib.decompress(packet)
    (length,) = struct.unpack_from("<I", content)
    told = json.loads(content[4 : 4 + length])
    at = 4 + length
    for name, kind in ARRAYS.items():
        shape = told[name]
        told[name] = np.frombuffer(content, kind, int(np.prod(shape)), at).reshape(shape)
        at += told[name].nbytes
    del told["meaning"], told["made"]
    return Moment(**told)


# Who plays, and how


@dataclass(frozen=True, kw_only=True)
class Rules(Settings):
    """How a game is played."""

    seed: Natural = 0
    """Decides the games and the random actions."""
    policy: Literal["epsilon", "greedy", "sampled"] = "epsilon"
    """How the agent's actions follow from its values; see `rl.agent.choose`."""
    epsilon: Fraction = 0.05
    """Share of random actions, for the policy epsilon."""
    sticky: Fraction = 0.0
    """Probability that the emulator repeats the previous action instead."""


@dataclass(frozen=True)
class Excerpt:
    """Moments to make a video of, all by one agent."""

    packets: tuple[bytes, ...]
    agent: Agent
    game: GameConfig
    path: Path
    title: str

    def write(self) -> Path:
        """Write the video, and say where.

        Raises:
            UserError: it cannot be written there.
        """
        try:
            play.record(map(unpacked, self.packets), self.agent, self.game, self.path, title=self.title)
        except OSError as error:
            raise UserError(f"{self.path}: a video cannot be written here ({error.strerror})") from None
        return self.path


class Session:
    """An agent of a run at play, from the first state of the first game.

    Raises:
        UserError: the run has no whole checkpoint.
    """

    moment: Moment
    """What there is to see now."""
    packet: bytes
    """The same, packed."""

    def __init__(self, run: Run) -> None:
        self.run, self.saved = run, loading.moments(run)
        loaded = agents.load(str(run.folder))
        self.experiment, self.names, self.agent = loaded.experiment, loaded.actions, loaded.agent
        self.step: int | None = loaded.step
        self.rules = Rules(policy=self.experiment.usual_policy, sticky=self.experiment.game.sticky)
        self.minute: deque[bytes] = deque(maxlen=round(MINUTE * self.pace))
        self.playing = play.Playing(self.game, self.rules.seed)
        self._look()

    @property
    def game(self) -> GameConfig:
        """The game of the run, under the rules of now."""
        return dataclasses.replace(self.experiment.game, sticky=self.rules.sticky)

    @property
    def pace(self) -> float:
        """Actions per second at which people play."""
        return play.pace(self.experiment.game)

    @property
    def policies(self) -> list[Policy]:
        """The ways in which the trained agent can play."""
        return ["epsilon", "greedy", "sampled"] if self.experiment.usual_policy == "sampled" else ["epsilon", "greedy"]

    # Playing

    def advance(self, actions: int, hand: int | None = None) -> bytes:
        """The moment after so many more actions, packed; an end of a game is never passed over within them.

        Args:
            actions: 0 gives the moment of now.
            hand: the action that a person takes in place of the agent.

        Raises:
            UserError: the game has no such action.
        """
        if hand is not None and not 0 <= hand < len(self.names):
            raise UserError(f"there is no action {hand}; this game has {len(self.names)}")
        for _ in range(actions):
            if hand is not None:
                self.moment = dataclasses.replace(self.moment, action=hand)
            self.minute.append(self.packet if hand is None else packed(self.moment, self.agent.meaning))
            self.playing.act(self.moment.action)
            self._look()
            if self.moment.ended:
                break
        return self.packet

    def _look(self) -> None:
        policy = "sampled" if isinstance(self.agent, RandomAgent) else self.rules.policy
        self.moment = self.playing.look(self.agent, policy, self.rules.epsilon)
        self.packet = packed(self.moment, self.agent.meaning)

    # Changing who plays, and how

    def begin(self, **changed: object) -> None:
        """Play again from the first game, with what is `changed` of the rules.

        Raises:
            UserError: the rules do not allow it; everything is as it was.
        """
        self.rules = self._ruled(changed)
        self.close()
        self.playing = play.Playing(self.game, self.rules.seed)
        self.minute.clear()
        self._look()

    def change(self, **changed: object) -> None:
        """Let the agent go on by another policy or epsilon.

        Raises:
            UserError: the agent cannot play so; everything is as it was.
        """
        rules = self._ruled(changed)
        if self.step is not None:
            evaluate.check_policy(self.agent, rules.policy)
        self.rules = rules
        self._look()

    def _ruled(self, changed: dict[str, object]) -> Rules:
        try:
            return dataclasses.replace(self.rules, **changed)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(str(error)) from None

    def switch(self, step: int | None) -> None:
        """Let the agent go on as it was after so many steps of training, or chance (None), in the middle of the game.

        Raises:
            UserError: nothing whole is kept of that step; everything is as it was.
        """
        if step is None:
            self.agent = RandomAgent(len(self.names))
        elif step in self.saved:
            self.agent = agents.load(str(self.saved[step])).agent
        else:
            raise UserError(f"nothing is kept of step {step}; of this run there is {', '.join(map(str, self.saved))}")
        self.step = step
        self.minute.clear()
        self._look()

    # Showing

    def excerpt(self) -> Excerpt:
        """The last minute, or what there is of it since the game was begun or the agent changed."""
        trained = "random" if self.step is None else f"{self.step:09d}"
        path = self.run.media / f"watch_{trained}_seed{self.rules.seed}_{runs.stamp()}.mp4"
        return Excerpt((*self.minute, self.packet), self.agent, self.game, path, f"{play.game_title(self.game)} · {self.player}")

    @property
    def player(self) -> str:
        """Who plays, in words."""
        return "random actions" if self.step is None else f"{self.experiment.experiment.upper()} · step {self.step:,}"

    def close(self) -> None:
        """Let go of the game."""
        self.playing.close()


def glow(agent: Agent, moment: Moment) -> bytes:
    """The saliency of a moment as colours to be laid over its picture: RGBA, uint8 (H, W, 4), of the size that the agent sees."""
    levels = (255 * play.heat(agent, moment)).round().astype(np.uint8)
    opacity = (play.OPACITY * levels).round().astype(np.uint8)
    return np.concatenate([play.HEAT[levels], opacity[..., None]], -1).tobytes()
