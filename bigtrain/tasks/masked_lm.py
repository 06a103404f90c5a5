"""Hidden tokens, predicted from both sides."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective


class MaskedLM(Objective):
    """Cross-entropy of the tokens that :class:`bigtrain.tasks.masking.Masking` has chosen."""

    fields: Mapping[str, Field] = {
        "tokens": Field(torch.int64, ("T",)),
        "targets": Field(torch.int64, ("T",), ignored=IGNORE_INDEX),
    }
    sums: Mapping[str, tuple[int, ...]] = {"correct": (), "targets": ()}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return np.count_nonzero(samples["targets"] != IGNORE_INDEX, axis=1)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        tokens_BT, targets_BT = tensors
        return sums_of_tokens(network, (tokens_BT,), targets_BT)

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        return {"accuracy": float(sums["correct"]) / max(float(sums["targets"]), 1.0)}


def sums_of_tokens(network: nn.Module, inputs: Sequence[Tensor], targets_BT: Tensor) -> Tensor:
    """Return loss, right predictions and number of the targets that are not ignored, fp32 ``(3,)``."""
    counted_BT = targets_BT != IGNORE_INDEX
    logits_NV, targets_N = _logits_at(network, inputs, counted_BT).float(), targets_BT[counted_BT]
    loss = F.cross_entropy(logits_NV, targets_N, reduction="sum")
    correct = (logits_NV.argmax(dim=-1) == targets_N).sum()
    return torch.stack([loss, correct.float(), counted_BT.sum().float()])


def _logits_at(network: nn.Module, inputs: Sequence[Tensor], places_BT: Tensor) -> Tensor:
    """Return the logits ``(N, V)`` of some places; a network that names its last layer computes no others."""
    if (last := getattr(network, "output_layer", None)) is None:
        return network(*inputs)[places_BT]
    hook = last.register_forward_pre_hook(lambda _, given: given[0][places_BT])
    try:
        logits = network(*inputs)
    finally:
        hook.remove()
    return logits if logits.ndim == 2 else logits[places_BT]  # of a network that multiplies without that layer
