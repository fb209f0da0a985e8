"""Classifiers: scores against their definitions; transfer, freezing and thawing weight by weight; resuming bit for bit."""

import contextlib
import dataclasses
import hashlib
import math
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.nn import functional as F

from lab import backbones, checkpoint, classifier, data, media
from lab.backbones.resnet import resnet_small
from lab.checkpoint import Checkpoint
from lab.classifier import (
    EXPERIMENT,
    Classifier,
    ClassifierConfig,
    ClassifierExperiment,
    ClassifierTask,
    Judgement,
    begin,
    calibration_error,
    wilson,
)
from lab.config import UserError
from lab.data import DataConfig, Split, photo
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.launch import launch
from lab.learner import Shard
from lab.optimizer import OptimizerConfig
from lab.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, CLASSES = (1, 8, 8), tuple("0123456789")
DIGITS = DataConfig(name="digits", image_size=8, batch_size=16)
Z = 1.959964


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Scores


@pytest.mark.parametrize(("successes", "count"), [(1, 3), (8, 10), (37, 120), (9_990, 10_000), (1, 100_000)])
def test_wilsons_interval_ends_at_the_roots_of_its_quadratic(successes, count):
    """(share - p)^2 = z^2 p (1 - p) / count."""
    share, spread = successes / count, Z * Z / count
    roots = sorted(numpy.roots([1 + spread, -(2 * share + spread), share * share]))
    assert wilson(successes, count) == pytest.approx(tuple(roots), rel=1e-9)


@pytest.mark.parametrize("count", [1, 10, 359, 10_000])
def test_wilsons_interval_of_none_and_of_all_stays_within_the_possible(count):
    (none_low, none_high), (all_low, all_high) = wilson(0, count), wilson(count, count)
    assert 0 <= none_low < 1e-12
    assert none_high == pytest.approx(Z * Z / (count + Z * Z))
    assert 1 - 1e-12 < all_high <= 1
    assert all_low == pytest.approx(count / (count + Z * Z))


def test_wilsons_interval_is_the_one_of_the_textbooks():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_the_calibration_error_of_a_small_example():
    confidence, right = torch.tensor([0.25, 0.375, 0.875, 0.75]), torch.tensor([True, False, True, False])
    # Two bins: |0.625 - 1| = 0.375 and |1.625 - 1| = 0.625, over four images.
    assert calibration_error(confidence, right, bins=2) == 0.25
    assert calibration_error(confidence, right, bins=1) == pytest.approx(abs(2.25 - 2) / 4)
    assert calibration_error(torch.ones(5), torch.ones(5, dtype=torch.bool)) == 0
    assert calibration_error(torch.ones(4), torch.tensor([True, False, False, False])) == 0.75


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_the_calibration_error_is_the_one_of_a_loop_over_half_open_bins(bins):
    edges = torch.tensor([0.25, 0.5, 0.75, 1.0])  # belong to the bin below them, as in the paper
    confidence = torch.cat([uniform(500), edges, edges])
    right = uniform(508, seed=1) < confidence * 0.8
    total = 0.0
    for index in range(bins):
        inside = [place for place, value in enumerate(confidence.tolist()) if index / bins < value <= (index + 1) / bins]
        gap = sum(float(right[place]) - confidence[place].item() for place in inside)
        total += abs(gap)
    assert calibration_error(confidence, right, bins) == pytest.approx(total / 508, rel=1e-9)


def judgement(count: int = 300, classes: int = 7) -> Judgement:
    """Labels that are right a little more often than by chance, and pairs of images with the very same probabilities."""
    labels = torch.arange(count) % classes
    probabilities = (normal(count, classes) + F.one_hot(labels, classes)).softmax(1)
    probabilities[1::10] = probabilities[::10]
    return Judgement(probabilities, labels)


def test_the_confusion_matrix_is_scikit_learns():
    result = judgement()
    expected = confusion_matrix(result.labels, result.probabilities.argmax(1), labels=range(7))
    assert result.confusion.tolist() == expected.tolist()
    alone = Judgement(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64))
    assert alone.confusion.tolist() == [[4]]


def test_a_class_that_never_occurs_has_its_row_and_column():
    result = Judgement(torch.eye(4)[[0, 0, 1]], torch.tensor([0, 1, 1]))
    assert result.confusion.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_mistakes_come_the_surest_first_and_equal_ones_in_their_order():
    result = judgement()
    rows = result.probabilities.tolist()
    guesses = [row.index(max(row)) for row in rows]
    wrong = [index for index, label in enumerate(result.labels.tolist()) if guesses[index] != label]
    expected = sorted(wrong, key=lambda index: (-max(rows[index]), index))
    assert result.wrong.tolist() == expected
    assert 50 < len(expected) < 250
    assert not Judgement(torch.eye(3), torch.arange(3)).wrong.numel()


def test_scores_are_their_definitions():
    result = judgement()
    scores, errors = result.scores(), len(result.wrong)
    chosen = [row[label] for row, label in zip(result.probabilities.tolist(), result.labels.tolist(), strict=True)]
    assert scores["errors"] == errors
    assert scores["accuracy"] == pytest.approx((result.predicted == result.labels).double().mean().item())
    assert (scores["accuracy_low"], scores["accuracy_high"]) == wilson(300 - errors, 300)
    assert scores["nll"] == pytest.approx(-sum(map(math.log, chosen)) / 300, rel=1e-6)
    sure, right = result.probabilities.max(1).values, result.predicted == result.labels
    assert scores["calibration_error"] == calibration_error(sure, right)
    assert 0 < scores["calibration_error"] < 1


def test_a_label_held_for_impossible_costs_much_but_not_everything():
    scores = Judgement(torch.eye(2), torch.tensor([0, 0])).scores()
    assert scores["nll"] == pytest.approx(-math.log(1e-12) / 2)
    assert scores["accuracy"] == 0.5


# The network


def model(backbone: str = "small", shape: tuple[int, int, int] = SHAPE, classes: tuple[str, ...] = CLASSES, **changes) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(backbone=backbone, **changes), shape, classes)


@pytest.mark.parametrize("backbone", ["small", "resnet_small"])
def test_bytes_and_numbers_get_the_same_logits(backbone):
    net, images = model(backbone), (255 * uniform(6, *SHAPE)).byte()
    from_bytes, from_numbers = net(images), net(images / 255)
    assert from_bytes.dtype == torch.float32
    assert from_bytes.shape == (6, 10)
    torch.testing.assert_close(from_bytes, from_numbers, rtol=1e-5, atol=1e-5)
    assert from_numbers.std(0).min() > 1e-4  # which do depend on the image


def test_logits_are_float32_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16):
        assert model()(uniform(2, *SHAPE)).dtype == torch.float32


def test_probabilities_are_those_of_the_logits_however_many_images_there_are(monkeypatch):
    net, images = model().eval(), uniform(23, *SHAPE)
    whole = net(images).softmax(1)
    monkeypatch.setattr(classifier, "ROWS", 5)
    torch.testing.assert_close(net.probabilities(images), whole)
    split = Split((255 * images).byte(), torch.arange(23) % 10)
    result = classifier.judge(net, split)
    torch.testing.assert_close(result.probabilities, net(split.images / 255).softmax(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(result.labels, split.labels)
    assert not result.probabilities.requires_grad


def test_dropout_hides_a_share_of_the_vector_from_the_last_layer_while_training_alone():
    net = model(dropout=0.25)
    net.head = nn.Identity()
    images = uniform(200, *SHAPE)
    whole = net.eval()(images)
    torch.manual_seed(1)
    seen = net.train()(images)
    kept = seen != 0
    assert torch.equal(whole, net.body(images))
    assert float(kept[whole != 0].double().mean()) == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(seen[kept], (whole / 0.75)[kept])


# The loss


def experiment(**changes) -> ClassifierExperiment:
    """A small classifier of digits; `changes` replace whole settings."""
    plain = {
        "data": DIGITS,
        "model": ClassifierConfig(backbone="small"),
        "trainer": TrainerConfig(steps=20),
        "optimizer": OptimizerConfig(lr=1e-2, weight_decay=0.5, ema=0.9),
    }
    return ClassifierExperiment(**(plain | changes))


def task(**changes) -> ClassifierTask:
    return Trainer(experiment(**changes), World()).task


def test_the_loss_is_the_cross_entropy_with_the_smoothed_label_written_out():
    shard = Shard(0, 16, 16, 0, 3, torch.device("cpu"))
    losses = []
    for smoothing in (0.0, 0.3):
        one = task(model=ClassifierConfig(backbone="small", label_smoothing=smoothing))
        loss, metrics = one.loss(shard)
        images, labels = one.batch(shard)
        log_probabilities = one.model(images).log_softmax(1)
        target = (1 - smoothing) * F.one_hot(labels, 10) + smoothing / 10
        torch.testing.assert_close(loss, -(target * log_probabilities).sum(1).mean())
        right = sum(int(row.argmax()) == label for row, label in zip(log_probabilities, labels.tolist(), strict=True))
        assert float(metrics["accuracy"]) == right / 16
        losses.append(loss.item())
    assert losses[0] != losses[1]


def test_the_preview_has_the_scores_of_the_average():
    one = task()
    for weight in one.learner.ema.module.head.parameters():
        nn.init.zeros_(weight)
    row = one.preview(Trainer(experiment(), World()))
    assert row == {"eval/accuracy": pytest.approx(row["eval/accuracy"]), "eval/errors": row["eval/errors"], "eval/nll": row["eval/nll"]}
    assert row["eval/nll"] == pytest.approx(math.log(10), abs=1e-6)
    zeros = int((one.data.test.labels == 0).sum())
    assert row["eval/errors"] == len(one.data.test) - zeros


# Transfer


def saved(net: Classifier, average: Classifier | None = None) -> Checkpoint:
    """A checkpoint of a classifier."""
    parts = {"model": net.state_dict()} | ({"ema": {"module": average.state_dict(), "updates": 9}} if average else {})
    return Checkpoint(9, {"facts": {"shape": list(net.shape), "classes": list(net.classes)}}, parts)


def other(seed: int = 5, **changes) -> Classifier:
    """A classifier whose every weight and running statistic differs from those of `model`."""
    net = model(**changes)
    generator = torch.Generator().manual_seed(seed)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand(value.shape, generator=generator).mul_(0.1).add_(0.01))
    return net


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules are equal bit for bit, in weights and buffers."""
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_all_weights_are_taken_where_the_classes_are_the_same_and_the_averaged_ones_where_there_are_some():
    plain, average = other(), other(seed=6)
    for source, expected in ((saved(plain), plain), (saved(plain, average), average)):
        fresh = model()
        begin(fresh, source, "x")
        assert same(fresh, expected)


@pytest.mark.parametrize("classes", [("a", "b", "c"), tuple("1234567890"), tuple("abcdefghij")])
def test_the_last_layer_is_taken_only_where_the_classes_have_the_same_names_in_the_same_order(classes):
    fresh, untouched, source = model(classes=classes), model(classes=classes), other()
    begin(fresh, saved(source), "x")
    assert same(fresh.body, source.body)
    assert same(fresh.head, untouched.head)


@pytest.mark.parametrize("changes", [{"shape": (3, 8, 8)}, {"shape": (1, 10, 10)}, {"backbone": "resnet_small"}])
@pytest.mark.parametrize("classes", [CLASSES, ("a", "b")])
def test_weights_of_another_network_are_refused_and_nothing_is_touched(changes, classes):
    fresh, untouched, source = model(classes=classes), model(classes=classes), other(**changes)
    channels, height, width = source.shape
    with pytest.raises(UserError, match=rf"^init there: its weights do not fit .* {channels} x {height} x {width}$"):
        begin(fresh, saved(source), "there")
    assert same(fresh, untouched)


def test_a_network_that_has_more_weights_is_another_one_too():
    source = saved(other())
    source.parts["model"]["body.table"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"do not fit this network \(first at body.table\)"):
        begin(model(), source, "x")


SHORT = """
    --data.name digits --data.image-size 8 --data.batch-size 16 --model.backbone small --model.dropout 0.1 --optimizer.schedule constant
    --optimizer.warmup-steps 0 --optimizer.lr 1e-2 --optimizer.ema 0.9 --trainer.log-every 3 --trainer.save-every 3 --trainer.threads 1
    --trainer.precision fp32 --tracking.mode disabled
""".split()  # noqa: SIM905


@contextlib.contextmanager
def without_pictures():
    """Previews and curves take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifierTask, "preview", lambda self, trainer: {})
        patch.setattr(media, "plot_rows", lambda *_: None)
        yield


def train(folder: Path, *words: str, expect: int = 0) -> None:
    """Train as the script does, from inside a folder."""
    with contextlib.chdir(folder), without_pictures():
        assert launch(EXPERIMENT, "", [*SHORT, *words]) == expect


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, whose checkpoints of the steps 3 and 6 differ."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, "--trainer.steps", "6", "--run-dir", "run")
    return folder / "run"


def test_a_run_begins_with_the_average_of_the_one_it_names_and_so_does_its_own_average(trained: Path):
    average = classifier.load(str(trained)).model
    one = task(init=str(trained))
    assert same(one.model, average)
    assert same(one.learner.ema.module, average)
    plain = checkpoint.load_newest(trained / "checkpoints").parts["model"]
    assert not torch.equal(plain["head.weight"], average.head.weight)
    narrow = task(init=str(trained), data=dataclasses.replace(DIGITS, classes=("3", "5")))
    assert same(narrow.model.body, average.body)
    assert narrow.model.head.weight.shape[0] == 2


def test_a_checkpoint_of_a_run_can_be_named(trained: Path):
    older = str(trained / "checkpoints/step_000000003")
    assert same(task(init=older).model, classifier.load(older).model)
    assert not same(task(init=older).model, task(init=str(trained)).model)


def test_what_is_loaded_is_ready_to_judge(trained: Path):
    loaded = classifier.load(str(trained))
    assert (loaded.step, loaded.run.folder) == (6, trained)
    assert (loaded.model.shape, loaded.model.classes) == (SHAPE, CLASSES)
    assert loaded.framing == photo.framing(data.load(DIGITS).train)
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


def pretend(folder: Path, kind: str) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"experiment: {kind}\n")


MISFITS = [
    (["--init", "run", "--model.backbone", "resnet_small"], "init run: its weights do not fit this network"),
    (["--init", "run", "--data.image-size", "10"], "images of its shape, 1 x 8 x 8"),
    (["--init", "nowhere"], "nowhere: no classifier run here"),
    (["--init", "vae"], "vae: a run of 'vae'; expected classifier"),
    (["--init", "unborn"], "unborn has no whole checkpoint yet"),
    (["--init", "run/checkpoints/step_000000099"], "no classifier run here"),
    (["--freeze"], "freeze: there is nothing to hold without init"),
    (["--init", "run", "--thaw-every", "3"], "thaw_every: nothing is frozen; set freeze too"),
]


@pytest.mark.parametrize(("words", "expected"), MISFITS, ids=[" ".join(words) for words, _ in MISFITS])
def test_an_init_that_cannot_be_gets_one_sentence_and_leaves_no_run_behind(words, expected, trained: Path, tmp_path: Path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    pretend(tmp_path / "vae", "vae")
    pretend(tmp_path / "unborn", "classifier")
    before = sorted(tmp_path.rglob("*"))
    for place in ([], ["--run-dir", "new"]):
        train(tmp_path, *words, *place, expect=2)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert expected in printed.err
    assert sorted(tmp_path.rglob("*")) == before


# Freezing


def parts_of(net: Classifier) -> list[nn.Module]:
    """What learns, from the input to the output."""
    return [*(part for part in net.body.sequence if list(part.parameters())), net.head]


def watched(trainer: Trainer) -> list[list[int]]:
    """Train to the end; the numbers of the parts whose weights changed, step by step."""
    moved, step, parts = [], trainer.task.step, parts_of(trainer.task.model)

    def watching(inner: Trainer):
        before = [[weight.detach().clone() for weight in part.parameters()] for part in parts]
        metrics = step(inner)
        pairs = [zip(old, part.parameters(), strict=True) for old, part in zip(before, parts, strict=True)]
        moved.append([index for index, pair in enumerate(pairs) if any(not torch.equal(old, new) for old, new in pair)])
        return metrics

    trainer.task.step = watching
    trainer.fit()
    return moved


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch):
    """A trainer that begins with given weights, frozen."""

    def make(net: Classifier, **changes) -> Trainer:
        monkeypatch.setattr(classifier, "source", lambda init: saved(net))
        return Trainer(experiment(init="x", freeze=True, **changes), World())

    return make


def test_frozen_weights_rest_bit_for_bit_while_the_head_moves(begun):
    source = other()
    trainer = begun(source)
    assert watched(trainer) == [[3]] * 20
    one = trainer.task
    assert same(one.model.body, source.body)
    assert same(one.learner.ema.module.body, source.body)
    assert not torch.equal(one.model.head.weight, source.head.weight)
    assert not torch.equal(one.learner.ema.module.head.weight, source.head.weight)


def batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "create", lambda name, channels, size: resnet_small(channels, size, norm="batch"))


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_running_statistics_of_frozen_parts_rest_too(average, begun, monkeypatch):
    batch_norm(monkeypatch)
    source, changes = other(backbone="resnet_small"), {"trainer": TrainerConfig(steps=3), "optimizer": OptimizerConfig(ema=average)}
    assert any("running_var" in name for name in source.state_dict())
    frozen = begun(source, model=ClassifierConfig(backbone="resnet_small"), **changes)
    frozen.fit()
    assert same(frozen.task.model.body, source.body)
    with frozen.task.learner.judged() as judged:
        assert same(judged.body, source.body)
    free = Trainer(experiment(init="x", model=ClassifierConfig(backbone="resnet_small"), **changes), World())
    free.fit()
    mine, theirs = free.task.model.body.state_dict(), source.body.state_dict()
    assert all(not torch.equal(mine[name], theirs[name]) for name in mine if "running" in name)


def test_running_statistics_move_once_their_part_is_thawed(begun, monkeypatch):
    batch_norm(monkeypatch)
    source, small = other(backbone="resnet_small"), ClassifierConfig(backbone="resnet_small")
    trainer = begun(source, model=small, thaw_every=2, trainer=TrainerConfig(steps=4))
    trainer.fit()
    first, last = parts_of(source)[:-1], parts_of(trainer.task.model)[:-1]
    assert [same(*pair) for pair in zip(first, last, strict=True)] == [True] * (len(first) - 1) + [False]
    mine, theirs = last[-1].state_dict(), first[-1].state_dict()
    assert all(not torch.equal(mine[name], theirs[name]) for name in mine if "running" in name)


def test_parts_thaw_one_by_one_from_the_last_to_the_first(begun):
    moved = watched(begun(other(), thaw_every=3, trainer=TrainerConfig(steps=14)))
    assert moved == [[3]] * 3 + [[2, 3]] * 3 + [[1, 2, 3]] * 3 + [[0, 1, 2, 3]] * 5


def test_a_part_without_weights_takes_no_turn_in_thawing(begun):
    """The mean over all places, which ends a residual network."""
    source = other(backbone="resnet_small")
    count = len(parts_of(source)) - 1
    assert count < len(source.body.sequence)
    changes = {"model": ClassifierConfig(backbone="resnet_small"), "trainer": TrainerConfig(steps=count + 2)}
    moved = watched(begun(source, thaw_every=1, **changes))
    assert moved == [list(range(max(0, count - step), count + 1)) for step in range(count + 2)]


def test_held_parts_are_in_evaluation_mode_also_after_a_preview(begun):
    trainer = begun(other(), thaw_every=2, optimizer=OptimizerConfig(), trainer=TrainerConfig(steps=3))
    trainer.fit()
    with trainer.task.learner.judged():
        pass
    assert all(part.training for part in parts_of(trainer.task.model))  # as if nothing were held
    trainer.step = 0
    trainer.task.step(trainer)
    assert [part.training for part in parts_of(trainer.task.model)] == [False, False, False, True]
    trainer.step = 2
    trainer.task.step(trainer)
    assert [part.training for part in parts_of(trainer.task.model)] == [False, False, True, True]


def test_what_is_thawed_can_be_frozen_again():
    one = Trainer(experiment(), World())
    learner, parts = one.task.learner, parts_of(one.task.model)
    one.freeze(learner, parts[:2])
    assert [weight.requires_grad for weight in learner.weights] == [False] * 4 + [True] * 4
    one.freeze(learner, [])
    assert all(weight.requires_grad for weight in learner.weights)
    assert learner.module.training


def test_freezing_needs_something_to_hold_and_thawing_something_frozen():
    with pytest.raises(ValueError, match="freeze: there is nothing to hold without init"):
        ClassifierExperiment(freeze=True)
    with pytest.raises(ValueError, match="thaw_every: nothing is frozen; set freeze too"):
        ClassifierExperiment(init="x", thaw_every=5)
    assert ClassifierExperiment(init="x", freeze=True, thaw_every=5).thaw_every == 5


# Going on


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of the metrics and of every file of the last checkpoint but its manifest."""
    last = max((run / "checkpoints").glob("step_*"))
    files = [run / "metrics.jsonl", *(path for path in sorted(last.iterdir()) if path.name != "manifest.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} | {"last": last.name}


WAYS = {
    "plain": ["--data.augment.shift", "1"],
    "init": ["--init", "first"],
    "freeze": ["--init", "first", "--freeze"],
    "thaw": ["--init", "first", "--freeze", "--thaw-every", "4", "--data.classes", "2", "3", "5", "7"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_exactly_also_while_parts_thaw_and_after_the_run_it_began_with_is_gone(way, trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "first")
    train(tmp_path, *WAYS[way], "--trainer.steps", "15", "--run-dir", "whole")
    train(tmp_path, *WAYS[way], "--trainer.steps", "6", "--run-dir", "run")
    shutil.rmtree(tmp_path / "first")
    with contextlib.chdir(tmp_path), without_pictures():
        assert launch(EXPERIMENT, "", ["--resume", "run", "--trainer.steps", "9"]) == 0  # with 1 of 3 parts thawed, or 2
        assert launch(EXPERIMENT, "", ["--resume", "run", "--trainer.steps", "15"]) == 0
    found, expected = fingerprint(tmp_path / "run"), fingerprint(tmp_path / "whole")
    assert found == expected
    assert found["last"] == "step_000000015"


def test_a_run_that_has_no_checkpoint_yet_needs_the_run_it_begins_with(trained: Path, tmp_path: Path, capsys):
    shutil.copytree(trained, tmp_path / "first")
    train(tmp_path, "--init", "first", "--trainer.steps", "6", "--run-dir", "whole")
    train(tmp_path, "--init", "first", "--trainer.steps", "6", "--run-dir", "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with contextlib.chdir(tmp_path), without_pictures():
        assert launch(EXPERIMENT, "", ["--resume", "run"]) == 0
        assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
        shutil.rmtree(tmp_path / "run/checkpoints")
        shutil.rmtree(tmp_path / "first")
        capsys.readouterr()
        assert launch(EXPERIMENT, "", ["--resume", "run"]) == 2
    assert "first: no classifier run here" in capsys.readouterr().err


# Pictures


def blue(picture: torch.Tensor) -> torch.Tensor:
    """Where a picture is of the darkest blue of the shares, bool (H, W)."""
    return ((picture - torch.tensor([8, 48, 107])[:, None, None] / 255).abs() < 0.02).all(0)


def test_the_confusion_matrix_is_drawn_with_true_classes_as_rows_and_shares_as_colours():
    labels = torch.tensor([0] * 5 + [1] * 50 + [2])
    guesses = torch.tensor([1] * 5 + [2] * 50 + [0])
    result = Judgement(F.one_hot(guesses, 3).float(), labels)
    picture = classifier.confusion(result, ("a", "b", "c"))
    assert picture.shape[0] == 3
    assert 0 <= picture.min() < picture.max() <= 1
    full = blue(picture)
    (top, left), (bottom, right) = full.nonzero().amin(0), full.nonzero().amax(0) + 1
    shares = F.adaptive_avg_pool2d(full[None, top:bottom, left:right].double(), 3)[0]
    assert shares.gt(0.5).tolist() == [[False, True, False], [False, False, True], [True, False, False]]
    assert shares[shares < 0.5].max() < 0.05


def test_every_image_is_drawn_below_its_caption():
    shades = torch.tensor([51, 102, 153, 204, 230, 77, 26])
    images = (shades / 255).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    picture = media.captioned(images, [f"{shade}" for shade in shades.tolist()])
    counts = (picture[0] * 255).round().long().flatten().bincount(minlength=256)
    assert counts[shades].min() > 1000
    assert (picture[0] == picture[2]).all()
    coloured = media.captioned(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4), ["red"])
    assert int(((coloured[0] == 1) & (coloured[1] == 0)).sum()) > 1000


def test_the_surest_mistakes_are_drawn_with_what_they_are_and_were_taken_for(monkeypatch):
    result, drawn = judgement(), []
    split = Split((torch.arange(300) % 256).byte().view(300, 1, 1, 1).expand(300, 1, 4, 4), result.labels)
    monkeypatch.setattr(media, "captioned", lambda images, captions: drawn.append((images, list(captions))))
    classifier.mistakes(result, split, "abcdefg", count=7)
    ((images, captions),) = drawn
    chosen = result.wrong[:7].tolist()
    assert (images[:, 0, 0, 0] * 255).round().long().tolist() == [index % 256 for index in chosen]
    for index, caption in zip(chosen, captions, strict=True):
        row = result.probabilities[index]
        assert caption == f"{'abcdefg'[index % 7]} → {'abcdefg'[row.argmax()]} {100 * float(row.max()):.0f} %"


def test_pictures_can_be_drawn_without_a_mistake_and_of_any_names():
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    clean = classifier.mistakes(Judgement(torch.eye(3), torch.arange(3)), Split(images, torch.arange(3)), "abc")
    assert clean.shape[0] == 3
    names = ("$\\frac$", "$10", "a_b^c$d$")
    mistaken = Judgement(torch.eye(3)[[1, 2, 0]], torch.arange(3))
    assert classifier.mistakes(mistaken, Split(images, torch.arange(3)), names).shape[0] == 3
    assert classifier.confusion(mistaken, names).shape[0] == 3


def test_a_set_without_test_images_is_refused(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "only.png")
    alone = DataConfig(name="folder", root=str(tmp_path), image_size=8)
    with pytest.raises(UserError, match="no image is left for testing; every class needs two"):
        Trainer(dataclasses.replace(EXPERIMENT, data=alone, model=ClassifierConfig(backbone="small")), World())
