"""Flows: every map and every whole flow inverted, its log-determinant against autograd's Jacobian, its density against an integral."""

import json
import math

import pytest
import torch
from torch import nn

from generative import flow
from generative.flow import (
    EXPERIMENT,
    ActNorm,
    Bijection,
    Chain,
    Coupling,
    Curve,
    Flatten,
    Flow,
    FlowConfig,
    FlowExperiment,
    Fold,
    Leave,
    Logit,
    Mixing,
    dequantised,
    joined,
    measured_bits,
    part,
)
from generative.model import EvaluationConfig, SamplingConfig, load
from lab.config import UserError
from lab.data import DataConfig, Split
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.launch import launch
from lab.learner import Shard
from lab.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("nice", "realnvp", "glow")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(module: nn.Module, amount: float = 0.2) -> nn.Module:
    """In float64, with weights that are no special case."""
    torch.manual_seed(0)
    module.double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(amount * torch.randn_like(weight))
    return module.eval()


def jacobian(bijection, x):
    """log |det| of each row's Jacobian, by autograd."""
    found = []
    for row in x:
        matrix = torch.autograd.functional.jacobian(lambda r: bijection(r[None])[0].flatten(), row)
        found.append(torch.linalg.slogdet(matrix.reshape(row.numel(), row.numel()))[1])
    return torch.stack(found)


def whole(kind, shape=(1, 4, 4), **options) -> Flow:
    return stirred(Flow(FlowConfig(kind=kind, steps=2, hidden=8, **{"levels": 2} | options), shape, ("a", "b")))


def fitted_curve() -> Curve:
    curve = Curve(0.05)
    curve.fit(uniform(50, 2, 4, 4, seed=1) ** 3)
    return curve


MAPS = {
    "logit": (lambda: Logit(0.05), uniform(3, 2, 4, 4)),
    "curve": (fitted_curve, uniform(3, 2, 4, 4)),
    "fold": (lambda: Fold(), normal(3, 2, 4, 4)),
    "flatten": (lambda: Flatten((2, 4, 4)), normal(3, 2, 4, 4)),
    "actnorm": (lambda: ActNorm(2), normal(3, 2, 4, 4)),
    "mixing": (lambda: Mixing(4), normal(3, 4, 2, 2)),
    "channels": (lambda: Coupling(flow.convolutions(2, 8, 4), "channels", False, True), normal(3, 4, 2, 2)),
    "channels swapped": (lambda: Coupling(flow.convolutions(2, 8, 4), "channels", True, True), normal(3, 4, 2, 2)),
    "checkerboard": (lambda: Coupling(flow.convolutions(2, 8, 4), "checkerboard", False, True), normal(3, 1, 4, 4)),
    "checkerboard swapped": (lambda: Coupling(flow.convolutions(4, 8, 8), "checkerboard", True, True), normal(3, 2, 4, 4)),
    "additive": (lambda: Coupling(flow.perceptron(3, 8, 3), "parity", False, False), normal(3, 6)),
    "additive swapped": (lambda: Coupling(flow.perceptron(3, 8, 3), "parity", True, False), normal(3, 6)),
    "leave": (lambda: Leave(4, Chain([Mixing(2), Flatten((2, 2, 2))])), normal(3, 4, 2, 2)),
}


@pytest.mark.parametrize("name", MAPS)
def test_every_map_is_inverted_and_knows_its_jacobian(name):
    build, x = MAPS[name]
    bijection: Bijection = stirred(build())
    z, change = bijection(x)
    assert z.numel() == x.numel()
    assert (name in ("fold", "flatten")) or not torch.allclose(z.flatten(), x.flatten())
    torch.testing.assert_close(bijection.inverse(z), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(change, jacobian(bijection, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "options"), [((1, 4, 4), {}), ((2, 4, 4), {"pixels": "logit"}), ((1, 4, 8), {"conditional": True})])
def test_a_whole_flow_is_inverted_and_knows_its_jacobian(kind, shape, options):
    model, x, labels = whole(kind, shape, **options), uniform(3, *shape), torch.tensor([0, 1, 1])
    noise, change = model.to_noise(x, labels)
    assert noise.shape == (3, math.prod(shape))
    torch.testing.assert_close(model.from_noise(noise, labels), x, rtol=1e-8, atol=1e-8)
    each = [jacobian(lambda row: model.to_noise(row, label[None]), x[i : i + 1]) for i, label in enumerate(labels)]
    torch.testing.assert_close(change, torch.cat(each), rtol=1e-8, atol=1e-8)
    expected = change + torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(1)
    torch.testing.assert_close(model(x, labels), expected)
    torch.testing.assert_close(model.bits_per_dim(x, labels), 8 - expected / math.prod(shape) / math.log(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pixels", ["curve", "logit"])
def test_in_single_precision_images_of_28_pixels_come_back(kind, pixels):
    model = Flow(FlowConfig(kind=kind, steps=3, hidden=16, pixels=pixels), (1, 28, 28), ())
    values = torch.randint(256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    values *= torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.3  # mostly black, as digits are
    images, labels = values / 255, torch.zeros(4, dtype=torch.long)
    model.fit(dequantised(images, torch.full_like(images, 0.5)))
    with torch.no_grad():
        assert ((model.decode(model.encode(images, labels), labels) * 255).round() == values).all()


# The density


@pytest.mark.parametrize("pixels", ["curve", "logit"])
def test_the_density_of_two_pixels_integrates_to_one(pixels):
    model = whole("nice", (1, 1, 2), pixels=pixels, alpha=0.05)
    edges = (torch.arange(512, dtype=torch.float64) + 0.5) / 512
    grid = torch.cartesian_prod(edges, edges).view(-1, 1, 1, 2)
    with torch.no_grad():
        density = model(grid, torch.zeros(len(grid), dtype=torch.long)).exp()
    # A logit ends at logit(1 - alpha): what the normal has beyond that belongs to no pixel.
    assert density.mean().item() == pytest.approx(1, abs=2e-3 if pixels == "curve" else 5e-3)


def test_the_densities_of_two_classes_are_two_densities():
    model = whole("nice", (1, 1, 2), conditional=True)
    with torch.no_grad():
        model.prior.weight.copy_(torch.tensor([[0.5, -0.5, 0.1, 0.0], [-1.0, 0.2, -0.3, 0.2]]))
    edges = (torch.arange(512, dtype=torch.float64) + 0.5) / 512
    grid = torch.cartesian_prod(edges, edges).view(-1, 1, 1, 2)
    with torch.no_grad():
        first, second = (model(grid, torch.full((len(grid),), label)).exp() for label in (0, 1))
    assert first.mean().item() == pytest.approx(1, abs=3e-3)
    assert second.mean().item() == pytest.approx(1, abs=3e-3)
    assert (first - second).abs().mean() > 0.1


def test_before_training_a_flow_of_logits_is_their_normal_density():
    """Couplings begin additive with zero shift: NICE is then the logit of the pixels under a normal density."""
    model = Flow(FlowConfig(kind="nice", steps=2, hidden=4, pixels="logit", alpha=0.05), (1, 2, 2), ()).double()
    x = uniform(5, 1, 2, 2)
    inner = 0.05 + 0.9 * x
    density = torch.distributions.Normal(0.0, 1.0).log_prob(torch.logit(inner)) + math.log(0.9) - (inner * (1 - inner)).log()
    torch.testing.assert_close(model(x, torch.zeros(5, dtype=torch.long)), density.flatten(1).sum(1))


def test_before_training_a_flow_of_curves_is_the_histogram():
    """Each pixel for itself, with the grey values as often as they were: the bits are the cross-entropy with the histogram."""
    values = torch.tensor([0, 0, 0, 0, 0, 7, 128, 255]).view(2, 1, 2, 2)
    model = Flow(FlowConfig(kind="nice", steps=2, hidden=4, alpha=0.05), (1, 2, 2), ()).double()
    model.fit(dequantised(values / 255, uniform(2, 1, 2, 2)))
    share = {0: 5 / 8, 7: 1 / 8, 128: 1 / 8, 255: 1 / 8}
    expected = [-sum(math.log2(0.95 * share[int(k)] + 0.05 / 256) for k in image.flatten()) / 4 for image in values]
    bits = model.bits_per_dim(dequantised(values / 255, uniform(2, 1, 2, 2, seed=5)), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(bits, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_noise_of_the_last_level_comes_first_and_the_prior_moves_only_that():
    model = whole("glow", (1, 8, 8), conditional=True)
    model.prior.weight.data.copy_(normal(2, 64))
    x = uniform(2, 1, 8, 8)
    first, second = (model.to_noise(x, torch.full((2,), label))[0] for label in (0, 1))
    assert first.shape == (2, 64)
    assert (first[:, :32] != second[:, :32]).all()
    assert first[:, 32:].equal(second[:, 32:])


# The maps


def test_the_curve_makes_grey_values_of_any_distribution_normal():
    x = dequantised((uniform(200, 1, 28, 28) ** 6 * 255).floor() / 255, uniform(200, 1, 28, 28, seed=1)).float()
    curve = Curve(0.001)
    curve.fit(x)
    z = curve(x)[0].flatten().sort().values.double()
    expected = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z))
    torch.testing.assert_close(z[1000:-1000], expected[1000:-1000], rtol=0, atol=0.02)
    assert bool((curve.share > 0).all())
    assert float(curve.share.sum()) == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, 1 - 2**-24, 1.0])
def test_the_ends_of_the_grey_range_are_finite(value):
    curve = Curve(0.05)
    curve.fit(torch.zeros(1, 1, 4, 4))
    z, change = curve(torch.full((1, 1, 4, 4), value))
    assert bool(z.isfinite().all() and change.isfinite().all())
    torch.testing.assert_close(curve.inverse(z), torch.full((1, 1, 4, 4), value), rtol=0, atol=1e-3)
    far = curve.inverse(torch.tensor([[-50.0, 50.0]]))
    assert far.tolist() == [[0.0, 1.0]]


def test_halves_are_the_ones_they_say():
    board = torch.arange(16.0).view(1, 1, 4, 4)
    black, white = part(board, "checkerboard")
    rows, columns = board.long() // 4, board.long() % 4
    assert sorted(black.flatten().tolist()) == board[(rows + columns) % 2 == 0].tolist()
    assert sorted(white.flatten().tolist()) == board[(rows + columns) % 2 == 1].tolist()
    assert joined(black, white, "checkerboard").equal(board)
    even, odd = part(torch.arange(6.0)[None], "parity")
    assert (even.tolist(), odd.tolist()) == ([[0, 2, 4]], [[1, 3, 5]])


def test_neighbours_of_a_board_stay_neighbours_when_it_is_parted():
    """Both halves lie so that a place (row, column) of either comes from the 2x2 places there."""
    board = torch.arange(64.0).view(1, 1, 8, 8)
    for half in part(board, "checkerboard"):
        assert ((half // 8 // 2).long() == torch.arange(4).view(4, 1)).all()
        assert ((half % 8 // 2).long() == torch.arange(4)).all()


@pytest.mark.parametrize("swapped", [False, True])
def test_a_coupling_leaves_one_half_as_it_is(swapped):
    coupling = stirred(Coupling(flow.convolutions(2, 8, 4), "channels", swapped, True))
    x = normal(2, 4, 3, 3)
    z, change = coupling(x)
    still, moved = (slice(2, 4), slice(0, 2)) if swapped else (slice(0, 2), slice(2, 4))
    assert z[:, still].equal(x[:, still])
    assert (z[:, moved] != x[:, moved]).all()
    assert (change != 0).all()


def test_a_coupling_cannot_stretch_without_bound():
    coupling = Coupling(flow.convolutions(2, 8, 4), "channels", False, True).double()
    with torch.no_grad():
        coupling.network[-1].bias[2:] = torch.tensor([1e4, -1e4])  # of the raw scales
    z, change = coupling(normal(2, 4, 3, 3))
    assert z.isfinite().all()
    scale = (z / normal(2, 4, 3, 3))[:, 2:].log()
    torch.testing.assert_close(scale[:, 0], torch.full_like(scale[:, 0], flow.LARGEST))
    torch.testing.assert_close(scale[:, 1], torch.full_like(scale[:, 1], -flow.LARGEST))
    torch.testing.assert_close(change, torch.zeros_like(change))


def test_an_actnorm_that_was_fitted_gives_mean_zero_and_variance_one():
    x = 3 + 2 * normal(50, 2, 5, 5).float()
    norm = ActNorm(2)
    norm.fit(x)
    rows = norm(x)[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.std(1), torch.ones(2), atol=2e-3, rtol=0)


def test_fitting_reaches_every_normalisation_in_turn_and_ends():
    model, x = Flow(FlowConfig(kind="glow", steps=2, hidden=8), (1, 8, 8), ()), uniform(64, 1, 8, 8).float() ** 2
    stirred(model).float()
    model.fit(x)
    met = {}
    for norm in (module for module in model.modules() if isinstance(module, ActNorm)):
        norm.register_forward_hook(lambda module, _, result: met.__setitem__(module, result[0]))
    model.to_noise(x, torch.zeros(64, dtype=torch.long))
    assert len(met) == 4
    for norm, out in met.items():
        assert not norm.fitting
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(out.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(out.shape[1]), atol=5e-3, rtol=0)


def test_a_mixing_begins_as_a_rotation():
    matrix = Mixing(6).matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(6), atol=1e-5, rtol=0)


# Generator


def test_dequantised_pixels_stay_within_their_step():
    values = torch.arange(256).view(1, 1, 16, 16)
    low = dequantised(values / 255, torch.zeros(1, 1, 16, 16))
    high = dequantised(values / 255, torch.full((1, 1, 16, 16), 0.999))
    assert (low * 256).equal(values.float())
    assert (high < low + 1 / 256).all()


def test_measured_bits_are_the_mean_over_images_and_draws():
    model = Flow(FlowConfig(kind="nice", steps=2, hidden=4, pixels="logit"), (1, 2, 2), ())
    values = torch.randint(256, (7, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split, labels = Split(values, torch.zeros(7, dtype=torch.long)), torch.zeros(7, dtype=torch.long)
    once, often = (measured_bits(model, split, EvaluationConfig(), draws)["bits_per_dim"] for draws in (1, 50))
    assert once == measured_bits(model, split, EvaluationConfig(), 1)["bits_per_dim"]
    steps = (torch.arange(64) + 0.5) / 64
    exact = torch.stack([model.bits_per_dim(dequantised(values / 255, torch.full((7, 1, 2, 2), float(u))), labels) for u in steps]).mean()
    assert often == pytest.approx(exact.item(), abs=0.002)


def test_samples_of_another_temperature_are_those_of_scaled_noise():
    model = whole("glow", (1, 8, 8), temperature=0.8).float()
    noise, labels = normal(3, 64).float(), torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        assert model.generate(noise, labels, SamplingConfig()).equal(model.decode(0.8 * noise, labels))
        assert model.generate(noise, labels, SamplingConfig(temperature=0.5)).equal(model.decode(0.5 * noise, labels))
        assert model.codes(noise).equal(0.8 * noise)


def test_labels_matter_to_a_conditional_flow_only():
    images, labels = uniform(2, 1, 4, 4).float(), torch.tensor([0, 1])
    for conditional in (False, True):
        model = whole("glow", conditional=conditional).float()
        assert model.conditional == conditional
        with torch.no_grad():
            assert model.encode(images, labels).equal(model.encode(images, 1 - labels)) != conditional


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match="multiples of 8, and 28x28 is none"):
        Flow(FlowConfig(levels=3), (1, 28, 28), ())
    with pytest.raises(UserError, match="1 x 3x3 are odd"):
        Flow(FlowConfig(kind="nice"), (1, 3, 3), ())
    with pytest.raises(ValueError, match=r"alpha: must be below 0\.5"):
        FlowConfig(alpha=0.5)


# Training


def task(**changes) -> flow.FlowTask:
    config = FlowConfig(**({"steps": 1, "hidden": 8} | changes))
    data = DataConfig(name="digits", image_size=8, batch_size=8)
    return Trainer(FlowExperiment(model=config, data=data, trainer=TrainerConfig(steps=100)), World()).task


def test_training_begins_fitted_and_its_loss_is_the_bits_per_dimension():
    one, shard = task(), Shard(0, 8, 8, 0, 3, torch.device("cpu"))
    curve, norm = one.model.bijection.maps[0], next(module for module in one.model.modules() if isinstance(module, ActNorm))
    assert curve.share.max() > 0.2  # black
    assert (norm.log_scale != 0).all()
    images, labels = one.batch(shard)
    x = dequantised(images, shard.uniform("dequantise", 1, 8, 8))
    noise, change = one.model.to_noise(x, labels)
    log_likelihood = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(1) + change
    torch.testing.assert_close(one.loss(shard)[0], (8 - log_likelihood / 64 / math.log(2)).mean())


def test_half_precision_is_for_networks_only():
    one, shard = task(conditional=True), Shard(0, 8, 8, 0, 3, torch.device("cpu"))
    exact = one.loss(shard)[0]
    with torch.autocast("cpu", torch.bfloat16):
        images, labels = one.batch(shard)
        x = dequantised(images, shard.uniform("dequantise", 1, 8, 8))
        noise, change = one.model.to_noise(x, labels)
        loss, _ = one.loss(shard)
        back = one.model.from_noise(noise, labels)
    assert noise.dtype == change.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0, atol=0.02)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)  # the networks say the same on both ways


def test_evaluation_names_its_protocol_and_repeats_itself():
    one = task(conditional=True)
    config = EvaluationConfig(images=60)
    scores = one.model.eval().evaluate(one.data, config)
    assert scores["protocol"] == "digits test, 60 images, given the class, uniform dequantisation, mean of 4 draws, seed 0"
    assert scores == one.model.evaluate(one.data, config)
    assert scores["bits_per_dim"] == measured_bits(one.model, one.data.test, config, 4)["bits_per_dim"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_is_loaded_and_samples_as_it_did(kind, tmp_path):
    words = f"""--run-dir {tmp_path / "run"} --data.name digits --data.image-size 8 --data.batch-size 64
        --model.kind {kind} --model.hidden 16 --model.steps 2 --optimizer.lr 3e-3 --optimizer.warmup-steps 0
        --trainer.steps 60 --trainer.log-every 10 --trainer.preview-every 60 --tracking.mode disabled --trainer.threads 1"""
    assert launch(EXPERIMENT, "", words.split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    bits = [row["train/loss"] for row in rows if "train/loss" in row]
    assert bits[-1] < bits[0] - 0.1
    loaded = load(str(tmp_path / "run"))
    data = loaded.experiment.dataset()
    found = measured_bits(loaded.model, data.test, EvaluationConfig(images=2000), 1)["bits_per_dim"]
    assert found == pytest.approx(rows[-1]["eval/bits_per_dim"], rel=1e-6)
    first, again = (loaded.model.sample(4, torch.zeros(4, dtype=torch.long), torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.equal(again)
    assert first.shape == (4, 1, 8, 8)
