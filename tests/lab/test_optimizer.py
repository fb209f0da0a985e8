"""Optimisers against torch's plain ones, learning rates against closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab.optimizer import OptimizerConfig, create, learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


PLAIN = {"foreach": False, "fused": False}


def plain(config: OptimizerConfig, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same rule from torch, one weight after the other."""
    lr, betas, eps, decay = config.lr, config.betas, config.eps, config.weight_decay
    return {
        "adam": lambda: torch.optim.Adam(weights, lr=lr, betas=betas, eps=eps, weight_decay=decay, **PLAIN),
        "adamw": lambda: torch.optim.AdamW(weights, lr=lr, betas=betas, eps=eps, weight_decay=decay, **PLAIN),
        "radam": lambda: torch.optim.RAdam(weights, lr=lr, betas=betas, eps=eps, weight_decay=decay, foreach=False),
        "rmsprop": lambda: torch.optim.RMSprop(
            weights, lr=lr, momentum=betas[0], alpha=betas[1], eps=eps, weight_decay=decay, foreach=False
        ),
        "sgd": lambda: torch.optim.SGD(weights, lr=lr, momentum=betas[0], weight_decay=decay, **PLAIN),
    }[config.kind]()


def some_weights() -> list[nn.Parameter]:
    numbers = torch.Generator().manual_seed(1)
    convolution = torch.randn(4, 3, 3, 3, generator=numbers, dtype=torch.float64).to(memory_format=torch.channels_last)
    return [
        nn.Parameter(value)
        for value in (convolution, torch.randn(5, generator=numbers, dtype=torch.float64), torch.ones((), dtype=torch.float64))
    ]


@pytest.mark.parametrize("kind", ["adam", "adamw", "radam", "rmsprop", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_every_rule_follows_torchs_plain_one(kind, decay):
    config = OptimizerConfig(kind=kind, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    ours, theirs = some_weights(), some_weights()
    fast, slow = create(config, iter(ours)), plain(config, theirs)
    for step in range(30):
        numbers = torch.Generator().manual_seed(step)
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(mine.shape, generator=numbers, dtype=torch.float64) + 0.3
            mine.grad = torch.empty_like(mine).copy_(other.grad)
        fast.step()
        slow.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_decoupled_decay_of_adamw_shrinks_a_weight_without_gradient_by_lr_times_decay():
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = create(OptimizerConfig(lr=0.1, weight_decay=0.5), [weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))


# Learning rates


def test_warm_up_climbs_evenly_and_reaches_the_top_in_its_last_step():
    config = OptimizerConfig(lr=0.4, warmup_steps=4, schedule="cosine")
    assert [learning_rate(config, step, 100) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_starts_at_the_top_and_ends_where_it_should(schedule):
    config = OptimizerConfig(lr=0.3, schedule=schedule, final_lr=0.1, warmup_steps=10)
    end = 0.3 if schedule == "constant" else 0.03
    assert learning_rate(config, 10, 110) == pytest.approx(0.3, rel=1e-15)
    assert learning_rate(config, 110, 110) == pytest.approx(end)
    assert learning_rate(config, 500, 110) == pytest.approx(end) or schedule == "cosine"


def test_the_course_between_is_the_closed_form():
    for step in range(0, 201, 7):
        part = step / 200
        assert learning_rate(OptimizerConfig(lr=2.0, schedule="linear"), step, 200) == pytest.approx(2 * (1 - part), abs=1e-15)
        expected = 2 * (0.25 + 0.75 * math.cos(math.pi * part / 2) ** 2)
        assert learning_rate(OptimizerConfig(lr=2.0, schedule="cosine", final_lr=0.25), step, 200) == pytest.approx(expected, abs=1e-14)


def test_torchs_own_schedule_agrees():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.7)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.07)
    config = OptimizerConfig(lr=0.7, schedule="cosine", final_lr=0.1)
    for step in range(50):
        assert learning_rate(config, step, 50) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    final=st.floats(0, 1),
    warmup=st.integers(0, 30),
    steps=st.integers(1, 80),
)
@settings(max_examples=100, deadline=None)
def test_the_rate_climbs_then_falls_and_stays_between_its_ends(schedule, final, warmup, steps):
    config = OptimizerConfig(lr=1.0, schedule=schedule, final_lr=final, warmup_steps=warmup)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    up, down = rates[:warmup], rates[warmup:]
    assert up == sorted(up)
    assert all(late <= early + 1e-12 for early, late in itertools.pairwise(down))
    assert all(0 < rate <= 1 for rate in up)
    assert all(final - 1e-12 <= rate <= 1 for rate in down)
