"""Pictures: every pixel is where it should be, and files hold what was drawn."""

import itertools
import math

import matplotlib.image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lab.media import grid, picture, plot_rows, save_gif, save_png, to_uint8


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
