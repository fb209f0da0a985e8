"""Games as stable-baselines3 meets them: against a plain reading of the games, and against what SB3 itself expects."""

import warnings

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecMonitor, VecTransposeImage

from envs.games import SMALL, GameConfig, make
from envs.sb3 import GamesVecEnv, classic
from lab.config import UserError

SHORT = {"catch": 50, "bricks": 90, "breakout": 600}
"""Frames after which a game is broken off, so that a few hundred actions see ends of both kinds."""


def games_of(name, count=None, colour=False, **settings):
    """Three games side by side, or two that need an emulator each."""
    return make(GameConfig(name=name, **settings), count or (3 if name in SMALL else 2), 7, colour)


def played(environment, steps, seed=0):
    """What a VecEnv says to random actions."""
    draw = np.random.default_rng(seed)
    yield environment.reset()
    for _ in range(steps):
        yield environment.step(draw.integers(0, environment.action_space.n, environment.num_envs))


@pytest.mark.parametrize("life_loss", [False, True])
@pytest.mark.parametrize("name", ["catch", "bricks", "breakout"])
def test_it_says_what_the_games_say_step_for_step(name: str, life_loss: bool) -> None:
    settings = {"max_frames": SHORT[name]} if not life_loss else {}
    environment, games = GamesVecEnv(games_of(name, **settings), life_loss=life_loss), games_of(name, **settings)
    said = played(environment, 400)
    assert np.array_equal(next(said), games.reset().observations)
    draw, seen = np.random.default_rng(0), {"end": 0, "cut": 0, "life": 0}
    for observations, rewards, done, infos in said:
        step = games.step(draw.integers(0, len(games.actions), games.count))
        first = games.restart(step.ended) if step.ended.any() else step
        for game in range(games.count):
            over, cut = bool(step.terminated[game]), bool(step.truncated[game])
            life = bool(step.life_lost[game]) and life_loss
            expected = {"lives": step.lives[game]}
            if over or cut:
                expected["episode"] = {"r": step.returns[game], "l": step.lengths[game]}
                assert infos[game]["episode"].pop("t") >= 0
            if life:
                expected["life_lost"] = True
            if over or cut or life:
                expected["TimeLimit.truncated"] = cut
                assert np.array_equal(infos[game].pop("terminal_observation"), step.observations[game])
            assert infos[game] == expected
            assert bool(done[game]) == (over or cut or life)
            assert rewards[game] == step.rewards[game]
            assert np.array_equal(observations[game], first.observations[game])
            assert np.array_equal(observations[game], step.observations[game]) or over or cut
            seen = {"end": seen["end"] + over, "cut": seen["cut"] + cut, "life": seen["life"] + life}
    assert seen["cut"] > 0 or life_loss
    assert seen["end"] > 0 or not life_loss
    assert seen["life"] > 0 or not life_loss or name == "catch"


def test_an_atari_game_is_the_same_whether_it_starts_again_at_once_or_at_the_next_action() -> None:
    """The native games begin anew at the next action, which they ignore: without that step it is the same story."""
    environment, games = GamesVecEnv(games_of("breakout", max_frames=400)), games_of("breakout", max_frames=400)
    choices = np.random.default_rng(1).integers(0, len(games.actions), (2, 500))
    ours: list[list] = [[], []]
    environment.reset()
    for actions in choices.T[:300]:
        _, rewards, done, infos = environment.step(actions)
        for game, info in enumerate(infos):
            shown = info["terminal_observation"].sum() if done[game] else None
            ours[game].append((rewards[game], bool(done[game]), shown, info["lives"]))
    plain: list[list] = [[], []]
    games.reset()
    for _ in range(320):
        step = games.step(np.array([choices[game, len(plain[game])] for game in range(2)]))
        for game in np.flatnonzero(~step.started):
            shown = step.observations[game].sum() if step.ended[game] else None
            plain[game].append((step.rewards[game], bool(step.ended[game]), shown, step.lives[game]))
    assert sum(done for game in ours for _, done, _, _ in game) >= 4
    for mine, theirs in zip(ours, plain):
        assert mine == theirs[:300]


def test_rewards_are_clipped_for_the_learner_and_not_in_the_returns() -> None:
    clipped = list(played(GamesVecEnv(games_of("space_invaders", max_frames=1200), clip_rewards=True), 320))[1:]
    raw = list(played(GamesVecEnv(games_of("space_invaders", max_frames=1200)), 320))[1:]
    assert max(rewards.max() for _, rewards, _, _ in raw) > 1
    for (_, mine, _, infos), (_, theirs, _, others) in zip(clipped, raw):
        assert np.array_equal(mine, np.clip(theirs, -1, 1))
        assert [info.get("episode", {}).get("r") for info in infos] == [info.get("episode", {}).get("r") for info in others]
    assert any("episode" in info for _, _, _, infos in raw for info in infos)


def test_what_a_learner_adds_to_its_rewards_does_not_reach_the_games() -> None:
    environment = GamesVecEnv(games_of("catch"))
    environment.reset()
    _, rewards, _, _ = environment.step(np.zeros(3, int))
    rewards += 5
    assert np.array_equal(environment.games.last.rewards, np.zeros(3))


def test_returns_of_sb3s_own_monitor_are_the_same() -> None:
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        environment = VecMonitor(GamesVecEnv(games_of("catch", max_frames=70)))
    mine, theirs = played(GamesVecEnv(games_of("catch", max_frames=70)), 300), played(environment, 300)
    next(mine), next(theirs)
    ends = [(a["episode"], b["episode"]) for one, other in zip(mine, theirs) for a, b in zip(one[3], other[3]) if "episode" in a]
    assert len(ends) == 3 * 4
    assert all((a["r"], a["l"]) == (b["r"], b["l"]) for a, b in ends)


@pytest.mark.parametrize("name", ["bricks", "breakout"])
def test_a_state_that_is_put_back_goes_on_as_before(name: str) -> None:
    one, other = (GamesVecEnv(games_of(name, max_frames=SHORT[name]), life_loss=True) for _ in range(2))
    list(played(one, 237))
    other.reset()
    other.load_state_dict(one.state_dict())
    draw = np.random.default_rng(3)
    for _ in range(150):
        actions = draw.integers(0, 3, one.num_envs)
        for mine, theirs in zip(one.step(actions)[:3], other.step(actions)[:3]):
            assert np.array_equal(mine, theirs)


# What SB3 expects


def test_the_spaces_pass_sb3s_checks() -> None:
    environment = GamesVecEnv(games_of("pong", 1))
    assert environment.observation_space == spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert environment.action_space == spaces.Discrete(6)
    assert is_image_space(environment.observation_space)
    assert is_image_space_channels_first(environment.observation_space)
    check_for_correct_spaces(environment, spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6))
    observations = environment.reset()
    assert (observations.shape, observations.dtype) == ((1, 4, 84, 84), np.uint8)


def test_it_keeps_the_contract_of_a_vec_env() -> None:
    environment = GamesVecEnv(games_of("catch", colour=True), colour=True)
    environment.reset()
    assert environment.num_envs == 3
    assert environment.get_attr("render_mode") == ["rgb_array"] * 3
    assert environment.get_attr("actions", [0, 2]) == [("NOOP", "LEFT", "RIGHT")] * 2
    assert not environment.has_attr("nothing_of_this_name")
    environment.set_attr("clip_rewards", True)
    assert environment.clip_rewards
    with pytest.raises(ValueError, match="one object"):
        environment.set_attr("clip_rewards", False, indices=1)
    assert environment.env_is_wrapped(Monitor) == [True] * 3
    assert environment.env_is_wrapped(VecTransposeImage, indices=0) == [False]
    assert len(environment.env_method("state_dict", indices=[1])) == 1
    assert environment.seed(3) == [None] * 3
    assert [image.shape for image in environment.get_images()] == [(168, 168, 3)] * 3
    assert environment.render().shape == (2 * 168, 2 * 168, 3)
    assert GamesVecEnv(games_of("catch")).get_images() == [None] * 3
    environment.close()


def test_the_same_games_come_again_after_a_reset() -> None:
    environment = GamesVecEnv(games_of("bricks"))
    first, again = list(played(environment, 50)), list(played(environment, 50))
    assert np.array_equal(first[0], again[0])
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(first[1:], again[1:]))


def test_sb3s_ppo_learns_in_it_as_it_comes() -> None:
    environment = GamesVecEnv(games_of("breakout", max_frames=300), life_loss=True, clip_rewards=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PPO("CnnPolicy", environment, n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
        assert model.get_env() is environment  # nothing had to be wrapped around it
        model.learn(400)
        scores, lengths = evaluate_policy(model, environment, 6, return_episode_rewards=True)
    assert len(scores) == 6
    assert max(lengths) > 50  # whole games, not lives
    assert model.ep_info_buffer


# SB3's own wrappers


@pytest.mark.parametrize("count", [1, 2])
def test_the_classic_wrappers_show_the_same_spaces(count: int) -> None:
    native = GamesVecEnv(games_of("ms_pacman", count))
    environment = classic(GameConfig(name="ms_pacman"), count, 2**40 + 3, True, True)
    assert environment.observation_space == native.observation_space
    assert environment.action_space == native.action_space
    for observations, rewards, done, infos in list(played(environment, 3))[1:]:
        assert observations.shape == (count, 4, 84, 84)
        assert set(rewards) <= {-1.0, 0.0, 1.0}
        assert done.shape == (count,)
        assert len(infos) == count
    environment.close()


def test_the_classic_wrappers_skip_frames_once_and_repeat_actions_only_as_often_as_asked() -> None:
    config = GameConfig(name="breakout", sticky=0.1, max_frames=600, full_actions=True)
    environment = classic(config, 1, 0, False, False)
    environment.reset()
    (emulator,) = environment.get_attr("ale")
    assert emulator.getFloat("repeat_action_probability") == pytest.approx(0.1)
    assert emulator.getInt("max_num_frames_per_episode") == 600
    assert environment.action_space.n == 18
    before = emulator.getEpisodeFrameNumber()
    environment.step(np.zeros(1, int))
    assert emulator.getEpisodeFrameNumber() == before + 4
    environment.close()


def test_the_classic_wrappers_say_what_they_cannot_do() -> None:
    with pytest.raises(UserError, match="catch is none; take native"):
        classic(GameConfig(name="catch"), 1, 0, True, True)
    with pytest.raises(UserError, match="always press FIRE"):
        classic(GameConfig(name="pong", fire_reset=False), 1, 0, True, True)
