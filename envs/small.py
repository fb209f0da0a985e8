"""Two pixel games of our own, which an agent learns in seconds: Catch and Bricks, all N of them played at once in NumPy.

    catch   12 x 12   a ball falls straight down, one row a step; ten balls a game, +1 for each one caught and -1 for each one
                      missed. A paddle of 3 columns gets under any ball in time, so the best score is exactly 10.
    bricks  16 x 16   a ball flies diagonally and takes bricks out of a wall, +1 for each of the 24; when all are gone there is
                      a new wall. Three balls, which are the lives; a paddle of 4 columns keeps the ball in play.

In both the paddle lies in the bottom row and moves one column an action (NOOP, LEFT, RIGHT), and a ball that reaches that row
is out of play: the next step serves another one. A step is one frame, so `max_frames` counts steps and `sticky` is drawn once a
step; `frame_skip`, `noop_max`, `fire_reset`, `size`, `full_actions` and `threads` mean nothing here.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from envs.games import Bytes, Flags, GameConfig, Games, Integers, Step
from lab import seeding

Uniform = NDArray[np.float64]

EMPTY, BALL, PADDLE, LAYERS = 0, 255, 192, (128, 112, 96)
"""What is drawn, as grey values; the layers of a wall differ, so that people can be shown them in colours."""
COLOURS = np.zeros((256, 3), np.uint8)
COLOURS[[EMPTY, BALL, PADDLE, *LAYERS]] = (24, 26, 38), (255, 241, 210), (96, 205, 255), (240, 84, 84), (247, 160, 65), (247, 214, 85)
GRID = (15, 16, 24)
CELL = 14
"""Height and width of a cell in a colour picture, pixels."""

MOVES = np.array([0, -1, 1])
"""Columns that the paddle moves by an action."""
BLOCK = 256
"""Steps whose random numbers are drawn together."""


def create(config: GameConfig, count: int, seed: int, colour: bool, first: int = 0) -> Games:
    """The small game that the settings name; see `envs.games.make`."""
    kind = {"catch": Catch, "bricks": Bricks}[config.rom]
    return kind(config, count, seed, colour, first)


@functools.lru_cache(maxsize=8)
def chances(seed: int, block: int, count: int) -> Uniform:
    """Uniform numbers for a block of steps, (BLOCK, 2, count); a game's own do not depend on how many there are."""
    generator = np.random.Generator(np.random.PCG64(seeding.derive(seed, "small", block)))
    return np.ascontiguousarray(generator.random((count, BLOCK, 2)).transpose(1, 2, 0))


def _along(chosen: Flags, array: NDArray[Any]) -> Flags:
    """Flags (N,) in a shape that goes with an array (N, ...)."""
    return chosen.reshape(-1, *[1] * (array.ndim - 1))


class PaddleGames(Games):
    """What the games share: paddle, balls, frames, and beginning again. A game says what its ball does, in `play`."""

    actions = ("NOOP", "LEFT", "RIGHT")
    frames_per_step = 1
    side: ClassVar[int]
    """Rows and columns of the board."""
    reach: ClassVar[int]
    """Columns that the paddle covers."""
    supply: ClassVar[int]
    """Balls in a game."""
    mortal: ClassVar[bool]
    """Whether balls count as lives."""
    variables: ClassVar[tuple[str, ...]] = ("paddle", "row", "column", "balls", "previous")
    """The attributes that are the state of the games, all but what `last` shows."""

    paddle: Integers
    """The leftmost column of each paddle, (N,)."""
    row: Integers
    column: Integers
    """Where each ball is, (N,); out of play in the bottom row."""
    balls: Integers
    """Balls left, (N,)."""
    previous: Integers
    """The actions that were carried out, (N,), which `sticky` may repeat."""

    def __init__(self, config: GameConfig, count: int, seed: int, colour: bool, first: int = 0) -> None:
        self.config, self.count, self.seed, self.colour, self.first = config, count, seed, colour, first
        self.shape = (config.stack, self.side, self.side)
        self.games, self.bottom = np.arange(count), self.side - 1
        self.reset()

    # Playing

    @abstractmethod
    def play(self, place: Uniform) -> Integers:
        """Move or serve every ball, where `place` in [0, 1) decides, (N,); gives the points."""

    def begin(self, over: Flags) -> None:
        """Set up new games where the old ones are `over`, their first ball still to be served."""
        self.paddle[over], self.row[over], self.balls[over] = (self.side - self.reach) // 2, self.bottom, self.supply

    def reset(self) -> Step:
        """Begin all games from the start of their random numbers; every one has `started`."""
        self.clock = 0
        self.paddle, self.row, self.column, self.balls, self.previous = np.zeros((5, self.count), np.int64)
        # As if games had just ended: then the first games begin as all others do.
        no, none, nothing = np.zeros(self.count, bool), np.zeros(self.count, np.int64), np.zeros(self.count, np.float32)
        self.last = Step(np.zeros((self.count, *self.shape), np.uint8), nothing, ~no, no, no, no, nothing, none, none)
        return self.step(none)

    def step(self, actions: Integers) -> Step:
        """Take one action (N,) in every game."""
        over = self.last.ended
        stick, place = self._chance()
        self.previous = np.where(over, 0, np.where(stick < self.config.sticky, self.previous, actions))
        self.begin(over)
        self.paddle = (self.paddle + MOVES[self.previous]).clip(0, self.side - self.reach)
        before = self.balls.copy()
        rewards = self.play(place).astype(np.float32)
        self.last = self._seen(over, rewards, self.balls < before)
        return self.last

    def restart(self, chosen: Flags) -> Step:
        """Begin new games in the chosen places at once."""
        before = {name: getattr(self, name).copy() for name in self.variables}
        _, place = self._chance()
        self.begin(chosen)
        self.previous = np.where(chosen, 0, self.previous)
        self.play(place)  # which serves the new balls, and must not move the others
        for name, old in before.items():
            setattr(self, name, np.where(_along(chosen, old), getattr(self, name), old))
        stacked = self._stacked(chosen)
        observations = np.where(_along(chosen, stacked), stacked, self.last.observations)
        self.last = self.last.restarted(chosen, observations, self.balls * self.mortal)
        return self.last

    def _chance(self) -> Uniform:
        """This step's uniform numbers, (2, N): a function of how many steps there were, whatever happened in them."""
        block, place = divmod(self.clock, BLOCK)
        self.clock += 1
        numbers: Uniform = chances(self.seed, block, self.first + self.count)[place, :, self.first :]
        return numbers

    def _seen(self, over: Flags, rewards: NDArray[np.float32], lost: Flags) -> Step:
        """The newest step: games that were `over` have begun anew, in others the action brought `rewards` or `lost` a ball."""
        lengths = np.where(over, 0, self.last.lengths + 1)
        terminated = self.balls == 0
        truncated = (lengths >= self.config.max_frames) & ~terminated
        return Step(
            observations=self._stacked(over),
            rewards=rewards,
            terminated=terminated,
            truncated=truncated,
            life_lost=lost & ~(terminated | truncated) & self.mortal,
            started=over,
            returns=np.where(over, 0, self.last.returns) + rewards,
            lengths=lengths,
            lives=self.balls * self.mortal,
        )

    def over_paddle(self, column: Integers) -> Flags:
        """Whether the paddle covers a column, (N,)."""
        return (self.paddle <= column) & (column < self.paddle + self.reach)

    # Showing

    def board(self) -> Bytes:
        """A new picture without paddle and ball, (N, side, side)."""
        return np.full((self.count, self.side, self.side), EMPTY, np.uint8)

    def frame(self) -> Bytes:
        """What there is to see now, in grey values, (N, side, side)."""
        board = self.board()
        board[self.games[:, None], self.bottom, self.paddle[:, None] + np.arange(self.reach)] = PADDLE
        board[self.games, self.row, self.column] = BALL
        return board

    def _stacked(self, over: Flags) -> Bytes:
        observations = np.concatenate([self.last.observations[:, 1:], self.frame()[:, None]], 1)
        observations[over, :-1] = 0
        return observations

    def pictures(self) -> Bytes:
        """What people see now, (N, 14 side, 14 side, 3), with lines between the cells.

        Raises:
            ValueError: the games were made without `colour`.
        """
        if not self.colour:
            raise ValueError("these games were made without colour: make(..., colour=True) shows pictures")
        pictures = COLOURS[self.last.observations[:, -1]].repeat(CELL, 1).repeat(CELL, 2)
        pictures[:, ::CELL] = pictures[:, :, ::CELL] = GRID
        return pictures

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that must be put back to go on as before; random numbers are functions of the seed and the clock."""
        variables = {name: torch.tensor(getattr(self, name)) for name in self.variables}
        last = {name: torch.tensor(array) for name, array in vars(self.last).items()}
        return {"seed": self.seed, "clock": self.clock, "variables": variables, "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; `last` is then the newest step again.

        Raises:
            ValueError: it is the state of another game, number of games or stack.
        """
        shown = tuple(state["last"]["observations"].shape)
        if shown != (self.count, *self.shape):
            raise ValueError(f"the state shows {shown}; these games show {(self.count, *self.shape)}")
        self.seed, self.clock = state["seed"], state["clock"]
        for name in self.variables:
            setattr(self, name, state["variables"][name].numpy().copy())
        self.last = Step(**{name: tensor.numpy().copy() for name, tensor in state["last"].items()})


class Catch(PaddleGames):
    """A ball falls from a random column of the top row, one row a step, and is to be caught.

    It takes 11 steps to the bottom, and the paddle never has more than 9 columns to go. A game lasts 119 steps.
    """

    side, reach, supply, mortal = 12, 3, 10, False

    def play(self, place: Uniform) -> Integers:
        """Let the balls fall; a point for one that comes down on the paddle, minus one for any other."""
        served = self.row == self.bottom
        self.row = np.where(served, 0, self.row + 1)
        self.column = np.where(served, (place * self.side).astype(np.int64), self.column)
        landed = self.row == self.bottom
        self.balls -= landed
        points: Integers = np.where(self.over_paddle(self.column), 1, -1) * landed
        return points


class Bricks(PaddleGames):
    """A ball flies diagonally, one row and one column a step, and turns back at walls, bricks and the paddle.

    What it would enter, a brick or the paddle, turns it back up or down where it is; the brick is gone. At the side walls and
    the ceiling it is turned in passing. A ball is served from a random column below the wall, down to the left or to the right,
    with the paddle back in the middle: 10 steps to get under it, never more than 6 columns to go.

    Where the ball hits the paddle makes no difference, and whoever just keeps it in play takes every brick: from the paddle to
    the ceiling and back it flies 28 columns, a whole tour of the columns is 30, and the two have no common factor but 2, so it
    passes every second column in turn; a brick is two columns wide.
    """

    side, reach, supply, mortal = 16, 4, 3, True
    variables = (*PaddleGames.variables, "across", "down", "bricks")
    wall: ClassVar[Bytes] = np.zeros((16, 8), np.uint8)
    wall[2:5] = np.array(LAYERS)[:, None]
    """Grey values of a whole wall, a column for each pair of the board's."""
    serve: ClassVar[int] = 5
    """The row from which balls are served."""

    across: Integers
    down: Integers
    """Which way each ball flies, 1 or -1, (N,)."""
    bricks: Bytes
    """What is left of each wall, (N, 16, 8)."""

    def reset(self) -> Step:
        """Begin all games from the start of their random numbers; every one has `started`."""
        self.across, self.down = np.ones((2, self.count), np.int64)
        self.bricks = np.zeros((self.count, *self.wall.shape), np.uint8)
        return super().reset()

    def begin(self, over: Flags) -> None:
        """Set up new games; a wall that is gone is put up again with the next ball."""
        super().begin(over)
        self.bricks[over] = 0

    def play(self, place: Uniform) -> Integers:
        """Serve a ball where there is none or no wall is left, and move the others; a point for each brick."""
        cleared = ~self.bricks.any((1, 2))
        self.bricks[cleared] = self.wall
        served = cleared | (self.row == self.bottom)
        self._serve(served, place)
        struck = self._fly(~served)
        self.balls -= self.row == self.bottom
        return struck.astype(np.int64)

    def _serve(self, served: Flags, place: Uniform) -> None:
        column, right = np.divmod((place[served] * 2 * self.side).astype(np.int64), 2)
        self.column[served], self.across[served] = column, 2 * right - 1
        self.row[served], self.down[served], self.paddle[served] = self.serve, 1, (self.side - self.reach) // 2

    def _fly(self, flying: Flags) -> Flags:
        """Move the balls that are `flying`; gives which of them struck a brick."""
        self.across[self.column == 0], self.across[self.column == self.bottom] = 1, -1
        self.down[self.row == 0] = 1
        row, column = self.row + self.down * flying, self.column + self.across * flying
        struck: Flags = self.bricks[self.games, row, column // 2] > 0
        self.bricks[self.games, row, column // 2] = 0
        turned = struck | ((row == self.bottom) & self.over_paddle(column))
        self.down = np.where(turned, -self.down, self.down)
        self.row, self.column = np.where(turned, self.row, row), np.where(turned, self.column, column)
        return struck

    def board(self) -> Bytes:
        """The walls, (N, 16, 16)."""
        return self.bricks.repeat(2, 2)
