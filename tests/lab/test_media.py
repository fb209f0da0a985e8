"""Pictures: every pixel is where it should be, and files hold what was drawn."""

import itertools
import math
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
from collections.abc import Iterable
from pathlib import Path

import imageio_ffmpeg
import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lab.config import UserError
from lab.media import Film, above, grid, picture, plot_rows, save_gif, save_png, to_uint8

ROOT = Path(__file__).parents[2]


def images(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(count))


def pixels(path) -> torch.Tensor:
    """A picture file as (C, H, W) numbers, read by Pillow one pixel at a time."""
    with Image.open(path) as file:
        bands = len(file.getbands())
        values = [file.getpixel((x, y)) for y in range(file.height) for x in range(file.width)]
        return torch.tensor(values, dtype=torch.uint8).view(file.height, file.width, bands).movedim(-1, 0)


@given(
    count=st.integers(1, 11),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    columns=st.none() | st.integers(1, 12),
    padding=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_a_grid_has_every_image_in_its_place_and_the_ground_everywhere_else(count, channels, height, width, columns, padding):
    given_images = images(count, channels, height, width)
    found = grid(given_images, columns, padding)
    across = columns or math.ceil(math.sqrt(count))
    down = -(-count // across)
    assert found.shape == (channels, down * height + (down + 1) * padding, across * width + (across + 1) * padding)
    for channel, y, x in itertools.product(*map(range, found.shape)):
        row, in_row = divmod(y - padding, height + padding)
        column, in_column = divmod(x - padding, width + padding)
        index = row * across + column
        inside = y >= padding <= x and in_row < height and in_column < width and column < across and index < count
        expected = given_images[index, channel, in_row, in_column] if inside else torch.tensor(0.2)
        assert found[channel, y, x] == expected


def test_a_grid_takes_images_that_carry_gradients_or_half_precision():
    values = images(4, 1, 2, 2).bfloat16().requires_grad_()
    assert grid(values).dtype == torch.float32
    assert not grid(values).requires_grad


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_gives_back_every_grey_value_exactly(tmp_path, channels):
    values = torch.stack([torch.arange(256).roll(7 * channel) for channel in range(channels)]).view(channels, 16, 16)
    path = tmp_path / "deep" / "er" / "x.png"
    save_png(path, values / 255, scale=1)
    with Image.open(path) as file:
        assert file.mode == ("L" if channels == 1 else "RGB")
    assert pixels(path).equal(values.to(torch.uint8))


def test_a_scaled_picture_repeats_every_pixel(tmp_path):
    values = images(1, 3, 3, 5)[0]
    save_png(tmp_path / "x.png", values, scale=3)
    expected = to_uint8(values).repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert pixels(tmp_path / "x.png").equal(expected)


def test_eight_bit_values_are_rounded_and_clipped():
    values = torch.tensor([-1.0, -0.001, 0.0, 0.5 / 255 + 1e-6, 0.499 / 255, 0.5, 254.6 / 255, 1.0, 7.0, math.inf, -math.inf])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 0, 128, 255, 255, 255, 255, 0]


def test_a_picture_does_not_depend_on_the_layout_in_memory():
    values = images(2, 3, 4, 6).to(memory_format=torch.channels_last)[1]
    assert picture(values).tobytes() == picture(values.contiguous()).tobytes()


@pytest.mark.parametrize(("count", "seconds"), [(1, 1.0), (7, 3.0), (60, 2.0), (24, 1.0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_has_all_its_frames_and_lasts_as_long_as_asked(tmp_path, count, seconds, channels):
    frames = [torch.full((channels, 4, 5), index / max(1, count - 1)) for index in range(count)]
    save_gif(tmp_path / "new" / "x.gif", frames, seconds, scale=2)
    with Image.open(tmp_path / "new" / "x.gif") as file:
        assert file.n_frames == count
        assert file.size == (10, 8)
        assert file.info.get("loop") == (0 if count > 1 else file.info.get("loop"))
        lasted, shown = 0, []
        for index in range(count):
            file.seek(index)
            lasted += file.info["duration"]
            shown.append(file.convert("RGB").getpixel((3, 3)))
    assert lasted == 1000 * seconds
    wanted = [tuple(picture(frame).convert("RGB").getpixel((0, 0))) for frame in frames]
    assert all(abs(a - b) <= 1 for one, other in zip(shown, wanted, strict=True) for a, b in zip(one, other, strict=True))


def test_no_frame_of_a_gif_is_shorter_than_viewers_can_show(tmp_path):
    save_gif(tmp_path / "x.gif", [torch.full((1, 2, 2), index / 99) for index in range(100)], 0.5)
    with Image.open(tmp_path / "x.gif") as file:
        for index in range(100):
            file.seek(index)
            assert file.info["duration"] == 20


def test_a_still_stretch_of_a_gif_keeps_its_time(tmp_path):
    black, white = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    save_gif(tmp_path / "x.gif", [black, black, black, white], 2.0)
    with Image.open(tmp_path / "x.gif") as file:
        durations = []
        for index in range(file.n_frames):
            file.seek(index)
            durations.append(file.info["duration"])
    assert sum(durations) == 2000
    assert durations[-1] == 500


PLOTS = {
    "one row": [{"step": 1, "train/loss": 2.0, "eval/loss": 3.0}],
    "NaN rows": [{"step": step, "train/loss": math.nan if step % 3 else 1.0 / step, "eval/loss": math.nan} for step in range(1, 60)],
    "infinite rows": [{"step": step, "train/loss": math.inf if step < 30 else float(step), "eval/loss": -math.inf} for step in range(60)],
    "constant": [{"step": step, "train/loss": 1.0, "eval/loss": 1.0} for step in range(50)],
    "rows that lack a key": [{"step": step, ("eval/loss" if step % 5 else "train/loss"): float(step)} for step in range(50)],
    "integers of any size": [{"step": 10**12 + step, "train/loss": 10**15, "eval/loss": -step} for step in range(20)],
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_of_unusual_rows_is_still_a_picture(tmp_path, name):
    plot_rows(tmp_path / "media" / "x.png", PLOTS[name], ["eval/loss", "train/loss"], name)
    drawn = matplotlib.image.imread(tmp_path / "media" / "x.png")
    assert drawn.shape[0] > 100
    assert drawn.std() > 0.01


def test_metrics_that_share_a_name_share_a_panel(tmp_path):
    rows = [{"step": step, "train/loss": 1.0, "eval/loss": 2.0, "train/kl": 3.0} for step in range(3)]
    plot_rows(tmp_path / "one.png", rows, ["train/loss", "eval/loss"], "one")
    plot_rows(tmp_path / "two.png", rows, ["train/loss", "eval/loss", "train/kl"], "two")
    one, two = (matplotlib.image.imread(tmp_path / f"{name}.png").shape for name in ("one", "two"))
    assert (two[0], two[1]) == (one[0], 2 * one[1])


def scenes(count: int, height: int, width: int) -> np.ndarray:
    """Pictures of flat colours: a square that moves over a ground, on large tiles that H.264 keeps apart."""
    found = np.full((count, height, width, 3), (40, 90, 160), dtype=np.uint8)
    for index, scene in enumerate(found):
        scene[: height // 2, : width // 2] = (200, 72, 72)
        left = 2 * index % (width - 8)
        scene[-12:-4, left : left + 8] = (236, 236, 60)
    return found


def written(path: Path, rate: float, pictures: Iterable[np.ndarray]) -> Path:
    with Film(path, rate) as film:
        for scene in pictures:
            film.add(scene)
    return path


def decoded(path: Path) -> tuple[dict, np.ndarray]:
    """What ffmpeg says of an .mp4, and its pictures."""
    frames = imageio_ffmpeg.read_frames(str(path))
    about = next(frames)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])


def shown(path: Path) -> tuple[np.ndarray, list[int]]:
    """The pictures of a .gif and how many milliseconds each is shown."""
    with Image.open(path) as file:
        assert file.info["loop"] == 0
        found = []
        for index in range(file.n_frames):
            file.seek(index)
            found.append((np.asarray(file.convert("RGB")), file.info["duration"]))
    return np.stack([frame for frame, _ in found]), [duration for _, duration in found]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 96), (64, 95), (63, 95)])
@pytest.mark.parametrize("rate", [12.5, 30])
def test_an_mp4_has_every_picture_its_rate_and_its_colours(tmp_path, height, width, rate):
    pictures = scenes(25, height, width)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = written(tmp_path / "new" / "x.mp4", rate, pictures)
    about, found = decoded(path)
    assert (about["codec"], about["pix_fmt"].partition("(")[0], about["fps"]) == ("h264", "yuv420p", rate)
    assert imageio_ffmpeg.count_frames_and_secs(str(path)) == (25, pytest.approx(25 / rate, abs=0.01))
    assert found.shape == (25, height + height % 2, width + width % 2, 3)
    errors = np.abs(found[:, :height, :width].astype(int) - pictures)
    assert errors.mean() < 3
    assert np.median(errors) <= 1
    assert np.abs(found[:, :height, -1].astype(int) - pictures[:, :, -1]).mean() < 4
    assert np.abs(found[:, -1, :width].astype(int) - pictures[:, -1]).mean() < 4
    assert [item.name for item in path.parent.iterdir()] == ["x.mp4"]


def test_an_mp4_begins_with_its_table_of_contents(tmp_path):
    content = written(tmp_path / "x.mp4", 30, scenes(5, 32, 32)).read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (210, 160)])
def test_one_picture_is_a_film_whatever_its_size(tmp_path, suffix, size):
    path = written(tmp_path / f"x{suffix}", 30, np.full((1, *size, 3), 200, dtype=np.uint8))
    found = decoded(path)[1] if suffix == ".mp4" else matplotlib.image.imread(path)[None, :, :, :3]
    assert np.abs(found[0, : size[0], : size[1]].astype(int) - 200).max() <= 2


@pytest.mark.parametrize("rate", [5, 12.5, 15, 30, 50])
def test_an_animation_keeps_every_colour_and_its_time(tmp_path, rate):
    pictures = scenes(40, 45, 65)
    frames, durations = shown(written(tmp_path / "x.gif", rate, pictures))
    assert np.array_equal(frames, pictures)
    assert set(durations) <= {10 * math.floor(100 / rate), 10 * math.ceil(100 / rate)}
    assert sum(durations) == pytest.approx(1000 * 40 / rate, abs=10)
    assert [item.name for item in tmp_path.iterdir()] == ["x.gif"]


def test_an_animation_is_never_faster_than_viewers_show(tmp_path):
    frames, durations = shown(written(tmp_path / "x.gif", 240, scenes(10, 32, 32)))
    assert len(frames) == 10
    assert set(durations) == {20}


def test_an_animation_with_too_many_colours_takes_near_ones(tmp_path):
    ramp = np.stack(np.meshgrid(np.arange(0, 256, 4), np.arange(0, 256, 4), [128]), -1).reshape(1, 64, 64, 3).astype(np.uint8)
    frames, _ = shown(written(tmp_path / "x.gif", 10, np.concatenate([ramp, ramp[:, ::-1]])))
    assert np.abs(frames[0].astype(int) - ramp[0]).mean() < 8


def test_still_pictures_of_an_animation_keep_their_time(tmp_path):
    _, durations = shown(written(tmp_path / "x.gif", 10, np.repeat(scenes(2, 32, 32), [7, 3], axis=0)))
    assert sum(durations) == 1000


def test_pictures_may_lie_in_memory_as_they_like(tmp_path):
    pictures = scenes(4, 32, 48)
    turned = np.asfortranarray(pictures[:, ::-1])[:, ::-1]
    assert not turned[0].flags.c_contiguous
    assert np.array_equal(shown(written(tmp_path / "x.gif", 10, turned))[0], pictures)


@pytest.mark.parametrize("name", ["a:b %03d.mp4", "-x.GIF", "with space.MP4"])
def test_a_film_may_have_any_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert written(Path("file:x", name), 10, scenes(2, 16, 16)).stat().st_size > 100


@pytest.mark.parametrize("name", ["x.avi", "x", "x.png"])
def test_another_suffix_is_named_with_those_that_do(tmp_path, name):
    with pytest.raises(UserError, match=r"use \.mp4 or \.gif"):
        Film(tmp_path / "new" / name, 30)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_an_error_leaves_nothing_and_spares_what_was_there(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")

    def interrupted():
        yield from scenes(3, 32, 32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(path, 30, interrupted())
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_a_film_without_pictures_is_no_file(tmp_path):
    with Film(tmp_path / "x.mp4", 30):
        pass
    assert not any(tmp_path.iterdir())


def test_a_closed_film_stays_as_it_is(tmp_path):
    film = Film(tmp_path / "x.mp4", 30)
    film.add(scenes(1, 32, 32)[0])
    film.close()
    before = film.path.read_bytes()
    film.close()
    with pytest.raises(ValueError, match="closed"):
        film.add(scenes(1, 32, 32)[0])
    assert film.path.read_bytes() == before


@pytest.mark.parametrize(
    "wrong", [np.zeros((32, 32)), np.zeros((32, 32, 3)), np.zeros((32, 33, 3), np.uint8), np.zeros((32, 32, 4), np.uint8)]
)
def test_a_picture_that_does_not_fit_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"expected a picture of uint8 \(32, 32, 3\), found"):
        written(tmp_path / "x.mp4", 30, [scenes(1, 32, 32)[0], wrong])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 50])
def test_what_ffmpeg_fails_at_is_said_in_one_line(tmp_path, count):
    with pytest.raises(UserError, match=r"x\.mp4: ffmpeg could not write the film \(invalid width x height \(20000x2\)\)$"):
        written(tmp_path / "x.mp4", 30, np.zeros((count, 2, 20_000, 3), np.uint8))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_an_ffmpeg_that_dies_without_a_word_is_an_error_too(tmp_path, suffix, monkeypatch):
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    with pytest.raises(UserError, match=r"could not write the film \(exit code 3\)"):
        written(tmp_path / f"x{suffix}", 30, scenes(9, 64, 64))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"cannot start ffmpeg .*none.*; set IMAGEIO_FFMPEG_EXE"):
        written(tmp_path / f"x{suffix}", 30, scenes(9, 64, 64))
    assert [item.name for item in tmp_path.iterdir()] == ["ffmpeg"]


def test_a_kill_leaves_no_half_film(tmp_path):
    killed = """
        import os, sys
        import numpy as np
        from pathlib import Path
        from lab.media import Film
        film = Film(Path(sys.argv[1], "x.mp4"), 30)
        for _ in range(100):
            film.add(np.zeros((64, 64, 3), np.uint8))
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(killed), str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, timeout=120, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "x.mp4").exists()


@pytest.fixture
def ffmpeg_memory(tmp_path, monkeypatch):
    """A file that gets the most memory that each ffmpeg took, in KiB, a line each."""
    log, measuring = tmp_path / "memory", tmp_path / "ffmpeg"
    measuring.write_text(f"""#!{sys.executable} -IS
import resource, subprocess, sys
code = subprocess.call([{imageio_ffmpeg.get_ffmpeg_exe()!r}, *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=open({str(log)!r}, "a"))
sys.exit(code)
""")
    measuring.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(measuring))
    return log


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other units")
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_long_film_takes_no_more_memory_than_a_short_one(tmp_path, ffmpeg_memory, suffix):
    tiles = np.random.default_rng(0).integers(8, size=(8, 12, 12, 3), dtype=np.uint8) * 32
    pictures, ours = tiles.repeat(8, 1).repeat(8, 2), []
    for count in (300, 3000):  # 75 MB more
        tracemalloc.start()
        written(tmp_path / f"x{suffix}", 30, (pictures[index // 20 % 8] for index in range(count)))
        ours.append(tracemalloc.get_traced_memory()[1] / 1024)
        tracemalloc.stop()
    theirs = [int(line) for line in ffmpeg_memory.read_text().split()]
    short, long = theirs[: len(theirs) // 2], theirs[len(theirs) // 2 :]
    assert all(after < before + 25_000 for before, after in zip(short, long, strict=True)), theirs
    assert ours[1] < ours[0] + 1000


def test_every_image_stands_above_its_partner_whatever_their_number():
    upper, lower = torch.rand(11, 1, 4, 5), torch.rand(11, 1, 4, 5)
    drawn = above(upper, lower, columns=4)
    assert drawn.shape == (1, 6 * 6 + 2, 4 * 7 + 2)
    for index in range(11):
        row, column = divmod(index, 4)
        left = column * 7 + 2
        for image, top in ((upper[index], 12 * row + 2), (lower[index], 12 * row + 8)):
            assert drawn[:, top : top + 4, left : left + 5].equal(image)
    assert (drawn[:, 26:, 23:] == 0.2).all()
    assert above(upper[:3], lower[:3]).shape == (1, 2 * 6 + 2, 3 * 7 + 2)
