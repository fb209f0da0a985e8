"""Files that somebody else made, or that a disk damaged: every one is given to every reader, and runs nothing.

Each reader ends in its own kind of error or in what it says that it falls back to, never in another one. The canary is a file
that payloads make when they run; bombs are read by a process of their own whose memory and time are watched.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from generative import export, vae
from lab import checkpoint, curves, report, runs, sweep
from lab.checkpoint import DamagedCheckpoint
from lab.config import ConfigError, UserError, leaves, read_arguments, read_yaml, resolve
from lab.data import DataConfig, folder, idx, kaggle_csv, mnist
from lab.data.imageset import DataError
from lab.launch import launch
from lab.runs import Run
from lab.status import status
from lab.tracking import _speeds
from rl import stable_baselines

from .conftest import ROOT, command

pytestmark = pytest.mark.usefixtures("one_thread")

MEMORY = 800 << 20
"""Bytes that reading a bomb may take on top of what the process had."""
PATIENCE = 10.0
"""Seconds of work that it may take; those of a bomb that went off would be hours."""


# What strangers make


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def zipped(**members: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_pth", ".pth"), content)
    return packed.getvalue()


def saved(value: Any) -> bytes:
    packed = io.BytesIO()
    torch.save(value, packed)
    return packed.getvalue()


def lying(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """Safetensors with any header, which may say any length of itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, packed: bytes, *more: bytes) -> bytes:
    """A grey PNG that says any size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def picture(kind: str, mode: str = "L") -> bytes:
    packed = io.BytesIO()
    Image.linear_gradient("L").resize((28, 28)).convert(mode).save(packed, kind)
    return packed.getvalue()


def laughs(form: str, depth: int = 9) -> bytes:
    """Aliases of aliases: some hundred bytes that mean ten to the ninth."""
    lines = ["a0: &a0 " + form.format("x").replace("*x", "1")]
    lines += [f"a{n}: &a{n} " + form.format(f"a{n - 1}") for n in range(1, depth + 1)]
    return "\n".join(lines).encode()


MAPPING = "{{" + ", ".join(f"k{n}: *{{0}}" for n in range(10)) + "}}"
LISTING = "[" + ", ".join(["*{0}"] * 10) + "]"
ROW = ",".join(["1"] * kaggle_csv.COLUMNS)


def pickles(canary: Path) -> dict[str, bytes]:
    trap = pickle.dumps(Trap(canary), protocol=2)
    data = json.dumps({"policy_class": {":type:": "x", ":serialized:": base64.b64encode(trap).decode()}}).encode()
    return {
        "pickle": trap,
        "torch.pt": saved(Trap(canary)),
        "torch_state.pt": saved({"weight": torch.ones(3), "more": Trap(canary)}),
        "sb3_settings.zip": zipped(data=data, policy_pth=b"none"),
        "sb3_weights.zip": zipped(data=data, policy_pth=trap),
        "sb3_torch.zip": zipped(data=b"{}", policy_pth=saved(Trap(canary))),
        "yaml_apply": f"count: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]\n".encode(),
        "yaml_new": f"!!python/object/new:os.mkdir {{args: ['{canary}']}}\n".encode(),
        "yaml_eval": f"trainer: {{steps: !!python/object/apply:eval [\"open('{canary}', 'w')\"]}}\n".encode(),
        "yaml_module": b"x: !!python/module:antigravity\n",
    }


def damaged() -> dict[str, bytes]:
    """What disks, networks and other programs leave."""
    whole = safetensors_bytes({"w": torch.ones(4)})
    deep = b'{"a":' * 50_000
    return {
        "empty": b"",
        "zeros": bytes(5000),
        "ones": b"\xff" * 5000,
        "newlines": b"\n" * 500,
        "text": b"just a sentence\n",
        "utf16": "step: 1\n".encode("utf-16"),
        "controls": bytes(range(256)),
        "surrogates": b'{"step": 1, "a/\\ud800": 1, "id": "\\ud800"}\n',
        "deep_lists": b"[" * 100_000,
        "deep_maps": deep,
        "deep_closed": b"[" * 20_000 + b"]" * 20_000,
        "deep_yaml": b"{a: " * 5000,
        "cut_json": b'{"step": 1, "train/loss": 0.',
        "half_line": b'{"step": 1, "a/b": 1}\n{"step": 2',
        "null": b"null\n",
        "list": b"[1, 2]\n",
        "nan": b'{"step": NaN, "train/loss": NaN, "time": NaN, "pid": NaN, "steps_per_second": Infinity}\n',
        "inf": b'{"step": 1e999, "train/loss": -1e999, "pid": 1e999, "host": 1, "since": [], "starts": [{"time": 1e999}]}\n',
        "huge_int": b'{"step": ' + b"9" * 5000 + b', "pid": 1}\n',
        "large_int": b'{"step": 1, "mean": ' + b"9" * 4000 + b', "train/loss": ' + b"9" * 4000 + b', "starts": []}\n',
        "wrong_kinds": b'{"step": [], "train/loss": {}, "id": [], "starts": {"time": 3}, "pid": null, "host": {}, "media/x": "../../x"}\n',
        "odd_starts": b'{"id": "a", "starts": [1, null, {"time": 5, "threads": [], "processes": "9"}, {"time": "0001-01-01T00:00:00"}]}',
        "odd_media": b'{"step": 1, "media/a": "/dev/zero", "media/b": "../../../etc/passwd", "media/c": "", "media/d": "\\u0000"}\n',
        "yaml_date": b"run_cap: 2001-99-99\n",
        "yaml_bool": b"name: !!bool maybe\n",
        "yaml_time": b"a: !!timestamp x\n",
        "yaml_int": b"a: !!int x\n",
        "yaml_keys": b"? [a, b]\n: 1\n",
        "yaml_map_key": b"? {a: 1}\n: 1\n",
        "yaml_twice": b"a: 1\na: 2\n",
        "yaml_self": b"a: &a {b: *a}\n",
        "yaml_binary": b"a: !!binary x\n",
        "yaml_omap": b"a: !!omap x\n",
        "yaml_big": b"trainer: {steps: " + b"9" * 6000 + b"}\n",
        "sweep_power": b"program: x\nearly_terminate: {type: hyperband, max_iter: 9, s: 999999999}\n",
        "sweep_numbers": b"program: x\nmethod: random\nmetric: {name: a}\nparameters: {a: {min: 1, max: " + b"9" * 400 + b"}}\n",
        "csv_narrow": b"1,2,3\n",
        "csv_wide": (ROW + ",1\n").encode(),
        "csv_huge": ROW.replace("1", "9" * 400, 1).encode(),
        "csv_negative": b"-" + ROW.encode(),
        "csv_formula": (ROW[:-1] + "=cmd|' /C calc'!A0\n").encode(),
        "csv_float": ROW.replace("1", "1e3", 3).encode(),
        "csv_nul": ROW.replace("1,", "\0,", 1).encode(),
        "csv_header": b"label," + b"pixel," * 9,
        "csv_label": b"99" + ROW.encode()[1:] + b"\n",
        "idx_short": idx.header((10_000,)),
        "idx_shape": idx.header((2**32 - 1,)) + bytes(20),
        "idx_kind": b"\0\0\x0d\x01" + bytes(20),
        "idx_labels": idx.header((10_000,)) + b"\xff" * 10_000,
        "gzip": b"\x1f\x8b" + bytes(30),
        "gzip_cut": zlib.compress(bytes(99), wbits=31)[:-9],
        "st_cut": whole[:-3],
        "st_long": whole + b"more",
        "st_length": lying({}, length=2**63),
        "st_negative": lying({}, length=2**64 - 1),
        "st_offsets": lying({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        "st_overlap": lying({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}, bytes(16)),
        "st_backwards": lying({"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)),
        "st_shape": lying({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}, bytes(16)),
        "st_dtype": lying({"w": {"dtype": "PYTHON", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
        "st_header": lying(b"[" * 40_000),
        "png_cut": picture("PNG")[:200],
        "png_no_data": png(28, 28, b""),
        "png_size": png(2**31 - 1, 2**31 - 1, zlib.compress(b"")),
        "png_zero": png(0, 9, b""),
        "png_crc": picture("PNG")[:60] + b"x" + picture("PNG")[61:],
        "jpeg_cut": picture("JPEG")[:300],
        "gif_cut": picture("GIF")[:100],
        **{"bmp_lies": picture("BMP")[:18] + b"\xff\xff\xff\x7f" * 2 + picture("BMP")[26:], "gif_rubbish": b"GIF89a" + b"\xff" * 300},
        "webp_cut": picture("WEBP")[:90],
        "avif_cut": picture("AVIF", "RGB")[:250],
        "tiff": b"II*\0" + b"\xff" * 99,
        "16_bits": picture("TIFF", "F"),
        "mp4_rubbish": b"\0\0\0\x18ftypisom" + b"\xff" * 300,
        "mp4_loop": b"\0\0\0\0ftyp" * 50,
        "mp4_text": b"ftypmoov",
        "svg": b"<svg onload='alert(1)'/>",
        "zip_cut": zipped(policy_pth=bytes(999))[:50],
        "zip_other": zipped(readme=b"x"),
        "zip_slip": zipped(**{"../../escape": b"x", "policy_pth": b"x"}),
        "zip_list": zipped(policy_pth=saved([1, 2])),
        "zip_cut_pth": zipped(policy_pth=saved({"w": torch.ones(9)})[:-90]),
    }


def bombs() -> dict[str, bytes]:
    """Small files that say that they are large, or unpack to something large."""
    rows, packed = zlib.compressobj(1), zlib.compress(bytes(1 << 28), 1)
    bits = b"".join(rows.compress(bytes(1 << 20)) for _ in range(170)) + rows.flush()
    return {
        "yaml_maps": laughs(MAPPING),
        "yaml_lists": laughs(LISTING),
        "yaml_empty": laughs(MAPPING).replace(b": 1", b": {}"),
        "yaml_metric": b"metric: *a9\n".join([laughs(LISTING) + b"\n", b""]),
        "yaml_long": b"# " + b"x" * (1 << 25),
        "yaml_grid": b"program: x\nmethod: grid\nmetric: {name: a}\nparameters: {a: {min: 0, max: 999999999999}}\n",
        "yaml_grids": b"program: x\nmethod: grid\nmetric: {name: a}\nparameters:\n"
        + b"".join(b"  p%d: {min: 0, max: 9999}\n" % n for n in range(9)),
        "gzip": zlib.compress(bytes(1 << 27), 1, wbits=31),
        "png_pixels": png(13_000, 13_000, bits),
        "png_text": png(28, 28, zlib.compress(bytes(28 * 29)), chunk(b"zTXt", b"k\0\0" + packed)),
        "png_profile": png(28, 28, zlib.compress(bytes(28 * 29)), chunk(b"iCCP", b"k\0\0" + packed)),
        "zip_policy": zipped(policy_pth=bytes(stable_baselines.LARGEST_POLICY + 1)),
        "zip_nested": zipped(policy_pth=zipped(**{"archive/data.pkl": b"x", "archive/data/0": bytes(1 << 28)})),
        "line": b"1" * (1 << 26),
        "commas": b"1," * (1 << 25),
        "json_facts": b'{"starts": [' + b"[]," * (1 << 23) + b"[]]}",
    }


# What reads them: each with the errors that it says it raises


def read_idx(path: Path) -> None:
    file = mnist.FILES["test labels"]
    mnist._values(path, file)


def read_checkpoint_part(path: Path) -> None:
    """A checkpoint whose weights are the file, with checksums that are right."""
    with contextlib.suppress(shutil.Error):
        place = path.parent / f"{path.name}.checkpoints" / "step_000000001"
        forge(place, weights=path.read_bytes())
        checkpoint.load(place)


def read_checkpoint_tree(path: Path) -> None:
    place = path.parent / f"{path.name}.trees" / "step_000000001"
    forge(place, tree=path.read_bytes())
    checkpoint.load(place)


def read_manifest(path: Path) -> None:
    place = path.parent / f"{path.name}.manifests" / "step_000000001"
    forge(place)
    shutil.copy(path, place / "manifest.json")
    checkpoint.load(place)


READERS: dict[str, tuple[Callable[[Path], Any], tuple[type[Exception], ...]]] = {
    "settings": (read_yaml, (ConfigError,)),
    "sweep": (sweep.read, (UserError,)),
    "csv": (lambda path: kaggle_csv.read(path, range(10)), (DataError,)),
    "idx": (read_idx, (DataError,)),
    "photo": (lambda path: folder.decode(path, 28, True), (DataError,)),
    "picture of a report": (report.is_picture, ()),
    "film of a report": (report.is_film, ()),
    "file of SB3": (stable_baselines.read_zip, (UserError,)),
    "weights": (read_checkpoint_part, (DamagedCheckpoint,)),
    "tree": (read_checkpoint_tree, (DamagedCheckpoint,)),
    "manifest": (read_manifest, (DamagedCheckpoint,)),
    "facts": (runs.facts, ()),
    "rows": (lambda path: list(runs.recorded(path)), (UserError,)),
    "speeds": (_speeds, ()),
}


def forge(place: Path, weights: bytes | None = None, tree: bytes = b"{}", **changes: Any) -> None:
    """A checkpoint as anybody could make it: every SHA-256 in it is right."""
    place.mkdir(parents=True)
    contents = {"model.safetensors": safetensors_bytes({"w": torch.ones(2)}) if weights is None else weights, "model.json": tree}
    for name, content in contents.items():
        (place / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = {"step": 1, "notes": {"metrics_bytes": 0}, "sha256": digests, "segments": {}, **changes}
    signed = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (place / "manifest.json").write_text(json.dumps({"manifest": manifest, "sha256": signed}))


RUN_FILES = ("config.yaml", "metrics.jsonl", "timing.jsonl", "environment.json", "evaluation.json", "owner.json", "log.txt", "command.txt")
MEDIA = ("samples_000000001.png", "film.mp4", "film.gif")


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that is there if a payload ran."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def test_the_payloads_do_run_where_they_are_let(tmp_path: Path) -> None:
    made = pickles(tmp_path / "canary")
    pickle.loads(made["pickle"])
    assert (tmp_path / "canary").exists()
    (tmp_path / "canary").unlink()
    torch.load(io.BytesIO(made["torch.pt"]), weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_or_refuses_every_file_and_runs_none(reader: str, tmp_path: Path, canary: Path) -> None:
    read, errors = READERS[reader]
    said: dict[str, str] = {}
    for name, content in (pickles(canary) | damaged()).items():
        path = tmp_path / name
        path.write_bytes(content)
        try:
            read(path)
        except errors as error:
            said[name] = str(error)
        assert not canary.exists(), name
    assert not (tmp_path.parent / "escape").exists()
    assert not [name for name, text in said.items() if not 0 < len(text) < 3000]


@pytest.mark.parametrize("name", sorted({**pickles(Path("x")), **damaged()}))
def test_a_run_of_such_files_is_told_in_a_report_without_an_error(name: str, tmp_path: Path, canary: Path) -> None:
    content = (pickles(canary) | damaged())[name]
    for file in (*RUN_FILES, *(f"media/{file}" for file in MEDIA)):
        run = Run(tmp_path / file.replace("/", "-"))
        run.media.mkdir(parents=True)
        run.config.write_text("experiment: vae\ntrainer:\n  steps: 2\n")
        run.metrics.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.0}\n')
        (run.folder / file).write_bytes(content)
        status(run)
        assert isinstance(run.started, str)
        assert isinstance(run.experiment, str)
        for read in (lambda run=run: run.rows(), lambda run=run: run.identity):
            with contextlib.suppress(UserError):
                read()
        runs.note_end(run, None)
    every = [Run(folder) for folder in sorted(tmp_path.iterdir()) if folder.is_dir()]
    report.write(report.html(every), tmp_path / "report.html")
    assert runs.listing(tmp_path.parent) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "1"},
        {"step": None},
        {"notes": []},
        {"sha256": []},
        {"sha256": {"../../../etc/passwd": "x"}},
        {"sha256": {"model.json": 5, "model.safetensors": None}},
        {"segments": []},
        {"segments": {"model": [{"file": "x"}]}},
        {"segments": {"model": [1]}},
        {"segments": {"model": [{"file": "/dev/zero", "first": 0, "last": 1, "sha256": "x"}]}},
        {"segments": {"model": [{"file": "../../secret.safetensors", "first": 0, "last": 1, "sha256": "x"}]}},
        {"segments": {"model": [{"file": "x.safetensors", "first": "0", "last": 1, "sha256": "x"}]}},
    ],
)
def test_a_manifest_that_lies_with_a_right_checksum_is_a_damaged_checkpoint(changes: dict[str, Any], tmp_path: Path) -> None:
    forge(tmp_path / "checkpoints" / "step_000000001", **changes)
    with pytest.raises(DamagedCheckpoint, match=r"step_000000001|segments"):
        checkpoint.load(tmp_path / "checkpoints" / "step_000000001")
    assert checkpoint.load_newest(tmp_path / "checkpoints") is None
    assert checkpoint.noted(tmp_path / "checkpoints") is not None


@pytest.mark.parametrize(
    "tree",
    [
        *(
            b"[",
            b'{"map": 1}',
            b'{"map": [[1]]}',
            b'{"map": [[{}, 1]]}',
            b'{"tensor": "no"}',
            b'{"tensor": []}',
            b"{}",
            b'{"a": 1, "b": 2}',
        ),
        *(b'{"list": 5}', b'{"map": [' * 3000, b"[" * 50_000, b"\xff"),
    ],
)
def test_the_state_of_a_part_that_is_something_else_is_a_damaged_checkpoint(tree: bytes, tmp_path: Path) -> None:
    forge(tmp_path / "step_000000001", tree=tree)
    with pytest.raises(DamagedCheckpoint, match="model"):
        checkpoint.load(tmp_path / "step_000000001")


def test_a_device_in_the_place_of_a_file_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "step_000000001"
    forge(place)
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors"):
        checkpoint.load(place)


def test_scores_of_a_model_card_are_left_out_where_their_file_is_damaged(tmp_path: Path) -> None:
    class Loaded:
        run, step = Run(tmp_path), 5

    for content in (*damaged().values(), b'{"step": 5, "mean": NaN, "bits": ' + b"9" * 4000 + b', "protocol": {}}'):
        (tmp_path / "evaluation.json").write_bytes(content)
        assert isinstance(export.scores(Loaded()), str)  # type: ignore[arg-type]


# Bombs

BOMB = """
import json, resource, sys, time
from pathlib import Path
from tests.exact.test_files import READERS
said, folder = {}, Path(sys.argv[1])
baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(folder.iterdir()):
    before, outcome = time.process_time(), "read"
    for reader in sys.argv[2:]:
        read, errors = READERS[reader]
        try:
            read(path)
        except errors as error:
            outcome = type(error).__name__
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said[f"{reader}: {path.name}"] = [outcome, time.process_time() - before, (now - baseline) << 10]
print(json.dumps(said))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_bombs_take_little_memory_and_time(tmp_path: Path) -> None:
    (tmp_path / "bombs").mkdir()
    for name, content in bombs().items():
        (tmp_path / "bombs" / name).write_bytes(content)
    readers = ("settings", "sweep", "csv", "idx", "photo", "picture of a report", "file of SB3", "facts")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # More than it may take, so that a bomb that goes off fails here and not on the whole machine.
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))  # noqa: E731
    words = [sys.executable, "-c", BOMB, str(tmp_path / "bombs"), *readers]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, preexec_fn=limit, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    assert len(said) == len(readers) * len(bombs())
    assert not {what: cost for what, cost in said.items() if cost[1] > PATIENCE or cost[2] > MEMORY}


# Any bytes at all: how many inputs the default suite tries, and how many `-m slow` does

FEW, MANY = 200, 20_000
SEEDS: dict[str, list[bytes]] = {
    "settings": [b"experiment: vae\ntrainer:\n  steps: 10\n  lr: 1e-4\nlist: [1, 2]\nbase: x.yaml\ntext: 'a # b'\n"],
    "sweep": [path.read_bytes() for path in sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))],
    "csv": [(ROW + "\n" + ROW + "\r\n").encode()],
    "idx": [idx.header((10_000,)) + bytes(50)],
    "photo": [picture(kind, "RGB") for kind in ("PNG", "JPEG", "BMP", "WEBP", "GIF", "AVIF")],
    "file of SB3": [zipped(data=b"{}", policy_pth=saved({"w": torch.ones(2)}))],
    "weights": [safetensors_bytes({"w": torch.ones(2), "v": torch.zeros(1, dtype=torch.uint8)})],
    "tree": [b'{"map": [["w", {"tensor": "w"}], [1, {"tuple": [1, null, true]}]]}'],
    "rows": [b'{"step": 1, "train/loss": 0.5}\n{"step": 2, "media/x": "media/x.png"}\n'],
}
WORDS = [
    b"\xff",
    b"\0",
    b"\n",
    b"{",
    b"[",
    b'"',
    b"*a",
    b"&a ",
    b"!!int ",
    b": ",
    b"- ",
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"\\ud800",
    b"-",
    b"\x7f\xff\xff\xff",
]


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A few bytes changed, words put in, parts cut out or doubled."""
    text = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, end = rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)
        change = rng.randrange(5)
        if change == 0 and text:
            text[place % len(text)] = rng.randrange(256)
        elif change == 1:
            text[place:place] = rng.choice(WORDS)
        elif change == 2:
            del text[place:end]
        elif change == 3:
            text[place:place] = text[place : end + 40]
        else:
            del text[end:]
    return bytes(text)


def fuzz(reader: str, count: int, tmp_path: Path) -> None:
    (read, errors), rng, path = READERS[reader], random.Random(reader), tmp_path / "fuzzed"
    for _ in range(count):
        content = mutated(rng, rng.choice(SEEDS[reader]))
        path.write_bytes(content)
        try:
            read(path)
        except errors:
            pass
        except Exception as error:
            raise AssertionError(f"{reader}: {type(error).__name__} of {content[:300]!r}") from error
        for left in tmp_path.iterdir():
            if left.is_dir():
                shutil.rmtree(left)


@pytest.mark.parametrize("reader", SEEDS)
def test_changed_files_end_in_the_readers_own_error(reader: str, tmp_path: Path) -> None:
    fuzz(reader, FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reader", SEEDS)
def test_many_changed_files_end_in_the_readers_own_error(reader: str, tmp_path: Path) -> None:
    fuzz(reader, MANY, tmp_path)


WORD = st.text(max_size=12) | st.sampled_from(
    ["--", "---", "--a", "--image-size=", "--name=digits", "1e999", "nan", "none", "[1,2", "9" * 5000]
)
OPTION = st.sampled_from([f"--{key}" for key in leaves(DataConfig())]) | WORD


@given(argv=st.lists(OPTION | WORD, max_size=8))
@settings(max_examples=FEW, deadline=None)
def test_any_command_line_is_settings_or_a_config_error(argv: list[str]) -> None:
    arguments = read_arguments(argv)
    with contextlib.suppress(ConfigError):
        assert isinstance(resolve(DataConfig(), arguments.options).settings, DataConfig)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["step", "time", "train/loss", "media/x", "a"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(
    lines=st.lists(json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30), max_size=6), cut=st.integers(0, 9)
)
@settings(max_examples=FEW, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lines_of_metrics_are_rows_or_counted_as_damaged(tmp_path: Path, lines: list[bytes], cut: int) -> None:
    text = b"".join(line.translate(None, b"\r\n") + b"\n" for line in lines)
    run = Run(tmp_path)
    run.metrics.write_bytes(text[: len(text) - cut] if cut else text)
    run.timing.write_bytes(text)
    tail = curves.Tail(run)
    tail.update()
    assert tail.rows + tail.damaged == run.metrics.read_bytes().count(b"\n")
    tail.series()
    status(run)


@given(changes=st.dictionaries(st.sampled_from(["step", "notes", "sha256", "segments"]), json_values, max_size=2))
@settings(max_examples=FEW, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_manifest_with_a_right_checksum_is_loaded_or_a_damaged_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.rmtree(tmp_path / "step_000000001", ignore_errors=True)
    forge(tmp_path / "step_000000001", tree=b'{"map": []}', **changes)
    with contextlib.suppress(DamagedCheckpoint):
        assert isinstance(checkpoint.load(tmp_path / "step_000000001").step, int)


# Through the scripts, and secrets

KEY = "c0ffee" * 6 + "c0de"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A run that W&B recorded offline while a key was configured, in a home folder of its own, and what it printed."""
    home = tmp_path_factory.mktemp("home")
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = mine | {"WANDB_API_KEY": KEY, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    words = command("--run-dir", "run", trainer__steps="6", trainer__preview_every="6", tracking__mode="offline")
    done = subprocess.run(words, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    return home / "run", done.stdout


def test_a_key_of_wandb_is_nowhere_below_the_run_or_in_what_is_printed(tracked: tuple[Path, bytes]) -> None:
    run, printed = tracked
    written = [path for path in run.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    assert KEY.encode() not in printed


@pytest.mark.parametrize(
    ("file", "content"), [("config.yaml", laughs(MAPPING)), ("environment.json", b"{"), ("environment.json", b"[" * 90_000)]
)
def test_a_user_gets_one_sentence_and_nothing_is_touched(
    file: str, content: bytes, tracked: tuple[Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tracked[0], run)
    (run / file).write_bytes(content if file != "config.yaml" else b"experiment: vae\n" + content)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert launch(vae.EXPERIMENT, "", ["--resume", str(run), "--trainer.steps", "9", "--tracking.mode", "disabled"]) == 2
    said = capsys.readouterr().err
    assert file in said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert {
        path: content for path, content in before.items() if path.name not in ("run.lock", "command.txt", "log.txt")
    }.items() <= after.items()
