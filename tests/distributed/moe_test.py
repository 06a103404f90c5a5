"""A mixture of experts is the same run under every engine and world size, its biases bit by bit."""

import dataclasses
from functools import partial

import numpy as np
import pytest

from bigtrain.config import ActivationCheckpointing, OptimizerKind
from bigtrain.config.moe import MoeConfig
from bigtrain.engine import balance
from bigtrain.testing.parity import TOLERANCES, compare, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.muon_test import LLAMA
from tests.distributed.ranks import ENGINES, small_config, with_engine

MOE = MoeConfig(
    num_experts=5, experts_per_token=2, expert_dim=16, num_shared_experts=1, dense_layers=1, balance_speed=1e-2,
    sequence_balance=0.1,
)  # fmt: skip


def config(variant, world_size):
    engine, _, change = variant.partition(" ")
    # Smaller weights make queries as small as the eps of their norm, which then magnifies roundings a hundred times.
    made = small_config(model={**LLAMA, "qk_norm": True, "moe": MOE, "num_layers": 3, "head_dim": 8, "init_std": 0.1})
    made.train.micro_batch_size = 2
    fields = {"dp_shard": min(world_size, 2)} if engine == "hsdp" else {}
    if change == "recomputed":
        fields["activation_checkpointing"] = ActivationCheckpointing.full
    if change == "frozen":
        made.model.freeze = ["blocks.1.*"]
    if change == "muon":
        made.optimizer = dataclasses.replace(made.optimizer, kind=OptimizerKind.muon)
    return with_engine(made, engine, **fields)


def trace_all(world_size, variants):
    return {variant: trace(config(variant, world_size)) for variant in variants}


def trace_with_own_counts():
    """The mistake: every rank balances by its own tokens."""
    balance.Balance.update, right = _update_alone, balance.Balance.update
    try:
        return trace(config("ddp", 2))
    finally:
        balance.Balance.update = right


def _update_alone(self, norm, _update=balance.Balance.update):
    self._mesh = type("Alone", (), {"total": staticmethod(lambda counts: counts)})
    _update(self, norm)


@pytest.fixture(scope="module")
def alone():
    return run_ranks(partial(trace_all, 1), 1, ("ddp", "ddp muon", "ddp frozen"), timeout_seconds=200)[0]


VARIANTS = {
    2: (*ENGINES, "ddp recomputed", "fsdp recomputed", "ddp muon", "fsdp muon", "zero2 muon", "zero3 muon"),
    3: ("ddp", "fsdp", "zero2"),
    4: ("hsdp", "fsdp", "zero3"),
}


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_the_run_is_that_of_one_process(alone, world_size):
    found = run_ranks(partial(trace_all, world_size), world_size, VARIANTS[world_size], timeout_seconds=400)[0]
    for variant, trajectory in found.items():
        expected = alone["ddp muon" if variant.endswith("muon") else "ddp"]
        difference = compare(trajectory, expected)
        assert difference.within(TOLERANCES[config(variant, 1).engine.precision]), (variant, difference)
        biases = {name for name in expected.parameters if name.endswith("balance")}
        assert len(biases) == 2 and any(expected.parameters[name].any() for name in biases)
        for name in biases:
            assert np.array_equal(trajectory.parameters[name], expected.parameters[name]), (variant, name)


def test_counts_of_one_rank_alone_would_be_noticed(alone):
    found = run_ranks(trace_with_own_counts, 2, timeout_seconds=200)[0]
    names = [name for name in found.parameters if name.endswith("balance")]
    assert any(not np.array_equal(found.parameters[name], alone["ddp"].parameters[name]) for name in names)


def test_a_frozen_router_stays_as_it_is(alone):
    first, second = (alone["ddp frozen"].parameters[f"blocks.{i}.feed_forward.router.balance"] for i in (1, 2))
    assert not first.any() and second.any()
