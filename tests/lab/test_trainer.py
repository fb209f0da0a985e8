"""The loop: one step is the mathematics that the task says, whatever the trainer adds around it."""

import copy
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from lab.config import UserError
from lab.distributed import World
from lab.experiment import Every, Experiment, TrainerConfig
from lab.learner import Learner
from lab.optimizer import OptimizerConfig
from lab.recorder import Lines, Recorder
from lab.runs import Run, create
from lab.tracking import Tracker, TrackingConfig
from lab.trainer import DONE, Trainer, TrainingStopped, Window, averages

DATA = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
TARGETS = DATA @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3


@dataclass(frozen=True, kw_only=True)
class Line(Experiment):
    experiment: ClassVar[str] = "line"

    name: str = "line"
    trainer: TrainerConfig = TrainerConfig(steps=20, log_every=5, save_every=5, preview_every=10)
    tracking: TrackingConfig = TrackingConfig(mode="disabled")
    optimizer: OptimizerConfig = OptimizerConfig(lr=0.05, ema=0.9)
    poison: tuple[int, ...] = ()
    """Steps whose loss is not finite."""

    def task(self, trainer: Trainer) -> "LineTask":
        return LineTask(self, trainer)


class LineTask:
    """Least squares, with hooks that write down when they were called."""

    facts: ClassVar[dict[str, int]] = {"inputs": 3}

    def __init__(self, experiment: Line, trainer: Trainer) -> None:
        self.experiment, self.trainer = experiment, trainer
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.learner = trainer.learner(self.model, experiment.optimizer)
        self.called: list[int] = []

    def parts(self):
        return self.learner.parts()

    def loss(self, shard):
        index = shard.indices(len(DATA))
        error = (self.model(DATA[index]) - TARGETS[index]).square().mean()
        noise = shard.normal("noise", 2)
        assert noise.shape == (shard.count, 2)
        factor = math.nan if shard.step in self.experiment.poison else 1.0
        return error * factor + 0 * noise.mean(), {"noise": noise.mean()}

    def step(self, trainer: Trainer):
        return trainer.minimise(self.learner, self.loss, 16)

    def hooks(self, trainer: Trainer):
        return [Every(trainer.config.preview_every, self.hook)]

    def hook(self):
        self.called.append(self.trainer.step)
        return {"eval/steps": self.trainer.step}


def settings(**changes) -> TrainerConfig:
    return TrainerConfig(**({"steps": 20, "log_every": 5, "save_every": 5, "preview_every": 10} | changes))


def train(folder: Path, experiment: Line | None = None) -> tuple[Trainer, Run, int]:
    experiment = experiment or Line()
    trainer = Trainer(experiment, World())
    run = create("line", folder, "experiment: line\n")
    tracker = Tracker.start(experiment.tracking, run.folder, identity="x", name="x", group="x", settings={}, axes={})
    recorder = Recorder(run, tracker, Lines("line", experiment.trainer.steps))
    try:
        status = trainer.fit(run, recorder)
    finally:
        recorder.close()
    return trainer, run, status


def plain_loop(experiment: Line) -> nn.Linear:
    """The same training without any of our code but the order of the data."""
    from lab.seeding import shuffled

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=experiment.optimizer.lr, weight_decay=0.0)
    for step in range(experiment.trainer.steps):
        index = shuffled(experiment.trainer.seed, 64, 16 * step, 16)
        optimizer.zero_grad()
        (model(DATA[index]) - TARGETS[index]).square().mean().backward()
        optimizer.step()
    return model


def test_training_is_the_plain_loop(tmp_path: Path) -> None:
    trainer, _, status = train(tmp_path / "run")
    expected = plain_loop(Line())
    assert status == DONE
    torch.testing.assert_close(trainer.task.model.weight, expected.weight, rtol=1e-5, atol=1e-6)


def test_rows_hold_the_means_since_the_last_row_and_hooks_come_when_due(tmp_path: Path) -> None:
    trainer, run, _ = train(tmp_path / "run", Line(trainer=settings(steps=13, preview_every=6)))
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 6, 10, 12, 13]
    assert trainer.task.called == [6, 12, 13]
    every = Line(trainer=settings(steps=13, log_every=1))
    singles = [json.loads(line)["train/loss"] for line in train(tmp_path / "every", every)[1].metrics.read_text().splitlines()]
    assert rows[0]["train/loss"] == pytest.approx(sum(singles[:5]) / 5, rel=1e-12)
    assert rows[-1]["train/loss"] == pytest.approx(sum(singles[10:13]) / 3, rel=1e-12)


def test_accumulation_changes_nothing_but_memory(tmp_path: Path) -> None:
    whole, run, _ = train(tmp_path / "whole")
    parts, other, _ = train(tmp_path / "parts", Line(trainer=settings(accumulate=4)))
    torch.testing.assert_close(whole.task.model.weight, parts.task.model.weight, rtol=1e-5, atol=1e-6)
    for first, second in zip(run.rows(), other.rows(), strict=True):
        assert first["train/loss"] == pytest.approx(second["train/loss"], rel=1e-5)
        assert first["train/noise"] == pytest.approx(second["train/noise"], rel=1e-4, abs=1e-6)


def test_an_uneven_batch_is_refused() -> None:
    trainer = Trainer(Line(trainer=settings(accumulate=3)), World())
    with pytest.raises(UserError, match=r"batch of 16 cannot be cut into 1 \(processes\) x 3"):
        trainer.shards(16)


def test_shards_of_all_processes_and_micro_batches_make_up_the_batch() -> None:
    experiment = Line(trainer=settings(accumulate=2))
    single = Trainer(Line(), World()).shards(16)[0]
    pieces = []
    for rank in range(4):
        trainer = Trainer(experiment, World())
        trainer.world = World(rank=rank, size=4)
        pieces += trainer.shards(16)
    pieces.sort(key=lambda shard: shard.first)
    assert torch.equal(torch.cat([shard.indices(64) for shard in pieces]), single.indices(64))
    assert torch.equal(torch.cat([shard.normal("x", 3) for shard in pieces]), single.normal("x", 3))
    assert torch.equal(torch.cat([shard.uniform("x", 3) for shard in pieces]), single.uniform("x", 3))


def test_a_non_finite_update_is_skipped_and_counted(tmp_path: Path) -> None:
    experiment = Line(trainer=settings(log_every=1), poison=(3, 7))
    trainer, run, status = train(tmp_path / "run", experiment)
    rows = run.rows()
    assert status == DONE
    assert trainer.skipped == 2
    assert "train/loss" not in rows[3]
    assert rows[3]["train/skipped"] == 1
    assert rows[-1]["train/skipped"] == 2
    assert all(torch.isfinite(weight).all() for weight in trainer.task.model.parameters())
    assert trainer.task.learner.optimizer.state[trainer.task.model.weight]["step"] == 18


def test_too_many_skips_in_a_row_stop_with_advice(tmp_path: Path) -> None:
    experiment = Line(trainer=settings(max_skipped=3), poison=tuple(range(6, 20)))
    with pytest.raises(TrainingStopped, match=r"stopped at step 8: 3 updates in a row .* --optimizer.lr"):
        train(tmp_path / "run", experiment)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000000005"]


def test_who_asks_late_hears_of_the_same_updates_that_were_skipped(caplog) -> None:
    """As on a GPU, which is asked when a row or a checkpoint is due."""
    trainer = Trainer(Line(trainer=settings(max_skipped=3), poison=(1, 2, 4)), World())
    for _ in range(6):
        trainer.task.step(trainer)
        trainer.step += 1
    assert trainer.skipped_in_a_row == 0  # nobody has asked
    assert trainer.state_dict()["skipped"] == 3
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 2", "step 3", "step 5"]
    late = Trainer(Line(trainer=settings(max_skipped=3), poison=(1, 2, 3)), World())
    for _ in range(6):
        late.task.step(late)
        late.step += 1
    with pytest.raises(TrainingStopped, match=r"stopped at step 3: 3 updates in a row .* --step 4"):
        _ = late.skipped


def test_an_average_over_rows_leaves_out_what_was_not_measured() -> None:
    found = averages(
        [{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(math.nan), "lr": 0.5}, {"loss": torch.tensor(2.0)}], torch.device("cpu")
    )
    assert {name: float(value) for name, value in found.items()} == {"loss": 1.5, "lr": 0.5}


def test_the_gradient_is_clipped_to_its_norm() -> None:
    module = nn.Linear(3, 1)
    learner = Learner(module, OptimizerConfig(kind="sgd", lr=1.0, betas=(0.0, 0.0), clip_norm=0.5))
    before = copy.deepcopy(module)
    (100 * module(DATA).sum()).backward()
    norm = learner.gradient_norm()
    assert norm == pytest.approx(math.sqrt(sum(float(weight.grad.square().sum()) for weight in module.parameters())), rel=1e-6)
    learner.update(1.0, norm)
    moved = math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in zip(before.parameters(), module.parameters(), strict=True)))
    assert moved == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_module_is_judged_in_evaluation_mode_and_trained_in_training_mode(average: float) -> None:
    learner = Learner(nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)), OptimizerConfig(ema=average))
    with learner.judged() as judged:
        assert not judged.training
        assert not judged[1].training
        assert (judged is learner.module) == (average == 0)
    assert learner.module.training
    assert learner.module[1].training


def test_keeping_fewer_than_two_checkpoints_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        TrainerConfig(keep=1)


def test_a_full_disk_costs_only_the_checkpoints_of_that_time(tmp_path: Path, monkeypatch, caplog) -> None:
    from lab import checkpoint

    real, calls = checkpoint.save, []

    def save(root, step, *rest):
        calls.append(step)
        if step in (10, 15):
            raise OSError(28, "No space left on device")
        return real(root, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    _, run, status = train(tmp_path / "run", Line(trainer=settings(steps=25, milestones=0)))
    assert status == DONE
    assert calls == [5, 10, 15, 20, 25]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_000000020", "step_000000025"]


def test_the_last_step_that_cannot_be_saved_is_an_error(tmp_path: Path, monkeypatch) -> None:
    from lab import checkpoint

    def save(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(TrainingStopped, match=r"step 20 could not be saved .*No space left"):
        train(tmp_path / "run")


def test_milestones_wait_for_the_disk_with_the_next_checkpoint_and_before_it_is_seen(tmp_path: Path, monkeypatch) -> None:
    from lab import checkpoint

    flushed, seen = [], []
    real_flush, real_rename = checkpoint.flush, os.rename

    def rename(source, target):
        seen.append((Path(target), list(flushed)))
        real_rename(source, target)

    monkeypatch.setattr(checkpoint, "flush", lambda path: (flushed.append(path), real_flush(path)))
    monkeypatch.setattr(os, "rename", rename)
    _, run, _ = train(tmp_path / "run", Line(trainer=settings(steps=8, save_every=3, milestones=4)))  # after 2, 4, 6 and 8 steps
    committed = [(int(target.name[5:]), before) for target, before in seen if target.parent == run.checkpoints]
    assert [step for step, _ in committed] == [3, 6, 8]
    for step, before in committed:
        kept = [folder for folder in checkpoint.folders(run.milestones) if int(folder.name[5:]) <= step]
        files = [file for folder in kept for file in folder.iterdir()]
        assert len(files) == 3 * (step // 2)
        assert {*files, *kept, run.milestones, run.folder} <= set(before)
    for target, before in seen:
        if target.parent == run.milestones:  # nobody waited for it alone
            assert not [path for path in before if path.is_relative_to(run.milestones) and path.name == target.name]
    assert sum(path.parent.name == "step_000000002" for path in flushed) == 3


def test_a_milestone_that_somebody_deleted_does_not_stop_the_saves(tmp_path: Path, monkeypatch) -> None:
    from lab import checkpoint

    real = checkpoint.settle
    monkeypatch.setattr(checkpoint, "settle", lambda saved: ([shutil.rmtree(folder) for folder in saved[:1]], real(saved)))
    _, run, status = train(tmp_path / "run", Line(trainer=settings(milestones=2)))
    assert status == DONE
    assert checkpoint.folders(run.checkpoints)[0].name == "step_000000020"


def test_dropout_depends_on_seed_and_step_only() -> None:
    draws = []
    for first in (0, 5):
        trainer = Trainer(Line(trainer=settings(steps=10)), World())
        trainer.step = first
        seen: dict[int, torch.Tensor] = {}
        trainer.task.step = lambda inner, seen=seen: seen.update({inner.step: torch.rand(3)}) or {}
        trainer.fit()
        draws.append(seen)
    assert all(torch.equal(draws[0][step], draws[1][step]) for step in range(5, 10))
    assert not torch.equal(draws[0][0], draws[0][1])


def test_a_metric_is_averaged_over_the_steps_and_processes_that_had_it() -> None:
    """As when one process's game ended and another's did not."""
    windows = [Window(), Window()]
    for window, rows in zip(windows, ([{"loss": 1.0}, {"loss": 2.0, "return": 7.0}], [{"loss": 6.0}, {"loss": 7.0}]), strict=True):
        for row in rows:
            window.add(row)

    class Pair(World):
        def gather(self, value):
            other = windows[1].state_dict()
            return [value, {name: (float(total), other["counts"][name]) for name, total in other["sums"].items()}]

    assert windows[0].means(Pair()) == {"loss": 4.0, "return": 7.0}
    assert windows[0].means(World()) == {}


# Tasks of other shapes: two optimisers that take turns, and an environment inside a step


class TwoPlayers(LineTask):
    """A generator of one number against a critic, updated in turn: the shape of a GAN."""

    def __init__(self, experiment: Line, trainer: Trainer) -> None:
        super().__init__(experiment, trainer)
        self.critic_module = nn.Linear(1, 1)
        self.critic = trainer.learner(self.critic_module, OptimizerConfig(kind="sgd", lr=0.1, betas=(0.0, 0.0)))

    def parts(self):
        return self.learner.parts("generator_") | self.critic.parts("critic_")

    def critic_loss(self, shard):
        fake = self.model(DATA[shard.indices(len(DATA))]).detach()
        return self.critic_module(fake).mean() - self.critic_module(torch.ones_like(fake)).mean(), {}

    def generator_loss(self, shard):
        return -self.critic_module(self.model(DATA[shard.indices(len(DATA))])).mean(), {}

    def step(self, trainer: Trainer):
        metrics = {}
        for _ in range(2):
            metrics |= {f"critic_{name}": value for name, value in trainer.minimise(self.critic, self.critic_loss, 16).items()}
        return metrics | trainer.minimise(self.learner, self.generator_loss, 16)


class Walker(LineTask):
    """Acts in a little world every step and learns every third: the shape of a DQN."""

    def __init__(self, experiment: Line, trainer: Trainer) -> None:
        super().__init__(experiment, trainer)
        self.position, self.episodes = 0, 0

    def parts(self):
        return super().parts() | {"world": self}

    def state_dict(self):
        return {"position": self.position, "episodes": self.episodes}

    def load_state_dict(self, state):
        self.position, self.episodes = state["position"], state["episodes"]

    def step(self, trainer: Trainer):
        self.position += 1
        metrics: dict = {}
        if self.position == 4:
            self.position, self.episodes = 0, self.episodes + 1
            metrics = {"return": 4.0}
        if trainer.step % 3 == 0:
            metrics |= super().step(trainer)
        return metrics


@pytest.mark.parametrize("kind", [TwoPlayers, Walker])
def test_other_tasks_run_in_the_same_loop_and_resume_bit_identically(kind, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Line, "task", lambda self, trainer: kind(self, trainer))
    _, whole, _ = train(tmp_path / "whole")
    _, half, _ = train(tmp_path / "half", Line(trainer=settings(steps=10)))
    resumed = Trainer(Line(), World())
    length = resumed.resume(half)
    assert resumed.step == 10
    assert length == half.metrics.stat().st_size
    tracker = Tracker.start(TrackingConfig(mode="disabled"), half.folder, identity="x", name="x", group="x", settings={}, axes={})
    recorder = Recorder(half, tracker, Lines("line", 20))
    resumed.fit(half, recorder)
    recorder.close()
    assert half.metrics.read_bytes() == whole.metrics.read_bytes()
    last = "checkpoints/step_000000020"
    for path in (whole.folder / last).glob("*.safetensors"):
        assert (half.folder / last / path.name).read_bytes() == path.read_bytes(), path.name
    if kind is Walker:
        assert [row.get("train/return") for row in whole.rows()] == [4.0, 4.0, 4.0, 4.0]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, monkeypatch) -> None:
    _, run, _ = train(tmp_path / "run")
    monkeypatch.setattr(Line, "task", lambda self, trainer: TwoPlayers(self, trainer))
    with pytest.raises(UserError, match="cannot resume: the checkpoint holds ema, model, optimizer, trainer; this"):
        Trainer(Line(), World()).resume(run)


# Precision and compilation


def test_bf16_follows_fp32_and_keeps_weights_and_losses_in_fp32(tmp_path: Path) -> None:
    plain, _, _ = train(tmp_path / "fp32")
    half, run, _ = train(tmp_path / "bf16", Line(trainer=settings(precision="bf16")))
    assert half.task.model.weight.dtype == torch.float32
    assert not torch.equal(half.task.model.weight, plain.task.model.weight)
    torch.testing.assert_close(half.task.model.weight, plain.task.model.weight, rtol=0.05, atol=0.05)
    assert math.isfinite(run.rows()[-1]["train/loss"])


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights_under_the_same_names(tmp_path: Path) -> None:
    plain, _, _ = train(tmp_path / "plain")
    compiled, _, _ = train(tmp_path / "compiled", Line(trainer=settings(compile=True)))
    assert set(compiled.task.model.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(compiled.task.model.weight, plain.task.model.weight, rtol=1e-4, atol=1e-5)
