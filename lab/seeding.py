"""Random numbers as a function of (seed, stream, index), so that no generator state ever needs saving.

A step that is computed again, after a kill or on another number of processes, draws the same numbers again. A stream is
a name such as `"noise"`; the index is usually the step. PyTorch's CPU generator keeps only the low 32 bits of a seed, so
two of n draws share their numbers with a chance of about n^2 / 2^33: harmless, but not zero.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor


def derive(seed: int, stream: str, index: int) -> int:
    """A 63-bit seed that depends on its three arguments and on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, stream: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` for one draw of a stream."""
    return torch.Generator(device).manual_seed(derive(seed, stream, index))


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """The order of an epoch: a permutation of `range(size)`, int64 (size,)."""
    return torch.randperm(size, generator=generator(seed, "epoch", epoch))


def shuffled(seed: int, size: int, first: int, count: int) -> Tensor:
    """Positions `first .. first + count` of an endless stream of shuffled epochs over `size` items, int64 (count,)."""
    pieces = []
    while count > 0:
        epoch, start = divmod(first, size)
        piece = epoch_order(seed, epoch, size)[start : start + count]
        pieces.append(piece)
        first, count = first + len(piece), count - len(piece)
    return torch.cat(pieces)
