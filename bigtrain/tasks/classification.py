"""One label per sample: text, images, tables or sequences of numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.config import Inputs
from bigtrain.tasks.answers import Wanted, label_answers
from bigtrain.tasks.base import IGNORE_INDEX, Field
from bigtrain.tasks.inputs import input_fields, require_lengths, require_size
from bigtrain.tasks.metrics import confusion_counts, label_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """Cross-entropy of the label; see :class:`bigtrain.tasks.base.Objective`."""

    inputs: Inputs = Inputs.tokens
    """Column that the network gets."""
    num_labels: int = 2
    """C: labels are below this, and the network returns as many logits."""

    counts_by_shape = True

    @property
    def fields(self) -> Mapping[str, Field]:
        return {
            **input_fields(self.inputs),
            "labels": Field(torch.int64, (), ignored=IGNORE_INDEX, below=self.num_labels),
            # Of samples that are blends of two: the label of the other one, and how much of the loss is the first's.
            "mixed_labels": Field(torch.int64, (), ignored=IGNORE_INDEX, below=self.num_labels, is_optional=True),
            "shares": Field(torch.float32, (), ignored=0.0, is_optional=True),
        }

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"confusion": (self.num_labels, self.num_labels)}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Return 1 for each sample with a label, else 0."""
        require_lengths(samples)
        return (samples["labels"] != IGNORE_INDEX).astype(np.int64)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the summed cross-entropy in nats and the confusion matrix, a row per true label."""
        num_inputs = len(input_fields(self.inputs))
        inputs, (labels_B, *mixed) = tensors[:num_inputs], tensors[num_inputs:]
        logits_BC = network(*inputs).float()
        require_size(logits_BC, self.num_labels, "task.num_labels")
        if mixed:
            other_labels_B, shares_B = mixed
            losses = [
                F.cross_entropy(logits_BC, y, ignore_index=IGNORE_INDEX, reduction="none")
                for y in (labels_B, other_labels_B)
            ]
            loss = (shares_B * losses[0] + (1 - shares_B) * losses[1]).sum()
        else:
            loss = F.cross_entropy(logits_BC, labels_B, ignore_index=IGNORE_INDEX, reduction="sum")
        confusion = confusion_counts(logits_BC.argmax(dim=-1), labels_B, self.num_labels, ignored=IGNORE_INDEX)
        return torch.cat([loss.view(1), confusion.flatten()])

    def answers(self, network: Callable[..., Tensor], *inputs: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
        """Return the likeliest labels of each sample."""
        return label_answers(network(*inputs).float(), wanted)

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return accuracy, Matthews' correlation, and precision, recall and F1 as means over labels."""
        return label_metrics(sums["confusion"])
