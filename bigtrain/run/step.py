"""One optimizer step, with the loss per target of all ranks, and its numbers on the host."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from bigtrain.data.read.loader import StepBatch
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.base import Engine
from bigtrain.run.coupling import coupled
from bigtrain.tasks.base import Objective, split_sums


def train_step(
    engine: Engine, batch: StepBatch, lr: float, *, before_update: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one optimizer step; the loss is the mean over the targets of all ranks, never a mean of means.

    Returns this rank's addend of the loss and of the objective's other sums, ``(1 + K,)`` or 0-d, and the global
    gradient norm, 0-d; both on the device, without waiting for it.
    """
    num_targets: torch.Tensor | int | None = batch.global_num_targets
    if num_targets is None:
        num_targets = engine.mesh.total(torch.full((), batch.num_targets, device=engine.device))
        num_targets = num_targets.where(num_targets > 0, 1)
    micro_batches = coupled(engine, batch.micro_batches, trains=True)
    sums = engine.forward_backward(micro_batches, num_targets=num_targets)
    before_update()
    grad_norm = engine.step(lr)
    return torch.cat([sums[:1] / num_targets, sums[1:]]) if sums.ndim else sums / num_targets, grad_norm


def read_back(pending: list[dict[str, Any]], objective: Objective, mesh: Mesh) -> list[dict[str, Any]]:
    """Wait for the device, all-reduce the losses, and return the pending records, cleared, as plain numbers."""
    sums = mesh.total(torch.stack([record["loss"] for record in pending])).view(len(pending), -1)
    norms = torch.stack([record["grad_norm"] for record in pending])
    records = []
    for record, (loss, *rest), norm in zip(pending, sums.tolist(), norms.tolist(), strict=True):
        metrics = objective.metrics(loss, split_sums(objective, rest)) if rest else {}
        train = {f"train/{name}": value for name, value in metrics.items()}
        records.append({**record, "loss": loss, "grad_norm": norm, **train})
    pending.clear()
    return records


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed dropout by (seed, step, rank), so that no random state is saved."""
    value = int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest())
    # torch.manual_seed would, without a GPU, keep a formatted stack of every call for ever.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
