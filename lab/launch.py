"""What every training script does: read the settings, make or reopen the run, train, say where it is.

python scripts/train_X.py [CONFIG.yaml] [--dotted.key VALUE ...] [--run-dir DIR | --resume RUN] [--print-config]
python scripts/train_X.py [CONFIG.yaml] [--dotted.key VALUE ...] --run-dir DIR --resume auto         begins a run, or goes on with it
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import tyro

from lab import checkpoint, distributed, media, runs
from lab.config import ConfigError, Given, Resolved, UserError, dump, leaves, read_arguments, read_yaml, resolve
from lab.distributed import World
from lab.experiment import Experiment
from lab.recorder import Recorder, console, cut, display, log, logged, speak
from lab.runs import Run
from lab.tracking import Tracker, resolved_mode
from lab.trainer import DONE, STOPPED, Left, StopRequest, Trainer, TrainingStopped, stop_signals, told_once

E = TypeVar("E", bound=Experiment)

FAILED, MISTAKE = 1, 2
AUTO = "auto"


def guarded(main: Callable[[], int]) -> int:
    """Run a script's main function; a user's mistake ends in one sentence and exit code 2, not in a traceback."""
    try:
        return main()
    except UserError as error:
        return _end(str(error), MISTAKE)
    except TrainingStopped as error:
        return _end(str(error), FAILED)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        return _end(f"out of GPU memory ({reason}); try --trainer.accumulate 2: same batch, same result, less memory", FAILED)


def _end(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def launch(default: Experiment, about: str, argv: Sequence[str] | None = None) -> int:
    """The main function of a training script; returns the exit code (or ends with it, where it is one process of several)."""
    words = sys.argv[1:] if argv is None else argv
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return guarded(lambda: _launch(default, about, words))
    status = FAILED
    try:
        status = guarded(lambda: _launch(default, about, words))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        # gloo's threads live on, and one that lets go of a tensor while Python ends aborts the process, whatever it has come to.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass(frozen=True)
class Order:
    """What a command line asks for."""

    resolved: Resolved[Experiment]
    resume: Run | None
    folder: Path | None
    show: bool

    def noted(self, world: World) -> Mapping[str, Any] | None:
        """The facts in the checkpoint that training goes on from, which the main process reads for all; None if there is none."""
        notes = checkpoint.noted(self.resume.checkpoints) if self.resume and world.main else None
        facts: Mapping[str, Any] | None = world.share(None if notes is None else notes.get("facts", {}))
        return facts


def _launch(default: Experiment, about: str, argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        show_help(default, about)
        return DONE
    order = read_order(default, argv)
    if order.show:
        print(dump(order.resolved.settings, default.experiment, order.resolved.origins), end="")
        return DONE
    return _train(order)


# Reading the command line


def read_order(default: Experiment, argv: Sequence[str]) -> Order:
    """Settings, and the run to resume or to make.

    Raises:
        ConfigError, UserError: all that is wrong with the settings, or the run that is not there.
    """
    arguments = read_arguments(argv, flags=("print_config",))
    options = dict(arguments.options)
    show = options.pop("print_config", None) is not None
    resume, folder = (_path(options.pop(name, None), name) for name in ("resume", "run_dir"))
    if len(arguments.positional) > 1 or (resume and resume != AUTO and (folder or arguments.positional)):
        raise UserError(f"give one config, or --resume RUN, or --run-dir DIR for a new run, not several: {', '.join(argv)}")
    run = _run_to_resume(resume, folder, default.experiment)
    configs = [run.config] if run else [*map(Path, arguments.positional)]  # what a run began with stands in its own config
    given: dict[str, Given] = {}
    problems: list[str] = []
    for path in configs:
        given, problems = _read_config(path, default.experiment)
    return Order(resolve(default, given | options, problems), run, Path(folder) if folder else None, show)


def _run_to_resume(resume: str | None, folder: str | None, experiment: str) -> Run | None:
    if resume != AUTO:
        return _resumed(resume, experiment) if resume else None
    if not folder:
        raise UserError("--resume auto goes on with the run in --run-dir DIR, or begins it there; give --run-dir too")
    name = "./latest" if folder == "latest" else folder  # here it is the name of a folder
    return _resumed(name, experiment) if Run(Path(folder)).config.exists() else None


def _resumed(name: str, experiment: str) -> Run:
    found = runs.find(name, [experiment])
    if found.checkpoint:
        raise UserError(f"--resume {name}: a run goes on from its newest checkpoint; give the run, --resume {found.run.folder}")
    runs.history(found.run)  # if that is damaged, it is said before anything is changed
    return found.run


def _path(given: Given | None, name: str) -> str | None:
    if given is None:
        return None
    if not isinstance(given.text, str) or not given.text:
        raise UserError(f"--{name.replace('_', '-')} takes one path")
    return given.text


def _read_config(path: Path, experiment: str) -> tuple[dict[str, Given], list[str]]:
    try:
        given, named = read_yaml(path)
    except ConfigError as error:
        return {}, error.problems
    if named not in (None, experiment):
        raise UserError(f"{path}: settings for '{named}'; this script trains '{experiment}', use scripts/train_{named}.py")
    return given, []


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where the settings come from and where the run goes."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[CONFIG.yaml]", help_behavior_hint="")] = ""
    """Settings that differ from the defaults; presets stand in configs/."""
    run_dir: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = ""
    """Folder of this run; otherwise a new one runs/<name>/<UTC time>-<6 chars>/."""
    resume: Annotated[str, tyro.conf.arg(metavar="RUN", help_behavior_hint="")] = ""
    """Go on with a run: its folder, or `latest`, or `auto`: the one in --run-dir if there is one, else it begins there, so that one
    command serves every start. Other options change its settings, e.g. more --trainer.steps."""
    print_config: Annotated[str, tyro.conf.arg(metavar="", help_behavior_hint="")] = ""
    """Show every setting and where its value came from, then stop."""


def show_help(default: Experiment, about: str) -> None:
    """Print every option with its meaning, unit, range and default."""
    both = dataclasses.make_dataclass("CommandLine", [], bases=(Launch, type(default)), frozen=True, kw_only=True)
    both.__doc__ = ""
    values = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    tyro.cli(both, default=both(**values), args=["--help"], description=about.strip(), config=(tyro.conf.FlagConversionOff,))


# Training


def _train(order: Order) -> int:
    with stop_signals() as requested, ExitStack() as held, suppress(Left):
        with requested.preparing():
            trainer, run, recorded = _prepared(order, requested, held)
        if trainer.world.main:
            return _train_main(order, trainer, run, recorded, held)
        status = trainer.fit()
        trainer.world.leave()
        return status
    return STOPPED


def _prepared(order: Order, requested: StopRequest, held: ExitStack) -> tuple[Trainer, Run, int]:
    """The trainer where its run was last saved, the run, and the bytes that its rows had then."""
    place = order.resolved.settings.trainer
    world = distributed.join(place.device, place.threads, place.deterministic)
    experiment = world.share(order.resolved.settings)  # the disk of another machine may not show yet what the main process has found
    if world.main:
        speak()
    # Both first, so that a mistake in the data or a missing key leaves no empty run behind.
    with told_once(world):
        world.from_main(lambda: resolved_mode(experiment.tracking))
    trainer = Trainer(experiment, world, order.noted(world), requested)
    with told_once(world):
        run = world.from_main(lambda: _opened(order, experiment, held))
    return trainer, run, trainer.resume(run if world.main else None)


def _opened(order: Order, experiment: Experiment, held: ExitStack) -> Run:
    """The run, new or begun before, which is this process's until `held` is left; what is logged is kept in it."""
    run = order.resume or runs.create(experiment.name, order.folder, dump(experiment, experiment.experiment))
    held.enter_context(runs.owned(run))
    held.enter_context(logged(run))
    return run


def _train_main(order: Order, trainer: Trainer, run: Run, recorded: int, held: ExitStack) -> int:
    experiment, world = trainer.experiment, trainer.world
    with held as stack:
        cut(run, recorded)
        if order.resume:
            runs.write_config(run, dump(experiment, experiment.experiment))
            log.info("resuming %s at step %d of %d", run.folder, trainer.step, experiment.trainer.steps)
        runs.note_start(run, distributed.environment())
        stack.push(lambda kind, error, trace: runs.note_end(run, error))
        tracker = Tracker.start(experiment.tracking, run.folder, **tracked(experiment, run))
        recorder = Recorder(run, tracker, display(experiment.name, experiment.trainer.steps))
        stack.push(lambda kind, error, trace: recorder.close(failed=kind is not None))
        recorder.start(trainer.step)
        status = trainer.fit(run, recorder)
        tracker.summarise(run.last_values())
    if status == DONE:  # who stops a run does not want to wait for a plot of half of it
        _draw(run, experiment.name)
    world.leave()
    if status == STOPPED:
        console.print(f"stopped at step {trainer.step}; go on with --resume {run.folder}", highlight=False, soft_wrap=True)
    print(f"run: {run.folder}")
    return status


def tracked(experiment: Experiment, run: Run) -> dict[str, Any]:
    """How a run is known to W&B: its identity, names, settings and axes, as `Tracker.start` and `replay` take them."""
    settings = leaves(experiment) | {"experiment": experiment.experiment}
    return {"identity": run.identity, "name": run.folder.name, "group": experiment.name, "settings": settings, "axes": experiment.axes}


def _draw(run: Run, title: str) -> None:
    """Plot what was recorded as media/curves.png."""
    rows = run.rows()
    found = {key for row in rows for key in row if key.startswith(("train/", "eval/"))} - {"train/lr", "train/skipped"}
    keys = sorted(found, key=lambda key: (key.partition("/")[2] != "loss", key))
    if keys:
        media.plot_rows(run.media / "curves.png", rows, keys, title)
