"""Maps of where a model looks: rollout, Grad-CAM and saliency against loops and closed forms, and models made to look at one place."""

import pytest
import torch
from torch import nn

from lab.attention import maps
from lab.attention.maps import Looks, gradcam, looks, methods, on_pixels, refined, rollout, saliency, strongest, where, whole
from lab.attention.windows import WindowAttention
from lab.backbones import create
from lab.backbones.fpn import area_means
from lab.backbones.transformer import PatchBackbone
from lab.classifier import Classifier, ClassifierConfig
from lab.config import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

LOOKING = ["vit", "swin", "dit", "transformer", "gpt", "bert"]
PATCHES = 49
PATCH = 2 * 7 + 4
"""The third row's fifth: pixels 8 to 11 down and 16 to 19 to the right."""


def attention(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).mul(3).softmax(-1)


def classifier(backbone: str, side: int = 28, channels: int = 1) -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(backbone=backbone), (channels, side, side), ("a", "b", "c")).eval()


# Rollout


@pytest.mark.parametrize("residual", [0.5, 0.2])
def test_rollout_is_the_loop_over_layers_places_and_heads(residual):
    torch.manual_seed(0)
    layers = [attention(2, heads, 4, 4) for heads in (3, 1, 2)]
    layers[1][1, 0, 2] = 0  # a query that sees nothing
    found = rollout(layers, residual)
    for image in range(2):
        seen = [[float(i == j) for j in range(4)] for i in range(4)]
        for layer in layers:
            after = []
            for i in range(4):
                row = [(1 - residual) * sum(float(head[i, j]) for head in layer[image]) / len(layer[image]) for j in range(4)]
                row[i] += residual
                after.append([sum(row[k] / sum(row) * seen[k][j] for k in range(4)) for j in range(4)])
            seen = after
        torch.testing.assert_close(found[image], torch.tensor(seen, dtype=torch.float64))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, dtype=torch.float64))


def test_who_looks_at_himself_sees_himself():
    itself = torch.eye(5).expand(2, 3, 5, 5)
    assert rollout([itself] * 4).equal(torch.eye(5).expand(2, 5, 5))


def test_one_layer_that_looks_everywhere_alike():
    found = rollout([torch.full((1, 2, 4, 4), 0.25)])
    assert found[0].equal(0.5 * torch.eye(4) + 0.125)


# Of one class


def test_the_saliency_of_a_linear_model_is_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 6))
    classes = torch.tensor([4, 0, 4])
    found = saliency(model.requires_grad_(False), torch.rand(3, 3, 4, 5), classes)
    assert found.equal(model[1].weight.view(6, 3, 4, 5)[classes].abs().amax(1))


def averaged(name: str, body: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The map whose mean is the vector."""
    pyramid = body.features(images)
    if name == "fpn":
        return torch.stack([area_means(level, 7, 7) for level in pyramid]).mean(0)
    return body.head[0](pyramid[-1]) if name == "mobilenet_v2" else pyramid[-1]


@pytest.mark.parametrize("name", ["convnext", "mobilenet_v2", "fpn", "vit"])
def test_before_one_linear_layer_gradcam_is_the_class_activation_map(name):
    """Zhou et al. 2016: the last layer, which reads the mean, read at each place instead."""
    model, images, classes = classifier(name).requires_grad_(False), torch.rand(3, 1, 28, 28), torch.tensor([2, 0, 1])
    model.head.weight.normal_()
    found, places = gradcam(model, images, classes), averaged(name, model.body, images)
    expected = torch.einsum("nchw,nc->nhw", places, model.head.weight[classes]).relu() / places[0, 0].numel()
    assert expected.count_nonzero() not in (0, expected.numel())
    torch.testing.assert_close(found, expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


# Attention of backbones


def stare(heads: nn.Module) -> None:
    """Have all heads look for the first number of a token, and nothing else."""
    width = heads.width
    nn.init.zeros_(heads.inputs.weight)
    heads.inputs.bias.data[:width] = 10
    heads.inputs.weight.data[width : 2 * width, 0] = 1


def first_number(body: PatchBackbone) -> None:
    """The first number of a token tells whether its patch is bright; attention and all else do nothing."""
    for name, weight in body.named_parameters():
        if "norm" not in name:
            nn.init.zeros_(weight)
    body.patches.projection.weight.data[0] = 1
    body.positions = nn.Identity()


def bright_patch() -> torch.Tensor:
    images = torch.zeros(1, 1, 28, 28)
    images[:, :, 8:12, 16:20] = 1
    return images


PAST = 0.5**6
"""What passes all layers by."""


@torch.no_grad()
def test_a_vit_that_looks_only_at_one_patch_has_its_map_there():
    model = classifier("vit")
    first_number(model.body)
    for layer in model.body.encoder.layers:
        stare(layer.attention)
    expected = torch.full((PATCHES,), PAST / PATCHES)
    expected[PATCH] += 1 - PAST
    torch.testing.assert_close(looks(model.body, bright_patch()).rollout()[0], expected)
    shares, method = where(model, bright_patch())
    assert method == "rollout"
    assert shares[0, 9:11, 17:19].min() > 0.75
    assert shares[0].flatten().argsort()[-4:].sort().values.tolist() == [28 * y + x for y in (9, 10) for x in (17, 18)]
    assert shares[0, :4].max() < 0.001
    for layer in maps.heads(model, bright_patch()).values():
        torch.testing.assert_close(layer, shares.expand_as(layer), atol=2e-3, rtol=0)


@torch.no_grad()
def test_gpt_is_read_at_its_last_place():
    model = classifier("gpt")
    first_number(model.body)
    for layer in model.body.encoder.layers:
        stare(layer.attention)
    expected = torch.zeros(PATCHES)
    expected[PATCH], expected[-1] = 1 - PAST, PAST
    seen = looks(model.body, bright_patch())
    torch.testing.assert_close(seen.rollout()[0], expected)
    torch.testing.assert_close(seen.heads()[0][0], torch.eye(PATCHES)[PATCH].expand(4, -1))


@torch.no_grad()
def test_the_transformer_is_read_where_its_decoder_looks():
    model = classifier("transformer")
    first_number(model.body)
    stare(model.body.head.decoder.layers[0].cross)
    expected = torch.full((PATCHES,), (1 - PAST) / PATCHES)  # the encoder looks everywhere alike
    expected[PATCH] += PAST
    torch.testing.assert_close(looks(model.body, bright_patch()).rollout()[0], expected)
    layers = maps.heads(model, bright_patch())
    assert list(layers) == [*(f"layer {number}" for number in range(1, 7)), "decoder"]
    torch.testing.assert_close(layers["layer 6"], torch.ones(1, 4, 28, 28))
    assert layers["decoder"][0, :, 9:11, 17:19].min() > 0.75
    assert layers["decoder"][0, :, :4].max() < 0.001


@torch.no_grad()
@pytest.mark.parametrize(("window", "shift", "side"), [(2, 1, 6), (3, 0, 6), (4, 1, 4)])
def test_weights_within_windows_are_weights_within_the_map(window, shift, side):
    torch.manual_seed(0)
    module, given = WindowAttention(8, 2, window, shift), torch.randn(3, side, side, 8)
    dense = whole(module.weights(given), 3, module)
    values = module.inputs(given)[..., 16:].view(3, side * side, 2, 4).transpose(1, 2)
    torch.testing.assert_close(module.output((dense @ values).transpose(1, 2).flatten(2)), module(given).flatten(1, 2))
    torch.testing.assert_close(dense.sum(-1), torch.ones(3, 2, side * side))


def test_a_merged_place_has_a_quarter_of_each_of_its_four():
    torch.manual_seed(0)
    fine, coarse, reading = attention(2, 3, 16, 16), attention(2, 1, 4, 4), attention(2, 5, 4)
    merging = torch.zeros(4, 16, dtype=torch.float64)
    for y in range(4):
        for x in range(4):
            merging[y // 2 * 2 + x // 2, 4 * y + x] = 0.25
    read = reading.mean(1, keepdim=True)
    seen = Looks([fine, fine, coarse], reading)
    torch.testing.assert_close(seen.rollout(), (read @ rollout([coarse]) @ merging @ rollout([fine, fine]))[:, 0])
    for found, weights, share in zip(seen.heads(), seen.layers, [read @ merging, read @ merging, read]):
        torch.testing.assert_close(found, torch.einsum("nl,nhlm->nhm", share[:, 0], weights))
    assert refined(read, 4) is read


@pytest.mark.parametrize("name", LOOKING)
def test_all_of_the_vector_comes_from_somewhere(name):
    model = classifier(name)
    for side in (10, 28):
        seen = looks(create(name, 3, side).eval(), torch.rand(2, 3, side, side))
        torch.testing.assert_close(seen.rollout().sum(1), torch.ones(2))
        assert len(seen.layers) == 6
        for layer in (*seen.heads(), seen.reading):
            torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:2]))
    assert methods(model.body)[:2] == ("rollout", "heads")


@pytest.mark.parametrize(("name", "side", "cell"), [("vit", 28, 4), ("vit", 30, 4), ("vit", 10, 1), ("swin", 28, 2), ("swin", 30, 3)])
def test_each_patch_is_drawn_where_it_is(name, side, cell):
    body = create(name, 1, side)
    places = -(-side // cell) if name == "vit" else 14
    seen = min(places, -(-side // cell))  # the rest of Swin's patches lie outside
    for row, column in ((0, 0), (1, seen // 2), (seen - 1, seen - 1)):
        shares = torch.zeros(2, places, places)
        shares[1, row, column] = 1
        drawn = on_pixels(body, shares.flatten(1), side)
        assert drawn.shape == (2, side, side)
        assert not drawn[0].any()
        peak = divmod(int(drawn[1].argmax()), side)
        assert (peak[0] // cell, peak[1] // cell) == (row, column)
    torch.testing.assert_close(on_pixels(body, torch.ones(1, 4, places**2), side), torch.ones(1, 4, side, side))


# One way for all


WAYS = [("vit", "rollout"), ("resnet_small", "gradcam"), ("lenet", "saliency"), ("gru", "saliency"), ("nature", "saliency")]


@pytest.mark.parametrize(("name", "expected"), WAYS)
def test_every_classifier_has_a_map_of_its_image_whose_most_is_one(name, expected):
    model = classifier(name, 28, 3).requires_grad_(False)
    images = torch.rand(2, 3, 28, 28)
    shares, method = where(model, images)
    assert (shares.shape, method) == ((2, 28, 28), expected)
    assert shares.min() >= 0
    assert shares.amax((1, 2)).tolist() == [1, 1]
    assert where(model, images, method)[0].equal(shares)
    each = torch.cat([where(model, image[None])[0] for image in images])
    torch.testing.assert_close(each, shares)


def test_the_map_is_of_the_class_that_is_taken():
    model, images = classifier("lenet").requires_grad_(False), torch.rand(4, 1, 28, 28)
    for taken in range(3):
        model.head.bias.zero_()[taken] = 100
        assert where(model, images)[0].equal(strongest(saliency(model, images, torch.full((4,), taken))))


def test_a_map_without_anything_stays_empty():
    assert not strongest(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize(("name", "method", "has"), [("resnet_small", "rollout", "gradcam, saliency"), ("lenet", "gradcam", "saliency")])
def test_a_method_that_a_backbone_lacks_is_answered_with_those_it_has(name, method, has):
    with pytest.raises(UserError, match=f"has no map by {method}; it has {has}$"):
        where(classifier(name), torch.rand(1, 1, 28, 28), method)
    with pytest.raises(UserError, match=f"has no map by heads; it has {has}$"):
        maps.heads(classifier(name), torch.rand(1, 1, 28, 28))
