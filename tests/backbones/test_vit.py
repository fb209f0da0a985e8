"""ViT: torch's pre-norm encoder over patches, and the weights that it says."""

import pytest
import torch
from torch.nn import functional as F

from lab.attention.positions import sinusoidal_2d
from lab.backbones.vit import ViT
from tests.backbones.transformer_oracle import scrambled, torch_layer

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_it_is_torchs_prenorm_encoder_over_patches_and_the_mean(positions):
    torch.manual_seed(0)
    vit = scrambled(ViT(3, 30, width=16, heads=2, layers=3, positions=positions))
    images = normal(2, 3, 30, 30)
    tokens = vit.patches(images)
    tokens = tokens + (vit.positions.table if positions == "learned" else sinusoidal_2d(8, 8, 16).view(64, 16))
    for layer in vit.encoder.layers:
        tokens = torch_layer(layer, "gelu")(tokens)
    tokens = F.layer_norm(tokens, (16,), vit.encoder.norm.weight, vit.encoder.norm.bias)
    (last,) = vit.features(images)
    torch.testing.assert_close(last, tokens.transpose(1, 2).reshape(2, 16, 8, 8))
    torch.testing.assert_close(vit(images), tokens.mean(1))


@pytest.mark.parametrize(("positions", "table"), [("sinusoidal", 0), ("learned", 49 * 64)])
def test_it_has_the_weights_that_it_says(positions, table):
    vit = ViT(1, 28, positions=positions)
    expected = (4 * 4 + 1) * 64 + table + 6 * (12 * 64**2 + 13 * 64) + 2 * 64
    assert sum(weight.numel() for weight in vit.parameters()) == expected == 301_120 + table


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_patches_know_where_they_are(positions):
    torch.manual_seed(0)
    vit = ViT(1, 28, width=16, heads=2, layers=2, positions=positions)
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    moved = images.roll((4, 8), (2, 3))  # whole patches: the same set of tokens in another order
    assert not vit(moved).allclose(vit(images), atol=1e-4)
    vit.positions.table.data.zero_()
    torch.testing.assert_close(vit(moved), vit(images))
