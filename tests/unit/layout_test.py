"""Which layouts are refused, with what to do instead, before any process group; and what counts the data ranks."""

import dataclasses

import pytest

from bigtrain.config import (
    Activation,
    AdapterConfig,
    CpMethod,
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
from bigtrain.config.check import check, fit_micro_batch, ignored_settings, resolve
from bigtrain.config.layout import Layout, layout_of, layout_warnings
from bigtrain.plan.report import with_settings

MODEL = {"name": "small", "vocab_size": 64, "num_layers": 1, "hidden_dim": 32, "num_heads": 4, "num_kv_heads": 2}


def run_config(*changes, tp=2, cp=1, **engine):
    model = ModelConfig(**MODEL, max_positions=64, positions="rope")
    data = DataConfig(source=DataSource.synthetic)
    config = TrainConfig(model=model, data=data, engine=EngineConfig(**engine), parallel=ParallelConfig(tp=tp, cp=cp))
    return fit_micro_batch(resolve(with_settings(config, changes)), 2)


def problems(*changes, world_size=2, tp=2, cp=1, **engine):
    return check(run_config(*changes, tp=tp, cp=cp, **engine), world_size=world_size, local_world_size=world_size)


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
        {"kind": EngineKind.zero1},
        "parallel.tp=2: engine=zero1 is not offered with model.moe; use engine=fsdp",
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


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("tp", [1, 2])
def test_sequences_can_be_shared_too(kind, tp):
    assert problems(kind=EngineKind[kind], tp=tp, cp=2, world_size=4) == []
    assert problems(("parallel.cp_method", CpMethod.ulysses), tp=tp, cp=2, world_size=4) == []


CP = {"tp": 1, "cp": 2}
SEQUENCES_REFUSED = [
    ((), CP | {"world_size": 3}, "parallel.cp=2 does not divide the world size 3; use 2 or 4 ranks"),
    ((), CP | {"tp": 2}, "parallel.tp=2 x parallel.cp=2 does not divide the world size 2; use 4 ranks"),
    (
        (("data.sequence_length", 62),),
        CP,
        "parallel.cp=2: data.sequence_length=62 does not divide by 4, two runs of tokens for each rank; "
        "use data.sequence_length=64",
    ),
    *(
        (
            (),
            CP | {"kind": EngineKind[kind]},
            f"parallel.cp=2: not offered by engine={kind}; use engine=ddp, fsdp or hsdp",
        )
        for kind in ("zero1", "zero2", "zero3", "accelerate")
    ),
    (
        (("model.kind", ModelKind.hf), ("model.name", "gpt2")),
        CP,
        "parallel.cp=2: only bigtrain's own models share sequences; leave it out with +model=hf",
    ),
    (
        (("parallel.cp_method", CpMethod.ulysses), ("data.sequence_length", 48)),
        {"tp": 1, "cp": 3, "world_size": 3},
        "parallel.cp=3: parallel.cp_method=ulysses cannot deal out 4 heads and 2 of keys and values; "
        "use parallel.cp_method=gather",
    ),
    (
        (("parallel.cp_method", CpMethod.ulysses),),
        {"cp": 4, "world_size": 8},
        "parallel.cp=4: parallel.cp_method=ulysses cannot deal out 2 heads and 1 of keys and values of a rank; "
        "use parallel.cp_method=gather",
    ),
    (
        (("task.kind", "distillation"), ("data.scores", "scores")),
        CP,
        "parallel.cp=2: task=distillation reads whole sequences; use task=causal_lm",
    ),
    (
        (("model.moe", MoeConfig(num_experts=4, expert_dim=8)), ("model.activation", Activation.swiglu), NO_BIAS),
        CP,
        "parallel.cp=2: model.moe is not offered with it; leave one of them out",
    ),
    ((ADAPTER,), CP, "parallel.cp=2: model.adapter is not offered with it; leave one of them out"),
    (
        (),
        CP | {"precision": Precision.fp8, "compile": True},
        "parallel.cp=2: engine.precision=fp8 is not offered with it; use bf16",
    ),
    (
        (("validation.every_steps", 1), ("validation.prompts", "p.txt"), ("model.max_positions", 66)),
        CP,
        "parallel.cp=2: validation.prompts pads texts to a multiple of 4; use model.max_positions=68",
    ),
    (
        (),
        {"cp": 2, "kind": EngineKind.hsdp, "dp_shard": 3, "world_size": 16},
        "engine.dp_shard=3 does not divide the world size 16 / parallel.tp=2 / parallel.cp=2",
    ),
]


@pytest.mark.parametrize(
    ("changes", "how", "sentence"), SEQUENCES_REFUSED, ids=[sentence[:60] for *_, sentence in SEQUENCES_REFUSED]
)
def test_sequences_that_cannot_be_shared_are_one_sentence(changes, how, sentence):
    if ("model.max_positions", 66) in changes:
        changes = (*changes, ("data.sequence_length", 64))
    assert problems(*changes, **how) == [sentence]


def test_a_method_without_ranks_that_share_sequences_is_named():
    ulysses = run_config(("parallel.cp_method", CpMethod.ulysses))
    assert [said for said in ignored_settings(ulysses) if "cp_method" in said]


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


def test_ranks_that_share_sequences_share_the_state_or_have_copies():
    config = run_config(kind=EngineKind.hsdp, cp=2)
    found = layout_of(config.engine, config.parallel, world_size=16, local_world_size=8)
    assert found == Layout(dp_replicate=2, dp_shard=4, tp=2, cp=2), "the default shard group is a node"
    assert (found.dp_size, found.copies, found.world_size) == (4, 4, 16)
    for kind, expected in (("fsdp", Layout(dp_shard=8, tp=2, cp=2)), ("ddp", Layout(dp_replicate=8, tp=2, cp=2))):
        engine = dataclasses.replace(config.engine, kind=EngineKind[kind])
        found = layout_of(engine, config.parallel, world_size=16, local_world_size=8)
        assert (found, found.dp_size) == (expected, 4)


def test_a_stage_shares_its_state_within_a_node():
    hsdp = EngineConfig(kind=EngineKind.hsdp)
    for pp, world_size, shards in ((2, 16, 8), (3, 48, 8), (4, 16, 4)):
        found = layout_of(hsdp, ParallelConfig(pp=pp), world_size=world_size, local_world_size=8)
        assert found == Layout(pp=pp, dp_replicate=world_size // pp // shards, dp_shard=shards)


def test_experts_are_shared_out_among_the_ranks_that_share_the_state():
    model = ModelConfig(name="mixture", moe=MoeConfig(num_experts=8, expert_dim=64))
    config = dataclasses.replace(TrainConfig(), model=model, parallel=ParallelConfig(ep=4))
    config = resolve(dataclasses.replace(config, engine=EngineConfig(kind=EngineKind.hsdp)))
    sentence = "parallel.ep=4 does not divide engine.dp_shard=2; use engine.dp_shard=4"
    assert sentence in check(config, world_size=4, local_world_size=2)
    assert sentence not in check(config, world_size=8, local_world_size=4)


def test_a_pipeline_is_given_a_micro_batch_for_each_rank():
    config = resolve(dataclasses.replace(TrainConfig(), parallel=ParallelConfig(pp=4)))
    for batch, size in ((8, 2), (5, 1), (24, 3), (64, 4), (2, 1)):
        config.train.global_batch_size = batch
        assert fit_micro_batch(config, 4).train.micro_batch_size == size


def test_a_micro_batch_is_fitted_to_the_ranks_that_load_different_samples():
    config = resolve(dataclasses.replace(TrainConfig(), parallel=ParallelConfig(tp=4)))
    config.train.global_batch_size = 6
    assert fit_micro_batch(config, 4).train.micro_batch_size == 3
    assert fit_micro_batch(dataclasses.replace(config, parallel=ParallelConfig()), 4).train.micro_batch_size == 2
