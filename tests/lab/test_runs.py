"""Run folders: made once, owned by one process, found by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.config import UserError
from lab.runs import RUNS, Run, create, find, listing, note_start, owned, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scripts/train_vae.py", "--name", "two words"])
    return tmp_path


def made(folder: str, experiment: str = "vae") -> Run:
    return create("unused", RUNS / folder, f"experiment: {experiment}\nname: x\n")


# Making


def test_a_new_run_has_a_folder_of_its_own_that_sorts_by_time_and_holds_its_config():
    runs = [create("vae", None, "experiment: vae\n") for _ in range(3)]
    assert len({run.folder for run in runs}) == 3
    for run in runs:
        assert run.folder.parent == Path("runs/vae")
        stamp, _, end = run.folder.name.rpartition("-")
        assert len(stamp) == len("20261121-080000")
        assert len(end) == 6
        assert run.config.read_text() == "experiment: vae\n"
        assert run.media.is_dir()
        assert run.experiment == "vae"


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(tmp_path):
    run = create("vae", tmp_path / "mine", "experiment: vae\n")
    assert run.folder == tmp_path / "mine"
    with pytest.raises(UserError, match=rf"already holds a run.*--resume {run.folder}"):
        create("vae", tmp_path / "mine", "experiment: other\n")
    assert run.config.read_text() == "experiment: vae\n"


def test_a_place_where_nothing_can_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"cannot make a run folder here \(.+\); give another place by --run-dir"):
            create("vae", place, "experiment: vae\n")


def test_a_config_is_replaced_as_a_whole():
    run = made("vae/a")
    with run.config.open() as before:  # a reader that came first goes on with the old text
        write_config(run, "experiment: vae\nname: é\n")
        assert before.read() == "experiment: vae\nname: x\n"
    assert run.config.read_text(encoding="utf-8") == "experiment: vae\nname: é\n"
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.yaml", "media"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00garbage", b"# nothing\n"])
def test_a_config_of_something_else_makes_no_trouble(tmp_path, content):
    made("vae/good")
    strange = RUNS / "vae" / "strange"
    strange.mkdir()
    (strange / "config.yaml").write_bytes(content)
    assert [run.folder.name for run in listing(experiments=["vae"])] == ["good"]
    assert Run(tmp_path / "nowhere").experiment == ""


# Rows


def test_rows_are_read_back_and_a_last_line_that_was_cut_short_is_left_out():
    run = made("vae/a")
    assert run.rows() == []
    lines = b'{"step": 1, "a": 0.5}\n{"step": 2, "a": NaN}\n{"step": 3, "text": "line\\u2028break\\n"}\n'
    for cut in range(len(lines) + 1):
        run.metrics.write_bytes(lines[:cut])
        assert [row["step"] for row in run.rows()] == [1, 2, 3][: lines[:cut].count(b"\n")]
    assert run.rows()[2]["text"] == "line\u2028break\n"


def test_the_last_values_are_the_newest_of_each_metric():
    run = made("vae/a")
    run.metrics.write_text('{"step": 1, "a": 1, "b": 2}\n{"step": 2, "a": 3}\n{"step": 9')
    assert run.last_values() == {"step": 2, "a": 3, "b": 2}


# Starts


def test_every_start_is_added_and_the_id_stays(monkeypatch):
    run = made("vae/a")
    assert run.identity == ""
    note_start(run, {"threads": 2})
    first = run.identity
    monkeypatch.setattr(sys, "argv", ["scripts/train_vae.py", "--resume", "latest"])
    note_start(run, {"threads": 4})
    assert run.identity == first
    assert len(first) == 16
    noted = json.loads(run.environment.read_text())
    assert [start["threads"] for start in noted["starts"]] == [2, 4]
    assert all(start["python"] == ".".join(map(str, sys.version_info[:3])) for start in noted["starts"])
    commands = (run.folder / "command.txt").read_text().splitlines()
    assert [line.partition(" ")[2] for line in commands] == [
        "scripts/train_vae.py --name 'two words'",
        "scripts/train_vae.py --resume latest",
    ]
    assert note_start(made("vae/b"), {}) is None
    assert Run(RUNS / "vae" / "b").identity != first


def test_a_command_that_a_kill_cut_short_is_not_joined_by_the_next_one():
    run = made("vae/a")
    commands = run.folder / "command.txt"
    commands.write_bytes("python train.py --name é\npython train.py --name é".encode()[:-1])
    note_start(run, {})
    first, second = commands.read_text(encoding="utf-8").splitlines()
    assert first == "python train.py --name é"
    assert second.endswith("scripts/train_vae.py --name 'two words'")


def test_no_environment_variable_gets_into_a_run(monkeypatch):
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SOME_TOKEN", "LAB_DATA"):
        monkeypatch.setenv(name, "canary-4711")
    run = create("vae", None, "experiment: vae\n")
    with owned(run):
        note_start(run, {})
        for path in run.folder.rglob("*"):
            assert path.is_dir() or b"canary" not in path.read_bytes()


# Owning

HOLD = """
import sys
from pathlib import Path
from lab.runs import Run, owned
with owned(Run(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_has_one_owner_who_is_named_and_a_killed_owner_lets_go():
    run = made("vae/a")
    command = [sys.executable, "-c", HOLD, str(run.folder.resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"is owned by pid {other.pid} on host .+ since 20"), owned(run):
            pytest.fail("two owners at once")
        assert (run.folder / "owner.json").exists(), "a refused process must not remove the owner's note"
        other.kill()
        other.wait()
    with owned(run):
        assert json.loads((run.folder / "owner.json").read_text())["pid"] == os.getpid()
    assert not (run.folder / "owner.json").exists()


def test_an_owner_whose_work_fails_lets_go():
    run = made("vae/a")
    with pytest.raises(ZeroDivisionError), owned(run):
        raise ZeroDivisionError
    with owned(run):
        pass


# Finding


def test_runs_are_listed_newest_first_by_kind():
    made("vae/20260101-000000-aaaaaa")
    made("dqn/20260102-000000-000000", "dqn")
    made("other/20251231-235959-ffffff")
    (RUNS / "vae" / "20270101-000000-bbbbbb").mkdir()  # holds no run
    assert [run.folder.name[:8] for run in listing()] == ["20260102", "20260101", "20251231"]
    assert [run.folder.name[:8] for run in listing(experiments=["vae"])] == ["20260101", "20251231"]
    assert listing(Path("nowhere")) == []


def test_latest_is_the_newest_run_of_the_right_kind():
    made("vae/20260101-000000-aaaaaa")
    made("dqn/20260102-000000-000000", "dqn")
    assert find("latest").run.folder.name == "20260102-000000-000000"
    assert find("latest", ["vae"]).run.folder.name == "20260101-000000-aaaaaa"


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_run_is_found_by_its_folder_or_by_a_folder_of_a_checkpoint(tmp_path, ending):
    run = made("vae/a")
    step = run.checkpoints / "step_000000010"
    step.mkdir(parents=True)
    for start in ("", f"{tmp_path}/"):
        found = find(f"{start}{run.folder}{ending}", ["vae"])
        assert (found.run.folder.resolve(), found.checkpoint) == (run.folder.resolve(), None)
        found = find(f"{start}{step}{ending}", ["vae"])
        assert (found.run.folder.resolve(), found.checkpoint.resolve()) == (run.folder.resolve(), step.resolve())


def test_a_run_of_another_kind_is_refused_by_whatever_name():
    run = made("dqn/a", "dqn")
    step = run.checkpoints / "step_000000010"
    step.mkdir(parents=True)
    for text in (str(run.folder), str(step)):
        with pytest.raises(UserError, match="a run of 'dqn'; expected autoencoder or vae"):
            find(text, ["vae", "autoencoder"])


def test_a_run_that_is_not_there_is_an_error_that_says_which_there_are():
    for text in ("latest", "nowhere", "runs/vae"):
        with pytest.raises(UserError, match=rf"{text}: no vae run here; there is none below runs/ yet"):
            find(text, ["vae"])
    runs = [made(f"vae/2026010{day}-000000-aaaaaa") for day in range(1, 6)]
    with pytest.raises(UserError) as caught:
        find("nowhere")
    assert str(caught.value) == "nowhere: no run here; the newest runs are " + ", ".join(str(run.folder) for run in runs[:1:-1])


def test_a_checkpoint_that_is_not_there_is_an_error():
    run = made("vae/a")
    with pytest.raises(UserError, match="no vae run here"):
        find(str(run.checkpoints / "step_000000099"), ["vae"])
