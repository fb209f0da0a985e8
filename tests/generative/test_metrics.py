"""Distances between sets of images against closed forms and loops; the frozen features; what the ladder must tell."""

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from generative import metrics
from generative.metrics import Cloud, Features, Reference
from generative.model import EvaluationConfig, Generator, SamplingConfig
from lab import data
from lab.config import UserError
from lab.data import DataConfig, ImageSet, Split, as_float

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = sorted(metrics.SHIPPED.glob("*.safetensors"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is remembered from elsewhere."""
    monkeypatch.setenv("DREAMPLAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "metrics"


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return data.load(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def features(digits: ImageSet) -> Features:
    found = metrics.find_features(digits)
    assert found
    return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spd(size: int, seed: int) -> torch.Tensor:
    half = normal(size, size + 2, seed=seed).double()
    return half @ half.T


# The Fréchet distance


def test_the_frechet_distance_of_numbers_is_that_of_means_and_of_deviations() -> None:
    one, other = torch.tensor([1.0]), torch.tensor([4.0])
    assert metrics.frechet_distance(one, torch.tensor([[9.0]]), other, torch.tensor([[4.0]])) == pytest.approx(3**2 + (3 - 2) ** 2)


def test_the_frechet_distance_under_equal_covariance_is_that_of_the_means() -> None:
    covariance, mean = spd(5, 1), normal(5).double()
    assert metrics.frechet_distance(mean, covariance, mean + 2, covariance) == pytest.approx(5 * 4)
    assert metrics.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_covariances_that_commute_is_that_of_their_roots() -> None:
    axes = torch.linalg.qr(normal(4, 4).double())[0]
    first, second = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 1.0, 0.0, 2.0]).double()
    expected = float((first.sqrt() - second.sqrt()).square().sum())
    one, other = ((axes * values) @ axes.T for values in (first, second))
    zero = torch.zeros(4)
    assert metrics.frechet_distance(zero, one, zero, other) == pytest.approx(expected, abs=1e-6)


def test_the_frechet_distance_is_that_of_the_root_of_the_product() -> None:
    one, other, shift = spd(6, 2), spd(6, 3), normal(6, seed=4).double()
    values, vectors = torch.linalg.eig(one @ other)
    root = vectors @ torch.diag(values.sqrt()) @ torch.linalg.inv(vectors)
    torch.testing.assert_close((root @ root).real, one @ other)
    expected = float(shift.square().sum() + (one + other - 2 * root.real).trace())
    assert metrics.frechet_distance(shift, one, torch.zeros(6), other) == pytest.approx(expected)
    assert metrics.frechet_distance(torch.zeros(6), other, shift, one) == pytest.approx(expected)


def test_mean_and_covariance_are_those_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    vectors = normal(50, 4)
    cloud = Cloud(vectors)
    assert cloud.mean.tolist() == pytest.approx(vectors.double().mean(0).tolist())
    assert numpy.allclose(cloud.covariance.numpy(), numpy.cov(vectors.double().numpy(), rowvar=False))


# The kernel distance


def kernel_loop(x: torch.Tensor, y: torch.Tensor) -> float:
    """Gretton et al. 2012, equation 3, pair by pair."""

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [k(a, b) for a in x for b in y]
    return sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)


def test_the_kernel_distance_is_that_of_a_loop_over_pairs() -> None:
    x, y = normal(17, 3), normal(11, 3, seed=1) + 0.5
    assert metrics.kernel_distance(Cloud(x), Cloud(y)) == pytest.approx(kernel_loop(x, y))


def test_the_kernel_distance_does_not_depend_on_how_pairs_are_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(40, 3), normal(30, 3, seed=1)
    whole = metrics.kernel_distance(Cloud(x), Cloud(y))
    monkeypatch.setattr(metrics, "ROWS", 7)
    assert metrics.kernel_distance(Cloud(x), Cloud(y)) == pytest.approx(whole)


def test_the_kernel_distance_of_alike_sets_is_zero_on_average() -> None:
    values = [metrics.kernel_distance(Cloud(normal(30, 4, seed=2 * n)), Cloud(normal(30, 4, seed=2 * n + 1))) for n in range(300)]
    mean, spread = torch.tensor(values).mean(), torch.tensor(values).std()
    assert abs(float(mean)) < 4 * float(spread) / math.sqrt(300)
    assert min(values) < 0 < max(values)


# Precision, recall, density, coverage


def neighbours_loop(samples: torch.Tensor, real: torch.Tensor, k: int) -> dict[str, float]:
    """The four by their definitions, point by point."""

    def far(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b.double()).norm())

    def radius(points: torch.Tensor, i: int) -> float:
        return sorted(far(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    real_radius, sample_radius = ([radius(points, i) for i in range(len(points))] for points in (real, samples))
    inside = [[far(s, r) <= real_radius[i] for i, r in enumerate(real)] for s in samples]
    return {
        "precision": sum(any(row) for row in inside) / len(samples),
        "recall": sum(any(far(s, r) <= sample_radius[j] for j, s in enumerate(samples)) for r in real) / len(real),
        "density": sum(sum(row) for row in inside) / (k * len(samples)),
        "coverage": sum(any(row[i] for row in inside) for i in range(len(real))) / len(real),
    }


@pytest.mark.parametrize("rows", [500, 7])
def test_precision_recall_density_and_coverage_are_those_of_loops(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ROWS", rows)
    samples, real = 0.5 * normal(40, 2) + 0.4, normal(30, 2, seed=1)
    found = metrics.neighbour_scores(Cloud(samples), Cloud(real))
    assert found == pytest.approx(neighbours_loop(samples, real, metrics.NEIGHBOURS))
    assert len({round(value, 3) for value in found.values()}) == 4  # none of them stands for another


def test_scores_by_neighbours_take_equally_many_of_both() -> None:
    real = Cloud(normal(60, 3))
    few, many = Cloud(normal(60, 3, seed=1)), Cloud(normal(3000, 3, seed=1))
    assert metrics.compare(many, real)["coverage"] < 1
    assert metrics.compare(many, real)["recall"] == pytest.approx(metrics.compare(few, real)["recall"], abs=0.15)
    part = many.part(60)
    assert len(part) == 60
    assert torch.equal(part.vectors, many.part(60).vectors)
    assert many.part(3000) is many
    assert metrics.compare(many, real)["density"] == metrics.neighbour_scores(part, real)["density"]


def test_a_part_of_labels_in_turn_has_all_of_them() -> None:
    cloud = Cloud((torch.arange(10_000) % 10).float()[:, None])
    assert cloud.part(1000).vectors.flatten().int().bincount(minlength=10).min() > 60


# Shares of classes


def test_rare_classes_have_less_than_0_4_of_an_even_share() -> None:
    predicted = torch.tensor([0] * 39 + [1] * 40 + [2] * 921)
    assert metrics.class_shares(torch.cat([predicted, torch.full((0,), 3)]), 10) == {"smallest_class_share": 0.0, "rare_classes": 8}
    every = torch.arange(1000) % 10
    assert metrics.class_shares(every, 10) == {"smallest_class_share": 0.1, "rare_classes": 0}
    every[every == 3] = torch.tensor([3] * 39 + [4] * 61)
    assert metrics.class_shares(every, 10) == {"smallest_class_share": 0.039, "rare_classes": 1}


def test_images_of_no_class_of_the_set_count_for_none() -> None:
    assert metrics.class_shares(torch.tensor([0, 1, 2, 2]), 2) == {"smallest_class_share": 0.25, "rare_classes": 0}


# Memorisation


def test_the_nearest_image_is_that_of_a_loop() -> None:
    images = (torch.rand(60, 1, 5, 5, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    queries, pool = images[:20], images[20:]
    distances, places = metrics.nearest(queries, pool)
    for query, distance, place in zip(as_float(queries), distances, places):
        far = [float((query - other).norm()) for other in as_float(pool)]
        assert int(place) == far.index(min(far))
        assert float(distance) == pytest.approx(min(far), rel=1e-5)
    assert metrics.nearest(pool[[3, 5]], pool)[0].tolist() == [0, 0]


def test_one_of_a_hundred_held_out_images_counts_as_memorised(digits: ImageSet) -> None:
    distances, _ = metrics.nearest(digits.test.images, digits.train.images)
    assert float((distances <= metrics.held_out_distance(digits)).double().mean()) == pytest.approx(0.01, abs=2 / len(distances))


# The frozen features


def test_there_are_features_of_three_sets() -> None:
    assert [path.stem for path in FILES] == ["asl_photos", "digits", "mnist"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_features_is_small_and_says_what_it_is(path: Path) -> None:
    content = path.read_bytes()
    features = Features(content)
    assert len(content) < 1_000_000
    assert features.name == f"{path.stem}-{hashlib.sha256(content).hexdigest()[:8]}"
    assert {weight.dtype for weight in features.model.state_dict().values()} == {torch.float32}
    words = features.facts["command"].split()
    assert words[:2] == ["python", "scripts/train_classifier.py"]
    assert Path(__file__).resolve().parents[2].joinpath(words[2]).is_file()
    assert not [word for word in words if word.startswith(("/", "~", "--run-dir", "--tracking", "--data.root"))]
    assert features.facts["test_accuracy"] > 0.985


def test_the_accuracy_in_the_file_is_what_its_test_images_give(digits: ImageSet, features: Features) -> None:
    vectors = features.vectors(digits.test.images)
    right = features.probabilities(vectors).argmax(1) == digits.test.labels
    assert float(right.double().mean()) == pytest.approx(features.facts["test_accuracy"])
    assert features.facts["test_images"] == len(digits.test)


def test_features_are_what_goes_into_the_last_layer_on_the_scale_of_real_images(digits: ImageSet, features: Features) -> None:
    train = features.vectors(digits.train.images)
    assert float(train.double().square().mean().sqrt()) == pytest.approx(1, rel=1e-6)
    caught = []
    handle = features.model.head.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
    logits = features.model(as_float(digits.test.images[:50]))
    handle.remove()
    vectors = features.vectors(digits.test.images[:50])
    torch.testing.assert_close(vectors, caught[0] / features.scale)
    torch.testing.assert_close(features.probabilities(vectors), logits.softmax(1))


def test_images_are_seen_as_they_would_be_saved(digits: ImageSet, features: Features) -> None:
    images = digits.test.images[:20]
    outside = as_float(images) + 0.4 / 255
    outside[images == 0] = -0.7
    outside[images == 255] = 1.9
    assert torch.equal(features.vectors(outside), features.vectors(images))
    assert not torch.equal(features.vectors(images // 4 * 4), features.vectors(images))


def test_a_set_without_features_has_none_and_unfit_ones_are_told_why(digits: ImageSet, features: Features) -> None:
    other = ImageSet("asl", digits.classes, digits.train, digits.test)
    small = data.load(DataConfig(name="digits", image_size=8))
    few = ImageSet("digits", digits.classes, digits.train, digits.test.spread(10))
    strange = ImageSet("digits", (*digits.classes[:9], "ten"), digits.train, digits.test)
    assert [metrics.find_features(one) for one in (other, small, few, strange)] == [None] * 4
    assert "see images of 1 x 28 x 28, not of 1 x 8 x 8" in features.misfit(small)
    assert "do not know the class ten" in features.misfit(strange)
    assert "fewer than 20 test images" in features.misfit(few)


def test_some_classes_of_a_set_are_judged_by_their_own_numbers(digits: ImageSet, features: Features) -> None:
    some = digits.only(["3", "7", "8"])
    real = Reference(some, features, 10_000)
    predicted = real.predicted(real.test)
    assert float((predicted == some.test.labels).double().mean()) > 0.97
    strangers = Cloud(features.vectors(digits.only(["0"]).test.images))
    assert float((real.predicted(strangers) == 3).double().mean()) > 0.97


def test_a_command_is_told_without_places() -> None:
    command = (
        "python scripts/train_classifier.py a.yaml --tracking.mode disabled --optimizer.lr 4e-3 --run-dir /here/it --data.root=/there\n"
    )
    assert metrics.portable(command) == "python scripts/train_classifier.py a.yaml --optimizer.lr 4e-3"


# The ladder


def ranked(ladder: dict[str, dict[str, float]], score: str, *rungs: str) -> bool:
    values = [ladder[rung][score] for rung in rungs]
    return values == sorted(values) and len(set(values)) == len(values)


def check_ladder(ladder: dict[str, dict[str, float]]) -> None:
    """What every set's ladder must show."""
    for score in ("frechet_test", "kernel_test"):
        for kind in (("blur 1", "blur 2"), ("noise 0.1", "noise 0.2"), ("a class missing", "half missing")):
            assert ranked(ladder, score, "floor", *kind), (score, kind)
    for score in ("density_test", "coverage_test"):
        assert ranked(ladder, score, "blur 2", "blur 1", "floor")
        assert ranked(ladder, score, "noise 0.2", "noise 0.1", "floor")
    for score in ("recall_test", "coverage_test"):
        assert ranked(ladder, score, "half missing", "a class missing", "floor")
    assert ladder["half missing"]["precision_test"] > 0.93
    assert [ladder[rung]["rare_classes"] for rung in ("floor", "a class missing", "half missing")] == [0, 1, 5]


def test_the_ladder_ranks_damages_of_digits(digits: ImageSet, features: Features, cache: Path) -> None:
    ladder = Reference(digits, features, 10_000).ladder()
    check_ladder(ladder)
    (file,) = cache.iterdir()
    assert features.name in file.name
    assert json.loads(file.read_text()) == ladder
    file.write_text(file.read_text().replace(f'"frechet_test": {ladder["floor"]["frechet_test"]}', '"frechet_test": 42.0'))
    assert Reference(digits, features, 10_000).ladder()["floor"]["frechet_test"] == 42


@pytest.mark.slow
def test_the_ladder_ranks_damages_of_mnist() -> None:
    if not os.environ.get("LAB_DATA"):
        pytest.skip("LAB_DATA is unset: it must name a folder with MNIST")
    images = data.load(DataConfig())
    found = metrics.find_features(images)
    assert found
    check_ladder(Reference(images, found, 10_000).ladder())


def test_blur_is_a_gaussian_that_keeps_the_sum_and_does_not_move() -> None:
    dot = torch.zeros(1, 2, 21, 21)
    dot[:, :, 10, 10] = 1
    blurred = metrics.blur(dot, 2)
    places = torch.arange(21).double() - 10
    profile = torch.exp(-0.5 * (places / 2) ** 2)
    profile = torch.where(places.abs() <= 8, profile, 0)
    profile /= profile.sum()
    torch.testing.assert_close(blurred[0, 1].double(), profile[:, None] * profile[None, :], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(metrics.blur(torch.ones(1, 1, 9, 9), 1), torch.ones(1, 1, 9, 9))


def test_what_is_remembered_belongs_to_its_images_and_needs_no_place(
    digits: ImageSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert metrics.remembered(digits, "thing", lambda: 1) == 1
    assert metrics.remembered(digits, "thing", lambda: 2) == 1
    assert metrics.remembered(digits, "other", lambda: 3) == 3
    changed = ImageSet(digits.name, digits.classes, Split(digits.train.images.flip(0), digits.train.labels), digits.test)
    assert metrics.remembered(changed, "thing", lambda: 4) == 4
    next(cache.glob("thing-*")).write_text("{cut off")
    assert {metrics.remembered(one, "thing", lambda: 5) for one in (digits, changed)} > {5}
    (cache / "file").write_text("")
    monkeypatch.setenv("DREAMPLAY_CACHE", str(cache / "file"))
    assert [metrics.remembered(digits, "thing", lambda n=n: n) for n in (6, 7)] == [6, 7]


# Models


class Playback(Generator):
    """A generator that knows some images and the class of each."""

    knobs = frozenset({"steps"})

    def __init__(self, split: Split, classes: tuple[str, ...], knows_classes: bool = True) -> None:
        super().__init__()
        self.shape, self.classes, self.latent = tuple(split.images.shape[1:]), classes, 4
        self.split, self.told, self.weight = split, knows_classes, nn.Parameter(torch.zeros(1))

    @property
    def conditional(self) -> bool:
        return self.told

    def generate(self, noise, labels, how, generator=None):
        place = torch.randint(2**31, (len(noise),), generator=generator)
        if not self.told:
            return as_float(self.split.images[place % len(self.split)])
        of_class = [(self.split.labels == label).nonzero().flatten() for label in range(len(self.classes))]
        return as_float(torch.stack([self.split.images[of_class[label][p % len(of_class[label])]] for label, p in zip(labels, place)]))


FEW = EvaluationConfig(samples=300)


def test_held_out_images_are_good_samples_and_copies_are_found_out(digits: ImageSet, features: Features, tmp_path: Path) -> None:
    honest = metrics.judge(Playback(digits.test, digits.classes), digits, FEW, features)
    thief = metrics.judge(Playback(digits.train, digits.classes), digits, FEW, features, pictures=tmp_path)
    assert thief["memorised"] == 1
    assert honest["memorised"] < 0.04
    assert (tmp_path / "neighbours.png").is_file()
    assert honest["class_accuracy"] == pytest.approx(features.facts["test_accuracy"], abs=0.02)
    assert honest["features"] == features.name
    assert honest["samples"] == 300
    assert honest["frechet_test"] < 0.3 > thief["frechet_train"]
    assert honest["coverage_test"] > 0.5  # drawn with replacement


def test_labels_that_are_not_heeded_and_classes_that_are_missing_are_seen(digits: ImageSet, features: Features) -> None:
    shuffled = Split(digits.test.images, (digits.test.labels + 1) % 10)
    assert metrics.judge(Playback(shuffled, digits.classes), digits, FEW, features)["class_accuracy"] < 0.03
    untold = metrics.judge(Playback(digits.test.only(range(1, 10)), digits.classes, knows_classes=False), digits, FEW, features)
    assert untold["rare_classes"] == 1
    assert "class_accuracy" not in untold


def test_the_same_seed_gives_the_same_scores_and_another_one_others(digits: ImageSet, features: Features) -> None:
    model = Playback(digits.test, digits.classes)
    first, again = (metrics.judge(model, digits, FEW, features) for _ in range(2))
    assert first == again
    assert metrics.judge(model, digits, EvaluationConfig(samples=300, seed=1), features)["frechet_test"] != first["frechet_test"]


def test_a_set_without_features_is_judged_by_what_needs_none(digits: ImageSet) -> None:
    scores = metrics.judge(Playback(digits.test, digits.classes), digits, FEW, None, SamplingConfig(steps=3))
    assert set(scores) == {"samples", "memorised", "sample_protocol"}
    assert "scores that need some are left out" in scores["sample_protocol"]
    assert scores["sample_protocol"].startswith("300 samples in 8 bits, steps 3, seed 0; ")


def test_a_model_that_draws_no_numbers_is_refused(digits: ImageSet) -> None:
    model = Playback(digits.test, digits.classes)
    model.generate = lambda noise, labels, how, generator=None: torch.full((len(noise), 1, 28, 28), math.nan)
    with pytest.raises(UserError, match="pixels that are no numbers"):
        metrics.draw(model, 50, 0)


def test_titles_name_the_features_where_they_matter() -> None:
    titles = metrics.titles(
        {"features": "a-1", "frechet_test": 1.0, "kernel_train": 1.0, "rare_classes": 0, "nll": 2.0, "memorised": 0.0, "cas": 1}
    )
    assert list(titles.values()) == [
        "features", "frechet test (a-1)", "kernel train (a-1)", "rare classes (a-1)", "nll", "memorised", "cas",
    ]  # fmt: skip
    assert metrics.titles({"error": 1.0}) == {"error": "error"}


# The classification accuracy score


def test_much_is_learnt_from_real_images_and_nothing_from_wrong_labels(digits: ImageSet) -> None:
    state = torch.get_rng_state()
    train = digits.train
    real = metrics.learnt_from(train, digits.test, 10, steps=120, batch=32)
    wrong = metrics.learnt_from(Split(train.images, (train.labels + 1) % 10), digits.test, 10, steps=120, batch=32)
    assert real > 0.9
    assert wrong < 0.05
    assert metrics.learnt_from(train, digits.test, 10, steps=120, batch=32) == real
    assert torch.equal(torch.get_rng_state(), state)


def test_cas_is_learnt_from_samples_and_beside_it_from_equally_many_real_images(digits: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = []
    monkeypatch.setattr(metrics, "learnt_from", lambda samples, test, classes: taught.append((samples, test, classes)) or len(taught) / 10)
    asked = EvaluationConfig(samples=60, cas=True)
    scores = metrics.judge(Playback(digits.test, digits.classes), digits, asked)
    assert (scores["cas"], scores["cas_real"]) == (0.1, 0.2)
    assert [(len(samples), test is digits.test, classes) for samples, test, classes in taught] == [(60, True, 10)] * 2
    assert torch.equal(taught[1][0].images, digits.train.spread(60).images)
    untold = metrics.judge(Playback(digits.test, digits.classes, knows_classes=False), digits, asked)
    assert "cas" not in untold
    assert "no cas: this model knows no classes" in untold["sample_protocol"]
    assert len(taught) == 2
