"""Engines train whatever network with whatever objective: on two ranks as one process does."""

import math

import pytest
import torch

from bigtrain.checkpoint.loader import load_checkpoint
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import RunState, checkpoint_path
from bigtrain.config import CheckpointConfig, TrainingConfig
from bigtrain.data.order.permutation import rank_share
from bigtrain.data.read.batch import Batch
from bigtrain.distributed.collectives import all_reduce_sum, gather_json, init_process_group
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import initialise
from bigtrain.models.construction import parameters_on_meta
from bigtrain.models.init import Given
from bigtrain.processes import RankInfo
from bigtrain.tasks.base import split_sums
from bigtrain.testing.ranks import run_ranks
from tests.distributed.networks import batch_of, build
from tests.distributed.ranks import small_config

KINDS = ("ddp", "fsdp", "zero1", "zero2", "zero3")
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, STEPS = 8, 2, 3
UNITS = {"bert": 3, "vit": 3, "t5": 5, "lstm": 1, "cnn": 1}
"""That FSDP gathers one by one: the root, and the blocks of every stack."""
UNEVEN = ("moe", "mamba", "t5", "thin")


def train(kind, name):
    """Return loss, norm and metrics of each step, FSDP's units, and whether a rank holds nothing of some tensor."""
    engine = start(kind, name)
    held = gather_json([[key, entry.shape, len(entry.boxes)] for key, entry in engine.state.entries.items()])
    assert all([entry[:2] for entry in rank] == [entry[:2] for entry in held[0]] for rank in held), "the same names"
    holds_nothing = any(count == 0 for rank in held for *_, count in rank)
    steps = run_steps(engine, name, range(STEPS))
    return steps, sum(type(module).__name__.startswith("FSDP") for module in engine.module.modules()), holds_nothing


def start(kind, name):
    info, device = RankInfo.from_env(), torch.device("cpu")
    if not torch.distributed.is_initialized():
        init_process_group(info, device, timeout_seconds=60)
    config = small_config(kind)
    config.train = TrainingConfig(global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=MICRO_BATCH_SIZE)
    network, objective = build(name)
    engine = build_engine(config, lambda: build_on_meta(name), info=info, device=device, objective=objective)
    initialise(engine.state, {key: Given(p.detach().clone()) for key, p in network.named_parameters()}, num_threads=1)
    return engine


def run_steps(engine, name, numbers):
    objective, steps = engine.objective, []
    for step in numbers:
        batch = batch_of(name, GLOBAL_BATCH_SIZE, step)
        num_targets = int(objective.count({key: tensor.numpy() for key, tensor in batch.items()}).sum())
        mine = share_of(batch, engine.mesh, objective).split(MICRO_BATCH_SIZE)
        sums = all_reduce_sum(engine.forward_backward(mine, num_targets=num_targets))
        loss, *rest = sums.tolist()
        metrics = objective.metrics(loss / num_targets, split_sums(objective, rest))
        steps.append((loss / num_targets, float(engine.step(0.01)), metrics))
    return steps


def share_of(batch, mesh, objective):
    """Return this rank's samples of a global batch, padded as the loader pads them."""
    share = rank_share(GLOBAL_BATCH_SIZE, mesh.dp_rank, mesh.dp_size)
    most = len(rank_share(GLOBAL_BATCH_SIZE, 0, mesh.dp_size))
    rows = slice(share.start, share.stop) if share else slice(1)
    filling = {name: field.filling for name, field in objective.fields.items()}
    mine = Batch({name: tensor[rows] for name, tensor in batch.items()})
    return mine.padded(1, math.ceil(most / MICRO_BATCH_SIZE) * MICRO_BATCH_SIZE, num_kept=len(share), filling=filling)


def build_on_meta(name):
    with parameters_on_meta():
        return build(name)[0]


def train_all(kinds, *names):
    return [train(kind, name) for name in names for kind in kinds]


@pytest.mark.parametrize("name", UNITS)
def test_engines_agree_on_any_network(name):
    (expected, *_), *_ = run_ranks(train_all, 1, ["ddp"], name, timeout_seconds=200)[0]
    assert all(loss > 0 and norm > 0 for loss, norm, _ in expected) and len({loss for loss, *_ in expected}) == STEPS
    results = run_ranks(train_all, 2, KINDS, name, timeout_seconds=250)[0]
    units = dict(zip(KINDS, (units for _, units, _ in results), strict=True))
    assert units == dict.fromkeys(KINDS, 0) | {"fsdp": UNITS[name]}
    for kind, (found, *_) in zip(KINDS, results, strict=True):
        assert_agree(f"{name} {kind}", found, expected)


def assert_agree(label, found, expected):
    for (loss, norm, metrics), (loss_1, norm_1, metrics_1) in zip(found, expected, strict=True):
        print(label, loss, loss / loss_1 - 1, norm / norm_1 - 1)
        assert loss == pytest.approx(loss_1, rel=1e-6), label
        assert norm == pytest.approx(norm_1, rel=1e-5), label
        assert metrics == metrics_1, label


@pytest.fixture(scope="module")
def alone():
    """What one process computes of the networks whose ranks need not divide the batch."""
    results = run_ranks(train_all, 1, ["ddp"], *UNEVEN, timeout_seconds=200)[0]
    return {name: steps for name, (steps, *_) in zip(UNEVEN, results, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 5])
def test_any_number_of_ranks_agrees_on_experts_states_and_encoders(world_size, alone):
    kinds = ("ddp", "fsdp", "zero2", "zero3") if world_size == 3 else ("fsdp", "zero3")
    results = iter(run_ranks(train_all, world_size, kinds, *UNEVEN, timeout_seconds=280)[0])
    for name in UNEVEN:
        for kind in kinds:
            steps, _, holds_nothing = next(results)
            assert_agree(f"{name} {kind} world {world_size}", steps, alone[name])
            assert holds_nothing or kind == "ddp" or name != "thin"  # a rank without a part has the names too
    with pytest.raises(AssertionError):
        assert_agree("another network", alone["moe"], alone["mamba"])


def save_and_load(root):
    """Train the thin network half-way and save it under each engine; return what the rest is under all, by both."""
    results, halfway = {}, STEPS - 1
    for kind in (*KINDS, "hsdp"):
        engine = start(kind, "thin")
        run_steps(engine, "thin", range(halfway))
        saver = Saver(root / kind, engine.state.entries, CheckpointConfig())
        saver.save(RunState(halfway, 0, 0, "synthetic", {}, {}, engine.mesh.size))
        assert saver.finish().error is None
        results[kind, kind] = run_steps(engine, "thin", range(halfway, STEPS))
    for kind in KINDS:
        engine = start(kind, "thin")
        for source in (*KINDS, "hsdp"):
            load_checkpoint(checkpoint_path(root / source, halfway), engine.state.entries)
            engine.state.commit()
            results[source, kind] = run_steps(engine, "thin", range(halfway, STEPS))
    return results


def test_a_parameter_without_a_dimension_is_saved_and_goes_on_under_every_engine(alone, tmp_path):
    for (source, target), steps in run_ranks(save_and_load, 2, tmp_path, timeout_seconds=200)[0].items():
        assert_agree(f"{source} to {target}", steps, alone["thin"][-1:])
