"""scripts/evaluate.py for generators and scripts/export_features.py, as a user calls them."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest

from generative.metrics import SHIPPED, Features
from tests.scripts.test_scripts import TINY, call

NAME = Features((SHIPPED / "digits.safetensors").read_bytes()).name
QUICK = ["--samples", "60", "--images", "50", "--importance-samples", "5"]
CLASSIFIER = """
    --data.name digits --data.batch-size 32 --model.backbone lenet --trainer.steps 60 --trainer.preview-every 60 --trainer.save-every 60
    --tracking.mode disabled --trainer.threads 1
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a conditional VAE, an autoencoder and a classifier, each trained for a moment."""
    made = tmp_path_factory.mktemp("judged")
    with contextlib.chdir(made):
        call("train_vae.py", *TINY, "--model.conditional", "true", "--run-dir", "vae")
        call("train_autoencoder.py", *TINY, "--run-dir", "ae")
        call("train_classifier.py", *CLASSIFIER, "--run-dir", "classifier")
    return made


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DREAMPLAY_CACHE", str(folder / "cache"))
    with contextlib.chdir(folder):
        yield


def judged(*words: str) -> dict:
    return json.loads(call("evaluate.py", *words, *QUICK, "--json"))


def test_a_generator_is_judged_by_its_family_and_by_its_samples() -> None:
    scores = judged("vae")
    assert scores == json.loads(Path("vae/evaluation.json").read_text())
    assert scores["protocol"] == "digits test, 50 images, dynamic binarisation, K=5, seed 0"
    assert scores["sample_protocol"].startswith(
        f"60 samples in 8 bits, seed 0; beside 60 test and 60 training images of digits in the features {NAME}"
    )
    assert scores["features"] == NAME
    assert scores["samples"] == 60
    floor = scores["ladder"]["floor"]
    assert scores["frechet_test"] > 5 * floor["frechet_test"] > 0
    assert 0 <= scores["class_accuracy"] < 0.6
    assert "cas" not in scores
    assert Path("vae/media/neighbours.png").is_file()
    assert "class_accuracy" not in judged("ae")  # it knows no classes


def test_several_generators_stand_side_by_side_with_the_floor_and_the_ladder() -> None:
    printed = call("evaluate.py", "vae", "ae", *QUICK)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    rows = {row[0]: row[1:] for row in cells if row[0]}
    each = {name: json.loads(Path(name, "evaluation.json").read_text()) for name in ("vae", "ae")}
    floor = each["vae"]["ladder"]["floor"]
    for name in ("frechet test", "kernel test", "recall test"):
        key = name.replace(" ", "_")
        assert rows[f"{name} ({NAME})"] == [f"{values[key]:.4g}" for values in (each["vae"], each["ae"], floor)]
    assert rows["nll"] == [f"{each['vae']['nll']:.4g}", "", ""]
    assert rows["memorised"][2] == "0.01"
    assert rows["blur 2"][0] == f"{each['vae']['ladder']['blur 2']['frechet_test']:.4g}"
    assert printed.count("samples in 8 bits") == 1
    assert list(judged("vae", "ae")) == ["generators"]


def test_a_classifier_of_ones_own_can_be_the_judge_and_its_numbers_get_rows_of_their_own() -> None:
    own = judged("vae", "--features", "classifier")
    assert own["features"].startswith("digits-")
    assert own["features"] != NAME
    assert own["frechet_test"] != judged("vae")["frechet_test"]
    assert "no classifier run here" in call("evaluate.py", "vae", *QUICK, "--features", "nowhere", expect=2)
    call("train_classifier.py", *CLASSIFIER, "--data.image-size", "14", "--run-dir", "coarse")
    assert "--features coarse: they see images of 1 x 14 x 14" in call("evaluate.py", "vae", *QUICK, "--features", "coarse", expect=2)


def test_sampling_settings_that_a_model_does_not_know_are_refused() -> None:
    assert "--steps: this model does not know that" in call("evaluate.py", "vae", "--steps", "5", expect=2)
    assert "fewer than 50" in call("evaluate.py", "vae", "--samples", "5", expect=2)


def test_generators_and_classifiers_are_not_judged_together() -> None:
    assert "only if all are agents or all are generators" in call("evaluate.py", "vae", "classifier", expect=2)


def test_a_classifier_becomes_features_under_the_name_of_its_checksum() -> None:
    printed = call("export_features.py", "classifier", "own", "--folder", "out")
    content = Path("out/own.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert f"SHA-256 {digest}" in printed
    assert f"features digits-{digest[:8]}: " in printed
    features = Features(content)
    assert features.facts["backbone"] == "lenet"
    assert features.facts["test_accuracy"] == json.loads(call("evaluate.py", "classifier", "--json"))["accuracy"]
    assert "run-dir" not in features.facts["command"]
    call("export_features.py", "classifier", "own", "--folder", "out")
    assert Path("out/own.safetensors").read_bytes() == content
    assert judged("vae", "--features", "classifier")["features"] == features.name
