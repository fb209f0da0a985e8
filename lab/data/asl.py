"""Sign Language MNIST: hands that show the letters A to Y without J (and Z, which need a movement), 28 x 28 pixels."""

from __future__ import annotations

from pathlib import Path

from lab.data import files, kaggle_csv
from lab.data.imageset import DataError, ImageSet

SUBFOLDERS = ("", "asl")
CSV = ("sign_mnist_train.csv", "sign_mnist_test.csv")
LABELS = tuple(label for label in range(25) if label != 9)
"""The file counts letters from A = 0 and leaves out J = 9."""
CLASSES = tuple(chr(ord("A") + label) for label in LABELS)


def load(root: str = "") -> ImageSet:
    """The set as (1, 28, 28) images with 24 classes, from `root` alone where given, else from $LAB_DATA or the cache.

    Raises:
        DataError: a file is missing (the text says where to get it and where to put it) or damaged.
    """
    folders = files.roots(root)
    for folder in folders:
        train, test = (files.find(folder, SUBFOLDERS, [name]) for name in CSV)
        if train and test:
            return ImageSet("asl", CLASSES, kaggle_csv.read(train, LABELS), kaggle_csv.read(test, LABELS))
    raise DataError(_not_found(folders))


def _not_found(folders: list[Path]) -> str:
    places = ", ".join(str(folder / subfolder) for folder in folders for subfolder in SUBFOLDERS)
    return (
        f"no Sign Language MNIST: {' and '.join(CSV)} are not both in {places}. Kaggle gives them to people with an account: "
        "get the data set datamunge/sign-language-mnist there, unpack it, and name its folder by --data.root or LAB_DATA"
    )
