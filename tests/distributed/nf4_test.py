"""Adapters beside weights in 4 bits: the numbers of adapters beside the same weights in fp32, on any ranks."""

import dataclasses

import pytest
import torch

from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.store import find_checkpoints, read_run_state
from bigtrain.config import AdapterConfig, Load, Precision, RunConfig
from bigtrain.config.check import check
from bigtrain.errors import CheckpointError
from bigtrain.log import quiet_torchao
from bigtrain.models import build_model
from bigtrain.models.adapters import is_of_adapter, plain_name
from bigtrain.models.nf4 import NF4Linear, dequantise, quantise
from bigtrain.run import directory, launching
from bigtrain.run.export import export
from bigtrain.run.frozen import WeightReader, starting_values
from bigtrain.testing.ranks import run_ranks
from tests.distributed.adapters_test import LLAMA_SHAPE, losses
from tests.distributed.ranks import small_config

pytest.importorskip("peft")


def filled(model, values):
    """Build a model on the CPU with these initial values."""
    network = build_model(model)
    for name, parameter in network.named_parameters():
        whole = torch.empty(parameter.numel())
        values[plain_name(name)].fill(0, whole)
        parameter.data.copy_(whole.view(parameter.shape))
    return network


def test_a_layer_in_4_bits_is_the_layer_of_the_weights_that_they_stand_for():
    adapter = AdapterConfig(rank=4, targets=["*.qkv"], also_train=["*.down.weight"])
    plain = small_config(model={"adapter": adapter}).model
    model = dataclasses.replace(plain, adapter=dataclasses.replace(adapter, nf4=True))
    values = starting_values(model, 0)
    network = filled(model, values)
    in_4_bits = {plain_name(name) for name, module in network.named_modules() if isinstance(module, NF4Linear)}
    assert {name.rpartition(".")[2] for name in in_4_bits} == {"base_layer", "out", "up"}, "all but what is trained"
    base, rounded = filled(plain, values), filled(plain, values)
    for name, parameter in rounded.named_parameters():
        if any(plain_name(name) == f"{plain_name(layer + '.')}weight" for layer in in_4_bits):
            parameter.data = dequantise(*quantise(parameter.data), parameter.shape[1])
    tokens, targets = torch.arange(32).view(2, 16), torch.arange(1, 33).view(2, 16)
    found = {}
    for key, each in (("nf4", network), ("rounded", rounded), ("base", base)):
        loss = each(tokens, targets)
        loss.backward()
        gradient = each.get_parameter("blocks.0.attention.qkv.lora_B.default.weight").grad
        found[key] = loss.detach(), gradient
    for one, other in zip(found["nf4"], found["rounded"], strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    assert (found["nf4"][0] - found["base"][0]).abs() > 1e-4, "4 bits round"


def test_they_round_as_torchao_does():
    quiet_torchao()
    torchao = pytest.importorskip("torchao.quantization")
    weights = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    theirs = torchao.NF4Tensor.from_tensor(weights, 64, 256).get_original_weight()
    ours = dequantise(*quantise(weights), 512)
    error, their_error = ((found - weights).square().mean().sqrt() for found in (ours, theirs))
    assert error <= 1.001 * their_error
    assert sum(part.nbytes for part in quantise(weights)) * 8 == 4.25 * weights.numel()
    assert torch.equal(dequantise(*quantise(weights[3:5]), 512), ours[3:5]), "a row depends on no other"
    assert not dequantise(*quantise(torch.zeros(1, 24)), 24).any()


def run_all(*configs):
    for config in configs:
        launching.run(config)


def test_a_run_continues_elsewhere_and_is_exported(tmp_path, monkeypatch):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = small_config("ddp", model=LLAMA_SHAPE)
    base = dataclasses.replace(base, run=RunConfig(name="base", root=str(tmp_path)))

    def of_base(root, engine, nf4=True, **run):
        config = small_config(engine, model=LLAMA_SHAPE | {"adapter": AdapterConfig(rank=4, nf4=nf4)})
        where = {"every_steps": 3, "resume": str(tmp_path / "base"), "load": Load.weights}
        config.checkpoint = dataclasses.replace(config.checkpoint, **where)
        return dataclasses.replace(config, run=RunConfig(name="run", root=str(root), **run))

    run_ranks(run_all, 1, base, of_base(tmp_path / "whole", "ddp"), timeout_seconds=200)
    for engine in ("ddp", "fsdp"):
        run_ranks(launching.run, 2, of_base(tmp_path, engine, stop_after_steps=3), timeout_seconds=200)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole/run"), rel=1e-6)

    newest = find_checkpoints(tmp_path / "run")[-1]
    assert all(is_of_adapter(tensor.key) for tensor in read_manifest(newest).tensors), "the base is where it was"
    trained, before = WeightReader(newest), WeightReader(find_checkpoints(tmp_path / "base")[-1])
    weight = before.read("model.blocks.0.attention.qkv.weight")
    kept = trained.read("model.blocks.0.attention.qkv.weight")
    assert torch.equal(kept, dequantise(*quantise(weight), weight.shape[1])) and not torch.equal(kept, weight)
    assert torch.equal(trained.read("model.embed_tokens.weight"), before.read("model.embed_tokens.weight"))

    options = {"precision": Precision.fp32, "max_shard_bytes": 10**9}
    export(tmp_path / "run", tmp_path / "hf_merged", **options)
    export(tmp_path / "run", tmp_path / "hf_adapter", merge=False, **options)
    export(tmp_path / "base", tmp_path / "hf_base", **options)
    opened, merged = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("hf_base", "hf_merged")
    )
    for name, parameter in opened.named_parameters():
        if "layers." in name and parameter.ndim == 2:
            parameter.data = dequantise(*quantise(parameter.data), parameter.shape[1])
    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        beside = peft.PeftModel.from_pretrained(opened, str(tmp_path / "hf_adapter")).eval()(tokens).logits
        assert (merged(tokens).logits - beside).abs().max() <= 1e-5

    with pytest.raises(CheckpointError, match=r"model\.adapter\.nf4: True in the checkpoint, False now$"):
        directory.find_resume(of_base(tmp_path, "ddp", nf4=False))
    state = read_run_state(newest)
    del state.config["model"]["adapter"]["nf4"]
    monkeypatch.setattr(directory, "read_run_state", lambda _: state)
    assert directory.find_resume(of_base(tmp_path, "ddp", nf4=False)) == newest, (
        "as it was before there was the setting"
    )


def test_engines_that_take_none_say_so():
    config = small_config("zero3", model={"adapter": AdapterConfig(nf4=True)})
    (problem,) = check(config, world_size=1, local_world_size=1)
    assert problem == "model.adapter.nf4: engine=zero3 takes no weights in 4 bits; use engine=ddp, fsdp or hsdp"
