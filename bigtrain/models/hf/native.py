"""The native model as a GPT-2 or Llama of transformers: configuration and tensor names.

The functions are the same, the storage differs: GPT-2's matrices are transposed (its ``Conv1D``), Llama's query, key
and value projections are three matrices. Rotary channels are paired alike, so no rows are permuted. Nothing here
imports transformers or reads a file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from bigtrain.config import Activation, ModelConfig, Norm, Positions
from bigtrain.errors import ConfigError


class Family(Enum):
    """An architecture of transformers, by its ``model_type``."""

    gpt2 = "gpt2"
    llama = "llama"


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A tensor in the files of transformers, as a part of a native parameter."""

    name: str  # name in the files
    shape: tuple[int, ...]  # shape in the files
    native: str  # name of the native parameter
    first_row: int = 0  # row of the native parameter at which it begins
    is_transposed: bool = False  # ``(inputs, outputs)`` instead of the native ``(outputs, inputs)``

    def cut_from(self, parameter: Tensor) -> Tensor:
        """Return the tensor as a view of the whole native parameter."""
        return parameter.t() if self.is_transposed else parameter[self.first_row : self.first_row + self.shape[0]]


_SETTINGS = {
    Family.gpt2: {"positions": Positions.learned, "norm": Norm.layernorm, "activation": Activation.gelu, "bias": True},
    Family.llama: {"positions": Positions.rope, "norm": Norm.rmsnorm, "activation": Activation.swiglu},
}


def family_of(model: ModelConfig) -> Family:
    """Return the architecture of a resolved native model.

    Raises:
        ConfigError: none; lists the settings that differ from the nearest one.
    """
    problems = {family: list(_problems(model, family)) for family in Family}
    nearest = min(Family, key=lambda family: len(problems[family]))
    if problems[nearest]:
        raise ConfigError(
            f"transformers has no counterpart of this model; the nearest architecture is {nearest.name}, but\n  "
            + "\n  ".join(problems[nearest])
        )
    return nearest


def _problems(model: ModelConfig, family: Family) -> Iterator[str]:
    for setting, needed in _SETTINGS[family].items():
        found = getattr(model, setting)
        if found != needed:
            found, needed = (v.name if isinstance(v, Enum) else str(v).lower() for v in (found, needed))
            yield f"model.{setting}={found}: {family.name} has {needed}"
    if family is Family.gpt2 and model.num_kv_heads != model.num_heads:
        yield f"model.num_kv_heads={model.num_kv_heads}: gpt2 has as many as model.num_heads={model.num_heads}"
    if family is Family.gpt2 and model.head_dim * model.num_heads != model.hidden_dim:
        yield f"model.head_dim={model.head_dim}: gpt2 has model.hidden_dim / model.num_heads"
    if family is Family.llama and model.hidden_dim % model.num_heads:
        yield f"model.hidden_dim={model.hidden_dim}: llama has a multiple of model.num_heads={model.num_heads}"


# Settings that both configurations have: our name and transformers'.
_NAMES = {
    Family.gpt2: {
        "vocab_size": "vocab_size",
        "num_layers": "n_layer",
        "hidden_dim": "n_embd",
        "num_heads": "n_head",
        "ffn_dim": "n_inner",
        "max_positions": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    Family.llama: {
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "hidden_dim": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn_dim": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
}


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """Return the content of ``config.json`` of a resolved native model, without token ids and dtype.

    The names are those that all versions of transformers know. Raises as :func:`family_of`.
    """
    family = family_of(model)
    common = {theirs: getattr(model, ours) for ours, theirs in _NAMES[family].items()}
    common |= {"model_type": family.name, "initializer_range": model.init_std, "use_cache": True}
    if family is Family.gpt2:
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "embd_pdrop": model.dropout,
            "attn_pdrop": model.dropout,
            "resid_pdrop": model.dropout,
        }
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": model.max_positions,
        "hidden_act": "silu",
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_scaling(model),
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.dropout,
    }


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": model.rope_scaling.factor,
        "low_freq_factor": model.rope_scaling.low_freq_factor,
        "high_freq_factor": model.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": model.rope_scaling.original_max_positions,
    }


def described(config: Any) -> dict[str, Any]:
    """Return what decides the function of a GPT-2 or Llama, from its transformers configuration.

    Keys are the names of :class:`ModelConfig` where it has the setting. Rotary models work at any length, so theirs
    have no ``max_positions``.
    """
    found = {ours: getattr(config, theirs) for ours, theirs in _NAMES[Family[config.model_type]].items()}
    if config.model_type == "gpt2":
        same_function = {"gelu_pytorch_tanh": "gelu_new"}
        return found | {
            "ffn_dim": config.n_inner or 4 * config.n_embd,
            "activation": same_function.get(config.activation_function, config.activation_function),
            "scale_attn_weights": config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        }
    rope = dict(config.rope_parameters)
    return found | {
        "activation": config.hidden_act,
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def hf_tensors(model: ModelConfig) -> list[HFTensor]:
    """Return every tensor of the transformers model, which together are all native parameters.

    Raises as :func:`family_of`.
    """
    tensors = _gpt2_tensors(model) if family_of(model) is Family.gpt2 else _llama_tensors(model)
    return list(tensors)


def _gpt2_tensors(model: ModelConfig) -> Iterator[HFTensor]:
    hidden, ffn = model.hidden_dim, model.ffn_dim

    def norm(name: str, native: str) -> Iterator[HFTensor]:
        yield HFTensor(f"{name}.weight", (hidden,), f"{native}.weight")
        yield HFTensor(f"{name}.bias", (hidden,), f"{native}.bias")

    def linear(name: str, native: str, num_inputs: int, num_outputs: int) -> Iterator[HFTensor]:
        yield HFTensor(f"{name}.weight", (num_inputs, num_outputs), f"{native}.weight", is_transposed=True)
        yield HFTensor(f"{name}.bias", (num_outputs,), f"{native}.bias")

    yield HFTensor("transformer.wte.weight", (model.vocab_size, hidden), "embed_tokens.weight")
    yield HFTensor("transformer.wpe.weight", (model.max_positions, hidden), "embed_positions.weight")
    for i in range(model.num_layers):
        block, native = f"transformer.h.{i}", f"blocks.{i}"
        yield from norm(f"{block}.ln_1", f"{native}.attention_norm")
        yield from linear(f"{block}.attn.c_attn", f"{native}.attention.qkv", hidden, 3 * hidden)
        yield from linear(f"{block}.attn.c_proj", f"{native}.attention.out", hidden, hidden)
        yield from norm(f"{block}.ln_2", f"{native}.feed_forward_norm")
        yield from linear(f"{block}.mlp.c_fc", f"{native}.feed_forward.up", hidden, ffn)
        yield from linear(f"{block}.mlp.c_proj", f"{native}.feed_forward.down", ffn, hidden)
    yield from norm("transformer.ln_f", "final_norm")
    if not model.tie_embeddings:
        yield HFTensor("lm_head.weight", (model.vocab_size, hidden), "output.weight")


def _llama_tensors(model: ModelConfig) -> Iterator[HFTensor]:
    hidden, ffn = model.hidden_dim, model.ffn_dim
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim

    def linear(name: str, native: str, num_inputs: int, num_outputs: int, first_row: int = 0) -> Iterator[HFTensor]:
        yield HFTensor(f"{name}.weight", (num_outputs, num_inputs), f"{native}.weight", first_row)
        if model.bias:
            yield HFTensor(f"{name}.bias", (num_outputs,), f"{native}.bias", first_row)

    yield HFTensor("model.embed_tokens.weight", (model.vocab_size, hidden), "embed_tokens.weight")
    for i in range(model.num_layers):
        block, native = f"model.layers.{i}", f"blocks.{i}"
        yield HFTensor(f"{block}.input_layernorm.weight", (hidden,), f"{native}.attention_norm.weight")
        qkv = f"{native}.attention.qkv"
        yield from linear(f"{block}.self_attn.q_proj", qkv, hidden, query)
        yield from linear(f"{block}.self_attn.k_proj", qkv, hidden, key_value, query)
        yield from linear(f"{block}.self_attn.v_proj", qkv, hidden, key_value, query + key_value)
        yield from linear(f"{block}.self_attn.o_proj", f"{native}.attention.out", query, hidden)
        yield HFTensor(f"{block}.post_attention_layernorm.weight", (hidden,), f"{native}.feed_forward_norm.weight")
        yield from linear(f"{block}.mlp.gate_proj", f"{native}.feed_forward.gate", hidden, ffn)
        yield from linear(f"{block}.mlp.up_proj", f"{native}.feed_forward.up", hidden, ffn)
        yield from linear(f"{block}.mlp.down_proj", f"{native}.feed_forward.down", ffn, hidden)
    yield HFTensor("model.norm.weight", (hidden,), "final_norm.weight")
    if not model.tie_embeddings:
        yield HFTensor("lm_head.weight", (model.vocab_size, hidden), "output.weight")
