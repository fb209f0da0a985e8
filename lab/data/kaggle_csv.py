"""Kaggle's CSV form of MNIST and Sign Language MNIST: one image a line, the label and then 784 pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from lab.data.imageset import DataError, Split

SIDE = 28
COLUMNS = 1 + SIDE * SIDE
BLOCK = 1 << 23
"""Bytes of text parsed at a time: enough for numpy to be fast, little enough to stay small in memory."""
LONGEST = 1 << 16
"""Bytes of a line at most; those of images have some thousands."""
COMMA, ZERO = ord(","), ord("0")


def read(path: Path, labels: Sequence[int]) -> Split:
    """The images (N, 1, 28, 28) of a file with or without a header line, their labels renumbered from 0 by class.

    Args:
        path: the file.
        labels: the number that stands in the file for each class, in order of class.

    Raises:
        DataError: the file cannot be read, or a line has the wrong number of columns, something other than a whole
            number from 0 to 255, or an unknown label; the text names the line.
    """
    try:
        with path.open("rb") as file:
            first_line = 1 + _has_header(file)
            blocks = list(_blocks(file, path, first_line))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not blocks:
        raise DataError(f"{path}: holds no images; get this file again")
    images = np.concatenate([block[:, 1:] for block in blocks]).reshape(-1, 1, SIDE, SIDE)
    written = np.concatenate([block[:, 0] for block in blocks])
    return Split(torch.from_numpy(images), torch.from_numpy(_classes(written, labels, path, first_line)))


def _has_header(file: BinaryIO) -> bool:
    """Whether the first line holds names; the file is left at its first line of numbers."""
    start = file.readline(LONGEST).partition(b",")[0].strip()
    if start and not start.isdigit():
        return True
    file.seek(0)
    return False


def _blocks(file: BinaryIO, path: Path, line: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The table (rows, 785) block by block, from the given line on."""
    # Bytes, then the rest of their last line: a file of one endless line never lies in memory.
    while text := file.read(BLOCK) + file.readline(LONGEST):
        lines = [line.rstrip(b"\r") for line in text.removesuffix(b"\n").split(b"\n")]
        for number, row in enumerate(lines, start=line):
            if (columns := row.count(b",") + 1) != COLUMNS:
                raise DataError(f"{path}, line {number}: expected {COLUMNS} columns, found {columns if row else 0}; get this file again")
        yield _numbers(lines, path, line)
        line += len(lines)


def _numbers(lines: list[bytes], path: Path, line: int) -> npt.NDArray[np.uint8]:
    """Lines of 785 numbers as a table, all fields at once: each is 1 to 3 digits that end before a comma."""
    text = np.frombuffer(b",".join([*lines, b""]), dtype=np.uint8)
    digits = text - ZERO  # wraps round: all that is not a digit is above 9
    ends = np.flatnonzero(text == COMMA)
    lengths = np.diff(ends, prepend=-1) - 1
    values = digits[ends - 1].astype(np.int16)
    for place, scale in ((2, 10), (3, 100)):
        values += np.where(lengths >= place, digits[ends - place], 0).astype(np.int16) * scale
    wrong = (lengths < 1) | (lengths > 3) | (values > 255)
    wrong[np.searchsorted(ends, np.flatnonzero((digits > 9) & (text != COMMA)))] = True
    if wrong.any():
        row, column = divmod(int(wrong.argmax()), COLUMNS)
        found = lines[row].split(b",")[column][:20].decode(errors="replace")
        raise DataError(f"{path}, line {line + row}, column {column + 1}: expected a whole number from 0 to 255, found '{found}'")
    return values.astype(np.uint8).reshape(-1, COLUMNS)


def _classes(written: npt.NDArray[np.uint8], labels: Sequence[int], path: Path, line: int) -> npt.NDArray[np.int64]:
    """The class of every label as it stands in the file."""
    table = np.full(256, -1, dtype=np.int64)
    table[list(labels)] = np.arange(len(labels))
    classes = table[written]
    if (classes < 0).any():
        row = int(classes.argmin())
        known = ", ".join(map(str, labels))
        raise DataError(
            f"{path}, line {line + row}: the label {written[row]} is none of {known}; this is another data set or a damaged file"
        )
    return classes
