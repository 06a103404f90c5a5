"""What every engine can do. The trainer, checkpoints and tests know nothing else about them."""

from typing import Protocol

import torch
from torch import nn

from bigtrain.engine.state import EngineState
from bigtrain.tasks.causal_lm import Batch


class Engine(Protocol):
    """A model, its optimizer and a way to spread them over ranks."""

    module: nn.Module
    """The wrapped model: DistributedDataParallel, an FSDPModule or a DeepSpeedEngine; the model itself under ``ddp``
    in a world of one."""
    optimizer: torch.optim.Optimizer
    """What updates the weights that this rank holds."""
    device: torch.device
    """Where batches go."""
    dp_rank: int
    """Which part of a global batch this rank takes."""
    dp_size: int
    """Into how many parts a global batch is cut."""
    state: EngineState
    """Master weights and optimizer state on this rank."""

    def micro_step(self, batch: Batch, *, num_targets: torch.Tensor | int, last: bool) -> torch.Tensor:
        """Run forward and backward of one micro-batch and accumulate its gradient.

        Args:
            batch: on ``device``.
            num_targets: number of targets of the whole optimizer step over all ranks; a 0-d tensor on ``device`` where
                the host does not know it.
            last: whether this is the last micro-batch of the step; gradients are communicated with it.

        Returns:
            The sum of the losses of the micro-batch's targets, detached (0-d fp32 tensor on ``device``).
        """
        ...

    def step(self, lr: float) -> torch.Tensor:
        """Clip the gradient, update the weights, forget the gradient.

        A gradient that is not finite changes neither weights nor optimizer state, on any rank.

        Returns:
            The global gradient norm before clipping (0-d tensor; the native engines do not wait for it).
        """
        ...

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Return the sum of the losses of a micro-batch without a gradient (0-d fp32 tensor)."""
        ...
