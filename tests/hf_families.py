"""Small causal models of many families of transformers, with settings that are not the default ones."""

from typing import Any

import torch
import transformers

_SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_USUAL = _SIZES | {"intermediate_size": 48, "max_position_embeddings": 64}
_GROUPED = _USUAL | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 16}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
_MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def _rope(kind: str = "default", **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **settings}}


_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED | _rope("llama3", **_LLAMA3),
    "mistral": _GROUPED | _rope() | {"sliding_window": 8},
    "qwen2": _GROUPED | _rope("yarn", **_YARN),
    "qwen2_moe": _GROUPED | _rope() | _MIXED | {"shared_expert_intermediate_size": 16},
    "qwen3": _WIDE | _rope(),
    "qwen3_moe": _WIDE | _rope() | _MIXED,
    "mixtral": _GROUPED | _rope() | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": _USUAL | _rope(partial_rotary_factor=0.5),
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_oss": _WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": _WIDE | _rope() | {"sliding_window": 8},
    "gemma3_text": _WIDE | {"sliding_window": 8, "rope_parameters": _BY_LAYER},
    "olmo2": _GROUPED | _rope(),
    "olmoe": _GROUPED | _rope() | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _USUAL | _LATENT | _ROUTED | _rope() | {"num_key_value_heads": 4, "first_k_dense_replace": 1},
    "phi": _GROUPED | _rope(partial_rotary_factor=0.5),
    "phi3": _GROUPED | _rope() | {"pad_token_id": 0},
    "phimoe": _GROUPED | _rope() | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "falcon": _SIZES | _rope() | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "stablelm": _GROUPED | _rope(partial_rotary_factor=0.5),
    "cohere": _GROUPED | _rope(),
    "granitemoe": _GROUPED | _rope() | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": _WIDE | _ROUTED | _rope() | {"first_k_dense_replace": 1},
    "starcoder2": _GROUPED | _rope(),
    "mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "nemotron": _GROUPED | _rope(),
    "hrm_text": _GROUPED | _rope(),
}
FAMILIES = {
    family: {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, **settings, "model_type": family}
    for family, settings in FAMILIES.items()
}
"""Settings of a configuration, by ``model_type``."""


@torch.no_grad()
def build_family(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """Return a model of a family in which nothing is right by being zero or one, stored buffers included."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for tensor in model.state_dict().values():
        tensor.add_(0.1 * torch.randn_like(tensor)) if tensor.ndim < 2 else tensor.mul_(3)
    return model
