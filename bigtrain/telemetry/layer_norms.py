"""Norms of gradients, weights and updates per layer, independent of sharding and update rule.

Every rank sums the squares of what it holds in fp64, and one all-reduce sums over ranks. An update is the difference to
a copy of the weights from before the step: 4 bytes for each parameter that this rank updates, held from the end of the
backward pass, when activations are freed, to the end of the step.
"""

import re
from typing import Any

import torch

from bigtrain.distributed.collectives import all_reduce_sum
from bigtrain.engine.base import Engine
from bigtrain.engine.state import MODEL
from bigtrain.models.moe import BALANCE
from bigtrain.telemetry import names

_CHUNK_ELEMENTS = 1 << 24  # in temporary tensors
_GRADIENT, _WEIGHTS, _UPDATE = range(3)


class LayerNorms:
    """Computes the norms every so many steps on the device; the host reads them when steps are logged."""

    def __init__(self, engine: Engine, every_steps: int) -> None:
        self._state = engine.state
        self._every_steps = every_steps
        self._device = engine.device
        entries = self._state.entries
        self._weights = {
            key.removeprefix(MODEL): entry
            for key, entry in entries.items()
            # Weights in 4 bits are of another type, and biases of a router's choice no weights.
            if key.startswith(MODEL) and entry.dtype == torch.float32 and not key.endswith(BALANCE)
        }
        self._layers = list(dict.fromkeys(layer_of(name) for name in self._weights))
        self._parts: dict[tuple[str, int], list[torch.Tensor]] = {}
        self._old: dict[str, list[torch.Tensor]] = {}
        self._waiting: list[tuple[int, torch.Tensor]] = []

    def before_update(self, step: int) -> None:
        """Measure the gradient, before clipping, and copy the weights; collective."""
        if not self._is_due(step):
            return
        self._parts = {(layer, column): [] for layer in self._layers for column in range(3)}
        for name, gradient in self._state.gradients():
            self._add(name, _GRADIENT, gradient, self._weights[name].num_replicas)
        self._old = {
            name: [box.view.clone() for box in self._weights[name].own_boxes()] for name in self._state.holders
        }

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Measure weights and update; collective."""
        if not self._is_due(step):
            return
        for name, entry in self._weights.items():
            boxes = entry.own_boxes()
            for box in boxes:
                self._add(name, _WEIGHTS, box.view)
            for box, old in zip(boxes, self._old.pop(name, ()), strict=False):  # frozen weights have none
                self._add(name, _UPDATE, old.sub_(box.view))
        nothing = torch.zeros((), dtype=torch.float64, device=self._device)
        sums = torch.stack([torch.stack([nothing, *parts]).sum() for parts in self._parts.values()])
        self._parts.clear()
        self._waiting.append((step, all_reduce_sum(sums.view(-1, 3))))

    def merge(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the records with the norms of their steps added; waits for the device."""
        if not self._waiting:
            return records
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

    def _add(self, name: str, column: int, values: torch.Tensor, num_replicas: int = 1) -> None:
        for chunk in values.reshape(-1).split(_CHUNK_ELEMENTS):
            square = torch.linalg.vector_norm(chunk, dtype=torch.float64).square() / num_replicas
            self._parts[layer_of(name), column].append(square.to(self._device, non_blocking=True))


def layer_of(parameter: str) -> str:
    """Return a parameter's name up to its block's number, or the module that it is in."""
    block = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", parameter)
    return block[0] if block else parameter.rpartition(".")[0] or parameter
