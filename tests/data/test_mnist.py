"""MNIST from files at hand: every layout and form, and one clear error for every kind of damage."""

import gzip
import hashlib
import shutil

import numpy as np
import pytest
import torch

from lab.data import DataConfig, DataError, idx, load, mnist
from tests.data.conftest import TEST, TRAIN

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def put(folder, contents) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def pixels(contents) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(contents[IMAGES][16:], np.uint8).copy()).reshape(TRAIN, 1, 28, 28)


@pytest.mark.parametrize("subfolder", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("gz", [False, True])
def test_every_layout_is_read(root, contents, subfolder, dotted, gz):
    for name, content in contents.items():
        name = (name.replace("-idx", ".idx") if dotted else name) + (".gz" if gz else "")
        put(root / subfolder, {name: gzip.compress(content) if gz else content})

    found = mnist.load(str(root))

    assert torch.equal(found.train.images, pixels(contents))
    assert found.train.labels.tolist() == list(contents[LABELS][8:])
    assert (len(found.train), len(found.test)) == (TRAIN, TEST)
    assert found.train.labels.dtype == torch.int64
    assert found.classes == tuple("0123456789")


def test_a_packed_file_without_its_ending_and_the_reverse_are_read(root, contents, packed):
    put(root, {name.removesuffix(".gz"): content for name, content in packed.items()})
    assert len(mnist.load(str(root)).train) == TRAIN
    shutil.rmtree(root)
    put(root, {f"{name}.gz": content for name, content in contents.items()})
    assert len(mnist.load(str(root)).train) == TRAIN


def test_lab_data_is_used_without_a_root(root, contents, monkeypatch):
    put(root / "mnist", contents)
    monkeypatch.setenv("LAB_DATA", str(root))
    assert len(load(DataConfig(image_size=14)).train) == TRAIN


def test_lab_data_comes_before_the_cache_and_the_cache_before_a_download(root, cache, contents, monkeypatch):
    put(cache / "mnist", contents)
    monkeypatch.setenv("LAB_DATA", str(root))
    assert len(mnist.load(mirrors=()).train) == TRAIN
    put(root, contents | {LABELS: b"wrong"})
    with pytest.raises(DataError, match=str(root)):
        mnist.load(mirrors=())


def test_an_explicit_root_without_mnist_lists_what_was_looked_for(root, cache, contents):
    put(cache / "mnist", contents)
    with pytest.raises(DataError) as caught:
        mnist.load(str(root))
    text = str(caught.value)
    for part in (str(root), "MNIST/raw", IMAGES, "t10k-labels-idx1-ubyte", "mnist_train.csv", "leave --data.root empty"):
        assert part in text


def test_a_part_of_the_files_is_named_as_such(root, contents):
    put(root, contents)
    (root / LABELS).unlink()
    with pytest.raises(DataError, match=rf"holds a part of MNIST only; {LABELS}\[.gz\] must be added"):
        mnist.load(str(root))


DAMAGE = {
    "empty": (lambda content: b"", "is truncated: expected 9,424 bytes, found 0"),
    "another format": (
        lambda content: b"\x89PNG" + content[4:],
        "is not an IDX file of 3-dimensional bytes: it starts with 89 50 4e 47, not 00 00 08 03",
    ),
    "floats": (lambda content: b"\x00\x00\x0d\x03" + content[4:], "is not an IDX file"),
    "cut in the header": (lambda content: content[:10], r"is truncated: expected 9,424 bytes, found 10"),
    "cut in the values": (lambda content: content[:-1], r"is truncated: expected 9,424 bytes, found 9,423"),
    "too long": (lambda content: content + b"\x00", r"is longer than the 9,424 bytes that it should hold"),
    "wrong shape": (lambda content: idx.header((3, 2, 2)) + bytes(12), "has the wrong shape: expected 12 x 28 x 28, found 3 x 2 x 2"),
    "turned sizes": (lambda content: idx.header((28, 28, 12)) + content[16:], "has the wrong shape"),
    "one bit": (
        lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
        r"is damaged: SHA-256 [0-9a-f]{64}, expected",
    ),
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_content_is_one_clear_error(root, contents, kind, gz):
    damage, message = DAMAGE[kind]
    if kind == "too long" and gz:
        message = "unpacks to more than the 9,424 bytes"
    wrong = damage(contents[IMAGES])
    put(root, contents)
    (root / IMAGES).unlink()
    put(root, {f"{IMAGES}.gz": gzip.compress(wrong)} if gz else {IMAGES: wrong})
    with pytest.raises(DataError, match=message) as caught:
        mnist.load(str(root))
    assert str(root / IMAGES) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "again" in str(caught.value)


def test_a_wrong_label_names_the_item(root, contents):
    put(root, contents | {LABELS: contents[LABELS][:11] + b"\x0b" + contents[LABELS][12:]})
    with pytest.raises(DataError, match="has a wrong label: item 3 is 11, a digit is 0 to 9"):
        mnist.load(str(root))


def test_images_in_the_place_of_labels_are_refused(root, contents):
    put(root, contents | {LABELS: contents[IMAGES][: len(contents[LABELS])]})
    with pytest.raises(DataError, match="is not an IDX file of 1-dimensional bytes"):
        mnist.load(str(root))


@pytest.mark.parametrize("keep", [3, 10, 100, 4000, -9, -1])
def test_a_truncated_gzip_is_one_clear_error(root, packed, keep):
    name = f"{IMAGES}.gz"
    put(root, packed | {name: packed[name][:keep]})
    with pytest.raises(DataError, match=f"{name}: is truncated: its gzip data ends early"):
        mnist.load(str(root))


@pytest.mark.parametrize("place", [3, 2000, -6])
def test_a_damaged_gzip_is_one_clear_error(root, packed, place):
    name = f"{IMAGES}.gz"
    content = bytearray(packed[name])
    content[place] ^= 0xFF
    put(root, packed | {name: bytes(content)})
    with pytest.raises(DataError, match=f"{name}: (is damaged|is truncated|is not MNIST)"):
        mnist.load(str(root))


def test_a_gzip_bomb_is_left_at_the_size_of_the_real_file(root, packed, monkeypatch):
    name = f"{IMAGES}.gz"
    put(root, packed | {name: gzip.compress(bytes(50_000_000))})
    with pytest.raises(DataError, match="unpacks to more than the 9,424 bytes that it should hold"):
        mnist.load(str(root))


def test_every_single_flipped_bit_of_a_file_is_found(root, contents):
    put(root, contents)
    content = contents[LABELS]
    for place in range(len(content)):
        put(root, {LABELS: content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]})
        with pytest.raises(DataError, match=LABELS):
            mnist.load(str(root))


def test_a_file_that_cannot_be_read_is_named(root, contents, monkeypatch):
    put(root, contents)

    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: cannot be read \(Permission denied\)"):
        mnist.load(str(root))


def test_the_real_files_load_and_one_flipped_bit_is_found(real_data, root):
    whole = mnist.load(str(real_data))
    assert (whole.train.images.shape, whole.test.images.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert whole.train.labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]

    for path in (real_data / "mnist").iterdir():
        shutil.copyfile(path, root / path.name)
    packed_file = root / f"{LABELS}.gz"
    content = bytearray(gzip.decompress(packed_file.read_bytes()))
    content[30_000] ^= 1
    packed_file.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=f"{LABELS}.*SHA-256 {hashlib.sha256(content).hexdigest()}"):
        mnist.load(str(root))
