"""Finding, reading and writing the files of a data set: search order, bounded unpacking, atomic writing, progress."""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lab.data.imageset import DataError

GZIP_MAGIC = b"\x1f\x8b"
CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where downloads are kept: $DREAMPLAY_CACHE, else dreamplay below $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("DREAMPLAY_CACHE")
    return Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreamplay"


def roots(root: str) -> list[Path]:
    """The folders to search, best first: `root` alone where given, else $LAB_DATA and then the cache.

    Raises:
        DataError: `root` or $LAB_DATA is not a folder.
    """
    given, origin = (root, "--data.root") if root else (os.environ.get("LAB_DATA", ""), "LAB_DATA")
    folder = Path(given).expanduser()
    if given and not folder.is_dir():
        raise DataError(f"{folder}: {origin} names no folder; give one that exists")
    if root:
        return [folder]
    return [folder, cache_folder()] if given else [cache_folder()]


def find(root: Path, subfolders: Sequence[str], names: Sequence[str]) -> Path | None:
    """The first file below `root` that has one of the names, by order of subfolder (`""` is the root) and then of name."""
    places = (root / subfolder / name for subfolder in subfolders for name in names)
    return next((place for place in places if place.is_file()), None)


def unpack(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """Unpack gzip data piece by piece, never past `limit` bytes.

    Raises:
        ValueError: the data is not gzip, is damaged, ends early, or unpacks to more; the text completes "the file ...".
    """
    unpacker, room = zlib.decompressobj(wbits=31), limit
    for chunk in chunks:
        try:
            piece = unpacker.decompress(chunk, room + 1)  # one byte past the limit shows that there is more
        except zlib.error as error:
            raise ValueError(f"is damaged: its gzip data cannot be unpacked ({error})") from None
        room -= len(piece)
        if room < 0:
            raise ValueError(f"unpacks to more than the {limit:,} bytes that it should hold")
        yield piece
        if unpacker.eof:
            return
    raise ValueError(f"is truncated: its gzip data ends early, after {limit - room:,} unpacked bytes")


def read(path: Path, limit: int) -> bytearray:
    """The content of a file, unpacked where it is gzip (whatever its name says), of at most `limit` bytes.

    Raises:
        DataError: the file cannot be read, is damaged or truncated, or holds more than `limit` bytes.
    """
    content = bytearray()
    try:
        with path.open("rb") as file:
            packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            file.seek(0)
            chunks = iter(lambda: file.read(CHUNK), b"")
            for piece in unpack(chunks, limit) if packed else _bounded(chunks, limit):
                content += piece
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}; get this file again") from None
    return content


def _bounded(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    room = limit
    for chunk in chunks:
        room -= len(chunk)
        if room < 0:
            raise ValueError(f"is longer than the {limit:,} bytes that it should hold")
        yield chunk


def write_atomically(target: Path, content: bytes | bytearray) -> None:
    """Write a file that is whole or absent whatever happens, folders included.

    Raises:
        DataError: the folder cannot be written, or the disk is full.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); DREAMPLAY_CACHE can name another folder for downloads") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def progress(text: str, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """A bar on standard error while it is a terminal; yields what advances it. `unit` is "B" for bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    count = DownloadColumn() if unit == "B" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda amount: bar.advance(task, amount)
