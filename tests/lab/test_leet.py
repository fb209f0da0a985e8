"""`wandb leet`, W&B's own terminal view, on a real offline run of ours: what it reads are our rows, and it draws them."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from lab.runs import Run

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
    --trainer.steps=24 --trainer.preview-every=8 --trainer.log-every=4 --dqn.learning-starts=200 --tracking.mode=offline
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No setting or key of whoever runs the tests."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    return {**mine, "HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Run:
    """An agent, trained for a moment with W&B offline."""
    folder = tmp_path_factory.mktemp("lab") / "run"
    script = [sys.executable, str(ROOT / "scripts/train_dqn.py"), str(ROOT / "configs/rl/dqn_catch.yaml")]
    subprocess.run([*script, *SETTINGS, f"--run-dir={folder}"], check=True, env=environment, capture_output=True, timeout=120)
    return Run(folder)


def offline_directory(run: Run) -> Path:
    [found] = (run.folder / "wandb").glob("offline-run-*")
    return found


def test_it_reads_our_rows(run: Run, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(offline_directory(run)), "--json"]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=60)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    own = ("_", "media/", "speed/")
    read = [{key: value for key, value in item.items() if not key.startswith(own)} for item in items]
    ours = [{key: value for key, value in row.items() if not key.startswith(own)} for row in run.rows()]
    assert len(ours) >= 6
    assert any("eval/return" in row for row in ours)
    assert read == ours


def test_it_draws_them_in_a_terminal(run: Run, environment: dict[str, str]) -> None:
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    command = [sys.executable, "-m", "wandb", "leet", str(run.folder / "wandb")]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True)
    os.close(terminal)
    try:
        shown = until(screen, b"eval/return", 60)
        assert b"[x: frames]" in shown  # over the axis that the experiment names
        os.write(screen, b"q")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(screen)


def until(screen: int, wanted: bytes, seconds: float) -> bytes:
    """All that was drawn until something appeared, answering what a terminal is asked."""
    drawn, ends = b"", time.monotonic() + seconds
    while wanted not in drawn or b"[x: " not in drawn:
        assert time.monotonic() < ends, drawn[-2000:]
        if select.select([screen], [], [], 0.2)[0]:
            new = os.read(screen, 65536)
            drawn += new
            for question, answer in ((b"\x1b[6n", b"\x1b[1;1R"), (b"]11;?", b"\x1b]11;rgb:0000/0000/0000\x07"), (b"\x1b[c", b"\x1b[?62;c")):
                if question in new:
                    os.write(screen, answer)
    return drawn
