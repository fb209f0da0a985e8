"""Diffusion models: training, likelihood bound, guidance and editing, against closed forms and toys whose answer is known."""

import contextlib
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from generative import diffusion
from generative import model as families
from generative.diffusion import Diffusion, DiffusionConfig, DiffusionExperiment, DiffusionTask, NetworkConfig
from generative.model import EvaluationConfig, SamplingConfig
from generative.processes import DDPMConfig, EDMConfig, FlowMatchingConfig, Moment
from generative.samplers import Guess, Point
from lab.config import UserError
from lab.data import DataConfig, ImageSet, Split
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.launch import launch
from lab.learner import Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, CLASSES = (1, 8, 8), ("a", "b", "c")
SMALL = NetworkConfig(widths=(8, 16), heads=2)
CPU = torch.device("cpu")
KINDS = ["ddpm", "edm", "flow"]


def model(**changes) -> Diffusion:
    torch.manual_seed(0)
    net = Diffusion(DiffusionConfig(**({"network": SMALL} | changes)), SHAPE, CLASSES).eval().requires_grad_(False)
    for parameter in net.parameters():  # networks begin by telling zeros, which would hide much
        parameter += 0.1 * torch.randn(parameter.shape)
    return net


def pictures(count: int = 5) -> tuple[Tensor, Tensor]:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(3)), torch.arange(count) % 3


def normal(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """A network that tells what it is set to, and remembers what it was asked."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
        self.images, self.times, self.labels = images, times, labels
        return self.output


class Smooth:
    """The exact guess where every pixel of x0 is normal, with a mean of its own for each label."""

    def __init__(self, net: Diffusion, std: float = 0.3) -> None:
        self.means = 0.2 * normal(len(CLASSES) + 1, *net.inner, seed=9)
        self.variance = std**2

    def __call__(self, x: Tensor, point: Point, labels: Tensor) -> Guess:
        mean = self.means[labels]
        total = point.alpha**2 * self.variance + point.sigma**2
        return Guess(mean + point.alpha * self.variance / total * (x - point.alpha * mean))


def smooth(**changes) -> Diffusion:
    net = model(**changes)
    net.guess = Smooth(net)
    return net


# What the network tells

TOLD = [DDPMConfig(), DDPMConfig(prediction="x0"), DDPMConfig(prediction="epsilon", zero_snr=False), EDMConfig(), FlowMatchingConfig()]


def configured(process: DDPMConfig | EDMConfig | FlowMatchingConfig, **changes) -> Diffusion:
    kind = {DDPMConfig: "ddpm", EDMConfig: "edm", FlowMatchingConfig: "flow"}[type(process)]
    return model(process=kind, **{kind: process}, **changes)


@pytest.mark.parametrize("process", TOLD, ids=repr)
def test_the_right_output_gives_the_right_guess(process) -> None:
    net = configured(process)
    net.mean.fill_(0.4)
    net.scale.fill_(0.25)
    images, labels = pictures()
    x0, noise = net.scaled(images, labels), normal(5, *SHAPE)
    for point in process.points(6)[1:-1]:
        x = point.alpha * x0 + point.sigma * noise
        if isinstance(process, DDPMConfig):
            told = {"x0": x0, "epsilon": noise, "v": point.alpha * noise - point.sigma * x0}[process.prediction]
            shown = x
        elif isinstance(process, EDMConfig):
            root = math.sqrt(1 + point.sigma**2)
            told, shown = (point.sigma / root * x0 - noise / root), x / root
        else:
            told, shown = noise - x0, x
        net.network = Fixed(told)
        # With much noise in x, rounding x alone shifts x0.
        torch.testing.assert_close(net.guess(x, point, labels).x0, x0, rtol=1e-4, atol=2e-5 * (1 + point.sigma / point.alpha))
        torch.testing.assert_close(net.network.images, shown)
        torch.testing.assert_close(net.network.times, torch.full((5,), point.time))
        assert torch.equal(net.network.labels, labels)


def test_guesses_stay_between_black_and_white() -> None:
    net = model(process="edm")
    net.mean.fill_(0.3)
    net.scale.fill_(0.2)
    net.network = Fixed(100 * normal(5, *SHAPE))
    x0 = net.guess(normal(5, *SHAPE), Point(1.0, 2.0, 500.0), pictures()[1]).x0
    assert float(x0.min()) == pytest.approx(-0.3 / 0.2)
    assert float(x0.max()) == pytest.approx(0.7 / 0.2)
    assert set(net.images_of(x0).unique().tolist()) >= {0.0, 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_scaled_to_variance_1_where_the_process_wants_it(kind: str) -> None:
    net = model(process=kind)
    split = Split((pictures(50)[0] * 100).byte(), pictures(50)[1])
    net.fit_scale(split)
    x0 = net.scaled(split.images / 255, split.labels)
    torch.testing.assert_close(net.images_of(x0), split.images / 255)
    if kind == "ddpm":
        torch.testing.assert_close(x0, 2 * split.images / 255 - 1)
    else:
        assert float(x0.mean()) == pytest.approx(0, abs=1e-5)
        assert float(x0.std()) == pytest.approx(1, abs=1e-5)


# Training


def task(folder: Path | None = None, **changes) -> DiffusionTask:
    config = DiffusionConfig(**({"network": SMALL} | changes))
    data = DataConfig(name="digits", image_size=8, batch_size=16)
    return Trainer(DiffusionExperiment(model=config, data=data, trainer=TrainerConfig(steps=100)), World()).task


def shard(step: int = 0, first: int = 0, count: int = 16) -> Shard:
    return Shard(first, count, 16, 0, step, CPU)


@pytest.mark.parametrize("process", TOLD, ids=repr)
def test_the_loss_is_the_weighted_error_of_what_should_be_told(process) -> None:
    kind = {DDPMConfig: "ddpm", EDMConfig: "edm", FlowMatchingConfig: "flow"}[type(process)]
    one = task(process=kind, **{kind: process})
    images, labels = one.batch(shard())
    x0, noise = one.model.scaled(images, labels), shard().normal("noise", *SHAPE)
    moment = process.draw((shard().uniform("time") + torch.arange(16)) / 16)
    alpha, sigma = moment.alpha[:, None, None, None], moment.sigma[:, None, None, None]
    one.model.network = Fixed(wrong := normal(16, *SHAPE))
    loss, metrics = one.loss(shard())
    if kind == "ddpm":
        right = {"x0": x0, "epsilon": noise, "v": alpha * noise - sigma * x0}[process.prediction]
    else:
        right = noise - x0 if kind == "flow" else (sigma * x0 - noise) / (1 + sigma**2).sqrt()
    errors = (wrong - right).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, (process.weight(moment) * errors).mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(metrics["error"], errors.mean(), rtol=1e-3, atol=1e-4)


def test_the_loss_of_a_batch_is_the_mean_over_its_shards() -> None:
    one = task()
    parts = [one.loss(shard(first=first, count=4))[0] for first in (0, 4, 8, 12)]
    torch.testing.assert_close(torch.stack(parts).mean(), one.loss(shard())[0])


def test_some_images_are_trained_on_without_their_class() -> None:
    one = task(drop=0.25)
    one.model.network = Fixed(torch.zeros(16, *SHAPE))
    hidden, seen = [], 0
    for step in range(100):
        one.loss(shard(step))
        told, labels = one.model.network.labels, one.batch(shard(step))[1]
        hidden.append(told == 10)
        assert torch.equal(told[~hidden[-1]], labels[~hidden[-1]])
        seen += len(labels)
    share = float(torch.cat(hidden).float().mean())
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / seen))


def test_a_model_without_classes_is_told_none() -> None:
    one = task(conditional=False)
    one.model.network = Fixed(torch.zeros(16, *SHAPE))
    one.loss(shard())
    assert one.model.network.labels is None


# Learned variances


def learned(**changes) -> DDPMConfig:
    return DDPMConfig(**({"variance": "learned", "prediction": "v"} | changes))


def test_the_bound_trains_the_variance_and_nothing_else() -> None:
    one = task(process="ddpm", ddpm=learned(times=25))
    output = torch.cat([normal(16, *SHAPE), 0.3 * normal(16, *SHAPE, seed=5)], 1).requires_grad_()
    one.model.network = Fixed(output)
    loss, metrics = one.loss(shard())
    plain = task(process="ddpm", ddpm=DDPMConfig(times=25))
    plain.model.network = Fixed(mean := output.detach()[:, :1].clone().requires_grad_())
    expected, _ = plain.loss(shard())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(output.grad[:, :1], mean.grad)
    assert bool(output.grad.isfinite().all())
    # Of the 25 steps that 16 evenly spread moments hit, only the first one has no variance to learn.
    first = one.model.process.draw((shard().uniform("time") + torch.arange(16)) / 16).time == 0
    assert torch.equal(output.grad[:, 1:].flatten(1).abs().sum(1) > 0, ~first)
    assert bool(first.any())
    assert loss.item() != expected.item()
    torch.testing.assert_close(metrics["error"], plain.loss(shard())[1]["error"])


def test_the_variance_loss_is_the_sum_of_all_steps_in_bits() -> None:
    config = learned(times=50)
    images = 2 * pictures(50)[0] - 1
    guess = Guess(0.8 * images, torch.sigmoid(normal(50, *SHAPE)))
    moment = config.moments(torch.arange(50))
    total = 0.0
    for index in range(1, 50):
        mean, variance = posterior(config.alphas[index], config.alphas[index - 1], images[index], guess.x0[index], guess.fraction[index])
        total += float(kl_divergence(Normal(mean[0], variance[0].sqrt()), Normal(mean[1], variance[1].sqrt())).mean()) / math.log(2)
    assert float(diffusion.variance_loss(config, images, guess, moment)) == pytest.approx(total, rel=1e-3)


def posterior(alpha: Tensor, earlier: Tensor, x0: Tensor, guess: Tensor, fraction: Tensor, x: float = 0.4) -> tuple[list, list]:
    """Mean and variance of q(x_s | x_t, x0) and of p(x_s | x_t), written with betas (Nichol & Dhariwal 2021, equations 10, 11, 15)."""
    beta = 1 - (alpha / earlier) ** 2
    smallest = (1 - earlier**2) / (1 - alpha**2) * beta
    means = [earlier * beta / (1 - alpha**2) * each + (alpha / earlier) * (1 - earlier**2) / (1 - alpha**2) * x for each in (x0, guess)]
    between = torch.exp(fraction * beta.log() + (1 - fraction) * smallest.log())
    return [mean.double() for mean in means], [smallest.expand_as(between), between]


# Likelihood

DOUBLE = torch.float64


def moment_of(alpha: float, sigma: float) -> Moment:
    return Moment(*(torch.full((3,), number, dtype=DOUBLE) for number in (alpha, sigma, 0.0)))


@pytest.mark.parametrize("here", [(0.3, math.sqrt(0.91)), (0.0, 1.0), (1.0, 40.0), (0.5, 0.5)])
@pytest.mark.parametrize("there", [(0.8, 0.6), (1.0, 0.1), (0.9, 0.1)])
@pytest.mark.parametrize("spread", [0.0, 1.0, "each"])
def test_the_kl_of_a_step_is_that_of_torch_distributions(here, there, spread) -> None:
    x0, guess = normal(2, 3, *SHAPE).double()
    fraction = torch.rand(3, *SHAPE, dtype=DOUBLE) if spread == "each" else spread
    (alpha, sigma), (alpha_s, sigma_s) = here, there
    # q(x_t | x_s) = N(ratio x_s, step), q(x_s | x0) = N(alpha_s x0, sigma_s^2): the product is the posterior, by adding precisions.
    ratio, step = alpha / alpha_s, sigma**2 - (alpha / alpha_s * sigma_s) ** 2
    smallest = 1 / (1 / sigma_s**2 + ratio**2 / step)
    means = [smallest * (alpha_s * each / sigma_s**2 + ratio * 0.7 / step) for each in (x0, guess)]
    variance = torch.as_tensor(step, dtype=DOUBLE) ** fraction * torch.as_tensor(smallest, dtype=DOUBLE) ** (1 - fraction)
    expected = kl_divergence(Normal(means[0], math.sqrt(smallest)), Normal(means[1], variance.sqrt()))
    torch.testing.assert_close(diffusion.step_kl(x0, Guess(guess, fraction), moment_of(*here), moment_of(*there)), expected)


@pytest.mark.parametrize(
    ("alpha", "sigma", "largest"), [(0.0, 1.0, 1.0), (0.1, math.sqrt(0.99), 1.0), (1.0, 160.0, 160.0), (1.0, 3.0, 5.0)]
)
def test_the_kl_of_the_prior_is_that_of_torch_distributions(alpha: float, sigma: float, largest: float) -> None:
    x0 = normal(3, *SHAPE).double()
    expected = kl_divergence(Normal(alpha * x0, torch.tensor(sigma, dtype=DOUBLE)), Normal(torch.zeros_like(x0), largest))
    torch.testing.assert_close(diffusion.prior_kl(x0, Point(alpha, sigma, 0.0), largest), expected)


def test_the_shares_of_all_bytes_sum_to_1_and_are_those_of_a_normal_distribution() -> None:
    grey = torch.arange(256, dtype=DOUBLE) / 255
    mean, std = torch.tensor([-0.1, 0.0, 0.3, 0.997, 1.2], dtype=DOUBLE)[:, None], torch.tensor(0.07, dtype=DOUBLE)
    shares = diffusion.log_bytes(grey.expand(5, 256), mean, std).exp()
    torch.testing.assert_close(shares.sum(1), torch.ones(5, dtype=DOUBLE))
    edges = Normal(mean, std).cdf((torch.arange(257, dtype=DOUBLE) - 0.5) / 255)
    edges[:, 0], edges[:, -1] = 0, 1
    torch.testing.assert_close(shares, edges.diff(dim=1), rtol=1e-6, atol=3e-12)


class KnownPixels:
    """The exact guess where every pixel is a byte drawn from known probabilities: a sum over all 256."""

    def __init__(self, net: Diffusion, probabilities: Tensor) -> None:
        self.values = (torch.arange(256) / 255 - float(net.mean)) / float(net.scale)
        self.logits = probabilities.log()

    def __call__(self, x: Tensor, moment: Moment, labels: Tensor) -> Guess:
        distance = (x[..., None] - moment.alpha.view(-1, 1, 1, 1, 1) * self.values) / moment.sigma.view(-1, 1, 1, 1, 1)
        return Guess((torch.softmax(self.logits - 0.5 * distance**2, -1) * self.values).sum(-1))


def known_pixels(**changes) -> tuple[Diffusion, Split, float]:
    """A perfect model of pixels with known probabilities, images drawn from them, and the bits that these truly cost."""
    edges = Normal(0.45, 0.15).cdf((torch.arange(257) - 0.5) / 255)
    edges[0], edges[-1] = 0, 1
    probabilities = edges.diff().clamp(min=1e-12)
    grey = torch.multinomial(probabilities, 1000 * 9, replacement=True, generator=torch.Generator().manual_seed(1))
    split = Split(grey.view(1000, 1, 3, 3).byte(), torch.zeros(1000, dtype=torch.long))
    net = Diffusion(DiffusionConfig(**({"network": dataclasses.replace(SMALL, fold=1)} | changes)), (1, 3, 3), CLASSES)
    net.fit_scale(split)
    net.guess_at = KnownPixels(net, probabilities)
    return net, split, -float(probabilities[grey].double().log2().mean())


def quarter_of_a_byte() -> tuple[float, float]:
    """Of a byte seen with noise of a quarter of one, all being as likely: the bits left, and those of a normal density around the mean."""
    seen, values = 0.25 * normal(200_000).double(), torch.arange(-4, 5, dtype=DOUBLE)
    chances = torch.softmax(-0.5 * ((seen[:, None] - values) / 0.25) ** 2, 1)
    mean = (chances * values).sum(1)
    density = Normal(mean, 0.25)
    share = density.cdf(torch.tensor(0.5, dtype=DOUBLE)) - density.cdf(torch.tensor(-0.5, dtype=DOUBLE))
    return -float(chances[:, 4].log2().mean()), -float(share.log2().mean())


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_the_bound_of_a_perfect_model_is_the_true_likelihood(kind: str) -> None:
    net, split, truth = known_pixels(process=kind)
    found = diffusion.measured_bound(net, split, seed=0)
    # All but the last step tell what noise of a quarter of a byte leaves to know; the last one guesses a mean of bytes, not a byte.
    unknown, last = quarter_of_a_byte()
    assert found["prior_bits"] + found["step_bits"] == pytest.approx(truth - unknown, abs=0.015)
    assert found["last_bits"] == pytest.approx(last, abs=0.015)
    assert last - unknown < 0.1
    assert found["bits_per_dim"] == pytest.approx(found["prior_bits"] + found["step_bits"] + found["last_bits"])
    assert found == diffusion.measured_bound(net, split, seed=0)
    # A worse guess, a worse bound.
    perfect = net.guess_at
    net.guess_at = lambda *where: Guess(perfect(*where).x0 + 0.1)
    assert diffusion.measured_bound(net, split, seed=0)["bits_per_dim"] > truth + 0.5


@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_the_bound_of_ddpm_is_the_sum_over_all_its_steps(fraction: float) -> None:
    net, split, truth = known_pixels(process="ddpm", ddpm=DDPMConfig(times=50))
    perfect, alphas = net.guess_at, net.process.alphas
    net.guess_at = lambda *where: Guess(perfect(*where).x0, fraction)
    found = diffusion.measured_bound(net, split, seed=0)
    x0, labels, total = 2 * split.images.double() / 255 - 1, split.labels, 0.0
    for index in range(50):
        here = net.process.moments(torch.full((1000,), index))
        noise = normal(*x0.shape, seed=index)
        guess = perfect((alphas[index] * x0 + (1 - alphas[index] ** 2).sqrt() * noise).float(), here, labels).x0.double()
        if index:
            told = torch.tensor(fraction, dtype=DOUBLE)
            means, variances = posterior(alphas[index], alphas[index - 1], x0, guess, told)
            step = kl_divergence(*(Normal(mean, variance.sqrt()) for mean, variance in zip(means, variances, strict=True)))
        else:
            step = -diffusion.log_bytes(split.images / 255, (guess + 1) / 2, (1 - alphas[0] ** 2).sqrt() / alphas[0] / 2)
        total += float(step.mean()) / math.log(2)
    assert found["prior_bits"] == 0
    assert found["bits_per_dim"] == pytest.approx(total, abs=0.05)
    assert total > truth


def test_evaluation_names_its_protocol_and_works_for_short_chains() -> None:
    net = model(process="ddpm", ddpm=DDPMConfig(times=30))
    split = Split((255 * pictures(12)[0]).byte(), pictures(12)[1])
    scores = net.evaluate(ImageSet("toy", CLASSES, split, split), EvaluationConfig(images=7))
    assert scores["protocol"] == "toy test, 7 images, 20 of 30 steps for each, seed 0"
    assert scores["bits_per_dim"] > 0


# Guidance


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_guidance_goes_from_no_class_through_the_class_and_beyond(weight: float) -> None:
    net, point = model(), Point(0.6, 0.4, 400.0)
    x, labels = normal(3, *SHAPE), torch.tensor([0, 1, 2])
    told, untold = net.guess(x, point, labels).x0, net.guess(x, point, torch.full((3,), len(CLASSES))).x0
    torch.testing.assert_close(net.denoise(labels, weight)(x, point).x0, untold + weight * (told - untold), rtol=1e-4, atol=1e-5)
    assert float((told - untold).abs().max()) > 1e-3


def test_weight_1_is_the_plain_guess_and_others_cost_one_batch_of_both() -> None:
    net, point, labels = model(), Point(0.6, 0.4, 400.0), torch.tensor([0, 1, 2])
    x, batches = normal(3, *SHAPE), []
    net.network.register_forward_hook(lambda module, inputs, output: batches.append((len(inputs[0]), inputs[2].tolist())))
    assert torch.equal(net.denoise(labels, 1)(x, point).x0, net.guess(x, point, labels).x0)
    net.denoise(labels, 2.0)(x, point)
    assert batches == [(3, [0, 1, 2])] * 2 + [(6, [0, 1, 2, 3, 3, 3])]


def test_guidance_leaves_the_variance_to_the_class() -> None:
    net, labels, point = model(process="ddpm", ddpm=learned()), torch.tensor([0, 1]), Point(0.6, 0.8, 400.0)
    x = normal(2, *SHAPE)
    torch.testing.assert_close(net.denoise(labels, 2.0)(x, point).fraction, net.guess(x, point, labels).fraction)


def test_settings_of_the_model_count_where_none_are_given() -> None:
    noise, labels = normal(3, 64), torch.tensor([0, 1, 2])
    net = model(process="ddpm", guidance=2.0, sampler="ddim", steps=4)
    plain = model(process="ddpm")
    given = SamplingConfig(guidance=2.0, sampler="ddim", steps=4)
    assert torch.equal(net.generate(noise, labels, SamplingConfig()), plain.generate(noise, labels, given))
    assert [plain.sampler(SamplingConfig()), model(process="flow").sampler(SamplingConfig())] == ["unipc", "unipc"]


def test_unknown_samplers_are_refused_when_settings_are_made() -> None:
    with pytest.raises(UserError, match="did you mean dpmpp"):
        DiffusionConfig(sampler="dpmp")


# Sampling

HOW = [("ddpm", "ancestral"), ("ddpm", "dpmpp"), ("ddpm", "unipc"), ("edm", "heun"), ("flow", "midpoint"), ("flow", "ddim")]


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("kind", "sampler"), HOW)
def test_the_same_seed_draws_the_same_picture_and_another_one_another(kind: str, sampler: str) -> None:
    net, how, labels = model(process=kind), SamplingConfig(sampler=sampler, steps=4), torch.tensor([0, 1, 2])
    first, again, other = (net.sample(3, labels, seeded(seed), how) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, *SHAPE)
    assert 0 <= float(first.min()) < float(first.max()) <= 1


@pytest.mark.parametrize(("kind", "sampler"), HOW)
def test_rows_of_a_batch_do_not_know_of_each_other(kind: str, sampler: str) -> None:
    net, how, labels = model(process=kind), SamplingConfig(sampler=sampler, steps=4), torch.tensor([0, 1, 2, 0])
    noise = normal(4, 64)
    changed = noise.clone()
    changed[1] = 5.0
    both = [net.generate(each, labels, how, seeded()) for each in (noise, changed)]
    torch.testing.assert_close(both[0][[0, 2, 3]], both[1][[0, 2, 3]], rtol=0, atol=1e-5)
    assert not torch.equal(both[0][1], both[1][1])


@pytest.mark.parametrize(("kind", "sampler"), HOW)
def test_the_trajectory_ends_with_the_sample_and_begins_with_noise(kind: str, sampler: str) -> None:
    net, how, labels, noise = model(process=kind), SamplingConfig(sampler=sampler, steps=5), torch.tensor([0, 1]), normal(2, 64)
    passed = net.trajectory(noise, labels, how, seeded())
    assert len(passed) == 6
    assert torch.equal(passed[-1], net.generate(noise, labels, how, seeded()))
    torch.testing.assert_close(passed[0], (noise.view(2, *SHAPE) * 0.5 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "sampler"), HOW)
def test_inpainting_keeps_what_is_known_exactly_and_makes_up_the_rest(kind: str, sampler: str) -> None:
    net, how, (images, labels) = smooth(process=kind), SamplingConfig(sampler=sampler, steps=8), pictures()
    mask = torch.ones(1, 1, 8, 8)
    mask[..., 4:] = 0
    made = [net.inpaint(images, mask, normal(5, 64, seed=seed), labels, how, seeded(seed)) for seed in (1, 2)]
    assert all(torch.equal(each[..., :4], images[..., :4]) for each in made)
    assert float((made[0][..., 4:] - made[1][..., 4:]).abs().mean()) > 0.01
    # Pixels of the toy do not know of each other: the rest is drawn as if nothing were known.
    free = net.generate(normal(5, 64, seed=1), labels, how, seeded())
    torch.testing.assert_close(made[0][..., 4:], free[..., 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_variations_go_from_the_image_itself_to_a_new_one(kind: str) -> None:
    net, how, (images, labels), noise = smooth(process=kind), SamplingConfig(steps=10), pictures(), normal(5, 64)
    distances = []
    for strength in (0.0, 0.2, 0.5, 1.0):
        made = net.vary(images, strength, noise, labels, how, seeded())
        distances.append(float((made - images).abs().mean()))
    assert distances[0] == 0
    assert distances == sorted(distances)
    # From pure noise on nothing is left of the image.
    torch.testing.assert_close(made, net.generate(noise, labels, how, seeded()), rtol=0, atol=0.01)
    if kind == "flow":
        assert torch.equal(made, net.generate(noise, labels, how, seeded()))


@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_variations_begin_where_their_strength_says(strength: float) -> None:
    net, (images, labels), noise = smooth(process="flow"), pictures(), normal(5, 64)
    asked = []
    exact = net.guess
    net.guess = lambda x, point, told: asked.append((x, point)) or exact(x, point, told)
    net.vary(images, strength, noise, labels, SamplingConfig(steps=10, sampler="ddim"))
    x, point = asked[0]
    assert point.sigma == pytest.approx(strength)
    assert len(asked) == round(10 * strength)
    torch.testing.assert_close(x, (1 - strength) * (2 * images - 1) + strength * noise.view(5, *SHAPE))


@pytest.mark.parametrize("kind", KINDS)
def test_images_become_noise_and_come_back(kind: str) -> None:
    net = smooth(process=kind, sampler="ddim" if kind == "flow" else "dpmpp", steps=50)
    images, labels = (0.5 + 0.15 * normal(5, *SHAPE, seed=6)).clamp(0, 1), pictures()[1]
    codes = net.encode(images, labels)
    assert codes.shape == (5, 64)
    torch.testing.assert_close(net.decode(codes, labels), images, rtol=0, atol=0.03)
    # In the toy noise is the pixel's own distance from its mean, in standard deviations.
    expected = (net.scaled(images, labels) - net.guess.means[labels]) / 0.3
    torch.testing.assert_close(codes, expected.flatten(1), rtol=0, atol=0.15)


def test_samplers_that_reckon_in_logarithms_begin_a_hair_before_pure_noise() -> None:
    net = model(process="ddpm")
    first = {name: net.points(SamplingConfig(sampler=name, steps=5))[0] for name in ("ddim", "ancestral", "dpmpp", "unipc")}
    assert [first["ddim"].alpha, first["ancestral"].alpha] == [0, 0]
    assert first["dpmpp"] == first["unipc"] == Point(2**-12, math.sqrt(1 - 2**-24), 999.0)


# Through the trainer

NETWORKS = {
    "unet": {"kind": "unet", "widths": (8, 16), "heads": 2},
    "dit": {"kind": "dit", "width": 16, "layers": 1, "heads": 2, "patch": 4},
    "diffusers": {"kind": "diffusers", "widths": (8, 16), "heads": 2},
}


def experiment(kind: str, steps: int = 6, **changes) -> DiffusionExperiment:
    return DiffusionExperiment(
        model=DiffusionConfig(network=NetworkConfig(**NETWORKS[kind]), steps=3, **changes),
        data=DataConfig(name="digits", image_size=8, batch_size=16),
        trainer=TrainerConfig(steps=steps, save_every=3, preview_every=100, log_every=3),
        optimizer=OptimizerConfig(ema=0.5, warmup_steps=2),
    )


def train(default: DiffusionExperiment, *words: str) -> None:
    assert launch(default, "", ["--tracking.mode", "disabled", *words]) == 0


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize(("kind", "process"), [("unet", "flow"), ("dit", "edm"), ("diffusers", "ddpm")])
def test_every_network_learns_is_saved_and_samples_as_before(kind: str, process: str, conditional: bool, tmp_path: Path) -> None:
    settings = experiment(kind, process=process, conditional=conditional)
    trainer = Trainer(settings, World())
    assert trainer.fit() == 0
    with contextlib.chdir(tmp_path):
        train(settings, "--run-dir", "run")
    loaded = families.load(str(tmp_path / "run"))
    labels = torch.arange(4)
    with trainer.task.learner.judged() as judged:
        expected = judged.sample(4, labels, seeded())
    assert torch.equal(loaded.model.sample(4, labels, seeded()), expected)
    assert loaded.model.conditional == conditional
    differs = not torch.equal(loaded.model.sample(4, labels, seeded()), loaded.model.sample(4, labels + 1, seeded()))
    assert differs == conditional


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = experiment("unet")
    with contextlib.chdir(tmp_path):
        train(settings, "--run-dir", "whole")
        train(settings, "--run-dir", "parts", "--trainer.steps", "3")
        train(settings, "--resume", "parts", "--trainer.steps", "6")
    weights = [families.load(str(tmp_path / name)).model.state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training_lowers_the_loss_of_the_test_images() -> None:
    trainer = Trainer(experiment("unet", steps=40), World())
    losses = []
    for train in (True, False):
        with torch.no_grad():
            losses.append(trainer.task.test(trainer.task.model, 200)["loss"])
        if train:
            trainer.fit()
    assert losses[1] < 0.9 * losses[0]


def test_images_must_fit_the_network() -> None:
    with pytest.raises(UserError, match="no multiple of 3"):
        Diffusion(DiffusionConfig(network=dataclasses.replace(SMALL, fold=3)), SHAPE, CLASSES)
    with pytest.raises(UserError, match="would halve 28 pixels to a fraction"):
        Diffusion(DiffusionConfig(network=NetworkConfig(kind="diffusers", widths=(8, 8, 8, 8))), (1, 28, 28), CLASSES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": ()}, "unet needs widths"),
        ({"widths": (7, 8)}, r"multiples of 2, at least one; found \[7\]"),
        ({"kind": "diffusers", "widths": (20, 32)}, r"multiples of 8, at least one; found \[20\]"),
        ({"kind": "dit", "width": 30}, r"multiples of 4, at least one; found \[30\]"),
        ({"widths": (8, 18)}, "4 heads cannot share 18 channels evenly"),
    ],
)
def test_widths_that_no_network_can_have_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**settings)
