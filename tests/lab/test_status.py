"""How a run stands: told of real processes that work, end, fail and are killed."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import checkpoint, runs
from lab.runs import Run
from lab.status import TAIL, key_metric, status, tail

ROOT = Path(__file__).parents[2]
SETTINGS = """--data.name digits --data.batch-size 16 --model.network.hidden 8 --model.latent 2 --trainer.log-every 5
    --trainer.preview-every 100000 --trainer.save-every 100000 --trainer.threads 1 --tracking.mode disabled""".split()  # noqa: SIM905


def train(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train_autoencoder.py"), *SETTINGS, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_recorded(run: Run, process: subprocess.Popen[str]) -> None:
    """Wait for the first row; the process's end would be told by its output."""
    while not (run.metrics.exists() and run.metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def made(folder: Path, config: str = "experiment: vae\ntrainer:\n  steps: 10\n") -> Run:
    return runs.create("unused", folder, config)


def test_a_run_is_running_then_stopped_then_finished_and_its_times_add_up(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with train(tmp_path, "--trainer.steps", "1000000", "--run-dir", "run") as process:
        until_recorded(run, process)
        working = status(run)
        assert (working.state, working.pid, working.steps) == ("running", process.pid, 1_000_000)
        assert 0 < working.step < 1_000_000
        assert working.progress == working.step / 1_000_000
        process.send_signal(signal.SIGTERM)
        assert "stopped at step" in process.communicate(timeout=60)[0]
        assert process.returncode == 75
    stopped = status(run)
    assert (stopped.state, stopped.pid, stopped.why) == ("stopped", 0, "")
    assert stopped.metric == "train/loss"
    assert stopped.value == run.last_values()["train/loss"]
    done = checkpoint.folders(run.checkpoints)[0]
    step = int(done.name.removeprefix("step_"))
    with train(tmp_path, "--resume", "run", "--trainer.steps", str(step + 7)) as process:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    finished = status(run)
    assert (finished.state, finished.step, finished.progress) == ("finished", step + 7, 1.0)
    starts = json.loads(run.environment.read_text())["starts"]
    assert [start["error"] for start in starts] == [None, None]
    assert finished.seconds >= stopped.seconds
    assert "SIGTERM" in run.log.read_text()
    assert "resuming" in run.log.read_text()


def test_a_killed_run_has_failed_and_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with train(tmp_path, "--trainer.steps", "1000000", "--run-dir", "run") as process:
        until_recorded(run, process)
        process.kill()
    found = status(run)
    assert found.state == "failed"
    assert f"process {process.pid} " in found.why
    assert found.pid == 0


def test_a_run_that_an_error_ended_has_failed_and_its_log_tells_where(tmp_path: Path) -> None:
    with train(tmp_path, "--trainer.steps", "1000", "--optimizer.lr", "1e30", "--trainer.max-skipped", "2", "--run-dir", "run") as process:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1, output
    found = status(Run(tmp_path / "run"))
    assert found.state == "failed"
    assert "not finite" in found.why
    told = Run(tmp_path / "run").log.read_text()
    assert "Traceback" in told
    assert "TrainingStopped" in told
    assert "WARNING step" in told


@pytest.mark.parametrize(("metrics_age", "state"), [(10, "running"), (3600, "failed")])
def test_of_another_machine_only_what_it_records_tells(tmp_path: Path, metrics_age: int, state: str) -> None:
    run = made(tmp_path / "run")
    run.metrics.write_text('{"step": 3, "train/loss": 1.5}\n')
    then = time.time() - metrics_age
    os.utime(run.metrics, (then, then))
    (run.folder / "owner.json").write_text(json.dumps({"pid": os.getpid(), "host": f"not-{socket.gethostname()}", "since": "x"}))
    found = status(run)
    assert (found.state, found.pid) == (state, 0)
    assert found.age == pytest.approx(metrics_age, abs=5)


def test_the_number_of_a_dead_process_that_another_one_has_by_now_is_not_believed(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    (run.folder / "owner.json").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": "x"}))
    assert status(run).state == "failed"
    with runs.owned(run):
        assert status(run).state == "running"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"experiment: [", b"- 1\n", b"trainer: 3\n"])
def test_a_config_that_cannot_be_read_is_damage_and_no_error(tmp_path: Path, content: bytes | None) -> None:
    run = Run(tmp_path)
    if content is not None:
        run.config.write_bytes(content)
    found = status(run)
    assert found.state in ("damaged", "stopped")
    assert (found.state == "damaged") == bool(found.why)
    assert math.isnan(found.value)


@pytest.mark.parametrize("name", ["environment.json", "owner.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\n", b"[]\n", b'{"starts": 3}\n', b'{"starts": [{"time": "noon"}]}\n', b"\x00" * 99])
def test_damaged_notes_are_passed_over(tmp_path: Path, name: str, content: bytes) -> None:
    run = made(tmp_path / "run")
    (run.folder / name).write_bytes(content)
    assert status(run).state == "stopped"


def test_the_tail_of_a_long_file_is_its_last_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": step / 7} for step in range(20_000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 20')
    read, age = tail(path)
    assert read == rows[-len(read) :]
    assert TAIL / 2 < len("".join(json.dumps(row) for row in rows[-len(read) :])) <= TAIL
    assert age < 60


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"step": 3, "train/loss": 1, "eval/bits_per_dim": 2}, "eval/bits_per_dim"),
        ({"train/return": 1, "train/loss": 2, "eval/length": 4}, "train/return"),
        ({"train/return": 1, "eval/return": 2, "eval/length": 4}, "eval/return"),
        ({"train/lr": 1, "train/loss": 2, "media/samples": "media/x.png"}, "train/loss"),
        ({"step": 1, "eval/name": "text"}, ""),
    ],
)
def test_the_metric_that_tells_most(values: dict, name: str) -> None:
    assert key_metric(values)[0] == name


# Milestones


def test_the_weights_of_moments_on_the_way_are_kept_and_load_as_any_checkpoint(tmp_path: Path) -> None:
    from generative import model

    with train(tmp_path, "--trainer.steps", "23", "--trainer.milestones", "4", "--run-dir", "run") as process:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    run = Run(tmp_path / "run")
    kept = [folder.name for folder in reversed(checkpoint.folders(run.milestones))]
    assert kept == ["step_000000006", "step_000000012", "step_000000018", "step_000000023"]
    last, whole = model.load(str(run.milestones / kept[-1])).model, model.load(str(run.folder)).model
    first = model.load(str(run.milestones / kept[0]))
    assert first.step == 6
    pairs = [(mine, theirs) for mine, theirs in zip(last.parameters(), whole.parameters(), strict=True)]
    assert all(bool((mine == theirs).all()) for mine, theirs in pairs)
    assert any(bool((mine != theirs).any()) for mine, theirs in zip(first.model.parameters(), whole.parameters(), strict=True))
    with train(tmp_path, "--resume", "run", "--trainer.steps", "46") as process:
        process.communicate(timeout=60)
    assert [folder.name for folder in checkpoint.folders(run.milestones)][:2] == ["step_000000046", "step_000000035"]
