"""What every test leaves behind as it found it."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Put back what a script that ran in this process set for the whole of it."""
    log = logging.getLogger("dreamplay")
    threads, handlers, level, propagate = torch.get_num_threads(), list(log.handlers), log.level, log.propagate
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)
