"""Answers that are good or bad, each by itself.

Shape suffixes: B answers, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective
from bigtrain.tasks.preference import Preference, without_adapters
from bigtrain.tasks.scoring import log_probabilities


@dataclass(frozen=True, kw_only=True, slots=True)
class KTO(Objective):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 8); see :class:`bigtrain.tasks.base.Objective`.

    ``chosen`` is a prompt with its answer, ``rejected`` with the answer to another one: how much likelier than before
    that has become, on average over the whole step and at least 0, is the point from which answers are judged.
    """

    beta: float = 0.1  # weight of the log-ratio
    weights: tuple[float, float] = (1.0, 1.0)  # of the losses of good and of bad answers

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"answers": (2,), "rewards": (2,), "kl": ()}

    @property
    def fields(self) -> Mapping[str, Field]:
        *texts, (name, scored) = Preference().fields.items()
        return dict(texts) | {"labels": Field(torch.int64, (), ignored=IGNORE_INDEX, below=2), name: scored}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return (samples["chosen_targets"] != IGNORE_INDEX).any(axis=1).astype(np.int64)

    def averaged(self, model: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the sum of the log-ratios of answers to other prompts, and their number, fp32 ``(2,)``."""
        tokens_BT, targets_BT = tensors[2:4]
        counts_B = (tensors[1] != IGNORE_INDEX).any(dim=1)
        ratios_B = self._ratios(model, tokens_BT, targets_BT, [scored[:, 1] for scored in tensors[5:]], predicts=True)
        return torch.stack([ratios_B.where(counts_B, 0).sum(), counts_B.sum()])

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the summed loss and the sums of which metrics are made.

        ``tensors`` are of a micro-batch, which :func:`bigtrain.run.step.coupled` has completed with the mean over the step.
        """
        tokens_BT, targets_BT, _, _, labels_B, *scored, mean_B = tensors
        counts_B, is_good_B = (targets_BT != IGNORE_INDEX).any(dim=1), labels_B == 1
        ratios_B = self._ratios(network, tokens_BT, targets_BT, [of_both[:, 0] for of_both in scored])
        kl_B = mean_B.clamp(min=0)
        gains_B = torch.sigmoid(self.beta * (ratios_B - kl_B) * (2 * is_good_B - 1))
        weights_B = torch.where(is_good_B, *self.weights)
        losses_B, rewards_B = weights_B * (1 - gains_B), self.beta * ratios_B.detach()
        groups_2B = torch.stack([is_good_B, ~is_good_B]) & counts_B
        sums = [*groups_2B.sum(dim=1), *rewards_B.where(groups_2B, 0).sum(dim=1), kl_B.where(counts_B, 0).sum()]
        return torch.stack([losses_B.where(counts_B, 0).sum(), *(value.float() for value in sums)])

    def _ratios(self, network: nn.Module, tokens: Tensor, targets: Tensor, scored: list[Tensor], **how: Any) -> Tensor:
        """Return the log-probability of each answer relative to the reference, scored or the base of adapters."""
        if not scored:
            with torch.no_grad(), without_adapters(network):
                scored = [log_probabilities(network(tokens, **how), targets)]
        return log_probabilities(network(tokens, **how), targets) - scored[0]

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return the rewards of good and bad answers, how far they are apart, and the mean of answers to other prompts."""
        good, bad = (float(reward) for reward in sums["rewards"] / np.maximum(sums["answers"], 1))
        kl = float(sums["kl"]) / max(float(sums["answers"].sum()), 1.0)
        return {"chosen_reward": good, "rejected_reward": bad, "margin": good - bad, "kl": kl}
