"""Costs: multiply-adds of known layers in closed form, weights by hand, times that leave the network alone."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lab.attention.multihead import MultiHead
from lab.backbones import Backbone, create
from lab.backbones.cost import Cost, cost, median_seconds, multiplies, parameters, seconds
from lab.config import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


class Single(Backbone):
    """A backbone of one layer, whose vector is the map."""

    def __init__(self, layer, prepare=lambda images: images):
        super().__init__()
        self.layer, self.prepare, self.head = layer, prepare, nn.Flatten()

    def features(self, images):
        made = self.layer(self.prepare(images))
        return [made[0] if isinstance(made, tuple) else made]


class Cell(nn.Module):
    """A cell of torch in a loop over tokens (N, L, C)."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, tokens):
        state = None
        for token in tokens.unbind(1):
            state = self.cell(token, state)
        return state


def rows(images):
    """The rows of an image as tokens (N, H, C * W)."""
    return images.transpose(1, 2).flatten(2)


class Looking(nn.Module):
    """Torch's fused attention of tokens (N, L, d) to themselves, in heads of 4."""

    def forward(self, tokens):
        each = tokens.unflatten(2, (-1, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(each, each, each)


# Images are (3, 8, 8): 64 places, or 8 tokens of 24 numbers.
LAYERS = {
    "convolution": (Single(nn.Conv2d(3, 5, 3, padding=1)), 64 * 9 * 3 * 5),
    "with a stride": (Single(nn.Conv2d(3, 5, 3, stride=2)), 3 * 3 * 9 * 3 * 5),
    "depthwise": (Single(nn.Conv2d(3, 3, 3, padding=1, groups=3)), 64 * 9 * 3),
    "in groups": (Single(nn.Conv2d(6, 12, 3, padding=1, groups=3), lambda images: images.repeat(1, 2, 1, 1)), 64 * 9 * 2 * 4 * 3),
    "dilated": (Single(nn.Conv2d(3, 5, 3, padding=2, dilation=2)), 64 * 9 * 3 * 5),
    "transposed": (Single(nn.ConvTranspose2d(3, 5, 2, stride=2)), 64 * 4 * 3 * 5),
    "linear": (Single(nn.Linear(24, 10), rows), 8 * 24 * 10),
    "linear over the whole": (Single(nn.Linear(192, 10), lambda images: images.flatten(1)), 192 * 10),
    "pooling and normalisation": (Single(nn.Sequential(nn.MaxPool2d(2), nn.GroupNorm(3, 3), nn.ReLU())), 0),
    "product of two inputs": (Single(nn.Identity(), lambda images: rows(images) @ rows(images).mT), 8 * 24 * 8),
    "fused attention": (Single(Looking(), rows), 2 * 8 * 8 * 24),
    "multi-head attention": (Single(MultiHead(24, 4), rows), 4 * 8 * 24 * 24 + 2 * 8 * 8 * 24),
    "masked attention": (Single(MultiHead(24, 4, causal=True), rows), 4 * 8 * 24 * 24 + 2 * 8 * 8 * 24),
    "torch's rnn": (Single(nn.RNN(24, 7, batch_first=True), rows), 8 * 7 * (24 + 7)),
    "torch's gru": (Single(nn.GRU(24, 7, batch_first=True), rows), 8 * 3 * 7 * (24 + 7)),
    "torch's lstm": (Single(nn.LSTM(24, 7, batch_first=True), rows), 8 * 4 * 7 * (24 + 7)),
    "two layers of lstm": (Single(nn.LSTM(24, 7, 2, batch_first=True), rows), 8 * 4 * 7 * (24 + 7) + 8 * 4 * 7 * (7 + 7)),
    "gru cell in a loop": (Single(Cell(nn.GRUCell(24, 7)), rows), 8 * 3 * 7 * (24 + 7)),
    "lstm cell in a loop": (Single(Cell(nn.LSTMCell(24, 7)), rows), 8 * 4 * 7 * (24 + 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_multiplies_of_a_layer_are_those_by_hand(name):
    backbone, expected = LAYERS[name]
    assert multiplies(backbone, 3, 8) == expected
    with torch.no_grad():
        assert multiplies(backbone, 3, 8) == expected


@pytest.mark.parametrize("size", [28, 36, 84])
def test_nature_multiplies_what_its_paper_makes_it(size):
    side = max(size, 36)
    first, hidden = (side - 8) // 4 + 1, 512
    second = (first - 4) // 2 + 1
    third = second - 2
    expected = first**2 * 64 * 4 * 32 + second**2 * 16 * 32 * 64 + third**2 * 9 * 64 * 64 + third**2 * 64 * hidden
    assert multiplies(create("nature", 4, size), 4, size) == expected
    assert size != 84 or expected == 9_342_976  # 3.28 M + 2.65 M + 1.81 M + 1.61 M


def test_dropout_and_batch_statistics_cost_nothing_and_stay_as_they_are():
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    backbone = Single(layers).train()
    backbone(torch.rand(2, 3, 8, 8)).sum().backward()
    before, gradient = {name: each.clone() for name, each in backbone.state_dict().items()}, layers[0].weight.grad.clone()
    assert multiplies(backbone, 3, 8) == 64 * 3 * 4
    assert all(seconds(backbone, 3, 8, batch=2, repeats=1))
    assert backbone.training
    assert all(module.training for module in backbone.modules())
    assert all(each.equal(before[name]) for name, each in backbone.state_dict().items())
    assert layers[0].weight.grad.equal(gradient)
    assert layers[0].weight.device.type == "cpu"


def test_parameters_are_counted_once_and_buffers_not():
    layer = nn.Linear(3, 4)
    assert parameters(layer) == 16
    assert parameters(nn.Sequential(layer, layer, nn.BatchNorm2d(5))) == 16 + 10
    assert parameters(create("nature", 4, 84)) == 1_684_128


def test_a_cost_tells_what_the_backbone_is():
    found = cost("nature", 4, 84)
    assert dataclasses.asdict(found) == {
        "name": "nature",
        "family": "nature",
        "paper": create("nature", 4, 84).paper,
        "year": 2015,
        "parameters": 1_684_128,
        "multiplies": 9_342_976,
    }
    assert isinstance(found, Cost)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.year = 2016


def test_the_family_is_the_file():
    assert cost("vgg_small", 1, 28).family == "vgg"


def test_the_cost_of_no_backbone_is_refused():
    with pytest.raises(UserError, match="no backbone is called 'natur'"):
        cost("natur", 4, 84)


def test_times_are_of_forward_without_and_with_backward():
    calls = []

    class Watched(nn.Module):
        def forward(self, images):
            calls.append((self.training, torch.is_grad_enabled(), tuple(images.shape)))
            return images

    forward, both = seconds(Single(nn.Sequential(Watched(), nn.Conv2d(2, 3, 3))), 2, 9, batch=5, repeats=3)
    assert forward > 0
    assert both > 0
    assert calls == [(False, False, (5, 2, 9, 9))] * 5 + [(True, True, (5, 2, 9, 9))] * 5


def test_the_time_is_the_median_of_those_after_the_warm_up(monkeypatch):
    ends = iter([9.0, 9.0, 1.0, 5.0, 2.0])
    now = [0.0]
    monkeypatch.setattr("lab.backbones.cost.time.perf_counter", lambda: now[0])

    def work():
        now[0] += next(ends)

    assert median_seconds(work, repeats=3) == 2.0
