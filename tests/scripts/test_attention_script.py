"""The script that draws where a classifier looks, as a user calls it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from PIL import Image

from lab import data

from . import test_scripts
from .test_scripts import ROOT, pixels

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = """
    --data.name digits --data.image-size 8 --data.batch-size 16 --trainer.steps 5 --trainer.preview-every 5 --trainer.save-every 5
    --tracking.mode disabled --trainer.threads 1 --optimizer.warmup-steps 0
""".split()  # noqa: SIM905


def call(script: str, *words: object, expect: int = 0) -> str:
    printed = test_scripts.call(script, *words, expect=expect)
    assert "Traceback" not in printed
    return printed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT, a CNN with a mean over places and one without, each trained for a moment, and a photo of a digit."""
    folder = tmp_path_factory.mktemp("attention")
    with contextlib.chdir(folder):
        for run, backbone in (("vit", "vit"), ("resnet", "resnet_small"), ("lenet", "lenet")):
            call("train_classifier.py", *TINY, "--model.backbone", backbone, "--run-dir", run)
        image = data.load(data.DataConfig(name="digits")).test.images[4, 0].numpy()
        Image.fromarray(numpy.uint8(255 - image)).resize((90, 90)).convert("RGB").save("a $paper$ with a name that is too long.jpg")
    return folder


@pytest.fixture(autouse=True)
def _inside(place: Path) -> Iterator[None]:
    with contextlib.chdir(place):
        yield


def image_of(picture: numpy.ndarray, left: int, right: int) -> numpy.ndarray:
    """What of the columns between two is drawn in colours, not in greys."""
    part = picture[:, left:right, :3].astype(int)
    return part[part.max(2) - part.min(2) > 30]


@pytest.mark.parametrize("run", ["vit", "resnet", "lenet"])
def test_a_picture_has_a_row_for_each_image_with_colours_in_its_maps_only(run: str) -> None:
    printed = call("attention.py", run, "--image", "3", "7", "12")
    assert f"picture: {run}/media/attention.png" in printed
    split = data.load(data.DataConfig(name="digits")).test
    lines = printed.splitlines()
    for line, index in zip(lines, (3, 7, 12)):
        assert line.startswith(f"image {index}, true: {split.labels[index]}: taken for ")
    picture = pixels(f"{run}/media/attention.png")
    assert picture.shape == (3 * 275, 836, 4)
    assert not len(image_of(picture, 0, 240))
    assert len(image_of(picture, 260, 500)) > 5_000
    assert len(image_of(picture, 510, 750)) > 500
    call("attention.py", run, "--image", "3", "--out", "one.png")
    assert pixels("one.png").shape == (275, 836, 4)


def test_the_first_panel_is_the_image_pixel_by_pixel() -> None:
    call("attention.py", "lenet", "--image", "5", "--out", "one.png")
    found = pixels("one.png")[..., 0].astype(int)
    image = data.load(data.DataConfig(name="digits", image_size=8)).test.images[5, 0].numpy().astype(int)
    dark = numpy.argwhere(found[30:, :250] == 0) + numpy.array((30, 0))  # the corners of the image are black
    (top, left), (bottom, right) = dark.min(0), dark.max(0)
    for y in range(8):
        for x in range(8):
            row, column = (round(low + (at + 0.5) * (high - low) / 8) for low, high, at in ((top, bottom, y), (left, right, x)))
            assert abs(found[row, column] - image[y, x]) <= 1


def test_methods_differ_and_each_is_drawn_again_bit_for_bit() -> None:
    drawn = {}
    for run, method in (("vit", "rollout"), ("vit", "gradcam"), ("vit", "saliency"), ("vit", "auto")):
        for name in ("first.png", "second.png"):
            call("attention.py", run, "--image", "0", "--method", method, "--out", name)
        assert Path("first.png").read_bytes() == Path("second.png").read_bytes()
        drawn[method] = Path("first.png").read_bytes()
    assert drawn.pop("auto") == drawn["rollout"]
    assert len(set(drawn.values())) == 3


def test_every_head_of_every_layer_is_drawn() -> None:
    call("attention.py", "vit", "--image", "3", "7", "--method", "heads", "--out", "heads.png")
    picture = pixels("heads.png")
    assert picture.shape == (1210, 1056, 4)
    assert not len(image_of(picture, 0, 260))
    assert len(image_of(picture, 300, 1056)) > 100_000


def test_photos_come_after_images_and_are_named_as_they_are() -> None:
    name = "a $paper$ with a name that is too long.jpg"
    printed = call("attention.py", "vit", "--photo", name, "--image", "4", "--out", "deep/er/photo.png")
    assert [line.partition(": taken")[0] for line in printed.splitlines()[1:2]] == [name[:28]]
    assert pixels("deep/er/photo.png").shape == (2 * 275, 836, 4)
    alone = call("attention.py", "vit", "--photo", name, "--out", "photo.png")
    assert alone.splitlines()[0] == printed.splitlines()[1]
    before = pixels("photo.png")
    call("attention.py", "vit", "--photo", name, "--invert", "no", "--out", "photo.png")
    assert (pixels("photo.png") != before).any()


BAD_INPUT = [
    (["vit"], "say what to look at, up to 50 in one picture: --image 0 1 2"),
    (["vit", "--image", *map(str, range(51))], "up to 50 in one picture"),
    (["vit", "--image", "3", "359"], "--image 359: the test set of digits has 359 images, 0 to 358"),
    (["vit", "--image", "-1"], "--image -1: the test set of digits has 359 images, 0 to 358"),
    (["lenet", "--image", "3", "--method", "rollout"], "a LeNet has no map by rollout; it has saliency"),
    (["resnet", "--image", "3", "--method", "heads"], "has no map by heads; it has gradcam, saliency"),
    (["vit", "--image", "3", "--out", "x.bmp"], "--out x.bmp: pictures are written as .png"),
    (["vit", "--photo", "nowhere.jpg"], "nowhere.jpg"),
    (["nowhere", "--image", "3"], "nowhere: no classifier run here"),
]


@pytest.mark.parametrize(("words", "expected"), BAD_INPUT)
def test_bad_input_gets_one_clear_sentence(words: list[str], expected: str) -> None:
    printed = call("attention.py", *words, expect=2)
    assert expected in printed
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1


def test_the_script_says_how_it_is_used() -> None:
    assert f"python scripts/{Path(ROOT, 'scripts/attention.py').name} RUN --image 3" in call("attention.py", "--help")
