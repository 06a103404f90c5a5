"""One optimizer step: its loss divided by the targets of all ranks, and what the host reads back of it."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from bigtrain.data.read.loader import StepBatch
from bigtrain.distributed.collectives import all_reduce_sum
from bigtrain.engine.base import Engine
from bigtrain.tasks.base import Objective, split_sums


def train_step(
    engine: Engine, batch: StepBatch, lr: float, *, before_update: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one optimizer step.

    The loss is the mean over the targets of the whole step on all ranks, never a mean of means.

    Args:
        engine: computes it.
        batch: this rank's part of the global batch.
        lr: learning rate.
        before_update: called when the gradient is complete and the weights are about to change.

    Returns:
        This rank's share of the loss and of the objective's other sums (the ranks' shares add up to them), ``(1 + K,)``, and
        the global gradient norm, 0-d; both on the device, and the host has not waited for them.
    """
    num_targets: torch.Tensor | int | None = batch.global_num_targets
    if num_targets is None:
        num_targets = all_reduce_sum(torch.full((), batch.num_targets, device=engine.device)).clamp(min=1)
    sums = engine.forward_backward(batch.micro_batches, num_targets=num_targets)
    before_update()
    grad_norm = engine.step(lr)
    loss = sums[:1] / num_targets
    return loss if len(sums) == 1 else torch.cat([loss, sums[1:]]), grad_norm


def read_back(pending: list[dict[str, Any]], objective: Objective) -> list[dict[str, Any]]:
    """Wait for the device, add up the ranks' shares, and return (and forget) the pending records as plain numbers."""
    sums = all_reduce_sum(torch.stack([record["loss"] for record in pending]))
    norms = torch.stack([record["grad_norm"] for record in pending])
    records = [
        {**record, "loss": loss, "grad_norm": norm, **train_metrics(objective, loss, rest)}
        for record, (loss, *rest), norm in zip(pending, sums.tolist(), norms.tolist(), strict=True)
    ]
    pending.clear()
    return records


def train_metrics(objective: Objective, loss: float, sums: list[float]) -> dict[str, float]:
    """Return the metrics that are made of an objective's sums beside the loss, if it has any."""
    metrics = objective.metrics(loss, split_sums(objective, sums)) if sums else {}
    return {f"train/{name}": value for name, value in metrics.items()}


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make the random numbers of a step (dropout) a function of (seed, step, rank), so that none need saving."""
    value = int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest())
    # torch.manual_seed would, on a machine without a GPU, keep a formatted stack of every call for ever.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
