"""The rules of the house: who imports whom, how long functions are, what is light, and that our packages are ours."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lab", "envs", "rl", "generative")
MAY_IMPORT = {"lab": {"lab"}, "envs": {"envs", "lab"}, "rl": {"rl", "envs", "lab"}, "generative": {"generative", "lab"}}
LONGEST_FUNCTION = 60


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {(node.module or "").partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_rule_allows(package: str) -> None:
    for path in sources(package):
        forbidden = imported(path) & set(PACKAGES) - MAY_IMPORT[package]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {', '.join(forbidden)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_our_packages_are_the_ones_imported(package: str) -> None:
    """`rl`, `envs` and `generative` are also the names of other projects on the package index."""
    module = importlib.import_module(package)
    assert Path(module.__file__ or "").is_relative_to(ROOT)
    assert set(packages_distributions().get(package, ["dreamplay"])) == {"dreamplay"}


def test_functions_are_short() -> None:
    lengths = {}
    for path in sources(*PACKAGES, "scripts", "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{path.relative_to(ROOT)}:{node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    too_long = {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert not too_long
    ordered = sorted(lengths.values())
    assert ordered[len(ordered) // 2] <= 10
    assert ordered[int(0.9 * len(ordered))] <= 30


def test_no_file_is_called_utils() -> None:
    assert not [path for path in sources(*PACKAGES, "scripts") if path.stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("train_*.py")))
def test_help_loads_nothing_heavy_but_torch(script: str) -> None:
    """What makes `--help` slow: each of these costs from a third of a second to several."""
    heavy = ("wandb", "matplotlib", "sklearn", "gymnasium", "diffusers", "nicegui", "scipy", "torch.distributed.run")
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'scripts' / script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout + done.stderr


def needed(project: dict[str, Any]) -> list[str]:
    """Every package that the project or an extra of it asks for; an extra may name others of our own."""
    extras = (name for extra in project["optional-dependencies"].values() for name in extra)
    return [*project["dependencies"], *(name for name in extras if not name.startswith("dreamplay["))]


def test_the_constraints_pin_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = needed(project)
    names = {name.partition(">")[0].partition("=")[0].strip().lower() for name in wanted}
    pinned = {line.partition("==")[0].strip().lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert not names - pinned


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = (ROOT / "CONTRIBUTING.md").read_text()
    wanted = needed(project)
    assert not [name for name in wanted if f"`{name.partition('>')[0]}`" not in table]
