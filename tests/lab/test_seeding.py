"""Random numbers that depend on (seed, stream, index) and on nothing else."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.seeding import derive, epoch_order, generator, shuffled

# Written down once: a change of any of them changes every run that was ever made.
GOLDEN = {
    (0, "noise", 0): 9144587515262914129,
    (0, "noise", 1): 6545564728581758268,
    (1, "noise", 0): 209214033652848756,
    (0, "epoch", 0): 5326116194759978245,
    (12345, "judge/pixels", 987654321): 1408298836969003625,
}


@pytest.mark.parametrize(("arguments", "seed"), GOLDEN.items())
def test_derived_seeds_stay_what_they_were(arguments, seed):
    assert derive(*arguments) == seed


def test_a_derived_seed_is_the_upper_63_bits_of_a_blake2b_hash():
    digest = hashlib.blake2b(b"7/codes/42", digest_size=8).digest()
    assert derive(7, "codes", 42) == sum(byte << (8 * place) for place, byte in enumerate(digest)) // 2


def test_seeds_streams_and_indices_never_share_a_seed():
    streams = ["noise", "codes", "pixels", "epoch", "judge/pixels", "global/0", "global/1", "", "1", "0/0", "noise/1"]
    found = {derive(seed, stream, index) for seed in range(12) for stream in streams for index in range(300)}
    assert len(found) == 12 * len(streams) * 300
    assert all(0 <= seed < 2**63 for seed in found)


def test_a_generator_gives_the_same_numbers_again_whatever_was_drawn_before():
    first = torch.rand(1000, generator=generator(3, "noise", 5))
    torch.manual_seed(99)
    torch.rand(10, generator=generator(3, "noise", 6))
    assert torch.rand(1000, generator=generator(3, "noise", 5)).equal(first)


def test_neighbouring_steps_and_streams_draw_numbers_that_have_nothing_in_common():
    draws = [torch.randn(20_000, generator=generator(0, stream, index)) for stream in ("a", "b") for index in range(4)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(8)
    assert correlation.abs().max() < 0.04  # 5.6 standard deviations


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    shuffled(5, 10, 3, 40)
    torch.rand(3, generator=generator(5, "x", 1))
    assert torch.get_rng_state().equal(before)


@given(size=st.integers(1, 40), chunks=st.lists(st.integers(1, 60), min_size=1, max_size=12), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_item_comes_once_an_epoch_however_the_stream_is_cut(size, chunks, seed):
    pieces, first = [], 0
    for count in chunks:
        piece = shuffled(seed, size, first, count)
        assert (piece.shape, piece.dtype) == ((count,), torch.int64)
        pieces.append(piece)
        first += count
    stream = torch.cat(pieces)
    assert stream.equal(shuffled(seed, size, 0, len(stream)))
    for epoch in stream.split(size):
        assert len(epoch.unique()) == len(epoch)
        assert 0 <= int(epoch.min()) <= int(epoch.max()) < size


@given(first=st.integers(0, 10**12), count=st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_any_part_of_the_stream_can_be_had_without_what_came_before(first, count):
    expected = [int(epoch_order(1, place // 7, 7)[place % 7]) for place in range(first, first + count)]
    assert shuffled(1, 7, first, count).tolist() == expected


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(seed, epoch, 20).tolist()) for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100


def test_a_caller_may_change_the_positions_it_got():
    before = shuffled(2, 10, 0, 10).clone()
    shuffled(2, 10, 0, 10).zero_()
    assert shuffled(2, 10, 0, 10).equal(before)
