"""The columns that a network may get, besides its targets."""

import torch

from bigtrain.config import Inputs
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
