"""Every point at which a save, or a run, may be cut off; and every file of a checkpoint damaged in every way. All must recover.

The maps are drawn by `tests.exact.crashing`, in processes of its own. A map's points are all that a process asks of the disk: before,
within (half done) and after each write, open, flush, rename, deletion, new folder. One point more is the end, where nothing fails.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import checkpoint
from lab.checkpoint import DamagedCheckpoint

from .conftest import ROOT, fingerprint, finish
from .test_dqn import CATCH, command

QUICK = ("growing", "growing-power", "first-power", "run-files", "run-files-power")
SLOW = ("plain", "plain-power", "first", "resume-files", "milestones-power", "run", "run-power", "resume", "agent")


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory where there is such a place: a map makes and deletes thousands of files."""
    place = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)


def draw(memory: Path, *maps: str) -> None:
    words = [sys.executable, "-m", "tests.exact.crashing", str(memory), *maps]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # no traceback of any process


@pytest.fixture(scope="module")
def quick(memory: Path) -> Path:
    draw(memory, *QUICK)
    return memory


def read(memory: Path, name: str, record: Callable[[str, object], None]) -> tuple[list[str], list[int]]:
    """The points of a map, and the newest checkpoint after a crash at each; all recovered."""
    drawn = json.loads((memory / f"{name}.json").read_text())
    assert drawn["bad"] == []
    points, newest = drawn["names"], drawn["newest"]
    assert len(newest) == len(points) + 1
    record(f"crash points of {name}, all recovered", len(points))
    return points, newest


def check_save(name: str, points: list[str], newest: list[int]) -> None:
    """The old checkpoint until the one moment that commits, the new one from there; and the map has all that a save does."""
    old = 0 if name.startswith("first") else 2
    commit = points.index("after rename step_000000003")
    if name.endswith("-power"):  # the name is only safe once its folder is flushed
        commit = points.index("after fsync checkpoints", commit)
    assert newest == [old] * commit + [3] * (len(points) + 1 - commit)
    parts = 2 if name.startswith("plain") else 3
    counts = {kind: sum(point.startswith(kind) for point in points) for kind in ("within save_file", "within write", "before unlink")}
    segments = 0 if name.startswith("plain") else sum(point.startswith("after replace diary_") for point in points)
    assert segments or name.startswith("plain")
    assert counts["within save_file"] == parts + segments
    assert counts["within write"] == parts + 1
    assert counts["before unlink"] == (2 * parts + 1 if old else 0)
    for kind in ("before", "after"):
        files = 2 * parts + 1 + segments
        folders = 2 + (name != "plain" and name != "plain-power") + (not old)
        assert sum(point.startswith(f"{kind} fsync") for point in points) == files + folders


@pytest.mark.parametrize("name", QUICK[:3])
def test_a_save_cut_off_anywhere_leaves_the_old_checkpoint_or_the_new_one(quick: Path, name: str, record_property) -> None:
    check_save(name, *read(quick, name, record_property))


@pytest.mark.parametrize("name", QUICK[3:])
def test_a_run_cut_off_anywhere_goes_on_and_ends_as_if_nothing_had_been(quick: Path, name: str, record_property) -> None:
    points, newest = read(quick, name, record_property)
    assert newest == sorted(newest)
    assert set(newest) == {0, 1, 2, 3}
    for file in ("config.yaml", "command.txt", "environment.json"):
        assert f"before fsync .{file}" in points
        assert f"after replace {file}" in points
    for file in ("metrics.jsonl", "timing.jsonl", "owner.json"):
        assert f"within write {file}" in points
    assert "after truncate metrics.jsonl" in points


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_wider_map(memory: Path, name: str, record_property) -> None:
    draw(memory, name)
    points, newest = read(memory, name, record_property)
    if name in ("plain", "plain-power", "first"):
        check_save(name, points, newest)
    else:
        assert newest == sorted(newest)
        assert len(points) > (60 if name == "resume-files" else 120)


# Damage

KINDS = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an agent whose replay memory is saved in segments; its last two checkpoints are those of the steps 20 and 24."""
    folder = tmp_path_factory.mktemp("agent")
    settings = CATCH | {"trainer.steps": "24", "trainer.preview-every": "24", "trainer.milestones": "0", "test.games": "1"}
    finish(command(settings, "--run-dir", "run"), folder)
    return folder / "run"


def files_of_the_newest(run: Path) -> list[Path]:
    """Every file that only the newest checkpoint needs."""
    newest, before = checkpoint.folders(run / "checkpoints")
    rows = [{segment.name for _, segment in checkpoint.load(folder).segments["replay"]} for folder in (newest, before)]
    return [*sorted(newest.iterdir()), *(run / "checkpoints" / "segments" / name for name in sorted(rows[0] - rows[1]))]


@pytest.fixture
def damaged(agent: Path, memory: Path) -> Iterator[Path]:
    """A copy to damage."""
    yield Path(shutil.copytree(agent, memory / "damaged"))
    shutil.rmtree(memory / "damaged")


def check_passed_over(run: Path, file: Path, caplog) -> None:
    """The newest checkpoint is refused by the name of the file, and the one before it is used."""
    caplog.clear()
    newest, before = checkpoint.folders(run / "checkpoints")
    found = checkpoint.load_newest(run / "checkpoints", only=["trainer"] if file.parent == newest else [])
    assert found is not None
    assert found.step == int(before.name[5:])
    assert [str(file) in record.getMessage() for record in caplog.records] == [True]


def test_a_bit_flipped_anywhere_in_the_newest_checkpoint_is_noticed_and_the_one_before_is_used(
    damaged: Path, caplog, record_property
) -> None:
    dice, flips = random.Random(0), 0
    files = files_of_the_newest(damaged)
    assert {path.name for path in files} >= {"manifest.json", "replay.safetensors", "replay.json", "games.json", "trainer.json"}
    assert files[-1].parent.name == "segments"
    for path in files:
        whole = path.read_bytes()
        places = {*range(min(60, len(whole))), len(whole) - 1} if len(whole) < 100 else {0, len(whole) - 1}
        places |= {dice.randrange(len(whole)) for _ in range(60)}
        for place in places:
            content = bytearray(whole)
            content[place] ^= 1 << dice.randrange(8)
            path.write_bytes(content)
            check_passed_over(damaged, path, caplog)
        path.write_bytes(whole)
        assert len(places) >= min(50, len(whole))
        flips += len(places)
    assert flips >= 50 * (len(files) - 1)
    record_property("flipped bits, all noticed", flips)
    assert checkpoint.load_newest(damaged / "checkpoints").step == 24


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_the_newest_checkpoint_damaged_in_every_way_is_named(damaged: Path, kind: str, caplog) -> None:
    for path in files_of_the_newest(damaged):
        whole = path.read_bytes()
        KINDS[kind](path)
        check_passed_over(damaged, path, caplog)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole)
    assert checkpoint.load_newest(damaged / "checkpoints").step == 24


def test_files_that_do_not_belong_to_the_newest_checkpoint_are_noticed_and_those_beside_it_do_no_harm(damaged: Path, caplog) -> None:
    newest = checkpoint.folders(damaged / "checkpoints")[0]
    for extra in ("extra.json", "model.safetensors.tmp", ".hidden"):
        (newest / extra).write_bytes(b"")
        check_passed_over(damaged, newest / extra, caplog)
        (newest / extra).unlink()
    for beside in ("segments/replay_000000000099_000000000100.safetensors", "notes.txt", ".step_000000025.1"):
        (damaged / "checkpoints" / beside).write_bytes(b"")
        assert checkpoint.load_newest(damaged / "checkpoints").step == 24
    (damaged / "checkpoints" / "step_000000099").mkdir()
    caplog.clear()
    assert checkpoint.load_newest(damaged / "checkpoints").step == 24
    assert "step_000000099/manifest.json cannot be read" in caplog.text


def test_rows_that_both_checkpoints_need_are_missed_in_both(damaged: Path) -> None:
    newest, before = checkpoint.folders(damaged / "checkpoints")
    shared = checkpoint.load(before).segments["replay"][-1][1]
    shared.write_bytes(b"")
    for folder in (newest, before):
        with pytest.raises(DamagedCheckpoint, match=shared.name):
            checkpoint.load(folder)
    assert checkpoint.load_newest(damaged / "checkpoints") is None


# Through the script

FORKING = """
import json, os, runpy, sys
import torch
import lab.launch, matplotlib.figure, rl.dqn, torch._dynamo  # once for all
torch.set_num_threads(1)
codes = []
for number, words in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        output = os.open(f"{number}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("which", [slice(0, 8, 2), pytest.param(slice(1, 8, 2), marks=pytest.mark.slow)], ids=["four", "the others"])
def test_the_script_goes_on_from_the_checkpoint_before_and_ends_as_if_nothing_had_been(agent: Path, which: slice, tmp_path: Path) -> None:
    newest, rows = Path("checkpoints/step_000000024"), files_of_the_newest(agent)[-1].relative_to(agent)
    cases: list[tuple[Callable[[Path], object], Path]] = [
        (flip, newest / "manifest.json"),
        (flip, newest / "games.json"),
        (flip, rows),
        (flip, newest / "model.safetensors"),
        (KINDS["missing"], newest / "model.safetensors"),
        (KINDS["empty"], newest / "model.safetensors"),
        (lambda path: path.write_bytes(b""), newest / "extra.json"),
        (KINDS["cut short"], newest / "model.safetensors"),
    ]
    cases = cases[which]
    for number, (damage, place) in enumerate(cases):
        shutil.copytree(agent, tmp_path / f"run{number}")
        damage(tmp_path / f"run{number}" / place)
    script = str(ROOT / "scripts/train_dqn.py")
    words = [sys.executable, "-c", FORKING, json.dumps([[script, "--resume", f"run{number}"] for number in range(len(cases))])]
    assert json.loads(finish(words, tmp_path).splitlines()[-1]) == [0] * len(cases)
    for number, (_, place) in enumerate(cases):
        output = "".join((tmp_path / f"{number}.txt").read_text().split())  # the terminal breaks lines
        assert f"damagedcheckpointpassedover:run{number}/{place}" in output
        assert f"resumingrun{number}atstep20of24" in output
        assert "Traceback" not in output
        assert fingerprint(tmp_path / f"run{number}") == fingerprint(agent)


def test_the_script_says_in_a_sentence_that_no_checkpoint_is_whole_and_touches_nothing(agent: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(agent, tmp_path / "run"))
    for folder in checkpoint.folders(run / "checkpoints"):
        flip(folder / "optimizer.safetensors")
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in ("log.txt", "owner.json")}
    output = finish([sys.executable, str(ROOT / "scripts/train_dqn.py"), "--resume", "run"], tmp_path, expect=2)
    assert "error: cannot resume: no checkpoint of run is whole" in output
    assert "optimizer.safetensors is not what was saved" in output
    assert "Traceback" not in output
    after = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in ("log.txt", "owner.json")}
    assert after == before
