"""Atari games on ale-py's native vector environment, with the preprocessing of Mnih et al. 2015.

Four frames per action, the maximum of the last two, grey, 84 x 84, the newest four stacked; N emulators in native threads.
What the native environment does not give is added here: the unclipped score, lost lives that do not start the game anew,
returns and lengths, and a state that can be put back.

The emulators of a vector environment cannot be copied. But they repeat themselves exactly, so their state is the seed
they were given and the actions since then. A game gets a new seed at the first start after `ANCHOR` actions: that costs
70 ms, as the ROM is loaded again, and bounds what has to be played again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from ale_py import ALEInterface, LoggerMode
from ale_py.vector_env import AtariVectorEnv
from torch.nn import functional

from envs.games import Bytes, Flags, GameConfig, Games, Integers, Step
from lab import seeding

log = logging.getLogger("dreamplay")

ANCHOR = 25_000
"""Actions after which a game that starts gets a new seed; at worst a game longer than that is played again on resume."""

IDLE, RESTARTED = 254, 255
"""Entries of the log where games were restarted instead of played: of those that were not, and of those that were."""

SCREEN = (210, 160)
"""Height and width of the pictures for people, pixels."""


class Atari(Games):
    """N Atari games in native threads."""

    def __init__(self, config: GameConfig, count: int, seed: int, colour: bool, first: int = 0) -> None:
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.count, self.seed, self.first = count, seed, first
        self.shape = (config.stack, config.size, config.size)
        self.frames_per_step = config.frame_skip
        self._envs = [_native(config, count, stack_num=config.stack, img_height=config.size, img_width=config.size)]
        if colour:  # a twin with the same seeds and actions, seen by people
            self._envs.append(_native(config, count, stack_num=1, img_height=SCREEN[0], img_width=SCREEN[1], grayscale=False))
        self.actions = tuple(action.name for action in self._envs[0].ale.get_action_set())

    def reset(self) -> Step:
        """Begin all games anew, with the first of their seeds."""
        self._begin(np.zeros(self.count, np.int64))
        return self.last

    def step(self, actions: Integers) -> Step:
        """Take one action in every game.

        Raises:
            ValueError: there is no such action, of which an emulator's thread would die, and the process wait for it for ever.
        """
        if wrong := [int(action) for action in actions if not 0 <= action < len(self.actions)]:
            raise ValueError(f"there is no action {wrong[0]} among 0 to {len(self.actions) - 1}")
        self._log.append(actions.astype(np.uint8))
        before, started = self.last, self.last.ended
        observations, gained, terminated, truncated, info = self._act(actions)
        lives = info["lives"].astype(np.int64)
        rewards = gained.astype(np.float32)
        if started.any():
            observations, lives = self._anchor(started, observations, lives)
        self.last = Step(
            observations,
            rewards,
            terminated,
            truncated & ~terminated,
            # Down to 0 too: some games count the lives in reserve, and at 0 a whole one is still to come.
            (lives < before.lives) & ~(started | terminated | truncated),
            started,
            np.where(started, 0, before.returns + rewards),
            np.where(started, 0, before.lengths + 1),
            lives,
        )
        return self.last

    def restart(self, chosen: Flags) -> Step:
        """Begin new games in the chosen places at once."""
        self._log.append(np.where(chosen, RESTARTED, IDLE).astype(np.uint8))
        observations, lives = self._reset(chosen, seeded=False)
        observations, lives = self._anchor(chosen, observations, lives)
        self.last = self.last.restarted(chosen, observations, lives)
        return self.last

    def pictures(self) -> Bytes:
        """What people see now, (N, 210, 160, 3)."""
        if len(self._envs) < 2:
            raise ValueError("these games were made without colour")
        return cast(Bytes, self._picture[:, 0])

    def close(self) -> None:
        """Stop the emulators and their threads."""
        self._envs.clear()

    # Seeds

    def _begin(self, anchors: Integers) -> None:
        """Reset all games with the seeds that belong to their counts of `anchors`."""
        self._anchors, self._since = anchors, np.zeros(self.count, np.int64)
        self._log: list[Bytes] = []
        observations, lives = self._reset(np.ones(self.count, np.bool_))
        nothing = np.zeros(self.count, np.bool_)
        zeros = np.zeros(self.count, np.float32)
        self.last = Step(observations, zeros, nothing, nothing, nothing, ~nothing, zeros, np.zeros(self.count, np.int64), lives)

    def _reset(self, chosen: Flags, seeded: bool = True) -> tuple[Bytes, Integers]:
        """Reset the chosen games, with their seeds or going on with their random numbers; observations and lives of all."""
        numbers = [seeding.derive(self.seed, f"game/{self.first + index}", int(self._anchors[index])) for index in np.flatnonzero(chosen)]
        seeds = np.array(numbers) >> 32 if seeded else None
        shown = [env.reset(seed=seeds, options={"reset_mask": chosen} if not chosen.all() else None) for env in self._envs]
        self._picture = shown[-1][0]
        return shown[0][0], shown[0][1]["lives"].astype(np.int64)

    def _anchor(self, started: Flags, observations: Bytes, lives: Integers) -> tuple[Bytes, Integers]:
        """Give new seeds to those starting games that have not had one for long."""
        due = started & (len(self._log) - self._since >= ANCHOR)
        if not due.any():
            return observations, lives
        self._anchors = self._anchors + due
        self._since = np.where(due, len(self._log), self._since)
        self._forget(int(self._since.min()))
        return self._reset(due)

    def _forget(self, count: int) -> None:
        """Drop the oldest actions, which no game needs any more."""
        del self._log[:count]
        self._since = self._since - count

    def _act(self, actions: Integers) -> Any:
        for env in self._envs[1:]:
            self._picture = env.step(actions)[0]
        return self._envs[0].step(actions)

    # State

    def state_dict(self) -> dict[str, Any]:
        """The seeds, the actions since then, and what the newest step said."""
        actions = np.stack(self._log) if self._log else np.zeros((0, self.count), np.uint8)
        kept = {name: torch.from_numpy(getattr(self.last, name).copy()) for name in _REMEMBERED}
        numbers = {"anchors": torch.from_numpy(self._anchors.copy()), "since": torch.from_numpy(self._since.copy())}
        return {**numbers, "actions": torch.from_numpy(actions), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put every game where it was, by playing it again from its seed."""
        anchors, since, actions = (state[name].numpy() for name in ("anchors", "since", "actions"))
        if actions.shape[1] != self.count:
            raise ValueError(f"the games were {actions.shape[1]}, not {self.count}")
        actions, since = actions[since.min() :], since - since.min()  # games that were played elsewhere may need older ones
        if len(actions) > 1000:
            log.info("putting %d games back where they were: playing %d steps again", self.count, len(actions))
        self._begin(anchors)
        observations = self.last.observations
        for index, row in enumerate(actions):
            if index and (begin := since == index).any():
                self._reset(begin)
            again = row[0] >= IDLE
            observations = self._reset(row == RESTARTED, seeded=False)[0] if again else self._act(row.astype(np.int64))[0]
        if len(actions) and (begin := since == len(actions)).any():
            observations = self._reset(begin)[0]
        self._since, self._log = since.copy(), list(actions)
        self.last = Step(observations, **{name: state[name].numpy().copy() for name in _REMEMBERED})

    def joined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of all games, of those of their shares: the actions of all end now, and are as many as the longest game needs."""
        longest = max(len(state["actions"]) for state in states)
        missing = [longest - len(state["actions"]) for state in states]
        turned = [
            {**state, "since": state["since"] + more, "actions": functional.pad(state["actions"].T, (more, 0))}
            for state, more in zip(states, missing)
        ]
        whole = super().joined(turned)
        return {**whole, "actions": whole["actions"].T.contiguous()}

    def share(self, state: dict[str, Any], count: int) -> dict[str, Any]:
        """The state of these games, of that of all `count`."""
        share = super().share({**state, "actions": state["actions"].T}, count)
        return {**share, "actions": share["actions"].T}


_REMEMBERED = ("rewards", "terminated", "truncated", "life_lost", "started", "returns", "lengths", "lives")


def _native(config: GameConfig, count: int, **picture: Any) -> AtariVectorEnv:
    """The native environment, with its defaults that lose information (clipping, life loss as an end) switched off."""
    return AtariVectorEnv(
        config.rom,
        count,
        num_threads=min(config.threads, count),
        max_num_frames_per_episode=config.max_frames,
        repeat_action_probability=config.sticky,
        full_action_space=config.full_actions,
        frameskip=config.frame_skip,
        maxpool=config.frame_skip > 1,
        noop_max=config.noop_max,
        use_fire_reset=config.fire_reset,
        reward_clipping=False,
        episodic_life=False,
        life_loss_info=False,
        **picture,
    )


def create(config: GameConfig, count: int, seed: int, colour: bool = False, first: int = 0) -> Atari:
    """Make `count` games; see `envs.games.make`."""
    return Atari(config, count, seed, colour, first)
