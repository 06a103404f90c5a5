"""Ranks that share every matrix compute the run of one process, and each classic mistake would be seen."""

import contextlib
import dataclasses
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bigtrain.config import (
    ActivationCheckpointing,
    EngineKind,
    ModelConfig,
    Offload,
    OptimizerKind,
    ParallelConfig,
    Precision,
)
from bigtrain.config.check import resolve
from bigtrain.engine import base
from bigtrain.engine.state import MODEL
from bigtrain.models import partition
from bigtrain.models.partition import Cut
from bigtrain.models.transformer import RowLinear
from bigtrain.run.batched import continued, logits_of
from bigtrain.run.step import train_step
from bigtrain.testing.parity import TOLERANCES, Case, compare, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.checkpoint_test import go_on
from tests.distributed.launches import SMALL, events, fork, metrics
from tests.distributed.parity_test import gate_config, llama_config
from tests.distributed.ranks import laid_out, small_config, start_engine
from tests.distributed.verify_resume_test import verify

STEPS = 10
GPT = {"vocab_size": 512, "num_layers": 2, "hidden_dim": 64, "num_heads": 4, "max_positions": 64}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 4, "bias": False}
LLAMA |= {"tie_embeddings": False, "vocab_size": 257, "num_layers": 2, "hidden_dim": 48, "num_heads": 8, "head_dim": 8}
LLAMA |= {"qk_norm": True, "ffn_dim": 101}  # neither this nor the vocabulary divides by the ranks


NETWORKS = {"gpt": GPT, "llama": LLAMA, "even": LLAMA | {"vocab_size": 256, "ffn_dim": 96}, "muon": GPT}
NETWORKS["dropout"] = GPT | {"dropout": 0.1}


def run_config(network):
    """Ragged targets, and gradients that are clipped in every step."""
    config = resolve(dataclasses.replace(gate_config(), model=ModelConfig(**NETWORKS[network])))
    config.train.steps, config.optimizer.grad_clip = STEPS, 0.5
    if network == "dropout":
        config.train.steps = 20
    if network == "muon":
        config.optimizer.kind = OptimizerKind.muon
    return config


def shared(config, engine, world_size, *, tp=2, dp_shard=None, micro=2, **fields):
    """Return the configuration of a case, which would be accepted."""
    return laid_out(config, engine, world_size, ParallelConfig(tp=tp), micro=micro, dp_shard=dp_shard, **fields)


def watched(config):
    """Return the trajectory, the shape of this rank's memory of each weight, and what differs between copies."""
    engines = []

    def step(engine, batch, lr):
        engines.append(engine)
        return train_step(engine, batch, lr)

    trajectory, engine = trace(config, step), engines[0]
    entries = {key.removeprefix(MODEL): entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)}
    held = {name: sum(box.view.numel() for box in entry.boxes) for name, entry in entries.items()}
    return trajectory, held, different_copies(engine)


def different_copies(engine):
    """Return the names of weights that are whole on the ranks of a tensor-parallel group, and not the same bit by bit."""
    found = []
    for key, entry in engine.state.entries.items():
        name = key.removeprefix(MODEL)
        if key == name or name in engine.state.cuts:
            continue
        own = torch.cat([box.view.reshape(-1) for box in entry.boxes] or [torch.zeros(0)])
        others = [torch.empty_like(own) for _ in range(engine.mesh.tp_size)]
        dist.all_gather(others, own.contiguous(), group=engine.mesh.tp)
        if not all(torch.equal(other.view(torch.int32), own.view(torch.int32)) for other in others):
            found.append(name)
    return found


def trace_all(configs):
    return [watched(config) for config in configs]


def run_all(world_size, configs):
    return run_ranks(trace_all, world_size, configs, timeout_seconds=280)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process computes of each network."""
    configs = {name: run_config(name) for name in NETWORKS}
    configs["documents"] = llama_config(tmp_path_factory.mktemp("documents"))
    configs["documents"] = resolve(dataclasses.replace(configs["documents"], model=ModelConfig(**LLAMA)))
    return of_one_process(configs)


def of_one_process(configs):
    """Return configurations by name with what one process computes of each; gradients are clipped in every step."""
    cases = [configure(config, Case(EngineKind.ddp, 1, 8)) for config in configs.values()]
    trajectories = run_ranks(trace_plain, 1, cases, timeout_seconds=280)[0]
    assert min(trajectories[0].grad_norms) > configs["gpt"].optimizer.grad_clip, "gradients are clipped"
    return {name: (configs[name], found) for name, found in zip(configs, trajectories, strict=True)}


def trace_plain(configs):
    return [trace(config) for config in configs]


def assert_same(found, reference, precision, what):
    difference = compare(found, reference)
    print(what, difference)
    assert difference.within(TOLERANCES[precision]), what
    assert difference.loss > 0 or precision is Precision.fp32, "bf16 rounds"


FULL = {"activation_checkpointing": ActivationCheckpointing.full}
SELECTIVE = {"activation_checkpointing": ActivationCheckpointing.selective}
BF16 = {"precision": Precision.bf16}
CASES = {
    2: [
        ("gpt", "ddp", {}),
        ("llama", "ddp", {}),
        ("documents", "fsdp", SELECTIVE | {"offload": Offload.cpu}),
        ("muon", "ddp", FULL),
        ("even", "zero2", {}),
        ("gpt", "fsdp", BF16),
        ("dropout", "ddp", {}),
    ],
    4: [
        ("gpt", "fsdp", {}),
        ("llama", "hsdp", {"dp_shard": 1}),
        ("llama", "ddp", {"tp": 4}),
        ("gpt", "fsdp", {"tp": 4}),
    ],
}
MORE = {
    2: [
        ("documents", "fsdp", FULL),
        ("gpt", "zero1", {}),
        ("even", "zero2", SELECTIVE),
        ("llama", "ddp", BF16),
        ("even", "zero1", BF16),
        ("llama", "fsdp", {"compile": True}),
    ],
    4: [
        ("llama", "ddp", {}),
        ("gpt", "hsdp", {"dp_shard": 2}),
        ("muon", "fsdp", {}),
        ("muon", "zero1", {}),
        ("even", "zero1", {}),
        ("gpt", "zero2", {}),
    ],
}


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [*CASES.items(), *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE.items())],
    ids=["2", "4", "2 more", "4 more"],
)
def test_every_layout_computes_what_one_process_does(world_size, cases, one_process):
    configs = [shared(one_process[name][0], engine, world_size, **how) for name, engine, how in cases]
    ranks = run_all(world_size, configs)
    for number, (name, engine, how) in enumerate(cases):
        what, tp = f"{name} {engine} {how} on {world_size}", how.get("tp", 2)
        if name != "dropout":  # which draws other numbers on every rank
            assert_same(ranks[0][number][0], one_process[name][1], configs[number].engine.precision, what)
        assert all(rank[number][2] == [] for rank in ranks), "copies drift"
        # Which layout ran: what is cut is there once in each copy of the state, all else once for each of its ranks.
        shards = {"ddp": 1, "hsdp": how.get("dp_shard", 1)}.get(engine, world_size // tp)
        for parameter, whole in one_process[name][1].parameters.items():
            held = [rank[number][1][parameter] for rank in ranks]
            is_cut = "norm" not in parameter and "positions" not in parameter
            is_cut &= not parameter.endswith(("out.bias", "down.bias"))
            assert sum(held) == whole.size * world_size // (shards * (tp if is_cut else 1)), (what, parameter)
            assert is_cut <= (max(held) <= -(-whole.size // tp) + whole.shape[-1]), (what, parameter)


def uncounted_twice(engine, batch, lr):
    """What is whole on both ranks counts on both in the gradient's norm."""
    engine._uncounted.clear()
    return train_step(engine, batch, lr)


def bias_before_the_sum(layer, x_BTD):
    return layer.exchange.collect(F.linear(x_BTD, layer.weight, layer.bias))


def fused_as_one(model, size, rank):
    """The rows of q, k and v are cut as those of one matrix."""
    found = partition_cuts(model, size, rank)
    for name, cut in found.items():
        if ".qkv." in name:
            found[name] = Cut(0, cut.size, (range(rank * cut.length, (rank + 1) * cut.length),))
    return found


partition_cuts = partition.cuts
MISTAKES = {
    "norms are not summed": ({"target": base, "attribute": "add_up", "new": lambda *_: None}, train_step),
    "whole gradients count twice": (None, uncounted_twice),
    "bias before the sum": ({"target": RowLinear, "attribute": "forward", "new": bias_before_the_sum}, train_step),
    "fused rows as one": ({"target": partition, "attribute": "cuts", "new": fused_as_one}, train_step),
}


def trace_mistakes(config):
    found = {}
    for name, (patch, step) in MISTAKES.items():
        with mock.patch.object(**patch) if patch else contextlib.nullcontext():
            found[name] = trace(config, step)
    return found


@pytest.fixture(scope="module")
def mistaken():
    return run_ranks(trace_mistakes, 2, shared(run_config("gpt"), "ddp", 2), timeout_seconds=280)[0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_gate_catches_the_classic_mistakes(mistake, mistaken, one_process):
    difference = compare(mistaken[mistake], one_process["gpt"][1])
    print(mistake, difference)
    assert difference.grad_norm > 1e-4


ROWS = [[1, 2, 3], [4, 5, 6, 7, 8]]  # their lengths do not divide by the ranks


def leg(config, root, first, last):
    """Go on from the checkpoint of step ``first``, if there is one, and save at ``last``.

    Return hashes before and after, losses, and then logits of :data:`ROWS`, their continuations, and drawn ones.
    """
    engine = start_engine(config)
    begun, ended, losses = go_on(engine, config, root, first, last)
    logits = [row.numpy() for row in logits_of(engine, ROWS)]
    continue_rows = partial(continued, engine, ROWS, max_new_tokens=4, is_end=lambda prompt, ids: False)
    torch.manual_seed(engine.mesh.rank)
    return begun, ended, losses, logits, continue_rows(), continue_rows(temperature=1.0)


CHAIN = [("ddp", 2, 2), ("fsdp", 2, 1), ("ddp", 1, 1), ("fsdp", 4, 2)]


def test_a_checkpoint_goes_from_layout_to_layout(tmp_path):
    config = small_config(model={"num_heads": 2, "ffn_dim": 45})
    config.train.steps = 12
    whole = run_ranks(leg, 1, config, tmp_path / "whole", 0, 12, timeout_seconds=100)[0]
    before = None
    for number, (engine, world_size, tp) in enumerate(CHAIN):
        first, last = 3 * number, 3 * number + 3
        case = shared(config, engine, world_size, tp=tp, micro=1)
        ranks = run_ranks(leg, world_size, case, tmp_path / "chain", first, last, timeout_seconds=100)
        begun, ended, losses, logits, texts, _ = ranks[0]
        assert before in (None, begun), f"{engine} tp {tp}: what was loaded is not what was saved"
        print(engine, tp, [abs(a / b - 1) for a, b in zip(losses, whole[2][first:last], strict=True)])
        assert losses == pytest.approx(whole[2][first:last], rel=1e-6)
        before = ended
    for found, expected in zip(logits, whole[3], strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    assert texts == whole[4]
    drawn = [rank[5] for rank in ranks]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3], "ranks that share matrices go on with the same tokens"
    assert drawn[0] != drawn[2]


def test_the_command_trains_validates_and_measures_what_one_process_does(tmp_path):
    settings = [*SMALL, "model.num_heads=2", "engine=fsdp", "engine.precision=fp32", "train.steps=4"]
    settings += ["validation.every_steps=2", "logging.layer_norms_every_steps=2", "checkpoint.every_steps=2"]
    for name, world_size, layout in (("one", 1, "parallel.tp=1"), ("two", 2, "parallel.tp=2")):
        ended = fork("train.py", *settings, layout, f"run.name={name}", cwd=tmp_path, world_size=world_size)
        assert ended.code == 0, ended
    one, two = metrics(tmp_path / "runs/one"), metrics(tmp_path / "runs/two")
    assert [r["data_digest"] for r in two] == [r["data_digest"] for r in one]
    numbers = [key for key in one[1] if key in ("loss", "lr", "grad_norm") or key.startswith("optim/")]
    assert sum(key.startswith("optim/grad_norm/") for key in numbers) == 5
    for record, expected in zip(two, one, strict=True):
        wanted = {key: pytest.approx(expected[key], rel=1e-5) for key in numbers if key in expected}
        assert {key: record[key] for key in wanted} == wanted
    losses = [[event["loss"] for event in events(tmp_path / "runs" / name, "validation")] for name in ("one", "two")]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    written_by = fork("checkpoints.py", "runs/two", cwd=tmp_path).out
    assert "fsdp x 2, tp 2" in written_by


@pytest.mark.parametrize(
    ("engine", "plan"),
    [
        pytest.param("fsdp", {}, marks=pytest.mark.slow),
        ("ddp", {"resume_parallel": ParallelConfig(), "resume_world_size": 1, "resume_engine": EngineKind.fsdp}),
    ],
)
def test_a_killed_run_goes_on_in_the_same_layout_bit_by_bit_and_in_another_one_within_rounding(tmp_path, engine, plan):
    model = {"num_heads": 2, "dropout": 0.0 if plan else 0.1}
    config = shared(small_config(engine, model=model), engine, 2, micro=1)
    verdict = verify(tmp_path, config, world=2, **plan)
    assert (verdict.holds, verdict.is_bitwise) == (True, not plan), verdict
