"""benchmarks/exact.py: that it has every trainer, kills it, and notices a single bit."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lab.runs import Run

from .conftest import ROOT


@pytest.fixture(scope="module")
def exact() -> Iterator[ModuleType]:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("exact", ROOT / "benchmarks/exact.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["exact"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["exact"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def whole(exact, place):
    """An agent's run that nothing interrupted: it has all kinds of files."""
    return exact.uninterrupted("dqn_catch", place)


def test_every_trainer_is_there(exact) -> None:
    assert {recipe.script for recipe in exact.ROSTER.values()} == {path.name for path in (ROOT / "scripts").glob("train_*.py")}
    assert all(other in exact.ROSTER for recipe in exact.ROSTER.values() for other in recipe.needs.values())


def test_the_files_that_are_compared_are_all_that_matters(exact, whole) -> None:
    kinds = {name.split("/")[0] for name in whole.files}
    assert kinds == {"metrics.jsonl", "checkpoints", "milestones"}
    last = {path.name for path in (whole.run.checkpoints / "step_000000096").iterdir()}
    named = {name.split("/")[-1] for name in whole.files if "checkpoints/step_000000096/" in name}
    assert last - named == {"manifest.json"}
    assert {"model.safetensors", "optimizer.safetensors", "target.safetensors", "games.json", "trainer.json", "replay.json"} <= named
    assert sum("segments/replay_" in name for name in whole.files) > 2
    assert sum(name.startswith("milestones/") and name.endswith("model.safetensors") for name in whole.files) == 4
    assert len(whole.marks) == len(whole.gaps) == len(whole.run.rows())
    assert whole.marks[-1] == whole.run.metrics.stat().st_size
    assert len(whole.tests) == 3


def test_a_single_bit_anywhere_is_a_difference_that_is_named(exact, whole, tmp_path: Path) -> None:
    run, dice = Run(Path(shutil.copytree(whole.run.folder, tmp_path / "run"))), random.Random(0)
    assert exact.first_difference(run, whole.files) == ""
    for name in whole.files:
        path = run.folder / name
        content = path.read_bytes()
        altered = bytearray(content)
        altered[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(altered)
        assert name.split("/")[-1] in exact.first_difference(run, whole.files)
        path.write_bytes(content)
    (run.milestones / "step_000000024" / "model.safetensors").unlink()
    assert exact.first_difference(run, whole.files) == "milestones/step_000000024/model.safetensors"
    shutil.rmtree(run.checkpoints)
    assert exact.first_difference(run, whole.files)


def test_a_killed_run_is_resumed_and_kept_where_it_differs(exact, whole, place: Path) -> None:
    """Compared with what is not so, that is: with the true run it has no difference."""
    other = exact.Whole(whole.run, dict(whole.files) | {"metrics.jsonl": "0"}, whole.marks, whole.gaps, whole.tests)
    outcome = exact.interrupted("dqn_catch", place, other, ["saving"], 0, 0)
    assert [kill.split(",")[0] for kill in outcome.kills] == ["saving"]
    assert outcome.problem == "metrics.jsonl"
    assert exact.line(outcome).endswith("DIFFERENT: metrics.jsonl")
    assert len(json.loads((place / "dqn_catch_0" / "environment.json").read_text())["starts"]) == 2
    assert exact.first_difference(Run(place / "dqn_catch_0"), whole.files) == ""


def command(*words: str, folder: Path, expect: int = 0) -> str:
    whole = [sys.executable, str(ROOT / "benchmarks/exact.py"), *words, "--out", "exact.json", "--table", "exact.md"]
    done = subprocess.run(whole, cwd=folder, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow  # .ci/run takes a sample of all
def test_a_sample_writes_nothing(tmp_path: Path) -> None:
    assert "1 of 1 runs exact" in command("--trainers", "vae", "--minutes", "0.01", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_table_keeps_the_rows_of_others_and_tells_what_differs(exact, tmp_path: Path) -> None:
    options = exact.Options(out=tmp_path / "exact.json", table=tmp_path / "exact.md")
    exact.write(options, [exact.Outcome("gan", ["saving, 3 rows"], 1), exact.Outcome("vae", ["starting, 0 rows"], 0, "metrics.jsonl")])
    exact.write(options, [exact.Outcome("gan", ["saving, 4 rows"], 1), exact.Outcome("gan", ["training, 5 rows", "testing, 9 rows"])])
    vae, gan = json.loads(options.out.read_text())["rows"]
    assert vae["problems"] == ["metrics.jsonl"]
    assert (gan["kills"], gan["inside_saves"], gan["runs"]) == (["saving, 4 rows", "training, 5 rows", "testing, 9 rows"], 1, 2)
    rows = [line.split(" | ") for line in options.table.read_text().splitlines() if line.startswith("| `")]
    assert [(row[0], row[3:]) for row in rows] == [
        ("| `vae`", ["160", "1", "0", "1", "1", "**no**: metrics.jsonl |"]),
        ("| `gan`", ["160", "3", "1", "3", "2", "yes |"]),
    ]
    assert "\n4 kills, on " in options.table.read_text()


def test_an_unknown_trainer_is_refused(tmp_path: Path) -> None:
    assert command("--trainers", "vea", folder=tmp_path, expect=2).startswith("error: --trainers vea: there are autoencoder, vae, ")
