"""benchmarks/scoreboard.py: its table and its minutes, with what scripts/evaluate.py says put in its place."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from lab.config import UserError
from lab.runs import Run
from tests.scripts.test_scripts import ROOT, call

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = """
    --data.name digits --data.image-size 8 --data.batch-size 16 --trainer.steps 3 --trainer.log-every 1 --trainer.precision fp32
    --tracking.mode disabled --trainer.threads 1
""".split()  # noqa: SIM905
FLOOR = {"frechet_test": 2.0, "kernel_test": 0.001, "class_accuracy": 0.99}


@pytest.fixture(scope="module")
def board() -> Iterator[ModuleType]:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("scoreboard", ROOT / "benchmarks/scoreboard.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["scoreboard"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scoreboard"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQ-VAE, a prior on its tokens and a VAE, each trained for a moment."""
    folder = tmp_path_factory.mktemp("board")
    with contextlib.chdir(folder):
        call("train_vqvae.py", *TINY, "--model.channels", "8", "--model.codes", "8", "--run-dir", "codes", "--name", "codes")
        call("train_tokens.py", *TINY, "--vqvae", "codes", "--model.width", "16", "--model.layers", "1", "--run-dir", "prior")
        call("train_vae.py", *TINY, "--model.network.hidden", "16", "--run-dir", "vae")
    return folder


@pytest.fixture(autouse=True)
def _inside(folder: Path) -> Iterator[None]:
    with contextlib.chdir(folder):
        yield


def timing(*rows: tuple[int, float]) -> Run:
    run = Run(Path("timed"))
    run.folder.mkdir(exist_ok=True)
    run.timing.write_text("".join(json.dumps({"step": step, "time": 0, "steps_per_second": pace}) + "\n" for step, pace in rows))
    return run


def test_minutes_are_those_of_the_steps_that_count(board: ModuleType) -> None:
    assert board.minutes(timing((60, 1.0), (120, 2.0))) == pytest.approx(1.5)
    # Stopped after 150, taken up at 120: the steps from 120 on were done again, faster.
    assert board.minutes(timing((60, 1.0), (120, 1.0), (150, 1.0), (150, 3.0), (180, 3.0))) == pytest.approx(2 + 20 / 60)
    with pytest.raises(UserError, match="no row yet"):
        board.minutes(timing())


def run_board(board: ModuleType, monkeypatch: pytest.MonkeyPatch, scores: dict[str, dict[str, Any]], *words: str) -> list[list[str]]:
    """Call the script with canned evaluations; returns the commands it would have run."""
    commands: list[list[str]] = []

    def fake(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        said = {"run": "somewhere", "experiment": "x", "step": 3, "sample_protocol": "so many", **scores.get(command[2], {})}
        return subprocess.CompletedProcess(command, 0, json.dumps(said))

    monkeypatch.setattr(board.subprocess, "run", fake)
    places = ["--out", "board.json", "--table", "docs/board.md", "--picture", "docs/families.png"]
    monkeypatch.setattr(sys, "argv", ["scoreboard.py", *words, *places])
    assert board.main() == 0
    return commands


def test_the_board_puts_the_best_first_beside_the_floor_and_keeps_other_rows(board: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"features": "digits-1234", "ladder": {"floor": FLOOR}, "memorised": 0.02, "cas": 0.5, "cas_real": 0.97}
    scores = {
        "vae": {**common, "frechet_test": 9.0, "nll": 101.26},
        "prior": {**common, "frechet_test": 5.0, "class_accuracy": 0.75},
    }
    commands = run_board(board, monkeypatch, scores, "vae", "--samples", "60")
    run_board(board, monkeypatch, scores, "prior", "codes")
    assert commands[0][1:] == ["vae", "--json", "--cas", "--samples", "60", "--device", "cpu"]
    report = json.loads(Path("board.json").read_text())
    assert {row["name"]: row["family"] for row in report["rows"]} == {"codes": "vqvae", "tokens": "tokens", "vae": "vae"}
    prior = next(row for row in report["rows"] if row["name"] == "tokens")
    assert prior["minutes_before"] == board.minutes(Run(Path("codes"))) > 0
    assert prior["images_per_second"] > 0
    assert not [row for row in report["rows"] if "run" in row]
    lines = Path("docs/board.md").read_text().splitlines()
    first = lines.index("### digits (digits-1234)")
    titles, _, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first + 2 : first + 7])
    table = [dict(zip(titles, row, strict=True)) for row in cells]
    assert [row["model"] for row in table] == ["`tokens`", "`vae`", "training images"]
    assert [row["x floor"] for row in table] == ["2.5", "4.5", "1.0"]
    assert [row["class shown (%)"] for row in table] == ["75.0", "", "99.0"]
    assert [row["learnt from samples (%)"] for row in table] == ["50.0", "50.0", "97.0"]
    assert [row["likelihood"] for row in table] == ["", "≤ 101.3 nats, binarised", ""]
    assert " + " in table[0]["minutes"]
    with Image.open("docs/families.png") as picture:
        assert picture.width == 1008
    assert sorted(path.name for path in Path("board").iterdir()) == ["codes.png", "tokens.png", "vae.png"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"family": "flow", "bits_per_dim": 1.2345}, "1.23 bits/dim"),
        ({"family": "diffusion", "bits_per_dim": 1.5}, "≤ 1.50 bits/dim"),
        ({"family": "gan"}, ""),
    ],
)
def test_a_likelihood_says_its_unit_and_whether_it_is_a_bound(board: ModuleType, row: dict[str, Any], expected: str) -> None:
    assert board.likelihood(row, {}) == expected


def test_presets_are_trained_after_those_that_they_are_built_on(board: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, (preset, needs) in enumerate(board.ROSTER.items()):
        assert all(need in list(board.ROSTER)[:index] for need in needs[1::2]), preset
        assert (ROOT / f"configs/generative/{preset}.yaml").exists()
    monkeypatch.setattr(board, "judge", lambda options, name: {"name": name})
    monkeypatch.setattr(board, "enter", lambda options, row: None)
    commands = run_board(board, monkeypatch, {}, "--train", "--presets", "vqvae_mnist", "tokens_mnist")
    assert [Path(command[0]).name for command in commands] == ["train_vqvae.py", "train_tokens.py"]
    assert commands[1][-2:] == ["--vqvae", "runs/scoreboard/vqvae_mnist"]
    assert "--run-dir" in commands[1]


def test_mistakes_get_one_sentence() -> None:
    assert call("../benchmarks/scoreboard.py", expect=2) == "error: give the runs to judge, or --train\n"
    assert "nowhere: no " in call("../benchmarks/scoreboard.py", "nowhere", expect=2)
    assert "--presets x: the board trains autoencoder_mnist" in call("../benchmarks/scoreboard.py", "--train", "--presets", "x", expect=2)
