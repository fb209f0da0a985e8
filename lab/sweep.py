"""Sweeps: runs of one program with different settings, as a file in W&B's own schema asks for them, chosen by Optuna.

A study is a database with one entry for every trial that is to be made, so however many threads, processes and machines work on it
they make exactly that many. Every trial is an ordinary run, trained by the program in a process of its own; the study knows its
folder before it starts. What a trial found lies in the database when it ends; what was only begun when everything was killed goes on
from its checkpoint. Who works on a trial is known by a lock that the system lets go of when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from filelock import FileLock, Timeout

from lab import runs, seeding
from lab.config import ConfigError, Plain, UserError, yaml_text
from lab.runs import Run
from lab.trainer import DONE, STOPPED

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial, TrialState

KEYS = ("name", "description", "project", "entity", "program", "command", "method", "metric", "parameters", "early_terminate", "run_cap")
"""Of W&B's schema, what means something here; project and entity are for W&B alone."""
PARAMETER_KEYS = ("value", "values", "min", "max", "distribution", "q")
RANGES = ("uniform", "q_uniform", "int_uniform", "log_uniform_values", "q_log_uniform_values")
DISTRIBUTIONS = ("constant", "categorical", *RANGES)
MACROS = ("${env}", "${interpreter}", "${program}", "${args}")
METHODS = ("grid", "random", "bayes")

LARGEST_GRID = 100_000
"""Trials of a grid at most."""
POLL = 0.25
"""Seconds between looks at what a trial has recorded."""
ATTEMPTS = 3
"""Times that a process which something killed is started again before its trial counts as failed."""
BROKEN = 3
"""Trials that, if they all fail and none before or beside them succeeded, show that the rest would too."""

# Tell the kernel to end this process with the one that started it, then become the program that the words name.
TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


# The file


@dataclass(frozen=True)
class Parameter:
    """A setting that the trials differ in: one of `choices`, or a number from `low` to `high`."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False
    """Only whole numbers."""

    def suggest(self, trial: Trial) -> Any:
        """The value for a trial: as Optuna chooses, and the same again for a trial that goes on."""
        if len(self.choices) == 1:
            return self.choices[0]
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or the least and the greatest number: if these are fit, all are."""
        return self.choices or ((int(self.low), int(self.high)) if self.whole else (self.low, self.high))

    @property
    def count(self) -> int:
        """How many values there are; 0 where there is no end of them."""
        return len(self.choices) or ((int(self.high) - int(self.low)) // int(self.step or 1) + 1 if self.whole else 0)

    @property
    def all(self) -> tuple[Any, ...] | None:
        """Every value, or None where there is no end of them."""
        return self.choices or (tuple(range(int(self.low), int(self.high) + 1, int(self.step or 1))) if self.whole else None)


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for."""

    path: Path
    name: str
    program: str
    command: tuple[str, ...]
    method: Literal["grid", "random", "bayes"]
    metric: str
    goal: Literal["minimize", "maximize"]
    parameters: tuple[Parameter, ...]
    hyperband: tuple[int, int] | None
    """Values of the metric before a trial is compared with the others for the first time, and how many times as many before the
    next; each time the best one in as many goes on."""
    run_cap: int | None

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """The command of a trial, as `wandb agent` makes it, but for the interpreter, which is this one."""
        words = {
            "${env}": ["/usr/bin/env"] if os.name == "posix" else [],
            "${interpreter}": [sys.executable],
            "${program}": [self.program],
            "${args}": [f"--{key}={value}" for key, value in values.items()],
        }
        return [word for part in self.command for word in words.get(part, [part])]

    def arguments(self, values: Mapping[str, Any]) -> list[str]:
        """Those words of the command that the program gets."""
        words = self.words(values)
        return words[words.index(self.program) + 1 :]

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of all values, the last parameter changing first."""
        columns = [parameter.all or () for parameter in self.parameters]
        return [dict(zip((parameter.key for parameter in self.parameters), row)) for row in itertools.product(*columns)]

    def fingerprint(self) -> str:
        """What must not change while a study goes on, as JSON."""
        kept = [self.program, self.command, self.method, self.metric, self.goal, [vars(p) for p in self.parameters], self.hyperband]
        return json.dumps(kept)


def read(path: Path) -> Sweep:
    """The sweep that a file describes, read by the same rules of YAML as W&B reads it.

    Raises:
        ConfigError: everything that W&B's schema or this reader of it does not allow.
    """
    try:
        written = _built(yaml_text(path))
    except OSError as error:
        at_hand = ", ".join(str(file) for file in sorted(Path("configs/sweeps").glob("*.yaml"))) or "none below configs/sweeps/"
        raise UserError(f"{path}: cannot read this file ({error.strerror}); the sweeps at hand are: {at_hand}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(written, dict):
        raise UserError(f"{path}: expected 'key: value' lines in W&B's sweep schema")
    problems: list[str] = _unknown(written, KEYS, "")
    sweep = _sweep(path, written, problems)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return sweep


def _built(text: str) -> Any:
    """What a YAML text means, made of texts, numbers, dates, lists and maps alone.

    Raises:
        yaml.YAMLError: it is no YAML, or asks for something else.
    """
    loader = Plain(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError:
        raise
    except Exception as error:  # what its constructors of numbers and dates say to a text that is none
        raise yaml.YAMLError(f"a value is not what its tag says, or nested too deeply ({type(error).__name__})") from None
    finally:
        loader.dispose()


def _sweep(path: Path, written: Mapping[str, Any], problems: list[str]) -> Sweep:
    metric, method = _section(written, "metric", problems), written.get("method")
    problems += _unknown(metric, ("name", "goal"), "metric.")
    goal, cap, program = metric.get("goal", "minimize"), written.get("run_cap"), written.get("program", "")
    parameters = [_parameter(str(key), value, problems) for key, value in _section(written, "parameters", problems).items()]
    checks = {
        f"method: expected one of {', '.join(METHODS)}, found {method!r}": method in METHODS,
        "metric.name: name the metric to judge by, such as eval/return": isinstance(metric.get("name"), str),
        f"metric.goal: expected minimize or maximize, found {goal!r}": goal in ("minimize", "maximize"),
        f"run_cap: expected a number of trials, found {cap!r}": cap is None or _is_count(cap),
        "program: name the script to run, such as scripts/train_dqn.py": isinstance(program, str) and bool(program),
        "parameters: name at least one setting": bool(parameters),
    }
    problems += [problem for problem, fine in checks.items() if not fine]
    if method == "grid":
        endless = [parameter.key for parameter in parameters if not parameter.count]
        problems += [f"parameters: '{key}': a grid needs values, or min and max that are whole numbers" for key in endless]
        if math.prod(parameter.count for parameter in parameters) > LARGEST_GRID:
            problems.append(f"parameters: a grid of more than {LARGEST_GRID:,} trials; give fewer values, or use method random")
    command, name = _command(written.get("command", list(MACROS)), problems), str(written.get("name", path.stem))
    hyperband = _hyperband(_section(written, "early_terminate", problems), problems) if "early_terminate" in written else None
    return Sweep(path, name, program, command, method or "random", metric.get("name", ""), goal, tuple(parameters), hyperband, cap)


def _section(written: Mapping[str, Any], key: str, problems: list[str]) -> Mapping[str, Any]:
    section = written.get(key, {})
    if isinstance(section, dict):
        return section
    problems.append(f"{key}: expected a section of 'key: value' lines, found {section!r}")
    return {}


def _unknown(section: Mapping[str, Any], known: Sequence[str], prefix: str) -> list[str]:
    found = [str(key) for key in section if key not in known]
    near = {key: difflib.get_close_matches(key, known, n=1) for key in found}
    hint = {key: f"did you mean '{near[key][0]}'?" if near[key] else f"known here: {', '.join(known)}" for key in found}
    return [f"unknown key '{prefix}{key}'; {hint[key]}" for key in found]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _command(written: Any, problems: list[str]) -> tuple[str, ...]:
    words = tuple(str(word) for word in written) if isinstance(written, list) else ()
    if unknown := [word for word in words if word.startswith("${") and word not in MACROS]:
        problems.append(f"command: {unknown[0]} is not known here, only {', '.join(MACROS)}")
    if missing := [macro for macro in ("${program}", "${args}") if macro not in words]:
        problems.append(f"command: a list of words with {' and '.join(missing)} in it is needed")
    return words


def _hyperband(written: Mapping[str, Any], problems: list[str]) -> tuple[int, int]:
    """W&B stops a run that is not among the best at the first rung or a later one: what the literature calls successive halving."""
    problems += _unknown(written, ("type", "min_iter", "max_iter", "s", "eta"), "early_terminate.")
    numbers = {key: written[key] for key in ("min_iter", "max_iter", "s", "eta") if key in written}
    if written.get("type") != "hyperband":
        problems.append(f"early_terminate.type: expected hyperband, found {written.get('type')!r}")
    if wrong := [key for key, value in numbers.items() if not _is_count(value)]:
        problems.append(f"early_terminate.{wrong[0]}: expected a whole number >= 1, found {numbers[wrong[0]]!r}")
        return 1, 3
    eta = numbers.get("eta", 3)
    if eta < 2 or numbers.get("s", 0) > 60 or not ({"min_iter"} <= numbers.keys() or {"max_iter", "s"} <= numbers.keys()):
        problems.append("early_terminate: give min_iter, or max_iter with s, in values of the metric; eta is at least 2, s at most 60")
        return 1, 3
    return numbers.get("min_iter") or max(1, numbers["max_iter"] // eta ** numbers["s"]), eta


def _parameter(key: str, written: Any, problems: list[str]) -> Parameter:
    """A parameter, or one that is fit for nothing where it adds to the problems."""
    place = f"parameters: '{key}'"
    if not isinstance(written, dict) or "parameters" in written:
        problems.append(f"{place}: expected value, values, or min and max below it; a setting inside a section is written section.{key}")
        return Parameter(key, (None,))
    if unknown := _unknown(written, PARAMETER_KEYS, f"{key}."):
        problems += [f"parameters: {problem}" for problem in unknown]
        return Parameter(key, (None,))
    if "value" in written or "values" in written:
        return _choices(key, written, problems)
    low, high, q = (_number(written.get(name)) for name in ("min", "max", "q"))
    if low is None or high is None or not low < high:
        words = [f"{name}: {written[name]}" for name in ("min", "max") if isinstance(written.get(name), str)]
        hint = f" ({words[0]} is a text to YAML and to W&B; write it with a point, such as 1.0e-4)" if words else ""
        problems.append(f"{place}: expected value, values, or numbers min < max{hint}")
        return Parameter(key, (None,))
    return _range(key, written, low, high, q, problems)


def _choices(key: str, written: Mapping[str, Any], problems: list[str]) -> Parameter:
    values = [written["value"]] if "value" in written else written["values"]
    if not isinstance(values, list) or not values or written.get("distribution", "categorical") not in ("constant", "categorical"):
        problems.append(f"parameters: '{key}': expected one value, or a list of values to choose from")
        return Parameter(key, (None,))
    plain = (str, int, float, type(None))
    return Parameter(key, tuple(value if isinstance(value, plain) else str(value) for value in values))


def _range(key: str, written: Mapping[str, Any], low: float, high: float, q: float | None, problems: list[str]) -> Parameter:
    whole = isinstance(low, int) and isinstance(high, int) and (q is None or isinstance(q, int))
    name = written.get("distribution", "int_uniform" if whole and q is None else "q_uniform" if q else "uniform")
    log, steps = "log" in str(name), str(name).startswith("q_")
    checks = {
        f"expected a distribution out of {', '.join(DISTRIBUTIONS)}, found {name!r}": name in RANGES,
        "int_uniform needs whole numbers min and max": name != "int_uniform" or whole,
        "q goes with q_uniform and q_log_uniform_values": ("q" in written) <= (steps or "distribution" not in written),
        f"{name} needs a step q > 0": not steps or q is None or q > 0,
        "on a logarithmic scale only whole numbers come in steps, and q is 1": not (log and steps) or (whole and (q or 1) == 1),
        "a logarithmic scale begins above 0": not log or low > 0,
    }
    problems += [f"parameters: '{key}': {problem}" for problem, fine in checks.items() if not fine]
    step = (q or 1) if steps and not log else None
    return Parameter(key, low=low, high=high, step=step, log=log, whole=whole and (steps or name == "int_uniform"))


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


# The study


def load_optuna() -> Any:
    """Optuna, which speaks only when something is wrong.

    Raises:
        UserError: it is not installed.
    """
    import warnings

    try:
        import optuna
    except ImportError:
        raise UserError('sweeps need Optuna: pip install -e ".[sweep]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


class Study:
    """The trials of a sweep, in a database that any number of processes may share.

    Args:
        folder: of the sweep, `runs/<name>`; holds the database unless `url` names another one.
        seed: decides what is tried, for trial n the same whoever works on it (bayes: as far as the same was known before).

    Raises:
        UserError: the study is one of another sweep file, the database cannot be opened, or there is none and `create` is false.
    """

    def __init__(self, sweep: Sweep, folder: Path, url: str = "", seed: int = 0, create: bool = True) -> None:
        self.sweep, self.folder, self.seed = sweep, folder, seed
        self.optuna, self.session = load_optuna(), runs.stamp()
        if not create and not url and not (folder / "study.db").exists():
            raise UserError(f"{folder} holds no sweep yet; start one without --show")
        (folder / "sessions").mkdir(parents=True, exist_ok=True)
        self._alive = FileLock(self._lock_of(self.session), timeout=0)
        self._alive.acquire()
        with self._alone():
            self._storage = self._open(url)
            self._id = self._find(create)

    def close(self) -> None:
        """Leave the study to others."""
        self._alive.release()

    def _lock_of(self, session: str) -> Path:
        return self.folder / "sessions" / f"{session}.lock"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the other processes of this machine out: SQLite would let two of them claim the same trial."""
        with FileLock(self.folder / "study.lock"):
            yield

    def _open(self, url: str) -> optuna.storages.BaseStorage:
        import sqlite3

        from sqlalchemy.exc import ArgumentError, SQLAlchemyError

        patience = {"connect_args": {"timeout": 60}} if not url or url.startswith("sqlite") else {}
        if not url:
            with contextlib.closing(sqlite3.connect(self.folder / "study.db", timeout=60)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")  # readers and a writer do not wait for each other
        try:
            storage = self.optuna.storages.RDBStorage(url or f"sqlite:///{self.folder / 'study.db'}", patience)
        except (ArgumentError, SQLAlchemyError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the sweep's database cannot be opened ({reason}); --storage takes a URL such as sqlite:///FILE") from None
        return cast("optuna.storages.BaseStorage", self.optuna.storages.get_storage(storage))

    def _find(self, create: bool) -> int:
        name, mine = self.sweep.name, self.sweep.fingerprint()
        if name not in [study.study_name for study in self.optuna.get_all_study_summaries(self._storage, include_best_trial=False)]:
            if not create:
                raise UserError(f"the database knows no sweep '{name}' yet; start one without --show")
            study = self.optuna.create_study(study_name=name, storage=self._storage, direction=self.sweep.goal, load_if_exists=True)
            study.set_user_attr("sweep", mine)
        known = self.load().user_attrs.get("sweep", mine)
        if known != mine:
            raise UserError(f"{self.folder} holds a sweep of other parameters than {self.sweep.path}; give this one a --name of its own")
        return self._storage.get_study_id_from_name(name)

    def load(self, number: int = 0) -> optuna.Study:
        """The study as Optuna's own object, with the sampler that chooses trial `number`."""
        pruner: Any = self.optuna.pruners.NopPruner()
        if self.sweep.hyperband:
            first, eta = self.sweep.hyperband
            pruner = self.optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=eta)
        found = self.optuna.load_study(study_name=self.sweep.name, storage=self._storage, sampler=self._sampler(number), pruner=pruner)
        return cast("optuna.Study", found)

    def _sampler(self, number: int) -> Any:
        """A sampler for one trial: its random numbers, or its point of the grid, hang on the trial's number and not on who draws them."""
        seed, samplers = seeding.derive(self.seed, "sweep", number) % 2**32, self.optuna.samplers
        if self.sweep.method == "bayes":
            return samplers.TPESampler(seed=seed, constant_liar=True)  # of trials that still run it supposes the worst
        if self.sweep.method == "grid":
            grid = self.sweep.grid()
            return samplers.PartialFixedSampler(grid[number % len(grid)], samplers.RandomSampler(seed=seed))
        return samplers.RandomSampler(seed=seed)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials of some states, or all, in the order of their numbers."""
        found = self._storage.get_all_trials(self._id, deepcopy=False, states=states or None)
        return sorted(found, key=lambda trial: trial.number)

    def plan(self, count: int) -> None:
        """See to it that there are so many trials, those that are done among them."""
        with self._alone():
            study = self.load()
            for _ in range(len(self.trials()), count):
                study.enqueue_trial({})

    def claim(self, count: int) -> Trial | None:
        """A trial out of the first `count` that nobody works on, for the caller to train; None where there is none left."""
        state = self.optuna.trial.TrialState
        with self._alone():
            for trial in self.trials(state.RUNNING):
                if self._is_dead(trial.user_attrs.get("session", "")):
                    self.give_back(trial.number)
            for trial in self.trials(state.WAITING)[:count]:
                identity = self._identity(trial.number)
                if trial.number < count and self._take(identity, trial):
                    return cast("Trial", self.optuna.Trial(self.load(trial.number), identity))
        return None

    def _take(self, identity: int, trial: FrozenTrial) -> bool:
        """Make a waiting trial ours, unless another machine is faster."""
        note = self._storage.set_trial_user_attr
        note(identity, "session", self.session)  # before it runs, so that whoever finds it running knows whom to ask
        with contextlib.suppress(self.optuna.exceptions.UpdateFinishedTrialError):
            if self._storage.set_trial_state_values(identity, self.optuna.trial.TrialState.RUNNING):
                note(identity, "session", self.session)
                note(identity, "host", socket.gethostname())
                note(identity, "run", trial.user_attrs.get("run") or (self.folder / runs.stamp()).as_posix())
                return True
        return False

    def _is_dead(self, session: str) -> bool:
        """Whether the process of a session has ended; one whose lock is not here works on another machine."""
        path = self._lock_of(session)
        if session == self.session or not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                return True
        except Timeout:
            return False

    def give_back(self, number: int) -> None:
        """Let a running trial wait for somebody to go on with it."""
        self._storage.set_trial_state_values(self._identity(number), self.optuna.trial.TrialState.WAITING)

    def _identity(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)


# Training


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    trial: FrozenTrial
    message: str = ""
    """Why, where it failed or was stopped."""


class Workers:
    """Threads that each train one trial after another, in processes that end with this one.

    Args:
        study: what to work on.
        count: trials to come to, those of other processes and former times among them.
        extras: options for every trial, beside those that the sweep file gives it.
        tell: is called with every outcome, by the thread that has it.
    """

    def __init__(self, study: Study, count: int, extras: Sequence[str], threads: int, tell: Callable[[Outcome], None]) -> None:
        self.study, self.count, self.extras, self._tell = study, count, extras, tell
        self.stopping = threading.Event()
        self.broken = ""
        self.errors: list[Exception] = []
        self._failed = self._ended = 0
        self._told = threading.Lock()
        # Offline trials are not sent anywhere; scripts/sync.py can send those that deserve it.
        self._environment = {"WANDB_MODE": "disabled"} | os.environ | {"OMP_NUM_THREADS": str(threads)}

    def start(self, workers: int) -> list[threading.Thread]:
        """Begin; the threads end when nothing is left to do, or soon after `stopping` is set."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        return threads

    def _work(self) -> None:
        try:
            while not self.stopping.is_set() and (trial := self.study.claim(self.count)):
                outcome = self._train(trial)
                if outcome:
                    self._note(outcome)
        except Exception as error:  # to be raised by the main thread
            self.errors.append(error)
            self.stopping.set()

    def _note(self, outcome: Outcome) -> None:
        with self._told:
            self._ended += 1
            self._failed += outcome.trial.state.name == "FAIL"
            self._tell(outcome)
            if self._failed == self._ended >= BROKEN:
                self.broken = outcome.message
                self.stopping.set()

    def _train(self, trial: Trial) -> Outcome | None:
        """Train a trial to its end; None where it was stopped, to be gone on with."""
        run, began = Run(Path(trial.user_attrs["run"])), time.monotonic()
        values = {parameter.key: parameter.suggest(trial) for parameter in self.study.sweep.parameters}
        run.folder.mkdir(parents=True, exist_ok=True)
        progress = Progress(trial, run, self.study.sweep.metric)
        code, pruned = -signal.SIGKILL, False
        for _ in range(ATTEMPTS):
            if code < 0 and not pruned and not self.stopping.is_set():
                code, pruned = self._attempt(progress, self._words(run, values))
        trial.set_user_attr("seconds", round(trial.user_attrs.get("seconds", 0.0) + time.monotonic() - began, 1))
        if self.stopping.is_set() and code != DONE and not pruned:
            self.study.give_back(trial.number)
            return None
        return self._judge(progress, code, pruned)

    def _words(self, run: Run, values: Mapping[str, Any]) -> list[str]:
        if run.config.exists():
            while _is_owned(run) and not self.stopping.wait(POLL):
                pass  # where processes outlive the one that started them
            return [sys.executable, self.study.sweep.program, "--resume", str(run.folder)]
        return [*self.study.sweep.words(values), *self.extras, f"--run-dir={run.folder}"]

    def _attempt(self, progress: Progress, words: Sequence[str]) -> tuple[int, bool]:
        """Run a process to its end; returns its exit code, and whether it was stopped for being worse than others."""
        command = [sys.executable, "-c", TIED, str(os.getpid()), *words]
        with progress.output.open("ab") as output:
            process = subprocess.Popen(  # in a session of its own: Ctrl-C is for us, and we pass it on
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment, start_new_session=True
            )
        pruned = asked = False
        try:
            while process.poll() is None:
                pruned = progress.report() or pruned
                if (pruned or self.stopping.is_set()) and not asked:
                    process.terminate()
                    asked = True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
        finally:
            process.kill()
            process.wait()
        progress.report()
        return process.returncode, pruned

    def _judge(self, progress: Progress, code: int, pruned: bool) -> Outcome:
        """Tell the study how the trial ended."""
        trial, values, state = progress.trial, progress.values(), self.study.optuna.trial.TrialState
        tell = self.study.load(trial.number).tell
        if code == DONE and values and math.isfinite(values[-1]):
            return Outcome(tell(trial, values[-1]))
        if code != DONE and (pruned or code == STOPPED):
            return Outcome(tell(trial, state=state.PRUNED), "" if pruned else "stopped by hand")
        return Outcome(tell(trial, state=state.FAIL), progress.failure(code))


class Progress:
    """What the run of a trial has recorded, and how much of that the study knows."""

    def __init__(self, trial: Trial, run: Run, metric: str) -> None:
        self.trial, self.run, self.metric = trial, run, metric
        self._known = set(trial.storage.get_trial(trial._trial_id).intermediate_values)
        self._size = 0

    @property
    def output(self) -> Path:
        """All that the process has printed."""
        return self.run.folder / "output.txt"

    def values(self) -> list[float]:
        """The values of the metric so far, in the order in which they were recorded."""
        return [float(row[self.metric]) for row in self.run.rows() if self.metric in row]

    def report(self) -> bool:
        """Tell the study new values under their numbers 1, 2, ..., as W&B counts them; returns whether the trial should stop."""
        size = self.run.metrics.stat().st_size if self.run.metrics.exists() else 0
        if size == self._size:
            return False
        self._size, worse = size, False
        for number, value in enumerate(self.values(), 1):
            if number not in self._known and math.isfinite(value):
                self.trial.report(value, number)
                self._known.add(number)
                worse |= self.trial.should_prune()  # for each one: it also notes at which rung others will be compared with this trial
        return worse

    def failure(self, code: int) -> str:
        """Why there is no result, as far as can be seen."""
        if code == DONE and (values := self.values()):
            return f"the last {self.metric} is {values[-1]}"
        if code == DONE:
            known = sorted(key for key, value in self.run.last_values().items() if isinstance(value, int | float))
            return f"it records no {self.metric}, only {', '.join(known)}"
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"exit code {code}\n" + "\n".join(f"    {line}" for line in lines[-5:])


def _is_owned(run: Run) -> bool:
    try:
        with runs.owned(run):
            return False
    except UserError:
        return True
