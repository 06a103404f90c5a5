"""Low-rank adapters: equal under every engine, alone in checkpoints, merged or written for peft."""

import dataclasses
import json

import pytest
import torch

import bigtrain
from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.store import find_checkpoints
from bigtrain.config import (
    Activation,
    AdapterConfig,
    AdapterKind,
    EngineKind,
    Load,
    Norm,
    Positions,
    Precision,
    RunConfig,
)
from bigtrain.config.check import check
from bigtrain.errors import ConfigError
from bigtrain.models.adapters import is_of_adapter
from bigtrain.plan.estimate import measure_model
from bigtrain.run import launching
from bigtrain.run.export import export
from bigtrain.run.frozen import WeightReader, starting_values
from bigtrain.testing.parity import Case, compare, compute, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.ranks import small_config

pytest.importorskip("peft")

LLAMA_SHAPE = {
    "positions": Positions.rope,
    "norm": Norm.rmsnorm,
    "activation": Activation.swiglu,
    "bias": False,
    "num_kv_heads": 1,
}
ENGINES = {AdapterKind.lora: ("ddp", "fsdp", "zero2", "zero3"), AdapterKind.dora: ("fsdp", "zero1")}


def adapted(engine="ddp", kind=AdapterKind.lora, **fields):
    return small_config(engine, model={"adapter": AdapterConfig(kind=kind, rank=4, alpha=8, **fields)})


def trace_all(config, engines):
    return [trace(configure(config, Case(EngineKind[engine], 2, 2))) for engine in engines]


@pytest.mark.parametrize("kind", AdapterKind)
def test_engines_agree_and_nothing_else_changes(kind):
    config = adapted(kind=kind, targets=["*.qkv", "*.down"], also_train=["final_norm.*"])
    reference = compute(config, Case(EngineKind.ddp, 1, 4))
    values = starting_values(config.model, config.train.seed)
    found = run_ranks(trace_all, 2, config, ENGINES[kind], timeout_seconds=280)[0]
    for engine, trajectory in zip(ENGINES[kind], found, strict=True):
        difference = compare(trajectory, reference)
        assert max(difference.loss, difference.grad_norm) <= 1e-6, (engine, difference)
        for name, weight in trajectory.parameters.items():
            initial = torch.empty(weight.size)
            values[name].fill(0, initial)
            is_trained = is_of_adapter(name) or name.startswith("final_norm.")
            assert torch.from_numpy(weight).flatten().equal(initial) != is_trained, (engine, name)
    adapters = [name for name in reference.parameters if is_of_adapter(name)]
    assert {name.partition(".lora_")[0] for name in adapters} == {
        f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attention.qkv", "feed_forward.down")
    }


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_adapters_of_a_run_continue_elsewhere_and_are_exported_both_ways(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = small_config("ddp", model=LLAMA_SHAPE)
    base = dataclasses.replace(base, run=RunConfig(name="base", root=str(tmp_path)))
    run_ranks(launching.run, 1, base, timeout_seconds=120)

    def of_base(root, engine, **run):
        config = small_config(engine, model=LLAMA_SHAPE | {"adapter": AdapterConfig(rank=4)})
        where = {"every_steps": 3, "resume": str(tmp_path / "base"), "load": Load.weights}
        config.checkpoint = dataclasses.replace(config.checkpoint, **where)
        return dataclasses.replace(config, run=RunConfig(name="run", root=str(root), **run))

    run_ranks(launching.run, 1, of_base(tmp_path / "whole", "ddp"), timeout_seconds=120)
    for engine, ranks in (("ddp", 1), ("zero3", 2), ("fsdp", 2)):
        run_ranks(launching.run, ranks, of_base(tmp_path, engine, stop_after_steps=2), timeout_seconds=200)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole/run"), rel=1e-6)

    newest = find_checkpoints(tmp_path / "run")[-1]
    tensors = read_manifest(newest).tensors
    assert all(is_of_adapter(tensor.key) for tensor in tensors), "the base is in its own checkpoint"
    trained, before = WeightReader(newest), WeightReader(find_checkpoints(tmp_path / "base")[-1])
    assert all(torch.equal(trained.read(key), before.read(key)) for key in before.keys if key.startswith("model."))

    options = {"precision": Precision.fp32, "max_shard_bytes": 10**9}
    export(tmp_path / "base", tmp_path / "hf_base", **options)
    export(tmp_path / "run", tmp_path / "hf_merged", **options)
    export(tmp_path / "run", tmp_path / "hf_adapter", merge=False, **options)
    opened, merged = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("hf_base", "hf_merged")
    )
    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        without = opened(tokens).logits
        beside = peft.PeftModel.from_pretrained(opened, str(tmp_path / "hf_adapter")).eval()(tokens).logits
        assert (merged(tokens).logits - beside).abs().max() <= 1e-5
        assert (without - beside).abs().max() > 1e-3, "the adapters do something"


def apart(base, merged, adapter):
    """Return by how much logits of a merged export differ from those of peft, and from those of the base."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    of_base, of_merged = (transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (base, merged))
    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        before, after = of_base(tokens).logits, of_merged(tokens).logits
        beside = peft.PeftModel.from_pretrained(of_base, str(adapter)).eval()(tokens).logits
    return float((after - beside).abs().max()), float((after - before).abs().max())


def test_what_is_trained_beside_adapters_is_exported_whole_or_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 257, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads)).save_pretrained(tmp_path / "base")
    options = {"precision": Precision.fp32, "max_shard_bytes": 10**9}

    def train(name, *settings):
        return bigtrain.train(
            *("+model=hf", f"model.name={tmp_path}/base", "model.pretrained=true", "+adapter=lora", "data=synthetic"),
            *("data.tokenizer=bytes", "data.sequence_length=16", f"data.root={tmp_path}/data", f"run.root={tmp_path}"),
            *("train.steps=2", "train.global_batch_size=4", "optimizer.lr=1e-2", "scheduler.warmup_steps=0"),
            *(f"run.name={name}", *settings),
        ).directory

    run = train("embeddings", "model.adapter.also_train=['*embed_tokens*']")
    export(run, tmp_path / "merged", **options)
    export(run, tmp_path / "adapter", merge=False, **options)
    difference, change = apart(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    assert difference <= 1e-5 < 1e-2 < change, "the head is the embedding, in peft too"

    pairs = ["task=preference", "data=jsonl", "data.content=preference", "data.path=pairs.jsonl"]
    begin = [f"checkpoint.resume={train('plain')}", "checkpoint.load=weights"]
    with pytest.raises(ConfigError, match=r"has adapters, which task\.loss=dpo would compare without"):
        train("pairs", *pairs, *begin)
    with pytest.raises(ConfigError, match=r"also_train: task\.loss=dpo compares with these as they were"):
        train("pairs", *pairs, "model.adapter.also_train=['*norm*']")

    run = train("both", "model.adapter.also_train=['*q_proj.weight']")
    with pytest.raises(ConfigError, match=r"also_train has changed model\.layers\.0\.self_attn\.q_proj itself"):
        export(run, tmp_path / "parted", merge=False, **options)
    with pytest.raises(ConfigError, match=r"targets: lm_head shares its weights with the token embedding"):
        train("head", "model.adapter.targets=[lm_head]")
    with pytest.raises(ConfigError, match=r"model\.adapter\.rank=0: must be at least 1"):
        train("none", "model.adapter.rank=0")


def test_what_does_not_go_together_is_said_and_memory_counts_what_is_trained():
    config = adapted("zero3", kind=AdapterKind.dora)
    problems = check(config, world_size=1, local_world_size=1)
    assert any("kind=dora" in problem and "engine=fsdp" in problem for problem in problems)
    with pytest.raises(Exception, match=r"model\.adapter\.targets: 'no_such' matches no linear layer of this model"):
        starting_values(adapted(targets=["no_such"]).model, 0)
    sizes, _ = measure_model(adapted().model)
    per_block = 4 * ((24 + 72) + (24 + 24) + (24 + 96) + (96 + 24))
    assert sizes.trained == 2 * per_block
