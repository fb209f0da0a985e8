"""Create .venv and install Dreamplay into it; does nothing when that is done already. Needs only Python and its pip.

python3 scripts/bootstrap.py          what the experiments need
python3 scripts/bootstrap.py dev      and what the tests need
"""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def main(extras: list[str]) -> int:
    """Bring .venv up to date with pyproject.toml and constraints.txt."""
    if {"-h", "--help"} & set(extras):
        print(__doc__)
        return 0
    if sys.version_info < (3, 11):
        print(f"Dreamplay needs Python 3.11 or newer, this is {sys.version.split()[0]}; try: make PYTHON=python3.12", file=sys.stderr)
        return 2
    wanted = fingerprint()
    if all(stamp(extra).exists() and stamp(extra).read_text() == wanted for extra in extras or [""]) and PYTHON.exists():
        return 0
    began = time.monotonic()
    if not PYTHON.exists():
        print("creating .venv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    print("installing Dreamplay and what it needs (minutes the first time)", flush=True)
    target = f".[{','.join(extras)}]" if extras else "."
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt", "-e", target]
    if subprocess.run(command, cwd=ROOT).returncode:
        print("the installation failed; what pip says above tells why", file=sys.stderr)
        return 1
    for extra in {"", *extras}:
        stamp(extra).write_text(wanted)
    print(f"installed in {time.monotonic() - began:.0f} s", flush=True)
    return 0


def fingerprint() -> str:
    """Changes whenever another set of packages is asked for, or another place is installed from."""
    content = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    return hashlib.sha256(content + str(ROOT).encode() + sys.version.encode()).hexdigest()


def stamp(extra: str) -> Path:
    """Where the fingerprint of an installed extra is kept."""
    return VENV / f".installed-{extra or 'core'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
