"""The native model as a GPT-2, Llama, Qwen3 or Mixtral of transformers: configuration, tensors, and initial values from their files.

The functions are the same, the storage differs: GPT-2's matrices are transposed (its ``Conv1D``), Llama's query, key
and value projections are three matrices. Rotary channels are paired alike, so no rows are permuted.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import Activation, ModelConfig, Norm, Positions, RopeKind, RopeScalingConfig, RouterScores
from bigtrain.config.moe import MoeConfig
from bigtrain.errors import ConfigError
from bigtrain.models.hf.build import build_causal_lm, read_hf_config
from bigtrain.models.hf.files import StoredTensor, stored_tensors
from bigtrain.models.hf.load import Converted, published
from bigtrain.models.init import Constant, Finite, InitialValue, Whole
from bigtrain.models.moe import balances
from bigtrain.models.rope import FAST_TURNS, SLOW_TURNS
from bigtrain.models.transformer import Linear, Transformer

Family = StrEnum("Family", "gpt2 llama qwen3 mixtral qwen3_moe")  # architecture of transformers, by its ``model_type``
OF_EXPERTS = (Family.mixtral, Family.qwen3_moe)
_LIKE_LLAMA = {"positions": Positions.rope, "norm": Norm.rmsnorm, "activation": Activation.swiglu}
_REQUIRED: dict[Family, dict[str, Any]] = {
    Family.gpt2: {"positions": Positions.learned, "norm": Norm.layernorm, "activation": Activation.gelu, "bias": True},
    Family.llama: _LIKE_LLAMA,
    Family.qwen3: _LIKE_LLAMA | {"bias": False},
    Family.mixtral: _LIKE_LLAMA | {"bias": False},
    Family.qwen3_moe: _LIKE_LLAMA | {"bias": False},
}
_CLASSES = {
    Family.llama: "LlamaForCausalLM",
    Family.qwen3: "Qwen3ForCausalLM",
    Family.mixtral: "MixtralForCausalLM",
    Family.qwen3_moe: "Qwen3MoeForCausalLM",
}
# Settings that both configurations have: our name and transformers'.
_LLAMA_SETTINGS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
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
    Family.mixtral: _LLAMA_SETTINGS,
    **dict.fromkeys(("llama", "qwen3", "qwen3_moe"), _LLAMA_SETTINGS | {"ffn_dim": "intermediate_size"}),
}
# The same of ``model.moe``.
_EXPERT_SETTINGS = {
    Family.mixtral: {
        "num_experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_dim": "intermediate_size",
    },
    Family.qwen3_moe: {
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_dim": "moe_intermediate_size",
    },
}
# Modules: our name, within a block without the block's, and transformers'.
_LLAMA_MODULES = {
    "embed_tokens": ["model.embed_tokens"],
    "blocks": ["model.layers"],
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "attention.out": ["self_attn.o_proj"],
    "feed_forward_norm": ["post_attention_layernorm"],
    "feed_forward.gate": ["mlp.gate_proj"],
    "feed_forward.up": ["mlp.up_proj"],
    "feed_forward.down": ["mlp.down_proj"],
    "final_norm": ["model.norm"],
    "output": ["lm_head"],
}
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
    **dict.fromkeys(("llama", "qwen3"), _LLAMA_MODULES),
    Family.mixtral: _LLAMA_MODULES | {"feed_forward.router": ["block_sparse_moe.gate"]},
    Family.qwen3_moe: _LLAMA_MODULES | {"feed_forward.router": ["mlp.gate"]},
}
_W = {"gate": "w1", "down": "w2", "up": "w3"}  # of Mixtral
# Matrices of one expert in the files, by our name of them all.
_EXPERTS = {
    Family.mixtral: {name: f"block_sparse_moe.experts.{{}}.{theirs}.weight" for name, theirs in _W.items()},
    Family.qwen3_moe: {name: f"mlp.experts.{{}}.{name}_proj.weight" for name in _W},
}


def family_of(model: ModelConfig) -> Family:
    """Return the architecture of a resolved native model; ConfigError lists what differs from the nearest one."""
    problems = {
        family: list(_problems(model, family)) for family in Family if (family in OF_EXPERTS) == bool(model.moe)
    }
    nearest = min(problems, key=lambda family: len(problems[family]))
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
    if model.qk_norm is not (family in (Family.qwen3, Family.qwen3_moe)):
        yield f"model.qk_norm={str(model.qk_norm).lower()}: {family.name} has {str(not model.qk_norm).lower()}"
    if model.moe:
        yield from _expert_problems(model.moe, family)
    if family is Family.gpt2 and model.num_kv_heads != model.num_heads:
        yield f"model.num_kv_heads={model.num_kv_heads}: gpt2 has as many as model.num_heads={model.num_heads}"
    if family is Family.gpt2 and model.head_dim * model.num_heads != model.hidden_dim:
        yield f"model.head_dim={model.head_dim}: gpt2 has model.hidden_dim / model.num_heads"
    if family is Family.llama and model.hidden_dim % model.num_heads:
        yield f"model.hidden_dim={model.hidden_dim}: llama has a multiple of model.num_heads={model.num_heads}"


def _rope_scaling(scaling: RopeScalingConfig) -> dict[str, Any]:
    described: dict[str, Any] = {"rope_type": scaling.kind.name, "factor": scaling.factor}
    if scaling.kind is RopeKind.llama3:
        described |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    if scaling.kind is not RopeKind.linear:
        described["original_max_position_embeddings"] = scaling.original_max_positions
    return described


def _expert_problems(moe: MoeConfig, family: Family) -> Iterator[str]:
    if moe.dense_layers and family is Family.mixtral:
        yield f"model.moe.dense_layers={moe.dense_layers}: mixtral has a mixture in each block"
    if moe.num_shared_experts:
        yield f"model.moe.num_shared_experts={moe.num_shared_experts}: {family.name} has none"
    if moe.scores is not RouterScores.softmax:
        yield f"model.moe.scores={moe.scores.name}: {family.name} has softmax"
    if moe.balance_speed:
        yield f"model.moe.balance_speed={moe.balance_speed}: {family.name} has no biases of the choice, only a loss"


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
    scaling = model.rope_scaling and _rope_scaling(model.rope_scaling)
    common |= {
        "architectures": [_CLASSES[family]],
        "max_position_embeddings": model.max_positions,
        "hidden_act": "silu",
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "attention_dropout": model.dropout,
    }
    if family is not Family.mixtral:
        common["attention_bias"] = model.bias
    if family is Family.llama:
        common["mlp_bias"] = model.bias
    if moe := model.moe:
        common |= {theirs: getattr(moe, ours) for ours, theirs in _EXPERT_SETTINGS[family].items()}
        common["router_aux_loss_coef"] = moe.sequence_balance
    if moe and family is Family.qwen3_moe:
        common |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": list(range(moe.dense_layers))}
    return common


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A tensor in the files of transformers, as a part of a native parameter."""

    name: str  # name in the files
    shape: tuple[int, ...]  # shape in the files
    native: str  # name of the native parameter
    first_row: int  # row of the native parameter at which it begins
    is_transposed: bool  # ``(inputs, outputs)`` instead of the native ``(outputs, inputs)``
    expert: int | None = None  # whose matrix it is, of a native parameter that holds those of all

    def cut_from(self, parameter: Tensor) -> Tensor:
        """Return the tensor as a view of the whole native parameter."""
        if self.expert is not None:
            return parameter[self.expert]
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
        if in_block.endswith(".experts"):
            target, shape = _EXPERTS[family][kind], tuple(parameter.shape[1:])
            names = [f"{prefix}{target.format(expert)}" for expert in range(len(parameter))]
            tensors += [HFTensor(own, shape, name, 0, False, expert) for expert, own in enumerate(names)]
            continue
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
    # Experts are one tensor in transformers' memory, and many in the files.
    stored: dict[str, StoredTensor | Converted] = {**stored_tensors(config.init_from, setting="model.init_from")}
    stored |= published(causal_lm, config.init_from, setting="model.init_from")
    parts: dict[str, list[HFTensor]] = {}
    for tensor in hf_tensors(config):
        parts.setdefault(tensor.native, []).append(tensor)

    def value(tensors: list[HFTensor]) -> InitialValue:
        names = [tensor.name for tensor in tensors]
        files = tuple(stored[name] for name in names)
        whole = Whole(lambda: files[0].read().t()) if tensors[0].is_transposed else Stacked(files)
        return Finite(whole, f"model.init_from={config.init_from!r}: {' or '.join(names)}")

    values = {name: value(parts[name]) for name, _ in model.named_parameters()}
    return values | dict.fromkeys(balances(model), Constant(0.0))


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
    family = Family[config.model_type]
    found = {ours: getattr(config, theirs) for ours, theirs in _SETTINGS[family].items()}
    of_experts = _EXPERT_SETTINGS.get(family, {})
    found |= {f"moe.{ours}": getattr(config, theirs) for ours, theirs in of_experts.items()}
    if config.model_type == "gpt2":
        same_function = {"gelu_pytorch_tanh": "gelu_new"}
        found["ffn_dim"] = config.n_inner or 4 * config.n_embd
        found["activation"] = same_function.get(config.activation_function, config.activation_function)
        names = ["scale_attn_weights", "scale_attn_by_inverse_layer_idx"]
    else:
        defaults = {"beta_fast": FAST_TURNS, "beta_slow": SLOW_TURNS}  # which files may spell out
        rope = {key: value for key, value in config.rope_parameters.items() if defaults.get(key) != value}
        found |= {"activation": config.hidden_act, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        names = ["attention_bias", "mlp_bias", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"]
        names += ["sliding_window"]
    return found | {name: getattr(config, name) for name in names if hasattr(config, name)}
