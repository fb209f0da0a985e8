"""The replay memory against a naive one: a list per game that holds whole stacks, as the game showed them."""

import gc
import logging
import math
import weakref
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.config import UserError
from rl import replay
from rl.replay import KINDS, Replay, ReplayConfig, SumTree, Transitions, check_room, free_memory, needed

FRAME = (2, 3)
NAMES = tuple(field.name for field in fields(Transitions))


# The naive memory


@dataclass
class Row:
    """What one game did in one time row."""

    stack: np.ndarray
    action: int
    reward: float
    started: bool
    terminal: bool
    ended: bool
    playable: bool


class Stream:
    """N games that end, are broken off and lose lives by chance; remembers every row for ever."""

    def __init__(self, games, stack, seed, end=0.1, cut=0.1, life=0.1):
        self.stack, self.chances, self.rng = stack, (end, cut, life), np.random.default_rng(seed)
        self.rows: list[list[Row]] = [[] for _ in range(games)]

    def step(self):
        """One more row of every game, as `append` takes it."""
        for rows in self.rows:
            rows.append(self.next(rows))
        newest = [rows[-1] for rows in self.rows]
        given = {name: np.array([getattr(row, name) for row in newest]) for name in ("started", "terminal", "ended", "playable")}
        given["frames"] = np.stack([row.stack[-1] for row in newest])
        given["rewards"] = np.array([row.reward for row in newest], np.float32)
        return given | {"actions": np.array([row.action for row in newest])}

    def next(self, rows):
        final = bool(rows) and rows[-1].ended
        started = not rows or not (final or rows[-1].playable)
        frame = self.rng.integers(1, 256, FRAME, np.uint8)
        before = np.zeros((self.stack, *FRAME), np.uint8) if started else rows[-1].stack
        end, cut, life = self.rng.random(3) < self.chances
        # What is written beside a final frame means nothing; it is made up, so that a memory which used it is caught.
        action, reward = int(self.rng.integers(18)), float(self.rng.integers(-8, 9)) / 4
        terminal, ended = (False, False) if final else (bool(end or (life and not cut)), bool(end or cut))
        return Row(np.concatenate([before[1:], frame[None]]), action, reward, started, terminal, ended, not final)

    def transition(self, time, game, n_step, discount):
        rows, total = self.rows[game], 0.0
        for step in range(n_step):
            row = rows[time + step]
            total += discount**step * row.reward
            if row.terminal or row.ended:
                break
        later = 0.0 if row.terminal else discount ** (step + 1)
        return rows[time].stack, rows[time].action, total, rows[time + step + 1].stack, later

    def sampleable(self, capacity, n_step):
        """By the definition: of the newest rows, all whose stack is held, with n newer ones, at which somebody acted."""
        written, held = len(self.rows[0]), capacity // len(self.rows)
        times = range(max(0, written - held + self.stack - 1), written - n_step)
        return {(time, game) for time in times for game in range(len(self.rows)) if self.rows[game][time].playable}


def memory(games=2, stack=4, n_step=3, capacity=40, discount=0.5, **options):
    return Replay(ReplayConfig(capacity=capacity, **options), games, (stack, *FRAME), n_step, discount)


def filled(rows, seed=0, games=2, stack=4, n_step=3, **options):
    store, stream = memory(games, stack, n_step, **options), Stream(games, stack, seed)
    for _ in range(rows):
        store.append(**stream.step())
    return store, stream


def uniforms(seed):
    """A draw for every attempt, of any batch."""
    return lambda batch: lambda attempt: torch.rand(batch, 2, generator=torch.Generator().manual_seed(1000 * seed + attempt))


def cells(batch):
    return list(zip(batch.times.tolist(), batch.games.tolist()))


def assert_right(batch, stream, n_step, discount):
    expected = [stream.transition(time, game, n_step, discount) for time, game in cells(batch)]
    stacks, actions, returns, next_stacks, discounts = map(list, zip(*expected))
    assert np.array_equal(batch.observations.numpy(), np.stack(stacks))
    assert np.array_equal(batch.next_observations.numpy(), np.stack(next_stacks))
    assert batch.actions.tolist() == actions
    assert batch.returns.tolist() == np.array(returns, np.float32).tolist()
    assert batch.discounts.tolist() == np.array(discounts, np.float32).tolist()


def assert_same(one, other):
    for name in NAMES:
        assert getattr(one, name).equal(getattr(other, name)), name


STREAMS = st.fixed_dictionaries(
    {
        "games": st.sampled_from([1, 2, 3, 4]),
        "stack": st.sampled_from([1, 2, 3, 4]),
        "n_step": st.sampled_from([1, 2, 3, 4, 5]),
        "spare": st.sampled_from([0, 1, 5, 20]),
        "left": st.integers(0, 3),
        "rounds": st.sampled_from([0.5, 1.2, 2.2, 3.5]),
        "end": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "cut": st.sampled_from([0.0, 0.1, 0.5]),
        "life": st.sampled_from([0.0, 0.2, 0.7]),
        "seed": st.integers(0, 2**31),
    }
)


def streamed(case, **options):
    """A memory, what was put into it and what may be sampled, at several moments of a random stream."""
    games, stack, n_step = case["games"], case["stack"], case["n_step"]
    held = stack + n_step + 2 + case["spare"]
    capacity = held * games + min(case["left"], games - 1)
    store = memory(games, stack, n_step, capacity, **options)
    stream = Stream(games, stack, case["seed"], case["end"], case["cut"], case["life"])
    for _ in range(max(1, int(held * case["rounds"]))):
        store.append(**stream.step())
        if store.written % 3 == 0:
            yield store, stream, stream.sampleable(capacity, n_step)


# What a transition is


@given(case=STREAMS)
@settings(max_examples=300, deadline=None)
def test_every_transition_is_what_the_game_showed(case):
    for store, stream, allowed in streamed(case):
        if allowed:
            times, games = torch.tensor(sorted(allowed)).unbind(1)
            batch = store.gather(times, games)
            assert_right(batch, stream, case["n_step"], 0.5)
            assert cells(batch) == sorted(allowed)
            assert batch.weights.tolist() == [1.0] * len(allowed)


@given(case=STREAMS)
@settings(max_examples=60, deadline=None)
def test_exactly_the_transitions_of_the_definition_are_sampled(case):
    for store, _, allowed in streamed(case):
        assert store.sampleable == len(allowed)
        assert (store.filled > 0) == (store.written > case["n_step"])
        if not allowed:
            with pytest.raises(ValueError, match="nothing can be sampled"):
                store.sample(1, uniforms(0)(1))
            continue
        grid = torch.cartesian_prod((torch.arange(store.filled) + 0.5) / store.filled, (torch.arange(store.games) + 0.5) / store.games)
        batch = store.sample(len(grid), lambda attempt: uniforms(attempt)(len(grid))(0) if attempt else grid)
        assert set(cells(batch)) == allowed


@given(case=STREAMS)
@settings(max_examples=60, deadline=None)
def test_only_what_may_be_sampled_has_a_priority(case):
    for store, _, allowed in streamed(case, prioritised=True):
        leaves = {time % store.rows * store.games + game for time, game in allowed}
        assert set(store.tree.masses.nonzero()[:, 0].tolist()) == leaves
        assert store.sampleable == len(allowed)
        if allowed:
            batch = store.sample(16, uniforms(store.written)(16))
            assert set(cells(batch)) <= allowed
            store.reprioritise(batch, torch.linspace(-2, 2, 16))


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("prioritised", [False, True])
def test_the_arithmetic_of_a_gpu_gives_the_same(monkeypatch, n_step, prioritised):
    one, _ = filled(47, n_step=n_step, prioritised=prioritised)
    monkeypatch.setattr(Replay, "math_of", {"cpu": torch})
    other, _ = filled(47, n_step=n_step, prioritised=prioritised)
    assert isinstance(other._outcomes, torch.Tensor)
    for step in range(10):
        assert_same(one.sample(32, uniforms(step)(32)), other.sample(32, uniforms(step)(32)))
    again = memory(n_step=n_step, prioritised=prioritised)
    again.write(other.oldest, other.read(other.oldest, other.written))
    again.load_state_dict(other.state_dict())
    assert_same(one.sample(32, uniforms(0)(32)), again.sample(32, uniforms(0)(32)))


def test_stacks_one_step_apart_share_their_frames():
    batch = filled(30, n_step=1)[0].sample(5, uniforms(0)(5))
    assert batch.observations.untyped_storage().data_ptr() == batch.next_observations.untyped_storage().data_ptr()
    assert batch.observations.untyped_storage().nbytes() == 5 * (4 + 1) * math.prod(FRAME)


def test_types_and_shapes_of_a_batch():
    store, _ = filled(30)
    batch = store.sample(5, uniforms(0)(5))
    assert batch.observations.shape == batch.next_observations.shape == (5, 4, *FRAME)
    assert batch.observations.is_contiguous()
    assert batch.next_observations.is_contiguous()
    kinds = [torch.uint8, torch.int64, torch.float32, torch.uint8, torch.float32, torch.float32, torch.int64, torch.int64]
    assert [getattr(batch, name).dtype for name in NAMES] == kinds


def test_a_batch_moves_to_another_device_as_a_whole():
    batch = filled(30)[0].sample(5, uniforms(0)(5))
    assert_same(batch.to("cpu"), batch)
    moved = batch.to("meta")
    assert {getattr(moved, name).device.type for name in NAMES} == {"meta"}
    assert [getattr(moved, name).dtype for name in NAMES] == [getattr(batch, name).dtype for name in NAMES]


def test_returns_with_an_ordinary_discount():
    store, stream = filled(40, n_step=5, discount=0.99)
    times, games = torch.tensor(sorted(stream.sampleable(40, 5))).unbind(1)
    batch = store.gather(times, games)
    expected = [stream.transition(time, game, 5, 0.99) for time, game in cells(batch)]
    assert batch.returns.tolist() == pytest.approx([total for _, _, total, _, _ in expected], abs=1e-6)
    assert batch.discounts.tolist() == pytest.approx([later for *_, later in expected], abs=1e-7)


def played(*marks, n_step=3):
    """One game with a reward of 1 for every action, its frames all 1, 2, 3, ...; marks: s(tarted), t(erminal), e(nded), f(inal)."""
    store = memory(1, 2, n_step)
    for row, mark in enumerate(marks):
        flags = {
            name: np.array([letter in mark]) for name, letter in (("started", "s"), ("terminal", "t"), ("ended", "e"), ("playable", "f"))
        }
        flags["playable"] = ~flags["playable"]
        frames = np.full((1, *FRAME), row + 1, np.uint8)
        store.append(frames=frames, actions=np.array([row]), rewards=np.ones(1, np.float32), **flags)
    return store


def shown(store, time):
    """Both observations by the number of their frames, the return, the discount."""
    batch = store.gather(torch.tensor([time]), torch.tensor([0]))
    stacks = (batch.observations[0, :, 0, 0].tolist(), batch.next_observations[0, :, 0, 0].tolist())
    return *stacks, float(batch.returns), float(batch.discounts)


def test_the_last_transitions_of_a_game_are_kept_and_stop_there():
    store = played("s", "", "te", "f", "s", "", "", "")
    assert store.sampleable == 4  # times 0, 1, 2 and 4
    assert shown(store, 0) == ([0, 1], [3, 4], 1.75, 0)
    assert shown(store, 1) == ([1, 2], [3, 4], 1.5, 0)
    assert shown(store, 2) == ([2, 3], [3, 4], 1, 0)
    assert shown(store, 4) == ([0, 5], [7, 8], 1.75, 0.125)


def test_a_game_that_was_broken_off_bootstraps_from_its_final_frame():
    store = played("s", "", "e", "f", "s", "", "")
    assert shown(store, 1) == ([1, 2], [3, 4], 1.5, 0.25)
    assert shown(store, 2) == ([2, 3], [3, 4], 1, 0.5)


def test_a_lost_life_ends_the_return_but_not_the_stack():
    store = played("s", "t", "", "", "", "")
    assert shown(store, 0) == ([0, 1], [2, 3], 1.5, 0)
    assert shown(store, 2) == ([2, 3], [5, 6], 1.75, 0.125)


def test_there_is_nothing_before_the_first_row_even_in_a_memory_that_was_used_before():
    store, stream = filled(40)
    store.load_state_dict({"written": 0})
    for _ in range(5):
        store.append(**stream.step() | {"started": np.zeros(2, bool)})
    stacks = store.gather(torch.tensor([0, 1]), torch.tensor([0, 1])).observations
    assert [[bool(frame.any()) for frame in stack] for stack in stacks] == [[False, False, False, True], [False, False, True, True]]


# Uniform sampling


def frequencies(store, draws, batch=1000):
    """How often each transition comes up."""
    found = {}
    for number in range(draws // batch):
        for cell in cells(store.sample(batch, uniforms(number)(batch))):
            found[cell] = found.get(cell, 0) + 1
    return found


def test_every_transition_is_as_likely_as_any_other():
    store, stream = filled(57, games=3, capacity=90, seed=4)
    allowed = stream.sampleable(90, 3)
    assert len(allowed) < 3 * store.filled, "no row is to be refused"
    found = frequencies(store, 60_000)
    assert set(found) == allowed
    expected = 60_000 / len(allowed)
    chi_square = sum((count - expected) ** 2 / expected for count in found.values())
    freedom = len(allowed) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_time_takes_the_first_column_and_a_game_the_second():
    store, _ = filled(20, games=2, capacity=1000, n_step=1, stack=1)
    store._rows["playable"].fill_(True)
    numbers = torch.tensor([[0.0, 0.0], [0.999, 0.0], [0.0, 0.999], [0.5, 0.5]])
    assert cells(store.sample(4, lambda attempt: numbers)) == [(0, 0), (18, 0), (0, 1), (9, 1)]


def test_the_last_numbers_below_one_stay_within_the_memory():
    below = np.nextafter(np.float32(1), np.float32(0))
    store, _ = filled(20, games=2, capacity=1000, n_step=1, stack=1)
    store._rows["playable"].fill_(True)
    for prioritised in (False, True):
        store.tree = SumTree(1000) if prioritised else None
        if store.tree:
            store.tree.fill(0, 0.1, 38)
        assert cells(store.sample(1, lambda attempt: torch.tensor([[below, below]]))) == [(18, 1)]


def test_a_million_rows_are_told_apart_by_numbers_of_24_bits():
    store = Replay(ReplayConfig(capacity=3_000_000), 1, (1, 1, 1), 1, 0.5)
    store.written = 3_000_000
    times, _ = store._place(torch.rand(2_000_000, 2, generator=torch.Generator().manual_seed(0)))
    # Without the second column's help 5 numbers fall to some rows and 6 to others: a seventh more, here 5 standard deviations.
    coarse = (torch.arange(2**24, dtype=torch.float64) / 2**24 * store.filled).long().bincount(minlength=store.filled)
    assert set(coarse.tolist()) == {5, 6}
    expected = (coarse == 6).double().mean()
    assert float((coarse[times] == 6).double().mean()) == pytest.approx(float(expected), abs=5 * 0.5 / math.sqrt(2_000_000))


def test_the_same_draw_gives_the_same_batch():
    store, _ = filled(40)
    assert_same(store.sample(64, uniforms(3)(64)), store.sample(64, uniforms(3)(64)))
    assert cells(store.sample(64, uniforms(3)(64))) != cells(store.sample(64, uniforms(4)(64)))


def test_a_draw_of_another_shape_is_refused():
    store, _ = filled(40)
    with pytest.raises(ValueError, match=r"expected \(8, 2\)"):
        store.sample(8, uniforms(0)(7))


# Prioritised sampling


def test_new_transitions_get_the_largest_priority_so_far():
    store, stream = filled(8, prioritised=True, alpha=0.5, capacity=400)
    assert set(store.tree.masses.unique().tolist()) == {0.0, 1.0}
    batch = store.sample(4, uniforms(0)(4))
    store.reprioritise(batch, torch.tensor([0.0, -9.0, 4.0, 0.0]))
    before = store.tree.masses.clone()
    store.append(**stream.step())
    new = store.tree.masses[before == 0].max()
    assert float(new) == pytest.approx((9 + 1e-6) ** 0.5, rel=1e-12)
    store.reprioritise(batch, torch.zeros(4))
    assert float(store.largest) == float(new)


def test_priorities_are_powers_of_the_errors_and_the_larger_of_two_counts():
    store, stream = filled(30, prioritised=True, alpha=0.6, capacity=400)
    (one, two), *_ = sorted(stream.sampleable(400, 3))
    times, games = torch.tensor([one, 5, one, one]), torch.tensor([two, 1, two, two])
    store.reprioritise(store.gather(times, games), torch.tensor([-1.5, 0.25, 3.0, 2.0]))
    assert float(store.tree.masses[2 * one + two]) == pytest.approx((3 + 1e-6) ** 0.6, rel=1e-12)
    assert float(store.tree.masses[2 * 5 + 1]) == pytest.approx((0.25 + 1e-6) ** 0.6, rel=1e-12)


def test_what_was_overwritten_since_it_was_sampled_gets_no_priority():
    store, stream = filled(30, prioritised=True)
    batch = store.sample(64, uniforms(0)(64))
    for _ in range(store.rows - 8):
        store.append(**stream.step())
    before, live = store.tree.nodes.clone(), batch.times >= store.first
    assert 0 < live.sum() < 64
    store.reprioritise(batch, torch.where(live, 0.0, 1e6))
    changed = (store.tree.masses != before[store.tree.offset :][: store.tree.size]).nonzero()[:, 0].tolist()
    assert set(changed) == {time % store.rows * 2 + game for time, game in cells(batch) if time >= store.first}
    assert float(store.largest) == 1


def prioritised(alpha=1.0, **options):
    store, stream = filled(60, prioritised=True, alpha=alpha, capacity=80, **options)
    allowed = sorted(stream.sampleable(80, 3))
    errors = torch.rand(len(allowed), generator=torch.Generator().manual_seed(5)) * 3 + 0.2
    store.reprioritise(store.gather(*torch.tensor(allowed).unbind(1)), errors)
    masses = {cell: (float(error) + 1e-6) ** alpha for cell, error in zip(allowed, errors)}
    return store, stream, masses


def test_transitions_come_in_proportion_to_their_masses():
    store, stream, masses = prioritised()
    found = frequencies(store, 100_000, batch=25)
    assert set(found) == set(masses)
    total = sum(masses.values())
    for cell, mass in masses.items():
        expected = 100_000 * mass / total
        assert abs(found[cell] - expected) < 5 * math.sqrt(expected), cell
    assert_right(store.sample(200, uniforms(1)(200)), stream, 3, 0.5)


def test_alpha_of_0_is_uniform():
    store, _, _ = prioritised(alpha=0.0)
    assert set(store.tree.masses.unique().tolist()) == {0.0, 1.0}


def test_each_part_of_the_mass_gives_one_transition():
    store, _, masses = prioritised()
    for batch, seed in ((7, 1), (64, 2), (500, 3)):
        draw = uniforms(seed)(batch)
        found = cells(store.sample(batch, draw))
        by_leaf = sorted(masses, key=lambda cell: cell[0] % store.rows * 2 + cell[1])
        sums = np.cumsum([masses[cell] for cell in by_leaf])
        for place, uniform in enumerate(draw(0)[:, 0].tolist()):
            value = (place + uniform) / batch * sums[-1]
            near = np.searchsorted(sums, [value - 1e-9, value + 1e-9], side="right")
            assert found[place] in {by_leaf[near[0]], by_leaf[min(near[1], len(sums) - 1)]}


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_importance_weights(beta):
    store, _, masses = prioritised(alpha=0.7)
    batch = store.sample(50, uniforms(2)(50), beta)
    total = math.fsum(masses.values())
    plain = [(len(masses) * masses[cell] / total) ** -beta for cell in cells(batch)]
    assert batch.weights.tolist() == pytest.approx([weight / max(plain) for weight in plain], rel=1e-6)
    assert float(batch.weights.max()) == 1


def test_a_uniform_memory_keeps_no_priorities():
    store, _ = filled(30)
    batch = store.sample(8, uniforms(0)(8))
    store.reprioritise(batch, torch.ones(8))
    assert store.tree is None
    assert batch.weights.tolist() == [1.0] * 8


# The sum tree


@given(size=st.integers(1, 70), seed=st.integers(0, 2**31), rounds=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_a_tree_after_random_updates(size, seed, rounds):
    rng = np.random.default_rng(seed)
    tree, plain = SumTree(size), [0.0] * size
    for _ in range(rounds):
        if rng.random() < 0.5:
            leaves = rng.integers(0, size, rng.integers(1, 20))
            masses = rng.random(len(leaves)) * 10.0 ** rng.integers(-8, 8) * (rng.random(len(leaves)) < 0.7)
            tree.set(torch.from_numpy(leaves), torch.from_numpy(masses))
            for leaf in set(leaves.tolist()):
                plain[leaf] = max(masses[leaves == leaf])
        else:
            first = int(rng.integers(0, size))
            count, mass = int(rng.integers(1, size - first + 1)), float(rng.random())
            tree.fill(first, mass, count)
            plain[first : first + count] = [mass] * count
    assert tree.masses.tolist() == plain
    assert float(tree.total) == pytest.approx(math.fsum(plain), rel=1e-13)
    built = SumTree(size)
    built.fill(0, torch.tensor(plain, dtype=torch.float64), size)
    assert built.nodes[1:].equal(tree.nodes[1:])
    if any(plain):
        values = torch.cat([torch.from_numpy(rng.random(100)), torch.tensor([0.0, 1 - 2**-53, 1.0])]).double() * tree.total
        assert (tree.masses[tree.find(values)] > 0).all()


@given(masses=st.lists(st.integers(0, 5), min_size=1, max_size=40).filter(any))
@settings(max_examples=100, deadline=None)
def test_a_leaf_is_found_by_the_running_sum(masses):
    tree = SumTree(len(masses))
    tree.fill(0, torch.tensor(masses, dtype=torch.float64), len(masses))
    values = np.arange(0, sum(masses), 0.25)
    expected = np.searchsorted(np.cumsum(masses), values, side="right")
    assert tree.find(torch.from_numpy(values)).tolist() == expected.tolist()


# Saving


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("rows", [2, 15, 20, 53])
def test_a_memory_that_is_put_back_goes_on_exactly_as_before(prioritised, rows):
    store, stream = filled(rows, seed=rows, prioritised=prioritised)
    copy = memory(prioritised=prioritised)
    for round in range(3):
        if store.sampleable:
            batch = store.sample(32, uniforms(round)(32))
            store.reprioritise(batch, torch.rand(32, generator=torch.Generator().manual_seed(round)) * 3)
    middle = (store.oldest + store.written) // 2
    for first, last in ((store.oldest, middle), (middle, store.written)):
        copy.write(first, store.read(first, last))
    state = store.state_dict()
    copy.load_state_dict(state)
    assert set(state) == ({"written", "masses", "largest"} if prioritised else {"written"})
    for step in range(25):
        assert copy.sampleable == store.sampleable
        if store.sampleable:
            pair = [one.sample(32, uniforms(step)(32), 0.6) for one in (store, copy)]
            assert_same(*pair)
            for one, batch in zip((store, copy), pair):
                one.reprioritise(batch, batch.returns + 0.1)
        if prioritised:
            assert copy.tree.nodes[1:].equal(store.tree.nodes[1:])
        row = stream.step()
        store.append(**row)
        copy.append(**row)


@pytest.mark.parametrize("prioritised", [False, True])
def test_a_memory_is_freed_when_the_last_one_lets_go_of_it(prioritised):
    gc.disable()  # it comes seldom, and a memory may be most of what the machine has
    try:
        store = memory(prioritised=prioritised)
        frames = weakref.ref(store._frames)
        del store
        assert frames() is None
    finally:
        gc.enable()


def test_a_saved_state_does_not_change_with_the_memory():
    store, stream = filled(30, prioritised=True)
    state, rows = store.state_dict(), store.read(store.oldest, store.written)
    kept = [value.clone() for value in (*rows.values(), state["masses"], state["largest"])]
    store.reprioritise(store.sample(8, uniforms(0)(8)), torch.full((8,), 50.0))
    store.append(**stream.step())
    assert all(value.equal(before) for value, before in zip((*rows.values(), state["masses"], state["largest"]), kept))
    assert state["written"] == 30
    other = memory(prioritised=True)
    other.write(10, rows)
    other.load_state_dict(state)
    other.reprioritise(other.sample(8, uniforms(0)(8)), torch.full((8,), 50.0))
    assert state["masses"].equal(kept[-2])
    assert state["largest"].equal(kept[-1])


def test_rows_are_read_by_their_absolute_time():
    store, stream = filled(33)
    assert (store.oldest, store.written, store.rows) == (13, 33, 20)
    rows = store.read(17, 24)
    assert list(rows) == list(KINDS)
    for name, kind in KINDS.items():
        assert rows[name].dtype == kind
    for place, time in enumerate(range(17, 24)):
        for game in range(2):
            row = stream.rows[game][time]
            assert np.array_equal(rows["frames"][place, game].numpy(), row.stack[-1])
            assert (int(rows["actions"][place, game]), float(rows["rewards"][place, game])) == (row.action, row.reward)
            for name in ("started", "terminal", "ended", "playable"):
                assert bool(rows[name][place, game]) == getattr(row, name)
    assert len(store.read(33, 33)["frames"]) == 0


@pytest.mark.parametrize(("first", "last"), [(12, 20), (20, 34), (22, 21)])
def test_rows_that_are_not_held_are_refused(first, last):
    store, _ = filled(33)
    with pytest.raises(ValueError, match="13 to 33 are held"):
        store.read(first, last)


def test_read_only_arrays_are_taken_without_a_warning(recwarn):
    store, row = memory(), Stream(2, 4, 0).step()
    for values in row.values():
        values.flags.writeable = False
    store.append(**row)
    assert not recwarn.list


# Room


def test_a_million_transitions_fit_into_what_was_promised():
    for prioritised in (False, True):
        assert 7.056e9 < needed(ReplayConfig(prioritised=prioritised), 8, (4, 84, 84)) <= 7.3e9


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize(("capacity", "games"), [(40, 2), (100, 3), (65, 1)])
def test_what_is_needed_is_what_is_allocated(prioritised, capacity, games):
    store = memory(games, capacity=capacity, prioritised=prioritised)
    arrays = [*store._rows.values(), torch.from_numpy(store._outcomes), *([store.tree.nodes] if store.tree else [])]
    assert needed(store.config, games, store.shape) == sum(array.untyped_storage().nbytes() for array in arrays)


def test_a_memory_that_does_not_fit_is_refused_before_it_is_made(monkeypatch, caplog):
    monkeypatch.setattr(replay, "free_memory", lambda device: 3_200_000_000)
    text = "replay.capacity: 1,000,000 transitions take 7.1 GB and 3.2 GB of memory are free; try --replay.capacity 400000"
    with pytest.raises(UserError, match=f"^{text}$"):
        check_room(ReplayConfig(), 8, (4, 84, 84))
    with caplog.at_level(logging.INFO, logger="dreamplay"):
        check_room(ReplayConfig(capacity=400_000), 8, (4, 84, 84))
    assert caplog.messages == ["replay memory: 400,000 transitions take 2.8 GB on cpu"]


@pytest.mark.parametrize("free", [10_000, 700_000, 5_000_000, 80_000_000, 7_000_000_000])
def test_the_advice_fits(monkeypatch, free):
    monkeypatch.setattr(replay, "free_memory", lambda device: free)
    with pytest.raises(UserError) as refusal:
        check_room(ReplayConfig(), 8, (4, 84, 84))
    _, _, advice = str(refusal.value).partition("; ")
    if advice.startswith("try"):
        check_room(ReplayConfig(capacity=int(advice.split()[-1])), 8, (4, 84, 84))
    else:
        assert free < 8_000_000
        assert advice == "end other programs that use it"


def test_nothing_is_refused_where_nobody_says_what_is_free(monkeypatch):
    monkeypatch.setattr(replay, "free_memory", lambda device: None)
    check_room(ReplayConfig(capacity=10**15), 8, (4, 84, 84))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="use 'cpu'"):
        check_room(ReplayConfig(device="cuda"), 8, (4, 84, 84))


def test_too_few_rows_for_the_games_are_refused():
    with pytest.raises(UserError, match=r"^replay.capacity: 71 is too small for 8 games; give at least 72$"):
        memory(games=8, capacity=71)
    assert memory(games=8, capacity=72).rows == 9


def write_tree(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemFree: 100 kB\nMemAvailable:    8000 kB\nHugePages_Total:       0\n"}
V1 = {"proc/self/cgroup": "4:cpu,memory:/jobs/7\n2:cpuset:/other\n0::/\n"}
V2 = {"proc/self/cgroup": "0::/user/jobs\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MEMINFO, 8000 * 1024),
        (MEMINFO | V2, 8000 * 1024),
        (MEMINFO | V2 | {"groups/user/jobs/memory.max": "max\n", "groups/user/jobs/memory.current": "5\n"}, 8000 * 1024),
        (MEMINFO | V2 | {"groups/user/jobs/memory.max": "5000\n", "groups/user/jobs/memory.current": "1000\n"}, 4000),
        (MEMINFO | V2 | {"groups/user/memory.max": "5000\n", "groups/user/memory.current": "1000\n"}, 4000),
        (MEMINFO | V2 | {"groups/memory.max": "5000\n", "groups/memory.current": "6000\n"}, 0),
        (V2 | {"groups/memory.max": "50\n", "groups/memory.current": "40\n", "groups/memory.stat": "active_file 7\nanon 9\n"}, 17),
        (MEMINFO | V1 | {"groups/memory/memory.limit_in_bytes": "700\n", "groups/memory/memory.usage_in_bytes": "300\n"}, 400),
        (
            V1
            | {
                "groups/memory/jobs/7/memory.limit_in_bytes": "700\n",
                "groups/memory/jobs/7/memory.usage_in_bytes": "300\n",
                "groups/memory/jobs/7/memory.stat": "inactive_file 1\ntotal_inactive_file 50\ntotal_active_file 6\n",
            },
            456,
        ),
        (V1 | {"groups/memory.max": "5\n", "groups/memory.current": "1\n"}, 4),
    ],
)
def test_free_memory_is_the_least_of_all_limits(tmp_path, files, free):
    write_tree(tmp_path, files)
    assert free_memory("cpu", tmp_path / "proc", tmp_path / "groups") == free
