"""BERT: it sees both sides, hides 80, 10 and 10 of a hundred as the numbers say, and is torch's post-norm encoder."""

import pytest
import torch
from torch.nn import functional as F

from lab.backbones.bert import BERT, BERTBackbone, mask_tokens
from tests.backbones.transformer_oracle import scrambled, torch_layer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(14, (3, 9), generator=torch.Generator().manual_seed(0))
REAL = torch.arange(9) < torch.tensor([[9], [4], [7]])


def small():
    torch.manual_seed(0)
    return scrambled(BERT(13, width=16, layers=3, heads=2, context=20)).eval()


def norm(tokens, layer):
    return F.layer_norm(tokens, (tokens.shape[-1],), layer.weight, layer.bias)


# The model


def test_it_is_torchs_postnorm_encoder_between_embeddings_and_a_head():
    model = small()
    tokens = norm(model.embedding.weight[TOKENS] + model.embeddings.positions.table[:9], model.embeddings.norm)
    for layer in model.encoder.layers:
        tokens = torch_layer(layer, "gelu").train()(tokens, src_key_padding_mask=~REAL)
    hidden = norm(F.gelu(model.transform[0](tokens)), model.transform[2])
    torch.testing.assert_close(model(TOKENS, REAL), hidden @ model.embedding.weight[:13].T + model.bias)


@pytest.mark.parametrize("filled", [False, True])
def test_it_sees_all_real_tokens_before_and_after(filled):
    model, seen = small(), []
    model.embedding.register_forward_hook(lambda module, args, embedded: seen.append(embedded))
    logits = model(TOKENS, REAL if filled else None)
    for place in range(4):
        (gradient,) = torch.autograd.grad(logits[:, place].square().sum(), seen[0], retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).equal(REAL if filled else torch.ones_like(REAL))


def test_it_has_the_weights_that_it_says_and_begins_normal():
    model = BERT(13, width=16, layers=3, heads=2, context=20)
    head = 16**2 + 16 + 2 * 16 + 13
    weights = sum(weight.numel() for weight in model.parameters())
    assert weights == 14 * 16 + 20 * 16 + 2 * 16 + 3 * (12 * 16**2 + 13 * 16) + head
    large = BERT(500, width=64)
    for name, weight in large.named_parameters():
        if weight.dim() > 1:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name


# Hiding


def spread(count):
    """Numbers spread evenly over [0, 1)."""
    return (torch.arange(count) + 0.5) / count


def test_of_2000_tokens_300_are_told_240_masked_30_random_and_30_left():
    tokens = torch.full((1, 2000), 7)
    draws = torch.stack([spread(2000), torch.full((2000,), 0.25)])[None]  # a quarter of the way: token 2 of 10
    hidden, told = mask_tokens(tokens, draws, vocabulary=10)
    assert (int(told.sum()), int((hidden == 10).sum()), int((hidden == 2).sum()), int((hidden == 7).sum())) == (300, 240, 30, 1730)
    assert (hidden[~told] == 7).all()
    assert int((hidden[told] == 7).sum()) == 30


def test_each_random_token_comes_as_often():
    tokens = torch.zeros(1, 1000, dtype=torch.int64)
    draws = torch.stack([torch.full((1000,), 0.13), spread(1000)])[None]  # between 0.8 and 0.9 of 0.15
    hidden, told = mask_tokens(tokens, draws, vocabulary=10)
    assert told.all()
    assert hidden[0].bincount(minlength=11).tolist() == [100] * 10 + [0]


def test_the_share_can_be_another_and_the_last_number_is_a_token():
    draws = torch.stack([spread(100), torch.full((100,), 1 - 2**-24)])[None]
    hidden, told = mask_tokens(torch.zeros(1, 100, dtype=torch.int64), draws, vocabulary=1000, share=0.5)
    assert (int(told.sum()), int((hidden == 1000).sum()), int((hidden == 999).sum())) == (50, 40, 5)


def test_rows_go_by_their_own_numbers():
    draws = torch.rand(3, 2, 9, generator=torch.Generator().manual_seed(1))
    hidden, told = mask_tokens(TOKENS, draws, vocabulary=14, share=0.6)
    for row in range(3):
        alone = mask_tokens(TOKENS[row : row + 1], draws[row : row + 1], vocabulary=14, share=0.6)
        assert hidden[row : row + 1].equal(alone[0])
        assert told[row : row + 1].equal(alone[1])


# Images


def test_the_backbone_is_postnorm_over_patches_with_a_pooler():
    torch.manual_seed(0)
    backbone = scrambled(BERTBackbone(2, 30, width=16, heads=2, layers=2))
    images = torch.rand(3, 2, 30, 30, dtype=torch.float64)
    tokens = norm(backbone.patches(images) + backbone.positions.positions.table, backbone.positions.norm)
    for layer in backbone.encoder.layers:
        tokens = torch_layer(layer, "gelu")(tokens)
    torch.testing.assert_close(backbone.features(images)[0], tokens.transpose(1, 2).reshape(3, 16, 8, 8))
    torch.testing.assert_close(backbone(images), backbone.head[1](tokens.mean(1)).tanh())


def test_the_backbone_has_the_weights_that_it_says():
    weights = sum(weight.numel() for weight in BERTBackbone(1, 28).parameters())
    assert weights == (4 * 4 + 1) * 64 + 49 * 64 + 2 * 64 + 6 * (12 * 64**2 + 13 * 64) + 64**2 + 64 == 308_416
