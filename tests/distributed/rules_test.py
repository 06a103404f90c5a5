"""Update rules with an L1 norm, decay in the gradient and plain momentum are the same run under every engine."""

import dataclasses

import pytest
import torch

from bigtrain.config import OptimizerKind
from bigtrain.testing.parity import compare, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.ranks import ENGINES, small_config, with_engine, zero_environ

RULES = {
    "adam": {"kind": OptimizerKind.adam, "weight_decay": 0.1, "l1": 0.5},
    "plain momentum": {"kind": OptimizerKind.sgd, "lr": 0.1, "nesterov": False, "l1": 0.05},
}


def config(rule, engine="ddp", **changes):
    config = with_engine(small_config(), engine)
    config.train.micro_batch_size, config.train.steps = 4, 4
    config.optimizer = dataclasses.replace(config.optimizer, **RULES[rule] | changes)
    return config


def trace_engines(engines):
    return {rule: {engine: trace(config(rule, engine)) for engine in engines} for rule in RULES}


def trace_alone():
    changes = {"l1": {"l1": 0.0}, "decay": {"weight_decay": 0.0}, "rule": {"kind": OptimizerKind.adamw, "lr": 1e-2}}
    others = {rule: {what: trace(config(rule, **change)) for what, change in changes.items()} for rule in RULES}
    return trace_engines(["ddp"]), others


@pytest.fixture(scope="module")
def alone():
    return run_ranks(trace_alone, 1, timeout_seconds=200)[0]


def test_every_engine_computes_what_one_process_does(alone):
    reference, _ = alone
    found = run_ranks(trace_engines, 2, ENGINES, timeout_seconds=280, environ=zero_environ(2))[0]
    for rule, of_engines in found.items():
        for engine, trajectory in of_engines.items():
            difference = compare(trajectory, reference[rule]["ddp"])
            assert max(difference.loss, difference.grad_norm) <= 1e-5, (rule, engine, difference)


def test_each_part_of_a_rule_has_an_effect(alone):
    reference, others = alone
    for rule, changed in others.items():
        for what, trajectory in changed.items():
            assert compare(trajectory, reference[rule]["ddp"]).loss > 1e-4, (rule, what)


def share_of_zeros(trajectory):
    matrices = [torch.as_tensor(value) for value in trajectory.parameters.values() if value.ndim > 1]
    return (torch.cat([matrix.flatten() for matrix in matrices]) == 0).float().mean().item()


def test_the_norm_makes_zeros(alone):
    reference, others = alone
    for rule, of_engines in reference.items():
        assert share_of_zeros(of_engines["ddp"]) > 0.05 > share_of_zeros(others[rule]["l1"]), rule
