"""Learning curves: files that grow, are cut and rewritten, and arithmetic against plain formulas."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import curves
from lab.config import ConfigError, dump
from lab.curves import Tail, band, differing, read, seeds, smooth, thin
from lab.runs import Run
from rl import dqn


def append(path: Path, *rows: dict, end: str = "\n") -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).removesuffix("\n") + end)


def values(run: Run | Tail, key: str) -> list[float]:
    series = run.series() if isinstance(run, Tail) else read(run)
    return series[key].values.tolist() if key in series else []


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


# Reading


def test_nothing_is_read_where_nothing_was_recorded(run: Run) -> None:
    assert read(run) == {}
    tail = Tail(run)
    assert not tail.update()
    assert np.isnan(tail.seconds)


def test_each_metric_is_read_with_the_steps_of_its_own_rows(run: Run) -> None:
    append(
        run.metrics, {"step": 10, "train/loss": 3, "frames": 40}, {"step": 20, "train/loss": float("nan"), "frames": 80, "eval/loss": 0.5}
    )
    series = read(run)
    assert sorted(series) == ["eval/loss", "train/loss"]
    np.testing.assert_array_equal(series["train/loss"].values, [3.0, np.nan])
    assert [series["eval/loss"].axes[axis].tolist() for axis in ("step", "frames")] == [[20.0], [80.0]]
    assert series["train/loss"].values.dtype == np.float64
    assert sorted(read(run, ["eval/loss", "eval/none"])) == ["eval/loss"]


def test_points_without_a_place_on_the_axis_are_left_out(run: Run) -> None:
    append(run.metrics, {"step": 1, "train/loss": 3}, {"step": 2, "train/loss": 2, "frames": 8})
    loss = read(run)["train/loss"]
    assert [part.tolist() for part in loss.over("frames")] == [[8.0], [2.0]]
    assert [part.tolist() for part in loss.over("time")] == [[], []]


def test_a_tail_tells_what_a_whole_reading_tells_while_the_file_grows(run: Run) -> None:
    tail = Tail(run)
    for step in range(1, 40, 3):
        rows = [{"step": step + more, "train/loss": 1 / (step + more), "media/samples": f"media/{step + more}.png"} for more in range(3)]
        append(run.metrics, *rows)
        append(run.timing, *({"step": row["step"], "time": 100.0 + row["step"], "steps_per_second": 1.0} for row in rows))
        assert tail.update()
        assert not tail.update()
        assert values(tail, "train/loss") == values(run, "train/loss") == [1 / one for one in range(1, step + 3)]
    assert tail.rows == 39
    assert tail.last["train/loss"] == 1 / 39
    assert tail.media == {"media/samples": {step: f"media/{step}.png" for step in range(1, 40)}}
    assert tail.seconds == pytest.approx(39)


def test_a_tail_does_not_read_again_what_it_has_read(run: Run) -> None:
    append(run.metrics, {"step": 1, "train/loss": 1}, {"step": 2, "train/loss": 2})
    tail = Tail(run)
    tail.update()
    with run.metrics.open("r+b") as file:
        file.write(b"x" * 10)
    append(run.metrics, {"step": 3, "train/loss": 3})
    tail.update()
    assert (values(tail, "train/loss"), tail.damaged) == ([1.0, 2.0, 3.0], 0)


def test_half_a_line_is_read_when_it_is_whole(run: Run) -> None:
    append(run.metrics, {"step": 1, "train/loss": 1})
    append(run.metrics, {"step": 2, "train/loss": 0.25}, end="")
    text = run.metrics.read_text()
    run.metrics.write_text(text[:-3])
    tail = Tail(run)
    tail.update()
    assert (values(tail, "train/loss"), tail.cut) == ([1.0], True)
    run.metrics.write_text(text + "\n")
    assert tail.update()
    assert (values(tail, "train/loss"), tail.cut, tail.damaged) == ([1.0, 0.25], False, 0)


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("added", [0, 1, 2, 3, 9])
def test_a_file_that_was_cut_back_is_read_anew(run: Run, kept: int, added: int) -> None:
    """As a resumed run does it, however far the file has grown again since."""
    append(run.metrics, *({"step": step, "train/loss": 1.5, "media/x": "old"} for step in range(3)))
    tail = Tail(run)
    tail.update()
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:kept]))
    append(run.metrics, *({"step": kept + step, "train/loss": 2.5, "media/x": "new"} for step in range(added)), end="\n" if added else "")
    assert tail.update()
    assert values(tail, "train/loss") == [1.5] * kept + [2.5] * added
    assert sorted(tail.media.get("media/x", {})) == list(range(kept + added))


def test_a_file_that_was_taken_away_and_written_again_is_read_anew(run: Run) -> None:
    append(run.metrics, {"step": 1, "train/loss": 1})
    tail = Tail(run)
    tail.update()
    run.metrics.unlink()
    assert tail.update()
    assert (tail.rows, tail.keys) == (0, [])
    append(run.metrics, {"step": 1, "train/loss": 7})
    tail.update()
    assert values(tail, "train/loss") == [7.0]


DAMAGE = [
    b'{"step": 2, "train/lo\n',
    b"\xff\xfe\n",
    b"7\n",
    b"null\n",
    b'{"train/loss": 1}\n',
    b'{"step": NaN}\n',
    b"[" * 5000 + b"\n",
    b"1],[2\n",
]


@pytest.mark.parametrize("line", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_line_is_counted_and_left_out(run: Run, line: bytes) -> None:
    rows = [json.dumps({"step": step, "train/loss": step}).encode() + b"\n" for step in (1, 3)]
    run.metrics.write_bytes(rows[0] + line + rows[1])
    tail = Tail(run)
    tail.update()
    assert (values(tail, "train/loss"), tail.damaged, tail.rows) == ([1.0, 3.0], 1, 2)


def test_a_number_of_any_length_stops_nothing(run: Run) -> None:
    run.metrics.write_text('{"step": 1, "train/loss": ' + "9" * 5000 + "}\n")
    assert values(run, "train/loss") == [np.inf]


# Time


def timed(run: Run, *entries: tuple[int, float, float]) -> list[float]:
    """The time axis for rows at the steps of the entries, of which a later one counts where a step is told twice."""
    append(run.timing, *({"step": step, "time": time, "steps_per_second": speed} for step, time, speed in entries))
    append(run.metrics, *({"step": step, "train/loss": 0} for step in sorted({step for step, _, _ in entries})))
    return read(run)["train/loss"].axes["time"].tolist()


def test_time_is_what_the_clock_says_where_the_run_went_on(run: Run) -> None:
    assert timed(run, (50, 1000.0, 10.0), (100, 1004.0, 12.5), (150, 1014.0, 5.0)) == pytest.approx([5.0, 9.0, 19.0])


def test_a_pause_between_restarts_is_no_time(run: Run) -> None:
    assert timed(run, (50, 1000.0, 10.0), (100, 1005.0, 10.0), (150, 9000.0, 10.0), (200, 9005.0, 10.0)) == pytest.approx([5, 10, 15, 20])


def test_steps_done_twice_count_once(run: Run) -> None:
    """Killed after step 150, went on from a checkpoint at 120: the row of 150 tells the speed since then."""
    times = timed(run, (50, 1000.0, 10.0), (100, 1005.0, 10.0), (150, 1010.0, 10.0), (150, 9000.0, 5.0), (200, 9010.0, 5.0))
    assert times == pytest.approx([5, 10, 20, 30])


def test_a_clock_that_was_set_back_does_no_harm(run: Run) -> None:
    assert timed(run, (50, 1000.0, 10.0), (100, 500.0, 10.0), (150, 505.0, 10.0)) == pytest.approx([5.0, 10.0, 15.0])


def test_steps_too_slow_to_have_a_speed_are_timed_by_the_clock(run: Run) -> None:
    assert timed(run, (1, 1000.0, 0.0), (2, 6000.0, 0.0), (3, 5000.0, 0.0)) == pytest.approx([0.0, 5000.0, 5000.0])


def test_slow_steps_are_timed_by_the_clock_and_not_by_their_rounded_speed(run: Run) -> None:
    assert timed(run, (1, 1000.0, 0.012), (2, 1084.0, 0.012))[1] - 1 / 0.012 == pytest.approx(84.0)


# Drawing


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 0.99])
def test_smoothing_is_the_weighted_mean_of_all_values_so_far(weight: float) -> None:
    numbers = np.random.default_rng(0).normal(size=50)
    for count, smoothed in enumerate(smooth(numbers, weight), 1):
        shares = weight ** np.arange(count - 1, -1, -1.0)
        assert smoothed == pytest.approx((shares * numbers[:count]).sum() / shares.sum(), rel=1e-12)


def test_what_is_not_finite_counts_for_nothing_in_smoothing() -> None:
    numbers = np.array([1.0, np.nan, 2.0, np.inf, 4.0])
    smoothed = smooth(numbers, 0.5)
    np.testing.assert_array_equal(smoothed[[1, 3]], numbers[[1, 3]])
    np.testing.assert_allclose(smoothed[[0, 2, 4]], smooth(np.array([1.0, 2.0, 4.0]), 0.5))


@pytest.mark.parametrize("weight", [-0.1, 1.0, float("nan")])
def test_a_weight_that_smooths_nothing_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight: at least 0 and below 1"):
        smooth(np.ones(3), weight)


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(4, 60))
def test_thinning_keeps_ends_and_peaks(numbers: list[float], most: int) -> None:
    x, y = np.arange(len(numbers), dtype=float), np.array(numbers)
    few_x, few_y = thin(x, y, most)
    assert len(few_x) <= most
    assert np.all(np.diff(few_x) > 0)
    np.testing.assert_array_equal(few_y, y[few_x.astype(int)])
    if numbers:
        assert (few_x[0], few_x[-1]) == (0, len(numbers) - 1)
        assert (few_y.min(), few_y.max()) == (y.min(), y.max())


def test_thinning_keeps_the_least_and_the_greatest_of_every_stretch() -> None:
    y = np.random.default_rng(0).normal(size=1002)
    few_x, _ = thin(np.arange(1002.0), y, 22)
    for start in range(1, 1001, 100):
        stretch = y[start : start + 100]
        assert {start + stretch.argmin(), start + stretch.argmax()} <= set(few_x.astype(int))


def test_thinning_keeps_gaps() -> None:
    y = np.where((np.arange(1000) >= 400) & (np.arange(1000) < 600), np.nan, 1.0)
    few_x, few_y = thin(np.arange(1000.0), y, 100)
    gap = few_x[np.isnan(few_y)]
    assert len(gap) >= 8
    assert gap.min() < 440 < 560 < gap.max()


def test_a_band_is_what_numpy_says_of_the_seeds() -> None:
    curves_of_seeds = np.random.default_rng(0).normal(size=(3, 20))
    x = np.arange(20.0)
    found = band([(x, y) for y in curves_of_seeds])
    np.testing.assert_array_equal(found.x, x)
    np.testing.assert_allclose(found.mean, curves_of_seeds.mean(0))
    np.testing.assert_array_equal(found.low, curves_of_seeds.min(0))
    np.testing.assert_array_equal(found.high, curves_of_seeds.max(0))


def test_a_band_ends_where_one_of_its_seeds_does_and_is_straight_between_points() -> None:
    found = band([(np.array([0.0, 10, 20, 30]), np.array([0.0, 1, 2, 3])), (np.array([5.0, 25.0]), np.array([10.0, 30.0]))])
    assert found.x.tolist() == [5, 10, 20, 25]
    assert found.low.tolist() == pytest.approx([0.5, 1, 2, 2.5])
    assert found.high.tolist() == pytest.approx([10, 15, 25, 30])
    assert found.mean.tolist() == pytest.approx([5.25, 8, 13.5, 16.25])


def test_a_band_leaves_out_what_is_not_finite() -> None:
    x = np.arange(4.0)
    found = band([(x, np.array([0, np.nan, 2, 3])), (x, np.array([0.0, 1, 2, 3])), (x, np.full(4, np.nan))])
    assert found.mean.tolist() == pytest.approx([0, 1, 2, 3])
    assert len(band([(x, np.full(4, np.nan))]).x) == 0
    assert len(band([(x, x), (x + 10, x)]).x) == 0


# Settings


def stored(folder: Path, **trainer: int) -> Run:
    experiment = dataclasses.replace(dqn.EXPERIMENT, trainer=dataclasses.replace(dqn.EXPERIMENT.trainer, **trainer))
    folder.mkdir()
    run = Run(folder)
    run.config.write_text(dump(experiment, "dqn"))
    return run


def test_seeds_are_runs_that_differ_in_their_seed_alone(tmp_path: Path) -> None:
    made = [stored(tmp_path / str(seed), seed=seed) for seed in (0, 1)] + [stored(tmp_path / "2", seed=2, steps=77)]
    configs = [curves.settings(run) for run in made]
    configs.append(configs[0] | {"trainer.seed": "3", "tracking.mode": "offline"})
    assert configs[0]["experiment"] == "dqn"
    assert configs[0]["optimizer.betas"] == "[0.9, 0.999]"
    assert seeds(configs) == [[0, 1, 3], [2]]
    assert differing(configs) == ["trainer.steps", "trainer.seed", "tracking.mode"]
    assert differing(configs[:1]) == []


def test_a_setting_that_only_some_runs_have_differs() -> None:
    assert differing([{"a": "1", "b": "2"}, {"a": "1"}]) == ["b"]
    assert differing([{"a": "1"}, {"a": "1", "b": "2"}]) == ["b"]
    assert differing([]) == []


def test_a_damaged_config_is_told(run: Run) -> None:
    run.config.write_text("trainer: [")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        curves.settings(run)
