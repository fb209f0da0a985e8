"""The scripts of the agents as a user calls them: real games, short runs."""

import contextlib
import json
import re
from pathlib import Path

import pytest

from lab.config import read_yaml

from . import test_scripts
from .test_scripts import ROOT, commands_of_the_readme

CATCH = str(ROOT / "configs/rl/dqn_catch.yaml")
SHORT = ["--trainer.steps", "80", "--dqn.learning-starts", "640", "--trainer.save-every", "40", "--trainer.preview-every", "40"]
QUICK = ["--tracking.mode", "disabled", "--test.games", "1", "--trainer.threads", "1"]


def call(script: str, *words: str, cwd: Path, expect: int = 0) -> str:
    with contextlib.chdir(cwd):
        printed = test_scripts.call(script, *words, expect=expect)
    assert "Traceback" not in printed
    return printed


@pytest.fixture(autouse=True)
def _without_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run of every algorithm."""
    folder = tmp_path_factory.mktemp("agents")
    call("train_dqn.py", CATCH, *SHORT, *QUICK, "--run-dir", "dqn", cwd=folder)
    call("train_sb3.py", ROOT / "configs/rl/ppo_catch.yaml", "--trainer.steps", "3", *QUICK, "--run-dir", "ppo", cwd=folder)
    return folder


SMALL = {
    "dqn": ["--trainer.steps", "5", "--replay.capacity", "3000", "--dqn.learning-starts", "64"],
    "pqn": ["--trainer.steps", "2", "--pqn.games", "4", "--pqn.n-steps", "16", "--pqn.batch-size", "32"],
    "sb3": ["--trainer.steps", "1", "--replay.capacity", "3000", "--ppo.epochs", "1", "--dqn.actions-per-step", "64"],
}


PRESETS = sorted((ROOT / "configs/rl").glob("*.yaml"))
# One of each kind: the others are the same on another game, or with other numbers.
QUICK_PRESETS = ("demo", "dqn_catch", "dqn_pong", "pqn_pong", "ppo_catch", "ppo_pong", "rainbow_pong", "sb3_dqn_pong")


def marks(preset: Path) -> tuple[pytest.MarkDecorator, ...]:
    return () if preset.stem in QUICK_PRESETS else (pytest.mark.slow,)


@pytest.mark.parametrize("preset", [pytest.param(path, id=path.stem, marks=marks(path)) for path in PRESETS])
def test_every_preset_trains(preset: Path, tmp_path: Path) -> None:
    _, kind = read_yaml(preset)
    small = [*SMALL[kind], "--game.max-frames", "100", "--test.video-steps", "10"]
    call(f"train_{kind}.py", preset, *small, *QUICK, "--run-dir", preset.stem, cwd=tmp_path)
    steps = small[1]
    row = json.loads((tmp_path / preset.stem / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == int(steps)
    assert row["frames"] > 0
    assert "eval/return" in row
    assert preset.stem == re.search(r"^name: (\S+)$", (tmp_path / preset.stem / "config.yaml").read_text(), re.M)[1]


@pytest.mark.parametrize("words", [words for words in commands_of_the_readme() if "watch.py" in words[0]], ids=" ".join)
def test_the_readmes_watching_commands_make_videos(words: list[str], place: Path) -> None:
    script, *options = ["dqn" if word in ("RUN", "latest") else "40" if word == "2350" else word for word in words]
    printed = call(Path(script).name, *options, "--steps", "30", cwd=place)
    film = place / re.search(r"\S+\.(mp4|gif)", printed)[0]
    assert film.stat().st_size > 1000


def evaluations() -> list[list[str]]:
    images = ("--importance-samples", "--images")
    return [words for words in commands_of_the_readme() if "evaluate.py" in words[0] and not set(images) & set(words)]


@pytest.mark.parametrize("words", evaluations(), ids=" ".join)
def test_the_readmes_judging_commands_judge_agents(words: list[str], place: Path) -> None:
    script, *options = ["dqn" if word in ("RUN", "latest") else "3" if word == "100" else word for word in words]
    short = [] if "--games" in options else ["--games", "3"]
    assert "iqm" in call(Path(script).name, *options, *short, cwd=place)


@pytest.mark.parametrize("run", ["dqn", "ppo"])
def test_sync_sends_every_row_of_an_agents_run_with_its_video(run: str, place: Path) -> None:
    rows = (place / run / "metrics.jsonl").read_text().splitlines()
    assert any("media/play" in row for row in rows)
    with contextlib.chdir(place):
        assert f"rows sent: {len(rows)}" in test_scripts.sync(run)
    assert list((place / run / "wandb").glob("offline-run-*/files/media/videos/**/*.mp4"))


BAD_INPUT = [
    ("train_dqn.py", [CATCH, "--game.name", "pnog"], "did you mean pong"),
    ("train_dqn.py", [CATCH, "--dqn.train-every", "12"], "train_every must be a multiple of games"),
    ("train_dqn.py", [CATCH, "--replay.capacity", "1e15"], "of memory are free"),
    ("train_dqn.py", [CATCH, "--replay.capacity", "16"], "too small"),
    ("train_dqn.py", [CATCH, "--dqn.backbone", "natrue"], "did you mean nature?"),
    ("train_dqn.py", ["--resume", "ppo"], "expected dqn"),
    ("train_dqn.py", ["--resume", "dqn", "--dqn.games", "4"], "cannot resume"),
    ("train_sb3.py", [CATCH], "use scripts/train_dqn.py"),
    ("watch.py", ["dqn", "--checkpoint", "7"], "40"),
    ("watch.py", ["dqn", "--policy", "sampled"], "take epsilon or greedy"),
    ("watch.py", ["dqn", "--out", "film.avi"], ".mp4"),
    ("watch.py", ["nowhere"], "no dqn or pqn or sb3 run here"),
    ("evaluate.py", ["dqn", "--policy", "sampled"], "take epsilon or greedy"),
    ("evaluate.py", [], "give a run to judge"),
    ("sample.py", ["dqn"], "a run of 'dqn'"),
]


@pytest.mark.parametrize(("script", "words", "told"), BAD_INPUT, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_ends_in_one_clear_sentence(script: str, words: list[str], told: str, place: Path) -> None:
    assert told in re.sub(r"\s+", " ", call(script, *words, cwd=place, expect=2))


def test_a_backbones_name_is_checked_before_a_run_folder_is_made(tmp_path: Path) -> None:
    call("train_dqn.py", CATCH, "--dqn.backbone", "natrue", "--run-dir", "run", cwd=tmp_path, expect=2)
    assert not (tmp_path / "run").exists()
