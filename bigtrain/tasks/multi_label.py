"""Any number of labels per sample, each there or not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.config import Inputs
from bigtrain.tasks.answers import Wanted, several_label_answers
from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective
from bigtrain.tasks.inputs import input_fields, require_lengths, require_size
from bigtrain.tasks.metrics import (
    MOST_SCORED_LABELS,
    NUM_SCORE_BINS,
    binary_counts,
    binary_metrics,
    label_scores,
    mean_area_under_roc,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiLabel(Objective):
    """Binary cross-entropy, a mean over samples and labels as in transformers; see :class:`Objective`."""

    inputs: Inputs = Inputs.tokens  # column that the network gets
    num_labels: int = 2  # C, as many logits as the network returns
    class_weights: tuple[float, ...] = ()  # factors of present labels, ``pos_weight`` of torch

    @property
    def fields(self) -> Mapping[str, Field]:
        labels = Field(torch.int64, (self.num_labels,), ignored=IGNORE_INDEX, below=2)
        return {**input_fields(self.inputs), "labels": labels}

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"by_label": (4, self.num_labels), "exact": (), "samples": ()}

    @property
    def held_out_sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"scores": (self.num_labels, 2, NUM_SCORE_BINS)} if self.num_labels <= MOST_SCORED_LABELS else {}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        require_lengths(samples)
        return np.count_nonzero(samples["labels"] != IGNORE_INDEX, axis=1)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        *inputs, labels_BC = tensors
        logits_BC = network(*inputs).float()
        require_size(logits_BC, self.num_labels, "task.num_labels")
        counted_BC = labels_BC != IGNORE_INDEX
        weights_C = logits_BC.new_tensor(self.class_weights) if self.class_weights else None
        losses_BC = F.binary_cross_entropy_with_logits(
            logits_BC, (labels_BC == 1).float(), pos_weight=weights_C, reduction="none"
        )
        predicted_BC = logits_BC > 0
        is_right_B = ((predicted_BC == (labels_BC == 1)) | ~counted_BC).all(dim=1) & counted_BC.any(dim=1)
        sums = [
            losses_BC.where(counted_BC, 0).sum(),
            binary_counts(predicted_BC, labels_BC, ignored=IGNORE_INDEX).flatten(),
            is_right_B.sum(),
            counted_BC.any(dim=1).sum(),
        ]
        if self.held_out_sums and not network.training:
            sums.append(label_scores(logits_BC, labels_BC, ignored=IGNORE_INDEX).flatten())
        return torch.cat([part.float().view(-1) for part in sums])

    def answers(self, network: Callable[..., Tensor], *inputs: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
        return several_label_answers(network(*inputs).float(), wanted)

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        found = binary_metrics(sums["by_label"])
        found["exact"] = float(sums["exact"]) / max(float(sums["samples"]), 1.0)
        return found | ({"auc": mean_area_under_roc(sums["scores"])} if "scores" in sums else {})
