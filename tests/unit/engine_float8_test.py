"""fp8 is for large products on hardware that has it, and refused with a reason elsewhere."""

import dataclasses
import sys

import pytest
import torch

from bigtrain.config import DataConfig, EngineConfig, EngineKind, ModelConfig, Precision, TrainConfig
from bigtrain.config.check import check, resolve
from bigtrain.engine.build import build_engine
from bigtrain.engine.float8 import is_faster, use_float8
from bigtrain.errors import ConfigError
from bigtrain.models import build_model
from bigtrain.processes import RankInfo

WIDE = ModelConfig(num_layers=1, hidden_dim=2048, num_heads=16, vocab_size=50257)
FP8 = EngineConfig(precision=Precision.fp8, compile=True)


def problems(**changes):
    config = TrainConfig(model=WIDE, engine=dataclasses.replace(FP8, **changes))
    return check(resolve(config), world_size=1, local_world_size=1)


def test_layers_that_are_too_small_to_gain_stay_in_bf16():
    # torchao's own two examples, and the blocks of GPT-2 124M and GPT-3 1.3B on 16,384 tokens
    assert not is_faster(1024, 2048, 1024) and is_faster(4096, 8192, 16384)
    assert not any(is_faster(16384, *shape) for shape in [(768, 2304), (768, 768), (768, 3072), (3072, 768)])
    assert all(is_faster(16384, *shape) for shape in [(2048, 6144), (2048, 8192), (8192, 2048)])
    assert is_faster(16384, 8192, 8192) and not is_faster(16384, 8192, 8200) and not is_faster(16388, 8192, 8192)


def test_only_large_layers_of_the_blocks_are_converted():
    pytest.importorskip("torchao")
    from torchao.float8.float8_linear import Float8Linear

    config = resolve(TrainConfig(model=WIDE)).model
    with torch.device("meta"):
        model, plain = build_model(config), build_model(config)
        use_float8(model, num_tokens=16384)
    converted = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert converted == [f"blocks.0.{name}" for name in ("attention.qkv", "feed_forward.up", "feed_forward.down")]
    assert model.blocks[0].attention.qkv.fused_rows == plain.blocks[0].attention.qkv.fused_rows == (2048,) * 3
    shapes = {name: (parameter.shape, type(parameter)) for name, parameter in plain.named_parameters()}
    assert {name: (parameter.shape, type(parameter)) for name, parameter in model.named_parameters()} == shapes


def test_the_blocks_of_a_network_that_calls_them_otherwise_are_converted():
    pytest.importorskip("torchao")
    from torchao.float8.float8_linear import Float8Linear

    with torch.device("meta"):
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4096, 4096)) for _ in range(2))
        model.head = torch.nn.Linear(4096, 4096)
        use_float8(model, num_tokens=16384)
    assert isinstance(model.layers[1][0], Float8Linear) and not isinstance(model.head, Float8Linear)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"compile": False}, "slower than bf16 without engine.compile=true"),
        ({"kind": EngineKind.zero3}, "is not offered by engine=zero3; use ddp, fsdp or hsdp"),
    ],
)
def test_settings_that_do_not_go_with_it_are_named(changes, found):
    assert [found in problem for problem in problems(**changes)] == ([] if found is None else [True])


def test_a_micro_batch_has_a_multiple_of_16_tokens():
    config = TrainConfig(model=WIDE, data=DataConfig(sequence_length=100), engine=FP8)
    config.train.micro_batch_size = 3
    found = check(resolve(config), world_size=1, local_world_size=1)
    assert any("multiple of 16 tokens" in problem and "300" in problem for problem in found)


@pytest.mark.parametrize("precision", [Precision.fp8, Precision.tf32])
def test_other_hardware_is_named_with_the_way_out(precision):
    config = resolve(TrainConfig(model=WIDE, engine=EngineConfig(precision=precision)))
    with pytest.raises(ConfigError, match=f"capability 8.* a cpu; use engine.precision={precision.base.name}"):
        build_engine(config, lambda: None, info=RankInfo(0, 1, 0, 1), device=torch.device("cpu"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"needs the package torchao: pip install 'bigtrain\[fp8\]'"):
        use_float8(torch.nn.Module(), num_tokens=16)
