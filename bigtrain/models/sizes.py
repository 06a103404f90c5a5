"""Sizes of the native model from its shape alone: what the preflight and the FLOP count start from. No torch."""

from dataclasses import dataclass

from bigtrain.config import Activation, ModelConfig, Norm, Positions


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Number of parameters by place."""

    root: int
    """Outside the blocks: embeddings, final norm, untied output."""
    block: int
    """In one block."""
    num_layers: int
    """Number of blocks."""

    @property
    def total(self) -> int:
        """Parameters of the model."""
        return self.root + self.num_layers * self.block


def model_sizes(model: ModelConfig) -> ModelSizes:
    """Return the number of parameters of a resolved native model."""
    hidden, bias = model.hidden_dim, int(model.bias)
    norm = hidden * (1 + int(model.bias and model.norm is Norm.layernorm))
    query, key_value = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = _linear(hidden, query + 2 * key_value, bias) + _linear(query, hidden, bias)
    num_inner = 2 if model.activation is Activation.swiglu else 1
    feed_forward = num_inner * _linear(hidden, model.ffn_dim, bias) + _linear(model.ffn_dim, hidden, bias)
    embeddings = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    positions = model.max_positions * hidden if model.positions is Positions.learned else 0
    return ModelSizes(embeddings + positions + norm, 2 * norm + attention + feed_forward, model.num_layers)


def _linear(num_inputs: int, num_outputs: int, bias: int) -> int:
    return num_inputs * num_outputs + bias * num_outputs
