"""What a network asks of the ranks that share its matrices or its sequences, without knowing how they talk.

Of those that share matrices, between blocks each has its part of every sequence, and within a block all tokens but its own heads, inner
channels or rows of the vocabulary: tensor parallelism with sequence parallelism (Korthikanti et al. 2022, section 4.2.2).

Those that share sequences have some of their tokens each, in attention too: context parallelism.

Shape suffixes: B batch, T tokens, S tokens attended to, D hidden width, H query heads, G key/value heads, K head width.
"""

from typing import Any

import torch
from torch import Tensor


class Exchange:
    """One rank, which has nothing to exchange; engines hand out others."""

    size = 1  # ranks that share the matrices
    rank = 0  # of this one among them

    def own(self, x_BT: Tensor) -> Tensor:
        """Return this rank's part ``(..., T / size)`` of what every rank has of all tokens."""
        return x_BT

    def spread(self, x_BTD: Tensor) -> Tensor:
        """Return all tokens from the ranks' parts of them; the gradients of all ranks are summed, each gets its part."""
        return x_BTD

    def collect(self, x_BTD: Tensor) -> Tensor:
        """Return this rank's part of the tokens of the ranks' addends' sum; of gradients it is the reverse."""
        return x_BTD

    def maximum(self, x: Tensor) -> Tensor:
        """Return the largest value of all ranks, in place; without a gradient."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over all ranks, in place; without a gradient."""
        return x


class ExpertExchange:
    """One rank, which has all experts; engines hand out others."""

    size = 1  # ranks that share out the experts
    rank = 0  # of this one among them

    def to_experts(self, rows: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Return the rows ``(num_rows, D)`` that this rank's experts get, in the order of these, and how many each gets.

        Given are this rank's own rows, in the order of all experts, and how many each of them gets. What comes third
        says the way :meth:`back`.
        """
        return rows, counts_E, None

    def back(self, rows: Tensor, way: Any) -> Tensor:
        """Return, of what the experts make of rows, what they make of this rank's own, in their order."""
        return rows


class Context:
    """One rank, which has whole sequences; engines hand out others."""

    size = 1  # ranks that share the sequences

    def own(self, x_BT: Tensor) -> Tensor:
        """Return this rank's tokens ``(..., T / size)`` of all of them."""
        return x_BT

    def whole(self, x_BTD: Tensor) -> Tensor:
        """Return all tokens, in order, from the ranks' parts; the gradients of all ranks are summed, each gets its part."""
        return x_BTD

    def mask_rows(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """Return the places ``(T / size,)`` of the queries that :meth:`to_attention` leaves here; None: all, in order."""
        return None

    def to_attention(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what this rank attends with, from the ranks' tokens: queries, and keys and values of all tokens."""
        return q_BTHK, k_BTGK, v_BTGK

    def from_attention(self, y_BTHK: Tensor) -> Tensor:
        """Return all heads of this rank's tokens, of what the ranks have attended with."""
        return y_BTHK


ALONE = Exchange()
WHOLE = Context()
ALL_EXPERTS = ExpertExchange()
