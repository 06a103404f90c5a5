"""Small networks that transformers does not have: a perceptron, a convolutional and a recurrent network, and two adversaries.

None has batch normalisation: its statistics are those of a micro-batch on a rank, so they depend on how a step is cut.
"""

import itertools
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

import torch
from torch import Tensor, nn

from bigtrain.config.bounds import Bound
from bigtrain.errors import ConfigError, of_all_ranks
from bigtrain.models.loss import sum_cross_entropy_of_logits

NonLinearity = StrEnum("NonLinearity", "relu gelu tanh sigmoid")
_NON_LINEARITIES = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
Cell = StrEnum("Cell", "lstm gru")  # kind of recurrence


@dataclass(frozen=True, kw_only=True, slots=True)
class MLP:
    """Dense layers: ``(B, ...)`` of any shape to ``(B, num_outputs)``."""

    num_inputs: Annotated[int, Bound(ge=1)] = 784
    """Numbers in a sample, flattened."""
    hidden_dims: Annotated[list[int], Bound(ge=1)] = field(default_factory=lambda: [64, 64])
    """Width of each hidden layer; none makes a linear model."""
    num_outputs: Annotated[int | None, Bound(ge=1)] = None
    """Logits or values; by default as many as the task predicts, else 10."""
    activation: NonLinearity = NonLinearity.relu
    """Between the layers."""
    dropout: Annotated[float, Bound(ge=0, lt=1)] = 0.0
    """After each hidden layer."""

    def build(self) -> nn.Module:
        """Build the network on the current default device."""
        dims = [self.num_inputs, *self.hidden_dims]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(dims):
            layers += [nn.Linear(before, after), _NON_LINEARITIES[self.activation](), *_dropout(self.dropout)]
        return _OfSize((self.num_inputs,), [*layers, nn.Linear(dims[-1], self.num_outputs or 10)])


@dataclass(frozen=True, kw_only=True, slots=True)
class CNN:
    """Convolutions, the first ones followed by 2x2 max-pooling, and a dense layer: ``(B, C, H, W)`` to ``(B, num_outputs)``."""

    num_channels: Annotated[int, Bound(ge=1)] = 1
    """C."""
    image_size: Annotated[int, Bound(ge=1)] = 28
    """H and W in pixels."""
    channels: Annotated[list[int], Bound(ge=1)] = field(default_factory=lambda: [32, 64, 64])
    """Of each convolution."""
    kernel_size: Annotated[int, Bound(ge=1)] = 3
    """Of each convolution, odd."""
    pads: bool = True
    """Keep the size of an image in a convolution, with zeros around it."""
    num_pools: Annotated[int, Bound(ge=0)] = 2
    """Convolutions that are followed by max-pooling."""
    dense_dim: Annotated[int, Bound(ge=1)] = 64
    """Width of the dense layer."""
    num_outputs: Annotated[int | None, Bound(ge=1)] = None
    """Logits or values; by default as many as the task predicts, else 10."""
    group_norm: bool = False
    """Normalise after each convolution, in groups of 8 channels (Wu and He, "Group Normalization", 2018)."""
    dropout: Annotated[float, Bound(ge=0, lt=1)] = 0.0
    """Before the last layer."""

    def __post_init__(self) -> None:
        if self.pads and self.kernel_size % 2 == 0:
            raise ConfigError(f"model.settings.kernel_size={self.kernel_size}: must be odd with pads=true")
        if self.num_pools > len(self.channels):
            raise ConfigError(
                f"model.settings.num_pools={self.num_pools}: at most one for each of the {len(self.channels)} channels"
            )
        if self.group_norm and (uneven := [size for size in self.channels if size % max(size // 8, 1)]):
            raise ConfigError(
                f"model.settings.channels: {uneven[0]} does not divide into groups of 8; group_norm needs that"
            )
        if self.last_size() < 1:
            raise ConfigError(
                f"model.settings.image_size={self.image_size}: nothing is left of an image after these convolutions; use "
                "pads=true, fewer num_pools or larger images"
            )

    def last_size(self) -> int:
        """Return H and W after the convolutions."""
        size = self.image_size
        for number in range(1, len(self.channels) + 1):
            size -= 0 if self.pads else self.kernel_size - 1
            size //= 2 if number <= self.num_pools else 1
        return size

    def build(self) -> nn.Module:
        """Build the network on the current default device."""
        dims = [self.num_channels, *self.channels]
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(dims), start=1):
            layers.append(nn.Conv2d(before, after, self.kernel_size, padding=self.kernel_size // 2 * self.pads))
            layers += [nn.GroupNorm(max(after // 8, 1), after)] if self.group_norm else []
            layers.append(nn.ReLU())
            if number <= self.num_pools:
                layers.append(nn.MaxPool2d(2))
        dense = nn.Linear(dims[-1] * self.last_size() ** 2, self.dense_dim)
        head = [
            nn.Flatten(),
            dense,
            nn.ReLU(),
            *_dropout(self.dropout),
            nn.Linear(self.dense_dim, self.num_outputs or 10),
        ]
        return _OfSize((self.num_channels, self.image_size, self.image_size), [*layers, *head])


@dataclass(frozen=True, kw_only=True, slots=True)
class RNN:
    """A recurrent network: ``(B, T)`` ids or ``(B, T, num_inputs)``, read at its last step, to ``(B, num_outputs)``."""

    cell: Cell = Cell.lstm
    """Kind of recurrence."""
    vocab_size: Annotated[int, Bound(ge=0)] = 0
    """Ids below this are embedded; 0: the inputs are numbers."""
    num_inputs: Annotated[int, Bound(ge=1)] = 1
    """Numbers at each step, or the width of the embedding."""
    hidden_dim: Annotated[int, Bound(ge=1)] = 50
    """Width of the state."""
    num_layers: Annotated[int, Bound(ge=1)] = 2
    """Recurrent layers."""
    num_outputs: Annotated[int | None, Bound(ge=1)] = None
    """Logits or values; by default as many as the task predicts, else 2."""
    predicts_next: bool = False
    """With ``task=causal_lm``: read at every step, to predict the next id."""

    def __post_init__(self) -> None:
        if self.predicts_next and not self.vocab_size:
            raise ConfigError("model.settings.predicts_next=true: of how many ids? set model.settings.vocab_size")

    def build(self) -> nn.Module:
        """Build the network on the current default device."""
        return _RecurrentLM(self) if self.predicts_next else _Recurrent(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class GAN:
    """A generator, noise ``(B, num_inputs)`` to images from -1 to 1, and a discriminator, ``(B, C, H, W)`` to logits ``(B, 1)``."""

    num_inputs: Annotated[int | None, Bound(ge=1)] = None
    """Numbers of the noise; by default ``task.noise_dim``, else 64."""
    num_channels: Annotated[int, Bound(ge=1)] = 1
    """C."""
    image_size: Annotated[int, Bound(ge=1)] = 8
    """H and W in pixels."""
    channels: Annotated[list[int], Bound(ge=1)] = field(default_factory=lambda: [128, 64])
    """Of the generator's layers, each of which doubles the size of the image; the discriminator has them in reverse."""

    def __post_init__(self) -> None:
        if not self.channels or self.image_size % 2 ** len(self.channels):
            raise ConfigError(
                f"model.settings.image_size={self.image_size}: is not {2 ** len(self.channels)} times a whole number, as "
                f"often as channels={self.channels} double it"
            )

    def build(self) -> nn.Module:
        """Build both networks on the current default device."""
        return _Adversaries(self)


class _OfSize(nn.Sequential):
    """Layers that take samples of one size: ``(C, H, W)``, or ``(N,)`` numbers of any shape."""

    def __init__(self, size: tuple[int, ...], layers: list[nn.Module]) -> None:
        super().__init__(*layers)
        self.size = size

    def forward(self, inputs: Tensor) -> Tensor:
        shape = tuple(inputs.shape[1:])
        found = (math.prod(shape),) if len(self.size) == 1 else shape
        if found != self.size:
            settings = "num_inputs" if len(self.size) == 1 else "num_channels and image_size"
            raise of_all_ranks(
                ConfigError(
                    f"model.settings: the network takes {self.size} by its {settings}, but a sample has the shape {shape}"
                )
            )
        return super().forward(inputs)


class _Recurrent(nn.Module):
    def __init__(self, shape: RNN) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.num_inputs) if shape.vocab_size else nn.Identity()
        kind = nn.LSTM if shape.cell is Cell.lstm else nn.GRU
        self.recurrence = kind(shape.num_inputs, shape.hidden_dim, shape.num_layers, batch_first=True)
        num_outputs = shape.vocab_size if shape.predicts_next else shape.num_outputs or 2
        self.head = nn.Linear(shape.hidden_dim, num_outputs)

    def forward(self, inputs: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return ``(B, num_outputs)``, read at the last step of each sample."""
        if inputs.is_floating_point() == isinstance(self.embedding, nn.Embedding):
            what = "numbers" if inputs.is_floating_point() else "ids"
            needed = "0" if inputs.is_floating_point() else "<number of ids>, and model.settings.num_inputs=<width>"
            raise of_all_ranks(ConfigError(f"the rnn gets {what}, which need model.settings.vocab_size={needed}"))
        states_BTD, _ = self.recurrence(self.embedding(inputs))
        if lengths_B is None:
            return self.head(states_BTD[:, -1])
        rows = torch.arange(len(lengths_B), device=lengths_B.device)
        return self.head(states_BTD[rows, lengths_B - 1])


class _RecurrentLM(_Recurrent):
    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Return the logits of the next ids, ``(B, T, vocab_size)``, or the cross-entropy summed over targets."""
        states_BTD, _ = self.recurrence(self.embedding(tokens_BT))
        logits_BTV = self.head(states_BTD)
        return logits_BTV if targets_BT is None else sum_cross_entropy_of_logits(logits_BTV, targets_BT)


class _Adversaries(nn.Module):
    def __init__(self, shape: GAN) -> None:
        super().__init__()
        size, dims = shape.image_size // 2 ** len(shape.channels), [*shape.channels, shape.num_channels]
        makes: list[nn.Module] = [
            nn.Linear(shape.num_inputs or 64, dims[0] * size**2),
            nn.Unflatten(1, (dims[0], size, size)),
        ]
        judges: list[nn.Module] = []
        for before, after in itertools.pairwise(dims):
            makes += [nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1)]
        for before, after in itertools.pairwise(dims[::-1]):
            judges += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.generator = nn.Sequential(*makes, nn.Tanh())
        judges += [nn.Flatten(), nn.Linear(dims[0] * size**2, 1)]
        self.discriminator = _OfSize((shape.num_channels, shape.image_size, shape.image_size), judges)

    def forward(self, noise_BZ: Tensor) -> Tensor:
        return self.generator(noise_BZ)


def _dropout(share: float) -> list[nn.Module]:
    return [nn.Dropout(share)] if share else []


NETWORKS: dict[str, type[MLP] | type[CNN] | type[RNN] | type[GAN]] = {"mlp": MLP, "cnn": CNN, "rnn": RNN, "gan": GAN}
"""By ``model.name``."""
