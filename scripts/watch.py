"""Watch an agent play: in a window, or as a video where there is no display or --out names one.

    python scripts/watch.py latest
    python scripts/watch.py runs/dqn_pong/20261121-080000-abc123 --saliency --speed 0.5
    python scripts/watch.py RUN --out pong.mp4 --episodes 3                  (or pong.gif)
    python scripts/watch.py RUN --out early.mp4 --checkpoint 3125            (as it played then)
    python scripts/watch.py RUN --out random.mp4 --random                    (the same game, played by chance)

Keys in the window: space pauses, n goes on to the next game, + and - change the speed, s shows or hides the saliency (what
the agent's values hang on), q or Escape ends. RUN is a run folder, a checkpoint folder or `latest`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from rich.progress import BarColumn, Progress, TextColumn

from envs.games import GameConfig
from lab import loading, runs
from lab.config import Count, Fraction, Natural, Positive, Settings, UserError
from lab.launch import guarded
from lab.recorder import console
from lab.runs import Run
from rl import agent as agents
from rl import evaluate, play
from rl.agent import Agent, Policy, RandomAgent
from rl.play import Shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from tkinter import Event, Tk
    from types import TracebackType

    from PIL import ImageTk

SPEEDS = (0.125, 32.0)
"""The slowest and the fastest that keys can set."""


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Whom to watch, and how."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder, or `latest`."""
    out: Path | None = None
    """Write a video here, .mp4 or .gif, and open no window."""
    checkpoint: Natural | None = None
    """Step of the checkpoint or milestone to take; default: the newest. A wrong one gets the list."""
    seed: Natural = 0
    """Decides the games and the random actions."""
    speed: Positive = 1.0
    """Times as fast as people play."""
    episodes: Count | None = None
    """Whole games; default: one in a video, and in a window until it is closed."""
    steps: Count | None = None
    """Actions after which it ends, even in the middle of a game."""
    policy: Literal["usual", "epsilon", "greedy", "sampled"] = "usual"
    """How actions follow from values: as is usual for the algorithm, mostly the best one, always, or drawn by probability."""
    epsilon: Fraction = 0.05
    """Share of random actions, for the policy epsilon."""
    sticky: Fraction | None = None
    """Probability that the emulator repeats the previous action instead; default: as in training."""
    random: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Watch an agent that knows nothing and plays by chance."""
    saliency: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Lay over the game what the agent's values hang on (Greydanus et al. 2018)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


@dataclass(frozen=True)
class Player:
    """Who plays what, and how."""

    agent: Agent
    game: GameConfig
    policy: Policy
    title: str
    video: Path
    """Where its video goes, unless another place is given."""


def main() -> int:
    """Show what the command line asks for."""
    options = tyro.cli(Options, description=__doc__)
    check(options)
    player = player_for(options)
    root = None if options.out else display()
    if root:
        report(Window(root, player, options).run())
        return 0
    if not options.out:
        print("no display here: writing a video instead")
    out = options.out or player.video
    report(record(player, options, out))
    print(f"video: {out}")
    return 0


def report(shown: list[Shown]) -> None:
    """Print how the games ended, or where they were left."""
    for number, game in enumerate(shown, 1):
        print(f"game {number}: score {play.points(game.score)}{'' if game.finished else ' so far'}, {game.length:,} steps")


def check(options: Options) -> None:
    """Refuse early what cannot be done.

    Raises:
        UserError: says what can be.
    """
    if options.out and options.out.suffix.lower() not in play.FASTEST:
        raise UserError(f"--out {options.out}: videos are written as .mp4 or .gif")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use cpu")


# Who plays


def player_for(options: Options) -> Player:
    """The agent and the game that the options name.

    Raises:
        UserError: no such run or checkpoint, or the agent cannot play so.
    """
    found = runs.find(options.run, agents.FAMILIES)
    return chance(options, found.run) if options.random else trained(options, found.run)


def chance(options: Options, run: Run) -> Player:
    """Random actions in the game of a run, which needs no checkpoint."""
    game = game_for(options, loading.settings_of(run, agents.FAMILIES).game)
    policy: Policy = "sampled" if options.policy == "usual" else options.policy
    agent = RandomAgent(len(play.action_names(game)))
    return Player(agent, game, policy, f"{play.game_title(game)} · random actions", run.media / f"watch_random_seed{options.seed}.mp4")


def trained(options: Options, run: Run) -> Player:
    """The agent of a run."""
    loaded = agents.load(options.run if options.checkpoint is None else saved_at(run, options.checkpoint), options.device)
    game = game_for(options, loaded.experiment.game)
    policy = loaded.experiment.usual_policy if options.policy == "usual" else options.policy
    evaluate.check_policy(loaded.agent, policy)
    title = f"{play.game_title(game)} · {loaded.experiment.experiment.upper()} · step {loaded.step:,}"
    return Player(loaded.agent, game, policy, title, run.media / f"watch_{loaded.step:09d}_seed{options.seed}.mp4")


def game_for(options: Options, game: GameConfig) -> GameConfig:
    """The game of the run, with what the options change."""
    return game if options.sticky is None else dataclasses.replace(game, sticky=options.sticky)


def saved_at(run: Run, step: int) -> str:
    """The folder of the checkpoint of a step.

    Raises:
        UserError: there is none; lists those that there are.
    """
    moments = loading.moments(run)
    if step not in moments:
        raise UserError(f"--checkpoint {step}: {run.folder} has none of that step; it has {', '.join(map(str, moments)) or 'none yet'}")
    return str(moments[step])


# A video


def record(player: Player, options: Options, out: Path) -> list[Shown]:
    """Write the video, with a progress bar on a terminal.

    Raises:
        UserError: nothing can be written there.
    """
    columns = (TextColumn(f"filming {out.name}", markup=False), BarColumn(24), TextColumn("{task.completed:,} steps"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=options.steps)
        try:
            return play.film(
                player.agent,
                player.game,
                out,
                policy=player.policy,
                epsilon=options.epsilon,
                seed=options.seed,
                episodes=options.episodes or 1,
                most=options.steps,
                speed=options.speed,
                saliency=options.saliency,
                title=player.title,
                progress=lambda done: bar.update(task, completed=done),
            )
        except OSError as error:
            raise UserError(f"{out}: a video cannot be written here ({error.strerror}); give another place by --out") from None


# A window


def display() -> Tk | None:
    """An empty window; None where there is no display, or Python came without tkinter."""
    try:
        import tkinter

        from PIL import ImageTk  # noqa: F401
    except ImportError:
        return None
    try:
        return tkinter.Tk()
    except tkinter.TclError:
        return None


class Window:
    """Shows an agent at play in real time; no moment is left out, however late it comes."""

    def __init__(self, root: Tk, player: Player, options: Options) -> None:
        from tkinter import Label

        self.root, self.player, self.options = root, player, options
        self.speed, self.saliency, self.paused = options.speed, options.saliency, False
        self.names = play.action_names(player.game)
        self.shown: dict[int, Shown] = {}
        self.error: BaseException | None = None
        self.image: ImageTk.PhotoImage | None = None
        self.label = Label(root, borderwidth=0)
        self.label.pack()
        self._listen()
        self.begin(1)

    def _listen(self) -> None:
        """Say what keys, the closing of the window and errors do."""
        keys = {"space": self.pause, "n": self.skip, "s": self.toggle_saliency, "q": self.quit, "Escape": self.quit}
        keys |= dict.fromkeys(("plus", "equal", "KP_Add"), lambda: self.change_speed(2))
        keys |= dict.fromkeys(("minus", "KP_Subtract"), lambda: self.change_speed(0.5))
        for key, act in keys.items():
            self.root.bind(f"<Key-{key}>", functools.partial(_call, act))
        self.root.resizable(False, False)
        self.root.protocol("WM_DELETE_WINDOW", self.quit)
        self.root.report_callback_exception = self._fail

    def run(self) -> list[Shown]:
        """Play until the window is closed or all was shown; returns the games that were."""
        self.due = time.monotonic()
        self.tick()
        with contextlib.suppress(KeyboardInterrupt):
            self.root.mainloop()
            if self.error:
                raise self.error
        return list(self.shown.values())

    def begin(self, number: int) -> None:
        """Go on with a new game, by another seed than those before."""
        player, options = self.player, self.options
        seed, episodes = options.seed + number - 1, options.episodes and options.episodes - number + 1
        stream = play.moments(player.agent, player.game, policy=player.policy, epsilon=options.epsilon, seed=seed, first=number)
        self.stream = play.excerpt(stream, episodes, options.steps)

    def tick(self) -> None:
        """Show the next moment, and come again when it is time for the one after it."""
        wait = 0.05
        if not self.paused:
            moment = next(self.stream, None)
            if moment is None:
                return self.quit()
            self.moment, self.shown[moment.game] = moment, Shown(moment.score, moment.step, moment.ended)
            self.draw()
            wait = play.PAUSE if moment.ended else 1 / (self.speed * play.pace(self.player.game))
        now = time.monotonic()
        self.due = max(self.due + wait, now)
        self.root.after(max(1, round(1000 * (self.due - now))), self.tick)

    def draw(self) -> None:
        """Put the newest moment on the screen."""
        from PIL import Image, ImageTk

        heat = play.heat(self.player.agent, self.moment) if self.saliency else None
        picture = Image.fromarray(play.compose(self.moment, self.names, self.player.agent.meaning, self.player.title, heat))
        if self.image is None:
            self.image = ImageTk.PhotoImage(picture, master=self.root)
            self.label.configure(image=self.image)
        self.image.paste(picture)  # five times as fast as a new one
        self._entitle()
        self.root.update_idletasks()  # Tk draws when it has nothing else to do, which at a high speed is never

    def _entitle(self) -> None:
        speed = f" · speed {self.speed:g}" if self.speed != 1 else ""
        self.root.title(f"{self.player.title} · score {play.points(self.moment.score)}{speed}{' · paused' if self.paused else ''}")

    def pause(self) -> None:
        """Stop, or go on."""
        self.paused = not self.paused
        self._entitle()

    def skip(self) -> None:
        """Go on to the next game; after the last one, end."""
        if self.moment.game == self.options.episodes:
            return self.quit()
        self.paused = False
        self.begin(self.moment.game + 1)

    def change_speed(self, factor: float) -> None:
        """Play faster or slower."""
        slowest, fastest = SPEEDS
        self.speed = min(max(self.speed * factor, slowest), fastest)
        self._entitle()

    def toggle_saliency(self) -> None:
        """Show what the values hang on, or no longer."""
        self.saliency = not self.saliency
        self.draw()

    def quit(self) -> None:
        """Close the window."""
        self.root.destroy()

    def _fail(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """End at an error, which Tk would print and forget."""
        self.error = error
        self.quit()


def _call(act: Callable[[], None], event: Event) -> None:
    act()


if __name__ == "__main__":
    sys.exit(guarded(main))
