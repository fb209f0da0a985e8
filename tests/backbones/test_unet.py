"""U-Net: the same function as its formulas written out, what crosses over, and what it makes of times and labels."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.attention.positions import embed_times
from lab.backbones import create
from lab.backbones.cost import parameters
from lab.backbones.unet import ResidualBlock, UNet, contracting_path, film, usual_widths

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed=0):
    """All its weights drawn anew, so that none of them is zero."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


# Shapes


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (8, (32, 64)),
        (11, (32, 64)),
        (22, (32, 64)),
        (23, (32, 64, 128)),
        (28, (32, 64, 128)),
        (44, (32, 64, 128)),
        (45, (32, 64, 128, 128)),
        (84, (32, 64, 128, 128)),
        (128, (32, 64, 128, 128, 128)),
    ],
)
def test_images_are_halved_until_few_pixels_are_left(size, widths):
    assert usual_widths(size) == widths
    assert size == 8 or 5 < size / 2 ** (len(widths) - 1) <= 11


@pytest.mark.parametrize("shape", [(28, 28), (84, 84), (30, 30), (31, 31), (9, 9), (13, 22)])
def test_what_comes_out_is_as_large_as_what_goes_in(shape):
    network = UNet(2, 3, max(shape), widths=(4, 8, 16), classes=5, time=True)
    assert network(noise(2, 2, *shape), torch.rand(2), torch.tensor([0, 5])).shape == (2, 3, *shape)


@pytest.mark.parametrize(("size", "sides"), [(28, [28, 14, 7]), (84, [28, 14, 7]), (30, [30, 15, 8]), (10, [10, 5, 3]), (64, [32, 16, 8])])
def test_the_backbone_goes_down_from_about_28_places(size, sides):
    backbone = create("unet", 2, size, widths=(4, 8, 16))
    assert [tuple(maps.shape[1:]) for maps in backbone.features(noise(2, 2, size, size))] == list(zip((4, 8, 16), sides, sides))
    assert backbone(noise(2, 2, size, size)).shape == (2, 16)


def test_sizes_are_as_the_docstrings_say():
    assert parameters(UNet(1, 1, 28)) == 661_249
    assert parameters(UNet(1, 1, 28, classes=10, time=True)) == 765_953
    assert parameters(create("unet", 1, 28)) == 219_664
    assert parameters(create("unet", 4, 84)) == 222_656


# Values


def normalised(maps, weights, name):
    channels = maps.shape[1]
    groups = {4: 1, 8: 1, 16: 2, 32: 4}[channels]  # of 8 channels, or of 4
    apart = maps.unflatten(1, (groups, -1))
    standard = (apart - apart.mean((2, 3, 4), keepdim=True)) / (apart.var((2, 3, 4), correction=0, keepdim=True) + 1e-5).sqrt()
    return standard.flatten(1, 2) * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def convolved(maps, weights, name, stride=1):
    weight = weights[f"{name}.weight"]
    return F.conv2d(maps, weight, weights[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)


def block(maps, weights, name, condition=None):
    hidden = convolved(F.silu(normalised(maps, weights, f"{name}.normalise")), weights, f"{name}.first")
    hidden = normalised(hidden, weights, f"{name}.normalise_again")
    if condition is not None:
        numbers = F.silu(condition) @ weights[f"{name}.modulate.weight"].T + weights[f"{name}.modulate.bias"]
        half = hidden.shape[1]
        hidden = hidden * (1 + numbers[:, :half, None, None]) + numbers[:, half:, None, None]
    hidden = convolved(F.silu(hidden), weights, f"{name}.last")
    return hidden + (convolved(maps, weights, f"{name}.shortcut") if f"{name}.shortcut.weight" in weights else maps)


def attended(maps, weights, name, heads):
    torchs = nn.MultiheadAttention(maps.shape[1], heads, batch_first=True)
    names = {"in_proj_weight": "inputs.weight", "in_proj_bias": "inputs.bias"}
    names |= {f"out_proj.{kind}": f"output.{kind}" for kind in ("weight", "bias")}
    torchs.load_state_dict({theirs: weights[f"{name}.attention.{ours}"] for theirs, ours in names.items()})
    tokens = normalised(maps, weights, f"{name}.normalise").flatten(2).mT
    return maps + torchs(tokens, tokens, tokens)[0].mT.reshape(maps.shape)


def repeated(maps, size):
    return maps.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :size, :size]


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_network_is_its_layers_in_a_row(conditioned):
    network = randomised(UNet(2, 3, 10, widths=(8, 16), blocks=2, heads=2, **({"classes": 4, "time": True} if conditioned else {})))
    weights, images, given = network.state_dict(), noise(3, 2, 9, 9), ()
    condition = None
    if conditioned:
        times, labels = given = (torch.tensor([0.0, 3.5, 999.0]), torch.tensor([1, 4, 0]))
        hidden = embed_times(times, 8) @ weights["condition.time.0.weight"].T + weights["condition.time.0.bias"]
        condition = F.silu(hidden) @ weights["condition.time.2.weight"].T + weights["condition.time.2.bias"]
        condition = condition + weights["condition.label.weight"][labels]
    fine = convolved(images, weights, "contracting.0.enter")
    fine = block(fine, weights, "contracting.0.blocks.0", condition)
    fine = block(fine, weights, "contracting.0.blocks.1", condition)
    coarse = convolved(fine, weights, "contracting.1.enter", stride=2)
    for index in range(2):
        coarse = block(coarse, weights, f"contracting.1.blocks.{index}", condition)
        coarse = attended(coarse, weights, f"contracting.1.attentions.{index}", heads=2)
    up = convolved(repeated(coarse, 9), weights, "expanding.0.enter.convolution")
    up = block(torch.cat([up, fine], 1), weights, "expanding.0.blocks.0", condition)
    up = block(up, weights, "expanding.0.blocks.1", condition)
    expected = convolved(F.silu(normalised(up, weights, "normalise")), weights, "last")
    torch.testing.assert_close(network(images, *given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [20, 84])
def test_the_backbone_is_the_way_down(size):
    stride = 1 if size == 20 else 3
    backbone = randomised(create("unet", 2, size, widths=(4, 8), blocks=1))
    path = nn.ModuleList(contracting_path(2, (4, 8), blocks=1, heads=4, stride=stride))
    path.load_state_dict(backbone.stages.state_dict())
    images = noise(2, 2, size, size)
    assert path[0].enter.stride == (stride, stride)
    fine = path[0](images)
    coarse = path[1](fine)
    for found, expected in zip(backbone.features(images), (fine, coarse), strict=True):
        assert found.equal(expected)
    torch.testing.assert_close(backbone(images), coarse.flatten(2).mean(2))


def test_every_weight_of_the_backbone_takes_part():
    backbone = randomised(create("unet", 1, 12, widths=(8, 16)))
    backbone(noise(2, 1, 12, 12)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())


def test_every_weight_of_the_network_takes_part():
    network = randomised(UNet(1, 1, 28, widths=(4, 8, 8), classes=3, time=True))
    network(noise(2, 1, 12, 12), torch.tensor([3.0, 500.0]), torch.tensor([0, 3])).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    assert network.condition.label.weight.grad.abs().sum(1).bool().tolist() == [True, False, False, True]


# How it begins


def test_it_begins_as_zero():
    network = UNet(1, 2, 28, widths=(8, 16), classes=3, time=True)
    assert network(noise(2, 1, 28, 28), torch.rand(2), torch.tensor([0, 3])).equal(torch.zeros(2, 2, 28, 28))


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 16)])
def test_blocks_begin_as_their_shortcuts(inputs, outputs):
    layer, maps = ResidualBlock(inputs, outputs, 5), noise(2, inputs, 6, 6)
    assert layer(maps, noise(2, 5)).equal(layer.shortcut(maps))
    assert isinstance(layer.shortcut, nn.Identity) == (inputs == outputs)


def test_attention_begins_as_the_identity():
    maps, attention = noise(2, 8, 5, 5), contracting_path(1, (4, 8), blocks=1, heads=2)[-1].attentions[0]
    assert attention(maps).equal(maps)
    assert not randomised(attention)(maps).allclose(maps, atol=0.1)


# What crosses over


def cut(stage, argument):
    """Let a stage of the way up see nothing of what comes from below (0) or across (1)."""

    def without(module, inputs):
        return tuple(torch.zeros_like(each) if place == argument else each for place, each in enumerate(inputs))

    stage.register_forward_pre_hook(without)


@pytest.mark.parametrize("kept", [0, 1, 2, None])
def test_every_size_carries_the_image_across(kept):
    """With all ways cut but that at one size, an output pixel still depends on the input pixel at its place; with all cut, on none."""
    network = randomised(UNet(1, 1, 16, widths=(4, 8, 8)))
    coarse, fine = network.expanding
    for level, way in enumerate([(fine, 1), (coarse, 1), (coarse, 0)]):
        if level != kept:
            cut(*way)
    images = noise(1, 1, 16, 16).requires_grad_()
    network(images)[0, 0, 5, 6].backward()
    if kept is None:
        assert images.grad is None
    else:
        assert images.grad[0, 0, 5, 6].abs() > 1e-6


def test_without_the_bottleneck_an_output_pixel_depends_most_on_the_pixels_around_it():
    network = randomised(UNet(1, 1, 16, widths=(4, 8)))
    cut(network.expanding[0], 0)
    images = noise(1, 1, 16, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(network(images)[0, 0, 5, 6], images)
    row, column = divmod(gradient.abs().argmax().item(), 16)
    assert abs(row - 5) <= 2
    assert abs(column - 6) <= 2
    assert gradient[0, 0, 5, 6] != 0


# Times and labels


def test_film_scales_and_shifts_every_channel():
    maps, numbers = noise(2, 3, 4, 5), noise(2, 6, seed=1)
    expected = torch.empty_like(maps)
    for image in range(2):
        for channel in range(3):
            expected[image, channel] = (1 + numbers[image, channel]) * maps[image, channel] + numbers[image, 3 + channel]
    torch.testing.assert_close(film(maps, numbers), expected)


def conditional(**options):
    return randomised(UNet(1, 1, 10, widths=(4, 8), **options)).eval()


def test_with_scales_and_shifts_of_zero_it_is_the_network_without_conditions():
    told = conditional(classes=3, time=True)
    for layer in told.modules():
        if isinstance(layer, ResidualBlock):
            nn.init.zeros_(layer.modulate.weight)
            nn.init.zeros_(layer.modulate.bias)
    plain = UNet(1, 1, 10, widths=(4, 8))
    missing, unexpected = plain.load_state_dict(told.state_dict(), strict=False)
    assert not missing
    assert all("modulate" in name or name.startswith("condition.") for name in unexpected)
    images = noise(2, 1, 10, 10)
    torch.testing.assert_close(told(images, torch.rand(2), torch.tensor([0, 3])), plain(images))


def test_times_and_labels_matter_and_no_label_is_one_of_its_own():
    network, image = conditional(classes=3, time=True), noise(1, 1, 10, 10)
    seen = [network(image, torch.tensor([time]), torch.tensor([label])) for time in (0.0, 10.0) for label in (0, 1, 2, 3)]
    for index, one in enumerate(seen):
        assert all((one - other).abs().max() > 1e-3 for other in seen[:index])
    with pytest.raises(IndexError):
        network(image, torch.zeros(1), torch.tensor([4]))


@pytest.mark.parametrize("options", [{}, {"classes": 3}, {"time": True}, {"classes": 3, "time": True}])
def test_what_is_missing_or_not_asked_for_is_told(options):
    network, image = conditional(**options), noise(1, 1, 10, 10)
    every = {"times": torch.zeros(1), "labels": torch.zeros(1, dtype=torch.long)}
    takes = {"times": "time" in options, "labels": "classes" in options}
    right = {name: every[name] for name in every if takes[name]}
    assert network(image, **right).shape == image.shape
    for name, given in every.items():
        wrong = {other: value for other, value in right.items() if other != name} if takes[name] else {**right, name: given}
        with pytest.raises(ValueError, match=f"{name} are missing" if takes[name] else f"takes no {name}"):
            network(image, **wrong)


def test_no_image_knows_of_the_others_in_its_batch():
    network = conditional(classes=3, time=True)
    images, times, labels = noise(4, 1, 11, 11), torch.tensor([0.0, 5.0, 70.0, 900.0]), torch.tensor([3, 0, 1, 2])
    together = network(images, times, labels)
    for index in range(4):
        alone = network(images[index : index + 1], times[index : index + 1], labels[index : index + 1])
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-5)


def test_it_learns_to_do_with_the_image_what_the_label_says():
    """0 asks for the image, 1 for its negative."""
    torch.manual_seed(0)
    network = UNet(1, 1, 8, widths=(8, 8), classes=2)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(60):
        images, labels = noise(16, 1, 8, 8, seed=step), torch.arange(16) % 2
        loss = (network(images, labels=labels) - images * (1 - 2 * labels[:, None, None, None])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # 1 at first: the energy of the noise


def test_a_folded_unet_is_one_of_fewer_places_and_more_channels():
    """Each 2x2 pixels are the channels of one place, in the order of torch's pixel_unshuffle, and come back as they went."""
    torch.manual_seed(0)
    folded = UNet(2, 3, 8, widths=(8, 16), time=True, fold=2)
    with torch.no_grad():
        folded.last.weight.normal_()
    inner = UNet(8, 12, 4, widths=(8, 16), time=True)
    inner.load_state_dict(folded.state_dict())
    images, times = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 500.0])
    blocks = images.unflatten(3, (4, 2)).unflatten(2, (4, 2))  # (N, C, 4, 2, 4, 2)
    places = blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    told = inner(places, times).unflatten(1, (3, 2, 2)).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 8, 8)
    torch.testing.assert_close(folded(images, times), told)
