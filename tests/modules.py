"""Unsharded models with weights, for tests that need no engine."""

from types import SimpleNamespace

from torch import nn

from bigtrain.engine import state
from bigtrain.engine.wrap import materialise as materialise
from bigtrain.models.init import InitialValue


def initialise(model: nn.Module, values: dict[str, InitialValue]) -> None:
    """Fill every parameter of a materialised model."""
    entries = {state.MODEL + name: state.whole_entry(p) for name, p in model.named_parameters()}
    state.initialise(SimpleNamespace(entries=entries, commit=lambda: None), values, num_threads=2)
