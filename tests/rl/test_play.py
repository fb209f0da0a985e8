"""Agents at play: what is shown is what happened, videos last as long as the play, and saliency finds what an agent looks at."""

import contextlib
import importlib.util
import io
import itertools
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio_ffmpeg import count_frames_and_secs
from PIL import Image

from envs import games
from envs.games import GameConfig
from lab import seeding
from lab.config import UserError
from lab.launch import launch
from rl import play
from rl.agent import Agent, RandomAgent
from rl.dqn import EXPERIMENT

ROOT = Path(__file__).resolve().parents[2]
WATCH = ROOT / "scripts/watch.py"
CATCH, BRICKS, BREAKOUT = (GameConfig(name=name, stack=2) for name in ("catch", "bricks", "breakout"))


class Linear(Agent):
    """Values that are sums of some of the pixels, by weights (actions, stack, H, W)."""

    def __init__(self, weights: torch.Tensor, meaning: str = "Q-value") -> None:
        self.weights, self.meaning = weights, meaning
        self.calls = []

    def values(self, observations):
        assert observations.dtype == torch.uint8
        self.calls.append(len(observations))
        return torch.einsum("nshw,ashw->na", observations.float() / 255, self.weights)


def looking_at(rows: slice, columns: slice, size: int, actions: int = 3, stack: int = 2) -> Linear:
    """An agent that looks at one patch only, in which each action likes other pixels."""
    weights = torch.zeros(actions, stack, size, size)
    weights[:, :, rows, columns] = torch.randn(weights[:, :, rows, columns].shape, generator=torch.Generator().manual_seed(1))
    return Linear(weights)


def played(config, count, seed=0, policy="sampled", agent=None):
    agent = agent or RandomAgent(len(play.action_names(config)))
    return list(itertools.islice(play.moments(agent, config, policy=policy, epsilon=0.5, seed=seed), count))


# Moments


@pytest.fixture(scope="module")
def breakout():
    """The first moments of a game of Breakout."""
    return played(BREAKOUT, 60)


@pytest.mark.parametrize("config", [CATCH, BRICKS, BREAKOUT], ids=lambda config: config.name)
def test_moments_are_what_the_same_games_give_for_the_same_actions(config, breakout):
    shown = breakout if config is BREAKOUT else played(config, 260)
    world = games.make(config, 1, seeding.derive(0, "play", 0), colour=True)
    step, number = world.reset(), 1
    for moment in shown:
        assert (moment.score, moment.step, moment.lives) == (step.returns[0], step.lengths[0], step.lives[0])
        assert (moment.ended, moment.game) == (step.ended[0], number)
        assert (moment.picture == world.pictures()[0]).all()
        assert (moment.observation == step.observations[0]).all()
        number += int(step.ended[0])
        step = world.step(np.array([moment.action]))
    assert config is BREAKOUT or shown[-1].game > 1
    world.close()


def test_moments_tell_the_values_of_the_state_that_they_show_and_follow_the_policy():
    agent = looking_at(slice(0, 12), slice(0, 12), 12)
    for moment in played(CATCH, 130, policy="greedy", agent=agent):
        assert (moment.values == agent.values(torch.from_numpy(moment.observation[None]))[0].numpy()).all()
        assert moment.values[moment.action] == moment.values.max()


def test_the_same_seed_plays_the_same_and_another_one_does_not():
    actions = [[moment.action for moment in played(CATCH, 100, seed)] for seed in (5, 5, 6)]
    assert actions[0] == actions[1] != actions[2]


def test_an_excerpt_ends_with_the_last_game_or_after_the_last_action():
    shown = list(play.excerpt(iter(played(CATCH, 500)), 2, None))
    assert [moment.game for moment in shown if moment.ended] == [1, 2]
    assert shown[-1].ended
    assert [moment.step for moment in play.excerpt(iter(played(CATCH, 500)), 2, 30)] == list(range(31))
    across = list(play.excerpt(iter(played(CATCH, 500)), None, 150))
    assert (across[-1].game, across[-1].step) == (2, 150 - 119)


# Pictures


def picture_of(moment, count=3, meaning="probability", **options):
    return play.compose(moment, [f"ACTION{index}" for index in range(count)], meaning, "title", **options)


def rows_of(picture, colour):
    """Where a colour is, as the set of rows."""
    return set(np.flatnonzero((picture == colour).all(2).any(1)))


@pytest.mark.parametrize("height", [97, 480, 720])
def test_all_pictures_of_a_game_have_one_even_size(height, breakout):
    shapes = {picture_of(moment, 4, height=height).shape for moment in [*breakout, replace(breakout[0], ended=True)]}
    assert len(shapes) == 1
    (rows, columns, channels), *_ = shapes
    assert abs(rows - height) <= 1
    assert (rows % 2, columns % 2, channels) == (0, 0, 3)


@pytest.mark.parametrize("count", [2, 3, 9, 10, 18])
def test_the_chosen_action_stands_out_in_its_own_place(count):
    moment = replace(played(CATCH, 1)[0], values=np.full(count, 0.5, np.float32))
    places = []
    for action in range(count):
        picture = picture_of(replace(moment, action=action), count)
        places.append(np.argwhere((picture == play.CHOSEN).all(2)))
    corners = [tuple(place.min(0)) for place in places]
    assert len(set(corners)) == count
    assert all(len(place) > 500 for place in places)
    assert sorted(corners, key=lambda corner: (corner[1], corner[0])) == corners


def test_nothing_is_chosen_at_the_end():
    moment = replace(played(CATCH, 1)[0], ended=True)
    assert not rows_of(picture_of(moment), play.CHOSEN)


def test_bars_are_as_long_as_probabilities():
    moment = replace(played(CATCH, 1)[0], values=np.array([0, 0.25, 0.75], np.float32), action=2)
    picture = picture_of(moment)
    widths = [(picture == colour).all(2).sum(1).max() for colour in (play.FILL, play.CHOSEN)]
    assert widths == [90, 270]


def test_bars_go_from_the_least_q_value_to_the_greatest_and_noise_makes_none():
    moment = replace(played(CATCH, 1)[0], action=0)
    spread = picture_of(replace(moment, values=np.array([-10, 20, 5], np.float32)), meaning="Q-value")
    assert (spread == play.FILL).all(2).sum(1).max() == 360
    alike = picture_of(replace(moment, values=np.array([5, 5 + 1e-5, 5], np.float32)), meaning="Q-value")
    assert (alike == play.FILL).all(2).sum(1).max() < 20


@pytest.mark.parametrize("values", [[np.nan] * 18, [np.inf, -np.inf] + [0] * 16, [1e30] * 18, [-12345.678] * 18])
def test_no_score_and_no_value_leaves_its_place(values):
    moment = replace(played(CATCH, 1)[0], values=np.array(values, np.float32), score=-12_345_678.0, step=27_000, game=1000, lives=100)
    picture = play.compose(moment, ["DOWNRIGHTFIRE"] * 18, "Q-value", "a title that is far too long for any panel " * 9)
    left, right = 480, picture.shape[1]
    for margin in (picture[:, left : left + 20], picture[:, right - 20 :], picture[-8:, left:], picture[:8, left:]):
        assert (margin == play.GROUND).all()


def test_saliency_is_laid_over_the_game_alone():
    moment = played(CATCH, 1)[0]
    plain = picture_of(moment)
    assert (picture_of(moment, saliency=np.zeros((12, 12), np.float32)) == plain).all()
    heat = np.zeros((12, 12), np.float32)
    heat[3, 6] = 1
    changed = np.argwhere((picture_of(moment, saliency=heat) != plain).any(2))
    assert (changed.min(0) >= (80, 200)).all()
    assert (changed.max(0) <= (200, 320)).all()


def test_a_game_is_shown_with_its_own_proportions_and_colours():
    moment = played(CATCH, 1)[0]
    picture = picture_of(moment, height=2 * 168)
    assert (picture[:, : 2 * 168] == moment.picture.repeat(2, 0).repeat(2, 1)).all()


# Videos


def film(path, config=CATCH, **options):
    agent = RandomAgent(len(play.action_names(config)))
    return play.film(agent, config, path, policy="sampled", epsilon=0, seed=0, height=64, **options)


def durations(path):
    """What each frame of a GIF lasts, milliseconds."""
    with Image.open(path) as file:
        return [(file.seek(index), file.info["duration"])[1] for index in range(file.n_frames)]


def test_a_video_shows_every_action_and_a_second_of_the_end(tmp_path):
    done = []
    shown = film(tmp_path / "deep" / "x.mp4", progress=done.append)
    (game,) = shown
    assert (game.length, game.finished) == (119, True)
    assert game.score == played(CATCH, 120)[-1].score
    frames, seconds = count_frames_and_secs(tmp_path / "deep" / "x.mp4")
    assert frames == 119 + 8
    assert seconds == pytest.approx(frames / 8, abs=0.05)
    assert done == list(range(120))


def test_a_video_that_is_cut_simply_ends(tmp_path):
    assert [(game.length, game.finished) for game in film(tmp_path / "x.mp4", most=10)] == [(10, False)]
    assert count_frames_and_secs(tmp_path / "x.mp4")[0] == 11
    several = film(tmp_path / "y.mp4", most=150, episodes=3)
    assert [(game.length, game.finished) for game in several] == [(119, True), (31, False)]


def test_atari_runs_at_the_pace_of_the_console(tmp_path):
    film(tmp_path / "x.mp4", BREAKOUT, most=29)
    frames, seconds = count_frames_and_secs(tmp_path / "x.mp4")
    assert frames == 30
    assert seconds == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("suffix", "most"), [(".gif", 25), (".mp4", 60)])
def test_a_fast_video_leaves_pictures_out_and_keeps_its_pace(tmp_path, suffix, most):
    path = tmp_path / f"x{suffix}"
    film(path, speed=20, most=79)  # 80 pictures at 160 a second
    seconds = sum(durations(path)) / 1000 if suffix == ".gif" else count_frames_and_secs(path)[1]
    frames = len(durations(path)) if suffix == ".gif" else count_frames_and_secs(path)[0]
    assert frames == pytest.approx(80 * most / 160, abs=1)
    assert seconds == pytest.approx(0.5, abs=0.05)


def test_a_gif_lasts_as_long_as_the_play(tmp_path):
    film(tmp_path / "x.gif", most=39)
    assert sum(durations(tmp_path / "x.gif")) == pytest.approx(40 / 8 * 1000, abs=20)


def test_memory_does_not_grow_with_the_length(tmp_path):
    film(tmp_path / "x.mp4", most=20)  # what is made once for all videos
    peaks = []
    for most in (200, 900):
        tracemalloc.start()
        film(tmp_path / "x.mp4", most=most, episodes=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000  # 700 pictures are 17 MB


def test_a_video_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.mp4 or \.gif"):
        film(tmp_path / "x.avi")
    assert not list(tmp_path.iterdir())


# Saliency


def plain_saliency(agent, observation, values):
    """Greydanus et al. 2018, equations 1 to 3, a place and a pixel at a time; before it is enlarged."""
    _, height, width = observation.shape
    pitch = max(1, height // 16)
    count = -(-height // pitch)

    def bell(distance, sigma):
        return np.exp(-(distance**2) / (2 * sigma**2))

    def blurred(line, at):
        weights = bell(np.arange(len(line)) - at, 3.0)
        return (weights * line).sum() / weights.sum()

    blur = observation.astype(float)
    for axis in (1, 2):
        blur = np.stack([np.apply_along_axis(blurred, axis, blur, at) for at in range(observation.shape[axis])], axis)
    found = np.zeros((count, count))
    for row, column in itertools.product(range(count), repeat=2):
        i, j = ((place + 0.5) * height / count - 0.5 for place in (row, column))
        mask = bell(np.arange(height)[:, None] - i, pitch) * bell(np.arange(width) - j, pitch)
        changed = observation * (1 - mask) + blur * mask
        other = agent.values(torch.from_numpy(changed.round().astype(np.uint8))[None])[0].numpy()
        found[row, column] = 0.5 * np.square((other - other.mean()) - (values - values.mean())).sum()
    return found


def observation_of(size, stack=2):
    return np.random.default_rng(0).integers(0, 256, (stack, size, size), np.uint8)


def salient(agent, observation):
    return play.saliency(agent, observation, agent.values(torch.from_numpy(observation[None]))[0].numpy())


def test_saliency_is_that_of_the_paper():
    observation, agent = observation_of(12), looking_at(slice(0, 12), slice(0, 12), 12)
    expected = plain_saliency(agent, observation, agent.values(torch.from_numpy(observation[None]))[0].numpy())
    assert np.allclose(salient(agent, observation), expected / expected.max(), atol=1e-3)


@pytest.mark.parametrize(("size", "top", "left", "side"), [(12, 2, 7, 3), (16, 10, 1, 3), (84, 60, 20, 8), (84, 4, 70, 10), (20, 0, 0, 4)])
def test_saliency_is_greatest_where_the_agent_looks(size, top, left, side):
    found = salient(looking_at(slice(top, top + side), slice(left, left + side), size), observation_of(size))
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert found.shape == (size, size)
    assert (found.min() >= 0, found.max()) == (True, 1)
    assert top - 1 <= row <= top + side
    assert left - 1 <= column <= left + side
    far = found[(top + size // 2) % size, (left + size // 2) % size]
    assert far < 0.01


@pytest.mark.parametrize("size", [12, 84])
def test_there_is_no_saliency_where_nothing_matters(size):
    everything, observation = looking_at(slice(0, size), slice(0, size), size), observation_of(size)
    alike = Linear(everything.weights[:1].expand(3, -1, -1, -1))
    assert not salient(RandomAgent(3), observation).any()
    assert not salient(alike, observation).any()  # moves all Q-values together
    assert salient(Linear(alike.weights, "probability"), observation).any()
    assert not salient(everything, np.full_like(observation, 100)).any()  # a blur takes nothing away


def test_saliency_asks_in_few_calls_of_bounded_size():
    agent = looking_at(slice(0, 9), slice(0, 9), 84)
    salient(agent, observation_of(84))
    assert agent.calls == [1, 256, 17 * 17 - 256]


# The script


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of an agent that was trained on Catch for a moment."""
    folder = tmp_path_factory.mktemp("watch") / "run"
    words = """
        --game.name catch --game.stack 2 --dqn.backbone small --dqn.hidden 16 --trainer.steps 4 --trainer.save-every 2
        --dqn.learning-starts 64 --dqn.batch-size 16 --replay.capacity 2000 --test.video-every 0 --test.games 1
        --tracking.mode disabled --trainer.threads 1
    """.split()  # noqa: SIM905
    before = torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()):
        assert launch(EXPERIMENT, "", [*words, "--run-dir", str(folder)]) == 0
    torch.set_num_threads(before)
    return folder


@pytest.fixture(scope="module")
def watch():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("watch", WATCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["watch"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["watch"]


@pytest.fixture
def call(watch, run, monkeypatch, capsys):
    """Runs the script on the run, as `python scripts/watch.py RUN ...` would; gives its exit code and what it printed."""
    monkeypatch.delenv("DISPLAY", raising=False)

    def called(*words, name=run):
        monkeypatch.setattr(sys, "argv", ["watch.py", *map(str, [name, *words])])
        try:
            code = watch.guarded(watch.main)
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return called


def test_the_script_writes_a_video(run, tmp_path):
    out = tmp_path / "x.mp4"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, WATCH, run, "--out", out, "--steps", "20"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == f"game 1: score {played_score(out.parent, run):g} so far, 20 steps\nvideo: {out}\n"
    assert count_frames_and_secs(out)[0] == 21


def played_score(folder, run):
    """What the agent of the run has after 20 actions."""
    from rl import agent

    loaded = agent.load(str(run))
    shown = play.film(loaded.agent, loaded.experiment.game, folder / "y.mp4", policy="epsilon", epsilon=0.05, seed=0, most=20, height=64)
    return shown[0].score


def test_where_there_is_no_display_the_video_goes_to_the_run(call, run):
    code, printed = call("--steps", 3)
    assert (code, "no display here" in printed) == (0, True)
    assert f"video: {run}/media/watch_000000004_seed0.mp4" in printed
    assert (run / "media/watch_000000004_seed0.mp4").exists()
    assert f"video: {run}/media/watch_random_seed7.mp4" in call("--random", "--seed", 7, "--steps", 3)[1]


def test_several_games_an_older_checkpoint_and_other_rules_can_be_watched(call, tmp_path):
    code, printed = call("--episodes", 2, "--out", tmp_path / "x.mp4", "--policy", "greedy", "--sticky", 0.5, "--speed", 30)
    assert (code, printed.count("119 steps"), "game 2: score" in printed) == (0, 2, True)
    assert call("--checkpoint", 2, "--steps", 5, "--saliency", "--out", tmp_path / "x.gif")[0] == 0


MISTAKES = [
    (["--out", "x.avi"], "--out x.avi: videos are written as .mp4 or .gif"),
    (["--checkpoint", "9"], "has none of that step; it has 1, 2, 3, 4"),
    (["--policy", "sampled"], "policy 'sampled': this agent has values of actions, no probabilities"),
    (["--speed", "0"], "speed: expected a float > 0, found 0.0"),
    (["--episodes", "0"], "episodes: expected an integer >= 1 or none, found 0"),
    (["--steps", "0"], "steps: expected an integer >= 1 or none, found 0"),
    (["--epsilon", "2"], "epsilon: expected a float >= 0 and <= 1, found 2.0"),
    (["--sticky", "-1"], "sticky: expected"),
    (["--steps", "2", "--out", f"{WATCH}/x.mp4"], "x.mp4: a video cannot be written here (File exists)"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_a_mistake_gets_one_clear_sentence(call, words, expected):
    code, printed = call(*words)
    assert code == 2
    assert expected in printed
    assert "Traceback" not in printed


def test_a_run_that_is_not_there_is_missed(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "latest"):
        code, printed = call(name=name)
        assert (code, "no dqn or pqn or sb3 run here" in printed) == (2, True)


def test_help_teaches_and_loads_nothing_heavy():
    heavy = ("gymnasium", "ale_py", "imageio_ffmpeg", "tkinter", "stable_baselines3", "matplotlib", "wandb")
    code = (
        f"import runpy, sys\nsys.argv = ['watch.py', '--help']\n"
        f"try:\n    runpy.run_path({str(WATCH)!r}, run_name='__main__')\n"
        f"except SystemExit:\n    print('HEAVY', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "python scripts/watch.py latest" in done.stdout


# The window


@pytest.fixture(scope="module")
def screen():
    """A display: a virtual one where Xvfb is installed, otherwise the one that there is."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    if not shutil.which("Xvfb"):
        if "DISPLAY" not in os.environ:
            pytest.skip("neither a display nor Xvfb is here")
        yield os.environ["DISPLAY"]
        return
    reading, writing = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", "1280x1024x24", "-nolisten", "tcp"],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with open(reading) as pipe:
        number = pipe.readline().strip()
    if not number:
        pytest.skip("Xvfb does not start here")
    yield f":{number}"
    server.terminate()
    server.wait()


@pytest.fixture
def window(watch, run, screen, monkeypatch):
    """Makes a window that presses a key itself when so many pictures have been drawn, and shows everything at once."""
    monkeypatch.setenv("DISPLAY", screen)
    monkeypatch.setattr(play, "PAUSE", 0.001)

    def made(keys, **options):
        settings = watch.Options(run=str(run), speed=1000.0, **options)
        root = watch.display()
        root.focus_force()
        new = watch.Window(root, watch.player_for(settings), settings)
        drawn, draw = [], new.draw

        def drawing():
            draw()
            drawn.append((new.moment, new.saliency, new.speed, root.title(), new.image.width()))
            if key := keys.get(len(drawn)):
                root.event_generate(key, when="tail")

        new.draw, new.drawn = drawing, drawn
        return new

    return made


def test_a_window_shows_every_moment_until_the_end(window):
    shown = window({}, episodes=2)
    assert [(game.length, game.finished) for game in shown.run()] == [(119, True), (119, True)]
    assert [(moment.game, moment.step) for moment, *_ in shown.drawn] == [(game, step) for game in (1, 2) for step in range(120)]
    assert shown.drawn[3][3] == "Catch · DQN · step 4 · score 0 · speed 1000"
    assert {width for *_, width in shown.drawn} == {480 + 408}


def test_keys_change_what_a_window_shows(window):
    shown = window({5: "<Key-minus>", 8: "<Key-s>", 10: "<Key-n>", 15: "<Key-plus>", 20: "<Key-q>"})
    games_shown = shown.run()
    assert [(game.length, game.finished) for game in games_shown] == [(8, False), (9, False)]
    assert [moment.game for moment, *_ in shown.drawn] == [1] * 10 + [2] * 10
    assert [index for index, (_, saliency, *_) in enumerate(shown.drawn) if saliency] == list(range(8, 20))
    assert [speed for _, _, speed, *_ in shown.drawn] == [1000] * 5 + [32] * 15


def test_a_pause_stops_the_game_until_it_ends(window):
    shown = window({6: "<Key-space>"}, episodes=1)
    tick, paused = shown.tick, []

    def ticking():
        tick()
        if shown.paused:
            paused.append((len(shown.drawn), shown.root.title()))
            if len(paused) == 3:
                shown.root.event_generate("<Key-space>", when="tail")

    shown.tick = ticking
    assert shown.run()[0].finished
    assert paused == [(6, "Catch · DQN · step 4 · score 0 · speed 1000 · paused")] * 3


def test_a_window_can_be_closed(window):
    shown = window({4: "<Key-Escape>"})
    assert shown.run() == [play.Shown(0.0, 3, False)]
    shown = window({})
    shown.root.after(1, lambda: shown.root.tk.call(shown.root.protocol("WM_DELETE_WINDOW")))
    assert len(shown.run()) == 1


def test_an_error_inside_a_window_ends_it_and_is_told(window):
    shown = window({})
    shown.player.agent.values = lambda observations: 1 / 0
    with pytest.raises(ZeroDivisionError):
        shown.run()
