"""scripts/sample.py: what it asks of a model, told by one that writes it down; then every family, on tiny runs of real digits."""

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from generative.model import CodedGenerator, Generator, SamplingConfig
from lab import media
from lab.config import UserError
from lab.data import ImageSet, Split
from tests.scripts.test_scripts import ROOT, call

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 4


@pytest.fixture(scope="module")
def sample() -> Iterator[ModuleType]:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("sample", ROOT / "scripts/sample.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sample"]


# A model that writes down what it is asked for


class Diary(CodedGenerator):
    """Makes of every image a plain grey, and keeps what it was given."""

    exact = True
    knobs = frozenset({"steps", "top_k"})

    def __init__(self, latent: int = 3) -> None:
        super().__init__()
        self.shape, self.classes, self.latent = (1, SIDE, SIDE), ("a", "b", "c"), latent
        self.asked: list[dict[str, Any]] = []

    @property
    def conditional(self) -> bool:
        return True

    def grey(self, level: Tensor) -> Tensor:
        return level.view(-1, 1, 1, 1).expand(-1, *self.shape)

    def note(self, generator: torch.Generator, **asked: Any) -> Tensor:
        self.asked.append(asked | {"drawn": float(torch.rand((), generator=generator))})
        return self.grey(torch.sigmoid(asked["noise"][:, 0]))

    def generate(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        assert generator
        return self.note(generator, noise=noise, labels=labels, how=how)

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([images[:, 0, 0, 0], labels.float(), torch.ones(len(images))], 1)

    def decode(self, codes: Tensor, labels: Tensor) -> Tensor:
        self.asked.append({"codes": codes, "labels": labels})
        return self.grey(codes[:, 0])


class Editing(Diary):
    """One that can edit, too."""

    def trajectory(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator) -> list[Tensor]:
        self.note(generator, noise=noise, labels=labels, how=how)
        return [self.grey(torch.full((len(noise),), index / 100)) for index in range(101)]

    def inpaint(
        self, images: Tensor, mask: Tensor, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator
    ) -> Tensor:
        return self.note(generator, images=images, mask=mask, noise=noise, labels=labels, how=how)

    def vary(
        self, images: Tensor, strength: float, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator
    ) -> Tensor:
        return self.note(generator, images=images, strength=strength, noise=noise, labels=labels, how=how)


def loaded(model: Generator) -> Any:
    """A run of the model, on nine test images whose grey is their index, a, b and c in turn."""
    images = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 1, SIDE, SIDE)
    split = Split(images, torch.arange(9) % 3)
    return SimpleNamespace(model=model, experiment=SimpleNamespace(dataset=lambda: ImageSet("nine", model.classes, split, split)))


def draw(sample: ModuleType, model: Generator, moving: bool = False, **options: Any) -> list[Tensor]:
    chosen = sample.Options(run="x", **options)
    sample.check(chosen)
    sample.check_model(chosen, model)
    frames: list[Tensor] = sample.draw(chosen, loaded(model), moving)
    return frames


def levels(picture: Tensor) -> Tensor:
    """The grey of each image in a grid of plain ones, row by row."""
    return picture[0, 2 :: SIDE + 2, 2 :: SIDE + 2]


def test_samples_get_the_labels_the_settings_and_the_same_noise_each_time(sample: ModuleType) -> None:
    model, how = Diary(), SamplingConfig(steps=7)
    first, again, other = (draw(sample, model, count=5, labels="c,a-b", how=how, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert model.asked[0]["labels"].tolist() == [2, 0, 1, 2, 0]
    assert model.asked[0]["how"] == how
    assert model.asked[0]["drawn"] == model.asked[1]["drawn"] != model.asked[2]["drawn"]
    expected = media.grid(model.grey(torch.sigmoid(model.asked[0]["noise"][:, 0])))
    assert torch.equal(first, expected)


def test_an_interpolation_goes_from_sample_to_sample_and_changes_nothing_else(sample: ModuleType) -> None:
    model = Diary()
    draw(sample, model, kind="interpolation", count=4, columns=5)
    noise = torch.stack([asked["noise"] for asked in model.asked])  # (columns, rows, latent)
    normals = torch.linalg.cross(noise[0], noise[-1])
    torch.testing.assert_close((noise * normals).sum(2), torch.zeros(5, 4), rtol=0, atol=1e-4)  # all in one plane
    draw(sample, model, count=8)
    torch.testing.assert_close(torch.cat([noise[0], noise[-1]]), model.asked.pop()["noise"], rtol=0, atol=1e-5)
    assert len({asked["drawn"] for asked in model.asked}) == 1
    assert all(asked["labels"].tolist() == [0, 1, 2, 0] for asked in model.asked)


def test_an_arc_has_equal_steps_and_stays_as_far_from_the_middle(sample: ModuleType) -> None:
    ends = torch.nn.functional.normalize(torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=2)
    arc = torch.stack([sample.spherical(*ends, index / 8) for index in range(9)])
    torch.testing.assert_close(arc.norm(dim=2), torch.ones(9, 6, dtype=torch.float64))
    steps = (arc[1:] - arc[:-1]).norm(dim=2)
    torch.testing.assert_close(steps, steps[:1].expand(8, -1))


def test_an_interpolation_of_images_is_exact_at_its_ends_and_takes_the_nearer_label(sample: ModuleType) -> None:
    model = Diary()
    (picture,) = draw(sample, model, kind="interpolation", columns=5, image=(4, 8, 7, 3))
    torch.testing.assert_close(levels(picture)[:, 0] * 255, torch.tensor([4.0, 7.0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(levels(picture)[:, -1] * 255, torch.tensor([8.0, 3.0]), rtol=0, atol=1e-3)
    assert [asked["labels"].tolist() for asked in model.asked] == [[1, 1]] * 3 + [[2, 0]] * 2
    draw(sample, model, kind="interpolation", columns=2, image=(4, 8), labels="a")
    assert [asked["labels"].tolist() for asked in model.asked[5:]] == [[0], [0]]


def test_codes_without_a_normal_prior_are_joined_by_straight_lines(sample: ModuleType) -> None:
    model = Diary()
    model.exact = False  # type: ignore[misc]
    draw(sample, model, kind="interpolation", columns=3, image=(0, 8))
    first, middle, last = (asked["codes"] for asked in model.asked)
    torch.testing.assert_close(middle, (first + last) / 2)


def test_a_film_of_an_interpolation_comes_back_and_shows_the_columns_of_the_picture(sample: ModuleType) -> None:
    (still,) = draw(sample, Diary(), kind="interpolation", count=1, columns=4)
    film = draw(sample, Diary(), moving=True, kind="interpolation", count=1, columns=4)
    columns = levels(still)[0].tolist()
    assert [float(levels(frame)) for frame in film] == columns + columns[-2:0:-1]


def test_a_walk_begins_at_the_samples_and_closes(sample: ModuleType) -> None:
    model = Diary()
    draw(sample, model, count=4)
    draw(sample, model, moving=True, count=4, columns=3)
    still, *walk = (asked["noise"] for asked in model.asked)
    assert len(walk) == 18
    torch.testing.assert_close(walk[0], still)
    axis = (walk[4] + walk[5]) / (2 * numpy.cos(numpy.pi / 18))  # the other end of the ellipse
    angles = [2 * numpy.pi * index / 18 for index in range(18)]
    expected = torch.stack([numpy.cos(angle) * still + numpy.sin(angle) * axis for angle in angles])
    torch.testing.assert_close(torch.stack(walk), expected, rtol=0, atol=1e-5)


def test_a_traversal_moves_one_number_a_row_the_most_telling_first(sample: ModuleType) -> None:
    model = Diary()
    draw(sample, model, kind="traversal", count=2, columns=3)
    columns = torch.stack([asked["noise"] for asked in model.asked[2:]])
    assert columns[:, 0].tolist() == [[-3, 0, 0], [0, 0, 0], [3, 0, 0]]
    assert ((columns[:, 1] != 0).sum(1) <= 1).all()


def test_a_plane_goes_through_even_quantiles_across_and_down(sample: ModuleType) -> None:
    model = Diary(latent=2)
    draw(sample, model, kind="plane", columns=3)
    columns = torch.stack([asked["noise"] for asked in model.asked[2:]])
    edge = 2.0537489
    torch.testing.assert_close(columns[:, 0, 0], torch.tensor([-edge, 0, edge]))
    torch.testing.assert_close(columns[0, :, 1], torch.tensor([-edge, 0, edge]))


def test_a_trajectory_goes_from_noise_to_the_picture_and_a_film_of_it_holds_that_for_a_second(sample: ModuleType) -> None:
    (still,) = draw(sample, Editing(), kind="trajectory", count=2, columns=5)
    torch.testing.assert_close(levels(still), torch.tensor([0, 0.25, 0.5, 0.75, 1.0]).expand(2, -1))
    film = draw(sample, Editing(), moving=True, kind="trajectory", count=1, columns=5)
    shown = [float(levels(frame)) for frame in film]
    assert shown[0] == 0
    assert shown[-13:] == [1.0] * 13
    assert len(shown) == 60 + 12
    assert all(0.009 < there - here < 0.021 for here, there in pairwise(shown[:-12]))
    (last,) = draw(sample, Editing(), kind="trajectory", count=1, columns=1)
    assert float(levels(last)) == 1


def test_inpainting_shows_image_hole_and_fillings_of_other_noise(sample: ModuleType) -> None:
    model = Editing()
    (picture,) = draw(sample, model, kind="inpainting", columns=3, image=(5, 7), mask="left", how=SamplingConfig(steps=2))
    rows = picture[:, 2:].unflatten(1, (2, SIDE + 2))[0]
    assert torch.equal(rows[1, 0, 2 : 2 + SIDE], torch.full((SIDE,), 7 / 255))
    torch.testing.assert_close(rows[0, 0, 8:12], torch.tensor([0.5, 0.5, 5 / 255, 5 / 255]))
    assert len(model.asked) == 3
    assert torch.equal(model.asked[0]["mask"][0, 0], torch.tensor([0.0, 0, 1, 1]).expand(SIDE, SIDE))
    assert torch.equal(model.asked[2]["images"][:, 0, 0, 0] * 255, torch.tensor([5.0, 7.0]))
    assert model.asked[0]["labels"].tolist() == [2, 1]
    assert len({asked["drawn"] for asked in model.asked}) == 3
    assert not torch.equal(model.asked[0]["noise"], model.asked[1]["noise"])
    torch.testing.assert_close(levels(picture)[:, 2:], torch.stack([torch.sigmoid(asked["noise"][:, 0]) for asked in model.asked], 1))


def test_variations_keep_the_images_own_labels_unless_others_are_given(sample: ModuleType) -> None:
    model = Editing()
    (picture,) = draw(sample, model, kind="variations", columns=2, count=3, strength=0.25)
    torch.testing.assert_close(levels(picture)[:, 0] * 255, torch.tensor([0.0, 3.0, 6.0]))
    assert model.asked[0]["strength"] == 0.25
    assert model.asked[0]["labels"].tolist() == [0, 0, 0]
    draw(sample, model, kind="variations", columns=1, image=(1,), labels="c")
    assert model.asked[-1]["labels"].tolist() == [2]


@pytest.mark.parametrize(
    ("side", "hole"),
    [
        ("left", [(r, c) for r in range(6) for c in range(4)]),
        ("right", [(r, c) for r in range(6) for c in range(4, 8)]),
        ("top", [(r, c) for r in range(3) for c in range(8)]),
        ("bottom", [(r, c) for r in range(3, 6) for c in range(8)]),
        ("centre", [(r, c) for r in range(1, 5) for c in range(2, 6)]),
    ],
)
def test_each_side_is_filled_in_where_its_name_says(sample: ModuleType, side: str, hole: list[tuple[int, int]]) -> None:
    stays = sample.kept(side, 6, 8)
    assert stays.shape == (1, 1, 6, 8)
    assert [(int(row), int(column)) for row, column in (stays[0, 0] == 0).nonzero()] == hole


def test_a_mask_may_be_a_picture_of_any_size_that_is_white_where_to_fill_in(sample: ModuleType, tmp_path: Path) -> None:
    pixels = numpy.zeros((12, 16, 3), numpy.uint8)
    pixels[:4, 8:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    stays = sample.kept(str(tmp_path / "mask.png"), 6, 8)
    expected = torch.ones(6, 8)
    expected[:2, 4:] = 0
    assert torch.equal(stays[0, 0], expected)


class Plain(Generator):
    """A model that makes images and can do nothing else."""

    shape, classes, latent, conditional = (1, SIDE, SIDE), ("a", "b"), 2, False

    def generate(self, noise: Tensor, labels: Tensor, how: SamplingConfig, generator: torch.Generator | None = None) -> Tensor:
        raise AssertionError


REFUSED = [
    (Plain, {"labels": "a"}, "knows no classes"),
    (Plain, {"kind": "reconstructions"}, "no way back from images to codes; diffusion models, flows and autoencoders have one"),
    (Plain, {"kind": "interpolation", "image": (1, 2)}, "no way back from images"),
    (Plain, {"kind": "trajectory"}, "--kind trajectory: .* diffusion models have one"),
    (Plain, {"kind": "inpainting"}, "--kind inpainting: this model cannot start from an image; diffusion models can"),
    (Plain, {"kind": "variations"}, "--kind variations"),
    (Plain, {"how": SamplingConfig(sampler="ddim")}, "--sampler: .* knows none"),
    (Diary, {"how": SamplingConfig(steps=3, guidance=2.0, temperature=0.5)}, "--guidance --temperature: .* knows --steps --top-k"),
    (Diary, {"kind": "reconstructions", "how": SamplingConfig(steps=3)}, "leave out --sampler, --steps"),
    (Diary, {"kind": "interpolation", "image": (1, 9)}, "--image 9: the test images are 0 to 8"),
    (Diary, {"kind": "interpolation", "image": (1, 2, 3)}, "two images for each row"),
    (Diary, {"image": (1,)}, "--kind samples starts from no image; interpolation, inpainting, variations do"),
    (Editing, {"kind": "variations", "strength": 0.0}, "above 0 and up to 1"),
    (Editing, {"kind": "inpainting", "mask": "middle"}, "--mask middle: neither one of left, right, top, bottom, centre nor a picture"),
    (Editing, {"columns": 0}, "must be at least 1"),
    (lambda: Diary(latent=16), {"kind": "traversal"}, "as large as the image"),
    (lambda: Diary(latent=16), {"kind": "plane"}, "as large as the image"),
    (lambda: Diary(latent=1), {"kind": "plane"}, "at least 2"),
    (lambda: Diary(latent=0), {}, "use scripts/enlarge.py"),
]


@pytest.mark.parametrize(("kind", "options", "expected"), REFUSED)
def test_what_a_model_cannot_do_is_refused_in_a_sentence(sample: ModuleType, kind: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        draw(sample, kind(), **options)


# Every family

TINY = """
    --data.name digits --data.image-size 8 --data.batch-size 16 --trainer.steps 2 --trainer.preview-every 9 --trainer.precision fp32
    --tracking.mode disabled --trainer.threads 1
""".split()  # noqa: SIM905
SMALLEST = {
    "autoencoder": "--model.network.hidden 16 --model.latent 4",
    "vae": "--model.network.hidden 16 --model.latent 4",
    "vqvae": "--model.channels 8 --model.codes 8 --model.dimensions 4",
    "tokens": "--vqvae vqvae --model.width 16 --model.layers 1 --model.heads 2",
    "gan": "--model.channels 8 --model.latent 4",
    "flow": "--model.hidden 8 --model.steps 2",
    "diffusion": "--model.network.widths 8 16 --model.steps 3",
    "distillation": "--teacher diffusion --model.steps 2 --model.teacher-steps 1",
    "superresolution": "--data.image-size 16 --model.channels 8 --model.blocks 1 --model.factor 2 --model.adversarial 0",
}
EVERY = {"samples", "interpolation"}
SMALL_CODE = EVERY | {"traversal", "plane"}
OF_DIFFUSION = EVERY | {"trajectory", "inpainting", "variations"}
DRAWS = {
    "autoencoder": SMALL_CODE | {"reconstructions"},
    "vae": SMALL_CODE | {"reconstructions"},
    "vqvae": SMALL_CODE | {"reconstructions"},
    "tokens": SMALL_CODE,
    "gan": SMALL_CODE,
    "flow": EVERY | {"reconstructions"},
    "diffusion": OF_DIFFUSION | {"reconstructions"},
    "distillation": OF_DIFFUSION,
    "superresolution": set(),
}
KINDS = ["samples", "interpolation", "traversal", "plane", "reconstructions", "trajectory", "inpainting", "variations"]
TOLD = {"gan", "tokens", "diffusion", "distillation"}
"""Families that know classes by default."""
KNOBS = {
    "gan": "--temperature",
    "flow": "--temperature",
    "tokens": "--guidance --temperature --top-k",
    "diffusion": "--sampler --steps --guidance",
}


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every family, trained for two steps."""
    folder = tmp_path_factory.mktemp("families")
    with contextlib.chdir(folder):
        for family, words in SMALLEST.items():
            call(f"train_{family}.py", *TINY, *words.split(), "--run-dir", family)
    return folder


@pytest.fixture
def _inside(runs_folder: Path) -> Iterator[None]:
    with contextlib.chdir(runs_folder):
        yield


@pytest.mark.usefixtures("_inside")
@pytest.mark.parametrize("family", SMALLEST)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_draws_what_it_can_the_same_each_time_and_refuses_the_rest(family: str, kind: str) -> None:
    words = ["sample.py", family, "--kind", kind, "--count", "3", "--columns", "4", "--scale", "1", "--out"]
    if kind not in DRAWS[family]:
        assert re.match(r"error: .*(--kind|use scripts/enlarge|way back|with its teacher)", call(*words, "no.png", expect=2))
        return
    call(*words, "first.png")
    call(*words, "again.png")
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()
    with Image.open("first.png") as picture:
        assert picture.size == {"samples": (22, 22), "plane": (42, 42)}.get(kind, picture.size)
    if kind not in ("reconstructions", "plane", "traversal"):
        call(*words, "other.png", "--seed", "1")
        assert Path("first.png").read_bytes() != Path("other.png").read_bytes()


@pytest.mark.usefixtures("_inside")
@pytest.mark.parametrize("family", [family for family, kinds in DRAWS.items() if kinds])
def test_labels_reach_the_models_that_know_them_and_settings_those_that_know_those(family: str) -> None:
    words = ["sample.py", family, "--count", "2", "--out", "picture.png"]
    if family in TOLD:
        call(*words, "--labels", "3-1")
    else:
        assert "this model knows no classes" in call(*words, "--labels", "3", expect=2)
    known = KNOBS.get(family, "")
    unknown = ["--sampler", "ddim"] if "--sampler" not in known else ["--top-k", "3"]
    assert f"it knows {known or 'none'}\n" in call(*words, *unknown, expect=2)
    values = {"--top-k": "3", "--sampler": "ddim", "--steps": "2", "--guidance": "2", "--temperature": "0.5"}
    call(*words, *[word for name in known.split() for word in (name, values[name])])
