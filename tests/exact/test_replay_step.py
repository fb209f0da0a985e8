"""A past step computed once more gives the row that was recorded, bit for bit, from a checkpoint and from the first step."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from generative import gan, vae
from lab import checkpoint, classifier, replaying
from lab.config import UserError
from lab.launch import launch
from lab.replaying import Plan, Replayed
from lab.runs import Run
from rl import dqn

from .conftest import ROOT, start
from .test_kill import wait_until

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {"vae": "generative.vae", "gan": "generative.gan", "classifier": "lab.classifier", "dqn": "rl.dqn"}
DEFAULTS = {"vae": vae.EXPERIMENT, "gan": gan.EXPERIMENT, "classifier": classifier.EXPERIMENT, "dqn": dqn.EXPERIMENT}
TRAINER = {
    "trainer.steps": "33",
    "trainer.save-every": "8",
    "trainer.log-every": "6",
    "trainer.preview-every": "33",
    "trainer.milestones": "0",
    "trainer.threads": "1",
    "trainer.precision": "fp32",
    "tracking.mode": "disabled",
}
DIGITS = TRAINER | {"data.name": "digits", "data.batch-size": "8", "data.augment.shift": "1"}
SETTINGS = {
    "vae": DIGITS | {"model.network.hidden": "16", "model.latent": "4"},
    "gan": DIGITS | {"model.critic-steps": "2"},
    "classifier": DIGITS | {"model.backbone": "small", "data.image-size": "8"},
    "dqn": TRAINER
    | {
        "game.name": "catch",
        "game.stack": "2",
        "dqn.backbone": "small",
        "dqn.hidden": "16",
        "dqn.batch-size": "16",
        "dqn.learning-starts": "160",
        "replay.capacity": "480",
        "replay.prioritised": "true",
        "test.games": "2",
        "test.video-every": "0",
    },
}


def words(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A run of a family, trained when it is first asked for; nobody may change it."""
    made: dict[str, Run] = {}

    def of(family: str) -> Run:
        if family not in made:
            run = Run(tmp_path_factory.mktemp(family) / "run")
            assert launch(DEFAULTS[family], "", [*words(SETTINGS[family]), "--run-dir", str(run.folder)]) == 0
            made[family] = run
        return made[family]

    return of


@pytest.fixture
def copied(trained: Callable[[str], Run], tmp_path: Path) -> Run:
    """A VAE of one's own, with checkpoints of the steps 32 and 33."""
    run = Run(tmp_path / "run")
    shutil.copytree(trained("vae").folder, run.folder)
    return run


def replayed(run: Run, step: int) -> tuple[Plan, Replayed]:
    planned = replaying.plan(run, FAMILIES, step)
    return planned, replaying.replay(planned, lambda steps, count: steps)


def script(run: Run, step: int, folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it; `before`: what stands in front of the command."""
    command = [*before, sys.executable, str(ROOT / "scripts/replay_step.py"), str(run.folder), "--step", str(step)]
    return subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder, what is in it and when it was last written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


# The same bits


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("step", "row", "begun"), [(2, 6, 0), (9, 12, 0), (33, 33, 32)])
def test_any_step_of_any_family_is_the_recorded_one(trained: Callable[[str], Run], family: str, step: int, row: int, begun: int) -> None:
    run = trained(family)
    before = content(run.folder)
    planned, result = replayed(run, step)
    assert (planned.row, planned.begun) == (row, begun)
    (recorded,) = (entry for entry in run.rows() if entry["step"] == row)
    expected = {name: value for name, value in recorded.items() if name.startswith("train/")}
    assert expected
    assert planned.logged == result.computed == expected
    assert replaying.unequal(planned.logged, result.computed) == []
    assert content(run.folder) == before


def test_the_steps_own_numbers_have_the_row_as_their_mean(trained: Callable[[str], Run]) -> None:
    run = trained("vae")
    losses = [replayed(run, step)[1].own["loss"] for step in range(7, 13)]
    assert len(set(losses)) == 6
    (recorded,) = (row["train/loss"] for row in run.rows() if row["step"] == 12)
    assert sum(losses) / 6 == recorded  # sums of float32 numbers are exact in double precision


def test_a_row_is_complete_from_a_checkpoint_in_the_middle_of_it(copied: Run) -> None:
    """The checkpoint of step 32 holds the sums of steps 31 and 32."""
    planned, result = replayed(copied, 33)
    assert planned.begun == 32
    shutil.rmtree(copied.checkpoints)
    from_the_first, again = replayed(copied, 33)
    assert from_the_first.begun == 0
    assert result == again


def test_every_bit_counts() -> None:
    assert replaying.unequal({"a": math.nan, "b": 1.0}, {"a": math.nan, "b": 1}) == []
    assert replaying.unequal({"a": 0.0, "b": 1.0, "c": 1.0}, {"a": -0.0, "b": math.nextafter(1.0, 2)}) == ["a", "b", "c"]


def test_the_script_reads_a_folder_that_cannot_be_written_to(copied: Run, tmp_path: Path) -> None:
    for path in [copied.folder, *copied.folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = content(copied.folder)
    # root may write anywhere unless it gives that right up
    without = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"] if os.geteuid() == 0 and shutil.which("setpriv") else []
    assert subprocess.run([*without, "touch", copied.folder / "new"], capture_output=True).returncode != 0
    done = script(copied, 33, tmp_path, *without)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from the checkpoint of step 32" in done.stdout
    assert "the row of step 33, the mean over steps 31 to 33" in done.stdout
    assert done.stdout.endswith("equal, bit for bit\n")
    assert content(copied.folder) == before


def test_a_run_is_read_while_it_trains(tmp_path: Path) -> None:
    settings = SETTINGS["vae"] | {"trainer.steps": "1000000", "trainer.preview-every": "1000000"}
    run = Run(tmp_path / "run")
    process = start([sys.executable, str(ROOT / "scripts/train_vae.py"), *words(settings), "--run-dir", "run"], tmp_path)
    try:
        assert wait_until(lambda: len(run.rows()) >= 3, process)
        planned, result = replayed(run, 10)
        assert process.poll() is None
        assert planned.logged == result.computed
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output


# Other bits


def test_another_weight_is_noticed_and_named(copied: Run, tmp_path: Path) -> None:
    """A file that was changed with care: all checksums are right."""
    folder = copied.checkpoints / "step_000000032"
    weights = load_file(folder / "model.safetensors")
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name].view(-1)[0] += 0.5
    save_file(weights, folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    manifest["sha256"]["model.safetensors"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"manifest": manifest, "sha256": digest}))
    done = script(copied, 33, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "different: " in done.stdout
    assert "train/loss" in done.stdout.splitlines()[-1]
    assert "train/lr" not in done.stdout.splitlines()[-1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(copied: Run, caplog: pytest.LogCaptureFixture) -> None:
    file = copied.checkpoints / "step_000000032/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    planned, result = replayed(copied, 33)
    assert planned.begun == 0
    assert planned.logged == result.computed
    assert str(file) in caplog.text


def test_a_checkpoint_of_other_settings_is_refused(copied: Run) -> None:
    copied.config.write_text(copied.config.read_text().replace("latent: 4", "latent: 5"))
    with pytest.raises(UserError, match=r"step 32 of .* cannot be put back: 'model' does not fit"):
        replayed(copied, 33)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("threads", 2, None),  # computed with as many here too
        ("torch", "2.0.0", "torch: the run had 2.0.0, here it is"),
        ("git", "0123456789", "the code: the run had 0123456, here it is"),
        ("processes", 2, "processes: the run had 2, here it is 1, so bits may differ"),
    ],
)
def test_what_was_different_is_told(copied: Run, key: str, value: object, told: str | None) -> None:
    known = json.loads(copied.environment.read_text())
    known["starts"][0][key] = value
    known["starts"][0] |= {"changed": False} if key == "git" else {}
    copied.environment.write_text(json.dumps(known))
    cautions = [caution for caution in replaying.plan(copied, FAMILIES, 33).cautions if key == "git" or "the code" not in caution]
    assert cautions == [] if told is None else cautions[0].startswith(told)
    if key == "threads":
        assert torch.get_num_threads() == 2


def test_starts_with_other_threads_matter_from_the_first_step_on(copied: Run) -> None:
    known = json.loads(copied.environment.read_text())
    known["starts"].insert(0, known["starts"][0] | {"threads": 3})
    copied.environment.write_text(json.dumps(known))
    told = "CPU threads: the run had 3, here it is 1, so bits may differ"
    assert told not in replaying.plan(copied, FAMILIES, 33).cautions
    assert told in replaying.plan(copied, FAMILIES, 30).cautions
    copied.environment.unlink()
    assert replaying.plan(copied, FAMILIES, 30).cautions[0].startswith("environment.json does not tell")


def test_a_resume_with_other_settings_is_told(copied: Run) -> None:
    resumed = ["--resume", str(copied.folder)]
    assert launch(vae.EXPERIMENT, "", [*resumed, "--trainer.steps", "36"]) == 0
    with (copied.folder / "command.txt").open("a") as file:
        file.write("python train_vae.py --resume run --trainer.steps 36\npython train_vae.py --resume run\npython train_vae.py 'odd\n")
    assert replaying.changes(copied) == ["the run went on with other settings (--trainer.steps 36), so what came before may differ"]
    planned, result = replayed(copied, 35)
    assert (planned.row, planned.begun) == (36, 33)
    assert planned.logged is not None
    assert result.computed is not None


# Numbers that are not finite


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run that stopped because its third, fourth and fifth gradient were not finite, and what it said then."""
    folder = tmp_path_factory.mktemp("diverged")
    settings = SETTINGS["vae"] | {
        "optimizer.lr": "1e30",
        "optimizer.warmup-steps": "0",
        "trainer.max-skipped": "3",
        "trainer.log-every": "2",
    }
    process = start([sys.executable, str(ROOT / "scripts/train_vae.py"), *words(settings), "--run-dir", "run"], folder)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1, output
    return Run(folder / "run"), output


def test_the_message_of_a_stop_names_the_command_that_shows_it(diverged: tuple[Run, str]) -> None:
    run, output = diverged
    command = output.split("see it happen again: ")[1].split()
    assert command[:4] == ["python", "scripts/replay_step.py", "run", "--step"]
    done = subprocess.run([sys.executable, str(ROOT / command[1]), *command[2:]], cwd=run.folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step {command[4]} itself" in done.stdout
    assert "  loss nan of an update that was skipped, since its gradient is not finite" in done.stdout
    assert "training stopped at step" in done.stdout
    assert "no row of it was recorded" in done.stdout
    assert f"step {command[4]}: the gradient is not finite; this update is skipped" in output


def test_a_run_that_stopped_has_no_steps_after_the_row_it_was_in(diverged: tuple[Run, str]) -> None:
    run, output = diverged
    last = int(output.split("--step ")[1].split()[0])
    newest = max((row["step"] for row in run.rows()), default=0)
    assert last <= newest + 2
    with pytest.raises(
        UserError, match=rf"--step {newest + 3}: .* has recorded {newest} of its 33 steps; give a step from 1 to {newest + 2}"
    ):
        replaying.plan(run, FAMILIES, newest + 3)


# Mistakes


@pytest.mark.parametrize(
    ("run", "step", "told"),
    [
        ("run", "34", "--step 34: run has recorded 33 of its 33 steps; give a step from 1 to 33"),
        ("run/checkpoints/step_000000032", "33", "the nearest checkpoint is found by itself; give the run, run"),
        ("nowhere", "3", "nowhere: no "),
    ],
)
def test_a_mistake_ends_in_one_sentence(copied: Run, run: str, step: str, told: str) -> None:
    command = [sys.executable, str(ROOT / "scripts/replay_step.py"), run, "--step", step]
    done = subprocess.run(command, cwd=copied.folder.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_no_traceback(trained: Callable[[str], Run], tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(trained("dqn").folder, run.folder)
    planned = replaying.plan(run, FAMILIES, 33)
    shutil.rmtree(run.checkpoints / "segments")
    with pytest.raises(UserError, match=r"step 32 of .* was deleted while it was read .*try once more"):
        replaying.replay(planned, lambda steps, count: steps)


def test_the_checkpoints_of_the_test_are_where_it_says(trained: Callable[[str], Run]) -> None:
    """Otherwise the tests above would show less than they say."""
    assert [folder.name for folder in checkpoint.folders(trained("vae").checkpoints)] == ["step_000000033", "step_000000032"]
