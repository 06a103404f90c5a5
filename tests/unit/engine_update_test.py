"""An update of bad numbers changes nothing, whether the host or the device decides."""

import math

import pytest
import torch

from bigtrain.config import OptimizerConfig, OptimizerKind
from bigtrain.engine.native import update_unless_bad
from bigtrain.optim.build import build_optimizer


def weights_after(kind: OptimizerKind, norms: list[float], *, ask_host: bool, l1: float = 0.0) -> torch.Tensor:
    """Return the weights after an update for each gradient norm, with the same gradients each time."""
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    groups = [{"params": [weight], "weight_decay": 0.1, "muon": False, "l1": l1}]
    optimizer = build_optimizer(groups, OptimizerConfig(kind=kind, lr=0.1, l1=l1))
    for norm in norms:
        weight.grad = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
        update_unless_bad(optimizer, torch.tensor(norm), ask_host=ask_host)
    return weight.detach()


@pytest.mark.parametrize("kind", list(OptimizerKind), ids=lambda kind: kind.name)
@pytest.mark.parametrize("ask_host", [True, False], ids=["host", "device"])
def test_a_bad_update_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(kind: OptimizerKind, ask_host: bool):
    untouched = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(weights_after(kind, [math.nan, math.inf], ask_host=ask_host), untouched)
    good = weights_after(kind, [1.0, 1.0], ask_host=ask_host)
    assert not torch.equal(good, untouched)
    assert torch.equal(weights_after(kind, [1.0, math.inf, 1.0], ask_host=ask_host), good)
    assert torch.equal(good, weights_after(kind, [1.0, 1.0], ask_host=not ask_host))


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adam"])
def test_the_l1_norm_takes_lr_times_its_weight_and_stops_at_zero(kind: str):
    without = weights_after(OptimizerKind[kind], [1.0], ask_host=True)
    expected = torch.nn.functional.softshrink(without, 0.1 * 0.5)
    assert not torch.equal(expected, without)
    for ask_host in (True, False):
        found = weights_after(OptimizerKind[kind], [1.0, math.nan], ask_host=ask_host, l1=0.5)
        assert torch.allclose(found, expected, atol=1e-7), "once, and not for the update that is skipped"
