"""Pairs of answers, of which the chosen one is to become more likely than the rejected one.

Shape suffixes: B pairs, T tokens, V vocabulary, 2 answers of a pair (chosen, rejected).
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.config import PreferenceLoss
from bigtrain.tasks.base import IGNORE_INDEX, Field
from bigtrain.tasks.scoring import LOG_PROBABILITIES, log_probabilities


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Loss of pairs of answers; see :class:`bigtrain.tasks.base.Objective`.

    ``dpo`` (Rafailov et al. 2023, eq. 7), ``ipo`` (Azar et al. 2024, eq. 17, with means over tokens), ``orpo`` (Hong et al.
    2024, eq. 6 and 7) or ``simpo`` (Meng et al. 2024, eq. 6).
    """

    loss: PreferenceLoss = PreferenceLoss.dpo
    beta: float = 0.1  # weight of the preference: of the log-ratio, or of ORPO's odds
    margin: float = 0.0  # what the rewards of SimPO are to differ by at least

    counts_by_shape = False

    @property
    def fields(self) -> Mapping[str, Field]:
        tokens, targets = Field(torch.int64, ("T",)), Field(torch.int64, ("T",), ignored=IGNORE_INDEX)
        pair = {"chosen": tokens, "chosen_targets": targets, "rejected": tokens, "rejected_targets": targets}
        scored = {LOG_PROBABILITIES: Field(torch.float32, (2,), is_optional=True)} if self.loss.has_reference else {}
        return pair | scored

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"pairs": (), "right": (), "margins": (), "rewards": (2,)}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Return 1 for each pair with both answers, 0 for others and padding."""
        chosen, rejected = (
            (samples[name] != IGNORE_INDEX).any(axis=1) for name in ("chosen_targets", "rejected_targets")
        )
        return (chosen & rejected).astype(np.int64)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the summed loss in nats and the sums of which metrics are made."""
        chosen_BT, chosen_targets_BT, rejected_BT, rejected_targets_BT, *scored_B2 = tensors
        length = max(chosen_BT.shape[1], rejected_BT.shape[1])
        tokens = torch.cat([F.pad(t, (0, length - t.shape[1])) for t in (chosen_BT, rejected_BT)])
        targets = torch.cat(
            [F.pad(t, (0, length - t.shape[1]), value=IGNORE_INDEX) for t in (chosen_targets_BT, rejected_targets_BT)]
        )
        reference_2B: Tensor | float = 0.0
        if self.loss.has_reference and scored_B2:
            reference_2B = self._scores(scored_B2[0].T.flatten(), targets)
        elif self.loss.has_reference:
            with torch.no_grad(), without_adapters(network):
                reference_2B = self._scores(log_probabilities(network(tokens), targets), targets)
        scores_2B = self._scores(log_probabilities(network(tokens), targets), targets)
        losses_B, rewards_2B = self._losses(scores_2B, reference_2B)
        counts_B = (targets != IGNORE_INDEX).any(dim=1).view(2, -1).all(dim=0)
        margins_B = (rewards_2B[0] - rewards_2B[1]).where(counts_B, 0)
        sums = [counts_B.sum(), (margins_B > 0).sum(), margins_B.sum(), *rewards_2B.where(counts_B, 0).sum(dim=1)]
        return torch.stack([losses_B.where(counts_B, 0).sum(), *(value.float() for value in sums)])

    def _scores(self, nats: Tensor, targets: Tensor) -> Tensor:
        """Return log-probabilities of answers, ``(2 * B,)``, as means over tokens where the loss is of means: ``(2, B)``."""
        if self.loss is not PreferenceLoss.dpo:
            nats = nats / (targets != IGNORE_INDEX).sum(dim=1).clamp(min=1)
        return nats.view(2, -1)

    def _losses(self, scores_2B: Tensor, reference_2B: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair, and the rewards of its answers, which have no gradient."""
        ratios_2B = scores_2B - reference_2B
        rewards_2B = self.beta * ratios_2B.detach()
        difference_B = ratios_2B[0] - ratios_2B[1]
        match self.loss:
            case PreferenceLoss.dpo:
                return -F.logsigmoid(self.beta * difference_B), rewards_2B
            case PreferenceLoss.ipo:
                return (difference_B - 1 / (2 * self.beta)) ** 2, rewards_2B
            case PreferenceLoss.simpo:
                return -F.logsigmoid(self.beta * difference_B - self.margin), rewards_2B
        odds_2B = scores_2B - torch.log1p(-scores_2B.exp().clamp(max=1 - 1e-7))
        return -scores_2B[0] - self.beta * F.logsigmoid(odds_2B[0] - odds_2B[1]), rewards_2B

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return how often the chosen answer has the larger reward, by how much, and both rewards."""
        pairs = max(float(sums["pairs"]), 1.0)
        chosen, rejected = (float(reward) / pairs for reward in sums["rewards"])
        return {
            "accuracy": float(sums["right"]) / pairs,
            "margin": float(sums["margins"]) / pairs,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }


@contextlib.contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Let peft's layers compute what they were put around, without dropout, and keep their gradients, as engines expect."""
    is_training = network.training
    network.eval()
    layers: list[Any] = [module for module in network.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        network.train(is_training)
        for layer in layers:
            layer._disable_adapters = False
