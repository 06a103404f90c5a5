"""One label per token: names of persons and places, parts of speech."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.config import Inputs
from bigtrain.tasks.answers import Wanted
from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective
from bigtrain.tasks.inputs import input_fields, require_lengths, require_size
from bigtrain.tasks.metrics import confusion_counts, label_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenClassification(Objective):
    """Cross-entropy of each token's label; see :class:`bigtrain.tasks.base.Objective`."""

    num_labels: int = 2  # c: labels are below this, and the network returns as many logits for each token

    @property
    def fields(self) -> Mapping[str, Field]:
        labels = Field(torch.int64, ("T",), ignored=IGNORE_INDEX, below=self.num_labels)
        return {**input_fields(Inputs.tokens), "labels": labels}

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"confusion": (self.num_labels, self.num_labels)}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        require_lengths(samples)
        return np.count_nonzero(samples["labels"] != IGNORE_INDEX, axis=1)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        *inputs, labels_BT = tensors
        logits_BTC = network(*inputs).float()
        require_size(logits_BTC, self.num_labels, "task.num_labels", each="token")
        logits_NC, labels_N = logits_BTC.flatten(0, 1), labels_BT.flatten()
        loss = F.cross_entropy(logits_NC, labels_N, ignore_index=IGNORE_INDEX, reduction="sum")
        confusion = confusion_counts(logits_NC.argmax(dim=-1), labels_N, self.num_labels, ignored=IGNORE_INDEX)
        return torch.cat([loss.view(1), confusion.flatten()])

    def answers(self, network: Callable[..., Tensor], *inputs: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
        tokens_BT, lengths_B = inputs
        chosen_BT = network(tokens_BT, lengths_B).argmax(dim=-1)
        rows = zip(chosen_BT.tolist(), lengths_B.tolist(), strict=True)
        return [{"labels": [wanted.name(label) for label in row[:length]]} for row, length in rows]

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        return label_metrics(sums["confusion"])
