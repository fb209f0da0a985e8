"""The recorder: whole rows in the order of their steps, on a good disk and on a full one."""

import io
import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from lab import recorder
from lab.recorder import Bar, Lines, Recorder, brief, cut, display, track
from lab.runs import Run, create
from lab.tracking import Tracker, TrackingConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path) -> Run:
    return create("x", tmp_path / "run", "experiment: x\n")


def opened(run: Run, steps: int = 10) -> Recorder:
    tracker = Tracker.start(TrackingConfig(mode="disabled"), run.folder, identity="i", name="n", group="g", settings={}, axes={})
    return Recorder(run, tracker, Lines("run", steps))


def test_rows_are_lines_of_json_in_the_order_they_came(run):
    writer = opened(run)
    writer.start(0)
    writer.write(1, {"train/loss": 0.1, "train/skipped": 3, "media/grid": "media/é.png"})
    writer.write(2, {"train/loss": 1e-8})
    writer.write(2, {})
    expected = (
        b'{"step": 1, "train/loss": 0.1, "train/skipped": 3, "media/grid": "media/\\u00e9.png"}\n'
        b'{"step": 2, "train/loss": 1e-08}\n'
        b'{"step": 2}\n'
    )
    assert run.metrics.read_bytes() == expected  # at once: a kill loses nothing that was written
    assert writer.sync() == len(expected)
    writer.close()
    assert run.metrics.read_bytes() == expected


def test_what_is_not_finite_is_kept_and_comes_back(run):
    writer = opened(run)
    writer.write(1, {"train/loss": math.nan, "train/norm": math.inf, "train/low": -math.inf})
    writer.close()
    (row,) = run.rows()
    assert math.isnan(row["train/loss"])
    assert (row["train/norm"], row["train/low"]) == (math.inf, -math.inf)


def test_the_clock_is_kept_out_of_the_metrics(run):
    writer = opened(run)
    writer.start(0)
    writer.write(5, {"train/loss": 0.1})
    writer.close()
    assert set(run.rows()[0]) == {"step", "train/loss"}
    (entry,) = map(json.loads, run.timing.read_text().splitlines())
    assert (entry["step"], set(entry)) == (5, {"step", "time", "steps_per_second"})
    assert entry["steps_per_second"] > 0


def test_a_resumed_run_goes_on_behind_what_its_checkpoint_knew(run):
    writer = opened(run)
    writer.write(1, {"a": 1})
    length = writer.sync()
    writer.write(2, {"a": 2})
    writer.write(3, {"a": 3})
    writer.close()
    whole = run.metrics.read_bytes()

    cut(run, length)
    assert run.metrics.read_bytes() == b'{"step": 1, "a": 1}\n'
    writer = opened(run)
    writer.write(2, {"a": 2})
    assert writer.sync() == length + len(b'{"step": 2, "a": 2}\n')
    writer.write(3, {"a": 3})
    writer.close()
    assert run.metrics.read_bytes() == whole


def test_cutting_takes_away_half_a_row_and_never_makes_a_file_longer(run):
    cut(run, 0)
    assert run.metrics.read_bytes() == b""
    run.metrics.write_bytes(b'{"step": 1}\n{"st')
    cut(run, 12)
    assert run.metrics.read_bytes() == b'{"step": 1}\n'
    cut(run, 500)
    assert run.metrics.read_bytes() == b'{"step": 1}\n'


def test_a_row_that_is_not_json_is_refused_without_a_trace(run):
    writer = opened(run)
    writer.write(1, {"a": 1})
    with pytest.raises(TypeError):
        writer.write(2, {"a": object()})
    writer.write(3, {"a": 3})
    writer.close()
    assert [row["step"] for row in run.rows()] == [1, 3]


# A full disk

REFUSING = """
import json, resource, signal, sys
from pathlib import Path
from lab.recorder import Lines, Recorder, cut
from lab.runs import Run
from lab.tracking import Tracker, TrackingConfig

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Run(Path(sys.argv[1]))
tracker = Tracker.start(TrackingConfig(mode="disabled"), run.folder, identity="i", name="n", group="g", settings={}, axes={})
recorder = Recorder(run, tracker, Lines("run", 10))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

def state():
    return run.metrics.read_bytes().decode()

seen = []
recorder.write(1, {"a": 1})
"""


def script(code: str, folder: Path) -> list[str]:
    """What the other process saw of `metrics.jsonl` at each point that it notes."""
    whole = REFUSING + textwrap.dedent(code) + "\nprint(json.dumps(seen))\n"
    done = subprocess.run([sys.executable, "-c", whole, str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def lines(*steps: int) -> str:
    return "".join(f'{{"step": {step}, "a": {step}}}\n' for step in steps)


def test_rows_that_the_disk_refuses_wait_in_memory_and_come_whole_and_in_order(run):
    found = script(
        """
        for size in (run.metrics.stat().st_size, run.metrics.stat().st_size + 7):
            room(size)
            recorder.write(len(seen) + 2, {"a": len(seen) + 2})
            seen.append(state())
        try:
            recorder.sync()
        except OSError as error:
            seen.append(type(error).__name__)
        room(soft)
        recorder.write(4, {"a": 4})
        seen.append(state())
        seen.append(str(recorder.sync()))
        recorder.close()
        """,
        run.folder,
    )
    assert found == [lines(1), lines(1), "OSError", lines(1, 2, 3, 4), str(len(lines(1, 2, 3, 4)))]
    assert run.metrics.read_text() == lines(1, 2, 3, 4)


def test_closing_writes_what_waited(run):
    script(
        """
        room(run.metrics.stat().st_size + 3)
        recorder.write(2, {"a": 2})
        room(soft)
        recorder.close()
        """,
        run.folder,
    )
    assert run.metrics.read_text() == lines(1, 2)


def test_closing_on_a_full_disk_ends_quietly_with_whole_rows(run):
    script(
        """
        room(1)
        for step in range(2, 6):
            recorder.write(step, {"a": step})
        recorder.close()
        """,
        run.folder,
    )
    assert run.metrics.read_text() == lines(1)


# The terminal


def said(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_line_shows_progress_speed_and_the_latest_metrics(capsys):
    shown = Lines("vae", 200, every=-1.0)
    shown.start(50)
    shown.show(60, {"step": 60, "train/loss": 123.456, "train/kl": 1e-5, "train/gradient_norm": 9.0, "eval/bound": 5.0})
    shown.advance(100)
    (line,) = said(capsys)
    assert re.fullmatch(r"vae 100/200 \(50 %\)  \d+\.\d steps/s  \d+ s left  loss 123\.5  kl 1e-05", line)


def test_lines_come_only_now_and_then_and_once_at_the_end(capsys):
    shown = Lines("vae", 10, every=1000.0)
    shown.start(0)
    for step in range(1, 11):
        shown.advance(step)
    assert said(capsys) == []
    shown.stop()
    (line,) = said(capsys)
    assert line.startswith("vae 10/10 (100 %)")


def test_a_run_that_never_made_a_step_has_no_time_left_to_tell(capsys):
    shown = Lines("vae", 10)
    shown.start(3)
    shown.stop()
    (line,) = said(capsys)
    assert line.startswith("vae 3/10 (30 %)  0.0 steps/s  - left")


@pytest.mark.parametrize("title", ["a[/b]", "[red]x", "a {task} {0}", "%s", ":smile:", "é"])
def test_a_name_is_shown_letter_by_letter(capsys, monkeypatch, title):
    plain = Lines(title, 10)
    plain.stop()
    assert said(capsys)[0].startswith(f"{title} 0/10")

    paper = io.StringIO()
    monkeypatch.setattr(recorder, "console", Console(file=paper, force_terminal=True, width=200, color_system=None))
    bar = display(title, 10)
    assert isinstance(bar, Bar)
    bar.start(0)
    bar.advance(5)
    bar.show(10, {"train/loss": 0.25, "train/[x]": 2.0})
    bar.stop()
    assert title in paper.getvalue()
    assert "10/10" in paper.getvalue()
    assert "loss 0.25  [x] 2" in paper.getvalue()


def test_a_brief_row_holds_the_first_five_training_floats():
    row = {"step": 3, "train/a": 1.0, "train/n": 7, "train/gradient_norm": 2.0, "eval/b": 3.0, "train/text": "x"}
    row |= {f"train/m{index}": index + 0.123456 for index in range(6)}
    assert brief(row) == "a 1  m0 0.1235  m1 1.123  m2 2.123  m3 3.123"
    assert brief({"step": 1}) == ""
    assert brief({"train/loss": math.nan}) == "loss nan"


def test_tracked_items_come_through_unchanged(capsys):
    assert list(track(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert said(capsys) == []
