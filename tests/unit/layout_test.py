"""Which layouts are refused, with what to do instead, before any process group; and what counts the data ranks."""

import dataclasses

import pytest

from bigtrain.config import (
    Activation,
    AdapterConfig,
    DataConfig,
    DataSource,
    EngineConfig,
    EngineKind,
    ModelConfig,
    ModelKind,
    MoeConfig,
    Offload,
    ParallelConfig,
    Precision,
    TrainConfig,
)
from bigtrain.config.check import check, fit_micro_batch, resolve
from bigtrain.config.layout import Layout, layout_of, layout_warnings
from bigtrain.plan.report import with_settings

MODEL = {"name": "small", "vocab_size": 64, "num_layers": 1, "hidden_dim": 32, "num_heads": 4, "num_kv_heads": 2}


def run_config(*changes, tp=2, **engine):
    model = ModelConfig(**MODEL, max_positions=64, positions="rope")
    data = DataConfig(source=DataSource.synthetic)
    config = TrainConfig(model=model, data=data, engine=EngineConfig(**engine), parallel=ParallelConfig(tp=tp))
    return fit_micro_batch(resolve(with_settings(config, changes)), 2)


def problems(*changes, world_size=2, tp=2, **engine):
    return check(run_config(*changes, tp=tp, **engine), world_size=world_size, local_world_size=world_size)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp", "zero1", "zero2"])
def test_what_can_be_shared_is_accepted(kind):
    assert problems(kind=EngineKind[kind], world_size=4) == []


ADAPTER = ("model.adapter", AdapterConfig())
NO_BIAS = ("model.bias", False)
REFUSED = [
    ((), {"world_size": 3}, "parallel.tp=2 does not divide the world size 3; use 2 or 4 ranks"),
    ((), {"world_size": 1}, "parallel.tp=2 does not divide the world size 1; use 2 ranks"),
    ((), {"tp": 4, "world_size": 4}, "parallel.tp=4: the model has 2 key/value heads; use a tp of 1, 2"),
    (
        (("data.sequence_length", 61),),
        {},
        "parallel.tp=2: data.sequence_length=61 does not divide by it; use data.sequence_length=62",
    ),
    ((), {"kind": EngineKind.zero3}, "parallel.tp=2: engine=zero3 owns whole parameters; use engine=fsdp"),
    ((), {"kind": EngineKind.accelerate}, "parallel.tp=2: engine=accelerate owns whole parameters; use engine=fsdp"),
    (
        (("model.vocab_size", 63),),
        {"kind": EngineKind.zero1},
        "parallel.tp=2: model.vocab_size=63 does not divide by it, as engine=zero1 needs; "
        "use engine=fsdp, or model.vocab_size=64",
    ),
    (
        (("model.ffn_dim", 63),),
        {"kind": EngineKind.zero2},
        "parallel.tp=2: model.ffn_dim=63 does not divide by it, as engine=zero2 needs; "
        "use engine=fsdp, or model.ffn_dim=64",
    ),
    (
        (),
        {"kind": EngineKind.zero2, "offload": Offload.cpu},
        "parallel.tp=2: engine.offload=cpu is not offered with engine=zero2; use engine=fsdp",
    ),
    ((("model.ffn_dim", 1),), {}, "parallel.tp=2: model.ffn_dim=1 is less than a row for each rank"),
    (
        (("model.moe", MoeConfig(num_experts=4, expert_dim=8)), ("model.activation", Activation.swiglu), NO_BIAS),
        {},
        "parallel.tp=2: model.moe is not offered with it; leave one of them out",
    ),
    ((ADAPTER,), {}, "parallel.tp=2: model.adapter is not offered with it; leave one of them out"),
    (
        (("task.kind", "distillation"), ("data.scores", "scores")),
        {},
        "parallel.tp=2: task=distillation reads whole logits, of which each rank has a part; use task=causal_lm",
    ),
    (
        (("model.kind", ModelKind.hf), ("model.name", "gpt2")),
        {},
        "parallel.tp=2: only bigtrain's own models are cut; leave it out with +model=hf",
    ),
    (
        (),
        {"precision": Precision.fp8, "compile": True},
        "parallel.tp=2: engine.precision=fp8 is not offered with it; use bf16",
    ),
    (
        (("validation.every_steps", 1), ("validation.prompts", "p.txt"), ("model.max_positions", 65)),
        {},
        "parallel.tp=2: validation.prompts pads texts to a multiple of it; use model.max_positions=66",
    ),
    (
        (),
        {"kind": EngineKind.hsdp, "dp_shard": 3, "world_size": 8},
        "engine.dp_shard=3 does not divide the world size 8 / parallel.tp=2",
    ),
]


@pytest.mark.parametrize(("changes", "how", "sentence"), REFUSED, ids=[sentence[:60] for *_, sentence in REFUSED])
def test_what_cannot_be_shared_is_one_sentence(changes, how, sentence):
    if ("model.max_positions", 65) in changes:
        changes = (*changes, ("data.sequence_length", 64))
    assert problems(*changes, **how) == [sentence]


def test_a_group_that_reaches_over_nodes_is_a_warning():
    assert layout_warnings(run_config(), 2) == []
    assert layout_warnings(run_config(tp=4), 2)[0].startswith("parallel.tp=4 reaches over nodes of 2 ranks")


def test_ranks_that_share_matrices_load_the_same_samples():
    config = run_config(kind=EngineKind.hsdp)
    found = layout_of(config.engine, config.parallel, world_size=16, local_world_size=8)
    assert found == Layout(dp_replicate=2, dp_shard=4, tp=2)
    assert (found.dp_size, found.copies, found.world_size) == (8, 2, 16)
    assert list(found.axes) == ["dp_replicate", "dp_shard", "tp"], "neighbours share matrices"
    fsdp = dataclasses.replace(config.engine, kind=EngineKind.fsdp)
    assert layout_of(fsdp, config.parallel, world_size=8, local_world_size=8) == Layout(dp_shard=4, tp=2)


def test_a_micro_batch_is_fitted_to_the_ranks_that_load_different_samples():
    config = resolve(dataclasses.replace(TrainConfig(), parallel=ParallelConfig(tp=4)))
    config.train.global_batch_size = 6
    assert fit_micro_batch(config, 4).train.micro_batch_size == 3
    assert fit_micro_batch(dataclasses.replace(config, parallel=ParallelConfig()), 4).train.micro_batch_size == 2
