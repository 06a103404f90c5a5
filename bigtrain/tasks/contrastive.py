"""Embeddings of texts, of which those of a pair are to be closer than all others of the global batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.tasks.answers import Wanted
from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective
from bigtrain.tasks.inputs import require_lengths
from bigtrain.tasks.seq2seq import Seq2Seq


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrastive(Objective):
    """InfoNCE (van den Oord et al., 2018) over all pairs of a step; see :class:`bigtrain.tasks.base.Objective`.

    Its samples are those of ``seq2seq``, of which ``tokens`` are not used. Shape suffixes: N pairs of all ranks, B pairs
    of a micro-batch, 2 texts of a pair, D dimensions.
    """

    temperature: float = 0.05  # cosines are divided by it
    is_symmetric: bool = False  # find sources by their targets too (CLIP; Radford et al., 2021)

    @property
    def fields(self) -> Mapping[str, Field]:
        return Seq2Seq().fields

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"found": (), "reciprocal": (), "queries": ()}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        require_lengths(samples)
        return (samples["targets"] != IGNORE_INDEX).any(axis=1).astype(np.int64)

    def embed(self, network: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return the embeddings of sources and targets, of length 1, fp32 ``(2, B, D)``; the network runs once for both."""
        source, lengths_B, _, targets, *_ = tensors
        length, is_target = max(source.shape[1], targets.shape[1]), targets != IGNORE_INDEX
        texts = [F.pad(text, (0, length - text.shape[1])) for text in (source, targets.where(is_target, 0))]
        lengths = torch.cat([lengths_B, is_target.sum(dim=1).clamp(min=1)])
        embeddings = F.normalize(network(torch.cat(texts), lengths).float(), dim=-1)
        return embeddings.view(2, len(source), -1)

    def couple(self, embeddings_2ND: Tensor, counted_N: Tensor) -> Tensor:
        """Return the loss of each pair, whether its target is the nearest one, and 1 / its rank: fp32 ``(N, 3)``.

        Only the losses have a gradient; pairs that do not count are 0, and no others' negatives.
        """
        sources, targets = embeddings_2ND[:, counted_N]
        logits, own = sources @ targets.T / self.temperature, torch.arange(len(sources), device=sources.device)
        losses = F.cross_entropy(logits, own, reduction="none")
        if self.is_symmetric:
            losses = (losses + F.cross_entropy(logits.T, own, reduction="none")) / 2
        ranks = 1 + (logits > logits.diagonal()[:, None]).sum(dim=1).detach()
        rows = torch.stack([losses, (ranks == 1).float(), 1 / ranks], dim=1)
        return rows.new_zeros(len(counted_N), 3).index_put((counted_N,), rows)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the summed loss and sums of ``tensors`` completed by :func:`bigtrain.run.step.coupled`, in nats."""
        counted_B = (tensors[3] != IGNORE_INDEX).any(dim=1)
        if len(tensors) == len(self.fields):
            rows_B3 = self.couple(self.embed(network, *tensors), counted_B)
            return torch.cat([rows_B3.sum(dim=0), counted_B.sum().float().view(1)])
        gradients_B2D, rows_B3 = tensors[len(self.fields) :]
        sums = torch.cat([rows_B3.sum(dim=0), counted_B.sum().float().view(1)])
        if not network.training:
            return sums
        surrogate = (self.embed(network, *tensors) * gradients_B2D.transpose(0, 1)).sum()
        return torch.cat([sums[:1] + surrogate - surrogate.detach(), sums[1:]])

    def answers(self, network: Callable[..., Tensor], *inputs: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
        source, lengths_B, *_ = inputs
        return [{"embedding": row} for row in F.normalize(network(source, lengths_B).float(), dim=-1).tolist()]

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        num_queries = max(float(sums["queries"]), 1.0)
        return {
            "recall_at_1": float(sums["found"]) / num_queries,
            "mean_reciprocal_rank": float(sums["reciprocal"]) / num_queries,
        }
