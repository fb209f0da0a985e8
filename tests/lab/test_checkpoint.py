"""Checkpoints: what is read back is what was saved, whatever happened to the disk or the process in between."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lab import checkpoint
from lab.checkpoint import DamagedCheckpoint, folders, load, load_newest, pack, restore, save, unpack

ROOT = Path(__file__).parents[2]


class Part:
    """Any state, as it is."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def parts(number: float) -> dict[str, Part]:
    weights = {"a.weight": torch.arange(20.0).view(4, 5) * number, "b": torch.tensor(number, dtype=torch.bfloat16)}
    return {"model": Part(weights), "optimizer": Part({"state": {0: {"step": torch.tensor(number)}}, "groups": [{"betas": (0.9, number)}]})}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


def same(left, right) -> bool:
    """Equality of nested states, in types too; tensors by dtype, shape and bits."""
    if isinstance(left, torch.Tensor):
        alike = isinstance(right, torch.Tensor) and left.dtype == right.dtype and left.shape == right.shape
        return alike and (left.numel() == 0 or as_bytes(left).equal(as_bytes(right)))
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return (
            list(left) == list(right) and [type(k) for k in left] == [type(k) for k in right] and all(same(left[k], right[k]) for k in left)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


# Taking apart and putting together

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensor = torch.randint(0, 100, shape, generator=numbers).to(draw(st.sampled_from(DTYPES)))
    form = draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "channels_last"]))
    if form == "transposed":
        return tensor.movedim(0, -1) if tensor.dim() > 1 else tensor
    if form == "strided":
        return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor
    if form == "expanded":
        return tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor.to(memory_format=torch.channels_last) if form == "channels_last" and tensor.dim() == 4 else tensor


plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=("Cs",)), max_size=5)
)
keys = st.sampled_from(["a", "b", "a.b", "", "tensor", "map", "list", ".", "a."]) | st.integers(-2, 3)
states = st.recursive(
    plain | tensors(),
    lambda inner: st.dictionaries(keys, inner, max_size=4) | st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=12,
)


@given(state=st.dictionaries(keys, states, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_nested_state_comes_back_bit_for_bit(tmp_path_factory, state):
    file = tmp_path_factory.getbasetemp() / "packed.safetensors"
    packed = {}
    tree = json.loads(json.dumps(pack(state, packed)))
    save_file(packed, file)
    assert same(unpack(tree, load_file(file)), state)


def test_tensors_whose_paths_read_alike_do_not_overwrite_each_other():
    state = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)}
    packed = {}
    assert same(unpack(pack(state, packed), packed), state)


def test_tied_tensors_and_views_of_one_memory_are_saved_in_full(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    state = {"encoder": weight, "decoder": weight, "transposed": weight.T, "row": weight[1]}
    save(tmp_path, 1, {"model": Part(state)}, {}, 2)
    assert same(load(tmp_path / "step_000000001").parts["model"], state)


def test_what_is_packed_is_a_copy_that_later_updates_do_not_touch():
    weight, packed = torch.zeros(3), {}
    pack({"w": weight}, packed)
    weight += 1
    assert packed["w"].equal(torch.zeros(3))


def test_what_is_loaded_does_not_depend_on_its_file(tmp_path):
    save(tmp_path, 1, parts(2.0), {}, 2)
    found = load(tmp_path / "step_000000001")
    for path in (tmp_path / "step_000000001").iterdir():
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert same(found.parts["model"], parts(2.0)["model"].state)


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", 1j, torch.float32])
def test_a_state_that_would_need_a_pickle_is_refused_by_its_path(value):
    with pytest.raises(TypeError, match=r"cannot hold a\.0\.x: "):
        pack({"a": [{"x": value}]}, {})


# Saving and loading


def test_step_notes_and_parts_come_back(tmp_path):
    notes = {"metrics_bytes": 12, "facts": {"shape": [1, 28, 28], "loss": 1.5, "text": "é"}}
    assert save(tmp_path / "new" / "checkpoints", 7, parts(3.0), notes, 2) == tmp_path / "new" / "checkpoints" / "step_000000007"
    found = load_newest(tmp_path / "new" / "checkpoints")
    assert (found.step, found.notes) == (7, notes)
    assert same(found.parts, {name: part.state for name, part in parts(3.0).items()})
    only = load_newest(tmp_path / "new" / "checkpoints", only=["model"])
    assert list(only.parts) == ["model"]


def test_nothing_saved_yet_is_none(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing") is None


def test_the_newest_ones_are_kept(tmp_path):
    for step in (1, 5, 10, 100):
        save(tmp_path, step, parts(step), {}, keep=3)
    assert [path.name for path in folders(tmp_path)] == ["step_000000100", "step_000000010", "step_000000005"]


def test_damaged_later_checkpoints_never_push_out_whole_ones(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, parts(step), {}, keep=3)
    for step in (20, 30):
        (tmp_path / f"step_{step:09d}" / "model.json").unlink()
    assert load_newest(tmp_path).step == 10
    save(tmp_path, 15, parts(15.0), {}, keep=2)
    assert [load(folder).step for folder in folders(tmp_path)] == [15, 10]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    folder = save(tmp_path, 1, parts(1.0), {}, 2)
    (folder / "model.json").write_text("")
    save(tmp_path, 1, parts(2.0), {}, 2)
    assert same(load(folder).parts["model"], parts(2.0)["model"].state)


def test_what_a_killed_save_left_is_not_loaded_and_is_removed_by_the_next_one(tmp_path):
    save(tmp_path, 1, parts(1.0), {}, 2)
    shutil.copytree(tmp_path / "step_000000001", tmp_path / ".step_000000002.4242")
    assert load_newest(tmp_path).step == 1
    save(tmp_path, 3, parts(3.0), {}, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000001", "step_000000003"]


def test_everything_is_on_the_disk_before_the_rename_that_commits_it(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor):
        fsync(descriptor)
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve())

    def watched_rename(source, target):
        assert {*Path(source).iterdir(), Path(source)} <= set(done)
        rename(source, target)
        done.append("renamed")

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    save(tmp_path.resolve(), 1, parts(1.0), {}, 2)
    assert done[-2:] == ["renamed", tmp_path.resolve()]


# Resuming


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    return layers.to(memory_format=torch.channels_last)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(images).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_resumed_training_is_bit_identical_to_one_that_was_never_interrupted(tmp_path, kind):
    def create(module):
        if kind == "adamw":
            return torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
        return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, fused=True)

    whole = network()
    optimizer = create(whole)
    train(whole, optimizer, 0, 3)
    save(tmp_path, 3, {"model": whole, "optimizer": optimizer}, {}, 2)
    train(whole, optimizer, 3, 6)

    resumed = network()
    fresh = create(resumed)
    restore({"model": resumed, "optimizer": fresh}, load_newest(tmp_path).parts)
    train(resumed, fresh, 3, 6)
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert same(fresh.state_dict()["state"], optimizer.state_dict()["state"])


def test_other_parts_and_other_shapes_are_named(tmp_path):
    small, large = nn.Linear(2, 2), nn.Linear(2, 3)
    with pytest.raises(ValueError, match="the checkpoint holds ema, model; this experiment has model, optimizer"):
        restore({"model": small, "optimizer": Part({})}, {"model": small.state_dict(), "ema": {}})
    with pytest.raises(ValueError, match=r"^'critic' does not fit [^\n]*size mismatch for weight[^\n]*$"):
        restore({"critic": small}, {"critic": large.state_dict()})
    with pytest.raises(ValueError, match=r"^'critic' does not fit [^\n]*Missing key[^\n]*$"):
        restore({"critic": nn.Sequential(small)}, {"critic": small.state_dict()})


def test_an_optimiser_of_other_weights_is_named():
    small, large = torch.optim.AdamW(nn.Linear(2, 2).parameters()), torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="'optimizer' does not fit"):
        restore({"optimizer": small}, {"optimizer": large.state_dict()})


# Damage

FILES = ["manifest.json", "model.json", "model.safetensors", "optimizer.json", "optimizer.safetensors"]


@pytest.fixture
def two(tmp_path):
    """The newest of two checkpoints in one folder."""
    save(tmp_path, 1, parts(1.0), {"metrics_bytes": 10}, 2)
    return save(tmp_path, 2, parts(2.0), {"metrics_bytes": 20}, 2)


def assert_passed_over(folder: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match=folder.name):
        load(folder)
    found = load_newest(folder.parent)
    assert (found.step, found.notes) == (1, {"metrics_bytes": 10})
    assert same(found.parts["model"], parts(1.0)["model"].state)


def test_the_files_of_a_checkpoint_are_the_ones_damaged_below(two):
    assert sorted(path.name for path in two.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_single_flipped_bit_anywhere_is_noticed(two, name):
    whole, dice = (two / name).read_bytes(), random.Random(name)
    places = sorted({0, len(whole) - 1, *(index * len(whole) // 60 for index in range(60))})
    assert len(places) >= 50
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        (two / name).write_bytes(damaged)
        assert_passed_over(two)
    (two / name).write_bytes(whole)
    assert load_newest(two.parent).step == 2


@pytest.mark.parametrize("name", FILES)
def test_files_cut_short_emptied_grown_missing_or_replaced_are_noticed(two, name):
    whole = (two / name).read_bytes()
    for content in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\x00", whole * 2):
        (two / name).write_bytes(content)
        assert_passed_over(two)
    (two / name).unlink()
    assert_passed_over(two)
    (two / name).mkdir()
    assert_passed_over(two)
    (two / name).rmdir()
    (two / name).symlink_to("nowhere")
    assert_passed_over(two)


def test_extra_files_folders_and_an_empty_checkpoint_are_noticed(two):
    (two / "extra.json").write_text("{}")
    assert_passed_over(two)
    (two / "extra.json").unlink()
    (two / "folder").mkdir()
    assert_passed_over(two)
    shutil.rmtree(two)
    two.mkdir()
    assert_passed_over(two)


def test_files_of_another_checkpoint_are_noticed(two):
    shutil.copy(two.parent / "step_000000001" / "model.safetensors", two)
    assert_passed_over(two)


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '{"manifest": {}, "sha256": 3}', '{"manifest": [], "sha256": "x"}', "\ufeff{}", "[" * 99]
)
def test_a_manifest_that_is_something_else_is_noticed(two, content):
    (two / "manifest.json").write_text(content)
    assert_passed_over(two)


def test_a_damaged_checkpoint_is_warned_of_by_its_file(two, caplog, monkeypatch):
    monkeypatch.setattr(checkpoint.log, "propagate", True)
    (two / "model.safetensors").write_bytes(b"")
    load_newest(two.parent)
    assert str(two / "model.safetensors") in caplog.text


# Full disks and crashes

PREAMBLE = """
import json, os, resource, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lab import checkpoint

class Part:
    def __init__(self, state):
        self.state = state
    def state_dict(self):
        return self.state

def parts(number, size=1000):
    return {"model": Part({"w": torch.full((size,), float(number))}), "trainer": Part({"step": number})}

root = Path(sys.argv[1])
"""


def run(script: str, *words: str | Path) -> dict:
    """What a script of another process prints as its last line."""
    code = PREAMBLE + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_disk_that_refuses_more_leaves_the_older_checkpoints_and_nothing_half_written(tmp_path):
    found = run(
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for step in (1, 2):
            checkpoint.save(root, step, parts(step), {}, keep=2)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        errors = []
        for limit in (0, 50, 500, 3000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                checkpoint.save(root, 3, parts(3), {}, keep=2)
            except OSError as error:
                errors.append(str(error))
        names = sorted(path.name for path in root.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        checkpoint.save(root, 4, parts(4), {}, keep=2)
        print(json.dumps({"errors": errors, "names": names}))
        """,
        tmp_path,
    )
    assert len(found["errors"]) == 4
    assert found["names"] == ["step_000000001", "step_000000002"]
    assert [load(folder).step for folder in folders(tmp_path)] == [4, 2]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one mebibyte; only root may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_the_older_checkpoints_and_nothing_half_written(small_disk):
    large = {"model": Part({"w": torch.ones(100_000)})}
    for step in (1, 2):
        save(small_disk, step, large, {}, 2)
    for _ in range(3):
        with pytest.raises(OSError, match=r"model\.safetensors"):
            save(small_disk, 3, large, {}, 2)
        assert sorted(path.name for path in small_disk.iterdir()) == ["step_000000001", "step_000000002"]
    assert [load(folder).step for folder in folders(small_disk)] == [2, 1]


def test_a_crash_before_and_after_every_operation_of_a_save_leaves_a_whole_newest_checkpoint(tmp_path):
    """The process ends at the k-th thing that a save asks of the system, for every k; audit events find them all."""
    found = run(
        """
        import lab.checkpoint as module

        base = root / "base"
        for step in (1, 2):
            checkpoint.save(base, step, parts(step), {}, keep=2)
        stop, count, names, armed = [-1], [0], [], [False]

        def point(name):
            if not armed[0]:
                return
            if count[0] == stop[0]:
                os._exit(9)
            count[0] += 1
            names.append(name)

        watched = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "os.scandir"}
        sys.addaudithook(lambda event, arguments: point(event) if event in watched else None)

        def around(name, function):
            def call(*arguments, **options):
                point(f"before {name}")
                result = function(*arguments, **options)
                point(f"after {name}")
                return result
            return call

        def is_whole(folder):
            try:
                return bool(checkpoint.verify(folder))
            except checkpoint.DamagedCheckpoint:  # an old one that was being deleted
                return False

        def half_saved(tensors, path):
            real_save(tensors, path)
            if armed[0] and count[0] == stop[0]:
                os.truncate(path, os.path.getsize(path) // 2)
            point("inside save_file")

        real_save = module.save_file
        module.save_file = around("save_file", half_saved)
        os.fsync, os.rename = around("fsync", os.fsync), around("rename", os.rename)

        def attempt(place):
            armed[0] = True
            checkpoint.save(place, 3, parts(3), {}, keep=2)
            armed[0] = False

        shutil.copytree(base, root / "whole")
        attempt(root / "whole")
        total, all_names = count[0], list(names)
        bad, newest = [], []
        for index in range(total + 1):
            place = root / "crash"
            shutil.copytree(base, place)
            child = os.fork()
            if child == 0:
                stop[0], count[0] = index, 0
                attempt(place)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            found = checkpoint.load_newest(place)
            right = found and found.parts["trainer"]["step"] == found.step and bool((found.parts["model"]["w"] == found.step).all())
            whole = [folder for folder in checkpoint.folders(place) if is_whole(folder)]
            checkpoint.save(place, 4, parts(4), {}, keep=2)
            left = [path.name for path in place.iterdir() if path.name.startswith(".")]
            if not right or len(whole) < 2 or left or status != (9 if index < total else 0):
                bad.append([index, status, all_names[index:index + 1], found and found.step, left])
            newest.append(found.step if found else 0)
            shutil.rmtree(place)
        print(json.dumps({"bad": bad, "newest": newest, "names": all_names}))
        """,
        tmp_path,
    )
    assert found["bad"] == []
    committed = found["names"].index("after rename")
    assert found["newest"] == [2] * committed + [3] * (len(found["names"]) + 1 - committed)
    counts = {name: found["names"].count(name) for name in found["names"]}
    assert counts["before fsync"] == counts["after fsync"] == 7  # five files, their folder, and the folder above
    assert counts["before save_file"] == 2
    assert counts["os.rmdir"] == 1
    assert counts["os.remove"] == 5


def test_the_state_of_a_part_is_not_changed_by_saving_it(tmp_path):
    held = parts(1.0)
    before = copy.deepcopy({name: part.state for name, part in held.items()})
    save(tmp_path, 1, held, {}, 2)
    assert same({name: part.state for name, part in held.items()}, before)


def test_a_resumed_optimizer_keeps_its_moments_and_takes_the_settings_of_now():
    weight = torch.nn.Parameter(torch.ones(3))
    before = torch.optim.AdamW([weight], betas=(0.9, 0.999), weight_decay=0.0)
    weight.sum().backward()
    before.step()
    tensors: dict = {}
    state = unpack(json.loads(json.dumps(pack(before.state_dict(), tensors))), tensors)
    after = torch.optim.AdamW([weight], betas=(0.5, 0.9), weight_decay=0.1)
    restore({"optimizer": after}, {"optimizer": state})
    assert after.param_groups[0]["betas"] == (0.5, 0.9)
    assert after.param_groups[0]["weight_decay"] == 0.1
    assert after.state[weight]["exp_avg"].equal(before.state[weight]["exp_avg"])
    with pytest.raises(ValueError, match="another kind of optimiser"):
        restore({"optimizer": torch.optim.SGD([weight])}, {"optimizer": state})
