"""Losses of a sample that depend on all others of a step, equal at any number of ranks and micro-batches.

All embeddings are computed once without a gradient and gathered; every rank computes the whole loss and its gradient by
each embedding, which is what the second pass backpropagates, a micro-batch at a time (Gao et al., "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", 2021).
"""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bigtrain.data.read.batch import Batch
from bigtrain.engine.base import Engine


def coupled(engine: Engine, micro_batches: Sequence[Batch], *, trains: bool) -> Sequence[Batch]:
    """Return the micro-batches of a step with ``gradients`` of their embeddings and ``rows`` of losses and metrics.

    Those of objectives without ``couple`` are returned as they are. All ranks call this, with as many samples.
    ``trains`` draws the random numbers of the second pass.
    """
    objective: Any = engine.objective
    if not hasattr(objective, "couple"):
        return micro_batches
    batches = [batch.to(engine.device) for batch in micro_batches]
    engine.module.train(trains)
    devices = [engine.device] if engine.device.type == "cuda" else []
    autocast = getattr(engine, "autocast", contextlib.nullcontext)
    with torch.no_grad(), torch.random.fork_rng(devices), autocast():
        network = partial(engine.module, predicts=True)
        own = torch.cat([objective.embed(network, *batch.values()) for batch in batches], dim=1)
    size, mesh = own.shape[1], engine.mesh
    mine = slice(mesh.dp_rank * size, (mesh.dp_rank + 1) * size)
    whole = own.new_zeros(2, size * mesh.dp_size, own.shape[2])
    whole[:, mine] = own
    counted = torch.zeros(size * mesh.dp_size, dtype=torch.int64, device=engine.device)
    counts = [objective.count({name: tensor.numpy() for name, tensor in batch.items()}) for batch in micro_batches]
    counted[mine] = torch.cat([torch.from_numpy(count) for count in counts]).to(engine.device)
    whole = mesh.total(whole).requires_grad_()
    rows = objective.couple(whole, mesh.total(counted) > 0)
    (gradients,) = torch.autograd.grad(rows[:, 0].sum(), whole)
    found = Batch(gradients=gradients[:, mine].transpose(0, 1), rows=rows.detach()[mine])
    parts = found.split(size // len(batches))
    return [Batch({**batch, **part}) for batch, part in zip(batches, parts, strict=True)]
