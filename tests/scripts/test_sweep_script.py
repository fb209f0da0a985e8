"""scripts/sweep.py as a user calls it: real training scripts, real kills; and the sweeps in configs/."""

import csv
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

from lab import runs
from lab.config import ConfigError, UserError
from lab.launch import read_order
from lab.runs import Run
from lab.sweep import Study, read
from tests.lab.test_sweep import alive_below, wait
from tests.scripts.test_scripts import ROOT, call

PRESETS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
TINY = {
    "name": "tiny",
    "program": "scripts/train_dqn.py",
    "command": ["${env}", "${interpreter}", "${program}", "configs/rl/dqn_catch.yaml", "${args}"],
    "method": "random",
    "metric": {"name": "eval/return", "goal": "maximize"},
    "parameters": {
        "trainer.steps": {"value": 12},
        "trainer.preview_every": {"value": 4},
        "trainer.save_every": {"value": 4},
        "dqn.learning_starts": {"value": 100},
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 0.0001, "max": 0.01},
    },
    "run_cap": 2,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("sweep_script", ROOT / "scripts/sweep.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_script"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sweep_script"]


def write(**changes: Any) -> str:
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    return "tiny.yaml"


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts/sweep.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(name: str = "tiny") -> list[dict[str, str]]:
    with Path(f"runs/{name}/results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_leaves_runs_a_table_and_pictures(place: Path) -> None:
    printed = call("sweep.py", write(), "--workers", "2")
    rows = results()
    assert [row["state"] for row in rows] == ["done", "done"]
    assert sorted(row["trial"] for row in rows) == ["0", "1"]
    assert float(rows[0]["eval/return"]) >= float(rows[1]["eval/return"])
    assert f"best: eval/return {float(rows[0]['eval/return']):.6g}, {rows[0]['run']}" in printed
    assert {str(run.folder) for run in runs.listing()} == {row["run"] for row in rows}
    for row in rows:
        settings = read_order(importlib.import_module("rl.dqn").EXPERIMENT, [f"{row['run']}/config.yaml"]).resolved.settings
        assert settings.optimizer.lr == float(row["optimizer.lr"])
        assert settings.name == "tiny"
        assert Run(Path(row["run"])).last_values()["eval/return"] == float(row["eval/return"])
    drawn = sorted(Path("runs/tiny").glob("*.png"))
    if float(rows[0]["eval/return"]) != float(rows[1]["eval/return"]):
        assert [path.stem for path in drawn] == ["history", "importances", "parallel_coordinates"]
        assert all(Image.open(path).width > 500 for path in drawn)
    again = call("sweep.py", "tiny.yaml", "--show")
    assert again.splitlines()[-1] == "sweep: runs/tiny"
    assert "trial 0:" not in call("sweep.py", "tiny.yaml")  # the same command has nothing left to do


def test_mistakes_are_told_before_anything_is_made(place: Path) -> None:
    wrong = TINY["parameters"] | {"dqn.hiden": {"value": 3}, "optimizer.lr": {"values": [0.1, -1]}}  # type: ignore[operator]
    printed = call("sweep.py", write(parameters=wrong), expect=2)
    assert "error: tiny.yaml: parameters: unknown key 'dqn.hiden'; did you mean 'dqn.hidden'?" in printed
    assert "tiny.yaml: parameters: 'optimizer.lr': expected a float > 0, found '-1'" in printed
    assert "how many trials? Give --trials, or run_cap in the file" in call("sweep.py", write(run_cap=None), expect=2)
    assert "program: expected one of scripts/train_" in call("sweep.py", write(program="train.py"), expect=2)
    assert "name: expected letters" in call("sweep.py", write(), "--name", "../up", expect=2)
    assert "holds no sweep yet" in call("sweep.py", write(), "--show", expect=2)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_ctrl_c_stops_the_trials_and_the_same_command_goes_on(place: Path) -> None:
    process = start(write(parameters=TINY["parameters"] | {"trainer.steps": {"value": 4000}}, run_cap=1))  # type: ignore[operator]
    wait(lambda: any(len(run.rows()) > 1 for run in runs.listing()))
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "the same command goes on with it" in printed
    assert not alive_below(Path("runs"))
    [run] = runs.listing()
    assert list(run.checkpoints.glob("step_*"))
    [row] = results()
    assert (row["state"], row["run"]) == ("waiting", str(run.folder))


@pytest.mark.slow
def test_real_trials_survive_a_kill_of_everything(place: Path) -> None:
    write(parameters=TINY["parameters"] | {"trainer.steps": {"value": 60}}, run_cap=4)  # type: ignore[operator]
    process = start("tiny.yaml", "--workers", "2")
    wait(lambda: [run for run in runs.listing() if run.last_values().get("step") == 60], 120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait(lambda: not alive_below(Path("runs")), 10)
    study = Study(read(Path("tiny.yaml")), Path("runs/tiny"))
    before = {trial.number: trial.datetime_complete for trial in study.trials() if trial.state.is_finished()}
    study.close()
    assert start("tiny.yaml", "--workers", "2").wait(180) == 0
    after = Study(read(Path("tiny.yaml")), Path("runs/tiny")).trials()
    assert [trial.state.name for trial in after] == ["COMPLETE"] * 4
    assert before.items() <= {trial.number: trial.datetime_complete for trial in after}.items()
    assert len(runs.listing()) == 4
    for run in runs.listing():
        steps = [row["step"] for row in run.rows()]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_taken_by_their_program_and_by_wandb_agent(preset: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.launch.sweeps import utils

    monkeypatch.chdir(ROOT)
    sweep = read(preset)
    script.check(sweep)
    values = {parameter.key: parameter.ends[-1] for parameter in sweep.parameters}
    theirs = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})["args"]
    assert set(theirs) <= set(sweep.words(values))
    assert sweep.words(values)[2] == sweep.program


def test_a_program_without_a_known_setting_is_refused(place: Path, script: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"command: \$\{args_json\} is not known here"):
        script.check(read(Path(write(command=["${program}", "${args_json}"]))))
    with pytest.raises(UserError, match=r"found scripts/watch\.py"):
        script.check(read(Path(write(program="scripts/watch.py"))))
