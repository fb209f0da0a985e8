"""A real, small, full file system under a real run."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import checkpoint

from .conftest import command, fingerprint, finish


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]).returncode
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_the_run_goes_on_when_there_is_room(
    reference: Path, small_disk: Path, tmp_path: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2_400_000))
    output = finish(command("--run-dir", str(small_disk / "run")), tmp_path, expect=1)
    assert "could not be saved" in output
    assert "training goes on" in output
    assert "step 240 could not be saved" in output
    assert "Traceback" not in output
    whole = checkpoint.folders(small_disk / "run" / "checkpoints")
    assert whole
    for folder in whole:
        checkpoint.verify(folder)
    assert not list((small_disk / "run" / "checkpoints").glob(".step_*"))
    ballast.unlink()
    finish(command("--resume", str(small_disk / "run")), tmp_path)
    assert fingerprint(small_disk / "run") == fingerprint(reference)
