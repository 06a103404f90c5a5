"""What every engine can do. The trainer, checkpoints and tests know nothing else about them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from bigtrain.data.read.batch import Batch
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.balance import Balance
from bigtrain.engine.exchange import add_up
from bigtrain.engine.state import EngineState
from bigtrain.tasks.base import Objective, sums_of


class Engine:
    """A model, its optimizer and a way to spread them over ranks."""

    module: nn.Module
    """The wrapped :class:`bigtrain.tasks.base.TaskModel`: DistributedDataParallel, an FSDPModule or a DeepSpeedEngine;
    under ``ddp`` in a world of one it is not wrapped."""
    objective: Objective  # what is minimised
    optimizer: torch.optim.Optimizer  # what updates the weights that this rank holds
    device: torch.device  # where batches go
    mesh: Mesh  # where this rank stands among the others
    average_decay: float = 0.0  # of a moving average of the weights, if there is one
    averages: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])  # its pieces on this rank, and the weights'
    state: EngineState  # master weights and optimizer state on this rank
    averages_over: int = 1  # ranks over which it averages gradients, which the scale of the loss undoes
    balance: Balance | None = None  # of the experts, if there are some

    def forward_backward(self, micro_batches: Sequence[Batch], *, num_targets: torch.Tensor | int) -> torch.Tensor:
        """Run forward and backward of all micro-batches of an optimizer step; the gradients are complete then.

        There is at least one, on any device; ``num_targets`` are those of the whole step over all ranks, 0-d on
        ``device`` if the host does not know them. Returns the objective's sums over this rank's samples, that of the
        loss first: fp32 ``(1 + K,)`` on ``device``, detached; 0-d from an objective without other sums.
        """
        if not self.module.training:
            self.module.train()
        if self.balance:
            self.balance.scale_losses(self.averages_over / num_targets)
        total = None
        for number, micro_batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            sums = self.backward(micro_batch.to(self.device), num_targets, is_last=is_last).detach()
            total = sums if total is None else total + sums
        self.sum_whole()
        return self.mesh.of_sequences(total)

    def sum_whole(self) -> None:
        """Sum the gradients of what every rank that shares matrices has whole (norms, biases of row-parallel layers).

        Each of them has seen its tokens alone.
        """
        if self.mesh.tp_size > 1:
            cuts, gradients = self.state.cuts, self.state.gradients()
            add_up((part for name, part in gradients if name not in cuts), self.mesh.tp, self.device)

    def backward(self, batch: Batch, num_targets: torch.Tensor | int, *, is_last: bool) -> torch.Tensor:
        """Run forward and backward of one micro-batch, of which ``is_last`` completes the gradients; return sums."""
        raise NotImplementedError

    def begin_update(self, step: int) -> None:
        """Do what depends on the number of the step, from 0, before its update: the noise of a private run."""

    @property
    def averaged_bytes(self) -> tuple[int, int] | None:
        """Bytes of weights that a worker of local steps has averaged so far, and of gradients that it has not."""
        return None

    def step(self, lr: float) -> torch.Tensor:
        """Clip the gradient, update the weights, forget the gradient; return its global norm before clipping, 0-d.

        A gradient that is not finite changes neither weights nor optimizer state, on any rank; native engines do not
        wait for the norm.
        """
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Return the objective's sums over each of some micro-batches, without a gradient: fp32 ``(N, 1 + K)``."""
        self.module.eval()
        with self.autocast():
            sums = torch.stack([sums_of(self.module, batch.to(self.device)) for batch in micro_batches])
        return self.mesh.of_sequences(sums).view(len(sums), -1)

    def autocast(self) -> AbstractContextManager[None]:
        """Return what the model computes in, besides what wraps it."""
        return nullcontext()
