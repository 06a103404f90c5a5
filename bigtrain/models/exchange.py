"""What a network asks of the ranks that share its matrices, without knowing how they talk.

Between blocks each of them has its part of every sequence, and within a block all tokens but its own heads, inner
channels or rows of the vocabulary: tensor parallelism with sequence parallelism (Korthikanti et al. 2022, section 4.2.2).

Shape suffixes: B batch, T tokens, D hidden width, N tokens of the batch.
"""

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


ALONE = Exchange()
