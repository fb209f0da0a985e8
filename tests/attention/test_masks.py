"""Masks are their definitions, entry by entry."""

import pytest
import torch

from lab.attention.masks import bigbird, masked_softmax, padding, windowed

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_padding_marks_what_is_real():
    mask = padding(torch.tensor([0, 2, 5]), 5)
    assert mask.tolist() == [[place < length for place in range(5)] for length in (0, 2, 5)]
    assert mask.dtype == torch.bool


@pytest.mark.parametrize("window", [1, 3, 7, 41])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_a_sliding_window_is_that_of_its_definition(window, dilation):
    length, reach = 17, (window - 1) // 2
    seen = [[any(j == i + step * dilation for step in range(-reach, reach + 1)) for j in range(length)] for i in range(length)]
    assert windowed(length, window, dilation).tolist() == seen


@pytest.mark.parametrize("window", [0, 4, -1])
def test_a_window_without_a_middle_is_refused(window):
    with pytest.raises(ValueError, match=f"window must be odd, so that it has a middle, not {window}"):
        windowed(8, window)


@pytest.mark.parametrize(("length", "window", "world", "random"), [(20, 3, 2, 3), (16, 5, 0, 2), (12, 1, 1, 0), (30, 7, 3, 5)])
def test_bigbird_is_a_window_global_tokens_and_random_ones(length, window, world, random):
    mask = bigbird(length, window, world, random, generator=generator())
    assert mask.dtype == torch.bool
    for i in range(length):
        sure = {j for j in range(length) if abs(i - j) <= window // 2 or j < world or i < world}
        seen = {j for j in range(length) if mask[i, j]}
        assert sure <= seen
        assert len(seen) == min(length, len(sure) + random)
        if world + window // 2 <= i < length - window // 2:
            assert len(seen) == window + world + random


def test_bigbird_allows_as_many_pairs_as_counted_by_hand():
    length, window, world, random = 40, 5, 2, 3
    rows = length - world  # those that are not global; a window loses 1 + 2 at the end, and overlaps the global tokens twice
    pairs = world * length + rows * (window + world + random) - (1 + 2) - (2 + 1)
    assert bigbird(length, window, world, random, generator=generator()).sum() == pairs
    longer = bigbird(2 * length, window, world, random, generator=generator()).sum()
    assert longer - pairs == length * (world + window + world + random)  # linear in the length


def test_bigbird_is_drawn_by_its_generator_alone():
    def draw(seed):
        return bigbird(30, 3, 1, 4, generator=generator(seed))

    state = torch.random.get_rng_state()
    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))
    assert torch.random.get_rng_state().equal(state)
    source = generator(1)
    assert bigbird(30, 3, 1, 4, generator=source).equal(draw(1))
    assert not bigbird(30, 3, 1, 4, generator=source).equal(draw(1))


def test_bigbird_draws_every_key_equally_often():
    source, draws = generator(), 2000
    counts = sum(bigbird(10, 1, 1, 2, generator=source)[5].float() for _ in range(draws))
    assert counts[0] == counts[5] == draws
    others = counts[[1, 2, 3, 4, 6, 7, 8, 9]]
    assert others.sum() == 2 * draws
    deviation = (draws * 0.25 * 0.75) ** 0.5
    assert ((others - draws / 4).abs() < 4.5 * deviation).all()


@pytest.mark.parametrize("length", [12, 14])
def test_bigbird_of_blocks_is_that_of_tokens_enlarged(length):
    small = bigbird(-(-length // 4), 1, 1, 1, generator=generator(3))
    large = bigbird(length, 1, 1, 1, block=4, generator=generator(3))
    assert large.tolist() == [[small[i // 4, j // 4].item() for j in range(length)] for i in range(length)]


def test_bigbird_of_few_tokens_is_full():
    assert bigbird(4, 3, 1, 9, generator=generator()).all()
    assert bigbird(6, 1, 9, 0, generator=generator()).all()


def test_a_masked_softmax_is_that_of_what_is_left():
    torch.manual_seed(0)
    scores, mask = torch.randn(5, 8) * 20, torch.rand(5, 8) < 0.5
    mask[:, 2], mask[3] = True, False
    found = masked_softmax(scores, mask)
    for row, kept, weights in zip(scores, mask, found):
        torch.testing.assert_close(weights[kept], row[kept].softmax(0))
        assert (weights[~kept] == 0).all()
    assert (found[3] == 0).all()
    assert masked_softmax(scores).equal(scores.softmax(-1))


@pytest.mark.parametrize(
    ("given", "found"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_a_masked_softmax_is_at_least_of_single_precision(given, found):
    scores = torch.zeros(2, 3, dtype=given)
    assert masked_softmax(scores).dtype == masked_softmax(scores, scores == 0).dtype == found


def test_a_masked_softmax_learns_nothing_where_it_is_forbidden():
    scores = torch.randn(3, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False, True], [False] * 4, [False, True, False, False]])
    masked_softmax(scores, mask).square().sum().backward()
    assert (scores.grad[~mask] == 0).all()
    assert (scores.grad[0, mask[0]] != 0).all()
