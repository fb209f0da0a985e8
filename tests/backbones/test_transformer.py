"""The Transformer: torch's layers with the same weights, a model written out step by step, and images as patches."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.attention.multihead import Cache
from lab.attention.positions import sinusoidal
from lab.backbones.transformer import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Patches,
    Transformer,
    TransformerBackbone,
    as_map,
    tokens_of,
)
from tests.backbones.transformer_oracle import assert_same_gradients, scrambled, torch_layer

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_mask(*shape):
    """Some may be looked at, the first one by all."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[..., 0] = True
    return mask


def weights(module):
    return sum(weight.numel() for weight in module.parameters())


# Layers


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masked", ["none", "given", "causal", "both"])
def test_an_encoder_layer_is_the_one_of_torch(norm_first, activation, masked):
    options = {"norm_first": norm_first, "activation": activation, "causal": masked in ("causal", "both")}
    ours = scrambled(EncoderLayer(16, 4, 24, **options))
    theirs = torch_layer(ours, activation)
    mine, other = normal(3, 7, 16).requires_grad_(), normal(3, 7, 16).requires_grad_()
    given = random_mask(7, 7) if masked in ("given", "both") else None
    seen = torch.ones(7, 7, dtype=torch.bool) if given is None else given
    seen = seen & torch.ones(7, 7, dtype=torch.bool).tril() if options["causal"] else seen
    found, expected = ours(mine, given), theirs(other, None if masked == "none" else ~seen)
    torch.testing.assert_close(found, expected)
    (found * normal(3, 7, 16, seed=1)).sum().backward()
    (expected * normal(3, 7, 16, seed=1)).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_decoder_layer_is_the_one_of_torch(norm_first, activation, masked):
    ours = scrambled(DecoderLayer(16, 4, 24, norm_first=norm_first, activation=activation, causal=not masked))
    theirs = torch_layer(ours, activation)
    mine = [normal(3, 7, 16).requires_grad_(), normal(3, 5, 16, seed=2).requires_grad_()]
    other = [each.detach().clone().requires_grad_() for each in mine]
    look, read = (random_mask(7, 7), random_mask(7, 5)) if masked else (None, None)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    found, expected = ours(*mine, look, read), theirs(*other, ~(look if masked else causal), ~read if masked else None)
    torch.testing.assert_close(found, expected)
    (found * normal(3, 7, 16, seed=1)).sum().backward()
    (expected * normal(3, 7, 16, seed=1)).sum().backward()
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    assert_same_gradients(ours, theirs)


def test_dropout_is_off_in_evaluation_and_on_in_training():
    layer = EncoderLayer(16, 4, dropout=0.5)
    plain = EncoderLayer(16, 4)
    plain.load_state_dict(layer.state_dict())
    tokens = normal(3, 7, 16, dtype=torch.float32)
    assert layer.eval()(tokens).equal(plain(tokens))
    torch.manual_seed(0)
    assert not layer.train()(tokens).equal(plain(tokens))


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_stack_is_its_layers_one_after_another_and_a_last_norm_only_for_prenorm(norm_first):
    encoder = scrambled(Encoder([EncoderLayer(16, 4, norm_first=norm_first) for _ in range(3)]))
    tokens, mask = normal(2, 7, 16), random_mask(7, 7)
    expected = tokens
    for layer in encoder.layers:
        expected = layer(expected, mask)
    if norm_first:
        expected = F.layer_norm(expected, (16,), encoder.norm.weight, encoder.norm.bias)
    torch.testing.assert_close(encoder(tokens, mask), expected)
    assert weights(encoder) == 3 * (12 * 16**2 + 13 * 16) + (2 * 16 if norm_first else 0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_every_layer_of_a_decoder_reads_the_memory(norm_first):
    decoder = scrambled(Decoder([DecoderLayer(16, 4, norm_first=norm_first) for _ in range(3)]))
    tokens, memory, read = normal(2, 7, 16), normal(2, 5, 16, seed=2), random_mask(7, 5)
    expected = tokens
    for layer in decoder.layers:
        expected = layer(expected, memory, memory_mask=read)
    if norm_first:
        expected = F.layer_norm(expected, (16,), decoder.norm.weight, decoder.norm.bias)
    torch.testing.assert_close(decoder(tokens, memory, memory_mask=read), expected)
    assert weights(decoder) == 3 * (16 * 16**2 + 19 * 16) + (2 * 16 if norm_first else 0)


# From sequence to sequence


SOURCE = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
REAL = torch.tensor([[True] * 5, [True, True, True, False, False]])
TARGET = torch.tensor([[10, 3, 5, 8], [10, 9, 7, 9]])


def translator():
    torch.manual_seed(0)
    return scrambled(Transformer(11, width=16, heads=2, layers=2)).eval()


def test_the_model_is_embedding_encoder_decoder_and_embedding_again():
    model = translator()
    matrix = model.embedding.weight
    source = matrix[SOURCE] * 4 + sinusoidal(5, 16)
    target = matrix[TARGET] * 4 + sinusoidal(4, 16)
    for layer in model.encoder.layers:
        source = torch_layer(layer, "relu")(source, src_key_padding_mask=~REAL)
    for layer in model.decoder.layers:
        past = ~torch.ones(4, 4, dtype=torch.bool).tril()
        target = torch_layer(layer, "relu")(target, source, past, memory_key_padding_mask=~REAL)
    torch.testing.assert_close(model(SOURCE, TARGET, REAL), target @ matrix.T)


def test_what_only_fills_up_the_source_changes_nothing():
    model = translator()
    changed = SOURCE.masked_fill(~REAL, 8)
    torch.testing.assert_close(model(changed, TARGET, REAL), model(SOURCE, TARGET, REAL), rtol=0, atol=0)
    torch.testing.assert_close(model(SOURCE[1:, :3], TARGET[1:]), model(SOURCE, TARGET, REAL)[1:])
    assert not model(changed, TARGET).allclose(model(SOURCE, TARGET))


def test_logits_with_caches_are_those_without_at_every_step():
    model = translator()
    caches, memory = [Cache() for _ in model.decoder.layers], model.encode(SOURCE, REAL)
    stepwise = [model.decode(part, memory, REAL, caches) for part in TARGET.split([2, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(stepwise, 1), model(SOURCE, TARGET, REAL))


def test_greedy_is_the_loop_without_caches():
    model = translator()
    for layer in model.decoder.layers:
        layer.feed.last.weight.data.mul_(10)  # so that what was read last is not what comes next
    source = torch.randint(11, (20, 5), generator=torch.Generator().manual_seed(0))
    target = torch.full((20, 1), 10)
    for _ in range(8):
        target = torch.cat([target, model(source, target)[:, -1:].argmax(-1)], 1)
    found = model.greedy(source, 10, 8)
    assert found.equal(target[:, 1:])
    assert sum(len(row.unique()) for row in found) > 30


def test_the_vocabulary_is_embedded_once():
    model = Transformer(11, width=16, heads=2, layers=2)
    assert weights(model) == 11 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * (16 * 16**2 + 19 * 16)


def test_tokens_begin_about_as_large_as_their_places():
    torch.manual_seed(0)
    model = Transformer(500, width=64)
    assert (model.embedding.weight * math.sqrt(64)).std().item() == pytest.approx(1, rel=0.02)


# Images


@pytest.mark.parametrize(
    ("size", "patch", "side"), [(8, 1, 8), (10, 1, 10), (28, 4, 7), (36, 5, 8), (41, 6, 7), (64, 9, 8), (84, 12, 7), (128, 18, 8)]
)
def test_patches_are_a_seventh_of_the_image(size, patch, side):
    patches = Patches(1, size, 4)
    assert (patches.patch, patches.grid, patches.count) == (patch, (side, side), side**2)
    assert patches.padding == side * patch - size
    assert patches(torch.rand(2, 1, size, size)).shape == (2, side**2, 4)


@pytest.mark.parametrize("size", [28, 30, 41])
@pytest.mark.parametrize("patch", [None, 7])
def test_a_patch_goes_through_a_dense_layer(size, patch):
    patches = scrambled(Patches(3, size, 10, patch))
    images = normal(2, 3, size, size)
    pixels = F.unfold(F.pad(images, (0, patches.padding, 0, patches.padding)), patches.patch, stride=patches.patch).transpose(1, 2)
    expected = F.linear(pixels, patches.projection.weight.flatten(1), patches.projection.bias)
    torch.testing.assert_close(patches(images), expected)
    torch.testing.assert_close(as_map(patches(images), patches.grid)[1, :, 1, 2], expected[1, patches.grid[1] + 2])


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (4, 84)])
def test_patches_of_numbers_about_1_begin_as_tokens_about_1(channels, size):
    torch.manual_seed(0)
    tokens = Patches(channels, size, 256)(normal(4, channels, size, size, dtype=torch.float32))
    assert tokens.std().item() == pytest.approx(1, rel=0.1)


def test_bytes_stand_for_numbers_up_to_1():
    patches = Patches(3, 30, 10)
    seen = torch.randint(256, (2, 3, 30, 30), dtype=torch.uint8)
    torch.testing.assert_close(patches(seen), patches(seen / 255))


def test_tokens_and_maps_are_the_same_numbers():
    maps = normal(2, 5, 3, 4)
    tokens = tokens_of(maps)
    assert tokens[1, 2 * 4 + 3].equal(maps[1, :, 2, 3])
    assert as_map(tokens, (3, 4)).equal(maps)


def test_the_backbone_is_torchs_encoder_and_a_decoder_with_one_query():
    torch.manual_seed(0)
    backbone = scrambled(TransformerBackbone(2, 30, width=16, heads=2, layers=2))
    images = normal(3, 2, 30, 30)
    tokens = backbone.patches(images) + sinusoidal(64, 16)
    for layer in backbone.encoder.layers:
        tokens = torch_layer(layer, "relu")(tokens)
    (last,) = backbone.features(images)
    torch.testing.assert_close(last, tokens.transpose(1, 2).reshape(3, 16, 8, 8))
    read = torch_layer(backbone.head.decoder.layers[0], "relu")(backbone.head.query.expand(3, 1, 16), tokens)
    torch.testing.assert_close(backbone(images), read[:, 0])


def test_the_backbone_has_the_weights_that_it_says():
    encoder, decoder = 6 * (12 * 64**2 + 13 * 64), 16 * 64**2 + 19 * 64
    assert weights(TransformerBackbone(4, 84)) == (12 * 12 * 4 + 1) * 64 + encoder + decoder + 64 == 403_648


def test_its_parts_are_the_layers_in_their_order():
    backbone = TransformerBackbone(1, 28, width=16, heads=2, layers=3)
    parts = backbone.sequence
    assert parts[0] is backbone.patches
    assert parts[2:5] == list(backbone.encoder.layers)
    assert parts[-1] is backbone.head
    assert {id(weight) for part in parts for weight in part.parameters()} == {id(weight) for weight in backbone.parameters()}
    assert not [part for part in parts if isinstance(part, nn.ModuleList)]
