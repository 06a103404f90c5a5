"""Experts in balance: what an engine does about the routers of mixtures of experts."""

import torch

from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.state import MODEL, EngineState, whole_entry
from bigtrain.models.moe import routers
from bigtrain.tasks.base import canonical_name


class Balance:
    """Moves the biases of the routers after each step by the counts of all ranks, so alike on every layout."""

    def __init__(self, model: torch.nn.Module, state: EngineState, mesh: Mesh) -> None:
        named = list(routers(model))
        self._routers = [router for _, router in named]
        self._mesh = mesh
        speeds = [router.moe.balance_speed * router.weight.requires_grad for router in self._routers]
        self._speeds = torch.tensor(speeds)[:, None]  # a frozen router stays as it is
        self.load: torch.Tensor | None = None  # tokens of the last step by router and expert, fp32 (R, E)
        for name, router in named:
            entry = whole_entry(router.balance, replica=mesh.rank, num_replicas=mesh.size)
            state.entries[f"{MODEL}{canonical_name(name)}.balance"] = entry

    def scale_losses(self, scale: torch.Tensor | float) -> None:
        """Say by what the summed loss is multiplied in the backward passes of this step."""
        for router in self._routers:
            router.loss_scale = scale

    @torch.no_grad()
    def update(self, norm: torch.Tensor) -> None:
        """Prefer experts that saw too few tokens a little more, unless the step's gradient is not finite."""
        counts = self._mesh.total(torch.stack([router.counts for router in self._routers]))
        self.load = counts.float()
        self._speeds = self._speeds.to(counts.device)
        moves = (self.load.mean(1, keepdim=True) - self.load).sign() * self._speeds * norm.isfinite()
        for router, move in zip(self._routers, moves, strict=True):
            router.balance += move
            router.counts.zero_()


def balance_of(module: torch.nn.Module, state: EngineState, mesh: Mesh) -> Balance | None:
    """Return what balances the experts of a wrapped :class:`TaskModel`; None if it has none."""
    return Balance(module, state, mesh) if any(True for _ in routers(module)) else None
