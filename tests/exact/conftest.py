"""Real training processes on scikit-learn's digits: small enough for a test, the same code as any other run."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "data.name": "digits",
    "data.batch-size": "16",
    "data.augment.shift": "1",
    "model.network.hidden": "24",
    "model.latent": "4",
    "trainer.steps": "240",
    "trainer.save-every": "4",
    "trainer.log-every": "3",
    "trainer.preview-every": "120",
    "trainer.threads": "1",
    "tracking.mode": "disabled",
}


def command(*extra: str, script: str = "train_vae.py", processes: int = 1, **changes: str) -> list[str]:
    """The command line of a small run; `changes` override settings, with `__` for a dot."""
    settings = SETTINGS | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return [sys.executable, *launcher, str(ROOT / "scripts" / script), *extra, *options]


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a process in a folder of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(words: list[str], folder: Path, expect: int = 0) -> str:
    """Run a process to its end; returns what it printed."""
    process = start(words, folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expect, output
    return output


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of the metrics and of every file of the last checkpoint but its manifest."""
    last = max((run / "checkpoints").glob("step_*"))
    files = [run / "metrics.jsonl", *(path for path in sorted(last.iterdir()) if path.name != "manifest.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} | {"last": last.name}


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("reference")
    finish(command("--run-dir", "run"), folder)
    return folder / "run"
