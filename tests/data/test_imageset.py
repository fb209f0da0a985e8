"""Sets and splits, the way from uint8 to float and back in size, and the settings."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lab.data import AugmentConfig, DataConfig, DataError, ImageSet, Split, as_float, load
from lab.data.imageset import held_out, resize


def image_set(height: int = 6, width: int = 8) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 256, (count, 1, height, width), dtype=torch.uint8, generator=generator) for count in (7, 3)]
    return ImageSet("test", ("a", "b"), *(Split(images, torch.zeros(len(images), dtype=torch.int64)) for images in made))


def test_as_float_is_exactly_a_255th():
    values = torch.arange(256, dtype=torch.uint8)
    out = as_float(values)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.tensor([value / 255 for value in range(256)]))
    assert torch.equal((out * 255).round().byte(), values)


def test_a_set_tells_its_shape_and_moves_whole():
    whole = image_set()
    assert whole.shape == (1, 6, 8)
    assert (len(whole.train), len(whole.test)) == (7, 3)
    moved = whole.to("meta")
    assert {tensor.device.type for split in (moved.train, moved.test) for tensor in (split.images, split.labels)} == {"meta"}
    assert moved.classes == whole.classes


def test_resizing_to_the_same_size_returns_the_set_itself():
    square = image_set(8, 8)
    assert square.resized(8) is square
    assert square.resized(4).shape == (1, 4, 4)


@pytest.mark.parametrize("side", [14, 20, 56])
def test_resize_agrees_with_pillow(side):
    x = (torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 255).byte()
    peer = [np.array(Image.fromarray(image[0].numpy()).resize((side, side), Image.Resampling.BILINEAR)) for image in x]
    difference = resize(x, side).int() - torch.from_numpy(np.stack(peer)).int().unsqueeze(1)
    assert difference.abs().max() <= 1


def test_resize_is_antialiased():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 1, 28, 14)
    assert (resize(stripes, 14).int() - 128).abs().max() <= 64


def test_resize_takes_sets_larger_than_a_batch(monkeypatch):
    x = image_set().train.images
    at_once = resize(x, 5)
    monkeypatch.setattr("lab.data.imageset.RESIZE_BATCH", 3)
    assert torch.equal(resize(x, 5), at_once)


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(10, 0.2, 2), (10, 0.0, 0), (10, 1.0, 9), (3, 0.01, 1), (1, 0.5, 0), (0, 0.5, 0)]
)
def test_held_out_takes_a_share_but_never_all(count, fraction, expected):
    assert len(held_out([str(i) for i in range(count)], fraction)) == expected


def test_held_out_depends_on_the_keys_alone():
    keys = [f"{i}.jpg" for i in range(50)]
    assert held_out(keys, 0.2) == held_out(keys[::-1], 0.2)
    assert held_out(["a", "b", "c", "d", "e"], 0.4) == {"c", "d"}
    assert len(held_out(keys, 0.2) & held_out([*keys, "new.jpg"], 0.2)) >= 9


@pytest.mark.parametrize("name", ["mnist", "asl", "digits"])
def test_colour_is_refused_where_there_is_none(name):
    with pytest.raises(ValueError, match=f"greyscale: {name} has no colours"):
        DataConfig(name=name, greyscale=False)


def test_folder_needs_a_root():
    with pytest.raises(ValueError, match="root: the set 'folder' needs"):
        DataConfig(name="folder")


@pytest.mark.parametrize("wrong", [{"zoom": 1.5}, {"shift": -1.0}, {"brightness": 2.0}, {"rotation": -3.0}])
def test_augmentation_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)


@pytest.mark.parametrize("name", ["mnist", "asl"])
def test_a_root_that_is_no_folder_is_named(name, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"absent: --data.root names no folder"):
        load(DataConfig(name=name, root=str(tmp_path / "absent")))
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"absent: LAB_DATA names no folder"):
        load(DataConfig(name=name))


def test_importing_the_package_loads_nothing_heavy():
    heavy = "{'PIL', 'sklearn', 'matplotlib', 'rich', 'filelock'}"
    code = f"import sys; import lab.data; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_digits_are_real_scaled_and_split_evenly():
    digits = load(DataConfig(name="digits", image_size=8))
    assert digits.shape == (1, 8, 8)
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.images.max() == 255
    assert set(digits.train.images.unique().tolist()) <= {round(value * 255 / 16) for value in range(17)}
    shares = digits.test.labels.bincount() / torch.cat([digits.train.labels, digits.test.labels]).bincount()
    assert ((shares - 0.2).abs() < 0.01).all()


def test_digits_are_those_that_scikit_learn_gives_out():
    def rows(images, labels):
        return sorted((*image, label) for image, label in zip(images.reshape(-1, 64).tolist(), labels.tolist()))

    digits, theirs = load(DataConfig(name="digits", image_size=8)), load_digits()
    ours = rows(torch.cat([digits.train.images, digits.test.images]), torch.cat([digits.train.labels, digits.test.labels]))
    assert ours == rows((theirs.images * (255 / 16)).round().astype(int), theirs.target)


def test_digits_are_the_same_every_time_and_resized_on_request():
    first, second = load(DataConfig(name="digits")), load(DataConfig(name="digits"))
    assert first.shape == (1, 28, 28)
    assert torch.equal(first.test.images, second.test.images)
    assert torch.equal(first.train.labels, second.train.labels)


def test_a_spread_takes_evenly_spaced_images_so_some_of_every_class():
    labels = torch.arange(10).repeat_interleave(7)
    split = Split(torch.arange(70, dtype=torch.uint8).view(70, 1, 1, 1), labels)
    some = split.spread(20)
    assert len(some) == 20
    assert some.labels.bincount(minlength=10).tolist() == [2] * 10
    assert torch.equal(some.images.flatten().long() // 7, some.labels)
    assert split.spread(70) is split
    assert split.spread(1000) is split


def lettered() -> ImageSet:
    """Classes c, a and b in this order; every image shows its class's place, and the number of the image."""
    parts = []
    for count in (12, 7):
        labels = torch.arange(count) * 2 % 3
        parts.append(Split(torch.stack([labels, torch.arange(count)], 1).byte().view(count, 1, 1, 2), labels))
    return ImageSet("letters", ("c", "a", "b"), *parts)


@pytest.mark.parametrize("wanted", [("b", "c"), ("c", "b"), ("b", "c", "b")])
def test_some_classes_of_a_set_are_numbered_in_its_order_whatever_order_they_are_asked_for_in(wanted):
    whole = lettered()
    some = whole.only(wanted)
    assert (some.name, some.classes, some.shape) == ("letters", ("c", "b"), whole.shape)
    for before, after in ((whole.train, some.train), (whole.test, some.test)):
        kept = [index for index, label in enumerate(before.labels.tolist()) if label in (0, 2)]
        assert torch.equal(after.images, before.images[kept])
        assert after.labels.tolist() == [{0: 0, 2: 1}[label] for label in before.labels[kept].tolist()]
        assert after.labels.dtype == torch.int64


def test_a_class_that_a_set_lacks_is_named_with_those_it_has():
    with pytest.raises(DataError, match=r"^data\.classes: letters has no class x, C; it has c, a, b$"):
        lettered().only(["a", "x", "C"])


def test_labels_can_be_asked_for_in_any_order():
    split = lettered().train.only([2, 0])
    assert split.labels.tolist() == [{2: 0, 0: 1}[place] for place in split.images[:, 0, 0, 0].tolist()]


def test_settings_choose_classes_of_a_set():
    whole, some = load(DataConfig(name="digits", image_size=8)), load(DataConfig(name="digits", image_size=8, classes=("7", "2")))
    assert some.classes == ("2", "7")
    for before, after in ((whole.train, some.train), (whole.test, some.test)):
        assert torch.equal(after.images[after.labels == 1], before.images[before.labels == 7])
        assert torch.equal(after.images[after.labels == 0], before.images[before.labels == 2])
        assert len(after) == int(before.labels.bincount()[[2, 7]].sum())
    with pytest.raises(DataError, match=r"data\.classes: digits has no class seven; it has 0, 1, 2, 3"):
        load(DataConfig(name="digits", classes=("seven",)))


def test_settings_choose_folders_of_images(tmp_path):
    for shade, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("L", (8, 8), 10 * shade + number).save(tmp_path / name / f"{number}.png")
    some = load(DataConfig(name="folder", root=str(tmp_path), image_size=8, classes=("cat", "ant")))
    assert some.classes == ("ant", "cat")
    for part in (some.train, some.test):
        assert torch.equal(part.images[:, 0, 0, 0] // 10, 2 * part.labels)
    assert (len(some.train), len(some.test)) == (6, 2)
    with pytest.raises(DataError, match="folder has no class dog; it has ant, bee, cat"):
        load(DataConfig(name="folder", root=str(tmp_path), classes=("dog",)))
