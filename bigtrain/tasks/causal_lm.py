"""The cross-entropy of the next token."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective


class CausalLM(Objective):
    """Cross-entropy of the next token; with ``positions``, samples hold documents that each begin at position 0."""

    fields: Mapping[str, Field] = {
        "tokens": Field(torch.int64, ("T",)),
        "targets": Field(torch.int64, ("T",), ignored=IGNORE_INDEX),
        "positions": Field(torch.int64, ("T",), is_optional=True),
    }
    counts_by_shape = True

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return np.count_nonzero(samples["targets"] != IGNORE_INDEX, axis=1)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the summed loss in nats; the network computes it, so that the logits of all tokens never exist at once."""
        return network(*tensors)

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        return {"perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """Return e to the loss; infinite where a float ends."""
    return math.inf if loss >= 709 else math.exp(loss)
