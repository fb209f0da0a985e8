"""`--run-dir DIR --resume auto`: one command that begins a run or goes on with it."""

import json
from pathlib import Path

import pytest

from generative import autoencoder, vae
from lab import checkpoint
from lab.launch import launch
from lab.runs import Run

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = """
    --data.name digits --data.image-size 8 --model.network.hidden 8 --model.latent 2 --tracking.mode disabled --trainer.threads 1
""".split()  # noqa: SIM905
AUTO = ["--run-dir", "run", "--resume", "auto"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*words: str) -> int:
    return launch(vae.EXPERIMENT, "", [*words, *TINY])


def steps() -> list[int]:
    """At which steps the run was, start by start, and in the end."""
    return [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]


def starts() -> int:
    return len(json.loads(Path("run/environment.json").read_text())["starts"])


def test_the_same_command_begins_goes_on_and_has_nothing_more_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    Path("preset.yaml").write_text("experiment: vae\nname: mine\ntrainer: {steps: 4, log_every: 1}\n")
    assert train("preset.yaml", *AUTO) == 0
    assert steps() == [1, 2, 3, 4]
    Path("preset.yaml").write_text("experiment: vae\nname: other\n")  # what a run began with stands in its own config
    assert train("preset.yaml", *AUTO, "--trainer.steps", "6") == 0
    assert steps() == [1, 2, 3, 4, 5, 6]
    assert "name: mine" in Path("run/config.yaml").read_text()
    assert train("preset.yaml", *AUTO) == 0
    assert steps() == [1, 2, 3, 4, 5, 6]
    assert starts() == 3
    assert capsys.readouterr().out.splitlines()[-1] == "run: run"


def test_whatever_a_creation_left_behind_that_was_cut_off_the_run_begins() -> None:
    steps_of_two = ("--trainer.steps", "2", "--trainer.log-every", "1")
    assert train(*AUTO, *steps_of_two) == 0
    config, whole = Path("run/config.yaml").read_text(), checkpoint.load(next(Run(Path("run")).checkpoints.glob("step_*")))
    for left in (
        ["media/"],
        ["media/", ".config.yaml"],
        ["media/", "config.yaml"],
        ["config.yaml", "run.lock", "checkpoints/.step_000000002.1/"],
    ):
        Path("run").rename(f"before-{len(left)}{left[-1].count('/')}{left[-1][0]}")
        for name in left:
            path = Path("run") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True) if name.endswith("/") else path.write_text(config if name == "config.yaml" else "exp")
        assert train(*AUTO, *steps_of_two) == 0
        assert steps() == [1, 2]
        again = checkpoint.load(next(Run(Path("run")).checkpoints.glob("step_*")))
        assert all(value.equal(whole.parts["model"][name]) for name, value in again.parts["model"].items())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resume", "auto"], "--resume auto goes on with the run in --run-dir DIR, or begins it there; give --run-dir too"),
        (["--run-dir", "ae", "--resume", "auto"], "ae: a run of 'autoencoder'; expected vae"),
        (["--run-dir", "file", "--resume", "auto"], "file: cannot make a run folder here"),
        (["a.yaml", "b.yaml", "--run-dir", "run", "--resume", "auto"], "give one config"),
        (["--run-dir", "ae"], "ae already holds a run; go on with it by --resume ae, or by --resume auto beside --run-dir"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(autoencoder.EXPERIMENT, "", [*TINY, "--run-dir", "ae", "--trainer.steps", "1"]) == 0
    Path("file").write_text("")
    assert train(*words) == 2
    assert told in capsys.readouterr().err
    assert Path("ae/config.yaml").read_text().startswith("experiment: autoencoder")


def test_a_folder_called_latest_is_that_folder() -> None:
    assert train("--trainer.steps", "1") == 0  # the newest run
    for last in ("1", "2"):
        assert train("--run-dir", "latest", "--resume", "auto", "--trainer.steps", last, "--trainer.log-every", "1") == 0
    assert len(Path("latest/metrics.jsonl").read_text().splitlines()) == 2
