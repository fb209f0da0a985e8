"""What tests in a real browser share: Debian's chromium, a real `scripts/studio.py`, pages that notice each request and each error."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "scripts/studio.py"
PATIENCE = 30.0
"""Seconds after which a condition that should have come has failed; a loaded machine takes its time."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait for something outside of the browser; returns what the condition found."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"after {seconds:.0f} s still not: {what}"
        time.sleep(0.02)
    return found


def train(words: str, folder: Path) -> subprocess.Popen[str]:
    """Start a training, e.g. `train_vae.py --data.name digits --trainer.steps 200`, that records into `folder`."""
    script, *rest = words.split()
    command = [sys.executable, str(ROOT / "scripts" / script), *rest, "--tracking.mode", "disabled", "--run-dir", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def trained(words: str, folder: Path) -> Path:
    """A run that has come to its end."""
    process = train(words, folder)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    return folder


# The studio


@dataclass
class Served:
    """A studio at work: its address without a slash at the end, the folder of its runs, what it has printed."""

    url: str
    root: Path
    process: subprocess.Popen[str]
    lines: list[str]

    def stop(self) -> None:
        """End it, and wait until it has."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # a browser that keeps its socket open
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def reachable(port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def environment() -> dict[str, str]:
    """Of a process that is no test: NiceGUI would wait for the fixtures of its own."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}


def serve(root: Path, *words: str) -> Served:
    """Start `scripts/studio.py` over a folder of runs, and wait until it answers."""
    port = free_port()
    command = [sys.executable, SCRIPT, "--runs", str(root), "--port", str(port), "--no-browser", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    served = Served(f"http://127.0.0.1:{port}", root, process, [])
    threading.Thread(target=lambda: served.lines.extend(process.stdout or ()), daemon=True).start()
    wait_until(lambda: reachable(port) or process.poll() is not None, "the studio answers")
    assert process.poll() is None, "".join(served.lines)
    return served


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A studio over an empty folder of runs, `studio.root`, which the tests of a file fill as `studio.root / NAME / STAMP`."""
    root = tmp_path_factory.mktemp("studio") / "runs"
    root.mkdir()
    served = serve(root)
    yield served
    served.stop()
    told = "".join(served.lines)
    assert "Traceback" not in told, told


# The browser


@dataclass
class Browsing:
    """Opens pages, and notes what they ask for and what goes wrong in them.

    Attributes:
        requests: every address that was asked for.
        errors: of the console and of scripts; a test that provokes one takes it out.
    """

    browser: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)

    def page(self, width: int = 1280, dark: bool = False, **options: Any) -> Any:
        """A page of a browser that knows nothing yet."""
        context = self.browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light", accept_downloads=True, **options
        )
        context.set_default_timeout(1000 * PATIENCE)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        return page

    def others(self) -> list[str]:
        """The requests that went to other machines."""
        return [url for url in self.requests if not url.startswith(("data:", "blob:")) and urlsplit(url).hostname != "127.0.0.1"]

    def close(self) -> None:
        """Leave all pages; a request to another host or an error in any of them fails the test."""
        for context in self.contexts:
            context.close()
        assert not self.others()
        assert not self.errors


@pytest.fixture
def browsing(chromium: Any) -> Iterator[Browsing]:
    """Pages of any width, several at once; none may ask another host for anything or end in an error."""
    one = Browsing(chromium)
    yield one
    one.close()


@pytest.fixture
def page(browsing: Browsing) -> Any:
    """One page, 1280 pixels wide."""
    return browsing.page()


def overflow(page: Any) -> int:
    """By how many pixels a page is wider than its window."""
    return int(page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth"))
