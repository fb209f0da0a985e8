"""Honest scores: what an agent reached in its games, and how sure that is.

A few games of one training run say little. Following Agarwal et al. 2021 ("Deep reinforcement learning at the edge of the
statistical precipice"), the headline is the inter-quartile mean, which neither one lucky game nor many hopeless ones move
much, with a bootstrap interval that counts training runs, not only games.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_TABLE = """
    alien           227.8   7127.7   amidar            5.8   1719.5   assault         222.4   742.0
    asterix         210.0   8503.3   asteroids       719.1  47388.7   atlantis      12850.0 29028.1
    bank_heist       14.2    753.1   battle_zone    2360.0  37187.5   beam_rider      363.9 16926.5
    berzerk         123.7   2630.4   bowling          23.1    160.7   boxing            0.1    12.1
    breakout          1.7     30.5   centipede      2090.9  12017.0   chopper_command 811.0  7387.8
    crazy_climber 10780.5  35829.4   defender       2874.5  18688.9   demon_attack    152.1  1971.0
    double_dunk     -18.6    -16.4   enduro            0.0    860.5   fishing_derby   -91.7   -38.7
    freeway           0.0     29.6   frostbite        65.2   4334.7   gopher          257.6  2412.5
    gravitar        173.0   3351.4   hero           1027.0  30826.4   ice_hockey      -11.2     0.9
    jamesbond        29.0    302.8   kangaroo         52.0   3035.0   krull          1598.0  2665.5
    kung_fu_master  258.5  22736.3   montezuma_revenge 0.0   4753.3   ms_pacman       307.3  6951.6
    name_this_game 2292.3   8049.0   phoenix         761.4   7242.6   pitfall        -229.4  6463.7
    pong            -20.7     14.6   private_eye      24.9  69571.3   qbert           163.9 13455.0
    riverraid      1338.5  17118.0   road_runner      11.5   7845.0   robotank          2.2    11.9
    seaquest         68.4  42054.7   skiing       -17098.1  -4336.9   solaris        1236.3 12326.7
    space_invaders  148.0   1668.7   star_gunner     664.0  10250.0   surround        -10.0     6.5
    tennis          -23.8     -8.3   time_pilot     3568.0   5229.2   tutankham        11.4   167.6
    up_n_down       533.4  11693.2   venture           0.0   1187.5   video_pinball 16256.9 17667.9
    wizard_of_wor   563.5   4756.5   yars_revenge   3092.9  54576.9   zaxxon           32.5  9173.3
"""


def _games(words: Sequence[str]) -> dict[str, tuple[float, float]]:
    return {game: (float(random), float(human)) for game, random, human in zip(words[::3], words[1::3], words[2::3], strict=True)}


RANDOM_AND_HUMAN: Mapping[str, tuple[float, float]] = MappingProxyType(_games(_TABLE.split()))
"""Points of random play and of a professional tester, by ROM: Mnih et al. 2015, to 57 games by Wang et al. 2016, as in DQN Zoo.

Some tables have 0 for random play of video_pinball.
"""


def normalised(rom: str, score: float) -> float | None:
    """A score on the scale where random play is 0 and the human tester 1; None for a game outside the table."""
    if rom not in RANDOM_AND_HUMAN:
        return None
    random, human = RANDOM_AND_HUMAN[rom]
    return (score - random) / (human - random)


def mean(scores: ArrayLike) -> float:
    """The arithmetic mean of scores (N,)."""
    return float(np.asarray(scores, dtype=np.float64).mean())


def iqm(scores: ArrayLike) -> float:
    """The inter-quartile mean of scores (N,): without the lowest and the highest quarter, each rounded down to whole games."""
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def interval(
    groups: Sequence[Sequence[float]],
    statistic: Callable[[Floats], float],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a statistic of all games together, the same for the same seed.

    What is replicated is the training run. So runs are drawn with replacement, then games within each run that was drawn
    (the hierarchical bootstrap of Davison & Hinkley 1997, section 3.8). With one run only its games are drawn: the interval
    then tells how this agent plays, not how another run of the training would turn out. With few runs that differ much it
    is too narrow, as every percentile bootstrap: in trials the truth lay in a 95 % interval in about 53, 71, 85 and 92 of
    100 cases for 2, 3, 5 and 10 runs three times as spread as their games, and in 92 or more for runs that are alike.

    Args:
        groups: the scores of each run's games; runs may have different numbers of games.
        statistic: of scores (N,), such as `iqm`.
        confidence: the share of resamples inside the interval.

    Raises:
        ValueError: there is no run, or a run without games.
    """
    runs, sizes = _padded(groups)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        chosen = rng.integers(len(runs), size=(len(runs), 1))
        drawn = runs[chosen, rng.integers(sizes[chosen], size=runs.shape)]
        found.append(statistic(drawn[np.arange(runs.shape[1]) < sizes[chosen]]))
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _padded(groups: Sequence[Sequence[float]]) -> tuple[Floats, NDArray[np.int64]]:
    """The scores of runs (R, N), the shorter ones filled up, and how many each has (R,)."""
    sizes = np.array([len(scores) for scores in groups], dtype=np.int64)
    if not sizes.size or not sizes.all():
        raise ValueError(f"scores need at least one run, and of every run at least one game; the runs have {sizes.tolist()} games")
    table = np.zeros((len(groups), sizes.max()))
    for row, scores in zip(table, groups):
        row[: len(scores)] = scores
    return table, sizes


@dataclass(frozen=True)
class Summary:
    """What an agent, or several runs of the same training, reached in one game; in points of the game, never clipped."""

    mean: float
    median: float
    iqm: float
    """Inter-quartile mean."""
    iqm_low: float
    iqm_high: float
    """95 % interval of the inter-quartile mean."""
    mean_low: float
    mean_high: float
    """95 % interval of the mean."""
    minimum: float
    maximum: float
    games: int
    """How many were played, over all runs."""
    runs: int
    normalised: float | None
    """The mean, where random play is 0 and a human tester 1; None for a game outside the table."""

    def to_dict(self) -> dict[str, Any]:
        """By name, ready for JSON."""
        return asdict(self)


def summarise(rom: str, groups: Sequence[Sequence[float]]) -> Summary:
    """Sum up the scores of each run's games; all games count alike, whichever run they come from.

    Raises:
        ValueError: there is no run, or a run without games.
    """
    low, high = interval(groups, iqm)
    mean_low, mean_high = interval(groups, mean)
    scores = np.concatenate([np.asarray(group, dtype=np.float64) for group in groups])
    return Summary(
        mean=mean(scores),
        median=float(np.median(scores)),
        iqm=iqm(scores),
        iqm_low=low,
        iqm_high=high,
        mean_low=mean_low,
        mean_high=mean_high,
        minimum=float(scores.min()),
        maximum=float(scores.max()),
        games=len(scores),
        runs=len(groups),
        normalised=normalised(rom, mean(scores)),
    )
