"""Kaggle's CSV form, for MNIST and for Sign Language MNIST."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data import DataConfig, DataError, asl, kaggle_csv, load, mnist

HEADER = ",".join(["label", *(f"pixel{i + 1}" for i in range(784))])


def table(labels, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (len(labels), 785), dtype=np.uint8)
    values[:, 0] = labels
    return values


def lines(values, header: str = HEADER) -> list[str]:
    return [*([header] if header else []), *(",".join(map(str, row)) for row in values.tolist())]


def write(path, rows, end: str = "\n", last: str = "\n"):
    path.write_bytes((end.join(rows) + last).encode())
    return path


@pytest.mark.parametrize("header", [HEADER, HEADER.replace("pixel", "1x"), '"label","pixel1"', "\ufefflabel,x", ""])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_every_variant_gives_the_same_images(tmp_path, header, end, last):
    values = table([3, 0, 9])
    split = kaggle_csv.read(write(tmp_path / "a.csv", lines(values, header), end, last and end), range(10))
    assert torch.equal(split.images, torch.from_numpy(values[:, 1:]).reshape(3, 1, 28, 28))
    assert split.labels.tolist() == [3, 0, 9]
    assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)


def test_numbers_of_every_length_at_both_ends_of_a_line(tmp_path):
    values = np.zeros((256, 785), dtype=np.uint8)
    values[:, 0] = np.arange(256)
    values[:, 1] = values[:, -1] = np.arange(256)
    split = kaggle_csv.read(write(tmp_path / "a.csv", lines(values)), range(256))
    assert split.images[:, 0, 0, 0].tolist() == split.images[:, 0, 27, 27].tolist() == list(range(256))


def test_blocks_do_not_show(tmp_path, monkeypatch):
    values = table(list(range(10)) * 3)
    path = write(tmp_path / "a.csv", lines(values))
    monkeypatch.setattr(kaggle_csv, "BLOCK", 5000)
    assert torch.equal(kaggle_csv.read(path, range(10)).images.flatten(1), torch.from_numpy(values[:, 1:]))
    rows = lines(values)
    write(path, [*rows[:25], "1,2", *rows[26:]])
    with pytest.raises(DataError, match="line 26: expected 785 columns, found 2"):
        kaggle_csv.read(path, range(10))


def with_field(column: int, text: str):
    """Put a text in a column (from 1) of the third line."""

    def change(rows):
        fields = rows[2].split(",")
        fields[column - 1] = text
        return [*rows[:2], ",".join(fields), *rows[3:]]

    return change


DAMAGE = {
    "a column less": (lambda rows: [*rows[:2], rows[2].rpartition(",")[0], *rows[3:]], "line 3: expected 785 columns, found 784"),
    "a column more": (lambda rows: [*rows[:2], rows[2] + ",1", *rows[3:]], "line 3: expected 785 columns, found 786"),
    "cut off in the last line": (lambda rows: [*rows[:-1], rows[-1][:100]], "line 4: expected 785 columns, found"),
    "an empty line": (lambda rows: [*rows[:2], "", *rows[2:]], "line 3: expected 785 columns, found 0"),
    "above 255": (with_field(5, "256"), "line 3, column 5: expected a whole number from 0 to 255, found '256'"),
    "far above 255": (with_field(5, "1234567"), "line 3, column 5: .* found '1234567'"),
    "negative": (with_field(5, "-1"), "line 3, column 5: .* found '-1'"),
    "a fraction": (with_field(5, "1.5"), "line 3, column 5: .* found '1.5'"),
    "a word": (with_field(785, "x"), "line 3, column 785: .* found 'x'"),
    "a missing value": (with_field(1, ""), "line 3, column 1: .* found ''"),
    "a wrong label": (with_field(1, "77"), "line 3: the label 77 is none of 0, 1, 2"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_error_with_its_line(tmp_path, kind):
    damage, message = DAMAGE[kind]
    path = write(tmp_path / "a.csv", damage(lines(table([1, 2, 3]))))
    with pytest.raises(DataError, match=f"a.csv, {message}") as caught:
        kaggle_csv.read(path, range(10))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", HEADER + "\n"])
def test_a_file_without_images_is_refused(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=r"a.csv: holds no images"):
        kaggle_csv.read(path, range(10))


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>\n<html>\n", b"\x00" * 100_000, b"PK\x03\x04" + bytes(range(256)) * 40])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.csv"):
        kaggle_csv.read(path, range(10))


@given(
    row=st.integers(0, 2), column=st.integers(0, 784), text=st.text(st.characters(codec="ascii", exclude_characters=",\r\n"), max_size=5)
)
@settings(max_examples=60, deadline=None)
def test_any_text_in_any_field_is_read_as_its_number_or_refused(tmp_path_factory, row, column, text):
    values = table([1, 2, 3])
    rows = [line.split(",") for line in lines(values, header="")]
    rows[row][column] = text
    path = write(tmp_path_factory.getbasetemp() / "any.csv", [HEADER, *(",".join(fields) for fields in rows)])
    if text.isdigit() and len(text) <= 3 and int(text) < 256:
        values[row, column] = int(text)
        split = kaggle_csv.read(path, range(256))
        assert torch.equal(split.images.flatten(1), torch.from_numpy(values[:, 1:]))
        assert split.labels.tolist() == values[:, 0].tolist()
    else:
        with pytest.raises(DataError, match=f"line {row + 2}, column {column + 1}"):
            kaggle_csv.read(path, range(256))


def test_mnist_is_read_from_csv(root):
    train, test = table([5, 0, 4, 1], seed=1), table([7, 2], seed=2)
    (root / "mnist").mkdir()
    write(root / "mnist" / "mnist_train.csv", lines(train))
    write(root / "mnist" / "mnist_test.csv", lines(test))
    found = mnist.load(str(root))
    assert torch.equal(found.train.images.flatten(1), torch.from_numpy(train[:, 1:]))
    assert found.test.labels.tolist() == [7, 2]


@pytest.mark.parametrize("subfolder", ["", "asl"])
def test_asl_labels_become_24_letters(root, subfolder, monkeypatch):
    (root / subfolder).mkdir(exist_ok=True)
    write(root / subfolder / "sign_mnist_train.csv", lines(table(asl.LABELS)))
    write(root / subfolder / "sign_mnist_test.csv", lines(table([0, 8, 10, 24])))
    monkeypatch.setenv("LAB_DATA", str(root))
    found = load(DataConfig(name="asl"))
    assert found.train.labels.tolist() == list(range(24))
    assert "".join(found.classes) == "ABCDEFGHIKLMNOPQRSTUVWXY"
    assert [found.classes[label] for label in found.test.labels] == ["A", "I", "K", "Y"]


@pytest.mark.parametrize("label", [9, 25])
def test_asl_labels_that_no_letter_has_are_refused(root, label):
    write(root / "sign_mnist_train.csv", lines(table([1, 2, label])))
    write(root / "sign_mnist_test.csv", lines(table([1])))
    with pytest.raises(DataError, match=rf"sign_mnist_train.csv, line 4: the label {label} is none of 0, 1"):
        asl.load(str(root))


@pytest.mark.parametrize("given_root", [True, False])
def test_missing_asl_says_where_to_get_it_and_where_to_put_it(root, cache, given_root):
    write(root / "sign_mnist_train.csv", lines(table([1])))
    with pytest.raises(DataError) as caught:
        asl.load(str(root) if given_root else "")
    for part in ("account", "datamunge/sign-language-mnist", "--data.root", "sign_mnist_test.csv", str(root if given_root else cache)):
        assert part in str(caught.value)


def test_the_real_asl_rows_load(real_data):
    found = asl.load(str(real_data))
    assert (len(found.train), len(found.test)) == (250, 59)
    assert set(found.train.labels.tolist()) == set(range(24))
    assert found.classes[found.train.labels[0]] == "D"
