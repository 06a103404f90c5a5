"""Numbers per sample."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.config import Inputs
from bigtrain.tasks.answers import Wanted
from bigtrain.tasks.base import Field, Objective
from bigtrain.tasks.inputs import input_fields, require_lengths, require_size
from bigtrain.tasks.metrics import regression_metrics, regression_sums


@dataclass(frozen=True, kw_only=True, slots=True)
class Regression(Objective):
    """Squared error of each value that is no NaN, without the factor 1/2; see :class:`Objective`."""

    inputs: Inputs = Inputs.features  # column that the network gets
    num_values: int = 1  # values of a sample, as many as the network returns

    @property
    def fields(self) -> Mapping[str, Field]:
        values = Field(torch.float32, (self.num_values,), ignored=float("nan"))
        return {**input_fields(self.inputs), "values": values}

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"errors": (2, 5)}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        require_lengths(samples)
        return np.isfinite(samples["values"]).sum(axis=1)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        *inputs, values_BV = tensors
        predicted_BV = network(*inputs).float()
        require_size(predicted_BV, self.num_values, "task.num_values")
        counted_BV = values_BV.isfinite()
        loss = torch.where(counted_BV, predicted_BV - torch.where(counted_BV, values_BV, 0), 0).square().sum()
        return torch.cat([loss.view(1), regression_sums(predicted_BV.detach(), values_BV, counted_BV).flatten()])

    def answers(self, network: Callable[..., Tensor], *inputs: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
        """Return the numbers of each sample: ``value``, or ``values`` where there are several."""
        rows = network(*inputs).float().tolist()
        return [{"value": row[0]} if len(row) == 1 else {"values": row} for row in rows]

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        return regression_metrics(sums["errors"])
