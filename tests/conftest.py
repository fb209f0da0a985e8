"""What every test finds: a process in which no script has run yet."""

import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def _as_if_no_script_had_run() -> None:
    """Undo what a script sets for the whole process; fixtures of a module may have run one before."""
    torch.set_flush_denormal(False)
    log = logging.getLogger("dreamplay")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)
