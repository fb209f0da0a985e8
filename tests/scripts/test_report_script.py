"""`scripts/report.py` as a user calls it, on real runs."""

import contextlib
import re
from pathlib import Path

import pytest

from . import test_scripts
from .test_scripts import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["--tracking.mode", "disabled", "--trainer.threads", "1"]
AGENT = ["--trainer.steps", "40", "--dqn.learning-starts", "640", "--test.games", "1", "--test.video-every", "0"]
MODEL = ["--data.name", "digits", "--trainer.steps", "20", "--trainer.log-every", "5"]


def call(script: str, *words: str, cwd: Path, expect: int = 0) -> str:
    with contextlib.chdir(cwd):
        printed = test_scripts.call(script, *words, expect=expect)
    assert "Traceback" not in printed
    return printed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an agent that nobody has filmed, and two seeds of a generator."""
    folder = tmp_path_factory.mktemp("reports")
    call("train_dqn.py", ROOT / "configs/rl/dqn_catch.yaml", *AGENT, *QUICK, "--run-dir", "runs/dqn_catch/a", cwd=folder)
    for seed in ("1", "2"):
        call("train_vae.py", *MODEL, *QUICK, "--trainer.seed", seed, "--run-dir", f"vae{seed}", cwd=folder)
    return folder


def reported(printed: str, cwd: Path) -> tuple[Path, str]:
    """Where the last line says that the report is, and its text."""
    path = cwd / re.fullmatch(r"report: (.+)", printed.splitlines()[-1])[1]
    return path, path.read_text()


def test_a_report_of_one_run_stands_in_its_folder_and_shows_the_agent_at_play(place: Path) -> None:
    media = place / "runs/dqn_catch/a/media"
    assert not list(media.glob("*.mp4"))
    path, page = reported(call("report.py", "latest", cwd=place), place)
    assert path == place / "runs/dqn_catch/a/report.html"
    assert [film.name for film in media.glob("*.mp4")] == ["play_000000040.mp4"]
    assert "data:video/mp4;base64," in page
    assert "dqn on the game catch: 40 of 40 steps (finished)" in page
    assert 'aria-label="return over frames"' in page
    _, smaller = reported(call("report.py", "latest", "--no-video", cwd=place), place)
    assert "data:video" not in smaller
    assert len(smaller) < len(page)


def test_seeds_stand_together_in_the_working_folder(place: Path) -> None:
    path, page = reported(call("report.py", "vae1", "vae2", "vae1", cwd=place), place)
    assert path == place / "report.html"
    assert "mean of 2 seeds (1, 2)" in page
    assert page.count('alt="Samples, after 20 steps"') == 2
    assert page.count('alt="Test images, each above what the model makes of it, after 20 steps"') == 2


def test_a_generator_without_pictures_draws_those_that_its_preview_would_show(place: Path) -> None:
    samples = place / "vae2/media/samples_000000020.png"
    before = samples.read_bytes()
    for picture in samples.parent.glob("*.png"):
        picture.unlink()
    _, page = reported(call("report.py", "vae2", cwd=place), place)
    assert samples.read_bytes() == before
    assert 'alt="Samples, after 20 steps"' in page


def test_a_checkpoint_folder_means_its_run_and_a_run_without_config_is_told_of(place: Path, tmp_path: Path) -> None:
    checkpoint = next((place / "vae1/checkpoints").glob("step_*"))
    path, _ = reported(call("report.py", checkpoint, cwd=place), place)
    assert path == place / "vae1/report.html"
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost/metrics.jsonl").write_bytes((place / "vae1/metrics.jsonl").read_bytes())
    printed = call("report.py", tmp_path / "lost", place / "vae1", "--out", tmp_path / "both.html", cwd=place)
    path, page = reported(printed, place)
    assert path == tmp_path / "both.html"
    assert "Its config.yaml is missing." in page
    assert "vae on digits: 20 of 20 steps (finished)" in page


def test_a_model_that_cannot_be_opened_stops_no_report(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_bytes((place / "runs/dqn_catch/a/config.yaml").read_bytes())
    printed = call("report.py", tmp_path / "empty", cwd=place)
    assert "nothing could be drawn for the report" in printed
    _, page = reported(printed, place)
    assert "It has recorded no metrics." in page


MISTAKES = {
    "give a run to report on": [],
    "nowhere: no run here": ["nowhere"],
    "vae1/config.yaml is no report and stays as it is; give another place by --out": ["vae1", "--out", "vae1/config.yaml"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_end_in_one_sentence(place: Path, sentence: str) -> None:
    before = (place / "vae1/config.yaml").read_bytes()
    printed = call("report.py", *MISTAKES[sentence], cwd=place, expect=2)
    assert sentence in " ".join(printed.split())
    assert (place / "vae1/config.yaml").read_bytes() == before
