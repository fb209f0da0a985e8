"""Losses, penalties and networks of the GANs against formulas, loops and closed forms; their training against itself."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from generative import gan
from generative.gan import GAN, Critic, GANConfig, GANExperiment, GANTask
from generative.model import SamplingConfig, load
from lab import checkpoint
from lab.config import UserError
from lab.data import DataConfig, ImageSet, Split
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.learner import Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer
from tests.scripts.test_scripts import call

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, CLASSES = (1, 8, 8), ("a", "b", "c")
KINDS = ("hinge", "dcgan", "wgan_gp", "r3gan")
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(**changes) -> GANConfig:
    return GANConfig(**({"latent": 3, "channels": 8} | changes))


def painter(**changes) -> GAN:
    torch.manual_seed(0)
    return GAN(config(**changes), SHAPE, CLASSES)


def critic(classes: int = 3, **changes) -> Critic:
    torch.manual_seed(1)
    return Critic(config(**changes), SHAPE, classes)


def labels(count: int) -> Tensor:
    return torch.arange(count) % 3


# Losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CRITIC_TERMS: dict[str, Callable[[float, float], float]] = {
    "hinge": lambda real, fake: max(0, 1 - real) + max(0, 1 + fake),
    "dcgan": lambda real, fake: -math.log(sigmoid(real)) - math.log(1 - sigmoid(fake)),
    "wgan_gp": lambda real, fake: fake - real,
    "r3gan": lambda real, fake: -math.log(sigmoid(real - fake)),
}
GENERATOR_TERMS: dict[str, Callable[[float, float], float]] = {
    "hinge": lambda real, fake: -fake,
    "dcgan": lambda real, fake: -math.log(sigmoid(fake)),
    "wgan_gp": lambda real, fake: -fake,
    "r3gan": lambda real, fake: -math.log(sigmoid(fake - real)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_means_of_the_papers_terms(kind: str) -> None:
    real, fake = 2 * normal(9), 2 * normal(9, seed=5)
    pairs = list(zip(real.tolist(), fake.tolist(), strict=True))
    for mine, term in (
        (gan.CRITIC_LOSSES[kind](real, fake), CRITIC_TERMS[kind]),
        (gan.generator_loss(kind, real, fake), GENERATOR_TERMS[kind]),
    ):
        assert float(mine) == pytest.approx(sum(term(*pair) for pair in pairs) / 9, rel=1e-5)


# Penalties


class Plane(nn.Module):
    """D(x) = a x: its gradient is a, everywhere."""

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.slope = nn.Parameter(slope)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images.flatten(1) @ self.slope


class Bowl(nn.Module):
    """D(x) = |x|^2 / 2: its gradient at x is x."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images.square().flatten(1).sum(1) / 2


@pytest.mark.parametrize("kind", ["wgan_gp", "r3gan"])
def test_slopes_are_those_of_a_loop_over_the_images(kind: str) -> None:
    net, images, marks = critic(kind=kind), normal(5, *SHAPE), labels(5)
    expected = []
    for image, mark in zip(images, marks, strict=True):
        alone = image[None].clone().requires_grad_(True)
        net(alone, mark[None]).sum().backward()
        expected.append(float(alone.grad.norm()) ** 2)
    torch.testing.assert_close(gan.squared_slopes(net, images, marks), torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_the_gradient_penalty_of_a_plane_and_its_gradient_are_the_closed_forms() -> None:
    net, real, fake = Plane(normal(64, seed=6)), normal(5, *SHAPE), normal(5, *SHAPE, seed=7)
    penalty = gan.gradient_penalty(net, real, fake, labels(5), torch.rand(5))
    slope = net.slope.detach()
    torch.testing.assert_close(penalty, (slope.norm() - 1) ** 2)
    penalty.backward()
    torch.testing.assert_close(net.slope.grad, 2 * (slope.norm() - 1) * slope / slope.norm())


def test_the_gradient_penalty_looks_between_each_real_image_and_its_drawn_one() -> None:
    real, fake, u = normal(5, *SHAPE), normal(5, *SHAPE, seed=7), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    between = [float(share) * a + (1 - float(share)) * b for share, a, b in zip(u, real, fake, strict=True)]
    expected = sum((float(image.norm()) - 1) ** 2 for image in between) / 5
    assert float(gan.gradient_penalty(Bowl(), real, fake, labels(5), u).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_flat_critic_gets_a_penalty_of_one_and_no_nan() -> None:
    net = Plane(torch.zeros(64))
    penalty = gan.gradient_penalty(net, normal(5, *SHAPE), normal(5, *SHAPE), labels(5), torch.rand(5))
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(1, abs=1e-5)
    assert bool(net.slope.grad.isfinite().all())


def test_the_zero_centred_penalty_is_half_of_r1_and_r2() -> None:
    real, fake = normal(5, *SHAPE), normal(5, *SHAPE, seed=7)
    expected = sum(float(image.norm()) ** 2 for image in (*real, *fake)) / 5 / 2
    assert float(gan.zero_centred_penalty(Bowl(), real, fake, labels(5)).detach()) == pytest.approx(expected, rel=1e-5)
    net = Plane(normal(64, seed=6))
    gan.zero_centred_penalty(net, real, fake, labels(5)).backward()
    torch.testing.assert_close(net.slope.grad, 2 * net.slope.detach())


def test_penalties_are_computed_in_fp32_whatever_the_precision() -> None:
    net, images = critic(kind="r3gan"), normal(5, *SHAPE)
    plain = gan.squared_slopes(net, images, labels(5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gan.squared_slopes(net, images, labels(5)), plain)


def test_a_critic_with_attention_can_be_penalised() -> None:
    net = Critic(config(kind="r3gan", critic="vit"), SHAPE, 3)
    gan.squared_slopes(net, normal(2, *SHAPE), labels(2)).sum().backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in net.parameters() if weight.grad is not None)


def test_a_penalised_linear_critic_measures_the_distance_of_two_gaussians() -> None:
    """On N(3, 1) and N(0, 1), at distance d = 3, the best slope s of s d - w (s - 1)^2 is 1 + d / 2w."""
    net, weight = Plane(torch.zeros(1) + 0.5), 10.0
    real, fake = 3 + normal(4000, 1, 1, 1), normal(4000, 1, 1, 1, seed=8)
    distance = float(real.mean() - fake.mean())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for _ in range(60):
        penalty = gan.gradient_penalty(net, real, fake, labels(4000), torch.rand(4000))
        loss = gan.wasserstein(net(real, labels(4000)), net(fake, labels(4000))) + weight * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(net.slope.detach()) == pytest.approx(1 + distance / (2 * weight), rel=1e-4)
    assert -float(loss.detach()) == pytest.approx(distance + distance**2 / (4 * weight), rel=1e-4)


# Networks


@pytest.mark.parametrize("name", ["", "resnet_small", "convnext"])
def test_spectral_normalisation_holds_every_layer_at_one(name: str) -> None:
    net = critic(critic=name)
    for _ in range(200):
        gan.follow_spectra(net)
    matrices = [module.weight.detach().flatten(1) for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding)]
    assert len(matrices) > 5
    for matrix in matrices:
        assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(1, abs=0.03)


def test_power_iterations_happen_when_asked_for_and_never_in_a_pass() -> None:
    net, images = critic(), normal(2, *SHAPE)
    before = [buffer.clone() for buffer in net.buffers()]
    first, second = net(images, labels(2)), net(images, labels(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    gan.follow_spectra(net)
    assert not all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))


@pytest.mark.parametrize("name", ["small", "resnet_small", "resnet_preact", "xception", "vit", "lstm"])
@pytest.mark.parametrize("kind", ["hinge", "wgan_gp"])
def test_any_backbone_can_judge(name: str, kind: str) -> None:
    net = critic(kind=kind, critic=name)
    scores = net(normal(2, *SHAPE), labels(2))
    assert scores.shape == (2,)
    assert bool(scores.isfinite().all())
    assert not any(isinstance(module, nn.BatchNorm2d | nn.GroupNorm) for module in net.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_enters_the_critic_by_projection(kind: str) -> None:
    net, images = critic(kind=kind).eval(), normal(4, *SHAPE)
    told = [net(images, torch.full((4,), mark)) for mark in (0, 2)]
    vectors, table = net.features(images), net.embedding.weight
    torch.testing.assert_close(told[1] - told[0], vectors @ (table[2] - table[0]), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(told[0], vectors @ (table[0] + net.score.weight[0]) + net.score.bias, rtol=1e-4, atol=1e-5)
    untold = critic(classes=0, kind=kind)
    assert torch.equal(untold(images, labels(4)), untold(images, 2 - labels(4)))


@pytest.mark.parametrize("kind", ["hinge", "wgan_gp", "r3gan"])
def test_a_critic_judges_every_image_by_itself(kind: str) -> None:
    net, images = critic(kind=kind), normal(4, *SHAPE)
    alone = torch.cat([net(image[None], mark[None]) for image, mark in zip(images, labels(4), strict=True)])
    torch.testing.assert_close(net(images, labels(4)), alone, rtol=1e-4, atol=1e-6)


def test_blocks_without_normalisation_begin_by_adding_nothing() -> None:
    maps = normal(2, 8, 4, 4)
    block = gan.CriticBlock(8, 8, silent=True)
    assert torch.equal(block(maps), maps)
    down = gan.CriticBlock(8, 16, stride=2, silent=True)
    torch.testing.assert_close(down(maps), F.conv2d(F.avg_pool2d(maps, 2), down.shortcut[1].weight, down.shortcut[1].bias))
    up = gan.UpBlock(8, 4, 3, normalised=False)
    torch.testing.assert_close(up(maps, normal(2, 3)), up.shortcut(F.interpolate(maps, scale_factor=2.0)))


def test_the_style_scales_and_shifts_normalised_maps() -> None:
    maps, style = normal(2, 8, 4, 4), normal(2, 3)
    layer = gan.Styled(8, 3, normalised=True)
    bare = (maps - maps.mean((0, 2, 3), keepdim=True)) / (maps.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(maps, style), bare)
    nn.init.normal_(layer.affine.weight)
    scale, shift = (style @ layer.affine.weight.T).view(2, 2, 8, 1, 1).unbind(1)
    torch.testing.assert_close(layer(maps, style), bare * (1 + scale) + shift)


def test_dcgan_begins_and_normalises_as_its_paper_says() -> None:
    for net in (painter(kind="dcgan", channels=64, latent=32).painter, critic(kind="dcgan", channels=64).features):
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms
        assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}
        kernels = [module.weight.detach() for module in net.modules() if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000]
        assert all(float(kernel.std()) == pytest.approx(0.02, rel=0.05) for kernel in kernels)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_in_range_repeatable_and_each_by_itself(kind: str, conditional: bool) -> None:
    net = painter(kind=kind, conditional=conditional).eval()
    assert net.conditional == conditional
    first, again, other = (net.sample(6, labels(6), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (6, *SHAPE)
    assert 0 <= float(first.detach().min()) <= float(first.detach().max()) <= 1
    noise, how = normal(6, 3), SamplingConfig()
    alone = torch.cat([net.generate(noise[i : i + 1], labels(6)[i : i + 1], how) for i in range(6)])
    torch.testing.assert_close(net.generate(noise, labels(6), how), alone, rtol=1e-4, atol=1e-6)
    assert torch.equal(net.generate(noise, labels(6), how), net.generate(noise, (labels(6) + 1) % 3, how)) != conditional


def test_temperature_scales_the_noise() -> None:
    net, noise = painter().eval(), normal(4, 3)
    cooler = net.generate(noise, labels(4), SamplingConfig(temperature=0.5))
    assert torch.equal(cooler, net.generate(noise / 2, labels(4), SamplingConfig()))


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"10x8 is not a multiple of 4, set data\.image_size"):
        GAN(config(), (1, 10, 8), CLASSES)
    with pytest.raises(UserError, match="no backbone is called 'resnet_smal'"):
        critic(critic="resnet_smal")
    with pytest.raises(ValueError, match="multiple of 4"):
        GANConfig(channels=6)
    with pytest.raises(ValueError, match=r"critic_optimizer.ema: nobody samples from the critic"):
        GANExperiment(critic_optimizer=OptimizerConfig(ema=0.9))
    with pytest.raises(ValueError, match="needs gradients of gradients"):
        GANExperiment(model=GANConfig(kind="r3gan"), trainer=TrainerConfig(compile=True))


# Training


def experiment(**changes) -> GANExperiment:
    trainer = TrainerConfig(**({"steps": 6} | changes.pop("trainer", {})))
    return GANExperiment(model=config(**changes), data=DataConfig(name="digits", image_size=8, batch_size=8), trainer=trainer)


def task(**changes) -> GANTask:
    return Trainer(experiment(**changes), World()).task


def shard(step: int = 0) -> Shard:
    return Shard(0, 8, 8, 0, step, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tasks_losses_are_put_together_as_the_formulas_say(kind: str) -> None:
    one = task(kind=kind, critic_steps=3, penalty=2.0)
    later = dataclasses.replace(shard(), step=3 * 4 + 2)
    real, marks = one.scaled_batch(later)
    fake = one.model(later.normal("critic/noise", 3), marks).detach()
    expected = gan.CRITIC_LOSSES[kind](one.critic(real, marks), one.critic(fake, marks))
    if kind == "wgan_gp":
        expected = expected + 2 * gan.gradient_penalty(one.critic, real, fake, marks, later.uniform("critic/between"))
    if kind == "r3gan":
        expected = expected + 2 * gan.zero_centred_penalty(one.critic, real, fake, marks)
    loss, metrics = one.critic_loss(shard(step=4), turn=2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["real"] - metrics["fake"], one.critic(real, marks).mean() - one.critic(fake, marks).mean())
    real, marks = one.scaled_batch(shard(step=4))
    fake = one.model(shard(step=4).normal("noise", 3), marks)
    expected = gan.generator_loss(kind, one.critic(real, marks), one.critic(fake, marks))
    torch.testing.assert_close(one.loss(shard(step=4))[0], expected)


def test_images_reach_the_critic_on_the_scale_of_the_generator() -> None:
    one = task()
    images, marks = one.batch(shard())
    scaled, same = one.scaled_batch(shard())
    assert torch.equal(marks, same)
    assert (float(scaled.min()), float(scaled.max())) == (-1, 1)
    torch.testing.assert_close((scaled + 1) / 2, images)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_loss_moves_the_other_network(kind: str) -> None:
    one = task(kind=kind)
    one.critic_loss(shard())[0].backward()
    assert all(weight.grad is None for weight in one.model.parameters())
    assert all(weight.grad is not None for weight in one.critic.parameters())
    one.critic.zero_grad()
    one.loss(shard())[0].backward()
    assert all(weight.grad is not None for weight in one.model.parameters())
    assert all(weight.grad is None for weight in one.critic.parameters())
    assert all(weight.requires_grad for weight in one.critic.parameters())


def test_without_batch_normalisation_a_batch_in_parts_gives_the_same_run() -> None:
    whole, parts = (Trainer(experiment(kind="r3gan", trainer={"steps": 3, "accumulate": count}), World()) for count in (1, 2))
    whole.fit(), parts.fit()
    for network in ("model", "critic"):
        for mine, theirs in zip(getattr(whole.task, network).parameters(), getattr(parts.task, network).parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("changes", [{"critic_steps": 2}, {"kind": "dcgan"}, {"kind": "r3gan"}], ids=str)
def test_a_run_that_is_resumed_is_the_run_that_never_stopped(changes: dict, tmp_path: Path) -> None:
    whole = Trainer(experiment(**changes), World())
    whole.fit()
    first = Trainer(experiment(**changes), World())
    for _ in range(3):
        first._one_step([], None)
    checkpoint.save(tmp_path, first.step, first._parts(), {}, 2)
    second = Trainer(experiment(**changes), World())
    found = checkpoint.load_newest(tmp_path)
    checkpoint.restore(second._parts(), found.parts, found.segments)
    assert second.step == 3
    second.fit()
    for name in ("model", "critic"):
        mine, theirs = getattr(second.task, name).state_dict(), getattr(whole.task, name).state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    average, expected = second.task.learner.ema.module.state_dict(), whole.task.learner.ema.module.state_dict()
    assert all(torch.equal(average[key], expected[key]) for key in expected)


def greys() -> ImageSet:
    """Images of one grey each: dark ones of class a, bright ones of class b."""
    marks = torch.arange(256) % 2
    shades = 40 + 160 * marks + torch.randint(-20, 20, (256,), generator=torch.Generator().manual_seed(2))
    images = shades[:, None, None, None].expand(-1, 1, 4, 4).to(torch.uint8)
    return ImageSet("greys", ("dark", "bright"), Split(images, marks), Split(images, marks))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_what_the_classes_look_like(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GANExperiment, "dataset", lambda self: greys())
    optimizer = OptimizerConfig(kind="adam", lr=4e-3, betas=(0.0, 0.9), ema=0.95)
    small = GANConfig(kind=kind, latent=2, channels=8, penalty=1.0)
    trainer = Trainer(
        GANExperiment(
            model=small, optimizer=optimizer, critic_optimizer=dataclasses.replace(optimizer, ema=0.0),
            data=DataConfig(batch_size=32), trainer=TrainerConfig(steps=120),
        ),
        World(),
    )  # fmt: skip
    trainer.fit()
    with trainer.task.learner.judged() as model, torch.no_grad():
        pictures = model.sample(200, torch.arange(200) % 2, torch.Generator().manual_seed(0))
    dark, bright = float(pictures[::2].mean()), float(pictures[1::2].mean())
    assert dark == pytest.approx(40 / 255, abs=0.12)
    assert bright == pytest.approx(200 / 255, abs=0.12)


def test_a_trained_run_is_loaded_and_samples_the_same(tmp_path: Path) -> None:
    words = """
        --data.name digits --data.image-size 8 --data.batch-size 16 --model.channels 8 --model.latent 4 --trainer.steps 6
        --trainer.save-every 3 --tracking.mode disabled --trainer.threads 1
    """.split()  # noqa: SIM905
    with contextlib.chdir(tmp_path):
        call("train_gan.py", *words, "--run-dir", "run")
        loaded, again = load("run"), load("run/checkpoints/step_000000006")
    assert loaded.step == 6
    assert (tmp_path / "run/media/samples_000000006.png").is_file()
    pictures = [one.model.sample(4, torch.arange(4), torch.Generator().manual_seed(0)) for one in (loaded, again)]
    assert torch.equal(*pictures)
    whole = Trainer(loaded.experiment, World())
    whole.fit()
    with whole.task.learner.judged() as judged, torch.no_grad():
        trained = judged.sample(4, torch.arange(4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(trained, pictures[0], rtol=1e-4, atol=1e-5)  # its weights lie otherwise in memory
