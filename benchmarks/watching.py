"""What it costs to watch an agent of an Atari game in the studio: frames drawn a second, age of a frame, work of the server.

    python benchmarks/watching.py runs/dqn_pong/20261121-080000-abc123 --seconds 10

A real `scripts/studio.py` and a real chromium (Playwright's Python package, Debian's browser), at 2 and at 8 times the pace of the
console. The age of a frame is the time from when its state was made by the server to when it was drawn by the page.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lab.config import Count, Positive, Settings, UserError
from lab.launch import guarded
from lab.recorder import console

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "studio.py"
TICKS = os.sysconf("SC_CLK_TCK")
LISTEN = """seconds => new Promise(done => {
  const ages = [], steps = [], game = document.querySelector(".watch-game");
  const note = ({ detail }) => { ages.push(Date.now() / 1000 - detail.made); steps.push(detail.step); };
  game.addEventListener("drawn", note);
  setTimeout(() => { game.removeEventListener("drawn", note); done({ ages, steps }); }, 1000 * seconds);
})"""


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What to measure."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder, as runs/<name>/<run>."""
    seconds: Positive = 10.0
    """Length of each measurement."""
    times: Count = 3
    """Measurements of each speed."""
    script: Path = SCRIPT
    """The studio to start."""


def spent(process: int) -> float:
    """Seconds of a core that a process has worked, all threads together."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(page: Any, process: int, seconds: float) -> str:
    """One line of results."""
    before, begun = spent(process), time.monotonic()
    seen = page.evaluate(LISTEN, seconds)
    length, work = time.monotonic() - begun, spent(process) - before
    frames = len(seen["ages"]) / length
    actions = np.clip(np.diff(seen["steps"]), 0, None).sum() / length
    age = 1000 * float(np.quantile(seen["ages"], 0.95))
    return f"{frames:4.1f} frames/s  {actions:5.1f} actions/s  {100 * work / length:3.0f} % of a core  95 % drawn within {age:.0f} ms"


def main() -> int:
    """Start the studio, open the page, measure."""
    from playwright.sync_api import sync_playwright

    options = tyro.cli(Options, description=__doc__)
    browser = shutil.which("chromium")
    if browser is None:
        raise UserError("no chromium here; it is a package of Debian and Ubuntu: apt-get install chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(options.script), "--runs", str(options.run.resolve().parents[1]), "--port", str(port), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()  # its address: it listens
        with sync_playwright() as playwright:
            page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
            page.goto(f"http://127.0.0.1:{port}/watch/{'/'.join(options.run.resolve().parts[-2:])}")
            look(page, server.pid, options)
    finally:
        server.kill()
        server.wait()
    return 0


def look(page: Any, process: int, options: Options) -> None:
    """Measure at both speeds."""
    page.wait_for_function("Number(document.querySelector('.watch-told-step')?.textContent) > 30")
    for speed, presses in (("2×", 1), ("8×", 2)):
        for _ in range(presses):
            page.keyboard.press("+")
        page.wait_for_function(f"document.querySelector('.watch-speed').textContent === '{speed}'")
        for _ in range(options.times):
            console.print(f"{speed}  {measure(page, process, options.seconds)}", highlight=False)


if __name__ == "__main__":
    sys.exit(guarded(main))
