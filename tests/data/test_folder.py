"""Anybody's images in a folder per class."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lab.data import DataConfig, DataError, folder, load


def picture(path, value=100, size=(12, 12), mode: str = "RGB", **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" or isinstance(value, tuple) else (value,) * 3).save(path, **options)


def read(root, size: int = 8, greyscale: bool = True, test_fraction: float = 0.2):
    return load(DataConfig(name="folder", root=str(root), image_size=size, greyscale=greyscale, test_fraction=test_fraction))


@pytest.fixture
def classes(root):
    """Two classes of ten flat pictures; the value of each tells which one it is."""
    for label, name in enumerate(("cat", "dog")):
        for index in range(10):
            picture(root / name / f"{index}.png", value=100 * label + index)
    return root


def test_pictures_are_read_by_class_in_order_of_name(classes):
    found = folder.load(str(classes), 8, True, 0.0)
    assert found.classes == ("cat", "dog")
    assert found.shape == (1, 8, 8)
    assert found.train.images[:, 0, 0, 0].tolist() == [*range(10), *range(100, 110)]
    assert found.train.labels.tolist() == [0] * 10 + [1] * 10
    assert found.test.images.shape == (0, 1, 8, 8)


def test_a_folder_that_is_not_here_is_looked_for_below_lab_data(classes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        read("pets")
    classes.rename(tmp_path / "store").joinpath("cat").rename(tmp_path / "store" / "tom")
    (tmp_path / "data").mkdir()
    (tmp_path / "store").rename(tmp_path / "data" / "pets")
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "data"))
    assert read("pets").classes == ("dog", "tom")
    picture(tmp_path / "pets" / "here" / "1.png")
    assert read("pets").classes == ("here",)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_split_without_a_part_is_refused(classes, fraction):
    with pytest.raises(ValueError, match="test_fraction: must lie between 0 and 1"):
        read(classes, test_fraction=fraction)


def test_the_split_is_the_same_everywhere_and_takes_a_share_of_each_class(classes, tmp_path):
    first = read(classes)
    moved = classes.rename(tmp_path / "elsewhere")
    second = read(moved)
    assert torch.equal(first.test.images, second.test.images)
    assert first.test.labels.bincount().tolist() == [2, 2]
    values = torch.cat([first.train.images, first.test.images])[:, 0, 0, 0]
    assert sorted(values.tolist()) == [*range(10), *range(100, 110)]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".bmp", ".webp"])
def test_every_format_is_read(root, suffix):
    picture(root / "a" / f"1{suffix}", value=120)
    picture(root / "a" / f"2{suffix}", value=120)
    assert (read(root).train.images.int() - 120).abs().max() <= 2


def test_colour_is_kept_or_made_grey(root):
    for name in "12":
        picture(root / "a" / f"{name}.png", value=(255, 0, 0))
    assert read(root, greyscale=False).train.images[0, :, 3, 3].tolist() == [255, 0, 0]
    assert read(root).train.images[0, :, 3, 3].tolist() == [76]


@pytest.mark.parametrize(("mode", "value"), [("L", 90), ("P", 90), ("1", 1), ("RGBA", (90, 90, 90, 255)), ("CMYK", (0, 0, 0, 100))])
def test_every_kind_of_pixel_is_read(root, mode, value):
    for name in "12":
        picture(root / "a" / (f"{name}.jpg" if mode == "CMYK" else f"{name}.png"), value=value, mode=mode)
    assert read(root, greyscale=False).shape == (3, 8, 8)


def test_a_picture_that_is_not_square_is_cropped_at_its_centre(root):
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200
    (root / "a").mkdir()
    for name in "12":
        Image.fromarray(pixels).save(root / "a" / f"{name}.png")
        Image.fromarray(pixels.transpose(1, 0, 2).copy()).save(root / "a" / f"tall{name}.png")
    assert (read(root).train.images == 200).all()


def test_shrinking_is_antialiased(root):
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    (root / "a").mkdir()
    for name in ("1.png", "2.jpg"):
        Image.fromarray(stripes).save(root / "a" / name)
    assert (read(root, size=16).train.images.int() - 128).abs().max() <= 20


def test_a_picture_is_turned_upright_as_its_camera_noted(root):
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (root / "a").mkdir()
    for name in "12":
        Image.fromarray(pixels).save(root / "a" / f"{name}.jpg", exif=exif)
    image = read(root).train.images[0, 0].float()
    assert image[:4].mean() < 10
    assert image[4:].mean() > 245


def test_files_that_are_no_pictures_and_hidden_ones_are_left_out(classes):
    (classes / "README.txt").write_text("about")
    (classes / "cat" / "notes.txt").write_text("about")
    (classes / "cat" / "._1.png").write_bytes(b"not a picture")
    (classes / ".git").mkdir()
    found = read(classes)
    assert found.classes == ("cat", "dog")
    assert len(found.train) + len(found.test) == 20


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="absent: there is no such folder"):
        read(tmp_path / "absent")


def test_a_folder_without_sub_folders_is_explained(root):
    picture(root / "1.png")
    with pytest.raises(DataError, match="has no sub-folders; put the images of each class in a sub-folder"):
        read(root)


def test_an_empty_class_is_named(classes):
    (classes / "bird").mkdir()
    with pytest.raises(DataError, match=r"bird: has no images \(.jpg"):
        read(classes)


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda content: b"<html>" + content[6:]]
)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_damaged_picture_is_named(classes, damage, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = classes / "dog" / f"broken{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"broken{suffix}: cannot be used as an image .*; replace or remove it"):
        read(classes)


def test_a_decompression_bomb_is_refused(classes):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (classes / "cat" / "bomb.png").write_bytes(content)
    with pytest.raises(DataError, match=r"bomb.png: cannot be used as an image .*decompression bomb"):
        read(classes)


def test_sixteen_bits_a_pixel_are_refused_instead_of_cut_off(classes):
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(classes / "cat" / "deep.png")
    with pytest.raises(DataError, match=r"deep.png: .*more than 8 bits"):
        read(classes)


def test_the_real_photographs_load(real_data):
    found = read(real_data / "asl_photos", size=28, test_fraction=0.1)
    assert len(found.classes) == 29
    assert (len(found.train), len(found.test)) == (5220, 580)
    assert found.test.labels.bincount().tolist() == [20] * 29
    assert 60 < found.train.images.float().mean() < 200
