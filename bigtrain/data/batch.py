"""What a model receives: tokens in, targets to predict."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE_INDEX = -100
"""Target that is not counted in the loss; also the default of ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples of T tokens."""

    tokens: torch.Tensor
    """int64 ``(B, T)``."""
    targets: torch.Tensor
    """int64 ``(B, T)``: the token after each, or ``IGNORE_INDEX`` where it is not counted."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``; from pinned memory the copy does not block."""
        return Batch(self.tokens.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return a copy in page-locked host memory."""
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory())


def build_batch(windows: NDArray[np.int64], is_counted: NDArray[np.bool_] | None) -> Batch:
    """Cut windows of T + 1 tokens into tokens and targets.

    Args:
        windows: int64 ``(B, T + 1)``.
        is_counted: bool ``(B, T)``, which targets count; None means all of them.
    """
    targets = windows[:, 1:]
    targets = targets.copy() if is_counted is None else np.where(is_counted, targets, IGNORE_INDEX)
    return Batch(torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(targets))
