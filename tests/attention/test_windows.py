"""Window attention is dense attention over the whole map with a mask and a bias made pixel by pixel."""

import math

import pytest
import torch

from lab.attention import recorded
from lab.attention.windows import WindowAttention, cut, join, offsets

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HEADS, COUNT = 8, 2, 2
CASES = [(6, 9, 3, 1), (6, 6, 3, 2), (4, 8, 4, 0), (4, 8, 4, 2), (4, 4, 4, 1), (7, 7, 7, 0), (14, 14, 7, 3)]


def setup(height, width, window, shift):
    torch.manual_seed(0)
    module = WindowAttention(WIDTH, HEADS, window, shift)
    torch.nn.init.normal_(module.bias)
    return module, torch.randn(COUNT, height, width, WIDTH, requires_grad=True)


def dense_weights(module, maps):
    """(N, heads, pixels, pixels) of the whole map: who shares a shifted window, found without rolling anything."""
    height, width, window, shift = *maps.shape[1:3], module.window, module.shift
    pixels = [(y, x) for y in range(height) for x in range(width)]
    seen = torch.zeros(len(pixels), len(pixels), dtype=torch.bool)
    number = torch.zeros(len(pixels), len(pixels), dtype=torch.long)
    for i, (y, x) in enumerate(pixels):
        for j, (v, u) in enumerate(pixels):
            if (y - shift) // window == (v - shift) // window and (x - shift) // window == (u - shift) // window:
                seen[i, j], number[i, j] = True, (y - v + window - 1) * (2 * window - 1) + x - u + window - 1
    query, key = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in module.inputs(maps.flatten(1, 2)).chunk(3, -1)[:2])
    scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH / HEADS) + module.bias[:, number]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def dense(module, maps):
    value = module.inputs(maps.flatten(1, 2)).chunk(3, -1)[2].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return module.output((dense_weights(module, maps) @ value).transpose(1, 2).flatten(2)).view_as(maps)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_dense_attention_with_a_mask(case):
    module, maps = setup(*case)
    found, expected = module(maps), dense(module, maps)
    torch.testing.assert_close(found, expected)
    sensitivity, learned = torch.randn_like(found), [maps, *module.parameters()]
    mine, other = (torch.autograd.grad(each, learned, sensitivity) for each in (found, expected))
    for one, another in zip(mine, other, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-5)
        assert another.abs().sum() > 0


@pytest.mark.parametrize("case", CASES[:-1])
def test_weights_are_those_of_dense_attention_window_by_window(case):
    height, width, window, shift = case
    module, maps = setup(*case)
    weights, whole = module.weights(maps), dense_weights(module, maps)
    windows = [(top, left) for top in range(0, height, window) for left in range(0, width, window)]
    assert weights.shape == (COUNT * len(windows), HEADS, window**2, window**2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for number, (top, left) in enumerate(windows):
        inside = [(y, x) for y in range(top, top + window) for x in range(left, left + window)]
        place = torch.tensor([(y + shift) % height * width + (x + shift) % width for y, x in inside])
        found, expected = weights[number :: len(windows)], whole[:, :, place][:, :, :, place]
        torch.testing.assert_close(found, expected)
        assert (found[expected == 0] == 0).all()
    with recorded(module) as notes:
        module(maps)
    assert notes[""][0].equal(weights)


def test_rolling_the_map_by_a_whole_window_rolls_the_outcome():
    module, maps = setup(8, 12, 4, 0)
    for by in [(4, 0), (0, 8), (-4, 4)]:
        torch.testing.assert_close(module(maps.roll(by, (1, 2))), module(maps).roll(by, (1, 2)))
    assert not module(maps.roll(1, 1)).allclose(module(maps).roll(1, 1))


def test_what_is_in_another_window_is_neither_seen_nor_learned_from():
    module, maps = setup(6, 6, 3, 1)
    gradient = torch.autograd.grad(module(maps)[0, 0, 0].sum(), maps)[0].abs().sum(-1)
    assert gradient[0, 0, 0] > 0
    assert (gradient > 0).sum() == 1  # a corner of a map that is shifted by one stands alone
    gradient = torch.autograd.grad(module(maps)[1, 2, 5].sum(), maps)[0].abs().sum(-1)
    assert (gradient[1] > 0).nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (4, 5)]


def test_equal_offsets_share_a_bias():
    number = offsets(3)
    apart = {}
    for i in range(9):
        for j in range(9):
            apart.setdefault((i // 3 - j // 3, i % 3 - j % 3), set()).add(number[i, j].item())
    assert len(apart) == 5**2
    assert sorted(each for (each,) in apart.values()) == list(range(5**2))


def test_windows_are_cut_row_by_row_and_joined_again():
    maps = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    windows = cut(maps, 2)
    assert windows.shape == (2, 6, 4, 3)
    assert windows[1, 4].equal(maps[1, 2:4, 2:4].reshape(4, 3))
    assert join(windows, 2, 4, 6).equal(maps)


@pytest.mark.parametrize("shape", [(7, 6), (6, 7)])
def test_maps_of_broken_windows_are_refused(shape):
    with pytest.raises(ValueError, match=f"a map of {shape[0]}x{shape[1]} has no whole number of windows of 3x3"):
        WindowAttention(WIDTH, HEADS, 3)(torch.zeros(1, *shape, WIDTH))


@pytest.mark.parametrize("shift", [-1, 3])
def test_a_shift_by_a_whole_window_is_refused(shift):
    with pytest.raises(ValueError, match=f"shift must be from 0 to 2, less than the window, not {shift}"):
        WindowAttention(WIDTH, HEADS, 3, shift)


def test_a_width_that_the_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="width 8 is no multiple of heads 3"):
        WindowAttention(8, 3)


def test_it_has_the_weights_of_the_paper_and_saves_no_others():
    module = WindowAttention(96, 3)
    assert sum(weight.numel() for weight in module.parameters()) == 4 * 96**2 + 4 * 96 + 3 * 13**2
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}
    assert module.bias.std().item() == pytest.approx(0.02, rel=0.2)
