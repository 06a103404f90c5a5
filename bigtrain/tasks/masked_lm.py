"""Hidden tokens, predicted from both sides."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.tasks.base import IGNORE_INDEX, Field


class MaskedLM:
    """Cross-entropy of the tokens that :class:`bigtrain.tasks.masking.Masking` has chosen."""

    fields: Mapping[str, Field] = {
        "tokens": Field(torch.int64, ("T",)),
        "targets": Field(torch.int64, ("T",), ignored=IGNORE_INDEX),
    }
    sums: Mapping[str, tuple[int, ...]] = {"correct": (), "targets": ()}
    counts_by_shape = False

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return np.count_nonzero(samples["targets"] != IGNORE_INDEX, axis=1)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        tokens_BT, targets_BT = tensors
        logits_BTV = network(tokens_BT)
        chosen_BT = targets_BT != IGNORE_INDEX
        logits_NV, targets_N = logits_BTV[chosen_BT].float(), targets_BT[chosen_BT]
        loss = F.cross_entropy(logits_NV, targets_N, reduction="sum")
        correct = (logits_NV.argmax(dim=-1) == targets_N).sum()
        return torch.stack([loss, correct.float(), chosen_BT.sum().float()])

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        return {"accuracy": float(sums["correct"]) / max(float(sums["targets"]), 1.0)}
