"""A real training, followed, stopped and resumed in a real browser."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import checkpoint
from lab.runs import Run
from lab.status import status

from .conftest import Browsing, Served, serve, train, wait_until
from .run_pages import line, wait_for_other_line, write_run


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Served]:
    """A studio of its own, whose runs end with the test."""
    studio = serve(tmp_path)
    yield studio
    studio.stop()
    for path in tmp_path.glob("*/*/owner.json"):
        os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)


def test_a_training_is_followed_stopped_and_resumed(workshop: Served, browsing: Browsing) -> None:
    folder, page = workshop.root / "vae_live" / "a", browsing.page()
    words = "--data.name digits --model.network.hidden 16 --trainer.threads 1 --trainer.steps 1000000 --trainer.log-every 20"
    process = train(f"train_vae.py {words} --trainer.save-every 100000 --trainer.preview-every 100000", folder)
    run = Run(folder)
    try:
        wait_until(lambda: status(run).step > 100, "the training has begun")
        page.goto(f"{workshop.url}/run/vae_live/a")
        page.get_by_role("status").get_by_text("running").wait_for()
        page.get_by_text("steps/s").wait_for()
        before = line(page, "train/loss")
        moved = wait_for_other_line(page, "train/loss", before)
        assert wait_for_other_line(page, "train/loss", moved) != before  # and goes on

        page.get_by_role("button", name="Stop").click()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
    finally:
        process.kill()
    page.get_by_role("status").get_by_text("stopped", exact=True).wait_for()
    stopped = status(run).step
    (saved,) = checkpoint.folders(run.checkpoints)
    assert checkpoint.damage(saved) == ""

    page.get_by_role("button", name="Resume").click()
    page.get_by_role("status").get_by_text("running").wait_for()
    page.get_by_role("button", name="Stop").wait_for()
    wait_until(lambda: status(run).step > stopped + 100, "the training goes on")
    rows = run.rows()
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})  # no step twice

    page.goto("about:blank")
    workshop.stop()
    later = status(run)
    assert later.state == "running"  # it lives on without the studio
    os.kill(later.pid, signal.SIGTERM)
    wait_until(lambda: status(run).state == "stopped", "the training has saved and ended")


def test_a_run_that_cannot_go_on_says_why(workshop: Served, browsing: Browsing) -> None:
    page, run = browsing.page(), write_run(workshop.root / "vae_broken" / "a", 3)
    run.config.write_text(run.config.read_text().replace("latent: ", "latent: minus "))
    page.goto(f"{workshop.url}/run/vae_broken/a")
    page.get_by_role("button", name="Resume").click()
    page.get_by_text("It did not go on:").wait_for()
    assert "model.latent" in page.locator(".q-notification").filter(has_text="It did not go on").inner_text()
