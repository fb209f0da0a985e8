"""Recurrent networks: a state that takes in a sequence step by step, and what gates do for its memory.

    RNN     h' = tanh(W x + U h)                                                    (Elman 1990, "Finding structure in time")
    LSTM    c' = f c + i tanh(W x + U h)        h' = o tanh(c')                     (Hochreiter & Schmidhuber 1997)
    GRU     n = tanh(W x + r (U h))             h' = (1 - z) n + z h                (Cho et al. 2014, arXiv:1406.1078)

The gates i, f, o, r and z are sigmoids of W x + U h with weights of their own. W x does not wait for the state, so it is one product
over all steps; only U h goes step by step. The backbones read an image as a sequence of rows, from top to bottom.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.backbones.backbone import Backbone, LastPlace, as_numbers, stem_stride

State = tuple[Tensor, ...]
"""What a cell carries from step to step, (N, width) each; the first is its output."""

# Cells


class Cell(nn.Module, ABC):
    """One layer: the same function as torch's with the same weights, including its two biases, of which only the GRU needs both."""

    gates: ClassVar[int]
    """Products of the input, and of the state, per unit."""
    states: ClassVar[int] = 1
    """Tensors in the state."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.inputs = nn.Linear(inputs, self.gates * width)
        self.recurrent = nn.Linear(width, self.gates * width)

    @abstractmethod
    def step(self, driven: Tensor, state: State) -> State:
        """The next state, of the input's product (N, gates * width) and the state."""

    def forward(self, sequence: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Outputs (N, T, width) and the last state, of inputs (N, T, inputs) and a first state, by default zeros."""
        state = state or (self.recurrent.weight.new_zeros(len(sequence), self.width),) * self.states
        outputs = []
        for driven in self.inputs(sequence).unbind(1):
            state = self.step(driven, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1), state


class RNNCell(Cell):
    """The simple one; its gradient shrinks or grows by a factor at every step (Bengio et al. 1994)."""

    gates = 1

    def step(self, driven: Tensor, state: State) -> State:
        """The next state."""
        return (torch.tanh(driven + self.recurrent(state[0])),)


class LSTMCell(Cell):
    """A memory that is added to, which keeps its gradient, and gates that say what enters, stays and leaves.

    With the forget gate of Gers et al. 2000, "Learning to forget", whose bias begins at 1, so that at first most stays
    (Jozefowicz et al. 2015, "An empirical exploration of recurrent network architectures").
    """

    gates = 4
    states = 2

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width)
        for layer, bias in ((self.inputs, 1.0), (self.recurrent, 0.0)):
            nn.init.constant_(layer.bias[width : 2 * width], bias)

    def step(self, driven: Tensor, state: State) -> State:
        """The next output and memory; the gates in torch's order: input, forget, candidate, output."""
        output, memory = state
        enter, stay, candidate, leave = (driven + self.recurrent(output)).chunk(4, 1)
        memory = torch.sigmoid(stay) * memory + torch.sigmoid(enter) * torch.tanh(candidate)
        return torch.sigmoid(leave) * torch.tanh(memory), memory


class GRUCell(Cell):
    """Two gates and no memory beside the output.

    In torch's variant: the reset gate multiplies U h with its bias; in the paper it multiplies h, which needs a product more per step.
    """

    gates = 3

    def step(self, driven: Tensor, state: State) -> State:
        """The next output; the products in torch's order: reset, update, candidate."""
        (output,) = state
        reset, update, candidate = driven.chunk(3, 1)
        reset_by_state, update_by_state, candidate_by_state = self.recurrent(output).chunk(3, 1)
        keep = torch.sigmoid(update + update_by_state)
        new = torch.tanh(candidate + torch.sigmoid(reset + reset_by_state) * candidate_by_state)
        return ((1 - keep) * new + keep * output,)


class Recurrent(nn.Module):
    """Layers of cells, each of which reads the outputs of the one before."""

    def __init__(self, kind: type[Cell], inputs: int, width: int, layers: int = 1) -> None:
        super().__init__()
        self.cells = nn.ModuleList(kind(width if layer else inputs, width) for layer in range(layers))

    def forward(self, sequence: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Outputs (N, T, width) of the last layer and the last state of each, of inputs (N, T, inputs) and, if not zero, first states."""
        last = []
        for layer, cell in enumerate(self.cells):
            sequence, state = cell(sequence, states[layer] if states else None)
            last.append(state)
        return sequence, last


# Backbones


class RowReader(Backbone):
    """Reads an image row by row; the vector is the output after the last row.

    From 42 pixels on, a step takes in several rows side by side (3 at 84 pixels), so that about 28 steps remain and no pixel is lost.
    The map is (N, width, steps, 1): what the last layer gives out at each step.
    """

    cell: ClassVar[type[Cell]]
    """What it is made of."""

    def __init__(self, in_channels: int, image_size: int, width: int = 128, layers: int = 1) -> None:
        """Args:
        width: numbers in a state.
        layers: cells on top of each other.
        """
        super().__init__()
        self.rows = stem_stride(image_size)
        self.missing = -image_size % self.rows
        self.recurrent = Recurrent(self.cell, in_channels * self.rows * image_size, width, layers)
        self.head = LastPlace()
        self.out_channels = (width,)
        self.out_features = width

    def features(self, images: Tensor) -> list[Tensor]:
        """The one map."""
        rows = F.pad(as_numbers(images), (0, 0, 0, self.missing)).unflatten(2, (-1, self.rows))
        outputs, _ = self.recurrent(rows.transpose(1, 2).flatten(2))
        return [outputs.mT.unsqueeze(3)]


class RNNReader(RowReader):
    """A row reader of simple cells."""

    paper = "Elman 1990, Finding structure in time, Cognitive Science 14"
    year = 1990
    cell = RNNCell


class LSTMReader(RowReader):
    """A row reader of LSTM cells."""

    paper = "Hochreiter & Schmidhuber 1997, Long short-term memory, Neural Computation 9; Gers et al. 2000, Learning to forget"
    year = 1997
    cell = LSTMCell


class GRUReader(RowReader):
    """A row reader of GRU cells."""

    paper = "Cho et al. 2014, Learning phrase representations using RNN encoder-decoder, arXiv:1406.1078"
    year = 2014
    cell = GRUCell


def rnn(in_channels: int, image_size: int, width: int = 128, layers: int = 1) -> RNNReader:
    """Simple cells: 20 thousand weights and 0.6 M multiply-adds for 28x28 grey pixels, 146 thousand and 4 M for 84x84 with 4 frames."""
    return RNNReader(in_channels, image_size, width, layers)


def lstm(in_channels: int, image_size: int, width: int = 128, layers: int = 1) -> LSTMReader:
    """LSTM cells: 81 thousand weights and 2 M multiply-adds for 28x28 grey pixels, 583 thousand and 16 M for 84x84 with 4 frames."""
    return LSTMReader(in_channels, image_size, width, layers)


def gru(in_channels: int, image_size: int, width: int = 128, layers: int = 1) -> GRUReader:
    """GRU cells: 61 thousand weights and 2 M multiply-adds for 28x28 grey pixels, 437 thousand and 12 M for 84x84 with 4 frames."""
    return GRUReader(in_channels, image_size, width, layers)
