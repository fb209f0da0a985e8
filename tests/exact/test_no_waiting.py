"""An update never waits for the device: nothing in it reads a number from there, and nothing is copied there in a way that waits.

On a CPU every operation of a step is watched for those that on a GPU would wait. Where there is a GPU, CUDA itself is asked.
"""

import contextlib
import importlib
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from envs.games import GameConfig
from generative.model import FAMILIES
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.launch import read_order
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer
from rl.dqn import DQNConfig, DQNExperiment
from rl.pqn import PQNConfig, PQNExperiment
from rl.replay import Replay, ReplayConfig
from tests.scripts.test_scripts import call

from .test_processes import CASES, SHARED, Case

pytestmark = pytest.mark.usefixtures("one_thread")

READING = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "_linalg_check_errors",
    "unique",
    "_unique2",
    "bincount",
)
"""Operations whose result, or its shape, the host must wait for."""


class Watch(TorchDispatchMode):
    """Refuses what would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READING, f"{name} reads from the device"
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a mask as an index is a nonzero"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch):
    """Within, nothing may be read: on a CPU some readings are no operations, so that they are refused by their names."""

    def refused(*_, **__):
        raise AssertionError("a tensor is read")

    with monkeypatch.context() as patch, Watch():
        for name in ("tolist", "numpy", "cpu", "__float__", "__int__", "__bool__"):
            patch.setattr(torch.Tensor, name, refused)
        yield


@pytest.mark.parametrize(
    "reading", [lambda x: x[0].item(), lambda x: bool(x.any()), lambda x: x[x > 0], torch.nonzero, float, lambda x: x.tolist()]
)
def test_the_watch_sees_whatever_reads(reading, monkeypatch):
    numbers = torch.ones(1)
    with pytest.raises(AssertionError), watched(monkeypatch):
        reading(numbers)


# Whatever is trained


def words(case: Case) -> list[str]:
    """The settings of a case, in bf16, which has operations of its own."""
    settings = SHARED | {"trainer.precision": "bf16", "trainer.steps": "100", "trainer.log-every": "100", "trainer.save-every": "100"}
    return [word for key, value in settings.items() for word in (f"--{key}", value)] + case.options.split()


def before(name: str, folder: Path, made: dict[str, Path]) -> Path:
    """A run that others are built on, of two steps."""
    if name not in made:
        made[name], case = folder / name.replace(" ", "_"), CASES[name]
        call(f"train_{case.script}.py", *words(case), *needed(case, folder, made), "--trainer.steps", "2", "--run-dir", str(made[name]))
    return made[name]


def needed(case: Case, folder: Path, made: dict[str, Path]) -> list[str]:
    return [word for option, name in case.before.items() for word in (option, str(before(name, folder, made)))]


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return {}


@pytest.fixture
def trainer_of(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Makes the trainer of a case, on a device."""

    def trainer(name: str, device: str) -> Trainer:
        if name in AGENTS:
            return Trainer(AGENTS[name], World(device=torch.device(device)))
        case, folder = CASES[name], made.setdefault("", tmp_path_factory.mktemp("before"))
        default = importlib.import_module(FAMILIES.get(case.script, f"lab.{case.script}")).EXPERIMENT
        settings = read_order(default, [*words(case), *needed(case, folder, made)]).resolved.settings
        return Trainer(settings, World(device=torch.device(device)))

    return trainer


TIME = TrainerConfig(steps=100, precision="bf16")
CATCH = GameConfig(name="catch", stack=2, threads=1)
SMALL = {"backbone": "small", "hidden": 16, "games": 4, "batch_size": 8}
AGENTS = {
    "dqn": DQNExperiment(
        trainer=TIME,
        game=CATCH,
        dqn=DQNConfig(train_every=8, learning_starts=40, **SMALL),
        replay=ReplayConfig(capacity=2000, prioritised=True),
    ),
    "rainbow": DQNExperiment(
        trainer=TIME,
        game=CATCH,
        dqn=DQNConfig(train_every=8, learning_starts=40, noisy=True, values="categorical", v_min=-2, v_max=8, **SMALL),
        replay=ReplayConfig(capacity=2000, prioritised=True),
    ),
    "quantiles": DQNExperiment(
        trainer=TIME,
        game=CATCH,
        dqn=DQNConfig(train_every=8, learning_starts=40, values="quantile", quantiles=8, **SMALL),
        replay=ReplayConfig(capacity=2000, prioritised=True),
    ),
    "pqn": PQNExperiment(trainer=TIME, game=CATCH, pqn=PQNConfig(n_steps=4, **SMALL)),
    "pqn by rmsprop": PQNExperiment(
        trainer=TIME, game=CATCH, pqn=PQNConfig(n_steps=4, **SMALL), optimizer=OptimizerConfig(kind="rmsprop", clip_norm=1, ema=0.9)
    ),
    "pqn by dqn's rmsprop": PQNExperiment(
        trainer=TIME, game=CATCH, pqn=PQNConfig(n_steps=4, **SMALL), optimizer=OptimizerConfig(kind="centred_rmsprop", clip_norm=1)
    ),
}


def learnt(trainer: Trainer, guard) -> int:
    """Updates of some steps, each of them inside `guard`: agents read what they see while they play, all others read nothing at all."""
    minimise = trainer.minimise

    def guarded(*given):
        with guard():
            return minimise(*given)

    whole = contextlib.nullcontext
    if hasattr(trainer.task, "games"):
        trainer.minimise = guarded
    else:
        trainer.task.step(trainer)  # what is made once may be read, such as the tokens of all images
        whole = guard
    for _ in range(8 if hasattr(trainer.task, "games") else 2):
        with whole():
            trainer.task.step(trainer)
        trainer.step += 1
    return len(trainer._norms)


SLOW = {name for name, case in CASES.items() if case.before}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in [*CASES, *AGENTS]])
def test_no_update_reads_from_the_device(name, trainer_of, monkeypatch):
    monkeypatch.setattr(Replay, "math_of", {"cpu": torch})  # a GPU's memory; that of a CPU finds its cells with numpy
    assert learnt(trainer_of(name, "cpu"), lambda: watched(monkeypatch)) > 0


@contextlib.contextmanager
def refusing():
    """Within, CUDA raises an error wherever it would wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*CASES, *AGENTS])
def test_no_update_waits_for_a_gpu(name, trainer_of):
    assert learnt(trainer_of(name, "cuda"), refusing) > 0


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "flow matching"])
def test_a_compiled_model_has_the_losses_of_the_plain_one(name):
    case, found = CASES[name], []
    default = importlib.import_module(FAMILIES[case.script]).EXPERIMENT
    for switch in ("false", "true"):
        options = [*words(case), "--trainer.precision", "fp32", "--trainer.compile", switch]
        trainer = Trainer(read_order(default, options).resolved.settings, World())
        found.append([float(trainer.advance()[0]["loss"]) for _ in range(12)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][-1] < found[0][0]
