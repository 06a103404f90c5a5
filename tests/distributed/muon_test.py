"""Muon computes the same run under every engine, a rank keeps its share of the state only, and mistakes are noticed."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch.distributed.tensor import Shard

from bigtrain.config import Activation, Norm, OptimizerKind, Positions, Precision
from bigtrain.data.read.batch import Batch
from bigtrain.engine import native
from bigtrain.engine.state import MODEL, OPTIMIZER
from bigtrain.optim import muon
from bigtrain.testing.parity import compare, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.ranks import ENGINES, small_config, start_engine, with_engine, zero_environ

OFFLOADED = tuple(f"{engine} offload" for engine in ("fsdp", "zero1", "zero2", "zero3"))
VARIANTS = {1: (*ENGINES, "accelerate"), 2: (*ENGINES, *OFFLOADED, "accelerate"), 4: ("hsdp",)}
SHARDED = ("fsdp", "hsdp", "zero1", "zero2", "zero3")
BF16 = ("ddp", "fsdp", "zero3")
LLAMA = {"positions": Positions.rope, "norm": Norm.rmsnorm, "activation": Activation.swiglu, "bias": False}


def muon_config(variant, world_size, precision="fp32"):
    """Grouped heads and a gated feed-forward layer: matrices that are fused, lying and standing, of several shapes."""
    engine, _, offload = variant.partition(" ")
    config = small_config(model={**LLAMA, "hidden_dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 72})
    config.optimizer = dataclasses.replace(config.optimizer, kind=OptimizerKind.muon)
    config.train.micro_batch_size = 8 // max(world_size, 2)
    fields = {"offload": "cpu"} if offload else {}
    if engine == "hsdp":
        fields["dp_shard"] = min(world_size, 2)
    return with_engine(config, engine, precision=Precision[precision], **fields)


def trace_variants(world_size, variants, precision="fp32"):
    return {variant: trace(muon_config(variant, world_size, precision)) for variant in variants}


def orthogonalise_apart(matrices, parts, at):
    """The mistake: every rank orthogonalises what it has."""
    rows = [part.numel() // matrix.columns for matrix, part in zip(matrices, parts, strict=True)]
    return muon._orthogonalise([dataclasses.replace(m, rows=n) for m, n in zip(matrices, rows, strict=True)], parts)


def keep_to_oneself(outgoing, numels, at):
    """The mistake: nothing is communicated, everybody takes their own for that of the others."""
    (own, *_) = (tensor for row in outgoing for tensor in row)
    return [[own.repeat(numel)[:numel] for numel in row] for row in numels]


def trace_columns():
    """FSDP with shards of columns, as tensor parallelism would have them."""
    right = native.fully_shard
    native.fully_shard = partial(right, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    found = trace(muon_config("fsdp", 2)), held_boxes(start_engine(muon_config("fsdp", 2)))
    native.fully_shard = right
    return found


def held_boxes(engine):
    return {key: (entry.shape, *(box.view.shape for box in entry.boxes)) for key, entry in engine.state.entries.items()}


MISTAKES = {"orthogonalise_parts": orthogonalise_apart, "_swap": keep_to_oneself}


def trace_mistake(name):
    right = getattr(muon, name)
    setattr(muon, name, MISTAKES[name])
    found = trace(muon_config("fsdp", 2))
    setattr(muon, name, right)
    return found


def held(entries):
    """Return how many elements of matrices, and of their momentum, this rank holds; there is no other state of them."""
    numel = {key: sum(box.view.numel() for box in entry.boxes) for key, entry in entries.items()}
    momenta = [key for key in entries if key.endswith(".momentum_buffer")]
    names = [key.removeprefix(OPTIMIZER).removesuffix(".momentum_buffer") for key in momenta]
    blocks = [key for key, entry in entries.items() if key.startswith("model.blocks") and len(entry.shape) == 2]
    assert sorted(MODEL + name for name in names) == sorted(blocks)
    assert not any(f"{OPTIMIZER}{name}.{key}" in entries for name in names for key in ("exp_avg", "exp_avg_sq"))
    assert f"{OPTIMIZER}embed_tokens.weight.exp_avg" in entries
    return sum(numel[key] for key in blocks), sum(numel[key] for key in momenta)


def survives(engine):
    """Return whether a step with a gradient that is not finite leaves weights and optimizer state as they are."""
    tokens = torch.arange(32).view(2, 16)

    def step(num_targets):
        engine.forward_backward([Batch(tokens=tokens, targets=tokens)], num_targets=torch.tensor(num_targets))
        engine.step(1e-2)
        return [box.view.clone() for entry in engine.state.entries.values() for box in entry.boxes]

    good = step(32.0)
    unharmed = all(map(torch.equal, step(math.nan), good))
    return unharmed and not any(torch.equal(a, b) for a, b in zip(step(32.0), good, strict=True) if a.numel() > 50)


def look_at(variant):
    engine = start_engine(muon_config(variant, 2))
    return *held(engine.state.entries), survives(engine)


def compute_all(world_size):
    """Everything that is looked at below, in as few processes as possible."""
    found = {"fp32": trace_variants(world_size, VARIANTS[world_size])}
    if world_size == 2:
        found["bf16"] = trace_variants(2, BF16, "bf16")
        found["mistakes"] = {name: trace_mistake(name) for name in MISTAKES}
        found["columns"] = trace_columns()
        found["looked_at"] = {variant: look_at(variant) for variant in (*SHARDED, "ddp")}
    return found


@pytest.fixture(scope="module")
def found():
    """What each rank of each world has found; accelerate is DDP in the first, ZeRO-2 in the second."""
    environ = {1: {}, 2: zero_environ(2), 4: {}}
    return {n: run_ranks(compute_all, n, n, timeout_seconds=280, environ=environ[n]) for n in VARIANTS}


@pytest.fixture(scope="module")
def reference(found):
    return found[1][0]["fp32"]["ddp"]


@pytest.mark.parametrize(("world_size", "variant"), [(n, variant) for n in VARIANTS for variant in VARIANTS[n]])
def test_every_engine_computes_what_one_process_does(world_size, variant, found, reference):
    trajectory = found[world_size][0]["fp32"][variant]
    if variant == "accelerate":
        assert trajectory.wrapped_type == ("DistributedDataParallel" if world_size == 1 else "DeepSpeedEngine")
    difference = compare(trajectory, reference)
    print(difference)
    assert max(difference.loss, difference.grad_norm) <= 1e-5
    assert difference.parameters <= 1e-4


@pytest.mark.parametrize("engine", BF16)
def test_bf16_is_near_fp32(engine, found, reference):
    difference = compare(found[2][0]["bf16"][engine], reference)
    print(difference)
    assert 0 < difference.loss <= 2e-3


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_sharing_is_noticed(mistake, found, reference):
    difference = compare(found[2][0]["mistakes"][mistake], reference)
    print(difference)
    assert difference.loss > 1e-3
    assert difference.parameters > 1e-3


def test_shards_of_columns_compute_it_too(found, reference):
    trajectory, boxes = found[2][0]["columns"]
    (rows, columns), held = boxes["model.blocks.0.feed_forward.down.weight"]
    assert tuple(held) == (rows, columns // 2)
    difference = compare(trajectory, reference)
    print(difference)
    assert max(difference.loss, difference.grad_norm) <= 1e-5
    assert difference.parameters <= 1e-4


def test_a_rank_holds_its_part_of_the_momentum_only(found):
    _, everything, _ = found[2][0]["looked_at"]["ddp"]
    for engine in SHARDED:
        weights, momenta, _ = zip(*(rank["looked_at"][engine] for rank in found[2]), strict=True)
        assert momenta == weights
        assert sum(momenta) == everything
        assert max(momenta) <= 0.6 * everything


@pytest.mark.parametrize("engine", [*SHARDED, "ddp"])
def test_a_bad_gradient_changes_nothing_on_any_rank(engine, found):
    assert all(rank["looked_at"][engine][2] for rank in found[2])
