"""A small configuration of every causal language model that transformers knows: some ten thousand parameters each.

Most are shrunk by the names of their settings (:data:`SMALL`), which transformers' own configurations mostly share;
:data:`FAMILIES` has what a family needs besides.
"""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING

SMALL: dict[str, Any] = {
    # widths
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim"), 32),
    **dict.fromkeys(("mm_embed_dim", "audio_embed_dim", "output_proj_dims"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "dense_intermediate_size", "mlp_dim", "encoder_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size",), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("head_dim", "dim_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "swa_head_dim", "index_head_dim", "d_rel"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_head_dim", "mamba_d_head"), 8),
    "mamba_d_ssm": 64,
    "rotary_dim": 4,
    # depths
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    "first_k_dense_replace": 1,
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "index_n_heads", "swa_num_attention_heads"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    # experts
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "zero_expert_num"), 2),
    "num_kv_shared_layers": 0,
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    # lengths
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "rel_extent"), 64),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "index_topk"), 8),
    # images and sound, which a causal language model may see besides
    **dict.fromkeys(("image_size", "window_size"), 28),
    **dict.fromkeys(("patch_size", "mm_tokens_per_image", "position_embedding_size", "mm_posemb_size"), 14),
    **dict.fromkeys(("num_mel_bins", "output_channels", "adapter_rank", "num_blocks"), 4),
    # ids
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_words", "unpadded_vocab_size"), 320),
    **dict.fromkeys(("encoder_hash_byte_group_vocab", "audio_vocab_size"), 320),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # what a decoder is, where it may be an encoder too
    "is_decoder": True,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"moe_top_k": 2}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "local"]},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""By ``model_type``."""

VARIANTS = {
    "bert (encoder)": ("bert", {"is_decoder": False}),
    "gemma3_text (both ways)": ("gemma3_text", {"use_bidirectional_attention": True}),
}
"""By what the table calls them."""


def small_config(family: str, **changes: Any) -> Any:
    """Return a small transformers configuration of ``family`` (a ``model_type``), without dropout or jitter.

    Args:
        family: key of ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES``.
        changes: settings that overrule the small ones.

    Raises:
        Exception: whatever the configuration's class objects to.
    """
    cls = CONFIG_MAPPING[family]
    return cls(**_merged(_shrunk(cls), _merged(FAMILIES.get(family, {}), changes)))


def _shrunk(cls: type) -> dict[str, Any]:
    """Return the settings that make ``cls`` small, for configurations within it too."""
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    small = {name: value for name, value in SMALL.items() if name in known}
    small |= {name: 0.0 for name, value in known.items() if isinstance(value, float) and _is_random(name)}
    if "kv_lora_rank" in known and "num_key_value_heads" in known:  # latent attention has no groups
        small["num_key_value_heads"] = small["num_attention_heads"]
    for name, inner in (getattr(cls, "sub_configs_defaults", None) or {}).items():
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            small[name] = _shrunk(inner)
        elif inner.model_type:  # any class, and this one by default
            small[name] = {"model_type": inner.model_type} | _shrunk(CONFIG_MAPPING[inner.model_type])
    return small


def _is_random(name: str) -> bool:
    return "drop" in name or "jitter" in name


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = settings | changes
    for name, value in settings.items():
        if isinstance(value, dict) and isinstance(changes.get(name), dict):
            merged[name] = _merged(value, changes[name])
    return {name: value for name, value in merged.items() if value is not ABSENT}


ABSENT = object()
"""A setting that keeps its own default."""
