"""One optimizer step, with the loss per target of all ranks, and its numbers on the host."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bigtrain.data.read.batch import Batch
from bigtrain.data.read.loader import StepBatch
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.base import Engine
from bigtrain.tasks.base import Objective, split_sums
from bigtrain.telemetry import names


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
    engine.begin_update(batch.step)
    before_update()
    grad_norm = engine.step(lr)
    if engine.averages[0]:
        torch._foreach_lerp_(*engine.averages, 1 - engine.average_decay)
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


def expert_load(engine: Engine) -> dict[str, float]:
    """Return how uneven the last step's tokens were spread over the experts of a mixture, if there is one."""
    if engine.balance is None or (load := engine.balance.load) is None:
        return {}
    return {names.EXPERT_LOAD: (load.amax(1) / load.mean(1)).max().item()}


def averaged(engine: Engine) -> dict[str, float]:
    """Return how many bytes local steps have sent and saved, if the workers of a run take some."""
    if (told := engine.averaged_bytes) is None:
        return {}
    return {names.SYNC_BYTES: float(told[0]), names.SYNC_BYTES_SAVED: float(told[1])}


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed dropout by (seed, step, rank), so that no random state is saved."""
    value = int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest())
    # torch.manual_seed would, without a GPU, keep a formatted stack of every call for ever.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


def coupled(engine: Engine, micro_batches: Sequence[Batch], *, trains: bool) -> Sequence[Batch]:
    """Return the micro-batches of a step with what their losses depend on of all samples of the step.

    An objective with ``averaged`` gets a ``mean``; one with ``couple`` what :func:`_embedded` adds. ``trains`` draws the
    random numbers of a training pass. All ranks call this, with as many samples.
    """
    objective: Any = engine.objective
    if not (hasattr(objective, "couple") or hasattr(objective, "averaged")):
        return micro_batches
    batches = [batch.to(engine.device) for batch in micro_batches]
    engine.module.train(trains)
    devices = [engine.device] if engine.device.type == "cuda" else []
    autocast = getattr(engine, "autocast", contextlib.nullcontext)
    with torch.no_grad(), torch.random.fork_rng(devices), autocast():
        if hasattr(objective, "averaged"):
            total, number = engine.mesh.total(sum(objective.averaged(engine.module, *b.values()) for b in batches))
            mean = total / number.clamp(min=1)
            return [Batch(batch, mean=mean.expand(len(batch["labels"]))) for batch in batches]
        network = partial(engine.module, predicts=True)
        own = torch.cat([objective.embed(network, *batch.values()) for batch in batches], dim=1)
    counts = [objective.count({name: tensor.numpy() for name, tensor in batch.items()}) for batch in micro_batches]
    counted = torch.cat([torch.from_numpy(count) for count in counts]).to(engine.device)
    parts = _embedded(engine.mesh, objective, own, counted).split(own.shape[1] // len(batches))
    return [Batch({**batch, **part}) for batch, part in zip(batches, parts, strict=True)]


def _embedded(mesh: Mesh, objective: Any, own: torch.Tensor, counted: torch.Tensor) -> Batch:
    """Return ``gradients`` by this rank's embeddings ``(2, N, D)`` of the loss of all ranks' together, and its ``rows``.

    Embeddings are computed once without a gradient and gathered; the second pass backpropagates these gradients, a
    micro-batch at a time (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).
    ``rows`` are losses and metrics by sample; ``counted`` ``(N,)`` says which samples count.
    """
    size = own.shape[1]
    mine = slice(mesh.dp_rank * size, (mesh.dp_rank + 1) * size)
    whole = own.new_zeros(2, size * mesh.dp_size, own.shape[2])
    whole[:, mine] = own
    everyone = torch.zeros(size * mesh.dp_size, dtype=torch.int64, device=own.device)
    everyone[mine] = counted
    whole = mesh.total(whole).requires_grad_()
    rows = objective.couple(whole, mesh.total(everyone) > 0)
    (gradients,) = torch.autograd.grad(rows[:, 0].sum(), whole)
    return Batch(gradients=gradients[:, mine].transpose(0, 1), rows=rows.detach()[mine])
