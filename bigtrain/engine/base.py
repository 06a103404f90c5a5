"""What every engine can do. The trainer, checkpoints and tests know nothing else about them."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from bigtrain.data.read.batch import Batch
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.state import EngineState


class Engine(Protocol):
    """A model, its optimizer and a way to spread them over ranks."""

    module: nn.Module
    """The wrapped :class:`bigtrain.tasks.base.TaskModel`: DistributedDataParallel, an FSDPModule or a DeepSpeedEngine;
    under ``ddp`` in a world of one it is not wrapped."""
    optimizer: torch.optim.Optimizer
    """What updates the weights that this rank holds."""
    device: torch.device
    """Where batches go."""
    mesh: Mesh
    """Where this rank stands among the others."""
    state: EngineState
    """Master weights and optimizer state on this rank."""

    def forward_backward(self, micro_batches: Sequence[Batch], *, num_targets: torch.Tensor | int) -> torch.Tensor:
        """Run forward and backward of all micro-batches of an optimizer step; the gradients are complete then.

        Args:
            micro_batches: of this rank, at least one, on any device.
            num_targets: number of targets of the whole optimizer step over all ranks; a 0-d tensor on ``device`` where
                the host does not know it.

        Returns:
            The objective's sums over this rank's samples, that of the loss first: fp32 ``(1 + K,)`` on ``device``, detached;
            0-d from an objective without other sums.
        """
        ...

    def step(self, lr: float) -> torch.Tensor:
        """Clip the gradient, update the weights, forget the gradient.

        A gradient that is not finite changes neither weights nor optimizer state, on any rank.

        Returns:
            The global gradient norm before clipping (0-d tensor; the native engines do not wait for it).
        """
        ...

    def evaluate(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Return the objective's sums over each of some micro-batches, without a gradient: fp32 ``(N, 1 + K)``."""
        ...
