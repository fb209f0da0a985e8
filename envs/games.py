"""Games as agents meet them: many of one kind, side by side, each starting again by itself when it is over.

The rules of what an agent learns from (lost lives, clipped rewards) are settings of the learner and are applied by the
learner: a game always gives the real score and says what really happened. So nobody can be judged under the rules of training.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lab.config import Count, Fraction, Natural, Settings

if TYPE_CHECKING:  # the settings, and which games there are, are known without torch
    from lab.distributed import World

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

SMALL = ("catch", "bricks")
"""Pixel games of our own, in envs/small.py: seconds to learn instead of hours."""

TWO_PLAYERS = ("combat", "joust", "maze_craze", "warlords")
"""ROMs inside ale-py which its emulator cannot play alone: it would end the whole process."""


@dataclass(frozen=True, kw_only=True)
class GameConfig(Settings):
    """The game, and how it is shown to the agent."""

    name: str = "pong"
    """An Atari game (`pong`, `ms_pacman` or `ALE/MsPacman-v5`), or a small one of ours: catch, bricks."""
    stack: Count = 4
    """Newest frames that make one observation."""
    size: Count = 84
    """Height and width of a frame, pixels (small games have a size of their own)."""
    frame_skip: Count = 4
    """Frames of the emulator per action, which is repeated; the last two are pooled by their maximum."""
    noop_max: Natural = 30
    """At the start of a game, up to so many frames pass without an action, a number drawn anew each time."""
    fire_reset: bool = True
    """Press FIRE at the start of a game that waits for it."""
    sticky: Fraction = 0.0
    """Probability that the emulator repeats the previous action instead (Machado et al. 2018 advise 0.25)."""
    full_actions: bool = False
    """All 18 actions of the joystick instead of those that the game reacts to."""
    max_frames: Count = 108_000
    """Frames after which a game is broken off (half an hour of play); a truncation, not an end."""
    threads: Natural = 0
    """Threads that run the emulators; 0: one for each core, as far as there are games for them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve(self.name)

    @property
    def rom(self) -> str:
        """The name in the emulator's own spelling."""
        return resolve(self.name)


def resolve(name: str) -> str:
    """The game that `name` means: a ROM's name in any of the spellings in use (`ALE/Pong-v5`, `PongNoFrameskip-v4`), or a small game.

    Raises:
        ValueError: no such game; names the nearest ones.
    """
    known = {key.replace("_", ""): key for key in (*SMALL, *roms())}
    plain = re.sub(r"(-?ram)?(NoFrameskip|Deterministic)?-v\d+$", "", name.rpartition("/")[2])
    key = re.sub(r"[^a-z0-9]", "", plain.lower())
    if key in known:
        return known[key]
    if key in {two.replace("_", "") for two in TWO_PLAYERS}:
        raise ValueError(f"name: {name!r} is a game for two players, which the emulator cannot play alone; take another one")
    nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(known[near] for near in nearest)}?" if nearest else f"the games are {', '.join(known.values())}"
    raise ValueError(f"name: no game is called {name!r}; {hint}")


def roms() -> list[str]:
    """The ROMs inside ale-py that one player can play, found without importing it: `--help` must not wait for an emulator."""
    spec = importlib.util.find_spec("ale_py")
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return sorted({path.stem for place in places for path in (Path(place) / "roms").glob("*.bin")} - set(TWO_PLAYERS))


@dataclass(frozen=True)
class Step:
    """What N games show after an action, each array with a first dimension of N."""

    observations: Bytes
    """(N, stack, H, W), the newest frame last; frames from before the game began are black. Nobody writes into it again."""
    rewards: Floats
    """Points gained by the action, never clipped."""
    terminated: Flags
    """The game is over. The next action is ignored and brings the first observation of a new game."""
    truncated: Flags
    """The game was broken off for its length; it could have gone on. The next action is ignored, as after an end."""
    life_lost: Flags
    """A life was lost and the game goes on."""
    started: Flags
    """This is the first observation of a game: the action was ignored, the reward is 0, no transition leads here."""
    returns: Floats
    """Points of the game so far; after an end, of the whole game."""
    lengths: Integers
    """Actions taken in the game so far."""
    lives: Integers
    """Lives left; 0 where the game does not count them."""

    @property
    def ended(self) -> Flags:
        """The game is over or was broken off."""
        return self.terminated | self.truncated

    def restarted(self, chosen: Flags, observations: Bytes, lives: Integers) -> Step:
        """This step after new games began in the chosen places; the others are as they were."""
        same = ("rewards", "terminated", "truncated", "life_lost", "returns", "lengths")
        kept = {name: np.where(chosen, 0, getattr(self, name)).astype(getattr(self, name).dtype) for name in same}
        return Step(observations, **kept, started=self.started | chosen, lives=lives)


class Games(ABC):
    """N games of one kind, which a state_dict holds exactly: a game that is put back goes on as if nothing had happened."""

    count: int
    first: int = 0
    """The position of the first one, where others are played elsewhere."""
    shape: tuple[int, int, int]
    """Frames of an observation, their height and width."""
    actions: tuple[str, ...]
    """The names of the actions, in order."""
    frames_per_step: int
    """Frames of the emulator per action, by which the literature counts."""

    @abstractmethod
    def reset(self) -> Step:
        """Begin all games from the start of their random numbers; every one has `started`."""

    @abstractmethod
    def step(self, actions: Integers) -> Step:
        """Take one action (N,) in every game."""

    @abstractmethod
    def restart(self, chosen: Flags) -> Step:
        """Begin new games in the chosen places (N,) at once; there the newest step is then the first one of a game.

        For learners that cannot wait for the next action to bring it, as stable-baselines3's cannot.
        """

    @abstractmethod
    def pictures(self) -> Bytes:
        """What people see now, (N, height, width, 3); only of games made with `colour`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that must be put back to go on as before."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; `last` is then the newest step again."""

    def joined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of all games, of those of their shares, in order: tensors have a row for each game, all else is the same for all."""
        import torch

        def whole(values: Sequence[Any]) -> Any:
            if isinstance(values[0], dict):
                return {name: whole([value[name] for value in values]) for name in values[0]}
            return torch.cat(list(values)) if isinstance(values[0], torch.Tensor) else values[0]

        joined: dict[str, Any] = whole(states)
        return joined

    def share(self, state: dict[str, Any], count: int) -> dict[str, Any]:
        """The state of these games, of that of all `count`.

        Raises:
            ValueError: it is the state of another number of games.
        """
        import torch

        def rows(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: rows(inner) for name, inner in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            if len(value) != count:
                raise ValueError(f"the games were {len(value)}, not {count}")
            return value[self.first : self.first + self.count]

        share: dict[str, Any] = rows(state)
        return share

    last: Step
    """The newest step."""

    def close(self) -> None:  # noqa: B027  (most games have nothing to let go of)
        """Let go of threads and emulators."""


def make(config: GameConfig, count: int, seed: int, colour: bool = False, first: int = 0) -> Games:
    """Make `count` games, whose random numbers follow from `seed` and their position.

    Args:
        colour: also keep the pictures that people see.
        first: the position of the first of them, where others are played elsewhere.
    """
    kind = "envs.small" if config.rom in SMALL else "envs.atari"
    games: Games = importlib.import_module(kind).create(config, count, seed, colour, first)
    return games


# Games that processes play in shares


class AllGames:
    """The games of all processes as a part of a checkpoint: as if one had played them all, so that any number can go on with them."""

    def __init__(self, games: Games, world: World, standing: Callable[[], dict[str, Any]] | None = None) -> None:
        """Args:
        games: those of this process, one after the other among all.
        standing: their state, where it is not the newest that is to be kept.
        """
        self.games, self.count = games, games.count * world.size
        self._states = world.jointly(standing or games.state_dict)

    def state_dict(self) -> dict[str, Any]:
        """The state of all games."""
        states = self._states()
        return self.games.joined(states) if len(states) > 1 else states[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the games of this process where they were."""
        self.games.load_state_dict(self.games.share(state, self.count) if self.count > self.games.count else state)
