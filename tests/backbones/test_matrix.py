"""What every backbone must be able to do, whatever its family: each name at the sizes of MNIST (28) and of Atari (84)."""

import copy
import inspect
from contextlib import ExitStack
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lab.backbones import REGISTRY, Backbone, create

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = sorted(REGISTRY)
CHANNELS = 3
CASES = [(name, size) for name in NAMES for size in (28, 84)]


def fresh(name, size, seed=0, **options):
    """A backbone with every weight a little off its start, so that no layer hides behind weights that begin at zero."""
    torch.manual_seed(seed)
    backbone = create(name, CHANNELS, size, **options)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return backbone.eval()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def built(request):
    """The backbone of a case, built once for all tests."""
    name, size = request.param
    return name, size, fresh(name, size)


@pytest.fixture
def case(built):
    """The name, the size, and the backbone in eval mode without gradients."""
    name, size, backbone = built
    backbone.zero_grad()
    return name, size, backbone.eval()


def pictures(size, count=2, seed=0):
    """Bytes (N, 3, H, W)."""
    return torch.randint(256, (count, CHANNELS, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbers(size, count=2):
    """The same in [0, 1]."""
    return pictures(size, count).float() / 255


def learnt(network, images, seed=0):
    """Its vectors, and the gradient of a sum of them, weighed by chance, for every parameter."""
    torch.manual_seed(seed)  # of dropout
    for weight in network.parameters():
        weight.grad = None
    vectors = network(images)
    (vectors.float() * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return vectors.detach(), {name: weight.grad for name, weight in network.named_parameters()}


def off(found, expected):
    """How far numbers are off, relative to the size of them all."""
    found, expected = ([each] if isinstance(each, torch.Tensor) else each.values() for each in (found, expected))
    found, expected = (torch.cat([each.float().flatten() for each in tensors]) for tensors in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def same(found, expected, tolerance=1e-4):
    """Vectors and gradients are the same but for rounding."""
    assert off(found[0], expected[0]) < tolerance
    assert off(found[1], expected[1]) < tolerance


def without_gradient(gradients):
    """The parameters that learn nothing."""
    return [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]


def seen_by_head(backbone, images):
    """What the head is given, and what it makes of it."""
    given = []
    with backbone.head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])):
        vectors = backbone(images)
    return given[0], vectors


@torch.no_grad()
def test_maps_and_vectors_have_the_shapes_they_say(case):
    _, size, backbone = case
    assert isinstance(backbone, Backbone)
    maps, (last, vectors) = backbone.features(numbers(size)), seen_by_head(backbone, numbers(size))
    assert vectors.shape == (2, backbone.out_features)
    assert tuple(each.shape[1] for each in maps) == tuple(backbone.out_channels)
    assert not growing([numbers(size), *maps])
    assert all(each.isfinite().all() and each.std() > 0 for each in [*maps, vectors])
    assert last.shape == maps[-1].shape
    assert last.equal(maps[-1]) or type(backbone).forward is not Backbone.forward
    assert len(backbone.paper) > 10
    assert 1980 < backbone.year < 2030


def growing(maps):
    """The maps that are higher or wider than the one before."""
    sides = [each.shape[2:] for each in maps]
    return [fine for fine, coarse in pairwise(sides) if coarse[0] > fine[0] or coarse[1] > fine[1]]


@torch.no_grad()
def test_the_parts_are_in_the_order_they_work_in_and_have_all_weights(case):
    _, size, backbone = case
    parts, calls = [part for part in backbone.sequence if [*part.parameters()]], []
    with ExitStack() as stack:
        for place, part in enumerate(parts):
            stack.enter_context(part.register_forward_hook(lambda *_, place=place: calls.append(place)))
        backbone(numbers(size))
    assert list(dict.fromkeys(calls)) == list(range(len(parts)))
    assert {*backbone.parameters()} == {weight for part in parts for weight in part.parameters()}


def test_every_parameter_learns(case):
    _, size, backbone = case
    images = numbers(size, count=3)
    vectors, gradients = learnt(backbone.train(), images)
    assert not without_gradient(gradients)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert vectors.isfinite().all()
    assert not vectors[0].equal(vectors[1])


def test_the_images_get_a_gradient_and_stay_as_they_are(case):
    _, size, backbone = case
    images = numbers(size).requires_grad_()
    before = images.detach().clone()
    backbone.train()(images).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.flatten(1).any(1).all()
    assert images.detach().equal(before)


@torch.no_grad()
def test_in_eval_mode_calls_repeat_and_images_are_alone(case):
    _, size, backbone = case
    images = numbers(size, count=3)
    vectors = backbone(images)
    assert backbone(images).equal(vectors)
    assert off(backbone(images[1:2]), vectors[1:2]) < 1e-4
    images[[0, 2]] = torch.nan  # which would spread by the smallest leak
    assert off(backbone(images)[1], vectors[1]) < 1e-4


@torch.no_grad()
def test_bytes_are_the_numbers_they_stand_for(case):
    _, size, backbone = case
    seen = pictures(size)
    before = seen.clone()
    assert off(backbone(seen), backbone(numbers(size))) < 1e-4
    assert seen.equal(before)


def test_bf16_is_close_to_float32(case):
    _, size, backbone = case
    expected = learnt(backbone, numbers(size))
    with torch.autocast("cpu", torch.bfloat16):
        vectors, gradients = learnt(backbone, numbers(size))
        of_bytes = backbone(pictures(size))
    assert off(vectors, expected[0]) < 0.03
    assert off(of_bytes, expected[0]) < 0.03
    # Some gradients hang on roundings whatever the arithmetic, where deep layers of ReLU switch: so much may be off.
    rounded = copy.deepcopy(backbone).bfloat16().float()
    assert off(gradients, expected[1]) < 0.02 + 3 * off(learnt(rounded, numbers(size))[1], expected[1])
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def compiled(backbone, backend):
    torch._dynamo.reset()
    return torch.compile(backbone, fullgraph=True, backend=backend, dynamic=False)


@pytest.mark.parametrize(("name", "size"), [pytest.param(*case, marks=() if case[1] == 28 else pytest.mark.slow) for case in CASES])
def test_one_graph_holds_it_all(name, size):
    backbone = fresh(name, size)
    expected = learnt(backbone.train(), numbers(size))
    same(learnt(compiled(backbone, "eager"), numbers(size)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_compiler_changes_nothing(name):
    backbone = fresh(name, 28)
    same(learnt(compiled(backbone, "inductor"), numbers(28)), learnt(backbone, numbers(28)), tolerance=1e-3)


@torch.no_grad()
def test_saved_weights_make_the_same_of_another(case, tmp_path):
    name, size, backbone = case
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    other = fresh(name, size, seed=1)
    assert not other(numbers(size)).equal(backbone(numbers(size)))
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert other(numbers(size)).equal(backbone(numbers(size)))


def test_channels_last_gives_the_same(case):
    _, size, backbone = case
    # In float32 a sum near 0 may be cut off by the ReLU of one and not of the other.
    plain, images = copy.deepcopy(backbone).double(), numbers(size).double()
    expected = learnt(plain, images)
    other = plain.to(memory_format=torch.channels_last)
    same(learnt(other, images.contiguous(memory_format=torch.channels_last)), expected)
    same(learnt(other, images), expected)


@pytest.mark.parametrize("hidden", [0, 32])
def test_a_dense_head_takes_the_whole_last_map(case, hidden):
    name, size, _ = case
    backbone = fresh(name, size, hidden=hidden)
    last, vectors = seen_by_head(backbone, numbers(size))
    flat = last.flatten(1)
    assert last.shape == backbone.features(numbers(size))[-1].shape
    assert backbone.out_features == vectors.shape[1] == (hidden or flat.shape[1])
    dense = backbone.head[1] if hidden else None
    torch.testing.assert_close(vectors, F.relu(F.linear(flat, dense.weight, dense.bias)) if hidden else flat)
    assert not without_gradient(learnt(backbone, numbers(size))[1])


@pytest.mark.parametrize("size", [8, 10, 64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_run(name, size):
    backbone = fresh(name, size)
    assert not growing(backbone.features(numbers(size)))
    vectors, gradients = learnt(backbone.train(), numbers(size))
    assert vectors.shape == (2, backbone.out_features)
    assert vectors.isfinite().all()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


# Normalisation

KINDS = {"group": nn.GroupNorm, "batch": nn.BatchNorm2d, "none": ()}


def options_of(name):
    """What the family's class or function takes."""
    file, _, kind = REGISTRY[name].partition(":")
    return inspect.signature(getattr(import_module(f"lab.backbones.{file}"), kind)).parameters


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("name", [name for name in NAMES if "norm" in options_of(name)])
def test_every_normalisation_can_be_had(name, norm):
    backbone = fresh(name, 28, norm=norm)
    found = {type(module) for module in backbone.modules() if isinstance(module, nn.GroupNorm | nn.BatchNorm2d)}
    assert found == ({KINDS[norm]} if norm != "none" else set())
    assert not without_gradient(learnt(backbone.train(), numbers(28, count=3))[1])
