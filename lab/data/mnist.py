"""MNIST: 60,000 + 10,000 handwritten digits of 28 x 28 pixels, from files at hand or from a mirror."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lab.data import files, idx, kaggle_csv
from lab.data.imageset import DataError, ImageSet, Split

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)
SUBFOLDERS = ("", "mnist", "MNIST/raw")
"""Where the files may lie below a root; the last is torchvision's place."""
CSV = ("mnist_train.csv", "mnist_test.csv")
CLASSES = 10


@dataclass(frozen=True)
class IdxFile:
    """One of the four files: its name, shape, and the SHA-256 of its unpacked content."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the file goes by, plain or packed."""
        dotted = self.name.replace("-idx", ".idx")
        return self.name, f"{self.name}.gz", dotted, f"{dotted}.gz"


FILES = {
    "train images": IdxFile(
        "train-images-idx3-ubyte", (60_000, 28, 28), "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train labels": IdxFile("train-labels-idx1-ubyte", (60_000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "test images": IdxFile("t10k-images-idx3-ubyte", (10_000, 28, 28), "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "test labels": IdxFile("t10k-labels-idx1-ubyte", (10_000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}


def load(root: str = "", mirrors: Sequence[str] | None = None) -> ImageSet:
    """MNIST as (1, 28, 28) images, from `root` alone where given, else from $LAB_DATA, the cache, or a download.

    Args:
        root: a folder with the files; it is never written to, and given one, nothing is downloaded.
        mirrors: addresses to download from, tried in order; `MIRRORS` where not given.

    Raises:
        DataError: the files are missing, incomplete, damaged or another set's, or no mirror can be reached.
    """
    for folder in files.roots(root):
        if at_hand := _at_hand(folder):
            return at_hand
    if root:
        raise DataError(_not_found(root))
    return _from_idx(_download(MIRRORS if mirrors is None else mirrors))


def _at_hand(folder: Path) -> ImageSet | None:
    """The set from the four IDX files below a folder, or else from the two CSV files; None where neither is there."""
    places = {key: files.find(folder, SUBFOLDERS, file.names) for key, file in FILES.items()}
    found = {key: path for key, path in places.items() if path}
    if len(found) == len(FILES):
        return _from_idx(found)
    train, test = (files.find(folder, SUBFOLDERS, [name]) for name in CSV)
    if train and test:
        return _image_set(kaggle_csv.read(train, range(CLASSES)), kaggle_csv.read(test, range(CLASSES)))
    if found and folder != files.cache_folder():  # in the cache, a download that was broken off goes on
        missing = ", ".join(f"{file.name}[.gz]" for key, file in FILES.items() if key not in found)
        raise DataError(f"{folder}: holds a part of MNIST only; {missing} must be added")
    return None


def _not_found(root: str) -> str:
    places = ", ".join(str(Path(root, subfolder)) for subfolder in SUBFOLDERS)
    names = ", ".join(f"{file.name}[.gz]" for file in FILES.values())
    return f"no MNIST in {places}: looked for {names}, or {' and '.join(CSV)}; leave --data.root empty to download it"


def _download(mirrors: Sequence[str]) -> dict[str, Path]:
    """The four files in the cache; those that are missing are fetched, by one process while others wait for it."""
    from filelock import FileLock

    from lab.data.download import fetch

    folder = files.cache_folder() / "mnist"
    paths = {key: folder / file.name for key, file in FILES.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for key, file in FILES.items():
                if not paths[key].is_file():
                    fetch(f"{file.name}.gz", mirrors, paths[key], idx.size(file.shape), file.sha256)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); DREAMPLAY_CACHE can name another folder for downloads") from None
    except DataError as error:
        advice = "Give a folder with the files by LAB_DATA or --data.root, or use the digits that need no download: --data.name digits"
        raise DataError(f"{error}\n{advice}") from None
    return paths


def _from_idx(paths: Mapping[str, Path]) -> ImageSet:
    values = {key: _values(paths[key], file) for key, file in FILES.items()}
    train, test = (Split(values[f"{part} images"].unsqueeze(1), values[f"{part} labels"].long()) for part in ("train", "test"))
    return _image_set(train, test)


def _image_set(train: Split, test: Split) -> ImageSet:
    return ImageSet("mnist", tuple(map(str, range(CLASSES))), train, test)


def _values(path: Path, file: IdxFile) -> Tensor:
    """The values of one file, uint8 of its shape, checked from the header to the last bit."""
    content = files.read(path, limit=idx.size(file.shape))
    try:
        values = idx.parse(content, file.shape)
        if len(file.shape) == 1 and int(values.max()) >= CLASSES:
            place = int(values.argmax())
            raise ValueError(f"has a wrong label: item {place} is {int(values[place])}, a digit is 0 to 9")
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256:
            raise ValueError(f"is not MNIST's {file.name} or is damaged: SHA-256 {found}, expected {file.sha256}")
    except ValueError as error:
        raise DataError(f"{path}: {error}; delete it and get it again") from None
    return values
