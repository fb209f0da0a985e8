"""Positional encodings: the formulas, term by term, and what they are made for: distances."""

import math

import pytest
import torch

from lab.attention.multihead import Cache, MultiHead
from lab.attention.positions import Learned, Rotary, Sinusoidal, Sinusoidal2d, embed_times, sinusoidal, sinusoidal_2d

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Sinusoidal


def test_sinusoidal_is_the_papers_formula():
    table = sinusoidal(50, 12)
    assert table.dtype == torch.float32
    for place in range(50):
        for pair in range(6):
            angle = place / 10000 ** (2 * pair / 12)
            assert table[place, 2 * pair].item() == pytest.approx(math.sin(angle), abs=5e-6)
            assert table[place, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=5e-6)


def test_the_product_of_two_places_depends_on_their_distance_only():
    table = embed_times(torch.arange(40, dtype=torch.float64), 16)
    products = table @ table.T
    expected = [sum(math.cos(distance / 10000 ** (i / 8)) for i in range(8)) for distance in range(40)]
    for one in range(40):
        for other in range(40):
            assert products[one, other].item() == pytest.approx(expected[abs(one - other)], abs=1e-12)


def test_times_between_whole_numbers_follow_the_same_waves():
    times = torch.tensor([0.0, 0.25, 999.5], dtype=torch.float64)
    found = embed_times(times, 8)
    for row, time in zip(found, times.tolist(), strict=True):
        waves = [wave(time / 10000 ** (i / 4)) for i in range(4) for wave in (math.sin, math.cos)]
        torch.testing.assert_close(row, torch.tensor(waves, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float32])
def test_times_of_any_format_are_computed_in_float32(dtype):
    found = embed_times(torch.arange(8).to(dtype), 6)
    assert found.dtype == torch.float32
    assert found.equal(sinusoidal(8, 6))


def test_in_two_dimensions_half_of_the_channels_tell_the_row_and_half_the_column():
    table = sinusoidal_2d(5, 3, 16)
    assert table.shape == (5, 3, 16)
    for row in range(5):
        for column in range(3):
            assert table[row, column, :8].equal(sinusoidal(5, 8)[row])
            assert table[row, column, 8:].equal(sinusoidal(3, 8)[column])


@pytest.mark.parametrize("make", [lambda: sinusoidal(4, 7), lambda: sinusoidal_2d(2, 2, 6), lambda: embed_times(torch.zeros(2), 3)])
def test_widths_that_cannot_be_paired_are_refused(make):
    with pytest.raises(ValueError, match=r"pairs of a sine and a cosine"):
        make()


# Added to tokens


def test_modules_add_the_encoding_of_the_place():
    tokens = normal(2, 6, 8, dtype=torch.float32)
    assert Sinusoidal()(tokens).equal(tokens + sinusoidal(6, 8))
    assert Sinusoidal2d(2, 3, 8)(tokens).equal(tokens + sinusoidal_2d(2, 3, 8).reshape(6, 8))
    learned = Learned(9, 8)
    assert learned(tokens).equal(tokens + learned.table[:6])


@pytest.mark.parametrize("positions", [Sinusoidal(), Learned(9, 8)])
def test_a_sequence_may_come_in_parts(positions):
    tokens = normal(2, 9, 8, dtype=torch.float32)
    torch.testing.assert_close(torch.cat([positions(tokens[:, :4]), positions(tokens[:, 4:], 4)], 1), positions(tokens))


def test_fixed_tables_are_no_weights():
    assert not Sinusoidal2d(2, 3, 8).state_dict()


def test_learned_places_begin_small_and_end_somewhere():
    torch.manual_seed(0)
    learned = Learned(200, 100)
    assert learned.table.std().item() == pytest.approx(0.02, rel=0.02)
    assert learned.table.mean().item() == pytest.approx(0, abs=5e-4)
    learned(torch.zeros(1, 1, 100), start=199)
    with pytest.raises(ValueError, match="a sequence of 201 tokens is longer than the 200 places"):
        learned(torch.zeros(1, 2, 100), start=199)


# Rotary


def test_rotary_multiplies_pairs_as_complex_numbers():
    x = normal(2, 3, 7, 8)
    turns = torch.tensor([[place / 10000 ** (2 * i / 8) for i in range(4)] for place in range(7)], dtype=torch.float64)
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(turns), turns)
    torch.testing.assert_close(Rotary()(x), torch.view_as_real(expected).flatten(-2), rtol=0, atol=1e-6)


def at(vector, place):
    return Rotary()(vector.view(1, 1, 1, -1), place).flatten()


def test_a_query_and_a_key_know_their_distance_only():
    query, key = normal(16, seed=1), normal(16, seed=2)
    products = {(m, n): (at(query, m) @ at(key, n)).item() for m in range(0, 40, 3) for n in range(0, 40, 5)}
    by_distance = {}
    for (m, n), product in products.items():
        assert product == pytest.approx(by_distance.setdefault(m - n, product), abs=2e-5)
    assert len({round(product, 3) for product in by_distance.values()}) > 30


def test_rotary_keeps_lengths_and_leaves_the_first_place_alone():
    x = normal(2, 3, 7, 8)
    turned = Rotary()(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert turned[:, :, 0].equal(x[:, :, 0])


def test_rotary_goes_on_from_a_start():
    x = normal(2, 3, 7, 8)
    torch.testing.assert_close(torch.cat([Rotary()(x[:, :, :4]), Rotary()(x[:, :, 4:], 4)], 2), Rotary()(x))


def test_rotary_is_computed_in_float32_whatever_comes():
    x = normal(2, 3, 300, 8).bfloat16()
    turned = Rotary()(x)
    assert turned.dtype == torch.bfloat16
    assert turned.equal(Rotary()(x.float()).bfloat16())


def test_attention_with_rotation_does_not_see_where_a_sequence_begins():
    torch.manual_seed(0)
    attention = MultiHead(16, 2, causal=True, rotation=Rotary()).double()
    tokens = normal(2, 6, 16)
    shifted = MultiHead(16, 2, causal=True, rotation=lambda x, start: Rotary()(x, start + 11)).double()
    plain = MultiHead(16, 2, causal=True).double()
    for other in (shifted, plain):
        other.load_state_dict(attention.state_dict())
    torch.testing.assert_close(shifted(tokens), attention(tokens), rtol=0, atol=1e-6)
    assert (plain(tokens) - attention(tokens)).abs().max() > 1e-3


def test_attention_with_rotation_and_a_cache_is_attention_to_all_at_once():
    torch.manual_seed(0)
    attention, cache = MultiHead(16, 2, causal=True, rotation=Rotary()).double(), Cache()
    tokens = normal(2, 6, 16)
    parts = [attention(part, cache=cache) for part in tokens.split([3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), attention(tokens))
