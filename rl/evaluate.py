"""How well an agent plays: whole games, from start to end, in environments of their own and under no rule of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress

from envs import games
from envs.games import GameConfig
from lab import seeding
from lab.config import Count, Fraction, Natural, Settings, UserError
from lab.recorder import console
from rl import scores
from rl.agent import Agent, Loaded, Policy, RandomAgent

if TYPE_CHECKING:
    from lab.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class TestConfig(Settings):
    """The games that are played for a score while training goes on."""

    __test__ = False  # the name is no invitation to pytest

    games: Count = 8
    """Whole games at every preview."""
    epsilon: Fraction = 0.05
    """Share of random actions, where the agent plays by its values (Mnih et al. 2015)."""
    video_every: Natural = 1
    """Previews from one video to the next, in media/; 0: none."""
    video_steps: Count = 2000
    """Actions that a video shows at most."""


@dataclass(frozen=True)
class Game:
    """One game that was played to its end."""

    score: float
    """Points, never clipped."""
    length: int
    """Actions."""
    truncated: bool
    """It was broken off for its length."""


def play_games(
    agent: Agent,
    config: GameConfig,
    count: int,
    *,
    policy: Policy,
    epsilon: float,
    seed: int,
    side_by_side: int = 8,
    progress: Callable[[], Any] = lambda: None,
) -> list[Game]:
    """Play whole games, several side by side.

    Each of the places plays its share of the games, however long they take: whoever took the first `count` that end
    would prefer short games, which are often the bad ones.

    Args:
        progress: is called after every game.
    """
    places = min(side_by_side, count)
    world = games.make(config, places, seeding.derive(seed, "evaluate", 0))
    share = [len(range(place, count, places)) for place in range(places)]
    draw = seeding.generator(seed, "evaluate/act", 0)
    played: list[list[Game]] = [[] for _ in range(places)]
    step = world.reset()
    while any(len(done) < wanted for done, wanted in zip(played, share)):
        actions = agent.act(torch.from_numpy(step.observations), policy, epsilon, draw)
        step = world.step(actions.numpy())
        for place in np.flatnonzero(step.ended):
            if len(played[place]) < share[place]:
                played[place].append(Game(float(step.returns[place]), int(step.lengths[place]), bool(step.truncated[place])))
                progress()
    world.close()
    return [played[index % places][index // places] for index in range(count)]


def check_policy(agent: Agent, policy: Policy) -> None:
    """Raises:
    UserError: the agent cannot play so.
    """
    if policy == "sampled" and agent.meaning != "probability":
        raise UserError("policy 'sampled': this agent has values of actions, no probabilities; take epsilon or greedy")


def protocol(config: GameConfig, count: int, policy: Policy, epsilon: float, seed: int) -> str:
    """In one line, how a score came about: without it nobody can compare."""
    how = f"epsilon {epsilon:g}" if policy == "epsilon" else policy
    sticky = f"sticky actions {config.sticky:g}" if config.sticky else "no sticky actions"
    if config.rom in games.SMALL:
        most = f" of at most {config.max_frames:,} steps" if config.max_frames != GameConfig.max_frames else ""
        return f"{config.rom}, {count} whole games{most}, {how}{f', {sticky}' if config.sticky else ''}, seed {seed}"
    actions = "all 18 actions" if config.full_actions else "the game's own actions"
    return (
        f"{config.rom}, {count} whole games of at most {config.max_frames:,} frames, {how}, {sticky}, up to {config.noop_max} no-ops, "
        f"{actions}, real scores, lost lives do not end a game, seed {seed}"
    )


class Tester:
    """Judges an agent now and then while it learns: games in new environments each time, so that a resumed run plays the same."""

    def __init__(self, game: GameConfig, config: TestConfig, seed: int, policy: Policy) -> None:
        self.game, self.config, self.seed, self.policy = game, config, seed, policy

    def __call__(self, agent: Agent, trainer: Trainer) -> dict[str, float | int | str]:
        """Scores for the row of this step, and perhaps a video."""
        seed = seeding.derive(self.seed, "test", trainer.step)
        played = play_games(agent, self.game, self.config.games, policy=self.policy, epsilon=self.config.epsilon, seed=seed)
        row: dict[str, float | int | str] = {
            "eval/return": float(np.mean([game.score for game in played])),
            "eval/length": float(np.mean([game.length for game in played])),
        }
        previews = -(-trainer.step // trainer.config.preview_every)
        if self.config.video_every and previews % self.config.video_every == 0:
            row |= self._video(agent, trainer, seed)
        return row

    def _video(self, agent: Agent, trainer: Trainer, seed: int) -> dict[str, str]:
        from rl.play import film

        if trainer.media is None:
            return {}
        path = trainer.media / f"play_{trainer.step:09d}.mp4"
        film(agent, self.game, path, policy=self.policy, epsilon=self.config.epsilon, seed=seed, most=self.config.video_steps)
        return {"media/play": f"{trainer.media.name}/{path.name}"}


# After training


@dataclass(frozen=True, kw_only=True)
class PlayConfig(Settings):
    """How an agent is judged."""

    games: Count = 30
    """Whole games that each agent plays."""
    policy: Literal["usual", "epsilon", "greedy", "sampled"] = "usual"
    """usual: epsilon for agents with Q-values, sampled for those with probabilities, as their papers have it."""
    epsilon: Fraction = 0.05
    """Share of random actions, for the policy epsilon."""
    sticky: Fraction | None = None
    """Probability that the emulator repeats an action; that of the training if not given."""
    random: bool = False
    """Judge random play of the same games instead, for comparison."""


def judge(loaded: Sequence[Loaded], config: PlayConfig, seed: int) -> list[list[Game]]:
    """The games that each agent played.

    Raises:
        UserError: the agents play different games, or cannot play by this policy.
    """
    names = {one.experiment.game.rom for one in loaded}
    if len(names) > 1:
        raise UserError(f"these agents play different games ({', '.join(sorted(names))}); judge them one by one")
    rules = {protocol(game_of(one, config), config.games, policy_of(one, config), config.epsilon, seed) for one in loaded}
    if len(rules) > 1:
        raise UserError(f"these agents play by different rules ({'; '.join(sorted(rules))}); judge them one by one")
    for one in loaded if not config.random else []:
        check_policy(one.agent, policy_of(one, config))
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("games", total=config.games * len(loaded))
        return [_played(one, config, seed, lambda: bar.advance(task)) for one in loaded]


def policy_of(loaded: Loaded, config: PlayConfig) -> Policy:
    """The policy that the settings mean for this agent."""
    if config.random:
        return "sampled"
    return loaded.experiment.usual_policy if config.policy == "usual" else config.policy


def _played(loaded: Loaded, config: PlayConfig, seed: int, progress: Callable[[], Any]) -> list[Game]:
    agent = RandomAgent(len(loaded.actions)) if config.random else loaded.agent
    return play_games(
        agent,
        game_of(loaded, config),
        config.games,
        policy=policy_of(loaded, config),
        epsilon=config.epsilon,
        seed=seed,
        progress=progress,
    )


def game_of(loaded: Loaded, config: PlayConfig) -> GameConfig:
    """The game of the training, under the stickiness that was asked for."""
    game = loaded.experiment.game
    return game if config.sticky is None else replace(game, sticky=config.sticky)


def report(loaded: Sequence[Loaded], played: Sequence[Sequence[Game]], config: PlayConfig, seed: int) -> dict[str, Any]:
    """The scores of one agent or of several together, and how they were taken."""
    first = loaded[0]
    groups = [[game.score for game in games] for games in played]
    summary = scores.summarise(first.experiment.game.rom, groups)
    who = "random play" if config.random else first.experiment.experiment
    how = protocol(game_of(first, config), config.games, policy_of(first, config), config.epsilon, seed)
    return {
        **summary.to_dict(),
        "length": float(np.mean([game.length for games in played for game in games])),
        "truncated": sum(game.truncated for games in played for game in games),
        "scores": groups if len(groups) > 1 else groups[0],
        "protocol": f"{who}: {how}" + (f", {len(loaded)} runs" if len(loaded) > 1 else ""),
    }
