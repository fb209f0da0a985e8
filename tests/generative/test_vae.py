"""The bounds of the VAE against closed forms and torch's own distributions."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from generative import vae
from generative.model import EvaluationConfig
from generative.networks import NetworkConfig
from generative.vae import VAE, VAEConfig, VAEExperiment, VAETask
from lab.config import UserError
from lab.data import DataConfig
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.learner import Shard
from lab.trainer import Trainer

SHAPE, CLASSES = (1, 8, 8), ("a", "b", "c")
SMALL = NetworkConfig(hidden=16)


def model(**changes) -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(**({"latent": 3, "network": SMALL} | changes)), SHAPE, CLASSES)


def pictures(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, *SHAPE, generator=generator), torch.arange(count) % 3


def normal(*shape: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Terms of the bound


def test_kl_is_that_of_torch_distributions() -> None:
    mean, log_std = normal(20, 6), normal(20, 6, seed=5)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(torch.zeros(20, 6), torch.ones(20, 6)))
    torch.testing.assert_close(vae.kl_to_standard_normal(mean, log_std), expected)


def test_log_normal_is_that_of_torch_distributions() -> None:
    x, mean, log_std = normal(20, 6), normal(20, 6, seed=5), normal(20, 6, seed=6)
    torch.testing.assert_close(vae.log_normal(x, mean, log_std), Normal(mean, log_std.exp()).log_prob(x))


def test_log_bernoulli_is_that_of_torch_distributions_and_sums_over_pixels() -> None:
    x, logits = (pictures()[0] > 0.5).float(), normal(5, *SHAPE)
    torch.testing.assert_close(vae.log_bernoulli(x, logits), Independent(Bernoulli(logits=logits), 3).log_prob(x))


def test_importance_weighted_bound_is_the_log_of_the_mean_weight() -> None:
    weights = normal(7, 4).double()
    torch.testing.assert_close(vae.importance_weighted(weights), weights.exp().mean(0).log())


@pytest.mark.parametrize("changes", [{}, {"likelihood": "gaussian"}, {"conditional": True}])
def test_log_weights_are_the_densities_of_torch_distributions(changes) -> None:
    net = model(**changes)
    images, labels = pictures()
    x, noise = net.observe(images, torch.full_like(images, 0.5)), normal(4, 5, 3)
    mean, log_std = net.posterior(x, labels)
    posterior, prior = Normal(mean, log_std.exp()), Normal(0.0, 1.0)
    expected = []
    for e in noise:
        z = mean + log_std.exp() * e
        decoded = net.decoder(z, labels)
        pixel = Bernoulli(logits=decoded) if net.config.likelihood == "bernoulli" else Normal(decoded, net.log_sigma.exp())
        expected.append(pixel.log_prob(x).flatten(1).sum(1) + prior.log_prob(z).sum(1) - posterior.log_prob(z).sum(1))
    torch.testing.assert_close(net.log_weights(x, labels, noise), torch.stack(expected), rtol=1e-5, atol=1e-3)


def test_importance_weighted_bound_with_one_sample_is_the_elbo() -> None:
    net = model()
    images, labels = pictures()
    x = (images > 0.5).float()
    noise = normal(1, 5, 3)
    likelihood, _ = net(x, labels, noise[0])
    mean, log_std = net.posterior(x, labels)
    z = mean + log_std.exp() * noise[0]
    sampled_kl = (Normal(mean, log_std.exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1)
    one = vae.importance_weighted(net.log_weights(x, labels, noise))
    torch.testing.assert_close(one, likelihood - sampled_kl, rtol=1e-5, atol=1e-4)
    # And over many samples the sampled KL becomes the closed form.
    many = net.log_weights(x, labels, normal(20_000, 5, 3, seed=8)).mean(0)
    parts = [net(x, labels, noise) for noise in normal(2000, 5, 3, seed=9)]
    closed = torch.stack([likelihood - kl.sum(1) for likelihood, kl in parts]).mean(0)
    torch.testing.assert_close(many, closed, rtol=0, atol=0.1)


# Against the exact marginal likelihood of a linear-Gaussian model


class Posterior(nn.Module):
    """The exact posterior of x = W z + b + noise, z standard normal, as mean and log std; exact only where W^T W is diagonal."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, sigma: float, widen: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias, self.sigma, self.widen = weight, bias, sigma, widen

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        precision = torch.eye(self.weight.shape[1], dtype=x.dtype) + self.weight.T @ self.weight / self.sigma**2
        covariance = torch.linalg.inv(precision)
        mean = (x.flatten(1) - self.bias) @ self.weight @ covariance.T / self.sigma**2
        log_std = 0.5 * covariance.diagonal().log() + self.widen
        return torch.cat([mean, log_std.expand_as(mean)], 1)


class Linear(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (z @ self.weight.T + self.bias).unflatten(1, SHAPE)


def linear_gaussian(widen: float = 0.0) -> tuple[VAE, torch.Tensor, torch.Tensor]:
    """A VAE that is linear and Gaussian, images drawn from it, and their exact log-likelihood under it."""
    net = model(likelihood="gaussian", sigma=0.3)
    # Orthogonal columns: the posterior is then a product over dimensions, as the encoder's is.
    weight = torch.linalg.qr(normal(64, 3))[0] * torch.tensor([0.5, 1.0, 2.0])
    bias = 0.1 * normal(64, seed=11)
    net.encoder, net.decoder = Posterior(weight, bias, 0.3, widen), Linear(weight, bias)
    x = (normal(50, 3, seed=12) @ weight.T + bias + 0.3 * normal(50, 64, seed=13)).unflatten(1, SHAPE)
    covariance = weight @ weight.T + 0.09 * torch.eye(64)
    exact = torch.distributions.MultivariateNormal(bias.double(), covariance.double()).log_prob(x.flatten(1).double())
    return net, x, exact


def test_the_bound_of_a_linear_gaussian_model_with_the_exact_posterior_is_its_marginal_likelihood() -> None:
    net, x, exact = linear_gaussian()
    labels = torch.zeros(50, dtype=torch.long)
    # log p(x, z) - log q(z|x) = log p(x) for every z: no sampling error at all.
    weights = net.log_weights(x, labels, normal(5, 50, 3, seed=14))
    torch.testing.assert_close(weights.double(), exact.expand(5, -1), rtol=0, atol=1e-3)
    elbo = torch.stack([likelihood - kl.sum(1) for likelihood, kl in (net(x, labels, noise) for noise in normal(4000, 50, 3, seed=15))])
    torch.testing.assert_close(elbo.mean(0).double().mean(), exact.mean(), rtol=0, atol=0.02)


def test_the_gap_of_the_bound_is_the_kl_to_the_exact_posterior() -> None:
    widen = 0.4
    net, x, exact = linear_gaussian(widen)
    labels = torch.zeros(50, dtype=torch.long)
    elbo = torch.stack([likelihood - kl.sum(1) for likelihood, kl in (net(x, labels, noise) for noise in normal(4000, 50, 3, seed=15))])
    gap = 3 * float(kl_divergence(Normal(0.0, math.exp(widen)), Normal(0.0, 1.0)))
    assert float(exact.mean() - elbo.double().mean()) == pytest.approx(gap, abs=0.02)


def test_the_importance_sampled_likelihood_tightens_with_k_and_comes_to_the_exact_one() -> None:
    net, x, exact = linear_gaussian(widen=0.4)
    labels = torch.zeros(50, dtype=torch.long)
    truth = -float(exact.mean())
    estimates = [vae.importance_sampled_nll(net, x, labels, samples, seed=0) for samples in (1, 5, 50, 2000)]
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[0] - truth > 0.2
    assert estimates[-1] == pytest.approx(truth, abs=0.01)


def test_the_importance_sampled_likelihood_does_not_depend_on_how_it_is_cut_up() -> None:
    net, x, _ = linear_gaussian(widen=0.2)
    labels = torch.zeros(50, dtype=torch.long)
    assert vae.importance_sampled_nll(net, x, labels, 30, seed=1, rows=50, chunk=30) == pytest.approx(
        vae.importance_sampled_nll(net, x, labels, 30, seed=1, rows=50, chunk=30), rel=0
    )
    pieces = vae.importance_sampled_nll(net, x, labels, 5000, seed=1, rows=7, chunk=64)
    assert pieces == pytest.approx(vae.importance_sampled_nll(net, x, labels, 5000, seed=1), abs=0.02)


# What the model sees


def test_binarised_pixels_are_white_as_often_as_they_are_bright() -> None:
    grey = torch.tensor([0.0, 0.1, 0.5, 1.0]).expand(100_000, 4)
    white = vae.binarise(grey, torch.rand(grey.shape, generator=torch.Generator().manual_seed(0)))
    assert set(white.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(white.mean(0), grey[0], rtol=0, atol=0.007)
    assert white[:, 0].max() == 0
    assert white[:, 3].min() == 1


def test_dequantised_pixels_fill_their_bins() -> None:
    values = torch.arange(256).float().div(255)
    low, high = vae.dequantise(values, torch.zeros(256)), vae.dequantise(values, torch.full((256,), 1 - 2**-24))
    torch.testing.assert_close(low, torch.arange(256) / 256)
    assert bool((high <= (torch.arange(256) + 1) / 256 + 1e-6).all())


# Training


def task(**changes) -> VAETask:
    config = VAEConfig(**({"latent": 3, "network": SMALL} | changes))
    experiment = VAEExperiment(model=config, data=DataConfig(name="digits", image_size=8, batch_size=8), trainer=TrainerConfig(steps=100))
    return Trainer(experiment, World()).task


def shard(step: int = 0) -> Shard:
    return Shard(0, 8, 8, 0, step, torch.device("cpu"))


def test_the_loss_is_the_negative_elbo_weighted_by_beta() -> None:
    loss, metrics = task().loss(shard())
    torch.testing.assert_close(loss, metrics["distortion"] + metrics["kl"])
    loss, metrics = task(beta=4.0).loss(shard())
    torch.testing.assert_close(loss, metrics["distortion"] + 4 * metrics["kl"])


def test_the_weight_of_the_kl_warms_up() -> None:
    warming = task(warmup_steps=10, beta=2.0)
    assert [warming.beta(step) for step in (0, 4, 9, 50)] == [0.2, 1.0, 2.0, 2.0]
    loss, metrics = warming.loss(shard(step=4))
    torch.testing.assert_close(loss, metrics["distortion"] + metrics["kl"])


def test_free_bits_cost_nothing_below_their_number() -> None:
    free = task(free_bits=100.0)
    loss, metrics = free.loss(shard())
    torch.testing.assert_close(loss, metrics["distortion"] + 300.0)
    loss.backward()
    plain = task()
    plain.loss(shard())[1]["distortion"].backward()
    for mine, theirs in zip(free.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_the_importance_weighted_loss_is_the_bound_of_its_samples() -> None:
    net = task(importance_samples=5)
    loss, _ = net.loss(shard())
    images, labels = net.batch(shard())
    x = net.model.observe(images, shard().uniform("pixels", 1, 8, 8))
    weights = net.model.log_weights(x, labels, shard().normal("codes", 5, 3).movedim(1, 0))
    torch.testing.assert_close(loss, -weights.double().exp().mean(0).log().mean().float(), rtol=1e-5, atol=1e-4)


def test_importance_samples_cannot_be_mixed_with_kl_weights() -> None:
    with pytest.raises(ValueError, match="no KL term to weigh"):
        VAEConfig(importance_samples=5, beta=2.0)


def test_the_same_seed_draws_the_same_picture_and_another_one_another() -> None:
    net = model()
    labels = torch.zeros(4, dtype=torch.long)
    first, again, other = (net.sample(4, labels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, *SHAPE)
    assert 0 <= float(first.detach().min()) <= float(first.detach().max()) <= 1


def test_labels_reach_a_conditional_model_and_only_that() -> None:
    noise = torch.zeros(2, 3)
    labels = torch.tensor([0, 1])
    plain, told = model().decode(noise, labels), model(conditional=True).decode(noise, labels)
    assert torch.equal(plain[0], plain[1])
    assert not torch.equal(told[0], told[1])


def test_convolutions_need_sizes_that_halve_twice() -> None:
    with pytest.raises(UserError, match=r"8x6 is not a multiple of 4"):
        VAE(VAEConfig(network=NetworkConfig(kind="conv")), (1, 8, 6), CLASSES)
    with pytest.raises(UserError, match="multiple of 8"):
        VAE(VAEConfig(network=NetworkConfig(kind="conv", channels=12)), SHAPE, CLASSES)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_every_network_rebuilds_the_shape_it_was_given(kind: str, conditional: bool) -> None:
    net = VAE(VAEConfig(latent=3, network=NetworkConfig(kind=kind, hidden=16, channels=8), conditional=conditional), (3, 12, 8), CLASSES)
    images, labels = torch.rand(2, 3, 12, 8), torch.tensor([0, 2])
    assert net.reconstruct(images, labels).shape == images.shape


def test_fixed_binarisation_never_changes_and_dynamic_does() -> None:
    config = EvaluationConfig(images=50)
    fixed, dynamic = task(binarisation="fixed"), task()
    assert set(fixed.data.train.images.unique().tolist()) == {0, 255}
    for one in (fixed, dynamic):
        first, _ = vae.observed(one.model, one.data.test, config)
        other, _ = vae.observed(one.model, one.data.test, dataclasses.replace(config, seed=1))
        assert torch.equal(first, other) == (one is fixed)


def test_evaluation_names_its_protocol_and_repeats_itself() -> None:
    one = task()
    config = EvaluationConfig(images=60, importance_samples=20)
    scores = one.model.eval().evaluate(one.data, config)
    assert scores["protocol"] == "digits test, 60 images, dynamic binarisation, K=20, seed 0"
    assert scores == one.model.evaluate(one.data, config)
    assert scores["nll"] < scores["bound"]
    assert scores["bound"] == pytest.approx(scores["distortion"] + scores["kl"])
