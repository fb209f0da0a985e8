"""Photos as the images of a set: the right way round, without their ground, at the set's size and place."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lab import data
from lab.classifier import Classifier, ClassifierConfig, ClassifierExperiment, judge
from lab.data import AugmentConfig, DataConfig, DataError, ImageSet, Split, as_float
from lab.data.photo import Framing, centred, cut_out, framing, read, without_ground, wrong_way_round
from lab.distributed import World
from lab.experiment import TrainerConfig
from lab.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWN = Framing(ground=0.0, extent=20 / 28)
"""As MNIST's images are framed."""
PHOTOS = Framing(ground=0.8, extent=1.0)
"""Of a set that is not drawn on black."""
GREY, COLOUR = (1, 28, 28), (3, 28, 28)


def split(images: torch.Tensor) -> Split:
    return Split(images, torch.zeros(len(images), dtype=torch.int64))


def saved(path: Path, pixels: np.ndarray | torch.Tensor, mode: str | None = None) -> Path:
    """A picture file of numbers in [0, 1] or bytes, (H, W) or (H, W, bands)."""
    array = np.asarray(pixels)
    Image.fromarray(array if array.dtype == np.uint8 else (255 * array).round().astype(np.uint8), mode).save(path)
    return path


def mass_centre(image: torch.Tensor) -> tuple[float, float]:
    """Row and column of the centre of mass of an image (C, H, W), pixel centres at half numbers."""
    mass = image.double().mean(0)
    y, x = (torch.arange(length, dtype=torch.float64) + 0.5 for length in mass.shape)
    return float((mass.sum(1) * y).sum() / mass.sum()), float((mass.sum(0) * x).sum() / mass.sum())


# How a set is framed


def test_a_figure_on_black_is_framed_by_its_longer_side():
    images = torch.zeros(2, 1, 10, 10, dtype=torch.uint8)
    images[0, :, 2:8, 3:5] = 255  # 6 high
    images[1, :, 4:6, 1:9] = 100  # 8 wide, and less bright: what counts is the part of the brightest
    images[1, :, 0:4, 4:6] = 30  # below 0.35 of it
    frame = framing(split(images))
    assert frame.extent == pytest.approx((0.6 + 0.8) / 2)
    assert frame.ground == pytest.approx((0 + 30 / 255 * 2 / 40) / 2)  # of 40 border pixels, two
    assert frame.drawn


def test_the_ground_is_the_mean_over_the_four_borders():
    images = torch.zeros(1, 1, 10, 10, dtype=torch.uint8)
    images[:, :, 0] = 255
    frame = framing(split(images))  # ten at the top, and one each at the upper ends of the left and the right border
    assert frame.ground == pytest.approx(12 / 40)
    assert not frame.drawn
    assert framing(split(torch.full((3, 3, 6, 6), 51, dtype=torch.uint8))).ground == pytest.approx(0.2)


def test_a_set_of_black_images_alone_is_framed_too():
    assert framing(split(torch.zeros(3, 1, 6, 6, dtype=torch.uint8))) == Framing(0.0, 0.0)


def test_a_figure_in_one_colour_is_framed_by_the_mean_of_its_channels():
    images = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
    images[:, 0, 3:7, 2:9] = 255  # a third on average: not drawn
    assert framing(split(images)).extent == 0
    images[:, 1, 3:7, 4:6] = 255
    assert framing(split(images)).extent == pytest.approx(0.4)


# Which way round


@pytest.mark.parametrize("ground", [0.0, 0.1, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("page", [0.0, 0.2, 0.45, 0.55, 0.8, 1.0])
def test_a_photo_is_turned_round_where_its_border_is_then_nearer_to_the_sets(ground, page):
    expected = (page > 0.5) != (ground > 0.5)  # 1 - page is nearer to the ground exactly where they lie on two sides of the middle
    assert wrong_way_round(torch.full((1, 20, 20), page), Framing(ground, 1.0)) == expected


@pytest.mark.parametrize("ground", [0.36, 0.45, 0.5, 0.55, 0.6, 0.64])
@pytest.mark.parametrize("page", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_photos_for_a_set_of_grey_grounds_as_asls_are_never_turned_round(ground, page, tmp_path):
    assert not wrong_way_round(torch.full((1, 20, 20), page), Framing(ground, 1.0))
    found = read(saved(tmp_path / "x.png", np.full((28, 28), page)), GREY, Framing(ground, 1.0))
    assert not found.inverted
    torch.testing.assert_close(found.image, torch.full(GREY, round(255 * page) / 255))


def test_what_stands_in_the_middle_does_not_count():
    page = torch.ones(1, 20, 20)
    page[:, 1:-1, 1:-1] = 0
    assert wrong_way_round(page, DRAWN)
    assert not wrong_way_round(1 - page, DRAWN)


@pytest.mark.parametrize("invert", ["yes", "no"])
def test_whoever_knows_better_decides(invert, tmp_path):
    photo = read(saved(tmp_path / "x.png", np.full((28, 28), 51, dtype=np.uint8)), GREY, PHOTOS, invert)
    assert photo.inverted == (invert == "yes")
    torch.testing.assert_close(photo.image, torch.full(GREY, 0.8 if photo.inverted else 0.2))


# The ground


def lighting(side: int, *terms: float) -> torch.Tensor:
    """A surface of the second degree over a square, (side, side)."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    return sum(term * part for term, part in zip(terms, (torch.ones_like(x), x, y, x * x, x * y, y * y), strict=True))


UNEVEN = (0.2, 0.1, -0.05, 0.08, -0.04, 0.06)


@pytest.mark.parametrize("channels", [1, 3])
def test_uneven_light_is_taken_away_and_the_figure_stretched_to_white(channels):
    picture = lighting(280, *UNEVEN).expand(channels, 280, 280).clone()
    figure = torch.zeros(280, 280, dtype=torch.bool)
    figure[90:190, 130:150] = figure[90:110, 100:180] = True
    picture[:, figure] += 0.4
    found = without_ground(picture)
    assert found[:, figure].min() > 0.99
    assert found[:, ~figure].max() < 0.01
    assert found.max() <= 1


def test_the_ground_is_found_below_noise():
    noise = 0.02 * torch.randn(280, 280, generator=torch.Generator().manual_seed(0))
    picture = (lighting(280, *UNEVEN) + noise)[None]
    picture[:, 100:180, 120:160] += 0.5
    found = without_ground(picture)
    rest = found.clone()
    rest[:, 98:182, 118:162] = 0
    assert found[:, 104:176, 124:156].mean() > 0.9
    assert rest.mean() < 0.03
    assert rest.max() < 0.35


def test_without_light_the_figure_stays_as_it_is():
    picture = torch.zeros(1, 100, 100)
    picture[:, 30:70, 40:60] = 1.0
    torch.testing.assert_close(without_ground(picture), picture, rtol=0, atol=1e-3)


# Size and place


@pytest.mark.parametrize(("height", "width"), [(10, 14), (20, 3), (1, 1), (27, 28), (28, 28)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_figure_is_put_with_its_centre_of_mass_in_the_middle(height, width, channels):
    figure = torch.rand(channels, height, width, generator=torch.Generator().manual_seed(height)) ** 3 + 0.01
    found = centred(figure, 28)
    assert found.shape == (channels, 28, 28)
    rows, columns = (found.sum((0, axis)).nonzero().flatten() for axis in (2, 1))
    assert torch.equal(found[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], figure)  # whole, and black around it
    for centre, length in zip(mass_centre(found), (height, width), strict=True):
        assert abs(centre - 14) <= (0.5 if length < 27 else 1.0) + 1e-4


def test_a_figure_whose_mass_lies_at_its_end_stays_inside():
    figure = torch.full((1, 20, 24), 1e-3)
    figure[:, -1, 0] = 1.0  # would have to lie at row 14, column 14
    found = centred(figure, 28)
    assert torch.equal(found[:, :20, 4:], figure)
    assert torch.equal(centred(figure.flip(1, 2), 28)[:, 8:, :24], figure.flip(1, 2))


@pytest.mark.parametrize(("height", "width"), [(140, 40), (40, 140), (60, 60), (200, 8)])
@pytest.mark.parametrize("extent", [20 / 28, 0.5, 1.0])
def test_a_figure_is_cut_out_at_the_sets_size_with_its_own_ratio(height, width, extent):
    picture = lighting(280, *UNEVEN)[None]
    picture[:, 15 : 15 + height, 30 : 30 + width] += 0.5  # near a corner
    found = cut_out(picture, 28, extent)
    rows, columns = ((found[0] > 0.35).any(axis).sum() for axis in (1, 0))
    scale = extent * 28 / max(height, width)
    assert abs(rows - scale * height) <= 1
    assert abs(columns - scale * width) <= 1
    assert 0 <= found.min() <= found.max() <= 1
    assert all(abs(centre - 14) <= 0.75 for centre in mass_centre(found))


def test_a_figure_fills_as_much_as_the_sets_own_do():
    picture = torch.zeros(1, 280, 280)
    picture[:, 50:130, 60:100] = 1.0
    for extent in (0.4, 0.75, 1.0):
        once = cut_out(picture, 28, extent)
        assert framing(split((255 * once[None]).round().byte())).extent == pytest.approx(extent, abs=1.01 / 28)


# Files of every kind


def page(side: int = 280) -> np.ndarray:
    """Dark ink on light paper, (side, side)."""
    paper = np.full((side, side), 0.9, dtype=np.float32)
    paper[side // 4 : side // 2, side // 3 : side // 3 + side // 10] = 0.1
    return paper


@pytest.mark.parametrize("shade", [0, 90, 255])
@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_an_empty_page_shows_nothing(shade, shape, tmp_path):
    photo = read(saved(tmp_path / "x.png", np.full((300, 200), shade, dtype=np.uint8)), shape, DRAWN)
    assert photo.image.shape == shape
    assert photo.inverted == (shade == 255)
    assert photo.image.amax() - photo.image.amin() < 1e-3
    assert photo.image.amax() == pytest.approx(90 / 255 if shade == 90 else 0, abs=1e-3)


@pytest.mark.parametrize("side", [280, 1400])
@pytest.mark.parametrize("upright", [True, False])
def test_a_stroke_of_one_pixel_is_still_seen(side, upright, tmp_path):
    paper = np.ones((side, side), dtype=np.float32)
    paper[side // 4 : 3 * side // 4, side // 2] = 0
    photo = read(saved(tmp_path / "x.png", paper if upright else paper.T), GREY, DRAWN)
    drawn = photo.image[0] > 0.35 * photo.image.max()
    assert photo.inverted
    assert photo.image.max() > 0.3
    assert drawn.any(int(upright)).sum() >= 19
    assert drawn.any(1 - int(upright)).sum() <= 2


@pytest.mark.parametrize("size", [(3, 3), (1, 1), (2, 5), (3000, 20), (20, 3000), (500, 1), (1, 500)])
@pytest.mark.parametrize("frame", [DRAWN, PHOTOS, Framing(0.5, 1.0)])
def test_pictures_of_any_size_become_images(size, frame, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    for shape in (GREY, COLOUR, (1, 64, 64), (1, 8, 8)):
        image = read(saved(tmp_path / "x.png", pixels), shape, frame).image
        assert image.shape == shape
        assert torch.isfinite(image).all()
        assert 0 <= image.min() <= image.max() <= 1


def test_a_wide_picture_is_seen_at_its_centre(tmp_path):
    wide = np.ones((280, 1400), dtype=np.float32)
    wide[:, 560:840] = page()
    expected = read(saved(tmp_path / "square.png", page()), GREY, DRAWN)
    found = read(saved(tmp_path / "wide.png", wide), GREY, DRAWN)
    torch.testing.assert_close(found.image, expected.image)


def test_colours_become_grey_or_stay_as_the_set_has_them(tmp_path):
    pixels = np.zeros((28, 28, 3), dtype=np.uint8)
    pixels[:] = (200, 100, 50)
    path = saved(tmp_path / "x.png", pixels)
    grey, colour = read(path, GREY, Framing(0.5, 1.0)).image, read(path, COLOUR, Framing(0.5, 1.0)).image
    torch.testing.assert_close(colour, (torch.tensor([200, 100, 50]) / 255)[:, None, None].expand(COLOUR))
    assert float(grey[0, 5, 5]) == pytest.approx((0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255, abs=0.005)


def test_coloured_ink_is_cut_out_in_its_own_colour_turned_round(tmp_path):
    paper = np.full((280, 280, 3), 255, dtype=np.uint8)
    paper[100:180, 120:140] = (255, 0, 0)
    found = read(saved(tmp_path / "x.png", paper), COLOUR, DRAWN)
    assert found.inverted
    middle = found.image[:, 14, 14]
    assert middle[0] < 0.02
    assert middle[1:].min() > 0.9


def test_paper_that_can_be_seen_through_is_paper(tmp_path):
    shades = (255 * page()).round().astype(np.uint8)
    bands = [shades, shades, shades, np.full_like(shades, 120)]
    expected = read(saved(tmp_path / "plain.png", shades), GREY, DRAWN)
    for name, pixels in (("rgba.png", np.stack(bands, 2)), ("la.png", np.stack(bands[2:], 2))):
        found = read(saved(tmp_path / name, pixels), GREY, DRAWN)
        assert found.inverted
        torch.testing.assert_close(found.image, expected.image)


def test_a_file_that_is_no_picture_of_8_bits_is_named(tmp_path):
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((30, 30), 40_000, dtype=np.uint16)).save(deep)
    with pytest.raises(DataError, match=r"deep\.png: cannot be used as an image \(it has more than 8 bits a pixel"):
        read(deep, GREY, DRAWN)
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "nowhere.png", "."):
        with pytest.raises(DataError, match="cannot be used as an image"):
            read(tmp_path / name, GREY, DRAWN)


def test_a_photo_taken_sideways_is_turned_upright(tmp_path):
    upright = Image.fromarray((255 * page()).astype(np.uint8))
    note = Image.Exif()
    note[0x0112] = 6  # to be turned by a quarter
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=note)
    torch.testing.assert_close(read(tmp_path / "sideways.png", GREY, DRAWN).image, read(tmp_path / "upright.png", GREY, DRAWN).image)


# From a page of paper to its class


@dataclass
class Known:
    """A classifier, the images it was not trained on, and how all are framed."""

    model: Classifier
    test: Split
    frame: Framing


def framed_as_mnist(images: torch.Tensor) -> torch.Tensor:
    """Bytes (N, 1, 8, 8), which fill their square, at 20 of 28 pixels and rolled to the middle by their mass."""
    large = F.pad(F.interpolate(images / 255, (20, 20), mode="bilinear"), (4, 4, 4, 4))
    moved = []
    for image in large:
        y, x = mass_centre(image)
        moved.append(image.roll((max(-4, min(4, round(14 - y))), max(-4, min(4, round(14 - x)))), (1, 2)))
    return (255 * torch.stack(moved)).round().byte()


def dataset() -> ImageSet:
    """MNIST where LAB_DATA names a folder that has it, else the digits inside scikit-learn framed like it."""
    if os.environ.get("LAB_DATA"):
        return data.load(DataConfig(name="mnist"))
    digits = data.load(DataConfig(name="digits", image_size=8))
    train, test = (Split(framed_as_mnist(part.images), part.labels) for part in (digits.train, digits.test))
    return ImageSet("digits", digits.classes, train, test)


@pytest.fixture(scope="module")
def known() -> Iterator[Known]:
    images = dataset()
    settings = ClassifierExperiment(
        data=DataConfig(name="digits", batch_size=64, augment=AugmentConfig(shift=2.0, rotation=10.0, zoom=0.1)),
        model=ClassifierConfig(backbone="small"),
        trainer=TrainerConfig(steps=300),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifierExperiment, "dataset", lambda self: images)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        trainer = Trainer(settings, World())
        trainer.fit()
        torch.set_num_threads(threads)
    with trainer.task.learner.judged() as model:
        yield Known(model, images.test.spread(100), Framing(**trainer.task.facts["framing"]))


def on_paper(image: torch.Tensor, chance: np.random.Generator) -> np.ndarray:
    """A figure (28, 28) in dark ink somewhere on a light page of any size, unevenly lit and noisy, bytes (H, W)."""
    height, width = chance.integers(280, 500, 2)
    square, figure = min(height, width), image[image.amax(1) > 0][:, image.amax(0) > 0]
    length = chance.uniform(0.25, 0.6) * square
    size = [max(1, round(length * side / max(figure.shape))) for side in figure.shape]
    ink = F.interpolate(figure[None, None], size, mode="bilinear")[0, 0].numpy()
    top, left = ((outer - square) // 2 + chance.integers(0.04 * square, 0.96 * square - side) for outer, side in zip((height, width), size))
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    a, b, c = chance.uniform(-0.08, 0.08, 3)
    light = chance.uniform(0.7, 0.85) + a * x + b * y - 0.06 * x * y - abs(c) * (x * x + y * y)
    cover = np.zeros((height, width))
    cover[top : top + size[0], left : left + size[1]] = ink
    lit = light * (1 - chance.uniform(0.6, 0.9) * cover) + chance.normal(0, 0.02, (height, width))
    return (255 * lit.clip(0, 1)).round().astype(np.uint8)


def accuracy(known: Known, photos: list[torch.Tensor]) -> float:
    guesses = known.model.probabilities(torch.stack(photos)).argmax(1)
    return (guesses == known.test.labels).double().mean().item()


def test_the_set_is_framed_as_its_makers_say(known: Known):
    assert known.frame.drawn
    assert known.frame.extent == pytest.approx(20 / 28, abs=0.04)


def test_figures_anywhere_on_any_page_are_turned_round_and_known_nearly_as_well_as_the_sets_own(known: Known, tmp_path: Path):
    chance, plain = np.random.default_rng(0), judge(known.model, known.test).scores()["accuracy"]
    photos = []
    for index, image in enumerate(known.test.images):
        path = tmp_path / f"{index}.{'jpg' if index % 2 else 'png'}"
        photos.append(read(saved(path, on_paper(image[0] / 255, chance)), GREY, known.frame))
    assert all(photo.inverted for photo in photos)
    assert plain > 0.9
    assert accuracy(known, [photo.image for photo in photos]) > plain - 0.06
    as_they_are = [read(tmp_path / f"{index}.{'jpg' if index % 2 else 'png'}", GREY, known.frame, "no").image for index in range(40)]
    few = Known(known.model, Split(known.test.images[:40], known.test.labels[:40]), known.frame)
    assert accuracy(few, as_they_are) < 0.5  # so there was something to do


def test_white_on_black_is_not_turned_round_and_known_too(known: Known, tmp_path: Path):
    plain = judge(known.model, known.test).scores()["accuracy"]
    photos = [read(saved(tmp_path / "x.png", image[0].numpy()), GREY, known.frame) for image in known.test.images]
    assert not any(photo.inverted for photo in photos)
    assert accuracy(known, [photo.image for photo in photos]) > plain - 0.06
    difference = torch.stack([photo.image for photo in photos]) - as_float(known.test.images)
    assert math.sqrt(difference.square().mean()) < 0.2
