"""Games that are played in shares are those that one process plays, each the same wherever it is, in any turn of saving and going on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from envs import atari, games
from envs.games import AllGames, GameConfig, Games
from lab.distributed import World

COUNT = 4


def made(name: str, first: int = 0, count: int = COUNT) -> Games:
    return games.make(GameConfig(name=name, stack=2, sticky=0.25, size=32, threads=1), count, 7, first=first)


def actions(step: int, kinds: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, kinds, COUNT)


def play(shares: Sequence[Games], steps: range) -> list[dict[str, np.ndarray]]:
    """What all games show in these steps, whoever plays them."""
    shown = []
    for step in steps:
        chosen = actions(step, len(shares[0].actions))
        parts = [vars(share.step(chosen[share.first : share.first + share.count])) for share in shares]
        shown.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return shown


def assert_same(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert all((one[name] == other[name]).all() for name in other)


@pytest.mark.parametrize("name", ["catch", "bricks", "breakout"])
def test_shares_of_games_are_the_games(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atari, "ANCHOR", 50)  # new seeds at nearly every start
    whole, shares = made(name), [made(name, 0, 1), made(name, 1, 3)]
    for one in (whole, *shares):
        one.reset()
    expected = play([whole], range(450))
    assert_same(play(shares, range(450)), expected)
    assert sum(step["started"].sum() for step in expected) >= 2 * COUNT
    states = [share.state_dict() for share in shares]
    joined = whole.joined(states)
    if name == "breakout":
        assert len(states[0]["actions"]) != len(states[1]["actions"])
    one, halves = made(name), [made(name, 0, 2), made(name, 2, 2)]
    one.load_state_dict(joined)
    for half in halves:
        half.load_state_dict(half.share(joined, COUNT))
    later = play([whole], range(450, 510))
    assert_same(play([one], range(450, 510)), later)
    assert_same(play(halves, range(450, 510)), later)


@pytest.mark.parametrize("name", ["catch", "breakout"])
def test_the_state_of_all_games_is_that_of_one_process_that_plays_them(name: str) -> None:
    whole, shares = made(name), [made(name, 0, 2), made(name, 2, 2)]
    for one in (whole, *shares):
        one.reset()
    play([whole], range(200))
    play(shares, range(200))
    assert same(whole.joined([share.state_dict() for share in shares]), whole.state_dict())


def same(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in other)
    return one.equal(other) and one.dtype == other.dtype if isinstance(other, torch.Tensor) else one == other


@pytest.mark.parametrize("name", ["catch", "breakout"])
def test_the_state_of_another_number_of_games_is_refused(name: str) -> None:
    whole, share = made(name), made(name, 0, 3)
    for one in (whole, share):
        one.reset()
    with pytest.raises(ValueError, match="the games were 4, not 6"):
        AllGames(share, World(0, 2)).load_state_dict(whole.state_dict())
