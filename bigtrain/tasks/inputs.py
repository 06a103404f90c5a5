"""The columns that a network may get, besides its targets."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.config import Inputs
from bigtrain.errors import ConfigError, DataError
from bigtrain.tasks.base import Field


def input_fields(inputs: Inputs) -> dict[str, Field]:
    """Return the fields of a kind of input, in the order in which networks take them."""
    return {
        # A sample without a token would attend to nothing.
        Inputs.tokens: {"tokens": Field(torch.int64, ("T",)), "lengths": Field(torch.int64, (), padding=1)},
        Inputs.pixels: {"pixels": Field(torch.float32, ("C", "H", "W"))},
        Inputs.features: {"features": Field(torch.float32, ("F",))},
        Inputs.sequence: {"sequence": Field(torch.float32, ("T", "F"))},
        Inputs.audio: {"audio": Field(torch.float32, ("A",)), "audio_lengths": Field(torch.int64, (), padding=1)},
    }[inputs]


def require_lengths(samples: Mapping[str, NDArray[Any]]) -> None:
    """Raise a DataError for samples with a length outside of ``[1, T]`` of what it belongs to."""
    for name, of in (("lengths", "tokens"), ("source_lengths", "source"), ("audio_lengths", "audio")):
        if name in samples:
            lengths, most = samples[name], samples[of].shape[1]
            if (wrong := lengths[(lengths < 1) | (lengths > most)]).size:
                raise DataError(
                    f"{name}: {wrong[0]}, but a sample has from 1 to {most} {'numbers' if of == 'audio' else 'tokens'}"
                )


def require_size(outputs: Tensor, size: int, setting: str, *, each: str = "sample") -> None:
    """Raise a ConfigError unless a network returns ``(B, size)``, or ``(B, T, size)`` for each token."""
    first = 1 if each == "sample" else 2
    if outputs.shape[first:] != (size,):
        shape = ", ".join(map(str, outputs.shape[first:]))
        raise ConfigError(f"{setting}={size}, but the network returns ({shape}) for each {each}; one of them is wrong")
