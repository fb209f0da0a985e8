"""GPT: no look ahead, caches that change nothing, draws that are the numbers' they are made of, and GPT-2's weights at the start."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.backbones.gpt import GPT, GPTBackbone, choose
from tests.backbones.transformer_oracle import scrambled, torch_layer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(13, (3, 9), generator=torch.Generator().manual_seed(0))


def small(positions="learned"):
    torch.manual_seed(0)
    return scrambled(GPT(13, width=16, layers=3, heads=2, context=20, positions=positions)).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The model


def test_it_is_torchs_causal_prenorm_encoder_between_one_matrix_twice():
    model = small()
    tokens = model.embedding.weight[TOKENS] + model.positions.table[:9]
    for layer in model.encoder.layers:
        tokens = torch_layer(layer, "gelu")(tokens, ~torch.ones(9, 9, dtype=torch.bool).tril())
    tokens = F.layer_norm(tokens, (16,), model.encoder.norm.weight, model.encoder.norm.bias)
    torch.testing.assert_close(model(TOKENS), tokens @ model.embedding.weight.T)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_logit_depends_on_what_came_before_and_on_nothing_after(positions):
    model, seen = small(positions), []
    model.embedding.register_forward_hook(lambda module, args, embedded: seen.append(embedded))
    logits = model(TOKENS)
    for place in range(9):
        (gradient,) = torch.autograd.grad(logits[:, place].square().sum(), seen[0], retain_graph=True)
        assert (gradient[:, : place + 1].abs().sum(-1) > 0).all()
        assert (gradient[:, place + 1 :] == 0).all()


def test_learned_and_rotary_places_matter():
    for positions in ("learned", "rotary"):
        model = small(positions)
        swapped = TOKENS[:, [1, 0, *range(2, 9)]]
        assert not model(swapped)[:, -1].allclose(model(TOKENS)[:, -1], atol=1e-3)


def test_it_has_the_weights_that_it_says():
    for positions, table in (("learned", 20 * 16), ("rotary", 0)):
        weights = sum(weight.numel() for weight in small(positions).parameters())
        assert weights == 13 * 16 + table + 3 * (12 * 16**2 + 13 * 16) + 2 * 16


def test_it_begins_as_gpt_2():
    torch.manual_seed(0)
    model = GPT(500, width=64, layers=8, heads=4)
    joining = {f"encoder.layers.{i}.{part}.weight" for i in range(8) for part in ("attention.output", "feed.last")}
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (weight == 1).all()
        elif name.endswith("bias"):
            assert (weight == 0).all()
        else:
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(16) if name in joining else 0.02, rel=0.05), name
    assert joining <= {name for name, _ in model.named_parameters()}


# Writing


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("parts", [[1] * 9, [4, 1, 3, 1], [9]])
def test_logits_with_caches_are_those_without(positions, parts):
    model = small(positions)
    caches = model.caches()
    found = torch.cat([model(part, caches) for part in TOKENS.split(parts, 1)], 1)
    torch.testing.assert_close(found, model(TOKENS), rtol=0, atol=1e-6)
    assert [len(cache) for cache in caches] == [9] * 3


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_greedy_writing_is_the_loop_without_caches(positions):
    model, tokens = small(positions), TOKENS[:, :2]
    for _ in range(18):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert model.generate(TOKENS[:, :2], 18, temperature=0).equal(tokens[:, 2:])


def test_drawn_writing_is_the_loop_without_caches_and_one_number_a_token():
    model, tokens, draws = small(), TOKENS[:, :2], seeded(3)
    for _ in range(12):
        drawn = choose(model(tokens)[:, -1], torch.rand(3, generator=draws), 0.9, 5)
        tokens = torch.cat([tokens, drawn[:, None]], 1)
    found = model.generate(TOKENS[:, :2], 12, temperature=0.9, top_k=5, generator=seeded(3))
    assert found.equal(tokens[:, 2:])
    assert len(found.unique()) > 4
    assert not found.equal(model.generate(TOKENS[:, :2], 12, temperature=0.9, top_k=5, generator=seeded(4)))


def test_the_context_has_an_end():
    model = small()
    assert model.generate(TOKENS[:, :1], 20, generator=seeded()).shape == (3, 20)  # the last token written is not read
    with pytest.raises(ValueError, match="a sequence of 21 tokens is longer than the context of 20"):
        model.generate(TOKENS[:, :1], 21, generator=seeded())
    with pytest.raises(ValueError, match="a sequence of 21 tokens is longer than the context of 20"):
        small("rotary")(torch.zeros(1, 21, dtype=torch.int64))


def shares(probabilities, temperature=1.0, top_k=None, draws=1000):
    """How often each token is drawn by numbers that are spread evenly."""
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    chosen = choose(logits, (torch.arange(draws) + 0.5) / draws, temperature, top_k)
    return (chosen.bincount(minlength=len(probabilities)) / draws).tolist()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    assert shares([0.5, 0.125, 0.25, 0.125]) == pytest.approx([0.5, 0.125, 0.25, 0.125])
    assert shares([0.5, 0.125, 0.25, 0.125], top_k=2, draws=900) == pytest.approx([2 / 3, 0, 1 / 3, 0])
    assert shares([0.6, 0.1, 0.3], top_k=9) == pytest.approx([0.6, 0.1, 0.3])
    assert shares([0.4, 0.2, 0.4], temperature=0.5) == pytest.approx([4 / 9, 1 / 9, 4 / 9], abs=1e-3)
    assert shares([0.3, 0.4, 0.3], temperature=0) == [0, 1, 0]


@pytest.mark.parametrize("vocabulary", [3, 1000, 50_000])
def test_the_first_and_the_last_number_draw_tokens_that_can_be(vocabulary):
    logits = torch.randn(2, vocabulary, generator=seeded())
    logits[:, [0, -1]] = -math.inf
    first, last = choose(logits, torch.tensor([0.0, 1 - 2**-24])).tolist()
    assert 0 < first <= last < vocabulary - 1


# Images


def test_a_patch_knows_of_itself_and_of_those_before_it_row_by_row():
    torch.manual_seed(0)
    backbone = scrambled(GPTBackbone(1, 12, width=16, heads=2, layers=2))
    images = torch.rand(1, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    (last,) = backbone.features(images)
    grid, patch = backbone.patches.grid, backbone.patches.patch
    assert (grid, patch) == ((6, 6), 2)
    for row, column in [(0, 0), (0, 5), (2, 3), (5, 5)]:
        (gradient,) = torch.autograd.grad(last[0, :, row, column].square().sum(), images, retain_graph=True)
        seen = nn.functional.max_pool2d(gradient.abs(), patch).flatten() > 0
        assert seen.tolist() == [place <= row * 6 + column for place in range(36)]


def test_the_vector_is_what_is_known_at_the_last_patch():
    backbone = GPTBackbone(1, 28)
    images = torch.rand(2, 1, 28, 28)
    assert backbone(images).equal(backbone.features(images)[0][:, :, 6, 6])
    weights = sum(weight.numel() for weight in backbone.parameters())
    assert weights == (4 * 4 + 1) * 64 + 49 * 64 + 6 * (12 * 64**2 + 13 * 64) + 2 * 64 == 304_256
