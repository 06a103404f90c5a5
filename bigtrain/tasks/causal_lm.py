"""What is minimised: the cross-entropy of the next token, averaged over all targets of an optimizer step."""

from typing import Protocol

from torch import Tensor, nn


class Batch(Protocol):
    """Tokens and what should follow them, both int64 ``(B, T)``; targets of -100 do not count.

    With ``positions``, int64 ``(B, T)``, samples hold several documents, each of which begins at position 0.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Return the *sum* of the loss over the batch's targets, in nats, as an fp32 scalar.

    Engines divide by the global number of targets: those of all micro-batches of all ranks in the
    optimizer step. Only that makes the gradient independent of how the step was cut into pieces;
    a mean of means weighs a token by how few others happened to share its micro-batch.
    """
    if batch.positions is None:
        return model(batch.tokens, batch.targets)
    return model(batch.tokens, batch.targets, batch.positions)


def gradient_scale(loss: Tensor, scale: Tensor | float) -> Tensor:
    """Return the factor of ``loss`` in the backward pass: ``scale``, or NaN if the loss is not finite.

    A loss can be infinite although its gradient is not. So made, its gradient is not finite either, and neither is
    the sum over the ranks: all of them see it in the gradient's norm, without an exchange of its own.
    """
    return scale + 0 * loss.detach()
