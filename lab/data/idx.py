"""The IDX format of MNIST: a magic number, the size of every dimension, then the values, all big-endian."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08


def header(shape: tuple[int, ...]) -> bytes:
    """The bytes before the values of a uint8 array of this shape."""
    return bytes((0, 0, UNSIGNED_BYTE, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)


def size(shape: tuple[int, ...]) -> int:
    """Bytes that the file of a uint8 array of this shape takes."""
    return len(header(shape)) + math.prod(shape)


def parse(content: bytearray, shape: tuple[int, ...]) -> Tensor:
    """The values of an IDX file as uint8 of the expected shape; they share memory with `content`.

    Raises:
        ValueError: the magic number, the shape or the length is wrong; the text completes "the file ...".
    """
    wanted = header(shape)
    start = bytes(content[: len(wanted)])
    if len(start) == len(wanted) and start[:4] != wanted[:4]:
        expected = f"an IDX file of {len(shape)}-dimensional bytes"
        raise ValueError(f"is not {expected}: it starts with {start[:4].hex(' ')}, not {wanted[:4].hex(' ')}")
    if len(start) == len(wanted) and start != wanted:
        found = struct.unpack(f">{len(shape)}I", start[4:])
        raise ValueError(f"has the wrong shape: expected {_times(shape)}, found {_times(found)}")
    if len(content) != size(shape):
        state = "is truncated" if len(content) < size(shape) else "is too long"
        raise ValueError(f"{state}: expected {size(shape):,} bytes, found {len(content):,}")
    return torch.frombuffer(content, dtype=torch.uint8, offset=len(wanted)).reshape(shape)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape)
