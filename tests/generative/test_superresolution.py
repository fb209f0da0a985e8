"""Super-resolution: scores against slow loops, resizing against Pillow, every term of the loss, and runs that go on exactly."""

import contextlib
import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from generative import model as families
from generative import superresolution as sr
from generative.model import EvaluationConfig, SamplingConfig
from generative.superresolution import SuperResolution, SuperResolutionConfig, SuperResolutionExperiment, SuperResolutionTask
from lab import checkpoint, classifier
from lab.config import UserError
from lab.data import DataConfig, Split, as_float
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.learner import Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer
from tests.scripts.test_scripts import call

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"factor": 2, "channels": 4, "blocks": 1, "critic": "nature"}
WORDS = """
    --data.name digits --data.image-size 16 --data.batch-size 8 --data.augment.shift 1 --model.factor 2 --model.channels 4 --model.blocks 1
    --model.critic nature --model.adversarial-after 2 --trainer.steps 6 --trainer.save-every 3 --trainer.log-every 1
    --trainer.preview-every 6 --trainer.threads 1 --tracking.mode disabled
""".split()  # noqa: SIM905


def network(channels: int = 1, side: int = 16, trained: bool = True, **changes) -> SuperResolution:
    torch.manual_seed(0)
    net = SuperResolution(SuperResolutionConfig(**(TINY | changes)), (channels, side, side), ("a",))
    if trained:  # as if: the untrained one is bicubic interpolation and nothing else
        nn.init.normal_(net.layers[-1].weight, std=0.1)
    return net


def pictures(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(*(shape or (5, 1, 16, 16)), generator=torch.Generator().manual_seed(seed))


def task(precision: str = "fp32", **changes) -> SuperResolutionTask:
    experiment = SuperResolutionExperiment(
        model=SuperResolutionConfig(**(TINY | changes)),
        data=DataConfig(name="digits", image_size=16, batch_size=8),
        trainer=TrainerConfig(steps=10, precision=precision),
    )
    made = Trainer(experiment, World()).task
    nn.init.normal_(made.model.layers[-1].weight, std=0.1)
    return made


def shard(step: int = 0, first: int = 0, count: int = 8) -> Shard:
    return Shard(first, count, 8, 0, step, torch.device("cpu"))


# Small and large


def by_pillow(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    plane = Image.fromarray(image[0].numpy(), mode="F")
    return torch.from_numpy(numpy.asarray(plane.resize(size[::-1], Image.Resampling.BICUBIC)).copy())[None]


@pytest.mark.parametrize("factor", [2, 4])
def test_resizing_is_pillows(factor: int) -> None:
    images = pictures(3, 1, 16, 24)
    expected = torch.stack([by_pillow(image, (16 // factor, 24 // factor)) for image in images])
    torch.testing.assert_close(sr.shrink(images, factor), expected.clamp(0, 1).mul(255).round() / 255, rtol=0, atol=1.01 / 255)
    assert (sr.shrink(images, factor) - expected.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-5
    large = torch.stack([by_pillow(image, (16 * factor, 24 * factor)) for image in images])
    torch.testing.assert_close(sr.bicubic(images, factor), large, rtol=0, atol=1e-5)


def test_small_pictures_hold_8_bit_values() -> None:
    small = sr.shrink((pictures() > 0.5).float(), 2)  # black beside white, where the cubic kernel overshoots
    assert torch.equal(small, (small * 255).round() / 255)
    assert float(small.min()) == 0
    assert float(small.max()) == 1


def test_nearest_repeats_pixels() -> None:
    images = pictures(2, 3, 4, 6)
    assert torch.equal(sr.nearest(images, 4), F.interpolate(images, scale_factor=4, mode="nearest"))


# Scores


def test_psnr_of_known_errors() -> None:
    images = pictures(3, 1, 12, 12)
    made = images.clone()
    made[1] += 0.1
    made[2, 0, 0, 0] += 1.0
    expected = torch.tensor([100.0, 20.0, 10 * math.log10(144)], dtype=torch.float64)
    torch.testing.assert_close(sr.psnr(made, images), expected, rtol=1e-5, atol=1e-5)


def slow_ssim(x: numpy.ndarray, y: numpy.ndarray) -> float:
    """Equation 13 of the paper, one window after another, on values from 0 to 255."""
    window = numpy.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    window /= window.sum()
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (each[top : top + 11, left : left + 11] for each in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append((2 * mean_a * mean_b + one) * (2 * both + two) / ((mean_a**2 + mean_b**2 + one) * (var_a + var_b + two)))
    return float(numpy.mean(values))


def test_ssim_is_the_papers() -> None:
    images = pictures(3, 2, 14, 17)
    made = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    made[2] = 1 - images[2]
    planes = [[slow_ssim(x.double().numpy() * 255, y.double().numpy() * 255) for x, y in zip(*each)] for each in zip(made, images)]
    torch.testing.assert_close(sr.ssim(made, images), torch.tensor(planes, dtype=torch.float64).mean(1), rtol=1e-9, atol=1e-9)
    assert sr.ssim(made, images)[2] < 0  # an inverted picture is the opposite


def test_ssim_of_the_same_and_of_flat_pictures() -> None:
    images = pictures(4, 1, 16, 16)
    torch.testing.assert_close(sr.ssim(images, images), torch.ones(4, dtype=torch.float64))
    black, white = torch.zeros(1, 1, 11, 11), torch.ones(1, 1, 11, 11)
    torch.testing.assert_close(sr.ssim(black, white), torch.tensor([1e-4 / (1 + 1e-4)], dtype=torch.float64))


def test_measured_scores_are_means_over_8_bit_pictures() -> None:
    net, images = network(), (pictures(7, 1, 16, 16) * 255).to(torch.uint8)
    scores = sr.measured(net, Split(images, torch.zeros(7, dtype=torch.long)), rows=3)
    x, means = as_float(images), {}
    small = F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1).mul(255).round() / 255
    for name, made in (("", net(small)), ("_bicubic", sr.bicubic(small, 2)), ("_nearest", F.interpolate(small, scale_factor=2))):
        made = made.detach().clamp(0, 1).mul(255).round() / 255
        means[f"psnr{name}"] = float(sr.psnr(made, x).mean())
        means[f"ssim{name}"] = float(sr.ssim(made, x).mean())
    assert scores == pytest.approx(means)


# The network


@pytest.mark.parametrize("factor", [2, 4])
def test_untrained_it_is_bicubic_interpolation(factor: int) -> None:
    small = pictures(2, 3, 6, 8)
    net = network(channels=3, trained=False, factor=factor)
    assert torch.equal(net(small), sr.bicubic(small, factor))


def test_any_size_is_enlarged_and_stays_in_range() -> None:
    net = network(factor=4)
    made = net.enlarge(pictures(2, 1, 5, 9))
    assert made.shape == (2, 1, 20, 36)
    assert 0 <= float(made.detach().min()) <= float(made.detach().max()) <= 1


def test_it_sees_pictures_one_by_one_and_places_alike() -> None:
    net = network().double()
    small = torch.zeros(2, 1, 24, 24, dtype=torch.float64)
    small[0, 0, 8:12, 8:12], small[1, 0, 10:14, 11:15] = pictures(4, 4).double(), pictures(4, 4).double()
    with torch.no_grad():
        here, there = net.layers(small)
        torch.testing.assert_close(net.layers(small[:1])[0], here)
    torch.testing.assert_close(here[:, 8:32, 8:32], there[:, 12:36, 14:38])


def test_pixels_of_a_fresh_doubling_begin_alike_and_then_differ() -> None:
    torch.manual_seed(0)
    double, maps = sr.Double(3), pictures(2, 3, 5, 6)
    coarse = F.silu(F.conv2d(maps, double[0].weight[::4], double[0].bias[::4], padding=1))
    torch.testing.assert_close(double(maps), F.interpolate(coarse, scale_factor=2))
    double(maps)[:, :, ::2].sum().backward()
    assert torch.equal(double[0].weight.grad[2::4], torch.zeros_like(double[0].weight[2::4]))  # the lower left pixel was not asked for
    assert double[0].weight.grad[0::4].abs().min() > 0


def test_a_factor_that_does_not_divide_the_images_is_refused() -> None:
    with pytest.raises(UserError, match=r"18 x 18 pixels cannot be divided by model\.factor 4"):
        network(side=18, factor=4)


def test_images_too_small_to_be_judged_are_refused() -> None:
    with pytest.raises(UserError, match=r"8 x 8 pixels are too few to judge by SSIM; give at least 11"):
        network(side=8, factor=2)


def test_noise_is_refused() -> None:
    net = network()
    assert net.latent == 0
    assert not net.conditional
    with pytest.raises(UserError, match=r"scripts/enlarge\.py"):
        net.generate(torch.zeros(1, 0), torch.zeros(1, dtype=torch.long), SamplingConfig())


# The loss


def parts(one: SuperResolutionTask, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model makes of images, and by how much the critic prefers the images."""
    made = one.model(sr.shrink(images, 2))
    return made, one.critic.module(images)[:, 0] - one.critic.module(made)[:, 0]


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    one = task(adversarial=0.3)
    loss, terms = one.loss(shard())
    made, margin = parts(one, images := one.batch(shard())[0])
    torch.testing.assert_close(terms["absolute"], (made - images).abs().mean())
    torch.testing.assert_close(terms["adversarial"], torch.log1p(margin.exp()).mean())  # falls as what was made seems more real
    torch.testing.assert_close(loss, terms["absolute"] + 0.3 * terms["adversarial"])


def test_the_critics_loss_rises_where_what_was_made_seems_more_real() -> None:
    one = task(penalty=3.0)
    loss, metrics = one.critic_loss(shard())
    _, margin = parts(one, images := one.batch(shard())[0])
    slopes = [torch.func.grad(lambda x: one.critic.module(x[None]).sum())(image).square().sum() for image in images]
    torch.testing.assert_close(metrics["slope"], torch.stack(slopes).mean())
    torch.testing.assert_close(loss, torch.log1p((-margin).exp()).mean() + 1.5 * metrics["slope"])
    assert float(metrics["accuracy"]) == float((margin > 0).double().mean())
    loss.backward()
    assert all(weight.grad is None for weight in one.model.parameters())


def test_the_networks_step_gives_the_critic_no_gradient_and_lets_it_learn_again() -> None:
    one = task()
    with one.critic.at_rest():
        one.loss(shard())[0].backward()
    assert all(weight.grad is None for weight in one.critic.module.parameters())
    assert all(weight.requires_grad for weight in one.critic.module.parameters())
    gradient = one.model.layers[-1].weight.grad.clone()
    one.model.zero_grad()
    one.loss(shard())[0].backward()
    torch.testing.assert_close(one.model.layers[-1].weight.grad, gradient)


def test_the_critic_joins_late_or_never() -> None:
    late, never = task(adversarial_after=5), task(adversarial=0.0)
    assert [late.criticised(step) for step in (0, 4, 5, 9)] == [False, False, True, True]
    assert set(late.loss(shard(4))[1]) == set(never.loss(shard(9))[1]) == {"absolute"}
    assert set(late.loss(shard(5))[1]) == {"absolute", "adversarial"}
    assert never.critic is None
    assert set(never.parts()) == {"model", "optimizer", "ema"}


def test_a_batch_in_parts_has_the_same_loss() -> None:
    one = task()
    for loss in (one.loss, one.critic_loss):
        halves = [loss(shard(first=first, count=4))[0] for first in (0, 4)]
        torch.testing.assert_close(loss(shard())[0], torch.stack(halves).mean())


def test_in_bf16_pictures_and_losses_stay_fp32() -> None:
    one = task("bf16")
    with torch.autocast("cpu", torch.bfloat16):
        assert one.model(pictures()).dtype == torch.float32
        assert one.loss(shard())[0].dtype == one.critic_loss(shard())[0].dtype == torch.float32


class Parabola(nn.Module):
    """D(x) = a |x|^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.a * images.square().flatten(1).sum(1, keepdim=True) / 2


@pytest.mark.parametrize("bf16", [False, True])
def test_the_squared_slope_and_its_gradient_are_those_of_a_parabola(bf16: bool) -> None:
    critic, images = Parabola(), pictures()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        slope = sr.squared_slope(critic, images)
    size = images.square().flatten(1).sum(1)
    torch.testing.assert_close(slope, 0.7**2 * size)
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), critic.a)[0], 2 * 0.7 * size.sum())
    assert not images.requires_grad


class Pyramid(nn.Module):
    """A network with two known maps."""

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [2 * images, F.avg_pool2d(images, 2) ** 2]


def test_the_perceptual_distance_is_the_mean_over_maps_and_scales() -> None:
    made, images = pictures().requires_grad_(), pictures(seed=4)
    distance = sr.perceptual_distance(Pyramid(), made, images)
    coarse = (F.avg_pool2d(made, 2) ** 2 - F.avg_pool2d(images, 2) ** 2) ** 2
    torch.testing.assert_close(distance, (4 * (made - images) ** 2).mean() / 2 + coarse.mean() / 2)
    assert torch.autograd.grad(distance, made)[0].abs().max() > 0


# Whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and with a classifier whose maps it compares."""
    folder = tmp_path_factory.mktemp("superresolution")
    with contextlib.chdir(folder):
        shared = ["--data.name", "digits", "--trainer.steps", "2", "--trainer.threads", "1", "--tracking.mode", "disabled"]
        call("train_classifier.py", *shared, "--data.image-size", "16", "--model.backbone", "small", "--run-dir", "eyes")
        call("train_classifier.py", *shared, "--data.image-size", "8", "--model.backbone", "small", "--run-dir", "other")
        call("train_superresolution.py", *WORDS, "--model.features", "eyes", "--run-dir", "run")
    return folder


@pytest.fixture
def inside(place: Path):
    with contextlib.chdir(place):
        yield place


def test_a_run_holds_every_term_of_its_loss(inside: Path) -> None:
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    config = SuperResolutionConfig()
    for row in rows:
        terms = row["train/absolute"] + config.adversarial * row.get("train/adversarial", 0) + config.perceptual * row["train/perceptual"]
        assert row["train/loss"] == pytest.approx(terms, rel=1e-5)
    assert ["train/critic_loss" in row for row in rows] == ["train/adversarial" in row for row in rows] == [False] * 2 + [True] * 4
    assert rows[-1]["eval/psnr"] > rows[-1]["eval/psnr_nearest"]
    assert Path("run/media/enlarged_000000006.png").exists()


def test_a_resumed_run_is_the_uninterrupted_one(inside: Path) -> None:
    schedule = ["--optimizer.schedule", "constant", "--optimizer.warmup-steps", "0"]
    call("train_superresolution.py", *WORDS, *schedule, "--model.features", "eyes", "--run-dir", "whole")
    call("train_superresolution.py", *WORDS, *schedule, "--model.features", "eyes", "--run-dir", "half", "--trainer.steps", "3")
    # Even where the classifier has changed since: its weights are in the checkpoint.
    eyes = classifier.load("eyes").model.body.state_dict()
    Path("eyes").rename("elsewhere")
    try:
        call("train_classifier.py", "elsewhere/config.yaml", "--trainer.seed", "1", "--run-dir", "eyes")
        assert not torch.equal(next(iter(classifier.load("eyes").model.body.state_dict().values())), next(iter(eyes.values())))
        call("train_superresolution.py", "--resume", "half", "--trainer.steps", "6")
    finally:
        for path in sorted(Path("eyes").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        Path("eyes").rmdir()
        Path("elsewhere").rename("eyes")
    one, two = (checkpoint.load(Path(run, "checkpoints/step_000000006")).parts for run in ("whole", "half"))
    expected = {"model", "optimizer", "ema", "critic_model", "critic_optimizer", "features", "trainer"}
    assert one.keys() == two.keys() == expected
    for name in ("model", "critic_model", "features"):
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name])
    critic = checkpoint.load(Path("whole/checkpoints/step_000000003")).parts["critic_model"]
    assert not all(torch.equal(one["critic_model"][key], critic[key]) for key in critic)
    last = [Path(run, "metrics.jsonl").read_text().splitlines()[-1] for run in ("whole", "half")]
    assert json.loads(last[0])["train/loss"] == json.loads(last[1])["train/loss"]


def test_a_trained_model_is_loaded_without_its_classifier_and_enlarges_the_same(inside: Path) -> None:
    Path("eyes").rename("away")
    try:
        loaded = families.load("run")
    finally:
        Path("away").rename("eyes")
    average = checkpoint.load(Path("run/checkpoints/step_000000006")).parts["ema"]["module"]
    net = SuperResolution(loaded.experiment.model, (1, 16, 16), loaded.model.classes)
    net.load_state_dict(average)
    small = pictures(2, 1, 8, 8)
    assert torch.allclose(loaded.model.enlarge(small), net.eval().enlarge(small), atol=1e-6)  # processors round by where weights lie
    data = loaded.experiment.dataset()
    scores = loaded.model.evaluate(data, EvaluationConfig(images=50))
    assert scores.pop("protocol") == "digits test, 50 images, 8 x 8 to 16 x 16 pixels, 8-bit values"
    assert scores == sr.measured(net, data.test.spread(50))


def test_a_classifier_of_other_images_is_refused(inside: Path) -> None:
    printed = call("train_superresolution.py", *WORDS, "--model.features", "other", "--run-dir", "x", expect=2)
    assert "model.features other: that classifier sees images of 1 x 8 x 8; train one on images of 1 x 16 x 16" in printed
    assert "no classifier run here" in call("train_superresolution.py", *WORDS, "--model.features", "nowhere", expect=2)


def test_it_learns_to_beat_bicubic_interpolation() -> None:
    experiment = SuperResolutionExperiment(
        model=SuperResolutionConfig(factor=2, channels=8, blocks=1, adversarial=0.0),
        data=DataConfig(name="digits", image_size=16, batch_size=16),
        trainer=TrainerConfig(steps=60),
        optimizer=OptimizerConfig(lr=5e-3, ema=0.9),
    )
    trainer = Trainer(experiment, World())
    trainer.fit()
    with trainer.task.learner.judged() as judged:
        scores = trainer.task.test(judged, 100)
    assert scores["psnr"] > scores["psnr_bicubic"] + 1
    assert scores["ssim"] > scores["ssim_bicubic"]


# enlarge.py


def pixels(path: str | Path) -> torch.Tensor:
    return torch.from_numpy(numpy.asarray(Image.open(path)).copy())


def test_enlarge_writes_what_the_model_makes(inside: Path) -> None:
    image = (pictures(9, 13) * 255).to(torch.uint8)
    Image.fromarray(image.numpy()).save("small.png")
    Image.fromarray(image.numpy()).convert("RGB").save("colour.png")
    assert "picture: run/media/small_2x.png" in call("enlarge.py", "run", "small.png")
    expected = families.load("run").model.enlarge(as_float(image)[None, None])[0, 0].mul(255).round().to(torch.uint8)
    assert torch.equal(pixels("run/media/small_2x.png"), expected)
    call("enlarge.py", "run", "colour.png", "--out", "large.png")
    assert torch.equal(pixels("large.png"), expected)
    printed = call("enlarge.py", "run", "small.png", "colour.png", "--out", "folder")
    assert "picture: folder/small_2x.png\npicture: folder/colour_2x.png" in printed


def test_enlarge_shows_test_images_in_four_rows(inside: Path) -> None:
    call("enlarge.py", "run", "--count", "3", "--out", "grid.png")
    shown = as_float(pixels("grid.png")[::2, ::2])
    assert shown.shape == (4 * 18 + 2, 3 * 18 + 2)
    loaded = families.load("run")
    images = as_float(loaded.experiment.dataset().test.spread(3).images)
    small = sr.shrink(images, 2)
    for row, made in enumerate((F.interpolate(small, scale_factor=2), sr.bicubic(small, 2), loaded.model.enlarge(small), images)):
        for column, image in enumerate(made):
            there = shown[2 + 18 * row : 18 + 18 * row, 2 + 18 * column : 18 + 18 * column]
            torch.testing.assert_close(there, image[0].clamp(0, 1), rtol=0, atol=0.51 / 255)


BAD_INPUT = [
    (["run", "small.txt"], "small.txt: cannot be read as a picture"),
    (["run", "huge.png"], "huge.png: 1000 x 1000 pixels are too many"),
    (["run", "deep.png"], "deep.png: it has more than 8 bits a pixel"),
    (["run", "a.png", "b.png", "--out", "one.png"], "2 pictures need a folder"),
    (["run", "a.png", "b/a.png"], "two of the pictures have one name"),
    (["run", "--out", "grid.gif"], "pictures are written as .png"),
    (["run", "--count", "0"], "show at least one test image"),
    (["eyes"], "eyes: a run of 'classifier'; expected superresolution"),
]


@pytest.mark.parametrize(("words", "expected"), BAD_INPUT)
def test_enlarge_answers_mistakes_in_one_sentence(inside: Path, words: list[str], expected: str) -> None:
    Path("small.txt").write_text("no picture")
    Image.new("L", (1000, 1000)).save("huge.png")
    Image.fromarray(numpy.full((4, 4), 40_000, dtype=numpy.uint16)).save("deep.png")
    printed = call("enlarge.py", *words, expect=2)
    assert expected in printed
    assert printed.startswith("error: ")
