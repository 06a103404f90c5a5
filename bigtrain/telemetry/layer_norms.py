"""Norms of gradients, weights and updates per layer, the same numbers under every sharding.

Every rank adds up the squares of what it holds, in fp64, and one reduction adds up the ranks. AdamW's update
follows from its moments (Loshchilov & Hutter 2019, algorithm 2), so that no copy of the old weights is kept:

    u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    old weights = (new weights + lr * u) / (1 - lr * decay)        update = new weights - old weights
"""

import re
from collections.abc import Iterator
from typing import Any

import torch

from bigtrain.config import OptimizerConfig
from bigtrain.distributed import all_reduce_sum
from bigtrain.engine.base import Engine
from bigtrain.engine.state import MODEL, OPTIMIZER, EngineState
from bigtrain.telemetry import names

_CHUNK_ELEMENTS = 1 << 24  # of temporary tensors


class LayerNorms:
    """Computes the norms every so many steps on the device; the host reads them when steps are logged."""

    def __init__(self, engine: Engine, optimizer: OptimizerConfig, every_steps: int) -> None:
        """Take what is looked at.

        Args:
            engine: Holds weights, moments and gradients.
            optimizer: AdamW's settings.
            every_steps: Steps between two looks; 0 = never.
        """
        self._state: EngineState = engine.state
        self._optimizer = optimizer
        self._every_steps = every_steps
        self._device = engine.device
        parameters = [key.removeprefix(MODEL) for key in self._state.entries if key.startswith(MODEL)]
        self._layers = list(dict.fromkeys(layer_of(name) for name in parameters))
        self._row = {name: self._layers.index(layer_of(name)) for name in parameters}
        self._squares = torch.empty(0)
        self._waiting: list[tuple[int, torch.Tensor]] = []

    def before_update(self, step: int) -> None:
        """Look at the gradient of ``step``, before it is clipped; all ranks call this."""
        if not self._is_due(step):
            return
        # columns: gradient, weights, update
        self._squares = torch.zeros(len(self._layers), 3, dtype=torch.float64, device=self._device)
        for name, gradient in self._state.gradients():
            num_replicas = self._state.entries[MODEL + name].num_replicas
            for (chunk,) in _chunks(gradient):
                self._add(name, 0, chunk, 1 / num_replicas)

    @torch.no_grad()
    def after_update(self, step: int, lr: float) -> None:
        """Look at the weights after ``step`` and at how far they went; all ranks call this."""
        if not self._is_due(step):
            return
        for name in self._row:
            weights = self._state.entries[MODEL + name]
            moments = [self._state.entries.get(f"{OPTIMIZER}{name}.{key}") for key in ("exp_avg", "exp_avg_sq", "step")]
            if None in moments:  # not trained, or by another rule
                for box in weights.own_boxes():
                    self._add(name, 1, box.view)
                continue
            mean, square, count = moments
            decay = self._optimizer.weight_decay if len(weights.shape) >= 2 else 0.0
            num_updates = count.boxes[0].view
            for boxes in zip(weights.own_boxes(), mean.own_boxes(), square.own_boxes(), strict=True):
                for new, m, v in _chunks(*(box.view for box in boxes)):
                    self._add(name, 1, new)
                    self._add(name, 2, self._update(new, m, v, num_updates.to(new.device), lr, decay))
        self._waiting.append((step, all_reduce_sum(self._squares)))

    def merge(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Wait for the norms, add those of each record's step to it, and return the records."""
        norms = {step: squares.sqrt().tolist() for step, squares in self._waiting}
        self._waiting.clear()
        return [record | self._named(norms.get(record[names.STEP], [])) for record in records]

    def _named(self, norms: list[list[float]]) -> dict[str, float]:
        named = {}
        for layer, (gradient, weights, update) in zip(self._layers, norms, strict=False):
            named[f"{names.LAYER_GRAD_NORM}/{layer}"] = gradient
            named[f"{names.LAYER_PARAM_NORM}/{layer}"] = weights
            named[f"{names.LAYER_UPDATE_RATIO}/{layer}"] = update / weights if weights else 0.0
        return named

    def _is_due(self, step: int) -> bool:
        return self._every_steps > 0 and step % self._every_steps == 0

    def _add(self, name: str, column: int, values: torch.Tensor, factor: float = 1.0) -> None:
        square = torch.linalg.vector_norm(values, dtype=torch.float64).square()
        self._squares[self._row[name], column] += square.to(self._device, non_blocking=True) * factor

    def _update(
        self, new: torch.Tensor, m: torch.Tensor, v: torch.Tensor, count: torch.Tensor, lr: float, decay: float
    ) -> torch.Tensor:
        beta1, beta2 = self._optimizer.betas
        direction = m / (1 - beta1**count) / ((v / (1 - beta2**count)).sqrt_() + self._optimizer.eps)
        # With old = (new + lr * u) / (1 - lr * decay): new - old = -lr * (u + decay * new) / (1 - lr * decay)
        return direction.add_(new, alpha=decay).mul_(-lr / (1 - lr * decay))


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter: its name up to the number of its block, or the module that it is in."""
    block = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", parameter)
    return block[0] if block else parameter.rpartition(".")[0] or parameter


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.reshape(-1).split(_CHUNK_ELEMENTS) for tensor in tensors), strict=True)
