"""The replay memory of a DQN: every frame is kept once, as bytes, and put together into observations when it is sampled.

    time row     0        1        2        3        4        5          Row t lies at place t % T of a ring of T rows,
    frame        first    .        .        final    first    .          each of which holds one cell for each of N games.
    started      x        -        -        -        x        -          Row 3 is stored only so that a game that was
    terminal     -        life     -        -        -        -          broken off can bootstrap from what it last showed;
    ended        -        -        x        -        -        -          no action was taken there and it is never sampled.
    playable     x        x        x        -        x        x

A learner's episode ends where a row is `terminal` (there is nothing to bootstrap from: the game is over or a life is
lost) or `ended` (the next row is the game's last). An n-step return stops there, so the last rows of an episode have
shorter returns instead of being dropped, and none reaches into the next episode. A stack reaches back to where the game
`started` and is black before: a lost life does not interrupt it.

Prioritised sampling is the proportional kind of Schaul et al. 2016 (Prioritized Experience Replay, section 3.3).

For speed: the frames of a game lie one after another, so that a stack is one stretch of memory. What a transition is (its return, where it
ends, how far back its stack goes) is worked out once, when its newest row is here. And where the memory is on the CPU, the arithmetic is
numpy's, which spends a microsecond on a few numbers where torch spends three; on a GPU the same lines are torch's.

Where processes play the games in shares, each keeps the frames of its own, nearly all of the bytes, and all that is small of
every game. So all draw the same transitions, and each puts together those of its own games.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.config import Count, Fraction, Settings, UserError
from lab.distributed import World

log = logging.getLogger("dreamplay")

Array = Any
"""An array of numpy where the memory is on the CPU, a tensor where it is on a GPU."""

Draw = Callable[[int], Tensor]
"""Maps an attempt 0, 1, 2, ... to numbers uniform in [0, 1), float32 (batch, 2); the same numbers whenever it is asked again."""

KINDS = {
    "frames": torch.uint8,
    "actions": torch.uint8,
    "rewards": torch.float32,
    "started": torch.bool,
    "terminal": torch.bool,
    "ended": torch.bool,
    "playable": torch.bool,
}
"""The arrays of a memory. All but the frames hold one number for each row and game."""

OUTCOMES = 5
"""Numbers that are worked out for each transition; see `Replay._outcome`."""

ROWS = 8192
"""Rows worked out at a time when a memory was put back."""

SMALLEST_ERROR = 1e-6
"""Added to every error, so that what was predicted exactly is still seen again (epsilon of Schaul et al., section 3.3)."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(Settings):
    """How much is remembered, and what of it is seen again."""

    capacity: Count = 1_000_000
    """Transitions that are kept, of all games together."""
    prioritised: bool = False
    """Sample in proportion to the error that a transition last had (Schaul et al. 2016), instead of uniformly."""
    alpha: Fraction = 0.5
    """Prioritised: exponent of the priorities; 0 is uniform."""
    beta: Fraction = 0.4
    """Prioritised: exponent of the importance weights at the start of training, from which it climbs to 1."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the frames live: 7 GB per million of 84 x 84 pixels."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """A batch of n-step transitions, on the memory's device as it comes."""

    observations: Tensor
    """uint8 (B, stack, H, W), the newest frame last."""
    actions: Tensor
    """int64 (B,)."""
    returns: Tensor
    """Discounted sum of the rewards of m <= n steps, float32 (B,)."""
    next_observations: Tensor
    """What was seen m steps later, uint8 (B, stack, H, W)."""
    discounts: Tensor
    """The weight of the value of what was seen later: discount^m, or 0 after a terminal, float32 (B,)."""
    weights: Tensor
    """Importance weights, at most 1, float32 (B,); ones where sampling is uniform."""
    times: Tensor
    """Absolute time rows, int64 (B,)."""
    games: Tensor
    """Which of the N games, int64 (B,)."""

    def to(self, device: torch.device | str) -> Transitions:
        """The same batch on another device."""
        return Transitions(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


# Room


def needed(config: ReplayConfig, games: int, shape: tuple[int, int, int], processes: int = 1) -> int:
    """Bytes that a memory of observations of `shape` (stack, H, W) takes on the device of each process that shares the games."""
    cells, pixels = config.capacity // games * games, math.prod(shape[1:])
    numbers = sum(kind.itemsize for name, kind in KINDS.items() if name != "frames") + OUTCOMES * torch.float32.itemsize
    tree = 2 * _leaves(cells) * torch.float64.itemsize if config.prioritised else 0
    return (cells // processes + 1) * pixels + cells * numbers + tree


def check_room(config: ReplayConfig, games: int, shape: tuple[int, int, int], world: World | None = None) -> None:
    """Log how much a memory will take, before anything is allocated.

    Memory that nobody has written to is not really taken yet, so without this a run would die hours later.

    Raises:
        UserError: there is no such device, or not enough room on it; says how much there is room for.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("replay.device: 'cuda' was asked for and torch finds no GPU; use 'cpu'")
    world = world or World()
    each = f" in each of {world.size} processes" if world.size > 1 else ""
    need, free = needed(config, games, shape, world.size), _free_for_each(config.device, world)
    takes = f"{config.capacity:,} transitions take {_size(need)}{each}"
    log.info("replay memory: %s on %s", takes, config.device)
    if free is not None and need > free:
        raise UserError(f"replay.capacity: {takes} and {_size(free)} of memory are free{each}; {_advice(config, free / need)}")


def _free_for_each(device: str, world: World) -> int | None:
    """Bytes that every process can still allocate, or None where nobody says; a machine's memory is free for all its processes together."""
    free = free_memory(device)
    shares = world.gather(free // world.here if free is not None and device == "cpu" else free)
    return min((share for share in shares if share is not None), default=None)


def _advice(config: ReplayConfig, part: float) -> str:
    """What to do where only a `part` of the memory would fit: a round number, with a tenth of the room left for others."""
    fitting = int(0.9 * part * config.capacity)
    digit = 10 ** (len(str(fitting)) - 1)
    return f"try --replay.capacity {fitting // digit * digit}" if fitting >= 1000 else "end other programs that use it"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def free_memory(device: str, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can still be allocated on a device, or None where nobody says.

    On Linux that is the least of what the machine has and what each control group around this process (a container, a
    batch job) still allows, of either version of control groups.
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    kilobytes = _figures(proc / "meminfo").get("MemAvailable:")
    figures = [*([kilobytes * 1024] if kilobytes is not None else []), *map(_left, _control_groups(proc, groups))]
    return min((figure for figure in figures if figure is not None), default=None)


def _control_groups(proc: Path, groups: Path) -> Iterator[Path]:
    """The folders of the groups of this process, innermost first; a container often shows only the outer ones."""
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = groups / "memory" if controllers else groups
            place = top / name.lstrip("/")
            yield from (folder for folder in (place, *place.parents) if folder.is_relative_to(top))


def _left(group: Path) -> int | None:
    """What a group still allows; files that the kernel merely remembers make room when it is wanted."""
    for limit, usage, prefix in (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")):
        most, used = _text(group / limit), _text(group / usage)
        if most.isdigit() and used.isdigit():
            stat = _figures(group / "memory.stat")
            cached = sum(stat.get(f"{prefix}{state}_file", 0) for state in ("active", "inactive"))
            return max(0, int(most) - max(0, int(used) - cached))
    return None


def _figures(path: Path) -> dict[str, int]:
    """The lines `name number ...` of a file of the kernel."""
    words = [line.split() for line in _text(path).splitlines()]
    return {pair[0]: int(pair[1]) for pair in words if len(pair) > 1 and pair[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# Priorities


def _leaves(size: int) -> int:
    """The power of two that holds `size` leaves."""
    return 1 << max(1, (size - 1).bit_length())


class SumTree:
    """Masses of `size` leaves, of which a leaf is found by the running sum of the masses, in a number of steps ~ log(size).

    A binary tree in one float64 tensor: the root is node 1, the children of node k are 2k and 2k + 1, the leaves come
    last. Every node is the sum of its two children *now*, never adjusted by differences; so no rounding piles up, and a
    tree that is built from the same masses is the same to the last bit.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size, self.offset = size, _leaves(size)
        self.nodes = torch.zeros(2 * self.offset, dtype=torch.float64, device=device)
        self._pairs = self.nodes.view(-1, 2)  # row k: the children of node k

    @property
    def total(self) -> Tensor:
        """The sum of all masses, float64 ()."""
        return self.nodes[1]

    @property
    def masses(self) -> Tensor:
        """The masses of all leaves, a view, float64 (size,)."""
        return self.nodes[self.offset : self.offset + self.size]

    def set(self, leaves: Tensor, masses: Tensor) -> None:
        """Give leaves int64 (K,) new masses float64 (K,); of several for one leaf the largest counts, on every device."""
        nodes = leaves + self.offset
        self.nodes.scatter_reduce_(0, nodes, masses, "amax", include_self=False)
        for _ in range(self.offset.bit_length() - 1):
            nodes = nodes >> 1
            left, right = self._pairs.index_select(0, nodes).unbind(1)
            self.nodes.index_copy_(0, nodes, left + right)

    def fill(self, first: int, masses: Tensor | float, count: int) -> None:
        """Give `count` leaves in a row new masses; much cheaper than `set`, as so few nodes stand above them."""
        low, high = first + self.offset, first + self.offset + count
        self.nodes[low:high] = masses
        while low > 1:
            low, high = low >> 1, ((high - 1) >> 1) + 1
            left, right = self._pairs[low:high].unbind(1)
            torch.add(left, right, out=self.nodes[low:high])

    def find(self, values: Tensor) -> Tensor:
        """The leaves int64 (K,) at which the running sum of the masses first exceeds `values`, float64 (K,) in [0, total)."""
        nodes, values = torch.ones_like(values, dtype=torch.int64), values.clone()
        for _ in range(self.offset.bit_length() - 1):
            left, right = self._pairs.index_select(0, nodes).unbind(1)
            # Rounding may leave a value at or above the mass of its node; a branch without any mass is still never taken.
            turn = (values >= left) & (right > 0)
            values.sub_(left * turn)
            nodes = 2 * nodes + turn
        return nodes - self.offset


# Memory


def zeros(size: tuple[int, ...], kind: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take memory only where something is written: torch's would write all of them first, 7 GB in three seconds."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=kind, device=device)
    return torch.from_numpy(np.zeros(math.prod(size) * kind.itemsize, np.uint8)).view(kind).view(size)


class Replay:
    """The newest transitions of N games that are played side by side.

    Args:
        games: N.
        shape: of an observation: stack, H, W.
        n_step: n, the largest number of rewards in a return.
        discount: of the value of a reward one step later.
        world: the processes that play the games, each as many; one process if not given.

    Raises:
        UserError: a capacity too small for the stacks and returns of so many games.
    """

    math_of: ClassVar[Mapping[str, Any]] = {"cpu": np, "cuda": torch}
    """Whose arithmetic finds the cells, by device."""

    def __init__(
        self, config: ReplayConfig, games: int, shape: tuple[int, int, int], n_step: int, discount: float, world: World | None = None
    ) -> None:
        self.config, self.games, self.shape, self.n_step, self.world = config, games, shape, n_step, world or World()
        self.own = self.world.part(games, "games")
        """The games whose frames are here."""
        self.rows = config.capacity // games
        """T, the rows that are held."""
        self.written = 0
        """Rows that were ever appended; the next one has this time."""
        self.sampleable = 0
        """Transitions that may be sampled now."""
        if self.rows < (least := shape[0] + n_step + 2):
            raise UserError(f"replay.capacity: {config.capacity} is too small for {games} games; give at least {least * games}")
        self.device = torch.device(config.device)
        self._math = self.math_of[config.device]
        self._allocate()
        self._lags = self._array(torch.arange(1 - shape[0], 2 if n_step == 1 else 1))
        self._steps = self._array(torch.arange(n_step))
        self._powers = self._array(torch.tensor([discount**step for step in range(n_step + 1)], dtype=torch.float64))
        frames = self._rows["frames"]  # not of `self`: a memory in a cycle would be freed by the collector alone, gigabytes too late
        self._all_frames = self.world.jointly(lambda first, last: _ring(frames, first, last))

    def _allocate(self) -> None:
        cells = self.rows * self.games
        self._black = self.rows * len(self.own)
        """One frame more than there are cells stays black for ever: stacks point at it from before a game's first frame."""
        self._frames = zeros((self._black + 1, *self.shape[1:]), torch.uint8, self.device)
        flat = {name: zeros((cells,), kind, self.device) for name, kind in KINDS.items() if name != "frames"}
        own = self._frames[:-1].view(len(self.own), self.rows, *self.shape[1:])
        self._rows = {"frames": own.transpose(0, 1), **{name: cell.view(self.rows, self.games) for name, cell in flat.items()}}
        self._cells = {name: self._array(cell) for name, cell in flat.items()}
        self._outcomes = self._array(zeros((cells, OUTCOMES), torch.float32, self.device))
        """What `_outcome` gave for every cell that may be sampled, by columns."""
        self.tree = SumTree(cells, self.device) if self.config.prioritised else None
        self.largest = torch.ones((), dtype=torch.float64, device=self.device)
        """The largest priority so far, which new transitions get."""

    def _array(self, tensor: Tensor) -> Array:
        return tensor.numpy() if self._math is np else tensor.to(self.device)

    @property
    def oldest(self) -> int:
        """The time of the oldest row that is still held."""
        return max(0, self.written - self.rows)

    @property
    def first(self) -> int:
        """The oldest time that may be sampled: its whole stack must still be held."""
        return max(0, self.written - self.rows + self.shape[0] - 1)

    @property
    def filled(self) -> int:
        """Times that may be sampled, from `first` on: each needs n newer rows."""
        return max(0, self.written - self.n_step - self.first)

    # Writing

    def extend(self, rows: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """Remember several time rows, each as `append` takes it, of this process's games; what is small of the others' comes to it here."""
        names = [name for name in KINDS if name != "frames"]
        small = torch.tensor(np.array([[row[name] for name in names] for row in rows], np.float32))  # which holds all of it exactly
        for row, known in zip(rows, self.world.beside(small).numpy()):
            self.append(frames=row["frames"], **dict(zip(names, known)))

    def append(
        self,
        *,
        frames: NDArray[np.uint8],
        actions: NDArray[np.integer[Any]],
        rewards: NDArray[np.float32],
        started: NDArray[np.bool_],
        terminal: NDArray[np.bool_],
        ended: NDArray[np.bool_],
        playable: NDArray[np.bool_],
    ) -> None:
        """Remember one time row of every game.

        Args:
            frames: the newest frame of each game that is this process's, uint8 (M, H, W).
            actions: what was then done, 0 to 255 (N,).
            rewards: what that brought, float32 (N,).
            started: the frame is the first of a game (N,).
            terminal: after this action there is nothing to bootstrap from; the game itself may go on (N,).
            ended: after this action the game is over or was broken off; the next row is its last frame (N,).
            playable: an action was really taken; false for the last frame of a game (N,).
        """
        self._retire(self.written - self.rows + self.shape[0] - 1)
        row = (frames, actions, rewards, started, terminal, ended, playable)
        for kept, values in zip(self._rows.values(), row, strict=True):
            # PyTorch warns of arrays that are read-only, as observations may well be.
            kept[self.written % self.rows].copy_(torch.as_tensor(np.require(values, requirements="W")))
        self.written += 1
        self._admit(self.written - 1 - self.n_step)

    def _admit(self, time: int) -> None:
        """Let a row be sampled, now that all its newer rows are here."""
        if time >= 0:
            row = time % self.rows
            self._work_out(time, time + 1)
            playable = self._rows["playable"][row]
            self.sampleable += int(playable.sum())
            if self.tree:
                self.tree.fill(row * self.games, playable * self.largest, self.games)

    def _work_out(self, first: int, last: int) -> None:
        """Put down the outcomes of times `first .. last` (without `last`) of all games."""
        times = self._array(torch.arange(first, last).repeat_interleave(self.games))
        games = self._array(torch.arange(self.games).repeat(last - first))
        outcome = self._math.stack(self._outcome(times, games), 1)
        self._outcomes[self._index(times, games)] = self._math.asarray(outcome, dtype=self._math.float32)

    def _outcome(self, times: Array, games: Array) -> tuple[Array, ...]:
        """Of transitions that begin at times (B,) of games (B,), (B,) each: what was done, the steps until the return stops, the return,
        its discount, and how many older frames of its stack are of the same game."""
        index = self._index(times[:, None] + self._steps, games[:, None])
        terminal = self._cells["terminal"].take(index)
        over = terminal | self._cells["ended"].take(index)
        within = self._math.cumsum(over, 1) <= over  # no episode was over before this step
        returns = (self._cells["rewards"].take(index) * within * self._powers[:-1]).sum(1)
        taken = within.sum(1)
        discounts = self._powers.take(taken) * ~(terminal & within).any(1)
        return self._cells["actions"].take(index[:, 0]), taken, returns, discounts, self._older(times, games)

    def _older(self, times: Array, games: Array) -> Array:
        """How many frames before times (B,), at most `stack` - 1, are of the same game (B,)."""
        older, alike = 0 * times, True
        for lag in range(self.shape[0] - 1):
            alike = ~self._cells["started"].take(self._index(times - lag, games)) & (times > lag) & alike
            older = older + alike
        return older

    def _retire(self, time: int) -> None:
        """Let a row be sampled no longer, as its oldest frame is about to be overwritten."""
        if time >= 0:
            row = time % self.rows
            self.sampleable -= int(self._rows["playable"][row].sum())
            if self.tree:
                self.tree.fill(row * self.games, 0.0, self.games)

    def reprioritise(self, batch: Transitions, errors: Tensor) -> None:
        """Set the priorities of a batch by its errors, of either sign (B,), on any device; where sampling is uniform, do nothing.

        An error that is not finite sets none. What may no longer be sampled keeps no priority. Of a transition that is in the batch
        twice the larger error counts. Processes tell each other of what they drew: all have all priorities.
        """
        if self.tree is None:
            return
        drawn = torch.stack([batch.times.double(), batch.games.double(), errors.detach().double()])
        times, games, errors = self.world.joined(drawn).to(self.device)
        times, leaves = times.long(), self._index(times.long(), games.long())
        masses = (errors.abs() + SMALLEST_ERROR) ** self.config.alpha
        present = self.tree.masses.index_select(0, leaves)
        live = (present > 0) & (times >= self.first) & errors.isfinite()
        self.tree.set(leaves, torch.where(live, masses, present))
        self.largest = torch.maximum(self.largest, torch.where(live, masses, 0).max())

    # Sampling

    def sample(self, batch: int, draw: Draw, beta: float = 1.0) -> Transitions:
        """Transitions drawn with replacement from all that may be sampled.

        Uniformly, or prioritised: one from each of `batch` equal parts of the total mass, with importance weights
        (sampleable * P(i))^-beta over the largest of the batch (Schaul et al. 2016, section 3.4 and algorithm 1).

        All processes draw the same ones; each has those of its own games.

        Args:
            draw: where uniform, the first column picks the time and the second the game, and an attempt more is made for
                those that hit the last frame of a game; where prioritised, the first column of attempt 0 picks.

        Raises:
            ValueError: nothing may be sampled yet (see `sampleable`), or numbers of another shape were drawn.
        """
        if not self.sampleable:
            raise ValueError(f"nothing can be sampled from {self.written} rows with returns of {self.n_step} steps; see Replay.sampleable")
        if self.tree is None:
            return self._gather(*self._uniform(batch, draw), torch.ones(batch, device=self.device))
        leaves = self._stratified(self.tree, _drawn(batch, draw, 0)[:, 0].to(self.device, torch.float64))
        times = (self.written - 1) - (self.written - 1 - leaves // self.games) % self.rows
        masses = self.tree.masses.index_select(0, leaves)
        weights = (masses.min() / masses) ** beta  # the count and the total mass are the same above and below the line
        return self.gather(times, leaves % self.games, weights.float())

    def _uniform(self, batch: int, draw: Draw) -> tuple[Array, Array]:
        """Times and games (B,), drawn again where no action was taken: every transition is as likely as any other."""
        times, games = self._place(_drawn(batch, draw, 0))
        attempt = 0
        while not (playable := self._cells["playable"].take(self._index(times, games))).all():
            attempt += 1
            other_times, other_games = self._place(_drawn(batch, draw, attempt))
            times, games = self._math.where(playable, times, other_times), self._math.where(playable, games, other_games)
        return times, games

    def _place(self, uniforms: Tensor) -> tuple[Array, Array]:
        """Times and games (B,) for numbers (B, 2)."""
        numbers = self._array(uniforms.double())
        early, which = numbers[:, 0], numbers[:, 1] * self.games
        games = self._whole(which)
        # A float32 has only 2^24 values, of which a million rows would get 16 or 17 each: what is left of the other goes on.
        fine = early + (which - games) * 2**-24
        return self._whole(fine * self.filled) + self.first, games

    def _whole(self, numbers: Array) -> Array:
        """Numbers without what stands after the point, int64."""
        return self._math.asarray(numbers, dtype=self._math.int64)

    def _stratified(self, tree: SumTree, uniforms: Tensor) -> Tensor:
        strata = torch.arange(len(uniforms), device=self.device)
        return tree.find((strata + uniforms) / len(uniforms) * tree.total)

    def gather(self, times: Tensor, games: Tensor, weights: Tensor | None = None) -> Transitions:
        """The transitions that begin at times int64 (B,), within `first .. first + filled`, of games int64 (B,); those of its own games."""
        weights = torch.ones(len(times), device=self.device) if weights is None else weights
        return self._gather(self._array(times), self._array(games), weights)

    def _gather(self, times: Array, games: Array, weights: Tensor) -> Transitions:
        if self.world.size > 1:
            own = (games >= self.own.start) & (games < self.own.stop)
            times, games, weights = times[own], games[own], weights[torch.as_tensor(own)]
        outcome = self._outcomes[self._index(times, games)]
        observations, next_observations = self._stacks(times, games, self._whole(outcome[:, 1]), outcome[:, 4])
        actions, _, returns, discounts, _ = torch.as_tensor(outcome).unbind(1)
        at, of = torch.as_tensor(times), torch.as_tensor(games)
        return Transitions(observations, actions.long(), returns, next_observations, discounts, weights, at, of)

    def _stacks(self, times: Array, games: Array, taken: Array, older: Array) -> tuple[Tensor, Tensor]:
        """Observations uint8 (B, stack, H, W) at times (B,), and those `taken` (B,) steps later, without weight if a game began since."""
        frames = self._seen(times, games, older)
        if self.n_step == 1:  # both stacks show the same frames but for one: they are views of the same bytes
            return frames[:, :-1], frames[:, 1:]
        return frames, self._seen(times + taken, games, older + taken)

    def _seen(self, times: Array, games: Array, older: Array) -> Tensor:
        """Frames uint8 (B, lags, H, W) up to times (B,), black where they are more than `older` (B,) before: whole frames are copied."""
        black = self._lags < -older[:, None]
        index = (games - self.own.start)[:, None] * self.rows + (times[:, None] + self._lags) % self.rows
        index = torch.as_tensor(self._math.where(black, self._black, index))
        return self._frames.index_select(0, index.flatten()).view(*index.shape, *self.shape[1:])

    def _index(self, times: Array, games: Array) -> Array:
        """Where cells lie in the flat arrays, but that of the frames."""
        return times % self.rows * self.games + games

    # Saving

    def read(self, first: int, last: int) -> dict[str, Tensor]:
        """Copies on the CPU of rows `first .. last` (without `last`) of every array, (last - first, N, ...).

        Raises:
            ValueError: rows that are not held.
        """
        if not self.oldest <= first <= last <= self.written:
            raise ValueError(f"rows {first} to {last} were asked for and {self.oldest} to {self.written} are held")
        frames = self._all_frames(first, last)
        small = {name: _ring(self._rows[name], first, last) for name in KINDS if name != "frames"}
        return {"frames": frames[0] if len(frames) == 1 else torch.cat(frames, 1), **small}

    def write(self, first: int, rows: Mapping[str, Tensor]) -> None:
        """Put back what `read` gave, from time `first` on; `load_state_dict` must follow when all is written."""
        places = torch.arange(first, first + len(rows["frames"]), device=self.device) % self.rows
        for name, kept in self._rows.items():
            columns = rows[name][:, self.own.start : self.own.stop] if name == "frames" else rows[name]
            kept.index_copy_(0, places, columns.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        """All that is not in the rows: their number, and the priorities."""
        if self.tree is None:
            return {"written": self.written}
        return {"written": self.written, "masses": self.tree.masses.clone(), "largest": self.largest.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, after the rows were put back by `write`."""
        self.written = state["written"]
        places = torch.arange(self.first, self.first + self.filled, device=self.device) % self.rows
        self.sampleable = int(self._rows["playable"].index_select(0, places).sum())
        for start in range(self.first, self.first + self.filled, ROWS):
            self._work_out(start, min(start + ROWS, self.first + self.filled))
        if self.tree:
            self.tree.fill(0, state["masses"].to(self.device), self.tree.size)
            self.largest = state["largest"].to(self.device, copy=True)


def _ring(rows: Tensor, first: int, last: int) -> Tensor:
    """Copies on the CPU of the rows of times `first .. last` (without `last`) of an array that goes round."""
    return rows.index_select(0, torch.arange(first, last, device=rows.device) % len(rows)).cpu()


def _drawn(batch: int, draw: Draw, attempt: int) -> Tensor:
    uniforms = draw(attempt)
    if uniforms.shape != (batch, 2):
        raise ValueError(f"draw({attempt}) gave numbers of shape {tuple(uniforms.shape)}; expected ({batch}, 2)")
    return uniforms
