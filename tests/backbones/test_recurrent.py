"""Recurrent networks: the same functions as torch's, and how the backbones read an image."""

import pytest
import torch
from torch import nn

from lab.backbones import create
from lab.backbones.cost import multiplies, parameters
from lab.backbones.recurrent import GRUCell, LSTMCell, Recurrent, RNNCell

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"rnn": (RNNCell, nn.RNN, 1), "lstm": (LSTMCell, nn.LSTM, 4), "gru": (GRUCell, nn.GRU, 3)}
"""Our cell, torch's stack and the number of products per unit."""


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(name, inputs, width, layers):
    """Ours and torch's with the same weights, which stand in the same order."""
    torch.manual_seed(0)
    cell, theirs, _ = KINDS[name]
    ours, torchs = Recurrent(cell, inputs, width, layers), theirs(inputs, width, layers, batch_first=True)
    for mine, other in zip(matched(ours), torchs.parameters(), strict=True):
        mine.data.copy_(other)
    return ours, torchs


def matched(recurrent):
    """Weights of the input, of the state, and the biases of both, layer by layer."""
    kinds = ("inputs.weight", "recurrent.weight", "inputs.bias", "recurrent.bias")
    return [cell.get_parameter(kind) for cell in recurrent.cells for kind in kinds]


def as_torchs(name, states):
    """Our states per layer as torch's: a tensor (layers, N, width), or two for the LSTM."""
    stacked = tuple(torch.stack(layers) for layers in zip(*states, strict=True))
    return stacked if name == "lstm" else stacked[0]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("begun", [False, True])
def test_outputs_states_and_gradients_are_those_of_torch(name, layers, begun):
    ours, torchs = pair(name, 5, 6, layers)
    mine, other = noise(4, 7, 5).requires_grad_(), noise(4, 7, 5).requires_grad_()
    first = [tuple(noise(4, 6, seed=10 * layer + part) for part in range(1 + (name == "lstm"))) for layer in range(layers)]
    outputs, last = ours(mine, first if begun else None)
    expected, expected_last = torchs(other, as_torchs(name, first) if begun else None)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(as_torchs(name, last), expected_last)
    (outputs * noise(4, 7, 6, seed=3)).sum().backward()
    (expected * noise(4, 7, 6, seed=3)).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
    for weight, torchs_weight in zip(matched(ours), torchs.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, torchs_weight.grad)
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", KINDS)
def test_a_sequence_in_two_parts_is_the_sequence(name):
    ours = Recurrent(KINDS[name][0], 3, 4, 2)
    sequence = noise(2, 9, 3)
    outputs, last = ours(sequence)
    before, states = ours(sequence[:, :4])
    after, again = ours(sequence[:, 4:], states)
    torch.testing.assert_close(torch.cat([before, after], 1), outputs)
    torch.testing.assert_close(again, last)


def test_formulas_of_the_gates():
    """One unit and one step by hand: i, f, g, o of the LSTM and r, z, n of the GRU."""
    x, h, c = 0.7, -0.4, 0.9
    lstm, gru = LSTMCell(1, 1), GRUCell(1, 1)
    sigmoid, tanh = torch.sigmoid, torch.tanh
    w, u, b = (lstm.inputs.weight[:, 0], lstm.recurrent.weight[:, 0], lstm.inputs.bias + lstm.recurrent.bias)
    i, f, g, o = (w * x + u * h + b).unbind()
    memory = sigmoid(f) * c + sigmoid(i) * tanh(g)
    _, (output, kept) = lstm(torch.tensor([[[x]]]), (torch.tensor([[h]]), torch.tensor([[c]])))
    torch.testing.assert_close((output[0, 0], kept[0, 0]), (sigmoid(o) * tanh(memory), memory))
    (r, z, n), (ur, uz, un) = gru.inputs(torch.tensor([x])), gru.recurrent(torch.tensor([h]))
    z, n = sigmoid(z + uz), tanh(n + sigmoid(r + ur) * un)
    _, (output,) = gru(torch.tensor([[[x]]]), (torch.tensor([[h]]),))
    torch.testing.assert_close(output[0, 0], (1 - z) * n + z * h)


# How they begin


def test_the_forget_gate_begins_open_and_no_other_does():
    torch.manual_seed(0)
    cell = LSTMCell(20, 30)
    assert (cell.inputs.bias + cell.recurrent.bias)[30:60].equal(torch.ones(30))
    for layer, inputs in ((cell.inputs, 20), (cell.recurrent, 30)):
        others = torch.cat([layer.bias[:30], layer.bias[60:]])
        assert 0.8 * inputs**-0.5 < others.abs().max() <= inputs**-0.5
        assert layer.weight.abs().max() <= inputs**-0.5


def test_an_lstm_remembers_longer_than_the_simple_network():
    """Gradient of the last output by the first step's input, over 40 steps of silence."""
    gradients = {}
    for name, (cell, _, _) in KINDS.items():
        torch.manual_seed(0)
        sequence = torch.zeros(1, 40, 8).requires_grad_()
        outputs, _ = Recurrent(cell, 8, 64)(sequence)
        (by_input,) = torch.autograd.grad(outputs[0, -1].sum(), sequence)
        gradients[name] = (by_input[0, 0].norm() / by_input[0, -1].norm()).item()
    assert gradients["lstm"] > 1e4 * gradients["rnn"]


# Backbones


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("size", "steps", "rows"), [(8, 8, 1), (28, 28, 1), (41, 41, 1), (43, 22, 2), (64, 32, 2), (84, 28, 3), (128, 26, 5)]
)
def test_about_28_steps_remain(name, size, steps, rows):
    backbone = create(name, 2, size, width=6)
    (maps,) = backbone.features(noise(3, 2, size, size))
    assert maps.shape == (3, 6, steps, 1)
    assert backbone(noise(3, 2, size, size)).equal(maps[:, :, -1, 0])
    products = KINDS[name][2]
    assert parameters(backbone) == products * 6 * (2 * rows * size + 6 + 2)
    assert multiplies(backbone, 2, size) == steps * products * 6 * (2 * rows * size + 6)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("size", "rows"), [(9, 1), (84, 3), (43, 2)])
def test_a_step_is_rows_from_top_to_bottom(name, size, rows):
    backbone = create(name, 2, size, width=6, layers=2)
    torchs = KINDS[name][1](2 * rows * size, 6, 2, batch_first=True)
    for mine, other in zip(matched(backbone.recurrent), torchs.parameters(), strict=True):
        other.data.copy_(mine)
    images = noise(2, 2, size, size)
    sequence = []
    for top in range(0, size, rows):
        band = torch.zeros(2, 2, rows, size)
        present = images[:, :, top : top + rows]
        band[:, :, : present.shape[2]] = present
        sequence.append(band.flatten(1))
    outputs, _ = torchs(torch.stack(sequence, 1))
    torch.testing.assert_close(backbone.features(images)[0][:, :, :, 0].mT, outputs)


@pytest.mark.parametrize("name", KINDS)
def test_every_pixel_is_seen_and_none_before_its_time(name):
    backbone = create(name, 1, 43, width=16)
    images = torch.rand(1, 1, 43, 43, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (maps,) = backbone.features(images)
    (by_last,) = torch.autograd.grad(maps[0, :, -1].sum(), images, retain_graph=True)
    assert (by_last != 0).float().mean() > 0.99
    (by_third,) = torch.autograd.grad(maps[0, :, 2].sum(), images)
    assert by_third[0, 0, :6].abs().sum(1).min() > 0
    assert by_third[0, 0, 6:].abs().sum() == 0


@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_the_numbers_that_they_stand_for(name):
    backbone = create(name, 1, 12, width=6)
    seen = torch.randint(256, (2, 1, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.testing.assert_close(backbone(seen), backbone(seen.float() / 255))


@pytest.mark.parametrize("name", KINDS)
def test_sizes_are_as_the_docstrings_say(name):
    found = [parameters(create(name, *shape)) for shape in ((1, 28), (4, 84))]
    assert found == {"rnn": [20_224, 145_664], "lstm": [80_896, 582_656], "gru": [60_672, 436_992]}[name]


@pytest.mark.parametrize("name", KINDS)
def test_a_memory_keeps_its_digits_in_half_precision(name):
    """Products in bf16, but what is carried from step to step is float32 where it is added up."""
    ours = Recurrent(KINDS[name][0], 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, ((*_, carried),) = ours(noise(2, 5, 4))
    assert outputs.shape == (2, 5, 8)
    assert carried.dtype == (torch.bfloat16 if name == "rnn" else torch.float32)
