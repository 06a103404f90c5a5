"""One label per sample: text, images, tables or sequences of numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.config import Inputs
from bigtrain.tasks.answers import Wanted, label_answers
from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective
from bigtrain.tasks.inputs import input_fields, require_lengths, require_size
from bigtrain.tasks.metrics import NUM_SCORE_BINS, area_under_roc, confusion_counts, label_metrics, score_counts

MAX_GROUPS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification(Objective):
    """Cross-entropy of the label; see :class:`bigtrain.tasks.base.Objective`."""

    inputs: Inputs = Inputs.tokens  # column that the network gets
    num_labels: int = 2  # c: labels are below this, and the network returns as many logits
    class_weights: tuple[float, ...] = ()  # of each label, normalised by their sum over samples, as torch does
    group_by: str | None = None  # column with the group of each sample, of which metrics are measured apart

    counts_by_shape = True

    @property
    def fields(self) -> Mapping[str, Field]:
        return {
            **input_fields(self.inputs),
            "labels": Field(torch.int64, (), ignored=IGNORE_INDEX, below=self.num_labels),
            # Of samples that are blends of two: the label of the other one, and how much of the loss is the first's.
            "mixed_labels": Field(torch.int64, (), ignored=IGNORE_INDEX, below=self.num_labels, is_optional=True),
            "shares": Field(torch.float32, (), ignored=0.0, is_optional=True),
            **({self.group_by: Field(torch.int64, (), ignored=-1, below=MAX_GROUPS)} if self.group_by else {}),
        }

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"confusion": (self.num_labels, self.num_labels)}

    @property
    def held_out_sums(self) -> Mapping[str, tuple[int, ...]]:
        scores = {"scores": (2, NUM_SCORE_BINS)} if self.num_labels == 2 else {}
        return scores | ({"by_group": (MAX_GROUPS, self.num_labels, self.num_labels)} if self.group_by else {})

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Return 1, or the weight of its label, for each sample with a label, else 0."""
        require_lengths(samples)
        if not self.class_weights:
            return (samples["labels"] != IGNORE_INDEX).astype(np.int64)
        weights = np.append(self.class_weights, 0.0)  # at -1 that of no label

        def weigh(labels: NDArray[np.int64]) -> NDArray[np.float64]:
            return weights[np.where(labels == IGNORE_INDEX, -1, labels)]

        if "shares" not in samples:
            return weigh(samples["labels"])
        shares = samples["shares"].astype(np.float64)
        return shares * weigh(samples["labels"]) + (1 - shares) * weigh(samples["mixed_labels"])

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the summed cross-entropy in nats and the confusion matrix, a row per true label."""
        num_inputs = len(input_fields(self.inputs))
        tensors, groups_B = (tensors[:-1], tensors[-1]) if self.group_by else (tensors, tensors[0])
        inputs, (labels_B, *mixed) = tensors[:num_inputs], tensors[num_inputs:]
        logits_BC = network(*inputs).float()
        require_size(logits_BC, self.num_labels, "task.num_labels")
        weights_C = logits_BC.new_tensor(self.class_weights) if self.class_weights else None
        cross_entropy = partial(F.cross_entropy, logits_BC, weight=weights_C, ignore_index=IGNORE_INDEX)
        if mixed:
            other_labels_B, shares_B = mixed
            losses = [cross_entropy(y, reduction="none") for y in (labels_B, other_labels_B)]
            loss = (shares_B * losses[0] + (1 - shares_B) * losses[1]).sum()
        else:
            loss = cross_entropy(labels_B, reduction="sum")
        count = partial(confusion_counts, logits_BC.argmax(dim=-1), num_labels=self.num_labels, ignored=IGNORE_INDEX)
        sums = [loss.view(1), count(labels_B).flatten()]
        if network.training:
            return torch.cat(sums)
        if self.num_labels == 2:
            scores_B = logits_BC[:, 1] - logits_BC[:, 0]
            sums.append(score_counts(scores_B, labels_B == 1, labels_B != IGNORE_INDEX).flatten())
        if self.group_by:
            sums += [count(labels_B.where(groups_B == g, IGNORE_INDEX)).flatten() for g in range(MAX_GROUPS)]
        return torch.cat(sums)

    def answers(self, network: Callable[..., Tensor], *inputs: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
        return label_answers(network(*inputs).float(), wanted)

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        found = label_metrics(sums["confusion"]) | ({"auc": area_under_roc(sums["scores"])} if "scores" in sums else {})
        by_group = {g: label_metrics(counts) for g, counts in enumerate(sums.get("by_group", ())) if counts.any()}
        for group, metrics in by_group.items():
            found |= {f"{self.group_by}_{group}/{name}": metrics[name] for name in ("accuracy", "f1")}
        if by_group:
            accuracies = [metrics["accuracy"] for metrics in by_group.values()]
            found[f"{self.group_by}_gap"] = max(accuracies) - min(accuracies)
        return found
