"""A stop that is asked for in the middle of a preview or of a test leaves it, and what follows is the same, byte for byte.

The checkpoint of such a stop holds what is known of the row; on resume the step's hooks are done again, from their start.
"""

import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from lab import checkpoint, trainer
from lab.launch import launch
from lab.runs import Run, owner_of
from rl import stable_baselines

from .conftest import ROOT, fingerprint, finish, start
from .test_dqn import CATCH, PONG, assert_same
from .test_kill import linger, size, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINER = {
    "trainer.steps": "6",
    "trainer.save-every": "3",  # the preview's step too: the save after it must not be lost
    "trainer.log-every": "2",
    "trainer.preview-every": "3",
    "trainer.milestones": "2",
    "trainer.threads": "1",
    "trainer.precision": "fp32",
    "tracking.mode": "disabled",
}
DIGITS = TRAINER | {"data.name": "digits", "data.batch-size": "8"}
TINY = {"model.network.hidden": "16", "model.latent": "4"}
SEQUENCE = {"model.width": "16", "model.layers": "1", "model.heads": "2"}
ENLARGING = {"model.channels": "8", "model.blocks": "1", "model.perceptual": "0", "model.critic": "small"}
UNET = {"model.network.widths": "[8, 16]", "model.steps": "4"}
DQN = CATCH | TRAINER | {"dqn.learning-starts": "32", "test.video-every": "1", "test.video-steps": "5"}
SB3 = TRAINER | {
    "game.name": "catch",
    "game.stack": "2",
    "backbone": "small",
    "test.games": "2",
    "test.video-every": "1",
    "test.video-steps": "5",
    "ppo.games": "2",
    "ppo.n-steps": "8",
    "ppo.batch-size": "8",
    "dqn.actions-per-step": "16",
    "dqn.learning-starts": "16",
    "replay.capacity": "400",
}
"""Settings of both of its algorithms; the one that is not chosen leaves the other's alone."""
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "autoencoder": ("generative.autoencoder", DIGITS | TINY),
    "vae": ("generative.vae", DIGITS | TINY),
    "vqvae": ("generative.vqvae", DIGITS | {"model.codes": "16", "model.channels": "8"}),
    "gpt": ("generative.tokens", DIGITS | SEQUENCE | {"model.kind": "gpt"}),
    "masked": ("generative.tokens", DIGITS | SEQUENCE | {"model.kind": "masked"}),
    "gan": ("generative.gan", DIGITS | {"model.channels": "8"}),
    "flow": ("generative.flow", DIGITS | {"model.levels": "1", "model.steps": "2", "model.hidden": "8"}),
    "diffusion": ("generative.diffusion", DIGITS | UNET),
    "distillation": ("generative.distillation", DIGITS),
    "superresolution": ("generative.superresolution", DIGITS | ENLARGING),
    "classifier": ("lab.classifier", DIGITS | {"data.image-size": "8", "model.backbone": "small"}),
    "dqn": ("rl.dqn", DQN),
    "ppo": ("rl.sb3", SB3 | {"algorithm": "ppo"}),
    "sb3_dqn": ("rl.sb3", SB3 | {"algorithm": "dqn"}),
}
QUICK = ("autoencoder", "diffusion", "dqn", "ppo")
"""One that writes into its model, one whose samples take long, two that play; there are too many for the default tests."""
FIRST = {"gpt": ("vqvae", "vqvae"), "masked": ("vqvae", "vqvae"), "distillation": ("diffusion", "teacher")}
"""What must have been trained before, and the setting that names it."""


def words(name: str, folder: Path) -> list[str]:
    """The command line of a small run of a family; what it needs first lies in the same folder."""
    options = [word for key, value in FAMILIES[name][1].items() for word in (f"--{key}", value)]
    return options + ([f"--{FIRST[name][1]}", str(folder / FIRST[name][0])] if name in FIRST else [])


def train(name: str, options: list[str]) -> int:
    return launch(importlib.import_module(FAMILIES[name][0]).EXPERIMENT, "", options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the run that a family begins with, which is trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("prepared")

    def of(name: str) -> Path:
        first = FIRST.get(name, ("", ""))[0]
        if first and not (folder / first).exists():
            assert train(first, [*words(first, folder), "--run-dir", str(folder / first)]) == 0
        return folder

    return of


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, each: Callable[[int, int], None]) -> Iterator[None]:
    """Call `each` at every forward pass of any module inside the trainer's hooks: which time there are any, and which pass."""
    real, times = trainer.leaving, itertools.count(1)

    @contextmanager
    def leaving(requested: Any) -> Iterator[None]:
        passes = ((time, number) for time in itertools.islice(times, 1) for number in itertools.count(1))
        with real(requested):
            watch = register_module_forward_pre_hook(lambda module, inputs: each(*next(passes)))
            try:
                yield
            finally:
                watch.remove()

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "leaving", leaving)
        yield


def saved(run: Run) -> tuple[int, bool]:
    """The step of the newest checkpoint, and whether its row is unfinished."""
    newest = checkpoint.load(checkpoint.folders(run.checkpoints)[0], only=["trainer"])
    return newest.step, "unfinished" in newest.parts["trainer"]


def recorded(run: Run) -> list[int]:
    return [row["step"] for row in run.rows()]


def kept(run: Run) -> dict[str, bytes]:
    """The weights of earlier moments, the pictures and the films."""
    files = [*run.milestones.rglob("*.safetensors"), *run.media.glob("*")]
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_a_hook_that_a_stop_cut_off_is_done_again_and_the_rest_is_the_same(
    name: str, prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "run")
    options, passes = words(name, prepared(name)), list[tuple[int, int]]()

    def go_on(stop: tuple[int, int] = (0, 0), expect: int = 75) -> None:
        """Begin the run or go on with it; a SIGTERM comes at this pass of the hooks that are done for the first or the second time."""
        again = ["--resume", str(run.folder)] if run.config.exists() else ["--run-dir", str(run.folder)]
        with watched(monkeypatch, lambda *place: signal.raise_signal(signal.SIGTERM) if place == stop else None):
            assert train(name, [*options, *again]) == expect

    with watched(monkeypatch, lambda *place: passes.append(place)):
        assert train(name, [*options, "--run-dir", str(whole.folder)]) == 0
    first, second = (max(number for time, number in passes if time == when) for when in (1, 2))
    for place in (1, first - 1):
        go_on((1, place))
        assert saved(run) == (3, True)
        assert recorded(run) == [2]
    go_on((2, second // 2))
    assert saved(run) == (6, True)
    assert recorded(run) == [2, 3, 4]
    go_on((1, second), expect=0)  # after the last pass there is nothing to leave any more, and nothing left to do
    assert saved(run) == (6, False)
    go_on(expect=0)
    assert fingerprint(run.folder) == fingerprint(whole.folder)
    assert kept(run) == kept(whole)
    if "replay" in checkpoint.load(checkpoint.folders(run.checkpoints)[0]).segments:
        assert_same(run.folder, whole.folder, room=24, rows=24)


def test_a_long_step_that_a_stop_cut_off_is_begun_again_and_the_rest_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PPO, whose steps are a thousand actions; a stop comes while it plays, and while it learns."""
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "run")
    options, real = words("ppo", tmp_path), stable_baselines.leaving
    assert train("ppo", [*options, "--run-dir", str(whole.folder)]) == 0

    def go_on(step: int, place: int, expect: int = 75) -> None:
        """Begin the run or go on with it; a SIGTERM comes at this forward pass of the step-th step that is done now."""
        steps = itertools.count(1)

        @contextmanager
        def leaving(requested: Any) -> Iterator[None]:
            passes = itertools.count(1) if next(steps) == step else itertools.count(10**9)
            with real(requested):
                watch = register_module_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGTERM) if next(passes) == place else None)
                try:
                    yield
                finally:
                    watch.remove()

        again = ["--resume", str(run.folder)] if run.config.exists() else ["--run-dir", str(run.folder)]
        with monkeypatch.context() as patch:
            patch.setattr(stable_baselines, "leaving", leaving)
            assert train("ppo", [*options, *again]) == expect

    go_on(1, 1)
    assert saved(run) == (0, False)
    go_on(2, 4)  # at play: a pass of the policy is several passes of modules
    assert saved(run) == (1, False)
    go_on(3, 60)  # while it learns
    assert saved(run) == (3, False)
    assert recorded(run) == [2, 3]
    go_on(1, 0, expect=0)
    assert fingerprint(run.folder) == fingerprint(whole.folder)
    assert kept(run) == kept(whole)


# Real processes


@pytest.mark.slow
def test_a_test_of_games_and_a_video_are_left_at_once(tmp_path: Path) -> None:
    """By a signal from outside, on an Atari game, at whatever moment it comes."""
    finish(agent("--run-dir", "whole"), tmp_path)
    run, whole = Run(tmp_path / "run"), Run(tmp_path / "whole")
    tries = 0
    while not run.checkpoints.exists() or saved(run) == (11, False):  # on a machine so busy that it was not even at the games
        assert tries < 5
        interrupt(run, lambda: size(run.metrics) > 0 and recorded(run)[-1] == 11, 0.3)
        tries += 1
    assert saved(run) == (12, True)
    assert recorded(run)[-1] == 11
    interrupt(run, lambda: any(run.media.glob(".play_*")), 0.05)
    assert saved(run) == (12, True)
    assert not [path.name for path in run.media.iterdir() if "play" in path.name]
    finish(agent("--resume", "run"), tmp_path)
    assert_same(run.folder, whole.folder, room=40, rows=40)
    assert kept(run) == kept(whole)


def agent(*extra: str) -> list[str]:
    """A run of Pong with a test in the middle that takes seconds: two games and a film."""
    changes = {"trainer.log-every": "1", "trainer.preview-every": "12", "trainer.steps": "20", "trainer.save-every": "5"}
    longer = {"game.max-frames": "800", "test.games": "2", "test.video-every": "1", "test.video-steps": "150", "trainer.milestones": "2"}
    options = [word for key, value in (PONG | changes | longer).items() for word in (f"--{key}", value)]
    return [sys.executable, str(ROOT / "scripts/train_dqn.py"), *extra, *options]


def interrupt(run: Run, condition: Callable[[], bool], seconds: float) -> None:
    """Go on with the run, or begin it; send SIGTERM a moment after the condition holds."""
    again = ("--resume" if run.config.exists() else "--run-dir", run.folder.name)
    process = start(agent(*again), run.folder.parent)
    assert wait_until(condition, process)
    linger(process, seconds)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Traceback" not in output


@pytest.mark.slow
def test_of_two_processes_the_main_one_leaves_its_preview_and_both_stop(tmp_path: Path) -> None:
    """The signal comes to the main process alone; the other one waits for it, and learns of the stop from it."""
    run, whole = Run(tmp_path / "run"), Run(tmp_path / "whole")
    finish(drawing("--run-dir", "whole"), tmp_path)
    process = start(drawing("--run-dir", "run"), tmp_path)
    assert wait_until(lambda: size(run.metrics) > 0 and recorded(run)[-1] == 11, process)
    linger(process, 0.5)
    owner = owner_of(run)
    assert owner
    os.kill(owner.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)  # torchrun's own exit code says only that one of its processes had another than 0
    assert "stopped at step 12; go on with --resume run" in output
    assert "Traceback" not in output.partition("torch/distributed")[0]
    assert saved(run) == (12, True)
    finish(drawing("--resume", "run"), tmp_path)
    assert fingerprint(run.folder) == fingerprint(whole.folder)
    assert kept(run) == kept(whole)


def drawing(*extra: str) -> list[str]:
    """A diffusion model on two processes, whose preview takes seconds."""
    changes = {
        "model.steps": "200",
        "trainer.log-every": "1",
        "trainer.preview-every": "12",
        "trainer.steps": "20",
        "trainer.save-every": "5",
    }
    options = [word for key, value in (DIGITS | UNET | changes).items() for word in (f"--{key}", value)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *launcher, str(ROOT / "scripts/train_diffusion.py"), *extra, *options]
