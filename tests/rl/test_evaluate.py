"""Judging: exactly the games that were asked for, whole, by the real score, and a line that says how."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import envs.games
import rl.evaluate
from envs.games import GameConfig, Games, Step
from lab.config import UserError
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.launch import launch
from lab.recorder import log
from lab.runs import Run
from lab.trainer import Trainer
from rl import scores
from rl.agent import Agent, Loaded, RandomAgent
from rl.dqn import EXPERIMENT, DQNConfig, DQNExperiment
from rl.evaluate import Game, PlayConfig, TestConfig, check_policy, judge, play_games, policy_of, protocol, report
from rl.replay import ReplayConfig

ROOT = Path(__file__).resolve().parents[2]
CATCH = GameConfig(name="catch", stack=2)


class Knowing(Agent):
    """Values that are the same whatever is seen."""

    def __init__(self, values, meaning="Q-value"):
        self.row, self.meaning, self.asked = torch.tensor(values), meaning, 0

    def values(self, observations):
        self.asked += 1
        return self.row.expand(len(observations), -1)


class Uneven(Games):
    """Half of the games are over at once and worth nothing, the others are long and worth a hundred points."""

    actions, frames_per_step, shape = ("STAY",), 1, (1, 1, 1)
    lost = False
    """Lose a life at every action."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed
        self.played, self.closed = np.zeros(count, int), False

    @staticmethod
    def outcome(seed, place, index):
        """Score and length of a place's game."""
        long = np.random.default_rng((seed, place, index)).random() < 0.5
        return (100.0, 50) if long else (0.0, 1)

    def show(self, **given):
        no, zero, none = np.zeros(self.count, bool), np.zeros(self.count, np.float32), np.zeros(self.count, np.int64)
        plain = {"observations": np.zeros((self.count, 1, 1, 1), np.uint8), "rewards": zero, "terminated": no, "truncated": no}
        plain |= {"life_lost": no, "started": no, "returns": zero, "lengths": none, "lives": none}
        self.last = Step(**plain | given)
        return self.last

    def reset(self):
        return self.show(started=np.ones(self.count, bool))

    def step(self, actions):
        before = self.last
        self.played += before.ended
        ends = [self.outcome(self.seed, place, index) for place, index in enumerate(self.played)]
        score, length = (np.array(column) for column in zip(*ends, strict=True))
        lengths = np.where(before.ended, 0, before.lengths + 1)
        over = lengths == length
        rewards = np.where(over, score, 0).astype(np.float32)
        lost = np.full(self.count, self.lost) & ~over
        return self.show(rewards=rewards, terminated=over, started=before.ended, returns=rewards, lengths=lengths, life_lost=lost)

    def close(self):
        self.closed = True

    restart = pictures = state_dict = load_state_dict = None


@pytest.fixture
def uneven(monkeypatch):
    """The uneven games that were made, in place of any others."""
    made = []
    monkeypatch.setattr(envs.games, "make", lambda config, count, seed, *_, **__: made.append(Uneven(count, seed % 1000)) or made[-1])
    return made


def play(agent=None, config=CATCH, count=10, policy="epsilon", epsilon=0.05, seed=0, **options):
    return play_games(agent or RandomAgent(3), config, count, policy=policy, epsilon=epsilon, seed=seed, **options)


# Playing


@pytest.mark.parametrize(("count", "side_by_side"), [(1, 8), (7, 8), (8, 8), (21, 8), (20, 3), (5, 1)])
def test_exactly_the_games_that_were_asked_for_are_played(uneven, count, side_by_side):
    ticks = []
    played = play(count=count, side_by_side=side_by_side, progress=lambda: ticks.append(1))
    (world,) = uneven
    places = min(count, side_by_side)
    assert world.count == places
    assert len(played) == len(ticks) == count
    expected = [Uneven.outcome(world.seed, index % places, index // places) for index in range(count)]
    assert [(game.score, game.length) for game in played] == expected
    assert world.closed


def test_short_games_are_not_preferred(uneven):
    """Who takes the first 24 games that end, takes nearly all of them from those that are over at once."""
    played = play(count=24, side_by_side=24)
    (world,) = uneven
    ends = {}
    for place in range(24):
        clock = 0
        for index in range(20):
            score, length = Uneven.outcome(world.seed, place, index)
            clock += length + (index > 0)
            ends[clock, place] = score
    first_come = [ends[key] for key in sorted(ends)[:24]]
    fair = [Uneven.outcome(world.seed, place, 0)[0] for place in range(24)]
    assert np.mean([game.score for game in played]) == np.mean(fair)
    assert 25 < np.mean(fair) < 75
    assert np.mean(first_come) < 0.4 * np.mean(fair)


def test_lost_lives_do_not_end_a_game(uneven, monkeypatch):
    monkeypatch.setattr(Uneven, "lost", True)
    assert {game.length for game in play(count=20)} == {1, 50}


def test_a_seed_gives_the_same_games_and_another_seed_others():
    first = play(count=12, seed=3)
    assert play(count=12, seed=3) == first
    assert play(count=12, seed=4) != first
    assert len({game.score for game in first}) > 1


def test_the_games_of_a_test_are_neither_those_of_the_training_nor_those_of_another_test(monkeypatch):
    seeds = []
    monkeypatch.setattr(envs.games, "make", lambda config, count, seed, *_, **__: seeds.append(seed) or Uneven(count, 0))
    dqn = DQNConfig(backbone="small", hidden=4)
    experiment = DQNExperiment(dqn=dqn, replay=ReplayConfig(capacity=100), trainer=TrainerConfig(seed=1), test=TestConfig(video_every=0))
    trainer = Trainer(experiment, World())
    for trainer.step in (100, 200):
        trainer.task.test(trainer)
    play(seed=1)
    assert len(set(seeds)) == len(seeds) == 4


def test_games_that_are_broken_off_are_told_from_those_that_ended():
    cut = play(count=3, config=GameConfig(name="catch", stack=2, max_frames=50))
    assert [(game.length, game.truncated) for game in cut] == [(50, True)] * 3
    whole = play(count=3)
    assert [(game.length, game.truncated) for game in whole] == [(119, False)] * 3


def test_an_atari_game_is_played_over_all_its_lives_and_its_points_are_not_clipped(monkeypatch):
    """The rules of training, where a lost life is an end and a reward at most 1, are none of the test's."""
    shown, make = [], envs.games.make

    def watched(*given):
        world = make(*given)
        step = world.step
        world.step = lambda actions: shown.append(step(actions)) or shown[-1]
        return world

    monkeypatch.setattr(envs.games, "make", watched)
    config = GameConfig(name="breakout", stack=1, size=42, threads=1)
    (game,) = play(RandomAgent(4), config, 1, policy="sampled", seed=2)
    lives = [int(step.lives[0]) for step in shown]
    assert sum(bool(step.life_lost[0]) for step in shown) == 4
    assert (lives[0], lives[-1]) == (5, 0)
    assert game.length == len(shown) == shown[-1].lengths[0]
    assert game.score == sum(float(step.rewards[0]) for step in shown)
    assert not game.truncated


def test_points_above_one_count_in_full(uneven):
    assert {game.score for game in play(count=20)} == {0.0, 100.0}


# Policies


def actions_of(agent, policy, epsilon=0.25, count=4000):
    draw = torch.Generator().manual_seed(0)
    return torch.bincount(agent.act(torch.zeros(count, 1, 1, 1), policy, epsilon, draw), minlength=3) / count


def test_each_policy_takes_the_actions_that_it_says():
    agent = Knowing([0.2, 0.7, 0.1], "probability")
    assert actions_of(agent, "greedy").tolist() == [0, 1, 0]
    assert actions_of(agent, "sampled").tolist() == pytest.approx([0.2, 0.7, 0.1], abs=0.03)
    assert actions_of(agent, "epsilon").tolist() == pytest.approx([0.25 / 3, 0.75 + 0.25 / 3, 0.25 / 3], abs=0.03)
    assert actions_of(agent, "epsilon", epsilon=0.0).tolist() == [0, 1, 0]
    assert actions_of(agent, "epsilon", epsilon=1.0).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    assert actions_of(RandomAgent(3), "greedy").tolist() == pytest.approx([1 / 3] * 3, abs=0.03)


def test_the_policy_and_its_epsilon_reach_the_games():
    left = Knowing([0.0, 1.0, 0.0])
    always, sometimes, never = (play(left, epsilon=epsilon, count=8) for epsilon in (0.0, 0.5, 1.0))
    assert play(left, policy="greedy", epsilon=0.7, count=8) == play(left, policy="greedy", epsilon=0.0, count=8)
    assert always != sometimes != never
    assert left.asked > 0


def test_values_of_actions_are_no_probabilities():
    with pytest.raises(UserError, match="'sampled': this agent has values of actions, no probabilities; take epsilon or greedy"):
        check_policy(Knowing([0.0, 1.0]), "sampled")
    for agent, policy in ((Knowing([0.0, 1.0]), "epsilon"), (Knowing([0.0, 1.0]), "greedy"), (RandomAgent(2), "sampled")):
        check_policy(agent, policy)


# The protocol


def test_the_protocol_names_all_that_a_score_depends_on():
    config = GameConfig(name="ALE/Seaquest-v5", sticky=0.25, noop_max=7, max_frames=18_000)
    assert protocol(config, 30, "epsilon", 0.05, 3) == (
        "seaquest, 30 whole games of at most 18,000 frames, epsilon 0.05, sticky actions 0.25, up to 7 no-ops, "
        "the game's own actions, real scores, lost lives do not end a game, seed 3"
    )
    plain = protocol(GameConfig(name="pong", full_actions=True), 1, "greedy", 0.05, 0)
    assert "greedy" in plain
    assert "epsilon" not in plain
    assert "no sticky actions" in plain
    assert "all 18 actions" in plain
    assert "of at most 108,000 frames" in plain
    assert ", sampled, " in protocol(GameConfig(name="pong"), 1, "sampled", 0.05, 0)


def test_the_protocol_of_a_small_game_names_what_it_depends_on_too():
    assert protocol(CATCH, 8, "epsilon", 0.1, 2) == "catch, 8 whole games, epsilon 0.1, seed 2"
    assert "sticky actions 0.25" in protocol(GameConfig(name="catch", sticky=0.25), 8, "greedy", 0.1, 2)


# While training goes on


def test_a_test_while_training_depends_on_the_seed_and_the_step_alone(monkeypatch):
    class Stub:
        step, media = 40, None
        config = EXPERIMENT.trainer

    tester = rl.evaluate.Tester(CATCH, TestConfig(games=3, video_every=0), 5, "epsilon")
    first = tester(RandomAgent(3), Stub)
    assert tester(RandomAgent(3), Stub) == first
    assert set(first) == {"eval/return", "eval/length"}
    assert first["eval/length"] == 119
    Stub.step = 80
    assert tester(RandomAgent(3), Stub) != first


# Several agents


def loaded(agent=None, game=CATCH, name="a", kind=DQNExperiment, **settings):
    return Loaded(agent or Knowing([0.0, 1.0, 0.0]), kind(game=game, **settings), Run(Path(name)), 10, ("NOOP", "LEFT", "RIGHT"))


def test_every_agent_plays_all_the_games_on_the_same_terms():
    agents = [loaded(Knowing(row), name=str(index)) for index, row in enumerate(([0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]))]
    played = judge(agents, PlayConfig(games=6), seed=1)
    assert [len(games) for games in played] == [6, 6, 6]
    assert played[0] == played[2] == play(Knowing([0.0, 1.0, 0.0]), count=6, seed=1)
    assert played[0] != played[1]


def test_agents_of_different_games_are_not_judged_together():
    full = GameConfig(name="pong", full_actions=True)
    for other in (GameConfig(name="bricks"), GameConfig(name="pong"), full):
        with pytest.raises(UserError, match="these agents play different games"):
            judge([loaded(game=CATCH), loaded(game=other)], PlayConfig(games=1), 0)
    with pytest.raises(UserError, match="these agents play by different rules"):
        judge([loaded(game=GameConfig(name="pong")), loaded(game=full)], PlayConfig(games=1), 0)


@pytest.mark.parametrize("difference", [{"sticky": 0.25}, {"max_frames": 50}])
def test_agents_whose_games_go_by_different_rules_are_not_judged_under_one_protocol(difference):
    """The one line that is printed could be true of only one of them."""
    with pytest.raises(UserError):
        judge([loaded(), loaded(game=GameConfig(name="catch", stack=2, **difference))], PlayConfig(games=1), 0)


def test_one_stickiness_for_all_may_be_asked_for():
    wavering = Knowing([0.0, 0.0, 0.0])
    agents = [loaded(wavering), loaded(wavering, GameConfig(name="catch", stack=2, sticky=0.25))]
    config = PlayConfig(games=4, sticky=0.5)
    played = judge(agents, config, 0)
    assert played[0] == played[1] == play(wavering, GameConfig(name="catch", stack=2, sticky=0.5), 4)
    assert played[0] != play(wavering, count=4)


def test_agents_that_see_other_stacks_are_judged_together():
    played = judge([loaded(), loaded(game=GameConfig(name="catch", stack=4))], PlayConfig(games=2), 0)
    assert played[0] == played[1]  # this agent does not look


def test_a_policy_that_an_agent_has_not_is_refused_before_any_game(uneven):
    with pytest.raises(UserError, match="'sampled'"):
        judge([loaded()], PlayConfig(games=1, policy="sampled"), 0)
    assert not uneven


def test_the_usual_policy_is_that_of_the_literature():
    assert policy_of(loaded(), PlayConfig()) == "epsilon"
    assert policy_of(loaded(), PlayConfig(policy="greedy")) == "greedy"
    assert policy_of(loaded(), PlayConfig(random=True)) == "sampled"


def test_random_play_of_the_same_games_is_judged_whatever_the_agent():
    agent = Knowing([0.0, 1.0, 0.0])
    ((first, *_),) = (played := judge([loaded(agent)], PlayConfig(games=8, random=True), 2))
    assert first.length == 119
    assert played[0] == play(RandomAgent(3), count=8, policy="sampled", seed=2)
    assert not agent.asked
    summary = report([loaded(agent)], played, PlayConfig(games=8, random=True), 2)
    assert summary["protocol"].startswith("random play: catch, 8 whole games")


def test_a_report_sums_up_all_runs_and_says_how_the_scores_came_about():
    groups = [[Game(1.0, 10, False), Game(3.0, 20, False)], [Game(5.0, 30, True), Game(7.0, 40, False)]]
    result = report([loaded(name="a"), loaded(name="b")], groups, PlayConfig(games=2), 4)
    assert (result["games"], result["runs"], result["mean"], result["minimum"], result["maximum"]) == (4, 2, 4.0, 1.0, 7.0)
    assert result["scores"] == [[1.0, 3.0], [5.0, 7.0]]
    assert (result["length"], result["truncated"]) == (25.0, 1)
    assert result["protocol"] == "dqn: catch, 2 whole games, epsilon 0.05, seed 4, 2 runs"
    assert {name: result[name] for name in ("iqm", "iqm_low", "iqm_high")} == {
        name: getattr(scores.summarise("catch", [[1.0, 3.0], [5.0, 7.0]]), name) for name in ("iqm", "iqm_low", "iqm_high")
    }
    one = report([loaded()], groups[:1], PlayConfig(games=2, policy="greedy"), 4)
    assert (one["runs"], one["scores"], one["truncated"]) == (1, [1.0, 3.0], 0)
    assert one["protocol"] == "dqn: catch, 2 whole games, greedy, seed 4"
    assert json.loads(json.dumps(result)) == result


def test_a_report_knows_random_play_and_people():
    result = report([loaded(game=GameConfig(name="pong"))], [[Game(14.6, 10, False)]], PlayConfig(games=1), 0)
    assert result["normalised"] == pytest.approx(1.0)
    assert report([loaded()], [[Game(10.0, 10, False)]], PlayConfig(games=1), 0)["normalised"] is None


# scripts/evaluate.py

TINY = """
    --dqn.backbone small --dqn.hidden 8 --dqn.learning-starts 64 --dqn.batch-size 8 --replay.capacity 2000 --trainer.precision fp32
    --trainer.threads 1 --trainer.steps 6 --trainer.save-every 3 --test.games 1 --test.video-every 0 --tracking.mode disabled
""".split()  # noqa: SIM905


@contextlib.contextmanager
def as_it_was():
    """Put back what a script sets for the whole process."""
    threads, handlers, level, propagate = torch.get_num_threads(), list(log.handlers), log.level, log.propagate
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


def launched(words):
    """Run the training script in this process; returns its exit status."""
    with as_it_was():
        return launch(EXPERIMENT, "", words)


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """Two seeds on Catch and a run on Bricks, each trained for a moment."""
    folder = tmp_path_factory.mktemp("lab")
    for name, game, seed in (("first", "catch", "0"), ("second", "catch", "1"), ("bricks", "bricks", "0")):
        words = ["--game.name", game, "--game.stack", "2", "--trainer.seed", seed, "--run-dir", str(folder / name)]
        assert launched([*TINY, *words]) == 0
    return folder


def evaluate(folder, *words, expect=0):
    """What scripts/evaluate.py prints in a folder, run in this process."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = [str(ROOT / "scripts/evaluate.py"), *words]
    try:
        with (
            as_it_was(),
            contextlib.chdir(folder),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            pytest.raises(SystemExit) as end,
        ):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before
    assert (end.value.code or 0) == expect, printed.getvalue()
    return printed.getvalue()


def test_a_process_prints_one_json_object_and_keeps_it_in_the_run(runs_folder):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "scripts/evaluate.py"), "first", "--games", "4", "--json"]
    done = subprocess.run(words, cwd=runs_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((runs_folder / "first/evaluation.json").read_text())
    assert (result["run"], result["experiment"], result["step"], result["games"]) == ("first", "dqn", 6, 4)
    assert result["protocol"] == "dqn: catch, 4 whole games, epsilon 0.05, seed 0"
    assert len(result["scores"]) == 4
    assert json.loads(evaluate(runs_folder, "first", "--games", "4", "--json")) == result
    older = json.loads(evaluate(runs_folder, "first/checkpoints/step_000000003", "--games", "4", "--json"))
    assert older["step"] == 3


def test_a_table_shows_the_score_and_the_protocol(runs_folder):
    printed = evaluate(runs_folder, "first", "--games", "2", "--policy", "greedy", "--seed", "7")
    assert "first, step 6" in printed
    assert "iqm" in printed
    assert "catch, 2 whole games, greedy, seed 7" in " ".join(printed.split())
    assert "normalised" not in printed  # there is no table of people for this game


def test_several_runs_are_judged_together_and_each_by_itself(runs_folder):
    result = json.loads(evaluate(runs_folder, "first", "second", "--games", "3", "--json"))
    each = [json.loads((runs_folder / name / "evaluation.json").read_text()) for name in ("first", "second")]
    assert (result["run"], result["runs"], result["games"]) == ("first, second", 2, 6)
    assert result["scores"] == [one["scores"] for one in each]
    assert [one["runs"] for one in each] == [1, 1]
    assert result["mean"] == pytest.approx(np.mean([one["mean"] for one in each]))
    assert result["protocol"] == "dqn: catch, 3 whole games, epsilon 0.05, seed 0, 2 runs"


def test_random_play_of_the_run_s_game_is_judged_for_comparison(runs_folder):
    result = json.loads(evaluate(runs_folder, "first", "--games", "20", "--random", "--json"))
    assert result["protocol"].startswith("random play: catch, 20 whole games")
    assert -8 < result["mean"] < -3


def test_random_play_does_not_replace_the_scores_that_the_run_keeps(runs_folder):
    evaluate(runs_folder, "second", "--games", "2", "--json")
    kept = (runs_folder / "second/evaluation.json").read_bytes()
    evaluate(runs_folder, "second", "--games", "2", "--random", "--json")
    assert (runs_folder / "second/evaluation.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["first", "bricks"], "these agents play different games (bricks, catch); judge them one by one"),
        (["first", "--policy", "sampled"], "policy 'sampled': this agent has values of actions"),
        (["nowhere"], "nowhere: no "),
        (["first", "--epsilon", "2"], "epsilon"),
        (["first", "--games", "0"], "games"),
    ],
)
def test_what_cannot_be_judged_gets_one_clear_sentence(runs_folder, words, expected):
    printed = evaluate(runs_folder, *words, "--json", expect=2)
    assert expected in " ".join(printed.split())
    assert "Traceback" not in printed
