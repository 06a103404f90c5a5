"""Operations of training: against published counts, and against torch's own counter of what is executed."""

from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigtrain.config import Activation, ModelConfig, Norm, Positions, TrainConfig
from bigtrain.config.check import resolve
from bigtrain.config.convert import from_dict
from bigtrain.models import build_model
from bigtrain.models.flops import causal_pairs, flops_per_token, matrix_weights
from bigtrain.models.sizes import model_sizes, native_shape

PRESETS = Path(__file__).parents[2] / "configs/model"


def preset(name: str) -> ModelConfig:
    return resolved(from_dict(ModelConfig, yaml.safe_load((PRESETS / f"{name}.yaml").read_text())))


def resolved(model: ModelConfig) -> ModelConfig:
    return resolve(TrainConfig(model=model)).model


def test_gpt3_175b_is_what_its_paper_says():
    # Brown et al. 2020, table D.1: 3.14e23 operations for 300e9 tokens, attention left out.
    assert 6 * matrix_weights(preset("gpt3_175b")) * 300e9 == pytest.approx(3.14e23, rel=0.01)


def test_gpt3_175b_with_attention_is_what_megatron_counts():
    # Narayanan et al. 2021, eq. 3, without the recomputed forward pass: 72 l h^2 (1 + s / 6h + V / 12lh) per token.
    num_layers, hidden, length, vocab = 96, 12288, 2048, 50257
    published = 72 * num_layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (12 * num_layers * hidden))
    assert flops_per_token(preset("gpt3_175b"), length).full_attention == pytest.approx(published, rel=0.01)


def test_gpt2_is_what_nanogpt_counts():
    # transformer_sizing.ipynb of karpathy/nanoGPT: 291,648,307,200 for the forward pass of 1,024 tokens.
    per_token = flops_per_token(preset("gpt2_124m"), 1024).full_attention
    assert per_token * 1024 == pytest.approx(3 * 291_648_307_200, rel=0.01)


@pytest.mark.parametrize(
    ("name", "tflops_per_second", "tokens_per_second"), [("llama3_8b", 725, 14_079), ("llama3_70b", 727, 1_619)]
)
def test_llama3_is_what_megatron_bridge_publishes(name: str, tflops_per_second: float, tokens_per_second: float):
    # NVIDIA Megatron-Bridge, performance summary 25.09: rates per H100 at 8,192 tokens, which count causal attention.
    published = tflops_per_second * 1e12 / tokens_per_second
    flops = flops_per_token(preset(name), 8192)
    assert flops.causal == pytest.approx(published, rel=0.01)
    assert flops.full_attention > 1.05 * published, "the other convention is another number"


SMALL = {
    "gpt": ModelConfig(vocab_size=211, num_layers=3, hidden_dim=48, num_heads=4, max_positions=40),
    "llama": ModelConfig(
        vocab_size=211,
        num_layers=2,
        hidden_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        ffn_dim=88,
        max_positions=40,
        positions=Positions.rope,
        norm=Norm.rmsnorm,
        activation=Activation.swiglu,
        bias=False,
        tie_embeddings=False,
    ),
}


def executed_flops(model: ModelConfig, num_sequences: int, length: int) -> int:
    """Return what torch counts of a real forward and backward pass; its attention computes every pair."""
    module = build_model(model)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(model.vocab_size, (num_sequences, length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(tokens, tokens).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SMALL)
def test_small_models_execute_what_is_counted(name: str):
    model = resolved(SMALL[name])
    assert 2 * 40 * flops_per_token(model, 40).full_attention == pytest.approx(executed_flops(model, 2, 40), rel=0.01)


def test_another_shape_is_noticed():
    executed = executed_flops(resolved(SMALL["gpt"]), 2, 40)
    model = resolved(SMALL["gpt"])
    model.ffn_dim += 8
    assert 2 * 40 * flops_per_token(model, 40).full_attention != pytest.approx(executed, rel=0.01)


def test_pairs():
    assert causal_pairs(7) == torch.ones(7, 7).tril().sum()


def test_a_transformers_model_has_the_shape_that_it_describes():
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    gpt2 = GPT2Config(vocab_size=101, n_positions=32, n_embd=24, n_layer=2, n_head=3)
    llama = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    for config in (gpt2, llama):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        assert model_sizes(native_shape(config)).total == pytest.approx(num_parameters, rel=0.02)
