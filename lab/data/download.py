"""Downloading one packed file from the first mirror that has it, checked before it is kept."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.data.files import CHUNK, progress, unpack, write_atomically
from lab.data.imageset import DataError

TIMEOUT = 10.0
"""Seconds to wait for a connection, and for each further piece of the answer."""


def fetch(name: str, mirrors: Sequence[str], target: Path, size: int, sha256: str) -> None:
    """Download a gzip file and keep it unpacked, whole or not at all.

    Args:
        name: the packed file's name, added to each mirror's address.
        mirrors: addresses that end in `/`, tried in order.
        target: where the unpacked file goes.
        size: bytes of the unpacked file; no more is ever unpacked.
        sha256: the checksum of the unpacked file, in hexadecimal.

    Raises:
        DataError: no mirror has the right file (the text has each one's reason), or the target cannot be written.
    """
    reasons = []
    for mirror in mirrors:
        try:
            content = _content(mirror + name, size, sha256)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reasons.append(f"  {mirror}{name}: {_reason(error)}")
            continue
        write_atomically(target, content)
        return
    raise DataError("\n".join([f"{name}: no mirror gave this file:", *reasons]))


def _content(url: str, size: int, sha256: str) -> bytearray:
    content = bytearray()
    request = urllib.request.Request(url, headers={"User-Agent": "dreamplay"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        for piece in unpack(_body(response, url, limit=size + CHUNK), size):
            content += piece
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"holds something else: SHA-256 {found[:12]}..., expected {sha256[:12]}...")
    return content


def _body(response: http.client.HTTPResponse, url: str, limit: int) -> Iterator[bytes]:
    """The packed bytes as they come, with a bar; a server that never ends is left once `limit` bytes have come."""
    length = response.headers.get("Content-Length", "")
    with progress(f"Downloading {url}", float(length) if length.isdigit() else None, unit="B") as advance:
        while chunk := response.read1(CHUNK):
            limit -= len(chunk)
            if limit < 0:
                raise ValueError("is larger than it can be")
            advance(len(chunk))
            yield chunk


def _reason(error: Exception) -> str:
    """Why a download failed, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    if isinstance(error, ValueError):
        return f"the file {error}"
    return str(getattr(cause, "strerror", None) or cause)
