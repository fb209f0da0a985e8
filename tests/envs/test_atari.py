"""Atari games: against gymnasium's own preprocessing, step for step, and against every promise of `Step` and `Games`."""

import hashlib
import json
import platform
import subprocess
import sys
from collections import deque
from pathlib import Path

import ale_py
import cv2
import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import AtariPreprocessing

from envs import atari
from envs.games import GameConfig, Step, make
from lab.checkpoint import pack, unpack

gymnasium.register_envs(ale_py)

ROOT = Path(__file__).resolve().parents[2]
FIELDS = tuple(Step.__dataclass_fields__)
FLAGS = ("terminated", "truncated", "life_lost", "started")
PLAIN = {"noop_max": 0, "fire_reset": False, "sticky": 0.0}
"""Nothing is left to chance, and nothing happens before the first action."""

ROUNDING = 0 if platform.machine().lower() in ("x86_64", "amd64") else 1
"""Levels of grey by which frames may differ from the reference: none was found on x86-64; other processors may round otherwise."""


def world(name, count=2, seed=0, colour=False, **settings):
    games = make(GameConfig(name=name, **settings), count, seed, colour)
    games.reset()
    return games


def chosen(games, steps, seed=0):
    """Random actions, (steps, N)."""
    return np.random.default_rng(seed).integers(len(games.actions), size=(steps, games.count))


def played(games, actions):
    return [games.step(row) for row in actions]


def same(one, other):
    """The names of all fields that differ between two steps."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in FIELDS}
    return [name for name, (x, y) in pairs.items() if x.dtype != y.dtype or not np.array_equal(x, y)] == []


def row_of(step, place):
    return Step(**{name: getattr(step, name)[place : place + 1] for name in FIELDS})


def assert_same(steps, others):
    assert len(steps) == len(others)
    for index, (one, other) in enumerate(zip(steps, others)):
        assert same(one, other), index


# gymnasium's preprocessing of one game


def reference(name, frame_skip=4, size=84, grey=True):
    camel = "".join(part.capitalize() for part in name.split("_"))
    env = gymnasium.make(f"ALE/{camel}-v5", frameskip=1, repeat_action_probability=0.0, full_action_space=False, disable_env_checker=True)
    return AtariPreprocessing(env, noop_max=0, frame_skip=frame_skip, screen_size=size, terminal_on_life_loss=False, grayscale_obs=grey)


def referred(env, actions, stack=4):
    """Frames, reward, terminated, lives and started of every step; the action after an end is ignored, as here."""
    frame, info = env.reset(seed=1234)
    black = np.zeros_like(frame)
    frames = deque([black] * (stack - 1) + [frame], maxlen=stack)
    yield np.stack(frames), 0.0, False, info["lives"], True
    over = False
    for action in actions:
        started, reward = over, 0.0
        if over:
            frame, info = env.reset()
            frames.extend([black] * stack)
            over = False
        else:
            frame, reward, over, truncated, info = env.step(int(action))
            assert not truncated
        frames.append(frame)
        yield np.stack(frames), reward, over, info["lives"], started


def assert_as_referred(games, actions, envs):
    """Every step of every place; the steps themselves."""
    steps = [games.last, *played(games, actions)]
    for place, env in enumerate(envs):
        for index, (frames, reward, over, lives, started) in enumerate(referred(env, actions[:, place], games.shape[0])):
            step = row_of(steps[index], place)
            found = (step.rewards[0], step.terminated[0], step.truncated[0], step.lives[0], step.started[0])
            assert found == (reward, over, False, lives, started), index
            difference = cv2.absdiff(step.observations[0], frames)
            assert difference.max() <= ROUNDING, index
    return steps


def test_the_reference_repeats_actions_unless_told_not_to():
    """What makes scores of the two incomparable where nobody looks."""
    assert gymnasium.spec("ALE/Pong-v5").kwargs["repeat_action_probability"] == 0.25
    assert GameConfig().sticky == 0.0


@pytest.mark.parametrize(
    ("name", "largest", "ends"),
    [
        ("pong", 1, 2),  # no lives, points for either side
        ("breakout", 1, 5),  # waits for FIRE, five lives
        ("space_invaders", 30, 2),
        ("qbert", 300, 3),
        ("boxing", 2, 1),  # all 18 actions, ends by its clock
        ("ms_pacman", 10, 2),  # no FIRE
    ],
)
def test_games_agree_with_gymnasium_step_for_step(name, largest, ends):
    games = world(name, 1, **PLAIN)
    env = reference(name)
    assert list(games.actions) == env.unwrapped.get_action_meanings()
    steps = assert_as_referred(games, chosen(games, 2000), [env])
    assert max(abs(step.rewards[0]) for step in steps) >= largest
    assert sum(step.terminated[0] for step in steps) >= ends


def test_games_side_by_side_agree_with_as_many_single_ones():
    games = world("breakout", 3, **PLAIN)
    steps = assert_as_referred(games, chosen(games, 250), [reference("breakout") for _ in range(3)])
    ends = [np.flatnonzero([step.terminated[place] for step in steps]).tolist() for place in range(3)]
    assert all(ends)
    assert ends[0] != ends[1] != ends[2]


@pytest.mark.parametrize(("frame_skip", "size", "stack"), [(1, 64, 2), (3, 84, 1), (2, 100, 6)])
def test_other_frame_skips_sizes_and_stacks_agree_with_gymnasium_too(frame_skip, size, stack):
    games = world("breakout", 1, frame_skip=frame_skip, size=size, stack=stack, **PLAIN)
    assert (games.shape, games.frames_per_step) == ((stack, size, size), frame_skip)
    assert_as_referred(games, chosen(games, 150), [reference("breakout", frame_skip, size)])


# What a step holds


def test_the_arrays_of_a_step_have_their_shapes_and_types():
    games = world("breakout", 3)
    for step in (games.last, games.step(np.zeros(3, np.int64))):
        kinds = {name: (getattr(step, name).shape, getattr(step, name).dtype) for name in FIELDS}
        flags = dict.fromkeys(FLAGS, ((3,), np.dtype(bool)))
        numbers = dict.fromkeys(("lengths", "lives"), ((3,), np.dtype(np.int64)))
        points = dict.fromkeys(("rewards", "returns"), ((3,), np.dtype(np.float32)))
        assert kinds == {"observations": ((3, 4, 84, 84), np.dtype(np.uint8)), **flags, **numbers, **points}
        assert games.last is step


def test_every_game_begins_with_one_frame_after_black_ones():
    games = world("breakout", 3)
    steps = [games.last, *played(games, chosen(games, 400))]
    firsts = [step.observations[place] for step in steps for place in np.flatnonzero(step.started)]
    assert len(firsts) > 6
    for frames in firsts:
        assert not frames[:-1].any()
        assert frames[-1].any()


def test_frames_move_through_the_stack_one_at_a_time():
    """Of all games, at every step but the first of a game: a lost life or a neighbour's new game blackens nothing."""
    games = world("breakout", 3, seed=1)
    before, lost, neighbours = games.last, 0, 0
    for row in chosen(games, 400):
        step = games.step(row)
        for place in np.flatnonzero(~step.started):
            assert np.array_equal(step.observations[place, :-1], before.observations[place, 1:])
        lost += step.life_lost.sum()
        neighbours += step.started.any()
        before = step
    assert lost >= 10
    assert neighbours >= 3


def test_observations_never_change_afterwards(monkeypatch):
    monkeypatch.setattr(atari, "ANCHOR", 20)
    games = world("breakout", 2, max_frames=100)
    steps = [games.last]
    copies = [games.last.observations.copy()]
    for row in chosen(games, 150):
        steps.append(games.step(row))
        copies.append(games.last.observations.copy())
    games.reset()
    assert all(np.array_equal(step.observations, copy) for step, copy in zip(steps, copies))
    assert len({step.observations.ctypes.data for step in steps}) == len(steps)


# The score


def test_rewards_are_the_games_own_points_and_returns_their_sums():
    games = world("qbert", 3)
    totals, lengths, largest, ends = np.zeros(3), np.zeros(3, np.int64), 0, 0
    for row in chosen(games, 500):
        step = games.step(row)
        assert not step.rewards[step.started].any()
        totals = np.where(step.started, 0, totals + step.rewards)
        lengths = np.where(step.started, 0, lengths + 1)
        assert np.array_equal(step.returns, totals)
        assert np.array_equal(step.lengths, lengths)
        largest, ends = max(largest, step.rewards.max()), ends + step.terminated.sum()
    assert largest >= 100
    assert ends >= 3


# Lives


def test_a_lost_life_is_told_and_changes_nothing_else():
    games = world("breakout", 1)
    actions = chosen(games, 1000)[:, 0]
    lives, lost, total = [games.last.lives[0]], [], 0.0
    for index, action in enumerate(actions):
        step = games.step(np.array([action]))
        lives.append(step.lives[0])
        total += step.rewards[0]
        assert (step.returns[0], step.lengths[0]) == (total, index + 1)
        assert not step.started[0]
        if step.life_lost[0]:
            lost.append(index)
        if step.terminated[0]:
            break
    assert lives[-1] == 0
    falls = [index for index in range(len(lives) - 1) if lives[index + 1] != lives[index]]
    assert [lives[index] for index in falls] == [5, 4, 3, 2, 1]
    assert lost == falls[:-1]
    assert falls[-1] == index
    assert total > 0


@pytest.mark.parametrize("name", ["frogger", "bank_heist"])
def test_the_loss_of_a_life_is_told_where_the_last_one_is_played_with_a_count_of_zero(name):
    """Also in atlantis2, donkey_kong, mr_do and turmoil: the count is of lives in reserve, and a whole life is still to come."""
    games = world(name, 2)
    losses, zeros, before = np.zeros(2, np.int64), np.zeros(2, np.int64), games.last
    for row in chosen(games, 700):
        step = games.step(row)
        losses = np.where(step.started, 0, losses + step.life_lost)
        zeros = np.where(step.started, 0, zeros + (step.lives == 0))
        fell = (step.lives < before.lives) & ~step.started & ~step.ended
        assert np.array_equal(step.life_lost, fell), step.lengths
        if step.terminated.any():
            assert losses[step.terminated].tolist() == [4] * step.terminated.sum()
            assert zeros[step.terminated].min() > 10
            return
        before = step
    raise AssertionError("no game ended")


@pytest.mark.parametrize("name", ["qbert", "ms_pacman", "seaquest", "pong"])
def test_the_last_life_is_an_end_and_no_lost_life(name):
    games = world(name, 3, full_actions=True)
    ends, lost, before = 0, 0, games.last
    for row in chosen(games, 350):
        step = games.step(row)
        assert not (step.life_lost & (step.terminated | step.started)).any()
        assert np.array_equal(step.life_lost, (step.lives < before.lives) & ~step.terminated & ~step.started)
        ends, lost, before = ends + step.terminated.sum(), lost + step.life_lost.sum(), step
    if name == "pong":
        assert (lost, games.last.lives.tolist()) == (0, [0, 0, 0])
    else:
        assert ends > 0
        assert lost > 0


def test_nobody_presses_fire_after_a_lost_life():
    """A player that never does so itself waits until it is broken off; its neighbour shows that the game could have gone on."""
    games = world("breakout", 2, max_frames=1600)
    press = games.actions.index("FIRE")
    steps = played(games, np.tile([0, press], (400, 1)))
    waiting = [row_of(step, 0) for step in steps]
    (lost,) = [index for index, step in enumerate(waiting) if step.life_lost[0]]
    assert lost < 200
    assert {int(step.lives[0]) for step in waiting[lost:]} == {4}
    assert not any(step.rewards[0] for step in waiting[lost:])
    still = {step.observations.tobytes() for step in waiting[lost + 20 :]}
    assert len(still) <= 8  # what blinks
    assert (waiting[-1].truncated[0], waiting[-1].terminated[0], waiting[-1].lengths[0]) == (True, False, 400)
    assert not any(step.ended[0] for step in waiting[:-1])
    assert any(step.terminated[1] and step.lives[1] == 0 for step in steps)


# Starts and ends


def test_the_action_after_an_end_is_ignored():
    one, other = world("breakout", 4), world("breakout", 4)
    starts = 0
    for row in chosen(one, 500):
        changed = np.where(one.last.ended, (row + 1) % 4, row)
        starts += (changed != row).sum()
        before = one.last
        step = one.step(row)
        assert same(step, other.step(changed))
        assert np.array_equal(step.started, before.ended)
        for name in ("rewards", "returns", "lengths", "terminated", "truncated", "life_lost"):
            assert not getattr(step, name)[step.started].any()
        assert (step.lives[step.started] == 5).all()
    assert starts >= 8


def test_any_other_action_matters():
    one, other = world("breakout", 1), world("breakout", 1)
    right, left = one.actions.index("RIGHT"), one.actions.index("LEFT")
    assert not same(one.step(np.array([right])), other.step(np.array([left])))


@pytest.mark.parametrize(("max_frames", "length"), [(200, 50), (201, 51), (204, 51), (4, 1), (1, 1)])
@pytest.mark.parametrize("name", ["pong", "breakout"])
def test_a_long_game_is_broken_off_which_is_no_end(name, max_frames, length):
    """The frames that pass before the first action do not count."""
    games = world(name, 2, max_frames=max_frames)
    total = np.zeros(2)
    for round_ in range(2):
        for index in range(length):
            assert not games.last.ended.any()
            step = games.step(np.full(2, index % 4))
            total += step.rewards
        assert step.truncated.all()
        assert not step.terminated.any()
        assert step.lengths.tolist() == [length] * 2
        assert np.array_equal(step.returns, total)
        step, total = games.step(np.zeros(2, np.int64)), np.zeros(2)
        assert step.started.all(), round_


def test_a_game_is_either_over_or_broken_off_but_never_both():
    """Wherever the limit lies about the last frame of a game."""
    actions = chosen(world("breakout", 1), 400, seed=1)
    end = next(step for step in played(world("breakout", 1, **PLAIN), actions) if step.terminated[0])
    length = int(end.lengths[0])
    found = []
    for limit in range(4 * length - 4, 4 * length + 2):
        steps = played(world("breakout", 1, max_frames=limit, **PLAIN), actions[:length])
        step = next(step for step in steps if step.ended[0])
        assert step.terminated[0] != step.truncated[0]
        assert step.lengths[0] == (length if limit > 4 * length - 4 else length - 1)
        assert step.lives[0] == (0 if step.terminated[0] else 1)
        found.append(bool(step.terminated[0]))
    assert found == sorted(found)
    assert (found[0], found[-1]) == (False, True)


def test_without_idle_frames_and_sticky_actions_all_games_begin_alike_whatever_the_seed():
    one, other = world("breakout", 2, seed=0, **PLAIN), world("breakout", 2, seed=7, **PLAIN)
    rows = np.repeat(chosen(one, 250)[:, :1], 2, axis=1)
    for row in rows:
        step = one.step(row)
        assert same(step, other.step(row))
        assert same(row_of(step, 0), row_of(step, 1))


@pytest.mark.parametrize(("name", "fire_reset", "first"), [("boxing", False, "NOOP"), ("breakout", True, "FIRE")])
def test_a_game_begins_after_a_random_number_of_idle_frames(name, fire_reset, first):
    """Where it waits for FIRE, with that."""
    env = reference(name, frame_skip=1)
    frames = [env.reset(seed=0)[0]]
    for index in range(30):
        frames.append(env.step(env.unwrapped.get_action_meanings().index(first) if index == 0 else 0)[0])
    games = world(name, 12, fire_reset=fire_reset)
    shown = [{index for index, frame in enumerate(frames) if np.array_equal(frame, row[-1])} for row in games.last.observations]
    assert all(shown), "a first frame that no number of idle frames gives"
    assert len(set(map(tuple, shown))) >= 5
    fixed = world(name, 4, fire_reset=fire_reset, noop_max=0)
    assert len({row.tobytes() for row in fixed.last.observations}) == 1


# Actions


def test_by_default_there_are_the_actions_that_the_game_reacts_to():
    assert world("pong", 1).actions == ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
    assert world("breakout", 1).actions == ("NOOP", "FIRE", "RIGHT", "LEFT")
    assert world("freeway", 1).actions == ("NOOP", "UP", "DOWN")


def test_all_actions_of_the_joystick_mean_what_their_names_say():
    few, all_ = world("pong", 2), world("pong", 2, full_actions=True)
    assert all_.actions == tuple(action.name for action in sorted(ale_py.Action, key=int)[:18])
    assert len(all_.actions) == 18
    rows = chosen(few, 150)
    meant = np.array([all_.actions.index(name) for name in few.actions])
    assert_same(played(few, rows), played(all_, meant[rows]))
    assert not same(few.step(np.array([2, 2])), all_.step(np.array([2, 2])))


@pytest.mark.parametrize("action", [6, 200, -1])
def test_an_action_that_does_not_exist_is_refused(action):
    """Without a check the emulators' threads die of it, and the process waits for them for ever."""
    code = (
        "import numpy as np\n"
        "from envs.games import GameConfig, make\n"
        "games = make(GameConfig(name='pong'), 2, 0)\n"
        "games.reset()\n"
        "try:\n"
        f"    games.step(np.array([0, {action}]))\n"
        "except ValueError as error:\n"
        "    print('refused', error)\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=20)
    except subprocess.TimeoutExpired:
        pytest.fail("the process waits for ever")
    assert done.stdout.startswith("refused"), done.stderr
    assert str(action) in done.stdout


# Chance


def test_actions_stick_only_where_they_are_told_to():
    default, never, sometimes, again = (world("breakout", 2, **settings) for settings in ({}, {"sticky": 0.0}, *[{"sticky": 0.25}] * 2))
    rows = chosen(default, 200)
    plain, sticky = played(default, rows), played(sometimes, rows)
    assert_same(plain, played(never, rows))
    assert_same(sticky, played(again, rows))
    assert not all(same(one, other) for one, other in zip(plain, sticky))


def test_with_a_probability_of_one_the_emulator_repeats_the_idle_action_for_ever():
    stuck, idle = world("boxing", 1, noop_max=0, fire_reset=False, sticky=1.0), world("boxing", 1, **PLAIN)
    assert_same(played(stuck, chosen(stuck, 100)), played(idle, np.zeros((100, 1), np.int64)))


CHANCE = """
import hashlib, sys
import numpy as np
from envs import atari
from envs.games import GameConfig, make
atari.ANCHOR = 60
def fingerprint(seed, name="breakout"):
    games = make(GameConfig(name=name, sticky=0.25, max_frames=200), 2, seed)
    digest = hashlib.sha256(games.reset().observations)
    for row in np.random.default_rng(0).integers(4, size=(250, 2)):
        step = games.step(row)
        digest.update(step.observations)
        digest.update(step.rewards)
    return digest.hexdigest()
"""


def test_another_process_plays_the_same_games_from_the_same_seed(monkeypatch):
    monkeypatch.setattr(atari, "ANCHOR", atari.ANCHOR)  # put back at the end
    space = {}
    exec(CHANCE, space)
    ours = [space["fingerprint"](seed) for seed in (3, 4)]
    code = CHANCE + "for seed in (3, 4): print(fingerprint(seed))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ours
    assert ours[0] != ours[1]


def test_a_game_depends_on_the_seed_and_its_place_and_not_on_its_neighbours(monkeypatch):
    """So no row is left over from another game or from nowhere, also where only some games begin anew."""
    monkeypatch.setattr(atari, "ANCHOR", 60)
    worlds = [world("breakout", count, seed=5, sticky=0.25, max_frames=400, threads=threads) for count, threads in ((1, 0), (2, 1), (5, 2))]
    rows = chosen(worlds[-1], 350)
    runs = [[games.last, *played(games, rows[:, : games.count])] for games in worlds]
    for steps, count in zip(runs, (1, 2)):
        for index, (few, many) in enumerate(zip(steps, runs[-1])):
            for place in range(count):
                assert same(row_of(few, place), row_of(many, place)), (index, place)
    assert len({step.observations[place].tobytes() for step in runs[-1][50:51] for place in range(5)}) == 5
    partial = [step for step in runs[-1] if step.started.any() and not step.started.all()]
    assert len(partial) > 5
    assert [int(games.state_dict()["anchors"].min()) for games in worlds] >= [3, 3, 3]


def test_a_reset_begins_again_from_the_start_of_the_random_numbers(monkeypatch):
    monkeypatch.setattr(atari, "ANCHOR", 60)
    games = world("breakout", 2, sticky=0.25)
    rows = chosen(games, 220)
    first = [games.last, *played(games, rows)]
    assert int(games.state_dict()["anchors"].max()) > 0
    assert_same([games.reset(), *played(games, rows)], first)


# State


def through_files(state):
    """As a checkpoint keeps it: tensors apart, the rest as text."""
    tensors = {}
    text = json.dumps(pack(state, tensors))
    return unpack(json.loads(text), tensors)


def same_state(one, other):
    return list(one) == list(other) and all(one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one)


def moments(steps, states):
    """Places in a run where going on is hardest, by name; each is the number of actions before it."""
    ended = [index for index, step in enumerate(steps) if step.ended.any()]
    started = [index for index, step in enumerate(steps) if index and step.started.any()]
    seeded = [index for index in range(1, len(states)) if not states[index]["anchors"].equal(states[index - 1]["anchors"])]
    truncated = [index for index in ended if steps[index].truncated.any()]
    lost = [index for index, step in enumerate(steps) if step.life_lost.any()]
    return {
        "before any action": 0,
        "after one": 1,
        "at an end": ended[len(ended) // 2],
        "broken off": truncated[-1],
        "at a start": started[-1],
        "before new seeds": seeded[-1] - 1,
        "at new seeds": seeded[-1],
        "after new seeds": seeded[1] + 1,
        "at a lost life": lost[-1] if lost else 2,
        "late": len(steps) - 100,
    }


@pytest.mark.parametrize(("name", "anchor", "max_frames"), [("breakout", 50, 500), ("pong", 50, 300), ("pong", 300, 1000)])
def test_a_game_put_back_goes_on_as_if_nothing_had_happened(monkeypatch, name, anchor, max_frames):
    monkeypatch.setattr(atari, "ANCHOR", anchor)
    settings = {"sticky": 0.25, "max_frames": max_frames}
    games = world(name, 3, seed=2, **settings)
    steps, states = [games.last], [games.state_dict()]
    rows = chosen(games, 750 if anchor > 50 else 500)
    for row in rows:
        steps.append(games.step(row))
        states.append(games.state_dict())
    assert int(states[-1]["anchors"].min()) >= (2 if anchor > 50 else 4)
    for moment, index in moments(steps, states).items():
        other = make(GameConfig(name=name, **settings), 3, 2)
        other.load_state_dict(through_files(states[index]))
        assert same(other.last, steps[index]), moment
        assert same_state(other.state_dict(), states[index]), moment
        for place in range(index, min(index + 90, len(rows))):
            assert same(other.step(rows[place]), steps[place + 1]), (moment, place)
            assert same_state(other.state_dict(), states[place + 1]), (moment, place)


def test_a_game_can_be_put_back_again_and_again(monkeypatch):
    """Also into games that have played something else meanwhile."""
    monkeypatch.setattr(atari, "ANCHOR", 50)
    games = world("breakout", 3, sticky=0.25, max_frames=400)
    rows = chosen(games, 400)
    steps = [games.last, *played(games, rows)]
    other = world("breakout", 3, sticky=0.25, max_frames=400)
    for first in range(0, 400, 80):
        assert_same(played(other, rows[first : first + 80]), steps[first + 1 : first + 81])
        state = through_files(other.state_dict())
        played(other, rows[:30, ::-1])
        other.load_state_dict(state)
        assert same(other.last, steps[first + 80])
    assert same_state(other.state_dict(), games.state_dict())


def test_a_state_does_not_change_when_its_games_play_on():
    games = world("pong", 2)
    played(games, chosen(games, 20))
    state = games.state_dict()
    kept = through_files(state)
    played(games, chosen(games, 20, seed=1))
    assert same_state(state, kept)
    games.load_state_dict(state)
    played(games, chosen(games, 20, seed=1))
    assert same_state(state, kept)


def test_another_number_of_games_is_refused():
    state = world("pong", 3).state_dict()
    with pytest.raises(ValueError, match="the games were 3, not 2"):
        world("pong", 2).load_state_dict(state)


def test_the_actions_to_be_played_again_do_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr(atari, "ANCHOR", 50)
    games = world("pong", 3, max_frames=160)
    longest = 0
    for row in chosen(games, 500):
        games.step(row)
        longest = max(longest, len(games.state_dict()["actions"]))
    # A game may begin just before its 50 actions are over, and then has 40 more and one that brings the next.
    assert 50 <= longest <= 50 + 41
    assert int(games.state_dict()["anchors"].min()) >= 5


# Pictures


def test_pictures_are_what_gymnasium_shows():
    games, env = world("breakout", 1, colour=True, **PLAIN), reference("breakout", size=(160, 210), grey=False)
    rows = chosen(games, 250)
    starts = 0
    for index, (frames, _, _, _, started) in enumerate(referred(env, rows[:, 0], stack=1)):
        if index:
            games.step(rows[index - 1])
        assert (games.pictures().shape, games.pictures().dtype) == ((1, 210, 160, 3), np.uint8)
        assert cv2.absdiff(games.pictures()[0], frames[0]).max() <= ROUNDING, index
        starts += started
    assert starts >= 2


def unlikeness(picture, frame):
    """Mean difference between a picture, made grey and small, and a frame of an observation."""
    grey = cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)
    return cv2.absdiff(grey, frame).mean()


@pytest.mark.parametrize("name", ["breakout", "pong"])
def test_pictures_are_in_step_with_the_observations(monkeypatch, name):
    """Of every game, through idle frames, sticky actions, ends and new seeds."""
    monkeypatch.setattr(atari, "ANCHOR", 40)
    games = world(name, 3, colour=True, sticky=0.25, max_frames=240)
    before, others, seen = games.last, [], []
    for row in chosen(games, 200):
        step = games.step(row)
        seen += [unlikeness(games.pictures()[place], step.observations[place, -1]) for place in range(3)]
        others += [unlikeness(games.pictures()[place], before.observations[place, -1]) for place in range(3)]
        others += [unlikeness(games.pictures()[place], step.observations[place - 1, -1]) for place in range(3)]
        before = step
    assert max(seen) < 0.05
    assert np.mean(others) > 10 * np.mean(seen) + 0.1
    assert int(games.state_dict()["anchors"].min()) >= 2


def test_games_are_the_same_whether_anybody_looks_or_not(monkeypatch):
    monkeypatch.setattr(atari, "ANCHOR", 40)
    settings = {"sticky": 0.25, "max_frames": 240}
    blind, seen = world("breakout", 2, **settings), world("breakout", 2, colour=True, **settings)
    rows = chosen(blind, 150)
    assert_same(played(blind, rows), played(seen, rows))
    other = make(GameConfig(name="breakout", **settings), 2, 0, colour=True)
    other.load_state_dict(through_files(blind.state_dict()))  # of games that nobody watched
    assert np.array_equal(other.pictures(), seen.pictures())
    for row in rows[:40]:
        assert same(other.step(row), seen.step(row))
        assert np.array_equal(other.pictures(), seen.pictures())


def test_games_made_without_colour_have_no_pictures():
    games = world("pong", 1)
    with pytest.raises(ValueError, match="without colour"):
        games.pictures()


# Games that are begun at once


def test_new_games_begin_at_once_in_the_chosen_places_only():
    games = world("breakout", 3)
    before = played(games, chosen(games, 60))[-1]
    pick = np.array([True, False, True])
    step = games.restart(pick)
    assert games.last is step
    assert step.started.tolist() == [True, before.started[1], True]
    for name in ("rewards", "returns", "lengths", "terminated", "truncated", "life_lost"):
        assert not getattr(step, name)[pick].any()
    assert step.lives[pick].tolist() == [5, 5]
    assert not step.observations[pick, :-1].any()
    assert step.observations[pick, -1].any(axis=(1, 2)).all()
    assert same(row_of(step, 1), row_of(before, 1))


def test_the_next_action_after_a_restart_is_taken():
    """Both in the middle of a game and just after its end, whose next action would have been ignored."""
    games, other = (world("breakout", 2, max_frames=120) for _ in range(2))
    right, left = games.actions.index("RIGHT"), games.actions.index("LEFT")
    for wait in (20, 30):
        for each in (games, other):
            steps = played(each, np.zeros((wait, 2), np.int64))
            assert steps[-1].truncated.all() == (wait == 30)
            each.restart(np.ones(2, np.bool_))
        one, two = games.step(np.array([right, right])), other.step(np.array([right, left]))
        assert not one.started.any()
        assert one.lengths.tolist() == [1, 1]
        assert same(row_of(one, 0), row_of(two, 0))
        assert not same(row_of(one, 1), row_of(two, 1))
        for each in (games, other):
            each.restart(np.ones(2, np.bool_))


def test_a_restart_after_an_end_gives_the_game_that_the_next_action_would_have_brought():
    """The same games one action earlier: learners that restart and learners that wait see the same."""
    waiting, restarting = (world("breakout", 2, sticky=0.25, max_frames=200) for _ in range(2))
    for _ in range(3):
        rows = chosen(waiting, 50, seed=3)
        assert_same(played(waiting, rows), played(restarting, rows))
        assert waiting.last.truncated.all()
        assert same(waiting.step(np.zeros(2, np.int64)), restarting.restart(np.ones(2, np.bool_)))


def test_neighbours_of_restarted_games_notice_nothing():
    """Not even those that are just over: their next action is still ignored."""
    plain, restarted = (world("breakout", 3, sticky=0.25, max_frames=240) for _ in range(2))
    pick, over = np.array([False, True, False]), 0
    for index, row in enumerate(chosen(plain, 250)):
        one, two = plain.step(row), restarted.step(row)
        assert all(same(row_of(one, place), row_of(two, place)) for place in (0, 2)), index
        if index % 7 == 0 or one.ended[0]:
            over += one.ended[0]
            two = restarted.restart(pick)
            assert all(same(row_of(one, place), row_of(two, place)) for place in (0, 2)), index
    assert over >= 3


def test_a_restart_of_no_game_changes_nothing():
    plain, restarted = (world("breakout", 2) for _ in range(2))
    rows = chosen(plain, 20)
    assert_same(played(plain, rows), played(restarted, rows))
    assert same(restarted.restart(np.zeros(2, np.bool_)), plain.last)
    assert_same(played(plain, rows), played(restarted, rows))


@pytest.mark.parametrize("colour", [False, True])
def test_games_that_were_restarted_are_put_back_exactly(monkeypatch, colour):
    """Restarts of some and of all, at ends and in the middle, with old and new seeds."""
    monkeypatch.setattr(atari, "ANCHOR", 40)
    settings = {"sticky": 0.25, "max_frames": 200}
    games = world("breakout", 3, seed=4, colour=colour, **settings)
    rng = np.random.default_rng(0)
    steps, states, moves, pictures = [games.last], [games.state_dict()], [], []
    for index in range(300):
        if games.last.ended.any() and index % 2:
            move = ("restart", games.last.ended)
        elif index % 23 == 5:
            move = ("restart", rng.random(3) < (1.1 if index % 3 == 0 else 0.5))
        else:
            move = ("step", rng.integers(4, size=3))
        moves.append(move)
        pictures.append(games.pictures().copy() if colour else None)
        steps.append(getattr(games, move[0])(move[1]))
        states.append(games.state_dict())
    restarts = [index for index, (kind, _) in enumerate(moves) if kind == "restart"]
    assert len({moves[index][1].sum() for index in restarts}) >= 3
    assert int(states[-1]["anchors"].min()) >= 4
    seeded = [index for index in restarts if not states[index]["anchors"].equal(states[index + 1]["anchors"])]
    assert seeded, "no restart came with a new seed"
    for index in {restarts[0], restarts[0] + 1, restarts[-1] + 1, restarts[-1] + 2, seeded[-1], seeded[-1] + 1, seeded[0] + 1, 200}:
        other = make(GameConfig(name="breakout", **settings), 3, 4, colour)
        other.load_state_dict(through_files(states[index]))
        assert same(other.last, steps[index]), index
        for place in range(index, min(index + 60, 300)):
            if colour:
                assert np.array_equal(other.pictures(), pictures[place]), (index, place)
            kind, argument = moves[place]
            assert same(getattr(other, kind)(argument), steps[place + 1]), (index, place)
            assert same_state(other.state_dict(), states[place + 1]), (index, place)
