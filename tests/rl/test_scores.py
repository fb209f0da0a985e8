"""Scores: the table is the one in use, and intervals hold what they should."""

import json
from dataclasses import fields

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.scores import RANDOM_AND_HUMAN, Summary, interval, iqm, mean, normalised, summarise

KNOWN = {
    "pong": (-20.7, 14.6),
    "breakout": (1.7, 30.5),
    "space_invaders": (148.0, 1668.7),
    "boxing": (0.1, 12.1),
    "freeway": (0.0, 29.6),
    "ms_pacman": (307.3, 6951.6),
    "qbert": (163.9, 13455.0),
    "seaquest": (68.4, 42054.7),
    "montezuma_revenge": (0.0, 4753.3),
    "skiing": (-17098.1, -4336.9),
    "video_pinball": (16256.9, 17667.9),
}


def games(seed: int, count: int, centre: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(centre, spread, count)


def width(ends: tuple[float, float]) -> float:
    return ends[1] - ends[0]


def test_the_table_has_57_games_that_the_emulator_has():
    roms = pytest.importorskip("ale_py.roms")
    assert len(RANDOM_AND_HUMAN) == 57
    assert set(RANDOM_AND_HUMAN) <= set(roms.get_all_rom_ids())
    assert all(random < human for random, human in RANDOM_AND_HUMAN.values())


@pytest.mark.parametrize("rom", KNOWN)
def test_well_known_entries_of_the_table(rom):
    assert RANDOM_AND_HUMAN[rom] == KNOWN[rom]


@pytest.mark.parametrize("rom", RANDOM_AND_HUMAN)
def test_random_play_is_0_and_the_human_1(rom):
    random, human = RANDOM_AND_HUMAN[rom]
    assert normalised(rom, random) == 0
    assert normalised(rom, human) == 1
    assert normalised(rom, random + 2 * (human - random)) == pytest.approx(2)


@pytest.mark.parametrize("rom", ["catch", "adventure", "Pong", ""])
def test_a_game_outside_the_table_has_no_such_scale(rom):
    assert normalised(rom, 1.0) is None
    assert summarise(rom, [[1.0, 2.0]]).normalised is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_iqm_is_the_mean_of_what_is_left_without_the_outer_quarters(scores):
    ordered, cut = sorted(scores), len(scores) // 4
    middle = ordered[cut : len(scores) - cut]
    assert iqm(scores) == pytest.approx(sum(middle) / len(middle), abs=1e-6)
    assert iqm(scores) == pytest.approx(scipy.stats.trim_mean(scores, 0.25), abs=1e-6)


def test_the_iqm_does_not_see_one_lucky_game():
    assert iqm([1, 2, 3, 4, 5, 6, 7, 8]) == iqm([1, 2, 3, 4, 5, 6, 7, 1e9]) == 4.5


def test_constant_scores_have_an_interval_without_width():
    assert interval([[7.0] * 5], iqm) == (7, 7)
    assert interval([[7.0] * 5, [7.0] * 2], mean) == (7, 7)


@pytest.mark.parametrize("statistic", [mean, iqm])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_with_one_run_it_is_the_ordinary_bootstrap(statistic, confidence):
    scores = games(0, 60, spread=10) ** 2
    found = interval([scores], statistic, confidence, resamples=4000)
    options = {"confidence_level": confidence, "n_resamples": 4000, "method": "percentile", "vectorized": False, "rng": 1}
    expected = scipy.stats.bootstrap((scores,), statistic, **options).confidence_interval
    assert found == pytest.approx(tuple(expected), abs=0.1 * width(found))


def test_runs_that_differ_widen_the_interval():
    runs = [games(seed, 50, centre=10 * seed) for seed in range(5)]
    assert width(interval(runs, mean)) > 2 * width(interval([np.concatenate(runs)], mean))


def test_the_width_is_that_of_the_runs_where_these_differ_by_far_the_most():
    centres = games(1, 6, spread=1000)
    found = interval([games(seed, 20, centre=centre) for seed, centre in enumerate(centres)], mean, resamples=4000)
    expected = 2 * 1.96 * centres.std() / np.sqrt(len(centres))
    assert width(found) == pytest.approx(expected, rel=0.1)


def test_every_run_keeps_its_own_number_of_games():
    sizes = set()
    interval([[1.0] * 3, [2.0] * 10], lambda scores: float(sizes.add((len(scores), scores.min(), scores.max())) is None), resamples=200)
    assert sizes == {(6, 1, 1), (13, 1, 2), (20, 2, 2)}


def test_about_as_many_intervals_hold_the_truth_as_they_promise():
    held = sum(low <= 0 <= high for low, high in (interval([games(seed, 40)], mean, 0.9, 300) for seed in range(200)))
    assert 165 <= held <= 195


def test_the_same_seed_gives_the_same_interval():
    runs = [games(0, 20), games(1, 30)]
    assert interval(runs, iqm, seed=3) == interval(runs, iqm, seed=3) != interval(runs, iqm, seed=4)


@pytest.mark.parametrize("groups", [[], [[]], [[1.0], []]])
def test_nothing_played_is_an_error(groups):
    with pytest.raises(ValueError, match="at least one run, and of every run at least one game"):
        summarise("pong", groups)


def test_a_summary_says_it_all_and_goes_into_json():
    runs = [[-21.0, -20.0, 3.0, 5.0], [21.0, 20.0, 7.0, 8.0, 1.0]]
    found = summarise("pong", runs)
    together = np.concatenate(runs)
    assert (found.games, found.runs, found.minimum, found.maximum) == (9, 2, -21, 21)
    assert (found.mean, found.median) == (together.mean(), np.median(together))
    assert found.iqm == pytest.approx(scipy.stats.trim_mean(together, 0.25))
    assert found.normalised == pytest.approx((together.mean() + 20.7) / 35.3)
    assert (found.iqm_low, found.iqm_high) == interval(runs, iqm)
    assert (found.mean_low, found.mean_high) == interval(runs, mean)
    assert Summary(**json.loads(json.dumps(found.to_dict()))) == found
    assert set(found.to_dict()) == {field.name for field in fields(Summary)}


def test_one_game_is_its_own_summary():
    found = summarise("breakout", [[30.5]])
    assert {found.mean, found.median, found.iqm, found.iqm_low, found.iqm_high, found.minimum, found.maximum} == {30.5}
    assert found.normalised == 1
