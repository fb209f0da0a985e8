"""The loop. It owns time, persistence, signals, precision and processes; a task owns the mathematics.

A task says what a checkpoint must hold (`parts`) and does one update (`step`). Inside a step it may call `minimise` for
as many modules as it trains, or step an environment, or both: an autoencoder, a GAN and a DQN all run in this one loop.
Everything random is drawn from (seed, stream, step), for the whole batch at once, and every process takes its rows; so a
run that was killed goes on exactly, and one process or four see the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from lab import checkpoint, media, optimizer, seeding
from lab.batchnorm import see_whole_batches
from lab.checkpoint import Checkpoint, Stateful
from lab.config import UserError
from lab.distributed import World, native_bf16
from lab.experiment import Every, Experiment
from lab.learner import Learner, Loss, Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.recorder import Recorder
from lab.runs import Run

log = logging.getLogger("dreamplay")

DONE, STOPPED = 0, 75  # 75 is EX_TEMPFAIL: start again with --resume


class Window:
    """The sums of metrics since the last row. Part of a checkpoint, or a resumed run's first row would differ."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self._waiting: list[tuple[str, Tensor | float]] = []
        """What was added and not yet read."""

    def add(self, metrics: Metrics) -> None:
        """Add one step's metrics, without waiting for the device."""
        self._waiting += [(name, value.detach() if isinstance(value, Tensor) else value) for name, value in metrics.items()]

    def _read(self) -> None:
        """Add up what waits. NaN is what an update that was skipped has measured: nothing."""
        waiting, self._waiting = self._waiting, []
        for (name, _), value in zip(waiting, numbers([value for _, value in waiting])):
            if not math.isnan(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def means(self, world: World) -> dict[str, float]:
        """The mean of each metric over the steps, and over the processes, that had it; empties the window."""
        self._read()
        parts = world.gather({name: (value, self.counts[name]) for name, value in self.sums.items()})
        self.sums, self.counts = {}, {}
        names = sorted({name for part in parts for name in part})
        totals = {name: [part[name] for part in parts if name in part] for name in names}
        return {name: sum(value for value, _ in total) / sum(count for _, count in total) for name, total in totals.items()}

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts."""
        self._read()
        return {"sums": {name: torch.tensor(value, dtype=torch.float64) for name, value in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.sums, self.counts, self._waiting = {name: float(value) for name, value in state["sums"].items()}, dict(state["counts"]), []

    def take_up(self, states: Sequence[Mapping[str, Any]], world: World) -> None:
        """Put back what every process's `state_dict` gave: each its own, or the main one all where there are now more or fewer."""
        if len(states) == world.size:
            return self.load_state_dict(dict(states[world.rank]))
        self.sums, self.counts, self._waiting = {}, {}, []
        weight = world.size / len(states)  # a step counts once for each process of now
        for state in states if world.main else []:
            for name, value in state["sums"].items():
                self.sums[name] = self.sums.get(name, 0.0) + float(value) * weight
                self.counts[name] = self.counts.get(name, 0) + state["counts"][name] * weight


def numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Numbers (), wherever they lie, as Python's; each device is waited for once."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    read = {
        device: iter(torch.stack([value.double() for value in tensors if value.device == device]).tolist())
        for device in {value.device for value in tensors}
    }
    return [next(read[value.device]) if isinstance(value, Tensor) else float(value) for value in values]


def averages(rows: Sequence[Metrics], device: torch.device) -> dict[str, Tensor]:
    """The mean of each metric over the rows, float64 () on the device, without waiting for it; NaN counts for nothing."""

    def number(value: Tensor | float) -> Tensor:
        return value.detach().double() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)

    columns = {name: [number(row[name]) for row in rows if name in row] for row in rows for name in row}
    return {name: values[0] if len(values) == 1 else torch.stack(values).nanmean() for name, values in columns.items()}


# The loop


class TrainingStopped(Exception):
    """Training cannot go on; says why, and what to change."""


class Left(BaseException):
    """What was being done was left half done, as the run is to stop. No `Exception`: whoever forgives those must not keep it."""


class Held:
    """A part of a checkpoint as it was some time ago."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        """As it was."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be as it was at another time."""
        self.state = state


class StopRequest(threading.Event):
    """The run is to stop: set by a signal, see `stop_signals`."""

    begun = True
    """Whether there is something to save, so that a signal must wait for the end of a step."""

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Within, a signal itself raises `Left`: a run that has not begun has nothing to lose, and to read its data may take long."""
        self.begun = False
        try:
            yield
        finally:
            self.begun = True


class Trainer:
    """Runs a task from its last checkpoint to the last step."""

    def __init__(
        self, experiment: Experiment, world: World, noted: Mapping[str, Any] | None = None, requested: StopRequest | None = None
    ) -> None:
        """Args:
        noted: the facts in the checkpoint that will replace whatever the task begins with; None: training begins with the first step.
        requested: what tells that the run is to stop; None: nothing will.
        """
        self.noted = noted
        self.experiment, self.config, self.world = experiment, experiment.trainer, world
        self.step = self._skipped = self.skipped_in_a_row = 0
        self.window = Window()
        self._norms: list[tuple[int, Tensor]] = []
        """The step and the gradient's norm of updates of which nobody has asked yet whether they were skipped."""
        self.unfinished: dict[str, float] | None = None
        """What the last step measured, until its hooks are done and its row is written."""
        self._before: dict[str, Any] | None = None
        """What all parts were before the step that is being done, where that may be left half done."""
        self.requested = requested or StopRequest()
        self.bf16 = self.config.precision == "bf16" or (self.config.precision == "auto" and native_bf16(world.device))
        self.media: Path | None = None
        self._unsettled: list[Path] = []
        """Milestones that may not be on the disk yet."""
        self._parallel: dict[Learner, DistributedDataParallel] = {}
        self._windows = world.jointly(self.window.state_dict)
        with told_once(world):
            self.task = experiment.task(self)

    def resume(self, run: Run | None) -> int:
        """Go back to the newest whole checkpoint of a run, which the main process reads for all.

        Returns:
            The length that `metrics.jsonl` had then, in bytes: 0 where there is no checkpoint yet.

        Raises:
            UserError: the checkpoint does not fit the settings, or there are some and all are damaged.
        """
        with told_once(self.world):
            found = self.world.from_main(lambda: _newest(run))
            if found is None:
                return 0
            try:
                self.put_back(found)
            except ValueError as error:
                raise UserError(f"cannot resume: {error}") from None
        if run:
            checkpoint.drop_after(run.checkpoints, self.step)
            checkpoint.drop_after(run.milestones, self.step)
        return int(found.notes["metrics_bytes"])

    def put_back(self, found: Checkpoint) -> None:
        """Be where a checkpoint was saved.

        Raises:
            ValueError: it does not fit the settings.
        """
        checkpoint.restore(self._parts(), found.parts, found.segments, lambda path: self.world.from_main(lambda: load_file(path)))

    def fit(self, run: Run | None = None, recorder: Recorder | None = None) -> int:
        """Train to the last step, or until it is to stop; returns the exit status of the process.

        Args:
            run, recorder: where to save and to record; only the main process has them (a benchmark may do without).

        Raises:
            TrainingStopped: too many updates in a row were not finite, or the last step could not be saved.
        """
        self.media = run.media if run else None
        hooks = list(self.task.hooks(self)) if run else []
        save = partial(self._save, run, recorder) if run and recorder else None
        saved, stopping = self.world.any(save is not None), self.world.any(self.requested.is_set())
        with told_once(self.world):
            while not (stopping or self._complete):
                with contextlib.suppress(Left):  # the checkpoint then holds what is known of the row, and the hooks are done on resume
                    self._one_step(hooks, recorder)
                stopping = self.world.any(self.requested.is_set())
                # Before the checkpoint: a kill between the two must not lose it. A step that was left half done has no weights to keep.
                if run and self._before is None and self._passed_milestone():
                    self._save_milestone(run)
                if saved and (stopping or self._due(self.config.save_every)):
                    self.world.led(partial(save, stopping or self.step == self.config.steps) if save else None)
        return STOPPED if stopping and self.world.any(not self._complete) else DONE

    @property
    def _complete(self) -> bool:
        """Whether nothing is left to do, as far as this process knows: hooks are the main one's."""
        return self.step >= self.config.steps and self.unfinished is None

    def advance(self) -> tuple[Metrics, dict[str, float]]:
        """Do one step, recording nothing; returns its own metrics and, where a row is due, their means since the last row.

        Raises:
            TrainingStopped: too many updates in a row were not finite.
        """
        self._seed(f"global/{self.world.rank}")  # dropout, and whatever else draws by itself
        metrics = self.task.step(self)
        self.window.add(metrics)
        if self.world.device.type == "cpu":  # where nobody has to be waited for; a GPU is asked when a row or a checkpoint is due
            self._count_skipped()
        self.step += 1
        if not self._due(self.config.log_every):
            return metrics, {}
        skipped = self.skipped
        means = {f"train/{name}": value for name, value in self.window.means(self.world).items()}
        return metrics, means | ({"train/skipped": skipped} if skipped else {})

    def _one_step(self, hooks: Sequence[Every], recorder: Recorder | None) -> None:
        """A step, its hooks and its row; only the rest of it where a stop has cut off the hooks.

        Raises:
            Left: the run is to stop, and there is no row yet.
        """
        if self.unfinished is None:
            if self.leaves_steps:
                self._before = {name: copy.deepcopy(part.state_dict()) for name, part in self._parts().items()}
            self.unfinished = self.advance()[1]
            self._before = None
        row: dict[str, float | int | str] = {**self.unfinished}
        if due := [hook for hook in hooks if hook.due(self.step, self.config.steps)]:
            self._seed("hooks")  # or what they draw would not be the same after a resume
            with nullcontext() if self.config.compile else leaving(self.requested):  # whose watch has compiled code compiled anew
                for hook in due:
                    row |= hook.do()
        self.unfinished = None
        if recorder:
            recorder.display.advance(self.step)
            if row:
                recorder.write(self.step, row)

    def _seed(self, stream: str) -> None:
        """Set PyTorch's own random numbers for what comes now."""
        seed = seeding.derive(self.config.seed, stream, self.step)
        torch.default_generator.manual_seed(seed)
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    # Saving

    def _save(self, run: Run, recorder: Recorder, needed: bool) -> None:
        """Save a checkpoint. A disk that is full for a while costs only the checkpoints of that while."""
        try:
            notes = {"metrics_bytes": recorder.sync(), "facts": dict(self.task.facts)}
            checkpoint.settle(self._unsettled)  # whoever goes on from this checkpoint does not make them again
            self._unsettled = []
            checkpoint.save(run.checkpoints, self.step, self._parts(), notes, self.config.keep)
        except OSError as error:
            if needed:
                raise TrainingStopped(f"step {self.step} could not be saved ({error}); the checkpoints before it are whole") from error
            log.warning("step %d could not be saved (%s); training goes on, the checkpoints before it are whole", self.step, error)

    def _passed_milestone(self) -> bool:
        """Whether one of the `milestones` parts of the run ends with this step."""
        count, steps = self.config.milestones, self.config.steps
        return self.step * count // steps > (self.step - 1) * count // steps

    def _save_milestone(self, run: Run) -> None:
        """Keep what the model has learnt so far: its averaged weights where it has them, else the plain ones.

        Nobody waits for the disk here: what a power cut takes before the next checkpoint is made again after it.
        """
        parts = self.task.parts()
        judged = [name for name in ("ema", "model") if name in parts][:1]
        kept, notes = {name: parts[name] for name in judged}, {"facts": dict(self.task.facts)}
        try:
            self._unsettled.append(checkpoint.save(run.milestones, self.step, kept, notes, self.config.milestones, wait=False))
        except OSError as error:
            log.warning("the weights of step %d could not be kept (%s); training goes on", self.step, error)

    @property
    def leaves_steps(self) -> bool:
        """Whether a step may be left half done by who stops the run, and is begun again on resume; see `leaving`."""
        return getattr(self.task, "long_steps", False) and self.world.size == 1 and not self.config.compile

    def _parts(self) -> dict[str, Stateful]:
        if self._before is not None:
            return {name: Held(state) for name, state in self._before.items()}
        return {**self.task.parts(), "trainer": self}

    def state_dict(self) -> dict[str, Any]:
        """The trainer's own part of a checkpoint."""
        window, *others = self._windows()
        skipped = self.skipped  # which asks how many there are in a row, too
        state = {"step": self.step, "skipped": skipped, "in_a_row": self.skipped_in_a_row, "window": window}
        state |= {"other_windows": others} if others else {}
        return state if self.unfinished is None else state | {"unfinished": self.unfinished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.step, self._skipped, self.skipped_in_a_row, self._norms = state["step"], state["skipped"], state["in_a_row"], []
        self.window.take_up([state["window"], *state.get("other_windows", [])], self.world)
        self.unfinished = state.get("unfinished")

    # What a task calls

    @property
    def layout(self) -> torch.memory_format:
        """How weights lie in memory: channels-last is faster on a GPU, and on a CPU in fp32, but not on a CPU in bf16."""
        plain = self.bf16 and self.world.device.type == "cpu"
        return torch.contiguous_format if plain else torch.channels_last

    def learner(self, module: nn.Module, config: OptimizerConfig) -> Learner:
        """Put a module on the device, compile it if asked to, and give it an optimiser."""
        module.to(device=self.world.device, memory_format=self.layout)  # type: ignore[call-overload]
        if self.world.size > 1:
            see_whole_batches(module)
        learner = Learner(module, config)
        if self.config.compile:
            _require_compiler(self.world.device)
            module.compile()
        if self.world.size > 1:
            self._parallel[learner] = DistributedDataParallel(learner)
        return learner

    def freeze(self, learner: Learner, modules: Sequence[nn.Module]) -> None:
        """From now on hold the weights of some modules inside a learner, and let all its others learn.

        Held modules are in evaluation mode: their running statistics and dropout rest too.
        """
        held = {weight for module in modules for weight in module.parameters()}
        changed = [weight for weight in learner.weights if weight.requires_grad == (weight in held)]
        for weight in changed:
            weight.requires_grad_(weight not in held)
        learner.module.train()
        for module in modules:
            module.eval()
        if changed and learner in self._parallel:
            self._parallel[learner] = DistributedDataParallel(learner)  # which looks at what learns only when it is made

    def picture(self, name: str, image: Tensor, scale: int = 2) -> dict[str, str]:
        """Save a picture (C, H, W) of this step in media/; returns its entry for the step's row."""
        if self.media is None:
            return {}
        path = self.media / f"{name}_{self.step:09d}.png"
        try:
            media.save_png(path, image, scale)
        except OSError as error:
            log.warning("%s could not be saved (%s); training goes on", path, error)
            path.unlink(missing_ok=True)
            return {}
        return {f"media/{name}": f"{self.media.name}/{path.name}"}

    def shards(self, batch: int) -> list[Shard]:
        """This process's micro-batches of a step, out of a batch of `batch` over all processes.

        Raises:
            UserError: the batch cannot be cut into equal parts.
        """
        pieces = self.world.size * self.config.accumulate
        if batch % pieces:
            parts = f"{self.world.size} (processes) x {self.config.accumulate} (trainer.accumulate)"
            raise UserError(f"a batch of {batch} cannot be cut into {parts} equal parts")
        count, mine = batch // pieces, range(self.world.rank, pieces, self.world.size)
        return [Shard(piece * count, count, batch, self.config.seed, self.step, self.world.device) for piece in mine]

    def minimise(self, learner: Learner, loss: Loss, batch: int) -> Metrics:
        """One update of a learner: every shard's loss and gradient, the mean over all, clipping, the optimiser.

        Nothing here waits for a GPU: a gradient that is not finite makes the update move nothing, and who wants to know of it asks later.

        Args:
            loss: maps a shard to its mean loss over the shard's rows and to metrics, also means.
            batch: rows of the whole batch, over all processes and micro-batches.

        Returns:
            The loss, its metrics, the gradient's norm, all of them NaN if the update had to be skipped, and the learning rate.
        """
        learner.optimizer.zero_grad()
        shards, rows = self.shards(batch), []
        for index, shard in enumerate(shards):
            with self._synchronising(learner, last=index == len(shards) - 1) as forward:
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
                    value, metrics = forward(loss, shard)
                # A loss that is not finite makes every gradient so, on every process: they must agree to skip.
                (value * ((1 + 0 * value.detach()) / len(shards))).backward()
            rows.append({"loss": value.detach(), **metrics})
        rate, norm = optimizer.learning_rate(learner.config, self.step, self.config.steps), learner.gradient_norm()
        learner.update(rate, norm)
        self._norms.append((self.step, norm))
        measured = {**averages(rows, norm.device), "gradient_norm": norm.double()}
        values = torch.stack(list(measured.values())).masked_fill(norm.isfinite().logical_not(), math.nan)
        return dict(zip(measured, values.unbind())) | {"lr": rate}

    @contextlib.contextmanager
    def _synchronising(self, learner: Learner, last: bool) -> Iterator[Callable[..., tuple[Tensor, Metrics]]]:
        """The learner's forward pass; several processes average their gradients in the last micro-batch."""
        parallel = self._parallel.get(learner)
        with nullcontext() if last or not parallel else parallel.no_sync():
            yield parallel or learner.forward

    @property
    def skipped(self) -> int:
        """Updates that were skipped so far; waits for the device."""
        self._count_skipped()
        return self._skipped

    def _count_skipped(self) -> None:
        """Ask which updates were skipped of those that nobody has asked of yet.

        Raises:
            TrainingStopped: too many in a row were.
        """
        norms, self._norms = self._norms, []
        for (step, _), norm in zip(norms, numbers([norm for _, norm in norms])):
            if math.isfinite(norm):
                self.skipped_in_a_row = 0
            else:
                self._count_one(step)

    def _count_one(self, step: int) -> None:
        self._skipped += 1
        self.skipped_in_a_row += 1
        if self.world.main:
            log.warning("step %d: the gradient is not finite; this update is skipped", step + 1)
        if self.skipped_in_a_row >= self.config.max_skipped:
            run = self.media.parent if self.media else "RUN"
            raise TrainingStopped(
                f"stopped at step {step}: {self.skipped_in_a_row} updates in a row had gradients that are not finite; try a smaller "
                f"--optimizer.lr, --optimizer.clip-norm 1 or --trainer.precision fp32, and --resume from the last checkpoint; "
                f"see it happen again: python scripts/replay_step.py {run} --step {step + 1}"
            )


def _newest(run: Run | None) -> Checkpoint | None:
    """The newest whole checkpoint of a run, None where there is none yet.

    Raises:
        UserError: there are some and all are damaged.
    """
    found = checkpoint.load_newest(run.checkpoints) if run else None
    if found is None and run and (left := checkpoint.folders(run.checkpoints)):
        damage = checkpoint.damage(left[0])
        raise UserError(f"cannot resume: no checkpoint of {run.folder} is whole ({damage}); put the file back, or start a new run")
    return found


@contextlib.contextmanager
def told_once(world: World) -> Iterator[None]:
    """Of a message that ends several processes, one tells the user; the others end without a word, as it does."""
    try:
        yield
    except (UserError, TrainingStopped) as error:
        if not world.tells():
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        raise


def _require_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("trainer.compile needs a C++ compiler on a CPU and neither g++ nor clang++ is installed; leave it false")


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """An event that SIGTERM or SIGINT (Ctrl-C) sets; a second one ends the process the ordinary, abrupt way."""
    requested = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        requested.set()
        signal.signal(number, before[signal.Signals(number)])
        if not requested.begun:
            log.info("%s: stopping before training begins", signal.Signals(number).name)
            raise Left
        log.info("%s: finishing this step, then saving; once more to stop at once", signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def leaving(requested: threading.Event) -> Iterator[None]:
    """Within, the next forward pass of any module raises `Left` once the event is set.

    Tests, samples and games are nothing but forward passes, so that no hook has to look by itself, and nothing is left
    at a moment when it may not be.
    """

    def look(module: nn.Module, inputs: object) -> None:
        if requested.is_set():
            raise Left

    watch = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        watch.remove()
