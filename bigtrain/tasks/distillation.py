"""The next token, and what a teacher said of it in columns of :mod:`bigtrain.tasks.scoring`.

Shape suffixes: B samples, T tokens, V vocabulary, K most likely tokens of the teacher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.config import Divergence
from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective
from bigtrain.tasks.causal_lm import CausalLM, perplexity
from bigtrain.tasks.scoring import TOP_IDS, TOP_LOG_PROBABILITIES, log_probabilities, with_rest


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation(Objective):
    """Cross-entropy and divergence from a teacher (Hinton et al. 2015); see :class:`bigtrain.tasks.base.Objective`.

    Teacher and student are compared in K + 1 events: each of the teacher's K most likely tokens, and all others
    together. No mass is dropped or renormalised, so the divergence is 0 where they agree in these, at most that over
    all tokens, and equal to it for K = V. The temperature softens the K + 1 probabilities.
    """

    divergence: Divergence = Divergence.forward  # KL(teacher || student); reverse: KL(student || teacher)
    weight: float = 0.5  # of the divergence in the loss
    temperature: float = 1.0  # the gradient shrinks by its square, by which the divergence is multiplied

    counts_by_shape = True

    @property
    def fields(self) -> Mapping[str, Field]:
        scored = {TOP_IDS: Field(torch.int32, ("T", "K"), is_optional=True)}
        scored[TOP_LOG_PROBABILITIES] = Field(torch.float32, ("T", "K1"), is_optional=True)
        return {**CausalLM.fields, **scored}

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"targets": (), "cross_entropy": (), "divergence": ()}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return CausalLM().count(samples)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the summed loss in nats and the sums of which metrics are made."""
        tokens_BT, targets_BT, *positions, ids_BTK, teacher_BTE = tensors  # E = K + 1 events
        logits_BTV = network(tokens_BT, None, *positions)
        cross_entropy, counts_BT = -log_probabilities(logits_BTV, targets_BT).sum(), targets_BT != IGNORE_INDEX
        student_BTE = with_rest(logits_BTV, ids_BTK.long())
        log_p, log_q = ((x.float() / self.temperature).log_softmax(dim=-1) for x in (teacher_BTE, student_BTE))
        if self.divergence is Divergence.reverse:
            log_p, log_q = log_q, log_p
        divergence_BT = (log_p.exp() * (log_p - log_q)).sum(dim=-1) * self.temperature**2
        divergence = divergence_BT.where(counts_BT, 0).sum()
        loss = (1 - self.weight) * cross_entropy + self.weight * divergence
        return torch.stack([loss, counts_BT.sum().float(), cross_entropy.detach(), divergence.detach()])

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        targets = max(float(sums["targets"]), 1.0)
        return {
            "divergence": float(sums["divergence"]) / targets,
            "perplexity": perplexity(float(sums["cross_entropy"]) / targets),
        }
