"""The ways to noise against diffusers' schedulers, the tables of the papers, and the algebra that they must obey."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from torch import Tensor
from torch.distributions import LogNormal, Normal

from generative.processes import DDPMConfig, EDMConfig, FlowMatchingConfig, Moment, Process, linear_betas, normal_numbers
from generative.samplers import Point
from lab.config import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
EPSILON = {"zero_snr": False, "prediction": "epsilon"}
PROCESSES: list[Process] = [
    DDPMConfig(**EPSILON), DDPMConfig(**EPSILON, schedule="linear"), DDPMConfig(prediction="x0"), DDPMConfig(), DDPMConfig(times=100),
    EDMConfig(), FlowMatchingConfig(), FlowMatchingConfig(shift=3.0),
]  # fmt: skip


def drawn(process: Process, count: int = 4000) -> Moment:
    return process.draw((torch.arange(count) + 0.5) / count)


# DDPM


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_tables_are_those_of_diffusers(schedule: str, zero_snr: bool) -> None:
    ours = DDPMConfig(schedule=schedule, zero_snr=zero_snr)
    theirs = diffusers.DDPMScheduler(beta_schedule=SCHEDULES[schedule], rescale_betas_zero_snr=zero_snr)
    # Theirs is multiplied together in float32.
    torch.testing.assert_close(ours.alphas**2, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)
    assert ours.alphas.dtype == torch.float64
    assert (float(ours.alphas[-1]) == 0) == zero_snr
    assert bool((ours.alphas.diff() < 0).all())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_tables_are_products_written_out(schedule: str) -> None:
    def beta(step: int) -> float:
        if schedule == "linear":
            return 1e-4 + (0.02 - 1e-4) * step / 999
        place = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (step, step + 1)]
        return min(1 - place[1] / place[0], 0.999)

    ours, product = DDPMConfig(schedule=schedule, **EPSILON), 1.0
    for step in range(1000):
        product *= 1 - beta(step)
        assert float(ours.alphas[step]) == pytest.approx(math.sqrt(product), rel=1e-9)


def test_the_end_of_pure_noise_is_reached_by_shifting_and_stretching() -> None:
    plain, zero = DDPMConfig(**EPSILON).alphas, DDPMConfig().alphas
    assert float(zero[0]) == pytest.approx(float(plain[0]), rel=1e-12)
    assert float(zero[-1]) == 0
    # Distances between neighbours all grow by the same factor.
    torch.testing.assert_close(
        zero.diff() / plain.diff(), torch.full((999,), float(plain[0] / (plain[0] - plain[-1])), dtype=torch.float64)
    )


@pytest.mark.parametrize("times", [50, 200, 4000])
def test_shorter_chains_end_in_as_much_noise(times: int) -> None:
    short, usual = DDPMConfig(times=times, schedule="linear", **EPSILON), DDPMConfig(schedule="linear", **EPSILON)
    assert float(short.alphas[-1]) == pytest.approx(float(usual.alphas[-1]), rel=0.6)
    assert len(short.alphas) == times
    assert float(linear_betas(times)[-1]) == pytest.approx(20 / times)


def test_chains_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="times: "):
        DDPMConfig(times=10)


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 10, 16, 20, 25, 37, 50, 64, 100, 128, 250, 500, 600, 999, 1000])
def test_points_are_diffusers_trailing_timesteps(steps: int) -> None:
    process = DDPMConfig()
    theirs = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    points = process.points(steps)
    assert [point.time for point in points[:-1]] == theirs.timesteps.tolist()[:steps]
    assert points[-1] == Point(1.0, 0.0, 0.0)
    assert points[0] == Point(0.0, 1.0, 999.0)
    assert all(point.alpha == float(process.alphas[int(point.time)]) for point in points[:-1])
    assert all(point.alpha**2 + point.sigma**2 == pytest.approx(1, rel=1e-12) for point in points)


def test_networks_are_told_times_on_a_scale_of_1000_whatever_the_chain() -> None:
    process = DDPMConfig(times=200)
    assert [point.time for point in process.points(4)] == [995.0, 745.0, 495.0, 245.0, 0.0]
    assert process.draw(torch.tensor([0.0, 0.5, 0.9999])).time.tolist() == [0.0, 500.0, 995.0]


def test_no_sampler_takes_more_steps_than_were_trained_on() -> None:
    assert len(DDPMConfig(times=50).points(50)) == 51
    with pytest.raises(UserError, match="trained on 50 steps of noise, so no sampler can take 51"):
        DDPMConfig(times=50).points(51)
    for process in PROCESSES:
        assert len(process.points(process.most)) == process.most + 1


def test_every_step_is_trained_on_equally_often() -> None:
    process = DDPMConfig()
    moment = drawn(process, 4000)
    assert moment.time.long().bincount().tolist() == [4] * 1000
    torch.testing.assert_close(moment.alpha.double(), process.alphas.repeat_interleave(4), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(moment.alpha**2 + moment.sigma**2, torch.ones(4000))


def test_pure_noise_has_no_epsilon_to_tell() -> None:
    with pytest.raises(ValueError, match="zero_snr"):
        DDPMConfig(prediction="epsilon")


# What the network's output means


def targets(process: DDPMConfig, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return {"epsilon": noise, "x0": x0, "v": alpha * noise - sigma * x0}[process.prediction]


@pytest.mark.parametrize("process", [process for process in PROCESSES if isinstance(process, DDPMConfig)])
def test_ddpm_tells_epsilon_x0_or_v(process: DDPMConfig) -> None:
    moment = Moment(*(part.double() for part in drawn(process)))
    x0, noise = torch.randn(2, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = moment.alpha * x0 + moment.sigma * noise
    scales = process.scales(moment)
    found = scales.skip * x + scales.out * targets(process, x0, noise, moment.alpha, moment.sigma)
    # alpha and sigma come in float32 and are squared by v: that is how exact it can be.
    torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)
    assert bool((scales.inp == 1).all())


def test_flow_matching_tells_the_velocity() -> None:
    process = FlowMatchingConfig()
    moment = drawn(process)
    x0, noise = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    x = moment.alpha * x0 + moment.sigma * noise
    scales = process.scales(moment)
    torch.testing.assert_close(scales.skip * x + scales.out * (noise - x0), x0)
    torch.testing.assert_close(moment.alpha + moment.sigma, torch.ones(4000))
    torch.testing.assert_close(moment.time, 1000 * moment.sigma)


def test_edm_has_the_scales_of_table_1_for_images_of_variance_1() -> None:
    data = 1.0
    sigma = torch.tensor([0.004, 0.1, 1.0, 7.0, 160.0], dtype=torch.float64)
    scales = EDMConfig().scales(Moment(torch.ones_like(sigma), sigma, sigma))
    torch.testing.assert_close(scales.skip, data**2 / (sigma**2 + data**2))
    torch.testing.assert_close(scales.out, sigma * data / (data**2 + sigma**2).sqrt())
    torch.testing.assert_close(scales.inp, 1 / (sigma**2 + data**2).sqrt())


def test_edm_inputs_and_targets_have_variance_1() -> None:
    process = EDMConfig()
    x0, noise = torch.randn(2, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sigma in (0.01, 1.0, 30.0):
        moment = Moment.of(Point(1.0, sigma, 0.0), 1, torch.device("cpu"))
        scales, x = process.scales(moment), x0 + sigma * noise
        assert float((scales.inp * x).var()) == pytest.approx(1, abs=0.02)
        assert float(((x0 - scales.skip * x) / scales.out).var()) == pytest.approx(1, abs=0.02)


def test_training_noise_of_edm_is_log_normal_and_of_flow_matching_logit_normal() -> None:
    places = (torch.arange(4000) + 0.5) / 4000
    torch.testing.assert_close(drawn(EDMConfig(mean=-0.3, std=0.9)).sigma, LogNormal(-0.3, 0.9).icdf(places), rtol=1e-4, atol=0)
    torch.testing.assert_close(drawn(FlowMatchingConfig(mean=0.5, std=2.0)).sigma, torch.sigmoid(Normal(0.5, 2.0).icdf(places)))
    torch.testing.assert_close(normal_numbers(places), Normal(0.0, 1.0).icdf(places), rtol=1e-4, atol=1e-4)
    assert bool(normal_numbers(torch.tensor([0.0, 1 - 2**-24])).isfinite().all())


# Grids


def test_edm_samplers_stop_where_karras_et_al_do() -> None:
    steps, rho, low, high = 18, 7, 0.002, 80.0
    points = EDMConfig(smallest=low, largest=high).points(steps)
    expected = [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)]
    assert [point.sigma for point in points] == pytest.approx([*expected, 0.0], rel=1e-12)
    scheduler = diffusers.EDMEulerScheduler(sigma_min=low, sigma_max=high, rho=7.0)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(torch.tensor([point.sigma for point in points]), scheduler.sigmas, rtol=1e-5, atol=0)
    assert all(point.alpha == 1 for point in points)
    assert points[0].time == pytest.approx(1000)
    assert points[-2].time == pytest.approx(0, abs=1e-6)


def test_edm_tells_log_sigma_alike_in_training_and_sampling() -> None:
    process = EDMConfig()
    moment = drawn(process)
    slope = 1000 / (math.log(process.largest) - math.log(process.smallest))
    torch.testing.assert_close(moment.time, slope * (moment.sigma / process.smallest).log(), rtol=1e-4, atol=1e-3)
    for point in process.points(7)[:-1]:
        assert point.time == pytest.approx(slope * math.log(point.sigma / process.smallest), abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_stops_where_diffusers_does(shift: float) -> None:
    steps = 10
    points = FlowMatchingConfig(shift=shift).points(steps)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - place / steps for place in range(steps)])
    torch.testing.assert_close(torch.tensor([point.sigma for point in points]), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    assert [point.time for point in points] == pytest.approx([1000 * point.sigma for point in points])
    assert [point.alpha + point.sigma for point in points] == pytest.approx([1.0] * (steps + 1))
    assert (points[0].alpha, points[-1].sigma) == (0, 0)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_noise_only_falls_on_the_way_and_ends_at_the_image(process: Process) -> None:
    ratios = [point.sigma / point.alpha if point.alpha else math.inf for point in process.points(12)]
    assert all(before > after for before, after in pairwise(ratios))
    assert ratios[-1] == 0


def test_samplers_begin_with_noise_of_the_first_point() -> None:
    noise = torch.randn(5, 3)
    for process in PROCESSES:
        first = process.points(10)[0]
        torch.testing.assert_close(process.start(noise), first.sigma * noise, rtol=1e-4, atol=1e-4)


# Weights


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_weights_cap_the_signal_to_noise_ratio_that_weighs_the_error_of_x0(prediction: str, cap: float) -> None:
    process = DDPMConfig(prediction=prediction, min_snr=cap, zero_snr=False)
    moment = drawn(process)
    weight, snr = process.weight(moment), (moment.alpha / moment.sigma) ** 2
    if not cap:
        assert bool((weight == 1).all())
        return
    # The error of F is the error of x0 over `out`: so what the error of x0 is weighed with is weight / out^2.
    out = process.scales(moment).out
    torch.testing.assert_close(weight / out**2, snr.clamp(max=cap), rtol=1e-3, atol=0)
    theirs = {"epsilon": snr.clamp(max=cap) / snr, "x0": snr.clamp(max=cap), "v": snr.clamp(max=cap) / (snr + 1)}
    torch.testing.assert_close(weight, theirs[prediction])


def test_weights_of_edm_are_those_of_the_paper_and_of_flow_matching_none() -> None:
    process = EDMConfig()
    moment = drawn(process)
    # lambda(sigma) c_out^2 = 1 (table 1): F has the weight 1.
    lam = (moment.sigma**2 + 1) / moment.sigma**2
    torch.testing.assert_close(lam * process.scales(moment).out ** 2, process.weight(moment))
    assert bool((FlowMatchingConfig().weight(drawn(FlowMatchingConfig())) == 1).all())


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_pure_noise_is_weighed_too(prediction: str) -> None:
    process = DDPMConfig(prediction=prediction)
    moment = drawn(process)
    weight, snr = process.weight(moment), (moment.alpha / moment.sigma) ** 2
    assert float(snr.min()) == 0
    torch.testing.assert_close(weight / process.scales(moment).out ** 2, snr.clamp(1, 5), rtol=1e-3, atol=0)
