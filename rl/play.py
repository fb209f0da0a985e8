"""Agents at play, to be looked at: the game, what the agent sees of it, and what it thinks each action is worth.

Playing     a game, an action at a time
moments     an endless stream of what there is to see, one moment an action
compose     a picture of one moment
film        pictures of whole games, written as a video (record: of any moments)
saliency    which parts of the observation the agent's values hang on (Greydanus et al. 2018)
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from envs import games
from envs.games import Bytes, Floats, GameConfig
from lab import seeding
from lab.media import Film
from rl.agent import Agent, Policy, choose

EMULATED, SMALL_PACE = 60, 8
"""Frames per second of an Atari console, and actions per second at which people can follow the small games."""
FASTEST = {".gif": 25, ".mp4": 60}
"""Most pictures per second of a video; of a faster game some are left out."""
PAUSE = 1.0
"""Seconds for which the end of a game is shown."""


# Playing


@dataclass(frozen=True)
class Moment:
    """A state of the game and the action that the agent chose in it; at the end of a game, the state that nothing follows."""

    picture: Bytes
    """What people see, (height, width, 3)."""
    observation: Bytes
    """What the agent sees, (stack, H, W), the newest frame last."""
    values: Floats
    """What it thinks each action is worth, (actions,)."""
    action: int
    """The action it chose, a position in `values`; at the end of a game nobody takes it."""
    score: float
    """Points of the game so far, never clipped."""
    step: int
    """Actions taken in the game so far."""
    lives: int
    """Lives left; 0 where the game does not count them."""
    ended: bool
    """The game is over, or was broken off for its length."""
    game: int
    """The number of the game, from 1."""


class Playing:
    """A game at play, an action at a time, by whoever takes it.

    Args:
        seed: decides the games and the random actions.
        first: the number of the first game.
    """

    def __init__(self, config: GameConfig, seed: int, first: int = 1) -> None:
        self.world = games.make(config, 1, seeding.derive(seed, "play", 0), colour=True)
        self.draw = seeding.generator(seed, "play/act", 0)
        self.step, self.game = self.world.reset(), first

    def look(self, agent: Agent, policy: Policy, epsilon: float) -> Moment:
        """What there is to see now, and the action that the agent chooses; see `rl.agent.choose` for how."""
        values = agent.values(torch.from_numpy(self.step.observations))
        action = choose(values, policy, epsilon, self.draw)
        step = self.step
        told = float(step.returns[0]), int(step.lengths[0]), int(step.lives[0]), bool(step.ended[0])
        return Moment(self.world.pictures()[0], step.observations[0], values[0].numpy(), int(action), *told, self.game)

    def act(self, action: int) -> None:
        """Take an action, the agent's or another; after the end of a game any begins the next one."""
        self.game += int(self.step.ended[0])
        self.step = self.world.step(np.array([action]))

    def close(self) -> None:
        """Let go of the game."""
        self.world.close()


def moments(
    agent: Agent, config: GameConfig, *, policy: Policy, epsilon: float, seed: int, first: int = 1
) -> Generator[Moment, None, None]:
    """Play one game after another, for ever, in constant memory.

    Args:
        policy: how actions follow from values, and `epsilon` the share of random ones; see `rl.agent.choose`.
        seed: decides the games and the random actions.
        first: the number of the first game.
    """
    with contextlib.closing(Playing(config, seed, first)) as playing:
        while True:
            moment = playing.look(agent, policy, epsilon)
            yield moment
            playing.act(moment.action)


@functools.lru_cache(maxsize=8)
def action_names(config: GameConfig) -> tuple[str, ...]:
    """What the actions of a game are called, in order."""
    world = games.make(config, 1, 0)
    world.close()
    return world.actions


def pace(config: GameConfig) -> float:
    """Actions per second at which people play the game."""
    return SMALL_PACE if config.rom in games.SMALL else EMULATED / config.frame_skip


def game_title(config: GameConfig) -> str:
    """The game's name as people write it: `Ms Pacman`."""
    return config.rom.replace("_", " ").title()


# A picture of a moment

GROUND, TRACK, FILL = (15, 17, 25), (32, 36, 51), (62, 88, 146)
CHOSEN_TRACK, CHOSEN = (78, 46, 20), (205, 105, 20)
BRIGHT, DIM = (240, 242, 247), (140, 149, 172)

WARM = {0: (190, 0, 40), 90: (240, 70, 10), 180: (255, 180, 40), 255: (255, 250, 200)}
"""Colours of saliency, from none (where it is transparent) to most: red, orange, yellow, white."""
HEAT = np.stack([np.interp(np.arange(256), list(WARM), channel) for channel in zip(*WARM.values())], 1).astype(np.uint8)
OPACITY = 0.8
"""Of the most salient place."""

Place = tuple[float, float, float, float]
"""Left, top, right and bottom."""


def compose(moment: Moment, names: Sequence[str], meaning: str, title: str, saliency: Floats | None = None, height: int = 480) -> Bytes:
    """One picture of a moment: at the left the game, at the right its score, what the agent sees, and its values.

    The bar of a Q-value goes from the least to the greatest one of the moment, that of a probability from 0 to 1; the
    chosen action stands out. All moments of a game make pictures of one size, even in height and width, uint8 (H, W, 3).

    Args:
        names: of the actions.
        meaning: of the values, as `Agent.meaning` says it.
        title: a line above everything, cut where there is no room for more.
        saliency: (H, W) in [0, 1], of any size, laid over the game.
        height: of the picture, pixels; everything in it is scaled along.
    """
    rows, columns = moment.picture.shape[:2]
    stage = _stage(rows / columns, len(moment.observation), tuple(names), meaning, title, height)
    return stage.show(moment, saliency)


class Pen:
    """Draws on a picture whose lengths are told in 480ths of its height."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture, self.unit = picture, picture.height / 480
        self.draw = ImageDraw.Draw(picture)

    def write(self, text: str, left: float, middle: float, size: float, colour: tuple[int, int, int], anchor: str = "lm") -> None:
        """A line of text; `anchor` says what of it stands at the place, as Pillow has it."""
        self.draw.text((left * self.unit, middle * self.unit), text, colour, self.font(size), anchor)

    def width(self, text: str, size: float) -> float:
        """How wide a line of text is."""
        return self.font(size).getlength(text) / self.unit

    def font(self, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """Pillow's own font, which is everywhere the same."""
        return _font(max(1, round(size * self.unit)))

    def fill(self, place: Place, colour: tuple[int, int, int]) -> None:
        """A rectangle of one colour."""
        left, top, right, bottom = (round(edge * self.unit) for edge in place)
        if right > left and bottom > top:
            self.picture.paste(colour, (left, top, right, bottom))

    def show(self, picture: Image.Image, place: Place) -> None:
        """A picture, scaled to a place."""
        left, top, right, bottom = (round(edge * self.unit) for edge in place)
        self.picture.paste(enlarged(picture, (right - left, bottom - top)), (left, top))


class Stage:
    """What all the pictures of a game have in common, drawn once, and the places of what changes.

    Args:
        slant: height of the game's picture over its width.
        frames: that the agent sees at once, of which the newest four are shown.
    """

    def __init__(self, slant: float, frames: int, names: tuple[str, ...], meaning: str, title: str, height: int) -> None:
        self.size = even(height / slant), even(height)
        self.unit, self.probable, self.shown = self.size[1] / 480, meaning == "probability", min(frames, 4)
        self.left = self.size[0] / self.unit + 24
        self.names, self.bars = [spaced(name) for name in names], self._bars(len(names))
        self.background = Image.new("RGB", (self.size[0] + even(408 * self.unit), self.size[1]), GROUND)
        self._label(Pen(self.background), title)

    def _bars(self, count: int) -> list[Place]:
        """The place of each action: one below the other, or in two columns where they are many."""
        columns = 1 if count <= 9 else 2
        rows = -(-count // columns)
        pitch, width = min(40, 198 / rows), (360 - 10 * (columns - 1)) / columns
        corners = [(self.left + (width + 10) * (index // rows), 269 + pitch * (index % rows)) for index in range(count)]
        return [(left, top, left + width, top + pitch - 3) for left, top in corners]

    def _frame(self, index: int) -> Place:
        left, top = self.left + 92 * index, 137
        return left, top, left + 84, top + 84

    def _label(self, pen: Pen, title: str) -> None:
        """What never changes."""
        pen.write(shortened(title, lambda text: pen.width(text, 15) <= 360), self.left, 27, 15, DIM)
        pen.write("What the agent sees", self.left, 125, 12, DIM)
        pen.write("Probability of each action" if self.probable else "Q-value of each action", self.left, 257, 12, DIM)
        for index in range(self.shown):
            left, _, right, bottom = self._frame(index)
            age = self.shown - 1 - index
            pen.write(f"t - {age}" if age else "t", (left + right) / 2, bottom + 10, 11, DIM, "mm")
        for place in self.bars:
            pen.fill(place, TRACK)

    # What changes

    def show(self, moment: Moment, heat: Floats | None) -> Bytes:
        """The picture of a moment, uint8 (H, W, 3)."""
        pen = Pen(self.background.copy())
        self._game(pen, moment, heat)
        self._score(pen, moment)
        for index, frame in enumerate(moment.observation[-self.shown :]):
            pen.show(Image.fromarray(frame), self._frame(index))
        self._values(pen, moment)
        return np.array(pen.picture)

    def _game(self, pen: Pen, moment: Moment, heat: Floats | None) -> None:
        """The game, under what is laid over it."""
        picture = enlarged(Image.fromarray(moment.picture), self.size)
        if heat is not None:
            picture = warmed(picture, heat)
        if moment.ended:
            picture = Image.blend(picture, Image.new("RGB", self.size, GROUND), 0.6)
        pen.picture.paste(picture)
        if moment.ended:
            pen.write("Game over", self.size[0] / self.unit / 2, 240, 34, BRIGHT, "mm")

    def _score(self, pen: Pen, moment: Moment) -> None:
        """The score, as large as there is room for, and three numbers at its right."""
        score = points(moment.score)
        size = next((size for size in (46, 38, 30) if pen.width(score, size) < 180), 24)
        pen.write("score", self.left, 56, 12, DIM)
        pen.write(score, self.left - 1, 99, size, BRIGHT, "ls")
        told = {"game": f"{moment.game:,}", "lives": str(moment.lives or "-"), "step": f"{moment.step:,}"}
        for right, (name, value) in zip((226, 276, 360), told.items(), strict=True):
            pen.write(name, self.left + right, 56, 12, DIM, "rm")
            pen.write(value, self.left + right, 99, 20, BRIGHT, "rs")

    def _values(self, pen: Pen, moment: Moment) -> None:
        """A bar for each action, its name and value written over it."""
        parts, texts = self._parts(moment.values), written(moment.values, self.probable)
        for index, (left, top, right, bottom) in enumerate(self.bars):
            chosen = index == moment.action and not moment.ended
            if chosen:
                pen.fill((left, top, right, bottom), CHOSEN_TRACK)
            pen.fill((left, top, left + parts[index] * (right - left), bottom), CHOSEN if chosen else FILL)
            middle, size = (top + bottom) / 2, 12 if bottom - top < 24 else 15
            pen.write(self.names[index], left + 12, middle, size, BRIGHT)
            pen.write(texts[index], right - 10, middle, size, BRIGHT, "rm")

    def _parts(self, values: Floats) -> Floats:
        """How much of each bar is filled, 0 to 1."""
        finite = np.nan_to_num(values).astype(np.float64)
        if self.probable:
            return finite.clip(0, 1)
        # Where all are about the same, their last digits must not be blown up into bars that jump about.
        span = max(np.ptp(finite), 1e-3 * abs(finite).max(), 1e-9)
        parts: Floats = 0.03 + 0.97 * (finite - finite.min()) / span
        return parts


_stage = functools.lru_cache(maxsize=8)(Stage)


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def even(length: float) -> int:
    """The nearest even number, since H.264 shares a colour among 2 x 2 pixels."""
    return max(2, 2 * round(length / 2))


def enlarged(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture at another width and height: pixels stay square-edged, and all are equally large."""
    times = -(-size[0] // picture.width), -(-size[1] // picture.height)
    whole = picture.resize((picture.width * times[0], picture.height * times[1]), Image.Resampling.NEAREST)
    return whole if whole.size == size else whole.resize(size, Image.Resampling.BOX)


def warmed(picture: Image.Image, heat: Floats) -> Image.Image:
    """A picture with `heat` (H, W) in [0, 1] laid over it."""
    levels = Image.fromarray((255 * heat).round().astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    colours = Image.merge("RGB", [levels.point(list(channel)) for channel in HEAT.T])
    return Image.composite(colours, picture, levels.point([round(OPACITY * level) for level in range(256)]))


def spaced(name: str) -> str:
    """The name of an action as people write it: `down right fire` for DOWNRIGHTFIRE."""
    return re.sub("(?<=.)(LEFT|RIGHT|FIRE)", r" \1", name).lower()


def shortened(text: str, fits: Callable[[str], bool]) -> str:
    """A text, cut until it fits."""
    if fits(text):
        return text
    return next((cut for end in range(len(text) - 1, 0, -1) if fits(cut := text[:end].rstrip() + "…")), "")


def points(score: float) -> str:
    """A score as people write it: `1,732`, or `-0.50`."""
    return f"{score:,.{0 if float(score).is_integer() else 2}f}"


def written(values: Floats, probable: bool) -> list[str]:
    """Values as texts of about the same length: probabilities with three decimals, others with a sign and four digits."""
    if probable:
        return [f"{value:.3f}" for value in values]
    greatest = float(np.nan_to_num(abs(values)).max())
    shape = "+.2e" if greatest >= 1e6 else f"+,.{3 - sum(greatest >= bound for bound in (10, 100, 1000))}f"
    return [f"{value:{shape}}" if np.isfinite(value) else str(value) for value in values]


# Videos


@dataclass(frozen=True)
class Shown:
    """A game that a video shows."""

    score: float
    """Points, never clipped; so far, if it was not finished."""
    length: int
    """Actions."""
    finished: bool
    """It is shown to its end."""


def film(
    agent: Agent,
    config: GameConfig,
    path: Path,
    *,
    policy: Policy,
    epsilon: float,
    seed: int,
    episodes: int = 1,
    most: int | None = None,
    speed: float = 1.0,
    saliency: bool = False,
    title: str | None = None,
    height: int = 480,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[Shown]:
    """Write a video of an agent at play, as fast as people play; memory does not grow with its length.

    Returns the games that it shows, in order; one that `most` cut is not `finished`.

    Args:
        path: .mp4 or .gif.
        policy: as for `moments`, as are `epsilon` and `seed`.
        episodes: whole games; the end of each is shown for a second.
        most: actions after which the video ends even so.
        speed: times as fast as people play.
        saliency: lay over the game what the values hang on; that takes far longer than all the rest.
        title: to be written over it; otherwise the name of the game.
        height: of the pictures, pixels.
        progress: is told after every action how many there were.

    Raises:
        UserError: another suffix, or ffmpeg failed.
    """
    stream = moments(agent, config, policy=policy, epsilon=epsilon, seed=seed)
    with contextlib.closing(stream):
        chosen = excerpt(stream, episodes, most)
        return record(chosen, agent, config, path, speed=speed, saliency=saliency, title=title, height=height, progress=progress)


def record(
    stream: Iterable[Moment],
    agent: Agent,
    config: GameConfig,
    path: Path,
    *,
    speed: float = 1.0,
    saliency: bool = False,
    title: str | None = None,
    height: int = 480,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[Shown]:
    """Write moments of an agent at play as a video; see `film`."""
    names, wanted = action_names(config), speed * pace(config)
    rate = min(wanted, FASTEST.get(path.suffix.lower(), wanted))
    title = game_title(config) if title is None else title
    shown: dict[int, Shown] = {}
    due = 0.0
    with Film(path, rate) as video:
        for moment in stream:
            shown[moment.game] = Shown(moment.score, moment.step, moment.ended)
            progress(sum(game.length for game in shown.values()))
            due += rate / wanted
            if due < 1 and not moment.ended:
                continue
            due = max(0.0, due - 1)
            picture = compose(moment, names, agent.meaning, title, heat(agent, moment) if saliency else None, height)
            for _ in range(max(1, round(PAUSE * rate)) if moment.ended else 1):
                video.add(picture)
    return list(shown.values())


def excerpt(stream: Iterator[Moment], episodes: int | None, most: int | None) -> Iterator[Moment]:
    """The moments of `stream` until so many games are over or so many actions were taken."""
    games_over = taken = 0
    for moment in stream:
        yield moment
        games_over += moment.ended
        if taken == most or games_over == episodes:
            return
        taken += not moment.ended


# What the values hang on

BLUR = 3.0
"""Standard deviation, in pixels, of the blur that takes away what there is to see at a place."""
CALL = 256
"""Most observations that the agent is asked about at once."""


def saliency(agent: Agent, observation: Bytes, values: Floats) -> Floats:
    """How much the agent's values hang on each place of what it sees, float32 (H, W) from 0 to 1.

    Greydanus et al. 2018 (arXiv:1711.00138), equations 1 to 3: all frames are blurred around one place after another, and
    the saliency of a place is half the squared change of the values. What moves all Q-values alike decides nothing and is
    not counted. The greatest saliency becomes 1; it is 0 everywhere where nothing that was blurred makes a difference.

    Args:
        observation: uint8 (stack, H, W).
        values: what the agent makes of it as it is, (actions,).
    """
    seen = torch.from_numpy(observation).float()
    height, width = observation.shape[1:]
    blurred = _blur(height) @ seen @ _blur(width).T
    masks = _masks(height, width)
    rows = [(seen + part[:, None] * (blurred - seen)).round().to(torch.uint8) for part in masks.flatten(0, 1).split(CALL)]
    change = torch.cat([agent.values(part) for part in rows]) - torch.from_numpy(values)
    if agent.meaning == "Q-value":
        change = change - change.mean(1, keepdim=True)
    found = 0.5 * change.double().square().sum(1).view(1, 1, *masks.shape[:2])
    found = F.interpolate(found, (height, width), mode="bilinear")[0, 0]
    # A batch of another size gives the same values but for rounding, which must not be taken for a difference.
    noise = 1e-10 * (1 + np.square(values, dtype=np.float64).sum())
    whole: Floats = (found / found.max() if found.max() > noise else torch.zeros_like(found)).float().numpy()
    return whole


def heat(agent: Agent, moment: Moment) -> Floats:
    """The saliency of a moment."""
    return saliency(agent, moment.observation, moment.values)


def _bumps(centres: Tensor, size: int, sigma: float) -> Tensor:
    """Gaussians of height 1 around places on a line of `size` pixels, (centres, size)."""
    return torch.exp(-0.5 * ((torch.arange(size) - centres[:, None]) / sigma) ** 2)


@functools.lru_cache(maxsize=4)
def _blur(size: int) -> Tensor:
    """The matrix that blurs a line of pixels, (size, size); at the ends it takes the mean of what there is."""
    bumps = _bumps(torch.arange(size), size, BLUR)
    return bumps / bumps.sum(1, keepdim=True)


@functools.lru_cache(maxsize=4)
def _masks(height: int, width: int) -> Tensor:
    """Where each perturbation blurs and how much, (rows, columns, H, W): bumps on a grid of every fifth pixel of 84."""
    pitch = max(1, height // 16)
    down, across = (_bumps(_grid(size, pitch), size, pitch) for size in (height, width))
    return down[:, None, :, None] * across[None, :, None, :]


def _grid(size: int, pitch: int) -> Tensor:
    """The centres of equal cells of about `pitch` pixels: where bilinear interpolation takes values to stand."""
    count = -(-size // pitch)
    return (torch.arange(count) + 0.5) * size / count - 0.5
