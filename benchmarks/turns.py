"""What the benchmarks share: one measurement in a process of its own, turns put together, figures kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lab import distributed
from lab.config import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def alone(script: str, *words: str) -> Any:
    """What a benchmark takes and prints as JSON when it is given `words`, in a process of its own.

    Raises:
        UserError: it failed.
    """
    return json.loads(said([script, *words]).splitlines()[-1])


def said(words: Sequence[str]) -> str:
    """What a Python process prints.

    Raises:
        UserError: it failed; with the sentence that it ended with.
    """
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["it said nothing"]
        reason = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise UserError(f"{' '.join(words)} ended with exit code {done.returncode}: {reason}")
    return done.stdout


def pace(function: Callable[[], Any], seconds: float, warm_up: int = 3) -> float:
    """Seconds per call, of calls that together last for about so long."""
    for _ in range(warm_up):
        function()
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds or not done:
        function()
        done += 1
    return passed / done


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median of some turns and their range, as it is printed."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def keep(out: Path, report: dict[str, Any]) -> None:
    """Write figures, with the hardware that they were taken on."""
    hardware = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), **distributed.environment()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(hardware | report, indent=1) + "\n")
