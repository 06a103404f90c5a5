"""The native model as a GPT-2 or Llama of transformers: configuration, tensors, and initial values from their files.

The functions are the same, the storage differs: GPT-2's matrices are transposed (its ``Conv1D``), Llama's query, key
and value projections are three matrices. Rotary channels are paired alike, so no rows are permuted.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import Activation, ModelConfig, Norm, Positions
from bigtrain.errors import ConfigError
from bigtrain.models.hf.build import build_causal_lm, read_hf_config
from bigtrain.models.hf.files import StoredTensor
from bigtrain.models.hf.load import Converted, published
from bigtrain.models.init import Finite, InitialValue, Whole
from bigtrain.models.transformer import Linear, Transformer

Family = StrEnum("Family", "gpt2 llama")  # architecture of transformers, by its ``model_type``
_REQUIRED: dict[Family, dict[str, Any]] = {
    Family.gpt2: {"positions": Positions.learned, "norm": Norm.layernorm, "activation": Activation.gelu, "bias": True},
    Family.llama: {"positions": Positions.rope, "norm": Norm.rmsnorm, "activation": Activation.swiglu},
}
# Settings that both configurations have: our name and transformers'.
_SETTINGS = {
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
# Modules: our name, within a block without the block's, and transformers'.
_MODULES = {
    Family.gpt2: {
        "embed_tokens": ["transformer.wte"],
        "embed_positions": ["transformer.wpe"],
        "blocks": ["transformer.h"],
        "attention_norm": ["ln_1"],
        "attention.qkv": ["attn.c_attn"],
        "attention.out": ["attn.c_proj"],
        "feed_forward_norm": ["ln_2"],
        "feed_forward.up": ["mlp.c_fc"],
        "feed_forward.down": ["mlp.c_proj"],
        "final_norm": ["transformer.ln_f"],
        "output": ["lm_head"],
    },
    Family.llama: {
        "embed_tokens": ["model.embed_tokens"],
        "blocks": ["model.layers"],
        "attention_norm": ["input_layernorm"],
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.out": ["self_attn.o_proj"],
        "feed_forward_norm": ["post_attention_layernorm"],
        "feed_forward.gate": ["mlp.gate_proj"],
        "feed_forward.up": ["mlp.up_proj"],
        "feed_forward.down": ["mlp.down_proj"],
        "final_norm": ["model.norm"],
        "output": ["lm_head"],
    },
}


def family_of(model: ModelConfig) -> Family:
    """Return the architecture of a resolved native model; ConfigError lists what differs from the nearest one."""
    problems = {family: list(_problems(model, family)) for family in Family}
    nearest = min(Family, key=lambda family: len(problems[family]))
    if problems[nearest]:
        raise ConfigError(
            f"transformers has no counterpart of this model; the nearest architecture is {nearest.name}, but\n  "
            + "\n  ".join(problems[nearest])
        )
    return nearest


def _problems(model: ModelConfig, family: Family) -> Iterator[str]:
    for setting, needed in _REQUIRED[family].items():
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


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """Return ``config.json`` of a resolved native model, without token ids and dtype, in names of all versions."""
    family = family_of(model)
    common = {theirs: getattr(model, ours) for ours, theirs in _SETTINGS[family].items()}
    common |= {"model_type": family.name, "initializer_range": model.init_std, "use_cache": True}
    if family is Family.gpt2:
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.dropout),
        }
    scaling = model.rope_scaling and {"rope_type": "llama3", **dataclasses.asdict(model.rope_scaling)}
    if scaling:
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_positions")
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": model.max_positions,
        "hidden_act": "silu",
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.dropout,
    }


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A tensor in the files of transformers, as a part of a native parameter."""

    name: str  # name in the files
    shape: tuple[int, ...]  # shape in the files
    native: str  # name of the native parameter
    first_row: int  # row of the native parameter at which it begins
    is_transposed: bool  # ``(inputs, outputs)`` instead of the native ``(outputs, inputs)``

    def cut_from(self, parameter: Tensor) -> Tensor:
        """Return the tensor as a view of the whole native parameter."""
        return parameter.t() if self.is_transposed else parameter[self.first_row : self.first_row + self.shape[0]]


def hf_tensors(model: ModelConfig) -> list[HFTensor]:
    """Return every tensor of the transformers model, together all native parameters. Raises as :func:`family_of`."""
    family = family_of(model)
    modules, tensors = _MODULES[family], []
    with torch.device("meta"):
        native = Transformer(model)
    for name, parameter in native.named_parameters():
        path, _, kind = name.rpartition(".")
        number, _, in_block = path.removeprefix("blocks.").partition(".")
        prefix = f"{modules['blocks'][0]}.{number}." if in_block else ""
        targets = modules[in_block or path]
        is_transposed = family is Family.gpt2 and bool(in_block) and parameter.ndim == 2
        rows: tuple[int, ...] = (len(parameter),)
        first, layer = 0, native.get_submodule(path)
        if len(targets) > 1 and isinstance(layer, Linear):
            rows = layer.fused_rows
        for target, count in zip(targets, rows, strict=True):
            shape = tuple(parameter.shape[::-1]) if is_transposed else (count, *parameter.shape[1:])
            tensors.append(HFTensor(f"{prefix}{target}.{kind}", shape, name, first, is_transposed))
            first += count
    return tensors


@dataclass(frozen=True, slots=True)
class Stacked:
    """Tensors concatenated along their rows; an :class:`InitialValue`."""

    parts: tuple[StoredTensor | Converted, ...]

    def fill(self, start: int, out: Tensor) -> None:
        begin, stop = 0, start + out.numel()
        for part in self.parts:
            end = begin + math.prod(part.shape)
            low, high = max(start, begin), min(stop, end)
            if low < high:
                part.fill(low - begin, out[low - start : high - start])
            begin = end


def imported_values(model: nn.Module, config: ModelConfig) -> dict[str, InitialValue]:
    """Return every parameter from the files of ``config.init_from``; ConfigError lists how its model differs."""
    with torch.device("meta"):
        causal_lm = build_causal_lm(_same_model(config))
    stored = published(causal_lm, config.init_from, setting="model.init_from")
    parts: dict[str, list[HFTensor]] = {}
    for tensor in hf_tensors(config):
        parts.setdefault(tensor.native, []).append(tensor)

    def value(tensors: list[HFTensor]) -> InitialValue:
        names = [tensor.name for tensor in tensors]
        files = tuple(stored[name] for name in names)
        whole = Whole(lambda: files[0].read().t()) if tensors[0].is_transposed else Stacked(files)
        return Finite(whole, f"model.init_from={config.init_from!r}: {' or '.join(names)}")

    return {name: value(parts[name]) for name, _ in model.named_parameters()}


def _same_model(config: ModelConfig) -> Any:
    """Return the configuration of ``config.init_from``, compared: shapes alone would let another rotary base pass."""
    from transformers import AutoConfig

    wanted = AutoConfig.for_model(**hf_config(config))
    found = read_hf_config(config.init_from, setting="model.init_from")
    if found.model_type != wanted.model_type:
        raise ConfigError(
            f"model.init_from={config.init_from!r} is a {found.model_type}, but these settings are a "
            f"{wanted.model_type}; choose a model preset of that architecture, or +model=hf "
            f"model.name={config.init_from} model.pretrained=true"
        )
    there, here = _described(found), _described(wanted)
    if problems := [f"model.{key}: {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]]:
        raise ConfigError(f"model.init_from={config.init_from!r} is another model:\n  " + "\n  ".join(problems))
    return wanted


def _described(config: Any) -> dict[str, Any]:
    """Return what decides the function of a GPT-2 or Llama, by names of :class:`ModelConfig` where it has them."""
    found = {ours: getattr(config, theirs) for ours, theirs in _SETTINGS[Family[config.model_type]].items()}
    if config.model_type == "gpt2":
        same_function = {"gelu_pytorch_tanh": "gelu_new"}
        found["ffn_dim"] = config.n_inner or 4 * config.n_embd
        found["activation"] = same_function.get(config.activation_function, config.activation_function)
        others = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")
    else:
        rope = dict(config.rope_parameters)
        found |= {"activation": config.hidden_act, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        others = ("attention_bias", "mlp_bias")
    return found | {name: getattr(config, name) for name in others}
