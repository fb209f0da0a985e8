"""Small generated data sets in the real formats, an empty cache, and the real files where LAB_DATA names them."""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from lab.data import idx, mnist

REAL = os.environ.get("LAB_DATA", "")
TRAIN, TEST = 12, 5


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Nothing is found by chance: LAB_DATA is unset, the cache is empty, and no mirror can be reached by mistake."""
    monkeypatch.delenv("LAB_DATA", raising=False)
    monkeypatch.setenv("DREAMPLAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def real_data() -> Path:
    if not REAL:
        pytest.skip("LAB_DATA is unset: it must name a folder with the real MNIST and ASL files")
    return Path(REAL).resolve()


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def contents(monkeypatch) -> dict[str, bytes]:
    """The unpacked content of a small MNIST by file name; the module is told its shapes and checksums."""
    generator = np.random.default_rng(0)
    made, table = {}, {}
    for key, file in mnist.FILES.items():
        shape = (TRAIN if "train" in key else TEST, *file.shape[1:])
        values = generator.integers(0, 10 if len(shape) == 1 else 256, shape, dtype=np.uint8)
        made[file.name] = idx.header(shape) + values.tobytes()
        table[key] = mnist.IdxFile(file.name, shape, hashlib.sha256(made[file.name]).hexdigest())
    monkeypatch.setattr(mnist, "FILES", table)
    return made


@pytest.fixture
def packed(contents) -> dict[str, bytes]:
    """The same files as a mirror has them."""
    return {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
