"""What stands behind the Runs part: the options of its charts, the rows of its table, and who gets a signal."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nicegui", reason="the studio is not tested without NiceGUI")

from lab.config import UserError
from lab.curves import Series, smooth
from lab.runs import Run
from lab.studio import control, gallery
from lab.studio.charts import POINTS, Curve, View, options, ranked
from lab.studio.overview import Overview, figure, since, span


def series(values: np.ndarray, **axes: np.ndarray) -> Series:
    return Series(values, {"step": np.arange(1.0, len(values) + 1), **axes})


def run_folder(folder: Path, experiment: str = "vae") -> Run:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"experiment: {experiment}\ntrainer:\n  steps: 10\n")
    (folder / "metrics.jsonl").write_text('{"step": 4, "train/loss": 2.5}\n')
    return Run(folder)


# Charts


def test_a_long_curve_is_drawn_with_few_points_and_its_peak() -> None:
    values = np.sin(np.arange(10_000) / 50)
    values[6789] = 40.0
    drawn = options([Curve("run", 0, (series(values),))], View())["series"]
    assert [len(line["data"]) for line in drawn] == [POINTS, POINTS]
    assert 2 * POINTS <= 1000
    pale, smoothed = drawn
    assert [6790.0, 40.0] in pale["data"]
    assert pale["lineStyle"]["opacity"] < smoothed["lineStyle"]["opacity"]


def test_the_line_is_the_moving_average_and_few_points_are_left_alone() -> None:
    values = np.cos(np.arange(30.0))
    *_, line = options([Curve("run", 0, (series(values),))], View(smoothing=0.9))["series"]
    np.testing.assert_array_equal(np.array(line["data"])[:, 1], smooth(values, 0.9))
    (line,) = options([Curve("run", 0, (series(values[:10]),))], View(smoothing=0.9))["series"]
    np.testing.assert_array_equal(np.array(line["data"])[:, 1], values[:10])


def test_a_logarithmic_scale_leaves_out_what_has_no_logarithm() -> None:
    (line,) = options([Curve("run", 0, (series(np.array([1.0, 0.0, -2.0, 4.0])),))], View(log=True))["series"]
    assert [y for _, y in line["data"] if not math.isnan(y)] == [1.0, 4.0]


@pytest.mark.parametrize(("last", "unit", "shown"), [(90.0, "seconds", 90.0), (600.0, "minutes", 10.0), (36_000.0, "hours", 10.0)])
def test_times_are_told_in_a_unit_that_fits(last: float, unit: str, shown: float) -> None:
    drawn = options([Curve("run", 0, (series(np.ones(2), time=np.array([0.0, last])),))], View(axis="time"))
    assert drawn["xAxis"]["name"] == unit
    assert drawn["series"][0]["data"][-1][0] == shown


def test_a_curve_that_does_not_know_the_axis_is_empty_and_takes_no_other_along() -> None:
    known = Curve("known", 0, (series(np.ones(3), frames=np.arange(3.0)),))
    drawn = options([known, Curve("other", 1, (series(np.ones(3)),))], View(axis="frames"))["series"]
    assert [len(line["data"]) for line in drawn] == [3, 0]


def test_seeds_are_their_mean_over_the_range_of_all() -> None:
    members = [np.array([1.0, -4.0, 3.0]), np.array([3.0, 0.0, -5.0]), np.array([2.0, 1.0, 2.0])]
    low, high, mean = options([Curve("run", 0, tuple(map(series, members)))], View())["series"]
    floor, ceiling = np.min(members, 0), np.max(members, 0)
    np.testing.assert_array_equal(np.array(low["data"])[:, 1], floor)
    np.testing.assert_array_equal(np.array(low["data"])[:, 1] + np.array(high["data"])[:, 1], ceiling)
    np.testing.assert_allclose(np.array(mean["data"])[:, 1], np.mean(members, 0))
    assert low["stack"] == high["stack"]


def test_metrics_stand_in_the_order_in_which_people_look_at_them() -> None:
    found = ranked(["zeta/a", "eval/b", "train/zip", "train/loss", "train/accuracy", "rollout/score"])
    assert list(found) == ["train", "eval", "rollout", "zeta"]
    assert found["train"] == ["train/loss", "train/accuracy", "train/zip"]


# The table


def test_runs_are_read_again_only_when_they_have_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.studio import overview as module

    found = [run_folder(tmp_path / "vae" / name) for name in "ab"]
    read, real = [], module.status
    monkeypatch.setattr(module, "status", lambda run: read.append(run.folder.name) or real(run))
    overview = Overview(lambda: found)
    assert [entry.status.step for entry in overview.entries()] == [4, 4]
    overview.entries()
    assert read == ["a", "b"]
    with found[1].metrics.open("a") as file:
        file.write('{"step": 10, "train/loss": 1.5}\n')
    assert [entry.status.state for entry in overview.entries()] == ["stopped", "finished"]
    assert read == ["a", "b", "b"]


def test_times_and_figures_in_words() -> None:
    assert [span(seconds) for seconds in (5, 65, 3723, 90_000, math.inf)] == ["5 s", "1 min 05 s", "1 h 02 min", "1 d 1 h", "–"]
    assert [since(seconds) for seconds in (3, 59, 61, 7300, 200_000, math.inf)] == [
        "just now",
        "59 s ago",
        "1 min ago",
        "2 h ago",
        "2 d ago",
        "–",
    ]
    assert [figure(value) for value in (0.123456, 12345.6, -3.0, 2e12)] == ["0.1235", "12,346", "-3", "2e+12"]


# Pictures


def test_media_are_grouped_by_name_and_links_are_left_out(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "vae" / "a")
    run.media.mkdir()
    for name in ("samples_000000200.png", "samples_000000100.png", "curves.png", "game.mp4", "notes.svg", ".hidden.png"):
        (run.media / name).write_bytes(b"x")
    (run.media / "link.png").symlink_to(run.config)
    groups = gallery.by_name(gallery.media(run))
    assert {name: [one.step for one in group] for name, group in groups.items()} == {
        "samples": [100, 200],
        "curves.png": [None],
        "game.mp4": [None],
    }


# Stopping and going on


@pytest.fixture
def innocent():
    """A process that lives until its input ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate(b"\n", timeout=30)
    assert process.returncode == 0  # no signal has reached it


@pytest.mark.parametrize("host", [socket.gethostname(), "another-machine"])
def test_a_process_that_does_not_hold_the_run_gets_no_signal(tmp_path: Path, innocent: subprocess.Popen[bytes], host: str) -> None:
    run = run_folder(tmp_path / "vae" / "a")
    (run.folder / "owner.json").write_text(json.dumps({"pid": innocent.pid, "host": host, "since": "2026-11-21T08:00:00+00:00"}))
    with pytest.raises(UserError, match="not at work on this machine"):
        control.stop(run)
    assert innocent.poll() is None


OWNING = """
import signal, sys
from pathlib import Path
from lab import runs
from lab.runs import Run
caught = []
signal.signal(signal.SIGTERM, lambda *_: caught.append(1) or print("asked", flush=True))
with runs.owned(Run(Path(sys.argv[1]))):
    print("owned", flush=True)
    sys.stdin.readline()
sys.exit(len(caught))
"""


def test_the_owner_gets_one_signal_however_often_it_is_asked(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "vae" / "a")
    command = [sys.executable, "-c", OWNING, str(run.folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=control.SCRIPTS.parent)
    assert process.stdout
    assert process.stdout.readline() == "owned\n"
    control.stop(run)
    assert process.stdout.readline() == "asked\n"
    with pytest.raises(UserError, match="asked to stop already"):
        control.stop(run)
    process.communicate("\n", timeout=30)
    assert process.returncode == 1
    with pytest.raises(UserError, match="not at work"):
        control.stop(run)


@pytest.mark.parametrize("experiment", ["../../evil", "nothing", "", "vae.py; rm"])
def test_only_scripts_that_are_there_can_be_started(tmp_path: Path, experiment: str) -> None:
    run = run_folder(tmp_path / "vae" / "a", experiment)
    with pytest.raises(UserError, match="no script"):
        control.resume(run)


def test_going_on_names_the_script_of_its_kind(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "vae" / "a")
    assert control.resume_command(run)[1:] == [str(control.SCRIPTS / "train_vae.py"), "--resume", str(run.folder.resolve())]
