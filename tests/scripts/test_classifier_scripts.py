"""The scripts of classifiers as a user calls them: train, judge, classify photos, and begin with another run's weights."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lab import classifier, data, loading
from lab.classifier import Judgement, wilson
from lab.data import photo
from lab.runs import Run

from . import test_scripts
from .test_scripts import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = """
    --data.name digits --data.batch-size 32 --model.backbone small --trainer.save-every 20 --trainer.preview-every 20
    --tracking.mode disabled --trainer.threads 1 --optimizer.warmup-steps 0
""".split()  # noqa: SIM905


def call(script: str, *words: object, expect: int = 0) -> str:
    printed = test_scripts.call(script, *words, expect=expect)
    assert "Traceback" not in printed
    return printed


def refused(script: str, *words: str) -> str:
    """The one sentence on stderr, and no word elsewhere, of a script that ends with exit code 2."""
    out, error, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [str(ROOT / "scripts" / script), *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before
    assert end.value.code == 2
    assert out.getvalue() == ""
    assert re.fullmatch(r"error: [^\n]+\n", error.getvalue())
    return error.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier of digits that was trained for a moment, and photos of six of them, two of those on paper."""
    folder = tmp_path_factory.mktemp("classifier")
    with contextlib.chdir(folder):
        call("train_classifier.py", *TINY, "--trainer.steps", "40", "--run-dir", "run")
        images = data.load(data.DataConfig(name="digits")).test.images[:6, 0].numpy()
        for index, pixels in enumerate(images):
            Image.fromarray(pixels if index < 4 else 255 - pixels).save(f"{index}.png")
        Path("bad.png").write_text("no picture")
    return folder


@pytest.fixture(autouse=True)
def _inside(place: Path):
    with contextlib.chdir(place):
        yield


def pixels(path: str | Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path))


# Training


def test_a_run_leaves_its_pictures_and_scores_where_people_look() -> None:
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    previews = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in previews] == [20, 40]
    for row in previews:
        assert {"eval/nll", "eval/errors", "media/mistakes", "media/confusion"} <= set(row)
        for name in ("mistakes", "confusion"):
            assert pixels(Path("run") / row[f"media/{name}"]).std() > 5
    assert previews[-1]["eval/nll"] < previews[0]["eval/nll"]
    assert Path("run/media/curves.png").exists()


def test_a_run_can_begin_with_another_ones_weights_and_a_bare_flag_freezes_them() -> None:
    before = classifier.load("run").model
    call(
        "train_classifier.py", *TINY, "--init", "run", "--freeze", "--data.classes", "3", "8", "--trainer.steps", "3", "--run-dir", "frozen"
    )
    assert {"init: run", "freeze: true", "thaw_every: 0", "  classes: ['3', '8']"} <= set(
        Path("frozen/config.yaml").read_text().splitlines()
    )
    after = classifier.load("frozen").model
    assert after.classes == ("3", "8")
    for name, weight in after.body.state_dict().items():
        assert torch.equal(weight, before.body.state_dict()[name])
    kept = data.load(data.DataConfig(name="digits", classes=("3", "8"))).test
    assert f"digits test, {len(kept)} images;" in json.loads(call("evaluate.py", "frozen", "--json"))["protocol"]


BAD_TRAINING = [
    (["--init", "nowhere"], "nowhere: no classifier run here"),
    (["--init", "run", "--model.backbone", "nature"], "init run: its weights do not fit this network"),
    (["--init", "run", "--data.image-size", "20"], "images of its shape, 1 x 28 x 28"),
    (["--freeze"], "freeze: there is nothing to hold without init"),
    (["--init", "run", "--freeze", "maybe"], "'freeze': expected true or false, found 'maybe'"),
    (["--model.backbone", "resnet_smal"], "did you mean resnet_small"),
    (["--data.classes", "3", "x"], "data.classes: digits has no class x; it has 0, 1, 2"),
]


@pytest.mark.parametrize(("words", "expected"), BAD_TRAINING, ids=[" ".join(words) for words, _ in BAD_TRAINING])
def test_training_that_cannot_be_gets_one_sentence_and_no_folder(words: list[str], expected: str) -> None:
    before = sorted(Path().rglob("*"))
    assert expected in refused("train_classifier.py", *TINY, *words)
    assert sorted(Path().rglob("*")) == before


# Judging


@pytest.fixture(scope="module")
def direct(place: Path) -> Judgement:
    """What the model makes of the test set, computed in one piece."""
    test = data.load(data.DataConfig(name="digits")).test
    model = classifier.load(str(place / "run")).model
    return Judgement(model(test.images / 255).softmax(1), test.labels)


def test_evaluate_prints_the_scores_as_json_and_keeps_them_with_pictures(direct: Judgement) -> None:
    for name in ("confusion", "mistakes"):
        Path(f"run/media/{name}.png").unlink(missing_ok=True)
    scores = json.loads(call("evaluate.py", "run", "--json"))
    assert scores == json.loads(Path("run/evaluation.json").read_text())
    names = ["accuracy", "accuracy_low", "accuracy_high", "errors", "nll", "calibration_error"]
    assert list(scores) == ["run", "experiment", "step", "protocol", *names]
    assert (scores["run"], scores["experiment"], scores["step"]) == ("run", "classifier", 40)
    assert scores["protocol"] == "digits test, 359 images; 95 % interval by Wilson's formula"
    wrong = int((direct.probabilities.argmax(1) != direct.labels).sum())
    assert scores["errors"] == wrong
    assert scores["accuracy"] == pytest.approx(1 - wrong / 359)
    assert (scores["accuracy_low"], scores["accuracy_high"]) == pytest.approx(wilson(359 - wrong, 359))
    assert scores["nll"] == pytest.approx(float(F.nll_loss(direct.probabilities.log(), direct.labels)), rel=1e-5)
    assert scores["calibration_error"] == pytest.approx(direct.scores()["calibration_error"], rel=1e-3)
    for name in ("confusion", "mistakes"):
        assert pixels(f"run/media/{name}.png").std() > 5


def test_fewer_images_are_spread_over_the_test_set_and_the_table_says_so(direct: Judgement) -> None:
    printed = call("evaluate.py", "run", "--images", "50")
    assert "digits test, 50 images; 95 % interval" in printed
    chosen = torch.arange(50) * 359 // 50
    wrong = int((direct.probabilities[chosen].argmax(1) != direct.labels[chosen]).sum())
    assert re.search(rf"errors\W+{wrong}\b", printed)


def test_runs_of_classifiers_are_judged_one_by_one() -> None:
    assert "only if all are agents" in refused("evaluate.py", "run", "run")


# Classifying


def test_every_photo_gets_its_most_probable_classes_as_the_model_sees_it() -> None:
    loaded = classifier.load("run")
    lines = call("classify.py", "run", *[f"{index}.png" for index in range(6)], "--top", "2", "--json").splitlines()
    assert len(lines) == 6
    for index, line in enumerate(lines):
        found = json.loads(line)
        assert set(found) == {"photo", "classes", "inverted"}
        assert (found["photo"], found["inverted"]) == (f"{index}.png", index >= 4)
        seen = photo.read(Path(f"{index}.png"), (1, 28, 28), loaded.framing)
        best = loaded.model(seen.image[None])[0].softmax(0).sort(descending=True)
        assert list(found["classes"]) == [str(label) for label in best.indices[:2].tolist()]
        assert list(found["classes"].values()) == pytest.approx(best.values[:2].tolist(), rel=1e-4)


def test_more_classes_than_there_are_mean_all() -> None:
    shares = json.loads(call("classify.py", "run", "0.png", "--top", "99", "--json"))["classes"]
    assert sorted(shares) == list("0123456789")
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)


def test_in_words_a_photo_is_a_line_and_what_the_model_saw_is_drawn() -> None:
    *lines, last = call("classify.py", "run", "1.png", "5.png").splitlines()
    share = r"\d \d+\.\d %"
    assert re.fullmatch(rf"1\.png: {share}, {share}, {share}", lines[0])
    assert re.fullmatch(rf"5\.png: {share}, {share}, {share} \(brightness turned round\)", lines[1])
    assert last == "what the model saw: run/media/classified.png"
    drawn = pixels("run/media/classified.png")
    assert f"what the model saw: {Path('deep/er.png')}" in call("classify.py", "run", "1.png", "5.png", "--out", "deep/er.png")
    assert (pixels("deep/er.png") == drawn).all()


def test_whoever_knows_better_says_whether_to_turn_brightness_round() -> None:
    given = {word: json.loads(call("classify.py", "run", "5.png", "--invert", word, "--json")) for word in ("auto", "yes", "no")}
    assert given["auto"] == given["yes"]
    assert (given["yes"]["inverted"], given["no"]["inverted"]) == (True, False)
    assert given["no"]["classes"] != given["yes"]["classes"]


def test_a_photo_may_have_any_name() -> None:
    name = "$\\frac$ 50 % {x}^_.png"
    Path(name).write_bytes(Path("0.png").read_bytes())
    assert json.loads(call("classify.py", "run", name, "--json"))["photo"] == name


BAD_INPUT = [
    (["run"], "give a photo to look at, or several"),
    (["run", "0.png", "--top", "0"], "--top 0: name at least one class"),
    (["run", "0.png", "bad.png"], "bad.png: cannot be used as an image"),
    (["run", "nowhere.png"], "nowhere.png: cannot be used as an image"),
    (["run", "."], ".: cannot be used as an image"),
    (["run", "0.png", "--out", "x.bmp"], "--out x.bmp: pictures are written as .png"),
    (["nowhere", "0.png"], "nowhere: no classifier run here"),
]


@pytest.mark.parametrize(("words", "expected"), BAD_INPUT, ids=[" ".join(words) for words, _ in BAD_INPUT])
def test_bad_input_gets_one_sentence(words: list[str], expected: str) -> None:
    assert expected in refused("classify.py", *words)


# Sending


def test_sync_knows_classifiers() -> None:
    families = runpy.run_path(str(ROOT / "scripts/sync.py"))["FAMILIES"]
    settings = loading.settings_of(Run(Path("run")), families)
    assert isinstance(settings, classifier.ClassifierExperiment)
    assert settings.model.backbone == "small"
