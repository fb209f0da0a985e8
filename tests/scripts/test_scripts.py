"""The scripts as a user calls them, on a small run of real digits."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
from PIL import Image

from lab.config import read_yaml

ROOT = Path(__file__).resolve().parents[2]
TINY = """
    --data.name digits --data.batch-size 32 --model.network.hidden 32 --model.latent 4 --trainer.steps 60 --trainer.preview-every 30
    --trainer.save-every 20 --tracking.mode disabled --trainer.threads 1
""".split()  # noqa: SIM905


def call(script: str, *words: str, expect: int = 0) -> str:
    """Run a script in this process, as `python scripts/...` would; returns what it printed."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = [str(ROOT / "scripts" / script), *map(str, words)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before
    assert (end.value.code or 0) == expect, printed.getvalue()
    return printed.getvalue()


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a conditional VAE and an autoencoder, each trained for a moment."""
    folder = tmp_path_factory.mktemp("lab")
    with contextlib.chdir(folder):
        call("train_vae.py", *TINY, "--model.conditional", "true", "--run-dir", "vae")
        call("train_autoencoder.py", *TINY, "--run-dir", "ae")
    return folder


@pytest.fixture(autouse=True)
def _inside(runs_folder: Path):
    with contextlib.chdir(runs_folder):
        yield


def pixels(path: str) -> numpy.ndarray:
    return numpy.asarray(Image.open(path))


# Training


def test_a_run_leaves_everything_where_people_look(runs_folder: Path) -> None:
    names = {str(path.relative_to(runs_folder / "vae")) for path in (runs_folder / "vae").rglob("*") if path.is_file()}
    assert {"config.yaml", "command.txt", "environment.json", "metrics.jsonl", "timing.jsonl", "media/curves.png"} <= names
    assert {"media/samples_000000060.png", "media/reconstructions_000000060.png"} <= names
    assert {"checkpoints/step_000000060/manifest.json", "checkpoints/step_000000060/ema.safetensors"} <= names
    started = json.loads(Path("vae/environment.json").read_text())["starts"]
    assert [start["processes"] for start in started] == [1]


def test_the_saved_config_is_a_config_that_gives_the_same_run() -> None:
    call("train_vae.py", "vae/config.yaml", "--run-dir", "again")
    assert Path("again/metrics.jsonl").read_bytes() == Path("vae/metrics.jsonl").read_bytes()
    assert Path("again/config.yaml").read_bytes() == Path("vae/config.yaml").read_bytes()


def test_print_config_says_where_each_value_comes_from_and_makes_no_run() -> None:
    preset = str(ROOT / "configs/generative/cvae_mnist.yaml")
    printed = call("train_vae.py", preset, "--optimizer.lr", "3e-4", "--print-config")
    assert re.search(r"^  lr: 0\.0003 +# command line$", printed, re.M)
    assert re.search(rf"^  conditional: true +# {re.escape(preset)}:\d+$", printed, re.M)
    assert re.search(r"^  precision: auto +# .*vae_mnist\.yaml:\d+$", printed, re.M)
    assert re.search(r"^  accumulate: 1 +# default$", printed, re.M)
    assert not Path("runs").exists()


def test_all_mistakes_are_told_at_once_with_their_places() -> None:
    Path("bad.yaml").write_text("experiment: vae\noptimizer:\n  lrr: 1e-4\n  lr: fast\nmodel:\n  latent: 0\n")
    printed = call("train_vae.py", "bad.yaml", "--trainer.stepz", "5", "--data.name", "imagenet", expect=2)
    assert "bad.yaml:3: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?" in printed
    assert "bad.yaml:4: 'optimizer.lr': expected a float > 0, found 'fast'" in printed
    assert "bad.yaml:6: 'model.latent': expected an integer >= 1, found '0'" in printed
    assert "command line: unknown key 'trainer.stepz'; did you mean 'trainer.steps'?" in printed
    assert "command line: 'data.name': expected one of mnist, asl, digits, folder, found 'imagenet'" in printed
    assert "Traceback" not in printed


PRESETS = sorted((ROOT / "configs/generative").glob("*.yaml"))
NEEDS = {
    "tokens": ["--vqvae", "codes"],
    "distillation": ["--teacher", "noise"],
    "diffusion": ["--model.steps", "2"],
    "latent_mnist": ["--latents", "codes"],
}
"""What experiments and presets are given besides, to be whole or to be quick."""


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_understood_and_called_like_its_file(preset: Path) -> None:
    printed = call(f"train_{read_yaml(preset)[1]}.py", preset, "--print-config")
    assert preset.stem == re.search(r"^name: (\S+)", printed, re.M)[1]


@pytest.fixture(scope="module")
def teachers(runs_folder: Path) -> None:
    """Runs that some families learn from."""
    with contextlib.chdir(runs_folder):
        small = ["--data.name", "digits", "--data.batch-size", "8", "--trainer.steps", "1", "--tracking.mode", "disabled"]
        call("train_vqvae.py", *small, "--run-dir", "codes")
        call("train_diffusion.py", *small, "--model.network.widths", "8", "--model.steps", "2", "--run-dir", "noise")


@pytest.mark.usefixtures("teachers")
@pytest.mark.parametrize("preset", [path for path in PRESETS if path.stem.endswith("_mnist")], ids=lambda path: path.stem)
def test_every_preset_for_a_cpu_trains(preset: Path) -> None:
    experiment = read_yaml(preset)[1]
    words = ["--data.name", "digits", "--data.batch-size", "16", "--trainer.steps", "2", "--tracking.mode", "disabled"]
    call(f"train_{experiment}.py", preset, *words, *NEEDS.get(experiment, []), *NEEDS.get(preset.stem, []), "--run-dir", preset.stem)
    assert json.loads(Path(preset.stem, "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


BAD_INPUT = [
    ("train_vae.py", ["nowhere.yaml"], "nowhere.yaml: cannot read this file"),
    ("train_vae.py", [str(ROOT / "configs/generative/autoencoder_mnist.yaml")], "use scripts/train_autoencoder.py"),
    ("train_vae.py", ["--resume", "nowhere"], "nowhere: no vae run here"),
    ("train_vae.py", ["--resume", "ae"], "ae: a run of 'autoencoder'; expected vae"),
    ("train_vae.py", ["--resume", "vae", "--run-dir", "x"], "give one config, or --resume RUN, or --run-dir DIR"),
    ("train_vae.py", ["--resume", "vae", "--model.latent", "5"], "cannot resume"),
    ("train_vae.py", ["--resume", "vae", "--optimizer.kind", "sgd"], "'optimizer' does not fit the checkpoint"),
    ("train_vae.py", ["--resume", "vae/checkpoints/step_000000040"], "a run goes on from its newest checkpoint"),
    ("train_vae.py", ["--name", "../x"], "name: expected letters, digits"),
    ("train_vae.py", [*TINY, "--tracking.mode", "online"], "key"),
    ("train_vae.py", [*TINY, "--run-dir", "vae"], "vae already holds a run; go on with it by --resume vae"),
    ("train_vae.py", ["--data.name", "folder", "--data.root", "nowhere"], "nowhere"),
    ("train_vae.py", ["--data.name", "mnist", "--data.root", "vae"], "vae"),
    ("sample.py", ["nowhere"], "nowhere: no autoencoder or "),
    ("sample.py", ["latest"], "there is none below runs/ yet"),
    ("sample.py", ["vae", "--out", "picture.bmp"], "pictures are written as .png or .gif"),
    ("sample.py", ["vae", "--labels", "11"], "the classes are 0, 1, 2"),
    ("sample.py", ["ae", "--labels", "3"], "this model knows no classes"),
    ("sample.py", ["vae", "--kind", "plane", "--out", "x.gif"], "does not move; write it as .png"),
    ("sample.py", ["vae", "--count", "0"], "must be at least 1"),
    ("evaluate.py", ["vae", "--images", "0"], "images: expected an integer >= 1, found 0"),
]


@pytest.mark.parametrize(("script", "words", "expected"), BAD_INPUT)
def test_bad_input_gets_one_clear_sentence(script: str, words: list[str], expected: str) -> None:
    printed = call(script, *words, expect=2)
    assert expected in printed
    assert printed.startswith("error: ") or script == "evaluate.py"  # whose options are checked, and boxed, by tyro
    assert "Traceback" not in printed


# Sampling


@pytest.mark.parametrize("run", ["vae", "ae"])
@pytest.mark.parametrize("kind", ["samples", "interpolation", "traversal", "plane", "reconstructions"])
def test_every_kind_of_picture_is_drawn_and_drawn_again_bit_for_bit(run: str, kind: str) -> None:
    for name in ("first.png", "second.png"):
        call("sample.py", run, "--kind", kind, "--count", "8", "--columns", "5", "--out", name)
    assert Path("first.png").read_bytes() == Path("second.png").read_bytes()
    assert pixels("first.png").std() > 5


def test_another_seed_draws_another_picture_and_the_default_place_is_the_runs_media() -> None:
    assert "picture: vae/media/samples.png" in call("sample.py", "vae", "--count", "4")
    call("sample.py", "vae", "--count", "4", "--seed", "1", "--out", "other.png")
    assert (pixels("vae/media/samples.png") != pixels("other.png")).any()


def test_labels_choose_what_is_drawn() -> None:
    for labels, name in (("3", "threes.png"), ("3,3-3", "same.png"), ("0-9", "all.png")):
        call("sample.py", "vae", "--count", "4", "--labels", labels, "--out", name)
    assert (pixels("threes.png") == pixels("same.png")).all()
    assert (pixels("threes.png") != pixels("all.png")).any()


@pytest.mark.parametrize("kind", ["samples", "interpolation"])
def test_a_gif_moves(kind: str) -> None:
    call("sample.py", "vae", "--kind", kind, "--count", "4", "--columns", "4", "--out", "dream.gif")
    with Image.open("dream.gif") as picture:
        frames = []
        for index in range(picture.n_frames):
            picture.seek(index)
            frames.append(numpy.asarray(picture.convert("L"), dtype=float))
    assert len(frames) == (24 if kind == "samples" else 6)
    assert all(abs(first - second).sum() > 0 for first, second in pairwise(frames))


def test_an_older_checkpoint_can_be_named_and_a_damaged_newest_one_is_passed_over() -> None:
    call("sample.py", "vae/checkpoints/step_000000040", "--out", "older.png")
    call("sample.py", "vae", "--out", "newest.png")
    damaged = Path("vae/checkpoints/step_000000060/ema.safetensors")
    content = damaged.read_bytes()
    try:
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        call("sample.py", "vae", "--out", "fallback.png")
        assert "ema.safetensors is not what was saved" in call("sample.py", str(damaged.parent), expect=2)
    finally:
        damaged.write_bytes(content)
    assert (pixels("fallback.png") == pixels("older.png")).all()
    assert (pixels("newest.png") != pixels("older.png")).any()


# Judging and sending


def test_evaluate_prints_json_and_keeps_it_in_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DREAMPLAY_CACHE", str(tmp_path))
    printed = json.loads(call("evaluate.py", "vae", "--images", "50", "--importance-samples", "10", "--samples", "60", "--json"))
    assert printed == json.loads(Path("vae/evaluation.json").read_text())
    assert printed["protocol"] == "digits test, 50 images, dynamic binarisation, K=10, seed 0"
    assert printed["nll"] <= printed["bound"]
    assert "squared" not in printed
    assert "error" in json.loads(call("evaluate.py", "ae", "--samples", "60", "--json"))


def sync(run: str) -> str:
    """Send a run to an offline directory, in a process of its own as wandb changes the environment; returns what is printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    script = [sys.executable, str(ROOT / "scripts/sync.py"), run, "--mode", "offline"]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sync_writes_one_offline_run_with_every_row() -> None:
    for _ in range(2):
        assert f"rows sent: {len(Path('vae/metrics.jsonl').read_text().splitlines())}" in sync("vae")
    assert len(list(Path("vae/wandb").glob("offline-run-*"))) == 1


# The README


def commands_of_the_readme() -> list[list[str]]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    lines = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["python"]]


@pytest.mark.parametrize(
    "words", [words for words in commands_of_the_readme() if "train_" in words[0] and "--resume" not in words], ids=" ".join
)
def test_the_readmes_training_commands_are_understood(words: list[str]) -> None:
    script, *options = [str(ROOT / word) if word.startswith(("scripts/", "configs/")) else word for word in words]
    assert "experiment:" in call(Path(script).name, *options, "--print-config")


PLACEHOLDERS = {"RUN": "vae", "latest": "vae", "DIFFUSION": "noise"}
"""Which run a command of the README is tried on; those with another name in its place are not."""
SAMPLING = [words for words in commands_of_the_readme() if "sample.py" in words[0] and words[1] in PLACEHOLDERS]


@pytest.mark.usefixtures("teachers")
@pytest.mark.parametrize("words", SAMPLING, ids=" ".join)
def test_the_readmes_sampling_commands_draw(words: list[str]) -> None:
    script, *options = [PLACEHOLDERS.get(word, word) for word in words]
    assert "picture: " in call(Path(script).name, *options)


def test_the_readme_names_every_preset_and_every_script() -> None:
    text = (ROOT / "README.md").read_text()
    files = [
        *(ROOT / "configs").glob("*/*.yaml"),
        *(path for path in (ROOT / "scripts").glob("*.py") if path.stem not in ("bootstrap", "demo")),
    ]
    assert not [path.name for path in files if path.name not in text]
