"""Where a rank stands among the others: the named mesh, and which ranks load the same samples."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bigtrain.config.layout import Layout
from bigtrain.distributed.collectives import all_reduce_sum


@dataclass(frozen=True, slots=True)
class Mesh:
    """All ranks by the axes of their layout, and this rank's place."""

    ranks: DeviceMesh  # with the axes of :class:`Layout`, by name
    dp_rank: int  # which part of a global batch this rank loads
    dp_size: int  # into how many parts a global batch is cut
    copies: int = 1  # how many ranks load the same part, and so count the same targets and the same loss
    tp_rank: int = 0  # which part of every shared matrix this rank holds
    tp_size: int = 1  # into how many parts such a matrix is cut
    state: ProcessGroup | None = None  # the ranks that hold one copy of the state together; None where it is one rank

    @property
    def rank(self) -> int:
        return self.ranks.get_rank()

    @property
    def size(self) -> int:
        return self.ranks.size()

    @property
    def tp(self) -> ProcessGroup:
        """The ranks that share every matrix."""
        return self.ranks.get_group("tp")

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Return sums over samples, of which each rank gives those of its own, added up over the ranks, in place."""
        total = all_reduce_sum(sums)
        if self.copies > 1:
            total = total / self.copies if total.is_floating_point() else total // self.copies
        return total

    def of_first(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of the first of the ranks that load the same samples, in place."""
        if self.copies > 1:
            dist.broadcast(values, group=self.tp, group_src=0)
        return values


def build_mesh(device: torch.device, layout: Layout) -> Mesh:
    """Build the mesh; all ranks call this."""
    axes = layout.axes
    ranks = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    dp_rank = ranks.get_local_rank("dp_replicate") * layout.dp_shard + ranks.get_local_rank("dp_shard")
    num_holders, state = layout.dp_shard * layout.tp, None
    if layout.tp == 1 and num_holders > 1:
        state = ranks.get_group("dp_shard")
    elif num_holders > 1:  # one group, for sums one after the other would give replicas other last bits
        copies = init_device_mesh(device.type, (layout.dp_replicate, num_holders), mesh_dim_names=("copies", "state"))
        state = copies.get_group("state")
    return Mesh(ranks, dp_rank, layout.dp_size, layout.copies, ranks.get_local_rank("tp"), layout.tp, state)
