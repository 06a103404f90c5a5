"""Floating-point operations of training a decoder, from its shape alone; without torch.

Counted are the matmuls with weights and of attention, a multiply-add as two operations, the backward pass as twice the
forward pass. Not counted: recomputation (activation checkpointing, flash attention's backward pass), embedding
look-ups, norms, activations, softmax and the optimizer, together below 1 % for models worth a GPU. With

    W   weights of the matrices that a token is multiplied with: per block (attention, feed-forward or the experts
        that it visits), and the output
    Q   query heads x head width, all layers together: num_layers * num_heads * head_dim
    P   pairs (query, key) that attention computes, in one head of one layer

training on some tokens takes ``6 * W * tokens + 12 * Q * P`` operations: per pair and head, ``2 * head_dim`` for
the score and as many for the weighted value, three times with the backward pass. What is called a pair is the
convention, and MFU figures of different projects differ by it:

    full attention   P = T * T per sequence of T tokens, also those that the causal mask discards: PaLM's
                     (Chowdhery et al. 2022, appendix B), Megatron-LM's (Narayanan et al. 2021, eq. 3), LLM
                     Foundry's and nanoGPT's
    causal           P = T * (T + 1) / 2, what has to be computed: NVIDIA's Megatron-Bridge and NeMo tables
    documents        the same within each document of a sequence, where a mask keeps documents apart

The first two agree within 1 % for short sequences; Llama-3 8B at 8,192 tokens is 5.8e10 operations per token by
the first and 5.1e10 by the second.
"""

from dataclasses import dataclass

from bigtrain.config import ModelConfig
from bigtrain.models.sizes import visited_weights


def matrix_weights(model: ModelConfig) -> int:
    """Return W of a resolved native model."""
    return visited_weights(model) + model.vocab_size * model.hidden_dim


def causal_pairs(sequence_length: int) -> int:
    """Return P of one sequence under the causal mask."""
    return sequence_length * (sequence_length + 1) // 2


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """Operations per token of training on whole sequences, by convention."""

    causal: float  # with the pairs that the causal mask leaves
    full_attention: float  # with all pairs, as most published tables count
    products: float  # of the products with weights alone: ``6 * W``
    pair: float  # of one pair in all heads and layers: ``12 * Q``

    def documents(self, pairs_per_token: float) -> float:
        """Return the operations per token where a document mask leaves ``pairs_per_token``."""
        return self.products + self.pair * pairs_per_token


def flops_per_token(model: ModelConfig, sequence_length: int) -> TokenFlops:
    """Return the operations per token of training on sequences of ``sequence_length`` tokens."""
    products = 6 * matrix_weights(model)
    pair = 12 * model.num_layers * model.num_heads * model.head_dim
    causal = products + pair * causal_pairs(sequence_length) / sequence_length
    return TokenFlops(causal, products + pair * sequence_length, products, pair)
