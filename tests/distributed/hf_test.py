"""Models of the Llama family, our own and transformers', train under every kind of engine with the same numbers."""

import dataclasses
import math

import pytest
import torch

from bigtrain.config import Activation, EngineKind, ModelConfig, ModelKind, Norm, Positions
from bigtrain.config.check import resolve
from bigtrain.models import build_initial_values
from bigtrain.models.hf.build import with_hf_shape
from bigtrain.testing.parity import Case, compare, compute, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.ranks import small_config


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A directory with the config.json of a small Llama with tied embeddings and rotary buffers."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    ).save_pretrained(directory)
    return directory


LLAMA = {
    "positions": Positions.rope,
    "norm": Norm.rmsnorm,
    "activation": Activation.swiglu,
    "bias": False,
    "tie_embeddings": False,
    "num_heads": 4,
    "num_kv_heads": 2,
}


@pytest.mark.parametrize("kind", list(ModelKind), ids=lambda kind: kind.name)
def test_engines_agree_on_a_llama(kind, tiny_llama):
    config = small_config(model=LLAMA)
    if kind is ModelKind.hf:
        model = with_hf_shape(ModelConfig(kind=ModelKind.hf, name=str(tiny_llama)))
        assert (model.num_layers, model.max_positions, model.num_kv_heads) == (2, 16, 2)
        config = resolve(dataclasses.replace(small_config(), model=model))
    reference = compute(config, Case(EngineKind.ddp, 1, 8))
    assert reference.losses[-1] < reference.losses[0]
    for engine in (EngineKind.fsdp, EngineKind.zero3):
        difference = compare(compute(config, Case(engine, 2, 2)), reference)
        print(engine, difference)
        assert max(difference.loss, difference.grad_norm) <= 1e-5
        assert difference.parameters <= 1e-4


def peculiar_models():
    """Yield models whose own initialisation or parameters are not those of a plain decoder."""
    from transformers import DbrxConfig, Gemma3Config, LlamaConfig, MambaConfig, RoFormerConfig

    small = dict(vocab_size=97, hidden_size=24, num_hidden_layers=2)
    heads = dict(small, num_attention_heads=4, intermediate_size=40, max_position_embeddings=16)
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    yield "padding row", LlamaConfig(**heads, pad_token_id=96)
    yield "scan", MambaConfig(**small, state_size=4)
    yield "tower", Gemma3Config(text_config=dict(heads, head_dim=6), vision_config=vision, mm_tokens_per_image=4)
    experts = dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=1)  # with few tokens, not all by each rank
    attention = dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4)
    sizes = dict(vocab_size=97, d_model=24, n_heads=4, n_layers=2, max_seq_len=16)
    yield "experts", DbrxConfig(**sizes, attn_config=attention, ffn_config=experts)
    yield "sinusoids", RoFormerConfig(**heads, embedding_size=24, is_decoder=True)


def _traces(configs):
    return [trace(config) for config in configs]


@pytest.mark.parametrize(
    "engines", [["ddp", "zero3"], pytest.param(["ddp", "fsdp", "zero1", "zero2"], marks=pytest.mark.slow)], ids=",".join
)
def test_engines_agree_on_peculiar_models(engines, tmp_path):
    """Padding rows, parameters that no loss reaches and frozen tables are the same under every engine."""
    runs = {}
    for name, model in peculiar_models():
        model.save_pretrained(tmp_path / name)
        shape = with_hf_shape(ModelConfig(kind=ModelKind.hf, name=str(tmp_path / name)))
        runs[name] = resolve(dataclasses.replace(small_config(), model=shape))
    found = {}
    for engine in (EngineKind[name] for name in engines):
        configs = [configure(config, Case(engine, 2, 2)) for config in runs.values()]
        found[engine] = dict(zip(runs, run_ranks(_traces, 2, configs, timeout_seconds=200)[0], strict=True))
    for name, config in runs.items():
        reference = found[EngineKind.ddp][name]
        assert reference.losses[-1] < reference.losses[0]
        for engine, trajectories in found.items():
            difference = compare(trajectories[name], reference)
            assert max(difference.loss, difference.grad_norm) <= 1e-5, (name, engine)
            assert difference.parameters <= 1e-4, (name, engine)
        values = build_initial_values(config.model, config.train.seed)
        frozen = {"tower": "vision_tower", "sinusoids": "embed_positions"}.get(name)
        for engine, trajectories in found.items():
            kept = [n for n, p in trajectories[name].parameters.items() if (p == _whole(values[n], p.shape)).all()]
            assert kept == [n for n in values if frozen and (frozen in n or "multi_modal" in n)], (name, engine)


def _whole(value, shape):
    flat = torch.empty(math.prod(shape))
    value.fill(0, flat)
    return flat.view(shape).numpy()
