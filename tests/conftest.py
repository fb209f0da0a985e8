"""What every test finds: a process in which no script has run yet."""

import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Give each of pytest's workers, and the processes that its tests start, one core: threads that share cores wait for each other."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _as_if_no_script_had_run() -> None:
    """Undo what a script sets for the whole process; fixtures of a module may have run one before."""
    torch.set_flush_denormal(False)
    log = logging.getLogger("dreamplay")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many tiny operations go faster without a pool of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's chromium, driven by Playwright; a file at a time, since its loop would be in the way of others' loops.

    Where there is none, tests that need it are skipped and say so, unless LAB_BROWSER=required asks for them, as CI does.
    """
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None and os.environ.get("LAB_BROWSER") == "required":
        pytest.fail("no chromium here, and LAB_BROWSER=required: apt-get install chromium")
    if path is None:
        pytest.skip("no chromium here: nothing is tried in a browser (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
