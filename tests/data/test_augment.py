"""Augmentation against cases whose answer is known exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.data.augment import AugmentConfig, augment

SHAPES = [(2, 1, 8, 8), (2, 3, 6, 10), (3, 1, 9, 5)]
STILL = 0.5
"""The draw that changes nothing."""
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def images(shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def draws(count: int, **changed: float) -> torch.Tensor:
    names = ("right", "down", "rotation", "zoom", "brightness")
    return torch.tensor([[changed.get(name, STILL) for name in names]] * count)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("right", "down"), [(2, 0), (-2, 0), (0, 1), (1, -2)])
def test_a_whole_shift_moves_pixels_and_mirrors_the_edge(shape, right, down):
    x = images(shape)
    out = augment(x, AugmentConfig(shift=4), draws(len(x), right=0.5 + right / 8, down=0.5 + down / 8))

    rows = torch.arange(shape[2]) - down
    columns = torch.arange(shape[3]) - right
    mirrored = [torch.where(i < 0, -1 - i, torch.where(i >= n, 2 * n - 1 - i, i)) for i, n in ((rows, shape[2]), (columns, shape[3]))]
    torch.testing.assert_close(out, x[:, :, mirrored[0]][:, :, :, mirrored[1]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("draw", "turns"), [(1.0, 1), (0.0, -1)])
@pytest.mark.parametrize("side", [8, 9])
def test_ninety_degrees_are_rot90(draw, turns, side):
    x = images((2, 3, side, side))
    out = augment(x, AugmentConfig(rotation=90), draws(2, rotation=draw))
    torch.testing.assert_close(out, torch.rot90(x, turns, (2, 3)), atol=1e-5, rtol=0)


def test_a_quarter_turn_does_not_shear_an_image_that_is_not_square():
    x = torch.zeros(1, 1, 5, 11)
    x[0, 0, 2, 3:8] = 1  # a bar of 5 across the centre stands upright after a quarter turn
    out = augment(x, AugmentConfig(rotation=90), draws(1, rotation=1.0))
    expected = torch.zeros_like(x)
    expected[0, 0, :, 5] = 1
    torch.testing.assert_close(out[..., 3:8], expected[..., 3:8], atol=1e-5, rtol=0)  # beyond, the mirrored image shows


@pytest.mark.parametrize("shape", SHAPES)
def test_a_half_turn_is_two_flips(shape):
    x = images(shape)
    out = augment(x, AugmentConfig(rotation=180), draws(len(x), rotation=1.0))
    torch.testing.assert_close(out, x.flip(2, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("draw", [0.0, 0.2, 0.9])
def test_zoom_keeps_the_centre(draw):
    x = images((2, 1, 9, 7))
    out = augment(x, AugmentConfig(zoom=0.5), draws(2, zoom=draw))
    torch.testing.assert_close(out[:, :, 4, 3], x[:, :, 4, 3], atol=1e-5, rtol=0)
    assert not torch.allclose(out, x, atol=0.01)


def test_zoom_by_two_shows_every_second_place():
    x = images((1, 1, 9, 13))
    out = augment(x, AugmentConfig(zoom=1), draws(1, zoom=1.0))
    torch.testing.assert_close(out[:, :, ::2, ::2], x[:, :, 2:7, 3:10], atol=1e-5, rtol=0)


def test_a_shift_is_in_output_pixels_whatever_the_rotation():
    x = images((1, 1, 8, 8))
    both = augment(x, AugmentConfig(shift=2, rotation=90), draws(1, right=1.0, rotation=1.0))
    torch.testing.assert_close(both[..., 2:], torch.rot90(x, 1, (2, 3))[..., :-2], atol=1e-5, rtol=0)


def test_brightness_multiplies_and_is_cut_off_at_white():
    x = images((2, 3, 4, 4))
    torch.testing.assert_close(augment(x, AugmentConfig(brightness=0.5), draws(2, brightness=0.0)), x * 0.5)
    torch.testing.assert_close(augment(x, AugmentConfig(brightness=0.5), draws(2, brightness=1.0)), (x * 1.5).clamp(max=1))


def test_every_image_takes_its_own_draws():
    x = images((3, 1, 8, 8))
    config = AugmentConfig(shift=2, rotation=30, zoom=0.2, brightness=0.3)
    mixed = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([augment(x[i : i + 1], config, mixed[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(augment(x, config, mixed), alone)


def test_nothing_set_returns_the_images_themselves():
    x = images((2, 1, 8, 8))
    assert not AugmentConfig().active
    assert augment(x, AugmentConfig(), torch.rand(2, 5)) is x


@pytest.mark.parametrize("name", ["shift", "rotation", "zoom", "brightness"])
def test_each_setting_alone_is_active_and_changes_the_image(name):
    config = AugmentConfig(**{name: 1.0})
    x = images((2, 1, 8, 8))
    assert config.active
    assert not torch.equal(augment(x, config, torch.full((2, 5), 0.9)), x)
    torch.testing.assert_close(augment(x, config, draws(2)), x, atol=1e-5, rtol=0)


@given(seed=st.integers(0, 2**31), shift=st.floats(0, 20), rotation=st.floats(0, 360), zoom=st.floats(0, 1), brightness=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_result_stays_in_range_with_any_setting(seed, shift, rotation, zoom, brightness):
    generator = torch.Generator().manual_seed(seed)
    x, numbers = torch.rand(2, 1, 6, 9, generator=generator), torch.rand(2, 5, generator=generator)
    out = augment(x, AugmentConfig(shift=shift, rotation=rotation, zoom=zoom, brightness=brightness), numbers)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.isfinite().all()
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (5,)])
def test_draws_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"draws: expected shape \(2, 5\)"):
        augment(images((2, 1, 8, 8)), AugmentConfig(shift=1), torch.rand(shape))


@pytest.mark.parametrize("device", DEVICES)
def test_the_result_is_on_the_images_device_and_the_same_there(device):
    x, numbers = images((4, 3, 12, 10)), torch.rand(4, 5, generator=torch.Generator().manual_seed(2))
    config = AugmentConfig(shift=2, rotation=30, zoom=0.2, brightness=0.3)
    out = augment(x.to(device), config, numbers.to(device))
    assert out.device.type == device
    torch.testing.assert_close(out.cpu(), augment(x, config, numbers), atol=1e-4, rtol=0)
