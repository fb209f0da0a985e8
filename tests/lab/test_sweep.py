"""Sweeps by a program so small that it starts in no time: real processes, real kills, a real database."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import sweep as sweeps
from lab.config import ConfigError, UserError
from lab.runs import Run
from lab.sweep import Outcome, Study, Workers, read

PROGRAM = """
# Keeps the contract of a training script: --run-dir and --resume, config.yaml, metrics.jsonl, SIGTERM saves and ends with 75.
import json, os, signal, sys, time
from pathlib import Path

options = {}
for name, value in zip(sys.argv[1:], sys.argv[2:] + [""]):
    key, equals, text = name.removeprefix("--").partition("=")
    options[key] = text if equals else value
folder = Path(options.get("run-dir") or options["resume"])
(folder / "starts").open("a").write(".")
if "resume" in options:
    options = json.loads((folder / "config.yaml").read_text())
else:
    (folder / "config.yaml").write_text(json.dumps(options))
if options.get("mode") == "broken":
    sys.exit("there is no such data set")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
log = folder / "metrics.jsonl"
done = len(log.read_text().splitlines()) if log.exists() else 0
for step in range(done + 1, int(options.get("steps", 5)) + 1):
    with log.open("ab", buffering=0) as file:
        name = "other" if options.get("mode") == "silent" else "eval/score"
        file.write(json.dumps({"step": step, name: step * float(options["x"])}).encode() + b"\\n")
    if options.get("mode") == "suicide" and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    while options.get("mode") == "endless" and float(options["x"]) < 1 and not asked:
        time.sleep(0.02)
    time.sleep(float(options.get("pace", 0)))
    if asked:
        sys.exit(75)
"""

DRIVER = """
import sys
from pathlib import Path
from lab.sweep import Study, Workers, read

study = Study(read(Path("sweep.yaml")), Path("runs/small"))
study.plan(int(sys.argv[1]))
threads = Workers(study, int(sys.argv[1]), [], 1, lambda outcome: print(outcome.trial.number, flush=True)).start(int(sys.argv[2]))
for thread in threads:
    thread.join()
"""

PLAIN: dict[str, Any] = {
    "program": "program.py",
    "method": "random",
    "metric": {"name": "eval/score", "goal": "maximize"},
    "parameters": {"x": {"min": 1.0, "max": 2.0}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the program, in which the test works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "driver.py").write_text(DRIVER)
    return tmp_path


def write(**changes: Any) -> Path:
    path = Path("sweep.yaml")
    path.write_text(yaml.safe_dump(PLAIN | changes, sort_keys=False))
    return path


def constants(**values: Any) -> dict[str, Any]:
    return PLAIN["parameters"] | {key: {"value": value} for key, value in values.items()}


def opened(**arguments: Any) -> Study:
    return Study(read(Path("sweep.yaml")), Path("runs/small"), **arguments)


def work(count: int, workers: int = 1) -> tuple[Study, list[Outcome], Workers]:
    """Come to `count` trials in this process."""
    study, outcomes = opened(), []
    study.plan(count)
    crew = Workers(study, count, [], 1, outcomes.append)
    for thread in crew.start(workers):
        thread.join()
    assert not crew.errors
    study.close()
    return study, outcomes, crew


def drive(count: int, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "driver.py", str(count), str(workers)], stdout=subprocess.PIPE, text=True)


def wait(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Look until something is so."""
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, "this never came to be"
        threading.Event().wait(0.01)
    return found


def folders() -> list[Path]:
    return sorted(path.parent for path in Path("runs/small").glob("*/config.yaml"))


def alive() -> list[int]:
    """The processes of trials that still run."""
    return alive_below(Path("runs/small"))


def alive_below(folder: Path) -> list[int]:
    """The processes that train runs below a folder, by their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = process.joinpath("cmdline").read_text().split("\0")
            here = process.joinpath("cwd").resolve() == Path.cwd()
            if here and any(word.removeprefix("--run-dir=").startswith(f"{folder}/") for word in words):
                found.append(int(process.name))
    return found


def assert_every_step_was_computed_once(count: int, steps: int) -> None:
    assert len(folders()) == count
    for folder in folders():
        assert [row["step"] for row in Run(folder).rows()] == list(range(1, steps + 1)), folder


# Running


def test_a_random_sweep_tries_the_same_settings_whoever_draws_them(place: Path) -> None:
    write()
    alone = [trial.params["x"] for trial in work(4)[0].trials()]
    os.rename("runs", "before")
    together, outcomes, _ = work(4, workers=3)
    assert [trial.params["x"] for trial in together.trials()] == alone
    assert len(set(alone)) == 4
    assert [outcome.trial.state.name for outcome in outcomes] == ["COMPLETE"] * 4
    for trial in together.trials():
        assert trial.value == pytest.approx(5 * trial.params["x"])  # the last value of the metric
        assert trial.intermediate_values == {step: pytest.approx(step * trial.params["x"]) for step in range(1, 6)}
        assert Run(Path(trial.user_attrs["run"])).config.exists()


def test_a_grid_is_covered_once(place: Path) -> None:
    write(method="grid", parameters={"x": {"values": [1, 2, 3]}, "steps": {"min": 1, "max": 4}, "note": {"value": "a b"}})
    study, outcomes, _ = work(12, workers=4)
    points = sorted((trial.params["x"], trial.params["steps"]) for trial in study.trials())
    assert points == [(x, steps) for x in (1, 2, 3) for steps in (1, 2, 3, 4)]
    assert all(outcome.trial.value == outcome.trial.params["x"] * outcome.trial.params["steps"] for outcome in outcomes)
    assert {json.loads((folder / "config.yaml").read_text())["note"] for folder in folders()} == {"a b"}


def test_two_processes_share_a_study_and_come_to_exactly_as_many_trials(place: Path) -> None:
    write(parameters=constants(pace=0.02))
    processes = [drive(14, 2) for _ in range(2)]
    told = [int(number) for process in processes for number in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(told) == list(range(14))
    assert {trial.state.name for trial in opened().trials()} == {"COMPLETE"}
    assert_every_step_was_computed_once(14, 5)


def test_a_sweep_killed_at_random_moments_loses_no_trial_and_makes_none_twice(place: Path) -> None:
    write(parameters=constants(pace=0.03))
    known: dict[int, Any] = {}
    for moment in random.Random(6).sample(range(4, 30), 2):
        process = drive(12, 3)
        before = sum(len(Run(folder).rows()) for folder in folders())
        wait(lambda: sum(len(Run(folder).rows()) for folder in folders()) >= min(before + moment, 58))
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait(lambda: not alive(), 5)  # the trials end with the process that started them
        study = opened()
        now = {trial.number: (trial.value, trial.datetime_complete) for trial in study.trials() if trial.state.is_finished()}
        study.close()
        assert known.items() <= now.items()
        known = now
    process = drive(12, 3)
    assert sorted(map(int, process.communicate(timeout=60)[0].split())) == sorted(set(range(12)) - known.keys())
    after = {trial.number: trial for trial in opened().trials()}
    assert len(after) == 12
    assert {trial.state.name for trial in after.values()} == {"COMPLETE"}
    assert known.items() <= {number: (trial.value, trial.datetime_complete) for number, trial in after.items()}.items()
    assert_every_step_was_computed_once(12, 5)


def test_a_trial_whose_process_is_killed_goes_on(place: Path) -> None:
    write(parameters=constants(mode="suicide"))
    _, [outcome], _ = work(1)
    assert outcome.trial.state.name == "COMPLETE"
    assert_every_step_was_computed_once(1, 5)
    assert (folders()[0] / "starts").read_text() == ".."


def test_a_worse_trial_is_stopped(place: Path) -> None:
    grid = {"x": {"values": [3, 0]}, "mode": {"value": "endless"}}
    write(method="grid", parameters=grid, early_terminate={"type": "hyperband", "min_iter": 1, "eta": 3})
    study, outcomes, _ = work(2)
    assert [outcome.trial.state.name for outcome in outcomes] == ["COMPLETE", "PRUNED"]  # the second would never have ended
    assert [trial.value for trial in study.trials()] == [15, 0]
    assert not alive()


def test_a_sweep_that_is_stopped_goes_on_where_it_was(place: Path) -> None:
    write(parameters=constants(pace=0.05, steps=40))
    study = opened()
    study.plan(2)
    outcomes: list[Outcome] = []
    crew = Workers(study, 2, [], 1, outcomes.append)
    threads = crew.start(2)
    wait(lambda: len(folders()) == 2 and all(len(Run(folder).rows()) > 2 for folder in folders()))
    crew.stopping.set()
    for thread in threads:
        thread.join()
    assert not outcomes
    assert not alive()
    assert [trial.state.name for trial in study.trials()] == ["WAITING"] * 2
    settings = [trial.params for trial in study.trials()]
    study.close()
    assert max(len(Run(folder).rows()) for folder in folders()) < 40
    study, outcomes, _ = work(2, workers=2)
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE"] * 2
    assert [trial.params for trial in study.trials()] == settings
    assert_every_step_was_computed_once(2, 40)


def test_a_run_that_somebody_stops_counts_as_pruned(place: Path) -> None:
    write(parameters={"x": {"value": 0}, "mode": {"value": "endless"}})
    result: list[tuple[Study, list[Outcome], Workers]] = []
    thread = threading.Thread(target=lambda: result.append(work(1)))
    thread.start()
    pid = wait(lambda: alive() and Run(folders()[0]).rows() and alive()[0] if folders() else None)
    os.kill(pid, signal.SIGTERM)
    thread.join()
    [[_, [outcome], _]] = result
    assert (outcome.trial.state.name, outcome.message) == ("PRUNED", "stopped by hand")


# Failing


def test_a_failed_trial_tells_why_and_the_sweep_goes_on(place: Path) -> None:
    modes = ["", "broken", "silent", ""]
    write(method="grid", parameters={"x": {"value": 1}, "mode": {"values": modes}})
    study, outcomes, crew = work(4)
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert outcomes[1].message == "exit code 1\n    there is no such data set"
    assert outcomes[2].message == "it records no eval/score, only other, step"
    assert not crew.broken


def test_a_broken_program_is_given_up_soon(place: Path) -> None:
    write(parameters=constants(mode="broken"))
    study, outcomes, crew = work(20)
    assert len(outcomes) == sweeps.BROKEN
    assert "no such data set" in crew.broken
    assert [trial.state.name for trial in study.trials()] == ["FAIL"] * 3 + ["WAITING"] * 17


def test_infinite_results_are_failures(place: Path) -> None:
    write(parameters={"x": {"value": float("inf")}})
    _, [outcome], _ = work(1)
    assert outcome.message == "the last eval/score is inf"


# The study


def test_more_trials_are_added_to_those_there_are(place: Path) -> None:
    write(method="bayes", run_cap=2)
    before, *_ = work(2)
    first = {trial.number: trial.datetime_complete for trial in before.trials()}
    after, outcomes, _ = work(3)
    assert [outcome.trial.number for outcome in outcomes] == [2]
    assert first.items() <= {trial.number: trial.datetime_complete for trial in after.trials()}.items()


def test_a_study_of_other_parameters_is_refused(place: Path) -> None:
    write()
    opened().close()
    write(run_cap=7)
    opened().close()  # how many there are may change
    write(parameters={"x": {"min": 1.0, "max": 3.0}})
    with pytest.raises(UserError, match=r"runs/small holds a sweep of other parameters than sweep\.yaml"):
        opened()


def test_nothing_is_made_where_nothing_is_to_be_shown(place: Path) -> None:
    write()
    with pytest.raises(UserError, match="holds no sweep yet"):
        opened(create=False)
    assert not Path("runs").exists()


def test_a_url_that_names_no_database_is_refused(place: Path) -> None:
    write()
    with pytest.raises(UserError, match="cannot be opened"):
        opened(url="nosuch://here")


def test_another_database_can_be_named(place: Path) -> None:
    write()
    study = opened(url="sqlite:///elsewhere.db")
    study.plan(3)
    study.close()
    assert len(opened(url="sqlite:///elsewhere.db", create=False).trials()) == 3
    assert not Path("runs/small/study.db").exists()


# The file


def test_the_command_is_the_one_that_wandb_agent_makes(place: Path) -> None:
    from wandb.sdk.launch.sweeps import utils

    values = {"x": 1e-5, "flag": True, "name": "a b", "none": None, "list": "[0.5, 0.9]", "n": 3}
    command = ["${env}", "${interpreter}", "${program}", "file.yaml", "${args}", "--more=1"]
    sweep = read(write(command=command))
    theirs = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})["args"]
    assert sweep.words(values) == ["/usr/bin/env", sys.executable, "program.py", "file.yaml", *theirs, "--more=1"]
    assert sweep.arguments(values) == ["file.yaml", *theirs, "--more=1"]
    assert list(read(write()).command) == utils.DEFAULT_SWEEP_COMMAND


class Chosen:
    """Takes the lower end of everything and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[Any, ...]] = {}

    def suggest_int(self, key: str, low: int, high: int, *, step: int, log: bool) -> int:
        self.asked[key] = ("int", low, high, step, log)
        return low

    def suggest_float(self, key: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        self.asked[key] = ("float", low, high, step, log)
        return low

    def suggest_categorical(self, key: str, choices: tuple[Any, ...]) -> Any:
        self.asked[key] = choices
        return choices[0]


def test_every_distribution_means_what_it_means_to_wandb(place: Path) -> None:
    parameters = {
        "uniform": {"min": 0, "max": 1.5},
        "int": {"min": 2, "max": 5},
        "named": {"distribution": "uniform", "min": 0, "max": 1},
        "steps": {"distribution": "q_uniform", "min": 32, "max": 128, "q": 32},
        "halves": {"min": 0.5, "max": 2, "q": 0.5},
        "log": {"distribution": "log_uniform_values", "min": 0.0001, "max": 0.1},
        "log_int": {"distribution": "q_log_uniform_values", "min": 8, "max": 512, "q": 1},
        "choice": {"values": [None, True, 0.5, "word", [1, 2]]},
        "constant": {"value": 7},
    }
    trial, sweep = Chosen(), read(write(parameters=parameters))
    assert [parameter.suggest(trial) for parameter in sweep.parameters] == [0, 2, 0, 32, 0.5, 0.0001, 8, None, 7]  # type: ignore[arg-type]
    assert trial.asked == {
        "uniform": ("float", 0, 1.5, None, False),
        "int": ("int", 2, 5, 1, False),
        "named": ("float", 0, 1, None, False),
        "steps": ("int", 32, 128, 32, False),
        "halves": ("float", 0.5, 2, 0.5, False),
        "log": ("float", 0.0001, 0.1, None, True),
        "log_int": ("int", 8, 512, 1, True),
        "choice": (None, True, 0.5, "word", "[1, 2]"),
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"metod": "grid"}, "unknown key 'metod'; did you mean 'method'?"),
        ({"method": "hyperopt"}, "method: expected one of grid, random, bayes, found 'hyperopt'"),
        ({"method": "grid"}, "'x': a grid needs values, or min and max that are whole numbers"),
        ({"metric": {"goal": "maximize"}}, "metric.name: name the metric to judge by"),
        ({"metric": {"name": "a", "goal": "up"}}, "metric.goal: expected minimize or maximize, found 'up'"),
        ({"metric": "eval/score"}, "metric: expected a section of 'key: value' lines, found 'eval/score'"),
        ({"run_cap": True}, "run_cap: expected a number of trials, found True"),
        ({"program": None}, "program: name the script to run"),
        ({"parameters": {}}, "parameters: name at least one setting"),
        ({"command": ["${program}"]}, "command: a list of words with ${args} in it is needed"),
        ({"command": ["${program}", "${args}", "${args_json}"]}, "command: ${args_json} is not known here"),
        ({"parameters": {"x": 3}}, "'x': expected value, values, or min and max below it"),
        ({"parameters": {"model": {"parameters": {"x": {"value": 1}}}}}, "a setting inside a section is written section.model"),
        ({"parameters": {"x": {"min": "1e-4", "max": 1}}}, "min: 1e-4 is a text to YAML and to W&B; write it with a point"),
        ({"parameters": {"x": {"min": 2, "max": 1}}}, "'x': expected value, values, or numbers min < max"),
        ({"parameters": {"x": {"values": []}}}, "'x': expected one value, or a list of values"),
        ({"parameters": {"x": {"distribution": "normal", "min": 0, "max": 1}}}, "expected a distribution out of constant"),
        ({"parameters": {"x": {"distribution": "normal", "mu": 0}}}, "unknown key 'x.mu'"),
        ({"parameters": {"x": {"distribution": "int_uniform", "min": 0, "max": 1.5}}}, "int_uniform needs whole numbers"),
        ({"parameters": {"x": {"distribution": "uniform", "min": 0, "max": 1, "q": 0.1}}}, "q goes with q_uniform"),
        ({"parameters": {"x": {"distribution": "q_uniform", "min": 0, "max": 1, "q": -1}}}, "needs a step q > 0"),
        ({"parameters": {"x": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "a logarithmic scale begins above 0"),
        ({"parameters": {"x": {"distribution": "q_log_uniform_values", "min": 1, "max": 9, "q": 2}}}, "and q is 1"),
        ({"early_terminate": {"type": "median"}}, "early_terminate.type: expected hyperband, found 'median'"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate: give min_iter, or max_iter with s"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "early_terminate.min_iter: expected a whole number >= 1"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "strict": True}}, "unknown key 'early_terminate.strict'"),
    ],
)
def test_mistakes_in_the_file_are_told(place: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(write(**changes))
    assert problem in str(caught.value)
    assert all(line.startswith("sweep.yaml: ") for line in str(caught.value).splitlines())


def test_all_mistakes_are_told_at_once_and_a_file_that_is_none_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(write(method="no", run_cap=0, metric={}))
    assert len(caught.value.problems) == 3
    for content, problem in (("- a", "expected 'key: value' lines"), ("a: [", "not a YAML file"), ("\xff", "expected 'key: value' lines")):
        Path("bad.yaml").write_text(content)
        with pytest.raises(UserError, match=problem):
            read(Path("bad.yaml"))
    with pytest.raises(UserError, match="cannot read this file"):
        read(Path("missing.yaml"))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"min_iter": 2}, (2, 3)),
        ({"min_iter": 2, "eta": 4}, (2, 4)),
        ({"max_iter": 27, "s": 2}, (3, 3)),
        ({"max_iter": 4, "s": 3, "eta": 2}, (1, 2)),
    ],
)
def test_hyperband_as_wandb_spells_it(place: Path, written: dict[str, int], expected: tuple[int, int]) -> None:
    assert read(write(early_terminate={"type": "hyperband", **written})).hyperband == expected
