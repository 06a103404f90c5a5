"""Small networks that transformers does not have: a perceptron, a convolutional and a recurrent network.

None has batch normalisation: its statistics are those of a micro-batch on a rank, so they depend on how a step is cut.
"""

import itertools
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn


class NonLinearity(Enum):
    """What stands between two layers."""

    relu = "relu"
    gelu = "gelu"
    tanh = "tanh"
    sigmoid = "sigmoid"

    def build(self) -> nn.Module:
        """Return it as a module."""
        return {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}[self.value]()


class Cell(Enum):
    """Kind of recurrence."""

    lstm = "lstm"
    gru = "gru"


@dataclass(frozen=True, kw_only=True, slots=True)
class MLP:
    """Dense layers: ``(B, ...)`` of any shape to ``(B, num_outputs)``."""

    num_inputs: int = 784
    """Numbers in a sample, flattened."""
    hidden_dims: list[int] = field(default_factory=lambda: [64, 64])
    """Width of each hidden layer; none makes a linear model."""
    num_outputs: int = 10
    """Logits or values."""
    activation: NonLinearity = NonLinearity.relu
    """Between the layers."""
    dropout: float = 0.0
    """After each hidden layer."""

    def build(self) -> nn.Module:
        """Build the network on the current default device."""
        dims = [self.num_inputs, *self.hidden_dims]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(dims):
            layers += [nn.Linear(before, after), self.activation.build(), *_dropout(self.dropout)]
        return nn.Sequential(*layers, nn.Linear(dims[-1], self.num_outputs))


@dataclass(frozen=True, kw_only=True, slots=True)
class CNN:
    """Convolutions, the first ones followed by 2x2 max-pooling, and a dense layer: ``(B, C, H, W)`` to ``(B, num_outputs)``."""

    num_channels: int = 1
    """C."""
    image_size: int = 28
    """H and W in pixels."""
    channels: list[int] = field(default_factory=lambda: [32, 64, 64])
    """Of each convolution."""
    kernel_size: int = 3
    """Of each convolution, odd."""
    pads: bool = True
    """Keep the size of an image in a convolution, with zeros around it."""
    num_pools: int = 2
    """Convolutions that are followed by max-pooling."""
    dense_dim: int = 64
    """Width of the dense layer."""
    num_outputs: int = 10
    """Logits or values."""
    group_norm: bool = False
    """Normalise after each convolution, in groups of 8 channels (Wu and He, "Group Normalization", 2018)."""
    dropout: float = 0.0
    """Before the last layer."""

    def build(self) -> nn.Module:
        """Build the network on the current default device."""
        dims, size = [self.num_channels, *self.channels], self.image_size
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(dims), start=1):
            layers.append(nn.Conv2d(before, after, self.kernel_size, padding=self.kernel_size // 2 * self.pads))
            size -= 0 if self.pads else self.kernel_size - 1
            layers += [nn.GroupNorm(max(after // 8, 1), after)] if self.group_norm else []
            layers.append(nn.ReLU())
            if number <= self.num_pools:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        dense = nn.Linear(dims[-1] * size**2, self.dense_dim)
        head = [nn.Flatten(), dense, nn.ReLU(), *_dropout(self.dropout), nn.Linear(self.dense_dim, self.num_outputs)]
        return nn.Sequential(*layers, *head)


@dataclass(frozen=True, kw_only=True, slots=True)
class RNN:
    """A recurrent network read at its last step: ``(B, T)`` ids or ``(B, T, num_inputs)`` to ``(B, num_outputs)``."""

    cell: Cell = Cell.lstm
    """Kind of recurrence."""
    vocab_size: int = 0
    """Ids below this are embedded; 0: the inputs are numbers."""
    num_inputs: int = 1
    """Numbers at each step, or the width of the embedding."""
    hidden_dim: int = 50
    """Width of the state."""
    num_layers: int = 2
    """Recurrent layers."""
    num_outputs: int = 2
    """Logits or values."""

    def build(self) -> nn.Module:
        """Build the network on the current default device."""
        return _Recurrent(self)


class _Recurrent(nn.Module):
    def __init__(self, shape: RNN) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.num_inputs) if shape.vocab_size else nn.Identity()
        kind = nn.LSTM if shape.cell is Cell.lstm else nn.GRU
        self.recurrence = kind(shape.num_inputs, shape.hidden_dim, shape.num_layers, batch_first=True)
        self.head = nn.Linear(shape.hidden_dim, shape.num_outputs)

    def forward(self, inputs: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return ``(B, num_outputs)``, read at the last step of each sample."""
        states_BTD, _ = self.recurrence(self.embedding(inputs))
        if lengths_B is None:
            return self.head(states_BTD[:, -1])
        rows = torch.arange(len(lengths_B), device=lengths_B.device)
        return self.head(states_BTD[rows, lengths_B - 1])


def _dropout(share: float) -> list[nn.Module]:
    return [nn.Dropout(share)] if share else []


NETWORKS: dict[str, type[MLP] | type[CNN] | type[RNN]] = {"mlp": MLP, "cnn": CNN, "rnn": RNN}
"""By ``model.name``."""
