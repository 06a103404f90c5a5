"""Ranks that share every sequence compute the run of one process, and each classic mistake would be seen."""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from bigtrain.config import CpMethod, ModelConfig, Offload, ParallelConfig, Precision
from bigtrain.config.check import resolve
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine import exchange
from bigtrain.models import transformer
from bigtrain.models.document_mask import build_document_mask
from bigtrain.run.step import train_step
from bigtrain.testing.parity import compare, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import SMALL, events, fork, metrics
from tests.distributed.parity_test import llama_config
from tests.distributed.ranks import laid_out, small_config
from tests.distributed.tensor_parallel_test import (
    FULL,
    LLAMA,
    SELECTIVE,
    STEPS,
    assert_same,
    leg,
    of_one_process,
    run_config,
    trace_plain,
)

NETWORKS = ("gpt", "llama", "dropout", "muon")
ULYSSES = {"cp_method": CpMethod.ulysses}


def shared(config, engine, world_size, *, cp=2, tp=1, cp_method=CpMethod.gather, dp_shard=None, micro=2, **fields):
    """Return the configuration of a case, which would be accepted."""
    parallel = ParallelConfig(tp=tp, cp=cp, cp_method=cp_method)
    return laid_out(config, engine, world_size, parallel, micro=micro, dp_shard=dp_shard, **fields)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process computes of each network."""
    configs = {name: run_config(name) for name in NETWORKS}
    documents = llama_config(tmp_path_factory.mktemp("documents"))
    configs["documents"] = resolve(dataclasses.replace(documents, model=ModelConfig(**LLAMA)))
    configs["documents"].train.steps, configs["documents"].optimizer.grad_clip = STEPS, 0.5
    narrow = ModelConfig(**LLAMA | {"num_kv_heads": 2})  # fewer than ranks
    configs["narrow"] = resolve(dataclasses.replace(run_config("llama"), model=narrow))
    return of_one_process(configs)


CASES = {
    2: [
        ("gpt", "ddp", {}),
        ("documents", "fsdp", SELECTIVE | {"offload": Offload.cpu}),
        ("llama", "fsdp", ULYSSES),
        ("documents", "ddp", ULYSSES | FULL),
        ("gpt", "fsdp", {"precision": Precision.bf16}),
    ],
    4: [
        ("gpt", "fsdp", {}),
        ("documents", "ddp", {"tp": 2}),
        ("llama", "hsdp", {"dp_shard": 1}),
        ("llama", "fsdp", {"tp": 2} | ULYSSES),
        ("narrow", "fsdp", {"cp": 4} | ULYSSES),
    ],
}
MORE = {
    2: [
        ("llama", "fsdp", {}),
        ("documents", "ddp", FULL),
        ("muon", "ddp", {}),
        ("dropout", "ddp", {}),
        ("gpt", "ddp", ULYSSES),
        ("documents", "ddp", {"compile": True}),
        ("llama", "fsdp", {"compile": True} | ULYSSES),
    ],
    4: [
        ("llama", "ddp", {}),
        ("documents", "fsdp", {"tp": 2}),
        ("muon", "fsdp", {}),
        ("llama", "ddp", {"cp": 4}),
        ("documents", "fsdp", {"cp": 4}),
        ("gpt", "fsdp", {"cp": 4} | ULYSSES),
        ("gpt", "hsdp", {"dp_shard": 2}),
    ],
}


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(2, CASES[2]), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((4, CASES[4]), *MORE.items()))],
    ids=["2", "4", "2 more", "4 more"],
)
def test_every_layout_computes_what_one_process_does(world_size, cases, one_process):
    configs = [shared(one_process[name][0], engine, world_size, **how) for name, engine, how in cases]
    ranks = run_ranks(trace_plain, world_size, configs, timeout_seconds=280)
    for number, (name, engine, how) in enumerate(cases):
        what = f"{name} {engine} {how} on {world_size}"
        if name != "dropout":  # which draws other numbers on every rank
            assert_same(ranks[0][number], one_process[name][1], configs[number].engine.precision, what)


def counted_by_tokens(mesh, sums):
    """Targets, which the ranks count of whole sequences, are added up as if each counted its own tokens."""
    dist.all_reduce(sums)
    return sums


def local_rows(positions_BS, *, flex, rows):
    """A rank's queries are taken for the first tokens."""
    return build_document_mask(positions_BS, flex=flex, rows=torch.arange(len(rows)))


def own_gradient(grad_BTD, group, size):
    """Keys and values keep the gradient of this rank's queries alone."""
    return grad_BTD.chunk(size, dim=1)[dist.get_rank(group)].contiguous()


MISTAKES = {
    "targets count for each rank": {"target": Mesh, "attribute": "total", "new": counted_by_tokens},
    "a mask of local places": {"target": transformer, "attribute": "build_document_mask", "new": local_rows},
    "keys' gradients are not summed": {"target": exchange, "attribute": "scatter_tokens", "new": own_gradient},
}


def trace_mistakes(config):
    found = {}
    for name, patch in [("none", None), *MISTAKES.items()]:
        with mock.patch.object(**patch) if patch else contextlib.nullcontext():
            found[name] = trace(config, train_step)
    return found


@pytest.fixture(scope="module")
def mistaken(one_process):
    return run_ranks(trace_mistakes, 2, shared(one_process["documents"][0], "ddp", 2), timeout_seconds=280)[0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_gate_catches_the_classic_mistakes(mistake, mistaken, one_process):
    difference = compare(mistaken[mistake], one_process["documents"][1])
    print(mistake, difference)
    assert difference.grad_norm > 1e-4
    assert compare(mistaken["none"], one_process["documents"][1]).grad_norm < 1e-5


CHAIN = [("fsdp", 4, {}), ("ddp", 1, {"cp": 1}), ("ddp", 2, {"cp": 1, "tp": 2}), ("fsdp", 2, ULYSSES)]


def test_a_checkpoint_goes_from_layout_to_layout(tmp_path):
    config = small_config(model={"num_heads": 2, "ffn_dim": 45})
    config.train.steps = 12
    whole = run_ranks(leg, 1, config, tmp_path / "whole", 0, 12, timeout_seconds=100)[0]
    before = None
    for number, (engine, world_size, how) in enumerate(CHAIN):
        first, last = 3 * number, 3 * number + 3
        case = shared(config, engine, world_size, micro=1, **how)
        ranks = run_ranks(leg, world_size, case, tmp_path / "chain", first, last, timeout_seconds=100)
        begun, ended, losses, logits, texts, drawn = ranks[0]
        assert before in (None, begun), f"{engine} {how}: what was loaded is not what was saved"
        print(engine, how, [abs(a / b - 1) for a, b in zip(losses, whole[2][first:last], strict=True)])
        assert losses == pytest.approx(whole[2][first:last], rel=1e-6)
        before = ended
    for found, expected in zip(logits, whole[3], strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    assert texts == whole[4]
    assert drawn == ranks[1][5], "ranks that share sequences go on with the same tokens"


def test_the_command_trains_and_validates_what_one_process_does(tmp_path):
    settings = [*SMALL, "engine=fsdp", "engine.precision=fp32", "train.steps=4", "validation.every_steps=2"]
    settings += ["logging.layer_norms_every_steps=2", "checkpoint.every_steps=2"]
    for name, world_size, layout in (("one", 1, "parallel.cp=1"), ("two", 2, "parallel.cp=2")):
        ended = fork("train.py", *settings, layout, f"run.name={name}", cwd=tmp_path, world_size=world_size)
        assert ended.code == 0, ended
    one, two = metrics(tmp_path / "runs/one"), metrics(tmp_path / "runs/two")
    assert [r["data_digest"] for r in two] == [r["data_digest"] for r in one]
    numbers = [key for key in one[1] if key in ("loss", "lr", "grad_norm") or key.startswith("optim/")]
    for record, expected in zip(two, one, strict=True):
        wanted = {key: pytest.approx(expected[key], rel=1e-5) for key in numbers if key in expected}
        assert {key: record[key] for key in wanted} == wanted
    losses = [[event["loss"] for event in events(tmp_path / "runs" / name, "validation")] for name in ("one", "two")]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert "fsdp x 2, cp 2" in fork("checkpoints.py", "runs/two", cwd=tmp_path).out
