"""`--run-dir DIR --resume auto`, one command that begins a run or goes on with it; stops before and after training; how processes end."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from generative import autoencoder, vae
from lab import checkpoint
from lab import launch as launching
from lab.launch import launch
from lab.recorder import Recorder
from lab.runs import Run
from lab.tracking import Tracker
from lab.trainer import Trainer

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


# Stops before training and after it


@pytest.fixture
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal that fails the test where training would let it end the process; who had it before has it again afterwards."""

    def unheard(*_: object) -> None:
        pytest.fail("the signal ended the process")

    before = signal.signal(request.param, unheard)
    yield request.param
    assert signal.getsignal(request.param) is unheard
    signal.signal(request.param, before)


BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], indirect=True, ids=["SIGTERM", "SIGINT"])
SIX = ("--trainer.steps", "6", "--trainer.log-every", "1")


def then(real: Callable, number: int) -> Callable:
    """A function that is followed by a signal to its process."""

    def call(*arguments, **options):
        result = real(*arguments, **options)
        signal.raise_signal(number)
        return result

    return call


def the_rest_is_the_same() -> None:
    """The run in `run`, ended now, has the rows and the weights of one that nothing stopped."""
    assert train(*AUTO, *SIX) == 0
    assert train("--run-dir", "whole", *SIX) == 0
    for name in ("metrics.jsonl", "checkpoints/step_000000006/model.safetensors"):
        assert (Path("run") / name).read_bytes() == (Path("whole") / name).read_bytes()


@BOTH
def test_a_stop_while_the_data_are_read_ends_at_once_and_leaves_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    with monkeypatch.context() as patch:
        patch.setattr(vae.VAEExperiment, "dataset", then(vae.VAEExperiment.dataset, number))
        patch.setattr(vae.VAEExperiment, "network", lambda *_: reached.append("the network"))
        assert train(*AUTO, *SIX) == 75
    assert not reached
    assert not Path("run").exists()
    the_rest_is_the_same()


@BOTH
def test_a_stop_while_a_checkpoint_is_read_changes_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(*AUTO, *SIX, "--trainer.steps", "3") == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != "log.txt"}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_newest", then(checkpoint.load_newest, number))
        assert train(*AUTO, *SIX) == 75
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != "log.txt"} == before
    assert "Traceback" not in Path("run/log.txt").read_text()


@BOTH
def test_a_stop_between_the_preparations_and_the_first_step_does_no_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "start", then(Tracker.start, number))
        assert train(*AUTO, *SIX) == 75
    assert steps() == []
    assert json.loads(Path("run/environment.json").read_text())["starts"][0]["error"] is None
    the_rest_is_the_same()


@BOTH
@pytest.mark.parametrize("moment", [(Recorder, "write"), (Trainer, "_save"), (Tracker, "summarise")], ids=["row", "save", "summary"])
def test_a_stop_when_the_last_step_is_done_finds_the_run_complete(number: int, moment: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*moment, then(getattr(*moment), number))
        assert train(*AUTO, *SIX, "--trainer.steps", "1") == 0
    assert checkpoint.load_newest(Path("run/checkpoints")).step == 1


# The ends of one process of several


class Ended(BaseException):
    """In place of the end of this process."""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(KeyError("lost"), 1, "KeyError: 'lost'"), (KeyboardInterrupt(), 1, "KeyboardInterrupt"), (SystemExit(2), 2, ""), (None, 75, "")],
    ids=["error", "interrupt", "exit", "none"],
)
def test_one_process_of_several_never_ends_through_the_interpreter(
    error: BaseException | None, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object) -> int:
        if error:
            raise error
        return 75

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launching, "_launch", work)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended) as ended:
        train()
    assert ended.value.args == (code,)
    output = capsys.readouterr().err
    assert told in output
    assert ("Traceback" in output) == bool(told)
