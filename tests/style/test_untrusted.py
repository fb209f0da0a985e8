"""No file that somebody else made can run code here: the source has no loader that would, but for one, which is named.

Weights of stable-baselines3 come in files whose other parts are pickles. `rl.stable_baselines` reads the weights alone, by PyTorch's
restricted loader; SB3's own `load` is never called.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lab", "envs", "rl", "generative", "scripts", "benchmarks")

RESTRICTED = {("rl/stable_baselines.py", "_weights"): "torch.load"}
"""The one function that may read what is partly a pickle, always with `weights_only=True`."""

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "pandas", "imp"}
"""Modules whose readers run what a file says, or fetch others that do."""
FUNCTIONS = {
    *("eval", "exec", "compile", "__import__", "execfile", "input", "breakpoint"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package.PackageImporter"),
    *("torch.export.load", "torch.serialization.add_safe_globals", "torch.distributed.checkpoint.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader", "yaml.CFullLoader", "yaml.CUnsafeLoader"),
    *("os.system", "os.popen", "os.startfile", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("shutil.unpack_archive", "runpy.run_path", "runpy.run_module", "code.interact"),
}
METHODS = {"extractall", "extract", "from_pretrained", "load_from_zip_file", "load_from_pkl", "load_replay_buffer", "set_parameters"}
"""Methods that write where an archive says, fetch what a name says, or unpickle, whatever they are called on."""
SB3 = {"PPO", "DQN", "BaseAlgorithm", "BasePolicy", "ActorCriticPolicy", "DQNPolicy", "VecNormalize"}
"""Classes of stable-baselines3 whose `load` unpickles."""


def unsafe(tree: ast.AST) -> list[str]:
    """Every place of a module that could run what a file says, as `line: what` or, of the restricted loader, `line: function what`."""
    names = aliases(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [f"{node.lineno}: import {name}" for name in imported(node) if name.partition(".")[0] in MODULES or name in FUNCTIONS]
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            whole = full(node, names)
            *_, owner, last = ["", *whole.split(".")]
            if whole in FUNCTIONS or last in METHODS or (owner in SB3 and last == "load"):
                found.append(f"{node.lineno}: {whole}")
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {word.arg}={ast.unparse(word.value)}" for word in node.keywords if is_unsafe(word)]
    return found


def is_unsafe(word: ast.keyword) -> bool:
    """Whether an argument asks for a shell, for pickles, or for code that a model brings."""
    value = ast.unparse(word.value)
    return (word.arg in ("shell", "allow_pickle", "trust_remote_code") and value != "False") or (
        word.arg == "weights_only" and value != "True"
    )


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules, and for `from` the names in them, that an import statement brings."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]


def aliases(tree: ast.AST) -> dict[str, str]:
    """What the names of a module stand for that `import x as y` and `from x import y` made."""
    known = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else []:
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
            known[alias.asname or alias.name] = base + alias.name
    return {name.removeprefix("builtins."): whole.removeprefix("builtins.") for name, whole in known.items()}


def full(node: ast.Attribute | ast.Name, names: dict[str, str]) -> str:
    """A dotted name with what its first word stands for."""
    first, dot, rest = ast.unparse(node).partition(".")
    return (names.get(first, first) + dot + rest).removeprefix("builtins.")


def restricted(tree: ast.AST, function: str) -> list[str]:
    """The calls of `torch.load` with `weights_only=True` in a function, as `line: torch.load`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load"]
            return [f"{call.lineno}: torch.load" for call in calls if "weights_only=True" in map(ast.unparse, call.keywords)]
    return []


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "import pickle as p", "from pickle import loads", "import joblib.numpy_pickle", "import dill, os"),
        *("import torch\ntorch.load('x')", "import torch as t\nt.load('x')", "from torch import load", "torch.load(f, weights_only=flag)"),
        *("torch.hub.load('x', 'y')", "torch.jit.load(f)", "module(f, weights_only=False)"),
        *(
            "yaml.load(x, Loader=SafeLoader)",
            "import yaml as y\ny.unsafe_load(x)",
            "class L(yaml.Loader): pass",
            "from yaml import full_load",
        ),
        *("np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)", "AutoModel.f(x, trust_remote_code=True)"),
        *("eval('1')", "exec(code)", "f = eval", "builtins.eval('1')", "from builtins import eval as e\ne('1')", "__import__(name)"),
        *("os.system('ls')", "from os import system", "import os as o\no.popen('ls')", "subprocess.run('ls', shell=True)"),
        *("subprocess.run(x, shell=flag)", "tarfile.open(p).extractall()", "archive.extract(member)", "shutil.unpack_archive(p)"),
        *("PPO.load(p)", "stable_baselines3.DQN.load(p)", "from stable_baselines3 import PPO as P\nP.load(p)", "model.set_parameters(p)"),
        *("load_from_zip_file(p)", "VecNormalize.load(p, env)"),
    ],
)
def test_the_search_finds_what_could_run_code(code: str) -> None:
    assert unsafe(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        *("model.eval()", "np.load(p)", "np.load(p, allow_pickle=False)", "yaml.safe_load(x)", "yaml.compose(x, Loader=yaml.SafeLoader)"),
        *(
            "json.load(f)",
            "load(folder)",
            "subprocess.run(words, shell=False)",
            "re.compile('x')",
            "torch.compile(m)",
            "PPO('CnnPolicy', e)",
        ),
        "archive.read('x')",
    ],
)
def test_the_search_leaves_harmless_code_alone(code: str) -> None:
    assert not unsafe(ast.parse(code))


def test_no_loader_anywhere_could_run_what_a_file_says_but_for_the_one_that_is_named() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = {}
    for path in files:
        name, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text())
        allowed = {place for (file, function) in RESTRICTED if file == name for place in restricted(tree, function)}
        found |= {f"{name}:{place}": place for place in unsafe(tree) if place not in allowed}
    assert not found


@pytest.mark.parametrize(("file", "function"), RESTRICTED)
def test_the_one_that_is_named_is_there_once(file: str, function: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    assert len(restricted(tree, function)) == 1
    assert sum("torch.load" in place for place in unsafe(tree)) == 1
