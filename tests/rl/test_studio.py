"""Agents at play, live: what is shown is what `rl.play` plays, hands are taken exactly, and sessions end when nobody needs them."""

import asyncio
import contextlib
import dataclasses
import io
import itertools
import shutil
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import torch
from imageio_ffmpeg import count_frames_and_secs

from envs import games
from envs.games import GameConfig
from lab import seeding
from lab.config import UserError
from lab.launch import launch
from lab.runs import Run
from rl import agent, live, play
from rl.dqn import EXPERIMENT
from rl.live import Session, packed, unpacked

pytestmark = pytest.mark.usefixtures("one_thread")

NOOP, LEFT, RIGHT = 0, 1, 2
WORDS = """
    --game.name catch --game.stack 2 --dqn.backbone small --dqn.hidden 16 --trainer.steps 6 --trainer.save-every 6
    --dqn.learning-starts 64 --dqn.batch-size 16 --optimizer.lr 0.01 --replay.capacity 2000 --test.video-every 0 --test.games 1
    --tracking.mode disabled --trainer.threads 1 --trainer.milestones 3
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of an agent that was trained on Catch for a moment."""
    folder = tmp_path_factory.mktemp("live") / "catch" / "20260101-000000-abcdef"
    before = torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()):
        assert launch(EXPERIMENT, "", [*WORDS, "--run-dir", str(folder)]) == 0
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def session(folder):
    """The run at play."""
    with contextlib.closing(Session(Run(folder))) as session:
        yield session


def same(one, other):
    """Whether two moments are equal in everything."""
    return all(
        np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b
        for a, b in zip(vars(one).values(), vars(other).values())
    )


# Playing


def expected(folder, count, **options):
    """What `rl.play` plays."""
    loaded = agent.load(str(folder))
    given = {"policy": "epsilon", "epsilon": 0.05, "seed": 0} | options
    return list(itertools.islice(play.moments(loaded.agent, loaded.experiment.game, **given), count))


@pytest.mark.parametrize("options", [{}, {"policy": "greedy"}, {"epsilon": 0.5, "seed": 7}])
def test_a_session_plays_what_is_played_elsewhere(session, folder, options):
    session.rules = dataclasses.replace(session.rules, **options)
    session.begin()
    shown = [unpacked(session.advance(0)), *(unpacked(session.advance(1)) for _ in range(130))]
    assert all(map(same, shown, expected(folder, 131, **options)))
    assert (shown[119].ended, shown[120].game) == (True, 2)


def test_several_actions_at_once_are_the_same_play_and_never_pass_an_end(session, folder):
    moments = expected(folder, 125)
    assert same(unpacked(session.advance(16)), moments[16])
    assert same(unpacked(session.advance(103)), moments[119])
    session.begin()
    session.advance(110)
    assert same(unpacked(session.advance(16)), moments[119])
    assert same(unpacked(session.advance(1)), moments[120])


def test_an_atari_game_plays_alike_too(session):
    session.agent = agent.RandomAgent(4)
    session.experiment = dataclasses.replace(session.experiment, game=GameConfig(name="breakout"))
    session.names = play.action_names(session.game)
    session.begin()
    stream = play.moments(session.agent, session.game, policy="sampled", epsilon=0, seed=0)
    for moment in itertools.islice(stream, 8):
        assert same(unpacked(session.packet), moment)
        session.advance(1)


def test_hands_are_taken_exactly_and_the_agent_goes_on(session):
    world = games.make(session.game, 1, seeding.derive(0, "play", 0), colour=True)
    world.reset()
    for hand in (LEFT, LEFT, LEFT, RIGHT, NOOP, RIGHT, None, None, RIGHT, None):
        taken = session.moment.action if hand is None else hand
        moment = unpacked(session.advance(1, hand))
        step = world.step(np.array([taken]))
        assert np.array_equal(moment.observation, step.observations[0])
        assert np.array_equal(moment.values, session.agent.values(torch.from_numpy(step.observations))[0].numpy())
    taken = [unpacked(packet).action for packet in session.minute]
    assert taken[:6] == [LEFT, LEFT, LEFT, RIGHT, NOOP, RIGHT]


def test_the_same_seed_is_the_same_game(session):
    session.begin(seed=3)
    first = [unpacked(session.advance(1)) for _ in range(30)]
    session.begin(seed=4)
    other = [unpacked(session.advance(1)) for _ in range(30)]
    session.begin(seed=3)
    assert all(same(unpacked(session.advance(1)), moment) for moment in first)
    assert not all(map(same, first, other))


# Who plays, and how


def test_another_checkpoint_looks_at_the_same_state(session, folder):
    session.advance(20)
    assert list(session.saved) == [2, 4, 6]
    picture, found = session.moment.picture, {}
    for step in (2, 4, 6):
        session.switch(step)
        found[step] = session.moment.values
        expected = agent.load(str(folder / f"milestones/step_{step:09d}")).agent
        assert np.array_equal(found[step], expected.values(torch.from_numpy(session.moment.observation[None]))[0].numpy())
        assert np.array_equal(session.moment.picture, picture)
    assert not np.array_equal(found[2], found[6])
    session.switch(None)
    assert session.moment.values == pytest.approx([1 / 3] * 3)
    assert {unpacked(session.advance(1)).action for _ in range(40)} == {0, 1, 2}


def test_random_actions_stay_random_under_any_rules(session):
    session.switch(None)
    session.change(policy="greedy")
    session.begin(sticky=0.5)
    assert {unpacked(session.advance(1)).action for _ in range(40)} == {0, 1, 2}
    assert session.game.sticky == 0.5


MISTAKES = [
    (lambda session: session.advance(1, 3), "no action 3; this game has 3"),
    (lambda session: session.advance(1, -1), "no action -1"),
    (lambda session: session.switch(3), "nothing is kept of step 3; of this run there is 2, 4, 6"),
    (lambda session: session.begin(seed=-1), "seed: expected an integer >= 0, found -1"),
    (lambda session: session.change(epsilon=1.5), "epsilon: expected a float >= 0 and <= 1"),
    (lambda session: session.change(policy="sampled"), "values of actions, no probabilities"),
]


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES)
def test_a_mistake_is_told_and_changes_nothing(session, folder, mistake, sentence):
    session.advance(5)
    before = session.rules, session.step, len(session.minute), session.packet
    with pytest.raises(UserError, match="^.*" + sentence):
        mistake(session)
    assert (session.rules, session.step, len(session.minute), session.packet) == before
    assert same(unpacked(session.advance(1)), expected(folder, 7)[6])


def test_a_run_without_a_whole_checkpoint_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "checkpoints/step_000000006/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="no whole checkpoint"):
        Session(Run(copy))


# Bytes


def test_a_moment_survives_being_packed():
    values = np.array([np.nan, -np.inf, 1e-30, 3], np.float32)
    picture, observation = (np.random.default_rng(0).integers(0, 256, shape, np.uint8) for shape in ((210, 160, 3), (4, 84, 84)))
    moment = play.Moment(picture, observation, values, 2, 0.1, 12, 3, True, 4)
    packet = packed(moment, "Q-value")
    assert same(unpacked(packet), moment)
    assert b'"meaning": "Q-value"' in zlib.decompress(packet)


def test_saliency_comes_as_colours(session):
    session.advance(4)
    colours = np.frombuffer(live.glow(session.agent, session.moment), np.uint8).reshape(12, 12, 4)
    levels = (255 * play.heat(session.agent, session.moment)).round().astype(int)
    assert levels.max() == 255
    assert np.array_equal(colours[..., :3], play.HEAT[levels])
    assert np.array_equal(colours[..., 3], (0.8 * levels).round())


# Videos


def test_the_last_minute_becomes_a_video(session, folder):
    session.advance(10)
    excerpt = session.excerpt()
    shown = list(map(unpacked, excerpt.packets))
    assert all(map(same, shown, expected(folder, 11)))
    path = excerpt.write()
    assert path.parent == folder / "media"
    assert count_frames_and_secs(path) == (11, pytest.approx(11 / 8, abs=0.05))


def test_no_more_than_a_minute_is_remembered_and_none_of_another_agent(session):
    for _ in range(500):
        session.advance(1)
    assert len(session.minute) == 60 * 8
    session.switch(2)
    session.advance(3)
    excerpt = session.excerpt()
    assert (len(excerpt.packets), excerpt.title) == (4, "Catch · DQN · step 2")
    session.begin(seed=1)
    assert len(session.excerpt().packets) == 1


def test_a_video_that_cannot_be_written_is_told(session, tmp_path):
    (tmp_path / "file").touch()
    excerpt = dataclasses.replace(session.excerpt(), path=tmp_path / "file" / "x.mp4")
    with pytest.raises(UserError, match="a video cannot be written here"):
        excerpt.write()


# Threads and sessions


def test_torch_takes_one_core_in_a_thread_of_play_alone():
    found = {}

    def count(name, first=lambda: None):
        def work():
            first()
            found[name] = torch.get_num_threads()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    torch.set_num_threads(3)
    count("play", live.use_one_core)
    count("other")
    assert found == {"play": 1, "other": 3}
    assert torch.get_num_threads() == 3


@pytest.fixture
def studio():
    """The page's module."""
    pytest.importorskip("nicegui", reason="the studio's pages are not tested without NiceGUI")
    from rl import studio

    return studio


def test_the_page_shows_every_family_of_agents_and_loads_none_to_begin_with(studio):
    assert set(studio.TAB.experiments) == set(agent.FAMILIES)
    heavy = ("torch", "gymnasium", "ale_py", "stable_baselines3", "matplotlib")
    code = f"import sys, rl.studio; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_visit_plays_in_its_thread_and_ends(studio, folder):
    async def visiting():
        visit = await studio.opened(Run(folder))
        visits = studio.Visits()
        identity = visits.enter(visit)
        packet = await visits.find(identity).do(lambda session: session.advance(2))
        thread, aside = await visit.do(lambda session: threading.get_ident()), await visit.do_aside(threading.get_ident)
        visits.leave(identity)
        with pytest.raises(UserError, match="This game was closed"):
            await visit.do(lambda session: session.advance(1))
        with pytest.raises(studio.HTTPException):
            visits.find(identity)
        return packet, thread, aside

    packet, thread, aside = asyncio.run(visiting())
    assert same(unpacked(packet), expected(folder, 3)[2])
    assert len({thread, aside, threading.get_ident()}) == 3


def test_a_broken_run_leaves_no_thread(studio, folder, tmp_path):
    shutil.copy(folder / "config.yaml", tmp_path / "config.yaml")
    before = threading.active_count()
    with pytest.raises(UserError, match="no whole checkpoint"):
        asyncio.run(studio.opened(Run(tmp_path)))
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "ThreadPoolExecutor" in thread.name:
            thread.join(10)
    assert threading.active_count() <= before


class Guest:
    """Stands for a visit where only its closing matters."""

    def __init__(self, asked):
        self.asked, self.closed = asked, False

    def close(self):
        self.closed = True


def test_one_session_too_many_closes_the_oldest(studio):
    visits, guests = studio.Visits(), [Guest(0.0) for _ in range(studio.MOST + 1)]
    identities = [visits.enter(guest) for guest in guests]
    assert [guest.closed for guest in guests] == [True] + [False] * studio.MOST
    assert len(set(identities)) == len(guests)
    assert min(map(len, identities)) >= 22
    with pytest.raises(studio.HTTPException, match=r"410.*several newer ones"):
        visits.find(identities[0])


def test_a_forgotten_session_is_closed(studio, monkeypatch):
    visits, forgotten, looked_at = studio.Visits(), Guest(100.0), Guest(150.0)
    for guest in (forgotten, looked_at):
        visits.enter(guest)
    monkeypatch.setattr(studio.time, "monotonic", lambda: 161.0)
    visits.tidy()
    assert (forgotten.closed, looked_at.closed) == (True, False)
