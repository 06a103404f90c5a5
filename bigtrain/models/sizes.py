"""Parameter counts and activation memory of a model, from its shape alone; without torch.

In formulas, hidden is the width of the residual stream, query that of all query heads together, key_value that of all
key (or value) heads, inner that of the feed-forward layer.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from bigtrain.config import Activation, ActivationCheckpointing, CpMethod, Head, ModelConfig, ModelKind, Norm, Positions

CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits of the training loss that exist at a time, by device: enough for efficient matrix products. On a CPU that is
32 MiB in fp32, which stays in its caches in part; on a GPU 0.5 GiB."""
FUSED_CHUNK_LOGITS = 1 << 29
"""The same on a GPU where compiled kernels need no fp32: 1 GiB in bf16. Adding up the weight's gradient costs as much
time as the product of 400 tokens (12 bytes against 6 operations per token and weight), which 8,192 tokens make up for."""
VOCABULARY_MULTIPLE = 128  # GPUs multiply matrices of other widths in slower kernels


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Number of parameters by place."""

    root: int  # outside the blocks: embeddings, final norm, untied output
    block: int  # in one block
    num_layers: int
    matrices: int  # in the matrices of one block
    largest: int  # in the largest of them
    frozen: int = 0  # anywhere, by ``model.freeze``
    missing: int = 0  # what blocks without a mixture of experts have less, all together

    @property
    def total(self) -> int:
        return self.root + self.num_layers * self.block - self.missing

    @property
    def trained(self) -> int:
        return self.total - self.frozen


def model_sizes(model: ModelConfig) -> ModelSizes:
    hidden, bias = model.hidden_dim, int(model.bias)
    norm = hidden * (1 + int(model.bias and model.norm is Norm.layernorm))
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    num_inner = 2 if model.activation is Activation.swiglu else 1
    dense = hidden * (num_inner + 1) * model.ffn_dim
    inner = _expert_weights(model) * (model.moe.num_experts + model.moe.num_shared_experts) if model.moe else dense
    inner += hidden * model.moe.num_experts if model.moe else 0  # the router
    matrices = hidden * (2 * query + 2 * key_value) + inner
    biases = bias * (query + 2 * key_value + hidden + num_inner * model.ffn_dim + hidden)
    embeddings = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    positions = model.max_positions * hidden if model.positions is Positions.learned else 0
    return ModelSizes(
        root=embeddings + positions + norm,
        block=2 * norm + matrices + biases + (2 * model.head_dim if model.qk_norm else 0),
        num_layers=model.num_layers,
        matrices=matrices,
        largest=hidden * max(query, model.ffn_dim),
        missing=model.moe.dense_layers * (inner - dense) if model.moe else 0,
    )


def visited_weights(model: ModelConfig) -> int:
    """Return the weights of the blocks' matrices that a token is multiplied with, of a resolved native model."""
    sizes = model_sizes(model)
    weights = sizes.num_layers * sizes.matrices - sizes.missing
    if model.moe is None:
        return weights
    unvisited = _expert_weights(model) * (model.moe.num_experts - model.moe.experts_per_token)
    return weights - unvisited * (model.num_layers - model.moe.dense_layers)


def _expert_weights(model: ModelConfig) -> int:
    return 3 * model.hidden_dim * model.moe.expert_dim if model.moe else 0


def part_of_rank(model: ModelConfig, tp: int) -> ModelConfig:
    """Return the shape of the largest part of a resolved native model that one of ``tp`` ranks has of its matrices."""
    cut = {name: -(-getattr(model, name) // tp) for name in ("vocab_size", "num_heads", "num_kv_heads", "ffn_dim")}
    return dataclasses.replace(model, **cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """Element sizes of activations, the kernels that compute them, and how many ranks share them."""

    element_bytes: int  # per element of a matmul's operands and result
    residual_bytes: int  # per element of the residual stream: 4 under autocast, where only matmuls are in bf16
    on_cpu: bool  # CPU kernels keep more: RMSNorm is not fused, and dropout in attention makes the T x T matrix
    compiled: bool = False  # whether ``torch.compile`` fuses what lies between matmuls
    tp: int = 1  # ranks that share the tokens of the residual stream, and the heads
    cp: int = 1  # ranks that share the tokens of everything
    cp_method: CpMethod = CpMethod.gather

    @property
    def autocast(self) -> bool:
        """Whether inputs of matmuls are cast copies."""
        return self.element_bytes != self.residual_bytes


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes that one micro-batch keeps between forward and backward pass."""

    saved: int  # at the end of the forward pass
    recomputed: int  # added while one checkpointed block is recomputed in the backward pass


def hf_setting(hf_config: Any, name: str) -> Any:
    """Return a setting of a ``transformers`` configuration, the largest of its layers or parts; None without one."""
    try:
        value = getattr(hf_config, name, None)
    except RuntimeError:  # transformers refuses to name one for all layers
        value = [getattr(layer, name) for layer in hf_config.per_layer_config]
    if value is None:
        value = [getattr(getattr(hf_config, inner), name, None) for inner in hf_config.sub_configs]
    if not isinstance(value, list | tuple):
        return value
    return max((found for found in value if found is not None), default=None)


def is_language_model(model: ModelConfig) -> bool:
    """Return whether a model of transformers is one, so that the native shape most like it has its activations."""
    return model.head in (Head.causal_lm, Head.masked_lm)


def native_shape(hf_config: Any) -> ModelConfig:
    """Return the resolved native shape most like that of a ``transformers`` text configuration.

    A guess: compare its parameters with the model's. Experts count as one feed-forward layer as wide as a token visits.
    """

    def read(default: Any, *names: str) -> Any:
        return next((value for name in names if (value := hf_setting(hf_config, name)) is not None), default)

    hidden_dim, num_heads = read(None, "hidden_size"), read(1, "num_attention_heads")
    norm = Norm.rmsnorm if read(None, "rms_norm_eps") else Norm.layernorm
    inner = read(4 * hidden_dim, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim")
    return ModelConfig(
        kind=ModelKind.hf,
        vocab_size=hf_config.vocab_size,
        num_layers=read(1, "num_hidden_layers"),
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        num_kv_heads=read(None, "num_key_value_heads") or num_heads,
        head_dim=read(None, "head_dim") or hidden_dim // num_heads,
        ffn_dim=inner * read(1, "num_experts_per_tok"),
        positions=Positions.rope if read(None, "rope_parameters", "rope_theta") else Positions.learned,
        norm=norm,
        bias=norm is Norm.layernorm,
        tie_embeddings=bool(getattr(hf_config, "tie_word_embeddings", True)),
        max_positions=read(None, "max_position_embeddings") or ModelConfig().max_positions,
        activation=Activation.swiglu if read("", "hidden_act") == "silu" else Activation.gelu,
        dropout=max(read(0.0, "attention_dropout", "attn_pdrop"), read(0.0, "hidden_dropout", "resid_pdrop")),
    )


def activation_bytes(
    model: ModelConfig,
    *,
    num_sequences: int,
    sequence_length: int,
    checkpointing: ActivationCheckpointing,
    every: int,
    numerics: Numerics,
) -> ActivationBytes:
    """Return what the blocks and the final norm keep for the backward pass of a micro-batch."""
    num_tokens = num_sequences * sequence_length // numerics.cp
    whole = _block_bytes_per_token(model, sequence_length, numerics)
    kept = {
        ActivationCheckpointing.none: whole,
        ActivationCheckpointing.selective: _selective_bytes_per_token(model, numerics),
        ActivationCheckpointing.full: model.hidden_dim * numerics.residual_bytes // numerics.tp,
    }[checkpointing]
    num_checkpointed = -(-model.num_layers // every)
    per_token = num_checkpointed * kept + (model.num_layers - num_checkpointed) * whole
    per_token += _norm_bytes_per_token(model, numerics) + _mask_bytes_per_token(model, numerics)
    return ActivationBytes(saved=num_tokens * per_token, recomputed=num_tokens * (whole - kept))


def chunk_tokens(vocab_size: int, device_type: str, *, fused: bool) -> int:
    """Return the tokens of whose logits the loss computes at a time: a power of two."""
    num_logits = CHUNK_LOGITS["cpu" if device_type == "cpu" else "cuda"]
    if fused and device_type != "cpu":
        num_logits = FUSED_CHUNK_LOGITS
    return 1 << max(num_logits // vocab_size, 1).bit_length() - 1


def num_padding_rows(vocab_size: int, device_type: str) -> int:
    """Return the rows of zeros that pad the output projection in the loss."""
    return -vocab_size % VOCABULARY_MULTIPLE if device_type == "cuda" else 0


def loss_bytes(model: ModelConfig, *, num_tokens: int, numerics: Numerics) -> int:
    """Return the peak of the cross-entropy.

    Our own (``models/loss.py``) holds a chunk's logits in the compute dtype and, unless compiled, in fp32, besides the
    gradients of hidden states and projection (a chunk's, and their fp32 sum). Other models return all logits: fp32
    log-probabilities and two gradients of their shape.
    """
    if model.kind is ModelKind.hf:
        return 12 * num_tokens * model.vocab_size
    device_type, element = "cpu" if numerics.on_cpu else "cuda", numerics.element_bytes
    num_padding = num_padding_rows(model.vocab_size, device_type)
    num_rows = model.vocab_size + num_padding
    fused = numerics.compiled and element < 4
    logits = min(num_tokens, chunk_tokens(num_rows, device_type, fused=fused)) * num_rows
    logits *= element if element == 4 or (fused and not numerics.on_cpu) else 4 + element
    projection = (4 + (element if element < 4 else 0) + (element if num_padding else 0)) * num_rows
    return logits + (projection + element * num_tokens) * model.hidden_dim


def _block_bytes_per_token(model: ModelConfig, sequence_length: int, numerics: Numerics) -> int:
    """Return what autograd keeps of a block, per token.

    Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) count 34 hidden + 5 heads * length bytes in 16 bits. Fused
    attention keeps q, k, v, its output and one fp32 number per head instead of matrices of length * length, and without
    dropout there are no masks (2 hidden): 32 hidden for a GPT block in bf16.
    """
    hidden, element = model.hidden_dim, numerics.element_bytes
    query, key_value = _attention_widths(model)
    gated = model.activation is Activation.swiglu
    norms = 2 * _norm_bytes_per_token(model, numerics)
    if gated and numerics.autocast:
        norms += element * hidden  # gate and up each keep their own bf16 copy of their common input
    # Rotated queries and keys are copies; v, a view, keeps the whole product alive.
    rotated = query + key_value if model.positions is Positions.rope else 0
    attention = element * (query + 2 * key_value + rotated + query) + 4 * model.num_heads
    if numerics.cp > 1:  # and what it attends with, from other ranks
        from_others = 2 * numerics.cp * key_value
        attention += element * (from_others if numerics.cp_method is CpMethod.gather else 2 * query + 2 * key_value)
    # torch falls back on unfused attention: on a CPU with dropout; on a GPU, by its documentation, grouped heads in fp32.
    if model.dropout > 0 if numerics.on_cpu else query != key_value and element == 4:
        attention += 12 * model.num_heads * sequence_length  # probabilities, their mask, their product; in fp32
    # gelu: its input and output; swiglu: gate, silu(gate), up and the product. transformers writes its gelu
    # in elementary operations, which keep three more.
    num_inner = 4 if gated else 5 if model.kind is ModelKind.hf else 2
    inner = element * num_inner * (model.ffn_dim or 4 * hidden)
    if model.moe:  # of each visited expert the input and output too, which are copies; of scores, logits and shares
        visited = model.moe.experts_per_token
        inner = element * num_inner * (visited + model.moe.num_shared_experts) * model.moe.expert_dim
        inner += element * 2 * visited * hidden + 4 * 3 * model.moe.num_experts
    return norms + attention + inner + 2 * _mask_bytes_per_token(model, numerics)


def _selective_bytes_per_token(model: ModelConfig, numerics: Numerics) -> int:
    """Return what selective checkpointing keeps: the block's input, results of matmuls and attention."""
    query, key_value = _attention_widths(model)
    num_inner = 2 if model.activation is Activation.swiglu else 1
    results = (query + 2 * key_value) + query + num_inner * (model.ffn_dim or 4 * model.hidden_dim)
    results += 2 * model.hidden_dim  # of the two products that write to the residual stream
    kept = model.hidden_dim * numerics.residual_bytes // numerics.tp
    return kept + results * numerics.element_bytes + 4 * model.num_heads


def _norm_bytes_per_token(model: ModelConfig, numerics: Numerics) -> int:
    """Return what a norm keeps: its input (the residual stream) and its output (a matmul's input, of all tokens)."""
    kept = numerics.residual_bytes
    if model.norm is Norm.rmsnorm and numerics.on_cpu:
        kept += 4 if numerics.residual_bytes == 4 else 6  # the normalised input, and the fp32 input of a bf16 one
    return kept * model.hidden_dim // numerics.tp + numerics.element_bytes * model.hidden_dim


def _mask_bytes_per_token(model: ModelConfig, numerics: Numerics) -> int:
    """Return what dropout of a hidden vector keeps: bools on a GPU, numbers on a CPU."""
    return model.hidden_dim * (numerics.element_bytes if numerics.on_cpu else 1) // numerics.tp if model.dropout else 0


def _attention_widths(model: ModelConfig) -> tuple[int, int]:
    head_dim = model.head_dim or model.hidden_dim // model.num_heads
    return model.num_heads * head_dim, (model.num_kv_heads or model.num_heads) * head_dim
