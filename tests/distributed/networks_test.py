"""Engines train whatever network with whatever objective: on two ranks as one process does."""

import pytest
import torch

from bigtrain.config import TrainingConfig
from bigtrain.distributed.collectives import all_reduce_sum, init_process_group
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import initialise
from bigtrain.models.construction import parameters_on_meta
from bigtrain.models.init import Given
from bigtrain.processes import RankInfo
from bigtrain.tasks.base import split_sums
from bigtrain.testing.ranks import run_ranks
from tests.distributed.networks import NETWORKS, batch_of, build
from tests.distributed.ranks import small_config

KINDS = ("ddp", "fsdp", "zero1", "zero2", "zero3")
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, STEPS = 8, 2, 3
UNITS = {"bert": 3, "vit": 3, "t5": 5, "lstm": 1, "cnn": 1}
"""That FSDP gathers one by one: the root, and the blocks of every stack."""


def train(kind, name):
    """Return loss, gradient norm and metrics of each step, and the types of what is wrapped."""
    info, device = RankInfo.from_env(), torch.device("cpu")
    if not torch.distributed.is_initialized():
        init_process_group(info, device, timeout_seconds=60)
    config = small_config(kind)
    config.train = TrainingConfig(global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=MICRO_BATCH_SIZE)
    network, objective = build(name)
    engine = build_engine(config, lambda: build_on_meta(name), info=info, device=device, objective=objective)
    initialise(engine.state, {key: Given(p.detach().clone()) for key, p in network.named_parameters()}, num_threads=1)
    steps = []
    for step in range(STEPS):
        batch = batch_of(name, GLOBAL_BATCH_SIZE, step)
        num_targets = int(objective.count({key: tensor.numpy() for key, tensor in batch.items()}).sum())
        mine = batch.split(GLOBAL_BATCH_SIZE // info.world_size)[info.rank].split(MICRO_BATCH_SIZE)
        sums = all_reduce_sum(engine.forward_backward(mine, num_targets=num_targets))
        loss, *rest = sums.tolist()
        metrics = objective.metrics(loss / num_targets, split_sums(objective, rest))
        steps.append((loss / num_targets, float(engine.step(0.01)), metrics))
    return steps, sum(type(module).__name__.startswith("FSDP") for module in engine.module.modules())


def build_on_meta(name):
    with parameters_on_meta():
        return build(name)[0]


def train_all(kinds, name):
    return [train(kind, name) for kind in kinds]


@pytest.mark.parametrize("name", NETWORKS)
def test_engines_agree_on_any_network(name):
    (expected, _), *_ = run_ranks(train_all, 1, ["ddp"], name, timeout_seconds=200)[0]
    assert all(loss > 0 and norm > 0 for loss, norm, _ in expected) and len({loss for loss, *_ in expected}) == STEPS
    results = run_ranks(train_all, 2, KINDS, name, timeout_seconds=250)[0]
    units = dict(zip(KINDS, (units for _, units in results), strict=True))
    assert units == dict.fromkeys(KINDS, 0) | {"fsdp": UNITS[name]}
    for kind, (found, _) in zip(KINDS, results, strict=True):
        for (loss, norm, metrics), (loss_1, norm_1, metrics_1) in zip(found, expected, strict=True):
            print(name, kind, loss, loss / loss_1 - 1, norm / norm_1 - 1)
            assert loss == pytest.approx(loss_1, rel=1e-6), kind
            assert norm == pytest.approx(norm_1, rel=1e-5), kind
            assert metrics == metrics_1, kind
