"""Games for stable-baselines3: ours as one of its vector environments, and its own Atari wrappers to compare with.

ours                           stable-baselines3's (DummyVecEnv and its kind)
step t    the game is over     done; the observation is already the first one of the next game,
step t+1  action ignored,      and the final one stands in info["terminal_observation"]
          a new game
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecFrameStack, VecTransposeImage
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from envs.games import SMALL, Bytes, Flags, Floats, GameConfig, Games, Step
from lab.config import UserError


class GamesVecEnv(VecEnv):
    """N games as stable-baselines3 meets them, with the rules of learning that its wrappers would apply.

    The random numbers are those that the games were made with: `seed` changes nothing, and `reset` starts them again.

    Args:
        life_loss: a lost life is an end for the learner; the game goes on.
        clip_rewards: rewards outside of [-1, 1] are given as -1 or 1; returns stay what they are.
        colour: the games were made with pictures for people, which `render` then shows.
    """

    def __init__(self, games: Games, *, life_loss: bool = False, clip_rewards: bool = False, colour: bool = False) -> None:
        self.games, self.life_loss, self.clip_rewards = games, life_loss, clip_rewards
        self.render_mode = "rgb_array" if colour else None
        self._started = time.time()
        super().__init__(games.count, spaces.Box(0, 255, games.shape, np.uint8), spaces.Discrete(len(games.actions)))

    # Playing

    def reset(self) -> Bytes:
        """Begin all games from the start of their random numbers; their observations (N, stack, H, W)."""
        return self.games.reset().observations

    def step_async(self, actions: NDArray[np.integer[Any]]) -> None:
        """Say which action (N,) comes next."""
        self._actions = np.asarray(actions, np.int64)

    def step_wait(self) -> tuple[Bytes, Floats, Flags, list[dict[str, Any]]]:
        """Take the actions: observations (N, stack, H, W), rewards, ends (N,) and a dictionary for each game."""
        step = self.games.step(self._actions)
        ended, observations = step.ended, step.observations
        done = ended | step.life_lost if self.life_loss else ended
        infos = [{"lives": lives} for lives in step.lives.tolist()]
        for index in np.flatnonzero(done).tolist():
            infos[index] |= self._ending(step, index)
        if ended.any():
            observations = self.games.restart(ended).observations
        # Always an array of its own: PPO adds to it where a game was broken off.
        rewards = step.rewards.clip(-1, 1) if self.clip_rewards else step.rewards.copy()
        return observations, rewards, done, infos

    def _ending(self, step: Step, index: int) -> dict[str, Any]:
        """What is said of a game that is done, under the names that stable-baselines3 and its Monitor use."""
        ending = {"terminal_observation": step.observations[index], "TimeLimit.truncated": bool(step.truncated[index])}
        if not step.ended[index]:
            return ending | {"life_lost": True}
        seconds = round(time.time() - self._started, 6)
        return ending | {"episode": {"r": float(step.returns[index]), "l": int(step.lengths[index]), "t": seconds}}

    def close(self) -> None:
        """Let go of the games."""
        self.games.close()

    # State

    def state_dict(self) -> dict[str, Any]:
        """The state of the games."""
        return self.games.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the games back where they were."""
        self.games.load_state_dict(state)

    # Whatever else is asked of a VecEnv

    def seed(self, seed: int | None = None) -> Sequence[None]:
        """None for each game: their random numbers were settled when they were made."""
        return [None] * self.num_envs

    def get_images(self) -> Sequence[Bytes | None]:
        """What people see of each game, (height, width, 3)."""
        return list(self.games.pictures()) if self.render_mode else [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute, of this object or of the games; the same for each of them, as they are one object."""
        owner = self if hasattr(self, attr_name) else self.games
        return [getattr(owner, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute, for all games at once."""
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(f"{attr_name} cannot be set for some of the games only, as they are one object")
        setattr(self if hasattr(self, attr_name) else self.games, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of the games, once; what it returned, for each game that was asked for."""
        result = getattr(self.games, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None) -> list[bool]:
        """Yes for Monitor: the true returns and lengths are in the infos. No for all else."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


def classic(config: GameConfig, count: int, seed: int, life_loss: bool, clip_rewards: bool) -> VecEnv:
    """The same games behind stable-baselines3's own wrappers, each one in a process of its own.

    Raises:
        UserError: a game, or a way to start it, that they do not know.
    """
    if config.rom in SMALL:
        raise UserError(f"environments: the classic wrappers are for Atari games, and {config.rom} is none; take native")
    if not config.fire_reset:
        raise UserError("environments: the classic wrappers always press FIRE; take native for --game.fire-reset false")
    # ALE/*-v5 repeats an action 4 times and by chance once more, unless told not to; the wrappers repeat it again.
    emulator = {
        "frameskip": 1,
        "repeat_action_probability": config.sticky,
        "full_action_space": config.full_actions,
        "max_num_frames_per_episode": config.max_frames,
    }
    wrappers = {
        "noop_max": config.noop_max,
        "frame_skip": config.frame_skip,
        "screen_size": config.size,
        "terminal_on_life_loss": life_loss,
        "clip_reward": clip_rewards,
    }
    name = config.rom.title().replace("_", "")
    kind = SubprocVecEnv if count > 1 else None
    # With its module before it, a name is also known in the processes that only then load ale_py.
    games = make_atari_env(f"ale_py:ALE/{name}-v5", count, seed % 2**31, env_kwargs=emulator, wrapper_kwargs=wrappers, vec_env_cls=kind)
    return VecTransposeImage(VecFrameStack(games, config.stack))
