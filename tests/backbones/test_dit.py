"""DiT: zero at first, told by time and class after some steps, and each block a plain layer with weights that it is told."""

import pytest
import torch
from torch.nn import functional as F

from lab.attention.positions import sinusoidal_2d
from lab.backbones.dit import DiT, DiTBackbone, DiTBlock, unpatchify
from lab.backbones.transformer import EncoderLayer, Patches
from tests.backbones.transformer_oracle import scrambled

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(size=12):
    torch.manual_seed(0)
    return DiT(2, size, 3, classes=4, width=16, layers=2, heads=2)


IMAGES = normal(5, 2, 12, 12, dtype=torch.float32)
TIMES = torch.tensor([0.0, 10.5, 300.0, 999.0, 1000.0])
LABELS = torch.tensor([0, 1, 2, 3, 4])


# The block


def test_a_block_begins_as_the_identity():
    tokens = normal(2, 7, 16, dtype=torch.float32)
    assert DiTBlock(16, 2)(tokens, normal(2, 16, seed=1, dtype=torch.float32)).equal(tokens)


def test_a_block_is_a_prenorm_layer_with_the_weights_that_it_is_told():
    """Scale and shift are weights of a normalisation, and a gate those of the product before it."""
    torch.manual_seed(0)
    block, condition = scrambled(DiTBlock(16, 2)), normal(1, 16)
    shift, scale, gate, feed_shift, feed_scale, feed_gate = block.modulation(F.silu(condition))[0].detach().chunk(6)
    plain = EncoderLayer(16, 2, norm_first=True, activation="gelu").double()
    plain.attention.load_state_dict(block.attention.state_dict())
    plain.feed.load_state_dict(block.feed.state_dict())
    with torch.no_grad():
        for norm, scaled, shifted in ((plain.look.norm, scale, shift), (plain.think.norm, feed_scale, feed_shift)):
            norm.weight.copy_(1 + scaled)
            norm.bias.copy_(shifted)
        for product, opened in ((plain.attention.output, gate), (plain.feed.last, feed_gate)):
            product.weight.mul_(opened[:, None])
            product.bias.mul_(opened)
    tokens = normal(3, 7, 16, seed=2)
    torch.testing.assert_close(block(tokens, condition.expand(3, 16)), plain(tokens))


# The model


def test_the_model_begins_as_zero():
    found = small()(IMAGES, TIMES, LABELS)
    assert found.shape == (5, 3, 12, 12)
    assert (found == 0).all()


def trained(steps):
    model = small().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    target = normal(5, 3, 12, 12, seed=9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(IMAGES.double(), TIMES.double(), LABELS), target).backward()
        optimizer.step()
    return lambda times, labels: model(IMAGES.double(), times.double(), labels)


def test_after_some_steps_time_and_class_matter():
    """The first step moves only what gives the pixels, since before it nothing else reaches them; the second one the rest."""
    first = trained(1)
    assert first(TIMES, LABELS).abs().sum() > 0
    assert first(TIMES, LABELS).equal(first(TIMES.flip(0), LABELS.flip(0)))
    model = trained(3)
    found = model(TIMES, LABELS)
    for changed, same in (
        (model(TIMES.flip(0), LABELS), 2),
        (model(TIMES, LABELS.flip(0)), 2),
        (model(TIMES, torch.full_like(LABELS, 4)), 4),  # without a class
    ):
        assert [row.equal(before) for row, before in zip(changed, found, strict=True)] == [row == same for row in range(5)]


def test_every_image_is_told_its_own():
    model = scrambled(small())
    images, times = IMAGES.double(), TIMES.double()
    found = model(images, times, LABELS)
    for row in range(5):
        one = slice(row, row + 1)
        torch.testing.assert_close(model(images[one], times[one], LABELS[one]), found[one])


def test_all_weights_learn():
    model = scrambled(small()).float()
    model(IMAGES, TIMES, LABELS).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize(("size", "patch"), [(12, None), (28, None), (28, 2), (30, None), (13, 4)])
def test_unpatchify_turns_patches_back(size, patch):
    patches = Patches(3, size, 1, patch)
    pixels = 3 * patches.patch**2
    patches.projection = torch.nn.Conv2d(3, pixels, patches.patch, patches.patch, bias=False)
    patches.projection.weight.data = torch.eye(pixels).view_as(patches.projection.weight)
    images = normal(2, 3, size, size, dtype=torch.float32)
    back = unpatchify(patches(images), patches.grid, patches.patch)
    assert back.shape[2:] == tuple(side * patches.patch for side in patches.grid)
    assert back[:, :, :size, :size].equal(images)


@pytest.mark.parametrize("size", [8, 10, 28, 30, 84])
def test_maps_have_the_size_of_the_images(size):
    images = normal(2, 2, size, size, dtype=torch.float32)
    assert small(size)(images, TIMES[:2], LABELS[:2]).shape == (2, 3, size, size)


def block_weights(width):
    return 12 * width**2 + 9 * width + 6 * (width**2 + width)


def test_it_has_the_weights_that_it_says():
    told = 2 * (16**2 + 16) + 5 * 16
    last = 2 * (16**2 + 16) + 3 * 2 * 2 * (16 + 1)
    assert sum(weight.numel() for weight in small().parameters()) == (2 * 2 * 2 + 1) * 16 + told + 2 * block_weights(16) + last


# The backbone


def test_the_backbone_begins_as_its_patches_in_their_places():
    backbone = DiTBackbone(1, 30, width=16, heads=2, layers=2)
    images = torch.rand(2, 1, 30, 30)
    tokens = F.layer_norm(backbone.patches(images) + sinusoidal_2d(8, 8, 16).view(64, 16), (16,))
    torch.testing.assert_close(backbone.features(images)[0], tokens.transpose(1, 2).reshape(2, 16, 8, 8))
    torch.testing.assert_close(backbone(images), tokens.mean(1))


def test_all_blocks_of_the_backbone_are_told_one_constant():
    backbone = scrambled(DiTBackbone(1, 30, width=16, heads=2, layers=2))
    images = torch.rand(2, 1, 30, 30, dtype=torch.float64)
    tokens = backbone.positions(backbone.patches(images))
    for block in backbone.encoder.blocks:
        tokens = block(tokens, backbone.encoder.condition.value.expand(2, 16))
    norm = backbone.encoder.norm
    torch.testing.assert_close(backbone(images), F.layer_norm(tokens, (16,), norm.weight, norm.bias).mean(1))
    assert {id(weight) for part in backbone.sequence for weight in part.parameters()} == {id(weight) for weight in backbone.parameters()}


def test_the_backbone_has_the_weights_that_it_says():
    weights = sum(weight.numel() for weight in DiTBackbone(1, 28).parameters())
    assert weights == (4 * 4 + 1) * 64 + 64 + 6 * block_weights(64) + 2 * 64 == 449_408
