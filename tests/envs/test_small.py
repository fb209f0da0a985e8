"""Catch and Bricks: against slow single games written plainly, and against every promise of `Step` and `Games`."""

import json

import numpy as np
import pytest

from envs.games import GameConfig, Step, make
from lab.checkpoint import pack, unpack
from lab.seeding import derive

NAMES = ("catch", "bricks")
SIDE = {"catch": 12, "bricks": 16}
FIELDS = tuple(Step.__dataclass_fields__)
MOVES = {0: 0, 1: -1, 2: 1}


def games_of(name, count=4, seed=0, colour=False, **settings):
    return make(GameConfig(name=name, **settings), count, seed, colour)


# One game at a time, as plainly as it can be said


class PlainCatch:
    """The rules of Catch for one game."""

    def __init__(self):
        self.paddle, self.ball, self.balls_left = 4, None, 10

    def move(self, action, chance):
        """Points and whether the game is over."""
        self.paddle = min(max(self.paddle + MOVES[action], 0), 9)
        if self.ball is None or self.ball[0] == 11:
            self.ball = (0, int(chance * 12))
            return 0, False
        self.ball = (self.ball[0] + 1, self.ball[1])
        if self.ball[0] < 11:
            return 0, False
        self.balls_left -= 1
        return (1 if self.ball[1] in range(self.paddle, self.paddle + 3) else -1), self.balls_left == 0

    lives = 0

    def draw(self):
        frame = np.zeros((12, 12), np.uint8)
        frame[11, self.paddle : self.paddle + 3] = 192
        frame[self.ball] = 255
        return frame


class PlainBricks:
    """The rules of Bricks for one game."""

    def __init__(self):
        self.paddle, self.ball, self.speed, self.lives, self.bricks, self.walls = 6, None, None, 3, set(), 0

    def serve(self, chance):
        if not self.bricks:
            self.bricks = {(row, place) for row in (2, 3, 4) for place in range(8)}
            self.walls += 1
        spot = int(chance * 32)
        self.paddle, self.ball, self.speed = 6, (5, spot // 2), (1, 1 if spot % 2 else -1)
        return 0, False

    def move(self, action, chance):
        """Points and whether the game is over."""
        self.paddle = min(max(self.paddle + MOVES[action], 0), 12)
        if self.ball is None or self.ball[0] == 15 or not self.bricks:
            return self.serve(chance)
        (row, column), (down, across) = self.ball, self.speed
        across = {0: 1, 15: -1}.get(column, across)
        down = 1 if row == 0 else down
        row, column, brick = row + down, column + across, (row + down, (column + across) // 2)
        if brick in self.bricks or (row == 15 and column in range(self.paddle, self.paddle + 4)):
            self.speed = (-down, across)
        else:
            self.ball, self.speed = (row, column), (down, across)
        points = len(self.bricks & {brick})
        self.bricks.discard(brick)
        if self.ball[0] == 15:
            self.lives -= 1
        return points, self.lives == 0

    def draw(self):
        frame = np.zeros((16, 16), np.uint8)
        for row, place in self.bricks:
            frame[row, 2 * place : 2 * place + 2] = {2: 128, 3: 112, 4: 96}[row]
        frame[15, self.paddle : self.paddle + 4] = 192
        frame[self.ball] = 255
        return frame


class PlainGames:
    """One game after another at position `index`, by the semantics of `Step`."""

    def __init__(self, name, seed, index, sticky=0.0, max_frames=108_000, stack=4):
        self.kind = {"catch": PlainCatch, "bricks": PlainBricks}[name]
        self.seed, self.index, self.sticky, self.max_frames, self.stack = seed, index, sticky, max_frames, stack
        self.drawn, self.ended = 0, True
        self.walls = 0

    def chances(self):
        """Two uniform numbers a step, drawn for 256 steps of one game after another."""
        block, place = divmod(self.drawn, 256)
        self.drawn += 1
        numbers = np.random.Generator(np.random.PCG64(derive(self.seed, "small", block))).random(2 * 256 * (self.index + 1))
        return numbers[2 * (256 * self.index + place) :][:2]

    def step(self, action):
        stick, place = self.chances()
        started, lives_before = self.ended, 0
        if started:
            self.game, self.length, self.total, self.previous, self.frames = self.kind(), 0, 0, 0, []
            points, over = self.game.move(0, place)
        else:
            self.previous = self.previous if stick < self.sticky else action
            lives_before = self.game.lives
            points, over = self.game.move(self.previous, place)
            self.length += 1
        self.total += points
        self.frames.append(self.game.draw())
        broken = self.length == self.max_frames and not over
        self.ended = over or broken
        black = [np.zeros_like(self.frames[0])] * self.stack
        return {
            "observations": np.stack((black + self.frames)[-self.stack :]),
            "rewards": points,
            "terminated": over,
            "truncated": broken,
            "life_lost": self.game.lives < lives_before and not self.ended,
            "started": started,
            "returns": self.total,
            "lengths": self.length,
            "lives": self.game.lives,
        }


# Players, who see the newest frames only


def cells(frames, value):
    """The first row and column where frames (N, H, W) have a grey value, (N,) each."""
    return np.divmod((frames == value).reshape(len(frames), -1).argmax(1), frames.shape[2])


def towards(step, target):
    """Actions that move the paddle's centre under a column, (N,)."""
    paddle = (step.observations[:, -1, -1] == 192) | (step.observations[:, -1, -1] == 255)
    columns = np.arange(paddle.shape[1])
    centre = np.array([columns[row & (abs(columns - columns[row].mean()) < 4)].mean() for row in paddle])
    return np.where(centre - target > 0.5, 1, np.where(centre - target < -0.5, 2, 0))


def catcher(step):
    """The best policy of Catch: always towards the ball."""
    return towards(step, cells(step.observations[:, -1], 255)[1])


def follower(games):
    """Keeps the ball of Bricks in play: the paddle's middle under the column that it flies to next."""
    across = np.where(games.column == 0, 1, np.where(games.column == 15, -1, games.across))
    left = np.clip(games.column + across - 1, 0, 12)
    return np.where(games.paddle > left, 1, np.where(games.paddle < left, 2, 0))


def played(games, steps, seed=0):
    """The steps of random play, from the newest on."""
    draw = np.random.default_rng(seed)
    return [games.last] + [games.step(draw.integers(0, 3, games.count)) for _ in range(steps)]


def same(one, other):
    return all(np.array_equal(getattr(one, field), getattr(other, field)) for field in FIELDS)


# The rules


@pytest.mark.parametrize("settings", [{}, {"sticky": 0.3, "stack": 2}, {"max_frames": 70, "stack": 1}, {"max_frames": 1}])
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", NAMES)
def test_all_games_are_what_single_games_by_the_plain_rules_are(name, seed, settings):
    games = games_of(name, 3, seed, **settings)
    plain = [PlainGames(name, seed, index, **settings) for index in range(3)]
    draw = np.random.default_rng(seed)
    step, ends, walls = games.last, 0, 0
    actions = np.zeros(3, np.int64)
    for _ in range(600 if settings else 1500):
        expected = [game.step(int(action)) for game, action in zip(plain, actions)]
        for field in FIELDS:
            assert np.array_equal(getattr(step, field), np.stack([row[field] for row in expected])), field
        ends, walls = ends + int(step.ended.sum()), max([walls, *(getattr(game.game, "walls", 0) for game in plain)])
        skilled = follower(games) if name == "bricks" else catcher(step)
        actions = np.where(draw.random(3) < (0.0, 0.5, 1.0), draw.integers(0, 3, 3), skilled)
        step = games.step(actions)
    assert ends > 5
    assert name == "catch" or settings or walls > 1  # the first player misses nothing and sees a second wall


def test_a_perfect_player_catches_every_ball():
    games = games_of("catch", 64, seed=3)
    returns = []
    for _ in range(4 * 120):
        step = games.step(catcher(games.last))
        returns += step.returns[step.ended].tolist()
        assert (step.lengths[step.ended] == 119).all()
    assert returns == [10.0] * (4 * 64)


@pytest.mark.parametrize("left", range(10))
def test_every_ball_can_be_caught_from_every_place(left):
    games = games_of("catch", 12)
    games.paddle[:], games.column[:], games.row[:] = left, np.arange(12), 0
    for _ in range(11):
        left_of = np.clip(games.column - 1, 0, 9)
        step = games.step(np.where(games.paddle > left_of, 1, np.where(games.paddle < left_of, 2, 0)))
    assert step.rewards.tolist() == [1.0] * 12


@pytest.mark.parametrize(("name", "low", "high"), [("catch", -5.3, -4.7), ("bricks", 0.9, 1.15)])
def test_a_random_player_scores_little(name, low, high):
    steps = played(games_of(name, 256, seed=1), 600)
    returns = np.concatenate([step.returns[step.ended] for step in steps])
    assert len(returns) > 1000
    assert low < returns.mean() < high


def test_balls_come_from_all_columns_alike():
    served = games_of("catch", 1200).column
    assert (abs(np.bincount(served, minlength=12) - 100) < 40).all()
    games = games_of("bricks", 1600)
    assert (abs(np.bincount(games.column, minlength=16) - 100) < 40).all()
    right = games.across[(games.column > 0) & (games.column < 15)] > 0  # at the walls there is no choice
    assert 0.45 < right.mean() < 0.55


def test_whoever_keeps_the_ball_in_play_clears_wall_after_wall_from_every_serve():
    games = games_of("bricks", 32)
    games.column, games.across = np.arange(32) // 2, 2 * (np.arange(32) % 2) - 1
    cleared = np.zeros(32, np.int64)
    for _ in range(4000):
        step = games.step(follower(games))
        cleared += (step.rewards > 0) & ~games.bricks.any((1, 2))
        assert (step.lives == 3).all()
    assert (cleared >= 3).all()
    assert (step.returns >= 24 * cleared).all()


def test_a_cleared_wall_comes_back_with_a_new_ball_and_costs_no_life():
    games = games_of("bricks", 1)
    games.bricks[:] = 0
    games.bricks[0, 4, 2] = 96
    games.row[:], games.column[:], games.across[:], games.down[:] = 5, 5, -1, -1
    step = games.step(np.array([0]))
    assert (step.rewards[0], step.lives[0], bool(step.ended[0])) == (1, 3, False)
    assert not step.observations[0, -1, 2:5].any()
    step = games.step(np.array([0]))
    assert step.observations[0, -1, 2:5].tolist() == [[grey] * 16 for grey in (128, 112, 96)]
    assert (step.observations[0, -1, 5] == 255).sum() == 1
    assert (step.rewards[0], step.lives[0], step.returns[0]) == (0, 3, 1)
    assert not step.started[0]
    assert not step.life_lost[0]


def test_lives_fall_one_by_one_and_then_the_game_is_over():
    games = games_of("bricks", 16)
    seen = [[] for _ in range(16)]
    for _ in range(150):
        games.paddle = np.where(games.column < 8, 12, 0)  # as far away from the ball as can be
        step = games.step(np.zeros(16, np.int64))
        assert not (step.life_lost & step.ended).any()
        for index in np.flatnonzero(step.life_lost | step.terminated | step.started):
            seen[index].append((int(step.lives[index]), bool(step.life_lost[index]), bool(step.terminated[index])))
    life = [(2, True, False), (1, True, False), (0, False, True), (3, False, False)]
    assert all(events[:8] == life * 2 for events in seen)


@pytest.mark.parametrize("name", NAMES)
def test_certain_stickiness_repeats_the_first_action_of_all(name):
    games = games_of(name, 4, sticky=1.0)
    middle = games.paddle.copy()
    for _ in range(40):
        games.step(np.full(4, 1))
        assert np.array_equal(games.paddle, middle)
    games.previous[:] = 2
    games.step(np.full(4, 1))
    assert np.array_equal(games.paddle, middle + 1)


def test_stickiness_is_as_frequent_as_it_says():
    games = games_of("catch", 5000, sticky=0.25)
    games.step(np.full(5000, 1))
    assert 0.22 < (games.paddle == 4).mean() < 0.28


# Steps


@pytest.mark.parametrize("name", NAMES)
def test_observations_are_the_last_frames_of_this_game_and_black_before_it(name):
    steps = played(games_of(name, 8, stack=5), 400)
    assert sum(int(step.started.sum()) for step in steps) > 16
    for index in range(8):
        frames = []
        for step in steps:
            frames = [] if step.started[index] else frames
            frames.append(step.observations[index, -1])
            stack = step.observations[index]
            assert stack.shape == (5, SIDE[name], SIDE[name])
            assert not stack[: max(0, 5 - len(frames))].any()
            assert np.array_equal(stack[-len(frames) :], frames[-5:])


@pytest.mark.parametrize("name", NAMES)
def test_nobody_writes_into_a_step_again(name):
    games = games_of(name, 8)
    draw, steps, copies = np.random.default_rng(0), [], []
    for count in range(300):
        step = games.step(draw.integers(0, 3, 8))
        steps.append(step)
        copies.append({field: getattr(step, field).copy() for field in FIELDS})
        if count == 200:
            games.load_state_dict(games.state_dict())
    for step, copy in zip(steps, copies):
        assert all(np.array_equal(getattr(step, field), copy[field]) for field in FIELDS)
    arrays = [getattr(step, field) for step in steps[-3:] for field in FIELDS]
    assert not any(np.shares_memory(one, other) for at, one in enumerate(arrays) for other in arrays[:at])


@pytest.mark.parametrize("name", NAMES)
def test_the_action_after_an_end_is_ignored_and_begins_a_new_game(name):
    games, twins = games_of(name, 16, sticky=0.2), games_of(name, 16, sticky=0.2)
    draw, ends = np.random.default_rng(5), 0
    for _ in range(500):
        actions = draw.integers(0, 3, 16)
        over = games.last.ended
        step = games.step(actions)
        assert same(step, twins.step(np.where(over, (actions + 1) % 3, actions)))
        assert np.array_equal(step.started, over)
        for nothing in (step.rewards, step.terminated, step.truncated, step.life_lost, step.returns, step.lengths):
            assert not nothing[over].any()
        assert (step.lives[over] == {"catch": 0, "bricks": 3}[name]).all()
        ends += int(over.sum())
    assert ends > 30


@pytest.mark.parametrize("name", NAMES)
def test_returns_and_lengths_add_up(name):
    total, length = np.zeros(8), np.zeros(8)
    for step in played(games_of(name, 8), 300):
        total, length = np.where(step.started, 0, total + step.rewards), np.where(step.started, 0, length + 1)
        assert np.array_equal(step.returns, total)
        assert np.array_equal(step.lengths, length)


@pytest.mark.parametrize("name", NAMES)
def test_long_games_are_broken_off_and_not_ended(name):
    steps = played(games_of(name, 4, max_frames=9, frame_skip=4), 45)
    for at, step in enumerate(steps):
        assert step.truncated.tolist() == [at % 10 == 9] * 4
        assert not step.terminated.any()
        assert step.started.tolist() == [at % 10 == 0] * 4


def test_a_game_that_is_over_at_its_last_frame_is_over_and_not_broken_off():
    step = played(games_of("catch", 4, max_frames=119), 119)[-1]
    assert step.terminated.all()
    assert not step.truncated.any()


def test_a_life_lost_at_the_last_frame_does_not_go_on():
    games = games_of("bricks", 1, max_frames=3)
    games.step(np.array([0]))
    games.step(np.array([0]))
    games.row[:], games.column[:], games.down[:] = 14, 2, 1
    step = games.step(np.array([0]))
    assert (step.lives[0], bool(step.truncated[0]), bool(step.life_lost[0])) == (2, True, False)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_have_the_shapes_and_kinds_that_they_promise(name):
    games = games_of(name, 3, stack=2)
    kinds = {"observations": np.uint8, "rewards": np.float32, "returns": np.float32, "lengths": np.int64, "lives": np.int64}
    assert games.shape == (2, SIDE[name], SIDE[name])
    assert (games.actions, games.frames_per_step) == (("NOOP", "LEFT", "RIGHT"), 1)
    for step in (games.last, *played(games, 300)):
        for field in FIELDS:
            array = getattr(step, field)
            assert array.dtype == kinds.get(field, np.bool_), field
            assert array.shape == ((3, *games.shape) if field == "observations" else (3,))


# Randomness and state


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_makes_the_games_and_another_seed_others(name):
    steps = played(games_of(name, 8, seed=4), 300)
    assert all(same(one, other) for one, other in zip(steps, played(games_of(name, 8, seed=4), 300)))
    assert not any(same(one, other) for one, other in zip(steps, played(games_of(name, 8, seed=5), 300)))
    assert len({step.tobytes() for step in np.stack([step.observations for step in steps], 1)}) == 8


@pytest.mark.parametrize("name", NAMES)
def test_a_game_does_not_depend_on_what_happens_in_others_or_on_how_many_there_are(name):
    games, others = games_of(name, 6, sticky=0.2), games_of(name, 3, sticky=0.2)
    draw = np.random.default_rng(0)
    for _ in range(600):
        actions = draw.integers(0, 3, 6)
        step, other = games.step(actions), others.step(np.array([0, 2, actions[2]]))
        assert all(np.array_equal(getattr(step, field)[2], getattr(other, field)[2]) for field in FIELDS)


@pytest.mark.parametrize("name", NAMES)
def test_reset_begins_everything_anew(name):
    games = games_of(name, 4)
    first = played(games, 300)
    assert same(games.reset(), first[0])
    assert games.last.started.all()
    assert all(same(one, other) for one, other in zip(first, played(games, 300)))


@pytest.mark.parametrize("name", NAMES)
def test_restarted_games_begin_at_once_and_the_others_are_as_they_were(name):
    games, chosen = games_of(name, 6, max_frames=30), np.array([True, False, True, False, False, True])
    for at in (12, 18, 40):  # in the middle of play, at the end of all games, in the middle of the next
        played(games, at)
        before, variables = games.last, {key: getattr(games, key).copy() for key in games.variables}
        step = games.restart(chosen)
        assert step is games.last
        assert step.started[chosen].all()
        for field in FIELDS:
            assert np.array_equal(getattr(step, field)[~chosen], getattr(before, field)[~chosen]), field
            assert field in ("observations", "started", "lives") or not getattr(step, field)[chosen].any()
        assert all(np.array_equal(getattr(games, key)[~chosen], variables[key][~chosen]) for key in games.variables)
        assert (step.lives[chosen] == {"catch": 0, "bricks": 3}[name]).all()
        assert not step.observations[chosen, :-1].any()
        assert not games.previous[chosen].any()
        assert (games.row[chosen] == {"catch": 0, "bricks": 5}[name]).all()
        after = games.step(np.full(6, 1))
        assert (after.lengths[chosen] == 1).all()
        assert (games.row[chosen] == {"catch": 1, "bricks": 6}[name]).all()


def through_a_checkpoint(state):
    tensors = {}
    text = json.dumps(pack(state, tensors))
    return unpack(json.loads(text), tensors)


@pytest.mark.parametrize(("name", "max_frames"), [("catch", 100), ("catch", 200), ("bricks", 40)])
def test_games_that_are_put_back_go_on_exactly(name, max_frames):
    games = games_of(name, 8, seed=2, sticky=0.3, max_frames=max_frames)
    steps, states = [games.last], [through_a_checkpoint(games.state_dict())]
    moves = np.random.default_rng(1).integers(0, 3, (420, 8))
    for actions in moves:
        steps.append(games.step(actions))
        states.append(through_a_checkpoint(games.state_dict()))
    ends = np.flatnonzero([step.ended.any() for step in steps])
    assert any(steps[end].terminated.any() for end in ends) == (max_frames != 100)
    assert any(steps[end].truncated.any() for end in ends) == (max_frames != 200)
    for at in {0, 17, 255, 256, 257, *range(ends[0] - 1, ends[0] + 3), *range(ends[-1] - 1, ends[-1] + 2)}:
        fresh = games_of(name, 8, seed=99, sticky=0.3, max_frames=max_frames)
        played(fresh, 30)
        fresh.load_state_dict(states[at])
        assert same(fresh.last, steps[at])
        for actions, expected in zip(moves[at : at + 150], steps[at + 1 :]):
            assert same(fresh.step(actions), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_does_not_change_as_the_games_go_on_and_can_be_used_twice(name):
    games, other = games_of(name, 4), games_of(name, 4)
    played(games, 20)
    state = games.state_dict()
    first = played(games, 200, seed=3)
    for going_on in (other, games):
        going_on.load_state_dict(state)
        assert all(same(one, two) for one, two in zip(first, played(going_on, 200, seed=3)))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_may_be_written_into(name):
    games, twins = games_of(name, 4), games_of(name, 4)
    played(games, 20), played(twins, 20)
    state = games.state_dict()
    games.load_state_dict(state)
    for tensor in (*state["variables"].values(), *state["last"].values(), *games.state_dict()["last"].values()):
        tensor.fill_(1)
    assert same(games.last, twins.last)
    assert all(same(one, two) for one, two in zip(played(games, 50), played(twins, 50)))


@pytest.mark.parametrize("settings", [("bricks", 4, 4), ("catch", 5, 4), ("catch", 4, 3)])
def test_a_state_of_other_games_is_refused(settings):
    name, count, stack = settings
    games = games_of("catch", 4)
    before = games.last
    with pytest.raises(ValueError, match=r"the state shows .*; these games show \(4, 4, 12, 12\)"):
        games.load_state_dict(games_of(name, count, stack=stack).state_dict())
    assert games.last is before


# Pictures


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_every_cell_in_a_colour_of_its_own(name):
    games = games_of(name, 3, colour=True)
    played(games, 25)
    pictures, frames = games.pictures(), games.last.observations[:, -1]
    assert (pictures.shape, pictures.dtype) == ((3, 14 * SIDE[name], 14 * SIDE[name], 3), np.uint8)
    colours = {}
    for index, row, column in np.ndindex(*frames.shape):
        cell = pictures[index, 14 * row + 1 : 14 * row + 14, 14 * column + 1 : 14 * column + 14].reshape(-1, 3)
        assert (cell == cell[0]).all()
        colours.setdefault(int(frames[index, row, column]), set()).add(tuple(cell[0].tolist()))
    assert all(len(shown) == 1 for shown in colours.values())
    assert len(set.union(*colours.values())) == len(colours) == {"catch": 3, "bricks": 6}[name]


@pytest.mark.parametrize("name", NAMES)
def test_only_games_made_with_colour_have_pictures(name):
    with pytest.raises(ValueError, match="colour"):
        games_of(name).pictures()
