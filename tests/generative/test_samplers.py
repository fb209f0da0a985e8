"""Samplers against diffusers' schedulers, step by step, and against differential equations whose solution is known."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import diffusers
import pytest
import torch
from torch import Tensor

from generative import samplers
from generative.samplers import EVALUATIONS, FLOW, SAMPLERS, Denoise, Guess, Noise, Point
from lab.config import UserError

pytestmark = [
    pytest.mark.usefixtures("one_thread", "doubles"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers, of its own tables
]

CERTAIN = sorted(set(SAMPLERS) - {"ancestral"})
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
# These schedulers reckon each step in float32, whatever they are given.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture
def doubles() -> Iterator[None]:
    """Numbers are float64, in our code and in diffusers' wherever it does not ask for others."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(x: Tensor, point: Point) -> Guess:
    """The exact posterior mean where every pixel is drawn from a mixture of three normal distributions: far from linear in x."""
    means, deviations, shares = torch.tensor([-1.0, 0.3, 1.2]), torch.tensor([0.2, 0.1, 0.4]), torch.tensor([0.5, 0.2, 0.3])
    x = x.unsqueeze(-1)
    total = point.alpha**2 * deviations**2 + point.sigma**2
    weight = torch.softmax(shares.log() - 0.5 * total.log() - 0.5 * (x - point.alpha * means) ** 2 / total, -1)
    return Guess((weight * (means + point.alpha * deviations**2 / total * (x - point.alpha * means))).sum(-1))


def no_noise() -> Tensor:
    raise AssertionError("a sampler without chance asked for noise")


def walk(name: str, denoise: Denoise, x: Tensor, points: Sequence[Point], noise: Noise = no_noise) -> list[Tensor]:
    return list(SAMPLERS[name](denoise, x, points, noise))


def last(name: str, denoise: Denoise, x: Tensor, points: Sequence[Point]) -> Tensor:
    return walk(name, denoise, x, points)[-1]


IMAGE = Point(1.0, 0.0, 0.0)
START = normal(4, 1, 3, 3)


# diffusers, with the points that its schedulers take


def preserving(sigma: float, time: float = 0.0) -> Point:
    """The point with alpha^2 + sigma^2 = 1 of a scheduler's table of sigma / alpha."""
    alpha = 1 / math.sqrt(1 + sigma**2)
    return Point(alpha, sigma * alpha, time)


def schedule(kind: type, steps: int, **options):
    """A scheduler that is told x0, and made to keep its tables in float64."""
    scheduler = kind.from_config({"prediction_type": "sample", "clip_sample": False} | options)
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def stepped(scheduler, points: Sequence[Point], output: Callable[[Tensor, Point], Tensor], x: Tensor = START, **options) -> list[Tensor]:
    """What a scheduler makes of x, step by step, where the network's output at a point is `output`."""
    passed = []
    for time, point in zip(scheduler.timesteps, points, strict=True):
        x = scheduler.step(output(x, point), time, x, **options).prev_sample
        passed.append(x)
    return passed


def agree(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    assert len(ours) == len(theirs) > 1
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), **tolerance)


def table_points(scheduler) -> list[Point]:
    table = scheduler.alphas_cumprod
    return [*(Point(float(table[t].sqrt()), float((1 - table[t]).sqrt()), float(t)) for t in scheduler.timesteps), IMAGE]


@pytest.mark.parametrize(("variance", "fraction"), [("fixed_small", 0.0), ("fixed_large", 1.0)])
@pytest.mark.parametrize("steps", [10, 50])
def test_ancestral_is_diffusers_ddpm(variance: str, fraction: float, steps: int) -> None:
    scheduler = schedule(diffusers.DDPMScheduler, steps, variance_type=variance)
    points = table_points(scheduler)
    theirs = stepped(scheduler, points[:-1], lambda x, at: mixture(x, at).x0, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    ours = walk(
        "ancestral",
        lambda x, at: mixture(x, at)._replace(fraction=fraction),
        START,
        points,
        lambda: torch.randn(START.shape, generator=generator),
    )
    agree(ours, theirs, **TIGHT)


def test_ancestral_with_learned_variances_is_diffusers_ddpm() -> None:
    scheduler = schedule(diffusers.DDPMScheduler, 20, variance_type="learned_range")
    points = table_points(scheduler)

    def fraction(x: Tensor) -> Tensor:
        return torch.sigmoid(3 * x)

    def output(x: Tensor, at: Point) -> Tensor:
        return torch.cat([mixture(x, at).x0, 2 * fraction(x) - 1], 1)

    theirs = stepped(scheduler, points[:-1], output, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    ours = walk(
        "ancestral",
        lambda x, at: Guess(mixture(x, at).x0, fraction(x)),
        START,
        points,
        lambda: torch.randn(START.shape, generator=generator),
    )
    agree(ours, theirs, **TIGHT)


@pytest.mark.parametrize("options", [{}, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}], ids=["leading", "zero snr"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_diffusers_ddim(options: dict, steps: int) -> None:
    scheduler = schedule(diffusers.DDIMScheduler, steps, **options)
    points = table_points(scheduler)
    assert (points[0].alpha == 0) == bool(options)
    agree(walk("ddim", mixture, START, points), stepped(scheduler, points[:-1], lambda x, at: mixture(x, at).x0), **TIGHT)


@pytest.mark.parametrize("steps", [2, 5, 12])
@pytest.mark.parametrize("karras", [False, True])
def test_heun_is_diffusers_heun(steps: int, karras: bool) -> None:
    scheduler = schedule(diffusers.HeunDiscreteScheduler, steps, use_karras_sigmas=karras)
    # Its table has each sigma twice, for its two calls of the network, and its images are our x / alpha.
    spreads = [*scheduler.sigmas[:1].tolist(), *scheduler.sigmas[1::2].tolist()]
    points = [preserving(spread) for spread in spreads]
    # The second call of a step happens at its end.
    calls = [points[0], *(point for point in points[1:-1] for _ in range(2))]
    theirs = stepped(scheduler, calls, lambda y, at: mixture(y * at.alpha, at).x0, START / points[0].alpha)
    whole = [*theirs[1::2], theirs[-1]]
    agree(walk("heun", mixture, START, points), [y * point.alpha for y, point in zip(whole, points[1:], strict=True)], **TIGHT)


def spread_points(scheduler) -> list[Point]:
    return [preserving(spread) for spread in scheduler.sigmas.tolist()]


# With fewer than 15 steps diffusers lowers the order of the last step by itself, with more only where it ends at sigma 0.
@pytest.mark.parametrize(("steps", "final"), [(2, "zero"), (6, "zero"), (20, "zero"), (6, "sigma_min")])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_dpmpp_is_diffusers_dpm_solver(steps: int, final: str, beta_schedule: str) -> None:
    scheduler = schedule(
        diffusers.DPMSolverMultistepScheduler,
        steps,
        beta_schedule=beta_schedule,
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type=final,
    )
    points = spread_points(scheduler)
    agree(walk("dpmpp", mixture, START, points), stepped(scheduler, points[:-1], lambda x, at: mixture(x, at).x0), **FLOAT32)


@pytest.mark.parametrize("steps", [2, 3, 6, 20])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_unipc_is_diffusers_unipc(steps: int, beta_schedule: str) -> None:
    scheduler = schedule(diffusers.UniPCMultistepScheduler, steps, beta_schedule=beta_schedule, solver_order=2, solver_type="bh2")
    points = spread_points(scheduler)
    agree(walk("unipc", mixture, START, points), stepped(scheduler, points[:-1], lambda x, at: mixture(x, at).x0), **TIGHT)


def preconditioned(x: Tensor, at: Point, data: float = 0.5) -> Tensor:
    """The network's output from which EDM's preconditioning makes our guess (Karras et al. 2022, table 1)."""
    total = at.sigma**2 + data**2
    return (mixture(x, at).x0 - data**2 / total * x) * math.sqrt(total) / (at.sigma * data)


@pytest.mark.parametrize(("name", "kind"), [("ddim", diffusers.EDMEulerScheduler), ("dpmpp", diffusers.EDMDPMSolverMultistepScheduler)])
def test_samplers_are_diffusers_edm_schedulers_where_alpha_is_one(name: str, kind: type) -> None:
    scheduler = schedule(kind, 12, prediction_type="epsilon")
    points = [Point(1.0, sigma, 0.0) for sigma in scheduler.sigmas.tolist()]
    scheduler.is_scale_input_called = True
    theirs = stepped(scheduler, points[:-1], preconditioned, 80 * START)
    # Where x0 is told through noise of deviation 80, float32 keeps five of its digits.
    agree(walk(name, mixture, 80 * START, points), theirs, rtol=2e-5, atol=5e-4)


def straight_points(times: Sequence[float]) -> list[Point]:
    return [Point(1 - time, time, 1000 * time) for time in times]


def velocity(x: Tensor, at: Point) -> Tensor:
    return (x - mixture(x, at).x0) / at.sigma


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_diffusers_flow_matching(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - step / 12 for step in range(12)])
    points = straight_points(scheduler.sigmas.tolist())
    agree(walk("euler", mixture, START, points), stepped(scheduler, points[:-1], velocity), **FLOAT32)


def test_flow_heun_is_diffusers_flow_matching() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    points = straight_points([1.0, *scheduler.sigmas[1::2].tolist()])
    calls = [points[0], *(point for point in points[1:-1] for _ in range(2))]
    theirs = stepped(scheduler, calls, velocity)
    agree(walk("flow_heun", mixture, START, points), [*theirs[1::2], theirs[-1]], **FLOAT32)


@pytest.mark.parametrize(("name", "kind"), [("dpmpp", diffusers.DPMSolverMultistepScheduler), ("unipc", diffusers.UniPCMultistepScheduler)])
def test_multistep_samplers_are_diffusers_on_straight_paths(name: str, kind: type) -> None:
    scheduler = schedule(kind, 10, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    points = straight_points(scheduler.sigmas.tolist())
    agree(walk(name, mixture, START, points), stepped(scheduler, points[:-1], velocity), **FLOAT32)


def test_midpoint_is_the_rule_of_the_textbook() -> None:
    points = straight_points([1.0, 0.8, 0.5, 0.2, 0.0])
    x, expected = START, []
    for start, end in pairwise(points):
        step = end.sigma - start.sigma
        half = straight_points([start.sigma + step / 2])[0]
        x = x + step * velocity(x + step / 2 * velocity(x, start), half)
        expected.append(x)
    agree(walk("midpoint", mixture, START, points), expected, **TIGHT)


# The differential equation, whose solution is known for normal data

MEAN, DEVIATION = 0.7, 0.5


def gaussian(x: Tensor, at: Point) -> Guess:
    """The exact posterior mean of data N(MEAN, DEVIATION^2)."""
    total = (at.alpha * DEVIATION) ** 2 + at.sigma**2
    return Guess(MEAN + at.alpha * DEVIATION**2 / total * (x - at.alpha * MEAN))


def solution(code: Tensor, at: Point) -> Tensor:
    """Where the way from noise `code` is at a point: as many standard deviations from the mean as everywhere."""
    return at.alpha * MEAN + math.sqrt((at.alpha * DEVIATION) ** 2 + at.sigma**2) * code


def even_lam(steps: int) -> list[Point]:
    """From much noise to little, with alpha^2 + sigma^2 = 1."""
    return [preserving(math.exp(3 - 6 * step / steps)) for step in range(steps + 1)]


def circle(steps: int) -> list[Point]:
    """From pure noise to the image, on a quarter of a circle."""
    angles = [math.pi / 2 * (1 - step / steps) for step in range(steps + 1)]
    return [Point(0.0, 1.0, 1.0), *(Point(math.cos(angle), math.sin(angle), angle) for angle in angles[1:-1]), IMAGE]


def straight(steps: int) -> list[Point]:
    return straight_points([1 - step / steps for step in range(steps + 1)])


def error(name: str, points: Sequence[Point]) -> float:
    code = torch.linspace(-2, 2, 9)
    return float((last(name, gaussian, solution(code, points[0]), points) - solution(code, points[-1])).abs().max())


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpmpp", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(name: str, order: int) -> None:
    coarse, fine = error(name, even_lam(80)), error(name, even_lam(160))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def local_error(size: float, kind: str) -> float:
    """How far one step of this size (in lam) goes astray from the solution, if the guesses are those on the solution."""
    points = [preserving(math.exp(-lam)) for lam in (-1.4 * size, 0.0, size)]
    code = torch.linspace(-2, 2, 9)
    exact = [solution(code, at) for at in points]
    guesses = [gaussian(x, at).x0 for x, at in zip(exact, points, strict=True)]
    better = {
        "first": lambda: guesses[1],
        "drawn out": lambda: samplers.drawn_out(guesses[:2], [*points, IMAGE], 1),
        "first corrected": lambda: samplers.corrected(guesses[1:], points[1:], 1),
        "corrected": lambda: samplers.corrected(guesses, points, 2),
    }[kind]()
    return float((samplers.follow(exact[1], better, *points[1:]) - exact[2]).abs().max())


@pytest.mark.parametrize(("kind", "order"), [("first", 1), ("drawn out", 2), ("first corrected", 2), ("corrected", 3)])
def test_every_kind_of_guess_has_its_order(kind: str, order: int) -> None:
    # An error of one step shrinks by one order more than that of a whole way, which has more steps the smaller they are.
    assert math.log2(local_error(0.02, kind) / local_error(0.01, kind)) == pytest.approx(order + 1, abs=0.1)


def test_unipc_is_more_exact_than_dpmpp() -> None:
    # Its last step, which is not corrected, has an error of the opposite sign: no order can be read off the whole way.
    for steps in (20, 40, 80, 160):
        assert error("unipc", even_lam(steps)) < error("dpmpp", even_lam(steps)) / 2
    assert error("unipc", even_lam(640)) < error("unipc", even_lam(20)) / 1000


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2)])
def test_the_way_back_from_image_to_noise_has_the_same_order(name: str, order: int) -> None:
    coarse, fine = error(name, even_lam(80)[::-1]), error(name, even_lam(160)[::-1])
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


# The solution is the root of a quadratic in t, and for those the midpoint rule happens to be of third order.
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 3), ("flow_heun", 2)])
def test_the_error_falls_with_the_order_on_straight_paths(name: str, order: int) -> None:
    coarse, fine = error(name, straight(80)), error(name, straight(160))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["midpoint", "flow_heun"])
def test_results_settle_with_the_order_on_straight_paths_of_other_data(name: str) -> None:
    code = torch.linspace(-2, 2, 9)
    coarse, middle, fine = (last(name, mixture, code, straight(steps)) for steps in (200, 400, 800))
    ratio = (middle - coarse).norm() / (fine - middle).norm()
    assert math.log2(ratio) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", [name for name in CERTAIN if name not in FLOW])
@pytest.mark.parametrize("path", [circle, straight])
def test_samplers_come_from_pure_noise_to_the_image(name: str, path: Callable[[int], list[Point]]) -> None:
    assert path(100)[0].alpha == 0
    errors = [error(name, path(steps)) for steps in (10, 100, 1000)]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 2e-3


@pytest.mark.parametrize("name", CERTAIN)
def test_one_known_image_is_reached_exactly_whatever_the_steps(name: str) -> None:
    picture = normal(*START.shape, seed=8)
    for steps in (1, 2, 3, 7):
        torch.testing.assert_close(last(name, lambda x, at: Guess(picture), START, straight(steps)), picture, **TIGHT)


def test_the_corrector_is_the_weighted_mean_of_a_parabola() -> None:
    points = [preserving(math.exp(-lam)) for lam in (-1.0, -0.3, 0.9)]
    lams = [point.lam for point in points]
    assert lams == pytest.approx([-1.0, -0.3, 0.9])

    def parabola(lam: float | Tensor) -> float | Tensor:
        return 2 - 0.7 * lam + 1.3 * lam**2

    places = torch.linspace(lams[1], lams[2], 100_001)
    weight = torch.exp(places)
    expected = torch.trapezoid(weight * parabola(places), places) / torch.trapezoid(weight, places)
    found = samplers.corrected([torch.tensor(parabola(lam)) for lam in lams], [*points, IMAGE], 2)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# The ancestral sampler's distribution, without drawing a single number


def moments(denoise: Callable[[Tensor, Point], Guess], points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Exact mean and variance after every step, for a guess that is linear in x, from x ~ N(0, sigma^2).

    x is then a sum of numbers that are all standard normal: in row 0 all of them are 0, and in each other row one of them is 1.
    """
    steps = len(points) - 1
    x = torch.zeros(steps + 1)
    x[1] = points[0].sigma
    rows = iter(torch.eye(steps + 1)[2:])
    passed = walk("ancestral", denoise, x, points, lambda: next(rows))
    assert next(rows, None) is None  # One number for each step but the last
    return [float(x[0]) for x in passed], [float(((x[1:] - x[0]) ** 2).sum()) for x in passed]


def test_the_smallest_variance_is_exact_for_one_known_image() -> None:
    points = circle(6)
    means, variances = moments(lambda x, at: Guess(torch.full_like(x, MEAN)), points)
    assert means == pytest.approx([at.alpha * MEAN for at in points[1:]])
    assert variances == pytest.approx([at.sigma**2 for at in points[1:]])


def test_the_largest_variance_is_exact_for_standard_normal_images() -> None:
    points = circle(6)
    means, variances = moments(lambda x, at: Guess(at.alpha * x, 1.0), points)
    assert means == pytest.approx([0.0] * 6)
    # The last step adds no noise: the image is then the guess, at the last point that is not the image.
    assert variances == pytest.approx([1.0] * 5 + [points[-2].alpha ** 2])


@pytest.mark.parametrize("path", [circle, straight])
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_ancestral_sampling_in_many_steps_has_the_distribution_of_the_data(path: Callable[[int], list[Point]], fraction: float) -> None:
    gaps = []
    for steps in (100, 400):
        means, variances = moments(lambda x, at: gaussian(x, at)._replace(fraction=fraction), path(steps))
        assert means[-1] == pytest.approx(MEAN, rel=0.01)
        gaps.append(abs(variances[-1] - DEVIATION**2))
    assert gaps[1] < gaps[0] / 2
    assert gaps[1] < 0.02 * DEVIATION**2


def test_a_fraction_of_each_pixel_is_as_good_as_a_number() -> None:
    ours = [
        walk("ancestral", lambda x, at: Guess(mixture(x, at).x0, fraction), START, circle(5), lambda: torch.ones_like(START))
        for fraction in (0.3, torch.full_like(START, 0.3))
    ]
    agree(*ours, **TIGHT)


# The contract


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_yielded_in_the_type_it_came_in_and_costs_what_is_told(name: str) -> None:
    calls: list[Point] = []

    def counted(x: Tensor, at: Point) -> Guess:
        calls.append(at)
        return Guess(0.5 * x)

    points, x = straight(8), START.float()
    passed = walk(name, counted, x, points, lambda: torch.ones_like(x))
    assert len(passed) == 8
    assert {one.dtype for one in passed} == {torch.float32}
    assert all(one.isfinite().all() for one in passed)
    # Heun's rule has no slope at the image, and the one for every schedule none in pure noise.
    assert len(calls) == 8 * EVALUATIONS[name] - {"heun": 2, "flow_heun": 1}.get(name, 0)
    assert [calls[0], IMAGE in calls] == [points[0], False]
    assert torch.equal(x, START.float())


def test_midpoint_looks_in_the_middle() -> None:
    seen: list[Point] = []

    def counted(x: Tensor, at: Point) -> Guess:
        seen.append(at)
        return Guess(x)

    walk("midpoint", counted, START, [Point(0.2, 0.8, 40.0), Point(0.6, 0.4, 10.0)])
    assert [(at.alpha, at.sigma, at.time) for at in seen] == [(0.2, 0.8, 40.0), pytest.approx((0.4, 0.6, 25.0))]


def test_lam_is_half_the_log_of_the_signal_to_noise_ratio() -> None:
    assert [Point(0.0, 1.0, 0).lam, IMAGE.lam] == [-math.inf, math.inf]
    assert 2 * Point(0.6, 0.8, 0).lam == pytest.approx(math.log(0.36 / 0.64))


@pytest.mark.parametrize("name", FLOW)
def test_samplers_of_flow_matching_refuse_other_paths(name: str) -> None:
    with pytest.raises(
        UserError, match="euler, midpoint, flow_heun are for flow matching; this model needs one of ancestral, ddim, heun, dpmpp, unipc"
    ):
        next(SAMPLERS[name](mixture, START, circle(4), no_noise))


def test_samplers_are_found_by_name() -> None:
    assert samplers.find("unipc") is samplers.unipc
    with pytest.raises(
        UserError, match="'dpmp'; did you mean dpmpp\\? There are ancestral, ddim, heun, dpmpp, unipc, euler, midpoint, flow_heun"
    ):
        samplers.find("dpmp")
    with pytest.raises(UserError, match="'zz'; there are ancestral"):
        samplers.find("zz")


# Inpainting


@pytest.mark.parametrize("name", CERTAIN)
def test_what_is_known_keeps_its_noise_on_the_way_without_chance(name: str) -> None:
    known, mask, points = normal(*START.shape, seed=9), (normal(1, 1, 3, 3, seed=10) > 0).double(), straight(6)
    assert 0 < mask.sum() < 9
    passed = walk(name, samplers.inpainting(mixture, known, mask), START, points)
    free = walk(name, mixture, START, points)
    for x, without, at in zip(passed, free, points[1:], strict=True):
        # START is x at the first point, pure noise. UniPC corrects what it yields only in the next step, which changes nothing here.
        expected = torch.where(mask.bool(), at.alpha * known + at.sigma * START, without)
        torch.testing.assert_close(x, expected, **TIGHT)


def test_what_is_known_keeps_its_distribution_on_the_way_with_chance() -> None:
    points = circle(6)
    # Whatever the variance of the rest, the known part has the posterior's.
    denoise = samplers.inpainting(lambda x, at: Guess(0 * x, 1.0), torch.tensor(MEAN), torch.tensor(1))
    means, variances = moments(denoise, points)
    assert means == pytest.approx([at.alpha * MEAN for at in points[1:]])
    assert variances == pytest.approx([at.sigma**2 for at in points[1:]])
