"""Optimisers against torch's plain ones, learning rates against closed forms."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lab.checkpoint import pack, restore, unpack
from lab.config import UserError
from lab.learner import Learner
from lab.optimizer import OptimizerConfig, create, learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
ONE_UPDATE = """
import sys
import torch
from lab.optimizer import OptimizerConfig, create
weight = torch.nn.Parameter(torch.ones(3))
optimizer = create(OptimizerConfig(kind=sys.argv[1]), [weight])
weight.square().sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print(float(weight[0]) < 1, "torch._dynamo" in sys.modules)
"""


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


@pytest.mark.parametrize("kind", ["adamw", "radam", "sgd"])
def test_an_update_does_not_import_torchs_compiler(kind: str) -> None:
    """It takes seconds, at every start."""
    done = subprocess.run([sys.executable, "-c", ONE_UPDATE, kind], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


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


# DQN's RMSProp

DECAY, MARGIN, BATCH, RATE = 0.95, 0.01, 32, 2.5e-3


def regression(step):
    """A batch for a small regression, float64 (32, 4) and (32,)."""
    numbers = np.random.default_rng(step)
    inputs = numbers.normal(size=(BATCH, 4))
    return inputs, 2 * np.sin(inputs @ np.array([1.0, -2.0, 0.5, 0.0])) + 0.3


def as_published(weights, steps):
    """NeuralQLearner.lua of Mnih et al. 2015, one number after the other: clipped errors, gradients summed over the batch."""
    w, g, g2 = list(weights), [0.0] * 5, [0.0] * 5
    for step in range(steps):
        inputs, goals = regression(step)
        dw = [0.0] * 5
        for row, goal in zip(inputs, goals, strict=True):
            delta = goal - sum(w[i] * row[i] for i in range(4)) - w[4]
            delta = min(1.0, max(-1.0, delta))
            for i in range(5):
                dw[i] -= delta * (row[i] if i < 4 else 1.0)
        for i in range(5):
            g[i] = DECAY * g[i] + (1 - DECAY) * dw[i]
            g2[i] = DECAY * g2[i] + (1 - DECAY) * dw[i] * dw[i]
            w[i] -= RATE * dw[i] / math.sqrt(g2[i] - g[i] * g[i] + MARGIN)
    return w


def centred(weights, eps=MARGIN / BATCH**2, lr=RATE):
    return create(OptimizerConfig(kind="centred_rmsprop", lr=lr, betas=(DECAY, DECAY), eps=eps), weights)


def follow(line, optimizer, first, last):
    """Our training: the mean of the Huber loss."""
    for step in range(first, last):
        inputs, goals = map(torch.from_numpy, regression(step))
        error = goals - line(inputs)[:, 0]
        optimizer.zero_grad()
        nn.functional.huber_loss(error, torch.zeros_like(error)).backward()
        optimizer.step()


def line():
    layer = nn.Linear(4, 1, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def test_centred_rmsprop_with_the_mean_loss_is_the_published_rule_with_the_summed_one():
    ours = line()
    follow(ours, centred(ours.parameters()), 0, 200)
    found, expected = [*ours.weight[0].tolist(), ours.bias.item()], as_published([0.0] * 5, 200)
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert max(map(abs, expected)) > 0.1  # they went somewhere
    other = line()
    follow(other, centred(other.parameters(), eps=MARGIN), 0, 200)  # the paper's number with our mean is another rule
    assert [*other.weight[0].tolist(), other.bias.item()] != pytest.approx(expected, rel=1e-2)


def test_centred_rmsprop_adds_its_eps_inside_of_the_root_and_torch_outside():
    gradient = 0.2
    ours, theirs = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    for weight in (ours, theirs):
        weight.grad = torch.full_like(weight, gradient)
    centred([ours], eps=MARGIN, lr=1.0).step()
    torch.optim.RMSprop([theirs], lr=1.0, alpha=DECAY, eps=MARGIN, centered=True).step()
    spread = 0.05 * gradient**2 - (0.05 * gradient) ** 2
    assert ours.item() == pytest.approx(-gradient / math.sqrt(spread + MARGIN), rel=1e-12)
    assert theirs.item() == pytest.approx(-gradient / (math.sqrt(spread) + MARGIN), rel=1e-12)
    assert theirs.item() < 2 * ours.item()


def test_centred_rmsprop_has_decays_of_its_own_for_the_mean_and_for_the_square():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = create(OptimizerConfig(kind="centred_rmsprop", lr=1.0, betas=(0.5, 0.9), eps=0.25), [weight])
    mean = square = total = 0.0
    for gradient in (3.0, -1.0, 2.0):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        mean, square = 0.5 * mean + 0.5 * gradient, 0.9 * square + 0.1 * gradient**2
        total -= gradient / math.sqrt(max(0.0, square - mean**2) + 0.25)
        assert weight.item() == pytest.approx(total, rel=1e-12)


def test_a_gradient_that_never_changes_does_not_make_centred_rmsprop_take_the_root_of_less_than_nothing():
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = centred([weight], eps=1e-12)
    for _ in range(500):
        weight.grad = torch.linspace(1e-3, 1e3, 1000)
        optimizer.step()
    assert weight.isfinite().all()


def test_centred_rmsprop_leaves_weights_without_a_gradient_alone():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    optimizer = centred([unused, used])
    optimizer.step()
    assert unused.equal(torch.ones(2))
    assert (used < 1).all()
    centred([unused]).step()  # nor does it mind that there is none at all


def test_centred_rmsprop_goes_on_bit_for_bit_from_a_checkpoint():
    whole, resumed = line(), line()
    optimizer = centred(whole.parameters())
    follow(whole, optimizer, 0, 7)
    tensors: dict = {}
    model, state = (pack(each.state_dict(), tensors, name) for each, name in ((whole, "model"), (optimizer, "optimizer")))
    model, state = (unpack(json.loads(json.dumps(tree)), tensors) for tree in (model, state))
    follow(whole, optimizer, 7, 20)

    fresh = centred(resumed.parameters())
    restore({"model": resumed, "optimizer": fresh}, {"model": model, "optimizer": state})
    follow(resumed, fresh, 7, 20)
    assert resumed.weight.equal(whole.weight)
    assert resumed.bias.equal(whole.bias)
    for mine, other in zip(fresh.state.values(), optimizer.state.values(), strict=True):
        assert set(mine) == {"mean", "square"}
        assert all(mine[name].equal(other[name]) for name in mine)


def test_the_state_of_centred_rmsprop_fits_no_other_rule():
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="another kind of optimiser"):
        restore({"optimizer": centred([weight])}, {"optimizer": torch.optim.RMSprop([weight]).state_dict()})


def test_weight_decay_is_refused_by_centred_rmsprop():
    with pytest.raises(UserError, match=r"optimizer\.weight_decay: centred_rmsprop has none"):
        create(OptimizerConfig(kind="centred_rmsprop", weight_decay=0.1), some_weights())


# Updates that are left out


def taken(kind, gradients, device_decides=True, clip=0.0):
    """Weights and averages after some updates, through a learner; None stands for a gradient that is not finite."""
    layer = nn.Linear(3, 2)
    for weight in layer.parameters():
        nn.init.constant_(weight, 0.5)
    learner = Learner(layer, OptimizerConfig(kind=kind, betas=(0.8, 0.9), eps=1e-3, clip_norm=clip, ema=0.7))
    for number, gradient in enumerate(gradients):
        for weight in layer.parameters():
            weight.grad = torch.full_like(weight, 1.0 if gradient is None else gradient)
        if gradient is None:
            layer.weight.grad[1, 1] = math.inf if number % 2 else math.nan
        if gradient is not None or device_decides:
            learner.update(0.1, learner.gradient_norm())
        else:  # what goes on by itself, as schedules do
            learner.ema.updates += 1
            learner.optimizer.param_groups[0]["updates"] = learner.optimizer.param_groups[0].get("updates", 0) + 1
    return [*layer.parameters(), *learner.ema.module.parameters()]


KINDS = ["adam", "adamw", "radam", "rmsprop", "centred_rmsprop", "sgd"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_by_a_gradient_that_is_not_finite_moves_nothing_ever_after(kind):
    gradients = [None, 0.3, -0.2, None, None, 0.5, *[0.1 * step for step in range(8)]]
    for mine, other in zip(taken(kind, gradients), taken(kind, gradients, device_decides=False), strict=True):
        assert mine.equal(other)
        assert mine.isfinite().all()
        assert not mine.allclose(torch.full_like(mine, 0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_is_that_of_torch(kind):
    gradients, size = [0.3, -4.0, 0.01, 9.0], math.sqrt(8)  # 8 numbers, all of them the gradient
    shortened = [gradient * min(1.0, 2.0 / (abs(gradient) * size)) for gradient in gradients]
    for mine, other in zip(taken(kind, gradients, clip=2.0), taken(kind, shortened), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_radam_goes_on_from_a_checkpoint_where_it_was():
    layers = [nn.Linear(2, 1), nn.Linear(2, 1)]
    whole, fresh = (create(OptimizerConfig(kind="radam", lr=0.1), layer.parameters()) for layer in layers)
    for step in range(12):
        if step == 4:  # before the square counts for anything
            state = unpack(json.loads(json.dumps(pack(whole.state_dict(), tensors := {}, "optimizer"))), tensors)
            layers[1].load_state_dict(layers[0].state_dict())
            restore({"optimizer": fresh}, {"optimizer": state})
        for layer, optimizer in zip(layers, (whole, fresh), strict=True):
            for weight in layer.parameters() if layer is layers[0] or step >= 4 else []:
                weight.grad = torch.full_like(weight, 0.1 * (step % 3) - 0.05)
            if layer is layers[0] or step >= 4:
                optimizer.step()
    assert layers[0].weight.equal(layers[1].weight)
