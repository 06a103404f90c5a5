"""A mixture of experts is the same run under every engine and world size, its biases bit by bit."""

import dataclasses
import re
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from bigtrain.config import ActivationCheckpointing, Offload, OptimizerKind, ParallelConfig
from bigtrain.config.check import check
from bigtrain.config.moe import MoeConfig
from bigtrain.engine import balance, exchange
from bigtrain.run.step import train_step
from bigtrain.testing.parity import TOLERANCES, compare, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.checkpoint_test import leg
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


# Experts that ranks share out


def shared_out(engine, world_size, *, ep=2, tp=1, dp_shard=None, **fields):
    """Return the configuration of a case, which would be accepted; its experts divide by ``ep``."""
    made = config("ddp", world_size)
    moe = dataclasses.replace(MOE, num_experts=4)
    made.model = dataclasses.replace(made.model, moe=moe, num_heads=2, num_kv_heads=2)
    made.parallel = ParallelConfig(ep=ep, tp=tp)
    made = with_engine(made, engine, **fields, **({"dp_shard": dp_shard} if dp_shard else {}))
    assert check(made, world_size=world_size, local_world_size=world_size) == []
    return made


@pytest.mark.parametrize(
    ("world_size", "engine", "fields"),
    [
        (2, "ddp", {"activation_checkpointing": ActivationCheckpointing.full}),
        pytest.param(2, "fsdp", {}, marks=pytest.mark.slow),
        pytest.param(4, "fsdp", {}, marks=pytest.mark.slow),
        pytest.param(4, "ddp", {}, marks=pytest.mark.slow),
    ],
)
def test_experts_see_the_tokens_of_ranks_that_share_matrices(whole, world_size, engine, fields):
    case = shared_out(engine, world_size, ep=1, tp=2, **fields)
    trajectory = run_ranks(trace, world_size, case, timeout_seconds=200)[0]
    difference = compare(trajectory, whole[0])
    print(engine, world_size, difference)
    assert difference.within(TOLERANCES[case.engine.precision])
    for name in (name for name in whole[0].parameters if name.endswith("balance")):
        assert np.array_equal(trajectory.parameters[name], whole[0].parameters[name]), name


def watched(case):
    """Return the trajectory, how many elements of the experts this rank holds, and how many messages it has sent."""
    engines, sent = [], []

    def step(engine, batch, lr):
        engines.append(engine)
        with mock.patch.object(exchange.dist, "all_to_all_single", side_effect=dist.all_to_all_single) as sending:
            done = train_step(engine, batch, lr)
        sent.append(sending.call_count)
        return done

    trajectory = trace(case, step)
    entries = engines[0].state.entries.items()
    return trajectory, sum(box.view.numel() for key, entry in entries if HELD.match(key) for box in entry.boxes), sent


def watch_all(cases):
    return [watched(case) for case in cases]


HELD = re.compile(r"model\.blocks\.\d+\.feed_forward\.experts\.")
RECOMPUTED = {"activation_checkpointing": ActivationCheckpointing.full}
SHARED = {
    2: [("ddp", RECOMPUTED), ("fsdp", {})],
    4: [("fsdp", {}), ("hsdp", {"dp_shard": 2}), ("ddp", {"ep": 4})],
}
MORE = {
    2: [("ddp", {}), ("fsdp", RECOMPUTED)],
    4: [("ddp", {}), ("fsdp", {"ep": 4}), ("hsdp", {"dp_shard": 4, "ep": 2}), ("fsdp", RECOMPUTED)],
}


@pytest.fixture(scope="module")
def whole():
    return run_ranks(watched, 1, shared_out("ddp", 1, ep=1), timeout_seconds=200)[0]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(2, SHARED[2]), (4, SHARED[4]), *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE.items())],
    ids=["2", "4", "2 more", "4 more"],
)
def test_experts_that_ranks_share_out_are_those_of_one_process(whole, world_size, cases):
    configs = [shared_out(engine, world_size, **how) for engine, how in cases]
    ranks = run_ranks(watch_all, world_size, configs, timeout_seconds=280)
    for number, (engine, how) in enumerate(cases):
        trajectory, *_ = ranks[0][number]
        difference = compare(trajectory, whole[0])
        print(engine, how, world_size, difference)
        assert difference.within(TOLERANCES[configs[number].engine.precision]), (engine, how)
        for name in (name for name in whole[0].parameters if name.endswith("balance")):
            assert np.array_equal(trajectory.parameters[name], whole[0].parameters[name]), (engine, how, name)
        # Which layout ran: what a rank holds, and two mixtures that send counts, rows there and rows back.
        copies = {"ddp": world_size // how.get("ep", 2), "hsdp": world_size // how.get("dp_shard", 1)}.get(engine, 1)
        assert sum(rank[number][1] for rank in ranks) == copies * whole[1], (engine, how)
        micro_batches = configs[number].train.micro_batches(world_size)
        each = 2 * micro_batches * (5 + 3 * (how == RECOMPUTED))
        assert ranks[0][number][2] == [each] * len(trajectory.losses), (engine, how)


def summed_over_all(engine, batch, lr):
    """The mistake: gradients of experts are summed over ranks that hold others."""
    engine.mesh.experts.get_group = lambda name: engine.mesh.ranks.get_group("dp_replicate")
    return train_step(engine, batch, lr)


def test_gradients_of_other_experts_would_be_noticed(whole):
    found = run_ranks(trace, 2, shared_out("ddp", 2), summed_over_all, timeout_seconds=200)[0]
    difference = compare(found, whole[0])
    print(difference)
    assert difference.grad_norm > 1e-3


def test_a_checkpoint_of_shared_experts_goes_on_in_other_layouts(tmp_path):
    expected = run_ranks(leg, 1, shared_out("ddp", 1, ep=1), tmp_path / "whole", 0, 8, timeout_seconds=100)[0][2]
    before = None
    for number, (engine, world_size, ep) in enumerate((("ddp", 2, 2), ("fsdp", 2, 1), ("fsdp", 4, 2), ("ddp", 1, 1))):
        case, first = shared_out(engine, world_size, ep=ep), 2 * number
        ranks = run_ranks(leg, world_size, case, tmp_path / "chain", first, first + 2, timeout_seconds=100)
        begun, ended, losses = ranks[0]
        assert before in (None, begun), f"{engine} ep {ep}: what was loaded is not what was saved"
        assert losses == pytest.approx(expected[first : first + 2], rel=1e-6)
        before = ended


def test_what_cannot_be_shared_out_is_refused():
    case = shared_out("ddp", 2)
    muon = dataclasses.replace(case.optimizer, kind=OptimizerKind.muon)
    for change, sentence in (
        ({"parallel": ParallelConfig(ep=3)}, "parallel.ep=3: the model has 4 experts; use one of 1, 2, 4"),
        ({"parallel": ParallelConfig(ep=4)}, "parallel.ep=4 does not divide the world size 2; use 4 ranks"),
        ({"optimizer": muon}, "parallel.ep=2: optimizer=muon is not offered with it; use optimizer=adamw"),
        ({"parallel": ParallelConfig(ep=2, tp=2)}, "parallel.tp=2: parallel.ep=2 is not offered with it"),
        ({"engine": small_config("zero2").engine}, "parallel.ep=2: not offered by engine=zero2; use engine=ddp"),
        (
            {"engine": small_config("fsdp", offload=Offload.cpu).engine},
            "parallel.ep=2: engine.offload=cpu is not offered",
        ),
        ({"model": small_config().model}, "has no experts of bigtrain's own; leave it out"),
    ):
        problems = "\n".join(check(dataclasses.replace(case, **change), world_size=2, local_world_size=2))
        assert sentence in problems, problems
