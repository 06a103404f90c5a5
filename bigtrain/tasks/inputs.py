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
    }[inputs]


def require_lengths(samples: Mapping[str, NDArray[Any]]) -> None:
    """Refuse samples whose ``lengths``, if they have any, are not those of their tokens.

    Raises:
        DataError: a length is not in ``[1, T]``.
    """
    if "lengths" in samples:
        lengths, most = samples["lengths"], samples["tokens"].shape[1]
        if (wrong := lengths[(lengths < 1) | (lengths > most)]).size:
            raise DataError(f"lengths: {wrong[0]}, but a sample has from 1 to {most} tokens")


def require_size(outputs: Tensor, size: int, setting: str) -> None:
    """Refuse a network that returns something else than ``(B, size)``.

    Raises:
        ConfigError: it does; names ``setting``.
    """
    if outputs.shape[1:] != (size,):
        shape = ", ".join(map(str, outputs.shape[1:]))
        raise ConfigError(f"{setting}={size}, but the network returns ({shape}) for each sample; one of them is wrong")
