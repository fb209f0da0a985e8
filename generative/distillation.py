"""A diffusion model taught to a student that needs a few steps: one to four in place of dozens.

Without chance, a sampler leads each noisy image to one clean image. The way there is cut into as many stretches as the student has
steps; a noisy image at the start of a stretch is led to its end by the teacher in many small steps, and the student learns to go
there in one,

    x_s = sigma_s / sigma_t x_t + (alpha_s - sigma_s alpha_t / sigma_t) x0        (DDIM's step, Song et al. 2021)

which says what its guess of x0 must be. In one step for the whole way this is Luhman & Luhman 2021 (arXiv:2101.02388), halving the
steps again and again it is progressive distillation (Salimans & Ho 2022, arXiv:2202.00512, whose target this is). Guidance of the
teacher becomes a part of the student, who then calls his network once a step.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from generative import diffusion
from generative import model as families
from generative.diffusion import Diffusion, DiffusionExperiment, precisely
from generative.model import EvaluationConfig, GeneratorExperiment, GeneratorTask, Loaded, SamplingConfig, spread_labels
from generative.processes import Moment, Process
from generative.samplers import Denoise, Point, Sampler, find
from lab import seeding
from lab.checkpoint import Stateful
from lab.config import Count, NonNegative, Settings, UserError, from_leaves, leaves
from lab.data import ImageSet
from lab.experiment import TrainerConfig
from lab.images import Shape
from lab.learner import Metrics, Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Settings):
    """The student."""

    steps: Count = 4
    """Steps of the student from noise to image."""
    teacher_steps: Count = 2
    """Steps of the teacher for each of the student's."""
    sampler: str = "auto"
    """The teacher's way to go; auto: midpoint for flow matching, else heun."""
    guidance: NonNegative = 1.0
    """Guidance of the teacher, which the student takes over for good."""


@dataclass(frozen=True, kw_only=True)
class DistillationExperiment(GeneratorExperiment):
    """Teach a diffusion model to a student that needs a few steps."""

    experiment: ClassVar[str] = "distillation"

    name: str = "distillation"
    """What to call it: the folder below runs/, and the group on W&B."""
    teacher: str = ""
    """Run of the diffusion model that is to be taught; the student begins as its copy."""
    trainer: TrainerConfig = TrainerConfig(steps=1200, precision="auto")
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, betas=(0.9, 0.99), schedule="cosine", warmup_steps=100, ema=0.998, clip_norm=1.0)
    model: DistillationConfig = DistillationConfig()

    def network(self, shape: Shape, classes: tuple[str, ...]) -> Student:
        """The student before the first lesson: a copy of the teacher."""
        return copied(self.model, cast(Diffusion, self.load_teacher(shape, classes).model))

    def load_teacher(self, shape: Shape, classes: tuple[str, ...]) -> Loaded:
        """The teacher.

        Raises:
            UserError: no run is named, or none of a diffusion model for such images.
        """
        if not self.teacher:
            raise UserError("teacher: name the run of a diffusion model, --teacher RUN, that the student is to learn from")
        found = families.load(self.teacher)
        if type(found.model) is not Diffusion:
            raise UserError(f"teacher: {self.teacher} is no run of scripts/train_diffusion.py, whose models alone can be distilled")
        if (found.model.shape, found.model.classes) != (shape, classes):
            raise UserError(f"teacher: {self.teacher} was trained on other images; set data as there")
        return found

    def rebuild(self, facts: Mapping[str, Any]) -> Student:
        """The student of a run, from what was noted down of the teacher's settings."""
        return copied(self.model, self.rebuild_teacher(facts))

    def rebuild_teacher(self, facts: Mapping[str, Any]) -> Diffusion:
        """The teacher's untrained model."""
        settings: DiffusionExperiment = from_leaves(diffusion.EXPERIMENT, facts["teacher"])
        return settings.rebuild(facts)

    def task(self, trainer: Trainer) -> DistillationTask:
        """Lessons."""
        return DistillationTask(self, trainer)


class Student(Diffusion):
    """A diffusion model that knows a few points of the way only, and one sampler."""

    knobs = frozenset()
    lesson: DistillationConfig

    def points(self, how: SamplingConfig) -> list[Point]:
        """The points it knows."""
        return fine_points(self.process, self.lesson)[:: self.lesson.teacher_steps]

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Not to be had."""
        raise UserError("a distilled model knows the way from noise to image only; encode with its teacher")

    def evaluate(self, data: ImageSet, config: EvaluationConfig) -> dict[str, float | str]:
        """Nothing: the bound is that of the teacher's steps."""
        return {}


def fine_points(process: Process, lesson: DistillationConfig) -> list[Point]:
    """The points at which the teacher stops."""
    return process.points(lesson.steps * lesson.teacher_steps)


def copied(lesson: DistillationConfig, teacher: Diffusion) -> Student:
    """A student with all that the teacher knows."""
    config = dataclasses.replace(teacher.config, sampler="ddim", steps=lesson.steps, guidance=1.0)
    student = Student(config, teacher.shape, teacher.classes, copy.deepcopy(teacher.coder))
    student.load_state_dict(teacher.state_dict())
    student.lesson = lesson
    return student


# The mathematics


def led(teacher: Denoise, sampler: Sampler, x: Tensor, points: Sequence[Point]) -> Tensor:
    """Where the teacher leads noisy images, from the first of some points to the last."""
    with precisely(x.device):
        *_, end = sampler(teacher, x, points, x.clone)
    return end


def told_by(x: Tensor, led: Tensor, start: Point, end: Point) -> Tensor:
    """The x0 with which one step of DDIM from `start` to `end` leads x to `led` (Salimans & Ho 2022, appendix G)."""
    keep = end.sigma / start.sigma
    return (led - keep * x) / (end.alpha - keep * start.alpha)


# Training


class DistillationTask(GeneratorTask):
    """Minimise the error of the student's guess at the start of each stretch of the way."""

    experiment: DistillationExperiment
    model: Student

    def build(self, trainer: Trainer) -> Student:
        """The student as a copy of the teacher, who stays beside."""
        if trainer.noted is not None:  # the teacher's weights are in the checkpoint
            self.facts |= {name: trainer.noted[name] for name in ("coder", "teacher")}
            teacher = self.experiment.rebuild_teacher(self.facts)
        else:
            found = self.experiment.load_teacher(self.data.shape, self.data.classes)
            self.facts |= {"coder": found.facts["coder"], "teacher": leaves(found.experiment)}
            teacher = cast(Diffusion, found.model)
        teacher.to(device=trainer.world.device, memory_format=trainer.layout)  # type: ignore[call-overload]
        self.teacher = teacher.eval().requires_grad_(False)
        return copied(self.experiment.model, self.teacher)

    def parts(self) -> Mapping[str, Stateful]:
        """The student's, and the teacher: a run that goes on needs nobody else's folder."""
        return {**super().parts(), "teacher": self.teacher}

    def loss(self, shard: Shard) -> tuple[Tensor, Metrics]:
        """The mean error of a shard; of the whole batch an equal part stands at the start of each stretch."""
        lesson, student = self.experiment.model, self.model
        images, labels = self.batch(shard)
        x0, noise = student.scaled(images, labels), shard.normal("noise", *student.inner)
        fine = fine_points(student.process, lesson)
        errors = []
        for index in range(lesson.steps):
            rows = slice((index - shard.first) % lesson.steps, None, lesson.steps)  # whose places in the batch leave `index`
            points = fine[index * lesson.teacher_steps : (index + 1) * lesson.teacher_steps + 1]
            errors.append(self.error(x0[rows], noise[rows], labels[rows], points))
        return torch.cat(errors).mean(), {}

    def error(self, x0: Tensor, noise: Tensor, labels: Tensor, points: Sequence[Point]) -> Tensor:
        """Squared error of what the student's network tells at the start of one stretch, (N,)."""
        lesson, student, start = self.experiment.model, self.model, points[0]
        x = start.alpha * x0 + start.sigma * noise
        with torch.no_grad():
            found = led(self.teacher.denoise(labels, lesson.guidance), self.sampler, x, points)
            target = told_by(x, found, start, points[-1])
        return student.missed(x, Moment.of(start, len(x), x.device), labels, target)[0]

    @property
    def sampler(self) -> Sampler:
        """The teacher's way to go."""
        usual = "midpoint" if self.teacher.config.process == "flow" else "heun"
        return find(usual if self.experiment.model.sampler == "auto" else self.experiment.model.sampler)

    @torch.no_grad()
    def test(self, model: Student, images: int) -> dict[str, float]:
        """The mean squared difference of the student's pictures from the teacher's, of the same noise."""
        labels = spread_labels(100, model.classes).to(self.data.train.labels.device)
        noise = torch.randn(100, model.latent, generator=seeding.generator(0, "judge/noise", 0)).to(labels.device)
        fine = fine_points(model.process, self.experiment.model)
        ours = model.generate(noise, labels, SamplingConfig())
        theirs = led(self.teacher.denoise(labels, self.experiment.model.guidance), self.sampler, model.start(noise), fine)
        return {"difference": float((ours - model.images_of(theirs)).square().mean())}


EXPERIMENT = DistillationExperiment()
