"""Distillation: the target against the step it must give, the teacher's lead against its closed form, a student without its teacher."""

import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from generative import distillation
from generative.diffusion import Diffusion, DiffusionConfig, NetworkConfig
from generative.distillation import DistillationConfig, DistillationExperiment, copied, fine_points, led, told_by
from generative.model import SamplingConfig, load
from generative.processes import DDPMConfig, EDMConfig, FlowMatchingConfig, Moment
from generative.samplers import find, follow
from lab.config import UserError
from tests.scripts.test_scripts import call

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = NetworkConfig(widths=(8, 16), heads=2, fold=2)
SHAPE, CLASSES = (1, 8, 8), ("a", "b", "c")
PROCESSES = {"ddpm": DDPMConfig(), "edm": EDMConfig(), "flow": FlowMatchingConfig()}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher(process: str, trained: bool = True) -> Diffusion:
    """A network that begins as nothing; `trained`: one that tells something."""
    torch.manual_seed(0)
    model = Diffusion(DiffusionConfig(process=process, network=SMALL, steps=8), SHAPE, CLASSES)
    if trained:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


@pytest.mark.parametrize("process", PROCESSES)
def test_the_target_is_what_makes_one_step_end_where_the_teacher_does(process: str) -> None:
    points = PROCESSES[process].points(4)
    for start, end in pairwise(points):
        x, goal = normal(2, *SHAPE).double(), normal(2, *SHAPE, seed=1).double()
        torch.testing.assert_close(follow(x, told_by(x, goal, start, end), start, end), goal)


def test_the_teacher_leads_where_its_equation_does() -> None:
    """An EDM network that tells nothing thinks x / (s^2 + 1): dx/ds = x s / (s^2 + 1), hence x grows as sqrt(s^2 + 1)."""
    model = teacher("edm", trained=False)
    labels, x = torch.zeros(2, dtype=torch.long), 0.2 * normal(2, *SHAPE)
    points = [point for point in model.process.points(400) if 0.5 < point.sigma < 3]
    shrunk = math.sqrt((points[-1].sigma ** 2 + 1) / (points[0].sigma ** 2 + 1))
    torch.testing.assert_close(led(model.denoise(labels, 1), find("heun"), x, points), shrunk * x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_student_begins_as_its_teacher_in_as_many_steps(process: str) -> None:
    taught = teacher(process)
    student = copied(DistillationConfig(steps=4, teacher_steps=2), taught)
    labels, noise = torch.tensor([0, 1]), normal(2, student.latent)
    assert len(student.points(SamplingConfig())) == 5
    if process != "edm":  # whose points depend on how many there are
        assert student.points(SamplingConfig()) == taught.process.points(4)
        alike = taught.generate(noise, labels, SamplingConfig(sampler="ddim", steps=4))
        assert student.generate(noise, labels, SamplingConfig()).equal(alike)


def make_task(**lesson):
    experiment = DistillationExperiment(model=DistillationConfig(**({"steps": 2, "teacher_steps": 2} | lesson)))
    task = object.__new__(distillation.DistillationTask)
    task.experiment, task.teacher = experiment, teacher("flow")
    task.model = copied(experiment.model, task.teacher)
    return task


def test_the_error_is_that_of_the_velocity_which_leads_along_the_stretch() -> None:
    """On a straight path the right output is the mean velocity over the stretch."""
    task = make_task()
    with torch.no_grad():
        next(iter(task.model.network.parameters())).add_(0.1)
    x0, noise, labels = normal(3, *SHAPE), normal(3, *SHAPE, seed=1), torch.tensor([0, 1, 2])
    fine = fine_points(task.model.process, task.experiment.model)
    for points in (fine[:3], fine[2:]):
        start, end = points[0], points[-1]
        x = start.alpha * x0 + start.sigma * noise
        with torch.no_grad():
            goal = led(task.teacher.denoise(labels, 1), find("midpoint"), x, points)
            velocity = (goal - x) / (end.sigma - start.sigma)
            told = task.model(x, Moment.of(start, 3, x.device), labels)
            expected = (told - velocity).square().flatten(1).mean(1)
        torch.testing.assert_close(task.error(x0, noise, labels, points), expected, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_student_alone() -> None:
    task = make_task()
    fine = fine_points(task.model.process, task.experiment.model)
    task.error(normal(3, *SHAPE), normal(3, *SHAPE, seed=1), torch.tensor([0, 1, 2]), fine[:3]).mean().backward()
    assert all(weight.grad is None for weight in task.teacher.parameters())
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in task.model.parameters())


TINY = """
    --data.name digits --data.image-size 8 --data.batch-size 32 --trainer.steps 30 --trainer.preview-every 30 --trainer.save-every 10
    --tracking.mode disabled --trainer.threads 1 --trainer.precision fp32
""".split()  # noqa: SIM905
NET = ["--model.network.widths", "8", "16", "--model.network.heads", "2"]


def test_a_student_outlives_its_teacher(tmp_path: Path) -> None:
    call("train_diffusion.py", *TINY, *NET, "--run-dir", str(tmp_path / "teacher"))
    lesson = ["--teacher", str(tmp_path / "teacher"), "--model.steps", "2", "--optimizer.lr", "2e-3"]
    call("train_distillation.py", *TINY, *lesson, "--run-dir", str(tmp_path / "student"))
    shutil.rmtree(tmp_path / "teacher")
    loaded = load(str(tmp_path / "student"))
    labels = torch.arange(4)
    first, again = (loaded.model.sample(4, labels, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.equal(again)
    assert first.shape == (4, 1, 8, 8)
    call("sample.py", str(tmp_path / "student"), "--count", "4", "--out", str(tmp_path / "grid.png"))
    assert (tmp_path / "grid.png").exists()


def test_lessons_bring_the_student_nearer_to_its_teacher() -> None:
    """One lesson again and again, of pure noise: the first step then leads where the teacher goes."""
    task = make_task()
    x0, noise, labels = normal(3, *SHAPE), normal(3, *SHAPE, seed=1), torch.tensor([0, 1, 2])
    points = fine_points(task.model.process, task.experiment.model)[:3]
    goal = led(task.teacher.denoise(labels, 1), find("midpoint"), noise, points)

    def distance() -> float:
        with torch.no_grad():
            return float((follow(noise, task.model.guess(noise, points[0], labels).x0, points[0], points[-1]) - goal).square().mean())

    before, optimizer = distance(), torch.optim.Adam(task.model.network.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task.error(x0, noise, labels, points).mean().backward()
        optimizer.step()
    assert distance() < 0.2 * before


def test_lessons_go_on_exactly_without_the_teachers_folder(tmp_path: Path) -> None:
    call("train_diffusion.py", *TINY, *NET, "--trainer.steps", "5", "--run-dir", str(tmp_path / "teacher"))
    lesson = ["--teacher", str(tmp_path / "teacher"), "--model.steps", "2", "--optimizer.schedule", "constant"]
    call("train_distillation.py", *TINY, *lesson, "--trainer.steps", "20", "--run-dir", str(tmp_path / "whole"))
    call("train_distillation.py", *TINY, *lesson, "--trainer.steps", "10", "--run-dir", str(tmp_path / "parts"))
    shutil.rmtree(tmp_path / "teacher")
    call("train_distillation.py", "--resume", str(tmp_path / "parts"), "--trainer.steps", "20")
    for part in ("model", "ema", "optimizer", "teacher"):
        whole, parts = (tmp_path / name / f"checkpoints/step_000000020/{part}.safetensors" for name in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), part


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "teacher: name the run of a diffusion model"), (["--teacher", "{vae}"], "no run of scripts/train_diffusion.py")],
)
def test_without_a_teacher_there_is_no_lesson(words, message, tmp_path: Path) -> None:
    call("train_vae.py", *TINY, "--run-dir", str(tmp_path / "vae"))
    words = [word.format(vae=tmp_path / "vae") for word in words]
    printed = call("train_distillation.py", *TINY, *words, "--run-dir", str(tmp_path / "student"), expect=2)
    assert message in " ".join(printed.split())


def test_a_student_does_not_encode() -> None:
    with pytest.raises(UserError, match="encode with its teacher"):
        make_task().model.encode(normal(1, *SHAPE), torch.tensor([0]))
