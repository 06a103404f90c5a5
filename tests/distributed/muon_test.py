"""Muon computes the same run under every engine, a rank keeps its share of the state only, and mistakes are noticed."""

import dataclasses

import pytest

from bigtrain.config import Activation, Norm, OptimizerKind, Positions, Precision
from bigtrain.engine.state import MODEL, OPTIMIZER
from bigtrain.local_ranks import run_ranks
from bigtrain.optim import muon
from bigtrain.parity import compare, trace, zero_environ
from tests.distributed.ranks import ENGINES, small_config, start_engine, with_engine

OFFLOADED = tuple(f"{engine} offload" for engine in ("fsdp", "zero1", "zero2", "zero3"))
VARIANTS = {1: ENGINES, 2: (*ENGINES, *OFFLOADED, "accelerate"), 4: ("hsdp",)}
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


@pytest.fixture(scope="module")
def traces():
    return {n: run_ranks(trace_variants, n, n, variants, timeout_seconds=240)[0] for n, variants in VARIANTS.items()}


def assert_same_run(found, reference):
    difference = compare(found, reference)
    print(difference)
    assert max(difference.loss, difference.grad_norm) <= 1e-5
    assert difference.parameters <= 1e-4


@pytest.mark.parametrize(("world_size", "variant"), [(n, variant) for n in VARIANTS for variant in VARIANTS[n]])
def test_every_engine_computes_what_one_process_does(world_size, variant, traces):
    assert_same_run(traces[world_size][variant], traces[1]["ddp"])


def test_accelerates_zero_does_too(traces):
    found = run_ranks(trace_variants, 2, 2, ("accelerate",), timeout_seconds=120, environ=zero_environ(2))[0]
    assert found["accelerate"].wrapped_type == "DeepSpeedEngine"
    assert_same_run(found["accelerate"], traces[1]["ddp"])


def orthogonalise_apart(matrices, parts, at):
    """The mistake: every rank orthogonalises what it has."""
    rows = [part.numel() // matrix.columns for matrix, part in zip(matrices, parts, strict=True)]
    pieces = [dataclasses.replace(matrix, rows=n) for matrix, n in zip(matrices, rows, strict=True)]
    return muon._orthogonalise(pieces, parts)


def keep_to_oneself(outgoing, numels, at):
    """The mistake: nothing is communicated, everybody takes their own for that of the others."""
    sent = [tensor for row in outgoing for tensor in row]
    return [[(sent[0].repeat(numel))[:numel] for numel in row] for row in numels]


def trace_mistakes(variant):
    found = {}
    for name, mistake in {"orthogonalise_parts": orthogonalise_apart, "_swap": keep_to_oneself}.items():
        right = getattr(muon, name)
        setattr(muon, name, mistake)
        found[name] = trace(muon_config(variant, 2))
        setattr(muon, name, right)
    return found, trace_variants(2, BF16, "bf16"), {v: held(muon_config(v, 2)) for v in (*SHARDED, "ddp")}


def held(config):
    """Return how many elements of matrices and of their momentum this rank holds; there must be nothing else of them."""
    entries = start_engine(config).state.entries
    numel = {key: sum(box.view.numel() for box in entry.boxes) for key, entry in entries.items()}
    momenta = [key for key in entries if key.endswith(".momentum_buffer")]
    names = [key.removeprefix(OPTIMIZER).removesuffix(".momentum_buffer") for key in momenta]
    assert names == [
        key.removeprefix(MODEL) for key, e in entries.items() if key.startswith("model.blocks") and len(e.shape) == 2
    ]
    assert not any(f"{OPTIMIZER}{name}.{key}" in entries for name in names for key in ("exp_avg", "exp_avg_sq"))
    assert f"{OPTIMIZER}embed_tokens.weight.exp_avg" in entries
    return sum(numel[MODEL + name] for name in names), sum(numel[key] for key in momenta)


@pytest.fixture(scope="module")
def others():
    """What else two ranks can be asked for at once: mistakes, bf16, and what each holds."""
    return run_ranks(trace_mistakes, 2, "fsdp", timeout_seconds=120)


@pytest.mark.parametrize("mistake", ["orthogonalise_parts", "_swap"])
def test_wrong_sharing_is_noticed(mistake, others, traces):
    difference = compare(others[0][0][mistake], traces[1]["ddp"])
    print(difference)
    assert difference.loss > 1e-3
    assert difference.parameters > 1e-3


@pytest.mark.parametrize("engine", BF16)
def test_bf16_is_near_fp32(engine, others, traces):
    difference = compare(others[0][1][engine], traces[1]["ddp"])
    print(difference)
    assert 0 < difference.loss <= 2e-3


def test_each_rank_holds_its_part_of_the_momentum_only(others):
    for engine in SHARDED:
        weights, momenta = zip(*(rank[2][engine] for rank in others), strict=True)
        assert momenta == weights
        assert sum(momenta) == others[0][2]["ddp"][1]
        assert max(momenta) <= 0.6 * sum(momenta)
