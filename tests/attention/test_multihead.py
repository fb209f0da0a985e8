"""Multi-head attention is torch's; it keeps to its masks, its cache and its past; its weights can be noted."""

import math

import pytest
import torch
from torch import nn

from lab.attention import Attention, recorded
from lab.attention.masks import padding
from lab.attention.multihead import Cache, MultiHead, causal_mask, scaled_dot_product, scaled_dot_product_weights

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEADS, COUNT = 12, 3, 2


def tensors(*lengths):
    return [torch.randn(COUNT, length, WIDTH, requires_grad=True) for length in lengths]


def twins(**options):
    """Ours and torch's with the same weights, biases and all."""
    torch.manual_seed(0)
    ours, theirs = MultiHead(WIDTH, HEADS, **options), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    for weight in ours.parameters():
        nn.init.normal_(weight, std=0.5)
    renamed = {"in_proj_weight": "inputs.weight", "in_proj_bias": "inputs.bias", "out_proj.weight": "output.weight"}
    given = ours.state_dict()
    theirs.load_state_dict({name: given[renamed.get(name, "output.bias")] for name in theirs.state_dict()})
    return ours, theirs


def same(ours, theirs, inputs, arguments, forbidden=None):
    """Values, weights and all gradients agree; `arguments` are ours beyond the inputs, `forbidden` is torch's mask."""
    query, key, value = (*inputs, inputs[-1], inputs[-1])[:3]
    found, noted = ours(*inputs, **arguments), ours.weights(*inputs, **arguments)
    expected, weights = theirs(query, key, value, attn_mask=forbidden, average_attn_weights=False)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(noted, weights)
    sensitivity = torch.randn_like(expected)
    mine = torch.autograd.grad(found, [*inputs, *ours.parameters()], sensitivity)
    other = torch.autograd.grad(expected, [*inputs, *theirs.parameters()], sensitivity)
    for one, another in zip(mine, other, strict=True):
        torch.testing.assert_close(one, another)
        assert another.abs().sum() > 0


# The same function as torch's


@pytest.mark.parametrize("lengths", [(5,), (5, 7), (7, 4), (1, 6), (5, 7, 7)])
def test_it_is_what_torch_computes(lengths):
    same(*twins(), tensors(*lengths), {})


def test_values_without_keys_belong_to_the_queries():
    ours, _ = twins()
    queries, values = tensors(5, 5)
    assert ours(queries, None, values).equal(ours(queries, queries, values))
    assert not ours(queries, None, values).allclose(ours(queries))


def test_causal_is_what_torch_computes_with_its_mask():
    same(*twins(causal=True), tensors(6), {}, nn.Transformer.generate_square_subsequent_mask(6) < 0)


def test_masks_of_any_shape_are_what_torch_computes():
    torch.manual_seed(1)
    for shape in [(5, 7), (COUNT, 1, 5, 7), (HEADS, 5, 7), (COUNT, HEADS, 5, 7)]:
        mask = torch.rand(shape) < 0.6
        mask[..., 0] = True
        same(*twins(), tensors(5, 7), {"mask": mask}, ~mask.expand(COUNT, HEADS, 5, 7).flatten(0, 1))


def test_a_mask_and_causal_are_both_kept():
    mask = torch.rand(6, 6) < 0.5
    mask.fill_diagonal_(True)
    same(*twins(causal=True), tensors(6), {"mask": mask}, ~(mask & torch.ones(6, 6, dtype=torch.bool).tril()))


def test_padding_is_worth_exactly_nothing():
    ours, _ = twins()
    (states,) = tensors(6)
    mask = padding(torch.tensor([6, 4]), 6)[:, None, None]
    assert (ours.weights(states, mask=mask)[1, :, :, 4:] == 0).all()
    cut = ours(states[1:, :4])
    torch.testing.assert_close(ours(states, mask=mask)[1:, :4], cut)
    gradient = torch.autograd.grad(ours(states, mask=mask)[1, :4].sum(), states)[0]
    assert (gradient[1, 4:] == 0).all()


def test_who_may_look_nowhere_sees_nothing():
    ours, _ = twins()
    (states,) = tensors(4)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    found = ours(states, mask=mask)
    torch.testing.assert_close(found[:, 2], ours.output.bias.expand(COUNT, -1))
    assert (ours.weights(states, mask=mask)[:, :, 2] == 0).all()
    found.sum().backward()
    ours.weights(states, mask=mask).square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in [states, *ours.parameters()])


def test_the_weights_are_those_that_the_fused_kernel_uses():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
    mask = torch.rand(5, 7) < 0.7
    for each in (None, mask):
        torch.testing.assert_close(scaled_dot_product_weights(query, key, each) @ value, scaled_dot_product(query, key, value, each))
    score = (query[1, 2, 3] * key[1, 2]).sum(-1) / math.sqrt(4)
    torch.testing.assert_close(scaled_dot_product_weights(query, key)[1, 2, 3], score.exp() / score.exp().sum())


def test_dropout_drops_only_while_training():
    torch.manual_seed(0)
    (states,), module = tensors(6), MultiHead(WIDTH, HEADS, dropout=0.5)
    assert not module(states).allclose(module(states))
    assert module.weights(states).equal(module.eval().weights(states))
    assert module(states).equal(module(states))


def test_a_width_that_the_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="width 10 is no multiple of heads 3"):
        MultiHead(10, 3)


# The past


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (1, 5), (2, 5)])
def test_the_last_query_stands_at_the_last_key(queries, keys):
    mask = causal_mask(queries, keys)
    assert mask.tolist() == [[key <= query + keys - queries for key in range(keys)] for query in range(queries)]


def test_nothing_leaks_from_the_future():
    ours, _ = twins(causal=True)
    (states,) = tensors(6)
    found = ours(states)
    for place in range(6):
        gradient = torch.autograd.grad(found[:, place].square().sum(), states, retain_graph=True)[0].abs().sum((0, 2))
        assert (gradient[place + 1 :] == 0).all()
        assert (gradient[: place + 1] > 0).all()
        assert (ours.weights(states)[:, :, place, place + 1 :] == 0).all()


def turned(states, start):
    """Rotates each pair of numbers by an angle that grows with the place."""
    angle = (torch.arange(states.shape[2]) + start).unsqueeze(1) * torch.tensor([1.0, 0.3])
    even, odd = states[..., 0::2], states[..., 1::2]
    return torch.cat([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)


@pytest.mark.parametrize("rotation", [None, turned])
@pytest.mark.parametrize("pieces", [[1] * 7, [7], [3, 1, 3], [1, 6]])
def test_with_a_cache_pieces_give_the_same_as_the_whole(pieces, rotation):
    ours, _ = twins(causal=True, rotation=rotation)
    (states,) = tensors(7)
    whole, weights, cache = ours(states), ours.weights(states), Cache()
    if rotation:
        assert not whole.allclose(twins(causal=True)[0](states))
    start = 0
    for piece in states.split(pieces, 1):
        end = start + piece.shape[1]
        torch.testing.assert_close(ours.weights(piece, cache=cache), weights[:, :, start:end, :end])
        assert len(cache) == start
        torch.testing.assert_close(ours(piece, cache=cache), whole[:, start:end])
        assert len(cache) == end
        start = end


# Noting the weights


def network():
    torch.manual_seed(0)
    return nn.Sequential(MultiHead(WIDTH, HEADS), nn.Sequential(nn.LayerNorm(WIDTH), MultiHead(WIDTH, 2, causal=True)))


def test_recorded_weights_are_those_of_every_call_by_name():
    model = network()
    first, second = tensors(4, 5)
    with recorded(model) as notes:
        model(first)
        model(second)
    assert set(notes) == {"0", "1.1"}
    for states, call in ((first, 0), (second, 1)):
        assert notes["0"][call].equal(model[0].weights(states))
        assert notes["1.1"][call].equal(model[1][1].weights(model[1][0](model[0](states))))
        assert not notes["0"][call].requires_grad


def test_recording_changes_neither_values_nor_gradients_and_leaves_nothing_behind():
    model = network()
    (states,) = tensors(4)
    expected = model(states)
    wanted = torch.autograd.grad(expected.sum(), list(model.parameters()))
    with recorded(model) as notes:
        found = model(states)
    assert found.equal(expected)
    for one, another in zip(torch.autograd.grad(found.sum(), list(model.parameters())), wanted, strict=True):
        assert one.equal(another)
    model(states)
    assert [len(calls) for calls in notes.values()] == [1, 1]
    with pytest.raises(ZeroDivisionError), recorded(model):
        raise ZeroDivisionError
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_recording_with_a_cache_sees_the_keys_of_the_moment():
    model = MultiHead(WIDTH, HEADS, causal=True)
    (states,) = tensors(3)
    cache = Cache()
    with recorded(model) as notes:
        for token in states.split(1, 1):
            model(token, cache=cache)
    assert [each.shape[-1] for each in notes[""]] == [1, 2, 3]
    for place, each in enumerate(notes[""]):
        torch.testing.assert_close(each[:, :, 0], model.weights(states)[:, :, place, : place + 1])


def test_attention_without_weights_cannot_be_made():
    class Blind(Attention):
        pass

    with pytest.raises(TypeError, match="weights"):
        Blind()
