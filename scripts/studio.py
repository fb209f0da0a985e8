"""Open the studio in a browser: follow runs, watch agents at play, sample images.

    python scripts/studio.py
    python scripts/studio.py --runs runs --port 8765 --no-browser
    python scripts/studio.py --host 0.0.0.0 --token SECRET          (for other machines too)

The page is served by this machine, to this machine, and loads nothing from anywhere else. Ctrl-C ends it; runs go on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from lab import runs
from lab.config import Count, Settings, UserError
from lab.recorder import speak


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What to show, and to whom."""

    runs: Path = runs.RUNS
    """Folder of the runs, as runs/<name>/<run>."""
    port: Count = 8765
    """Port of the page."""
    host: str = "127.0.0.1"
    """Address to listen at; any but this machine's own needs a token."""
    token: str = ""
    """What browsers must know, 8 characters or more; it becomes part of the address that is printed."""
    browser: bool = True
    """Open the page in a browser."""


def main() -> int:
    """Serve until Ctrl-C."""
    options = tyro.cli(Options, description=__doc__)
    try:
        from lab.studio.shell import Studio
    except ModuleNotFoundError as missing:
        raise UserError(f'the studio needs {missing.name}, which is not installed: pip install -e ".[studio]"') from None
    from generative import studio as sampling
    from lab.studio import pages
    from rl import studio as watching

    speak()
    parts = (pages, watching, sampling)
    studio = Studio(options.runs, tuple(part.TAB for part in parts))
    for part in parts:
        part.register(studio)
    studio.serve(options.host, options.port, options.token, options.browser)
    return 0


def told() -> int:
    """`main`, with a user's mistake told in a sentence. `lab.launch` has that too, but loads torch, for which the first page would wait."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ in {"__main__", "__mp_main__"}:
    sys.exit(told())
