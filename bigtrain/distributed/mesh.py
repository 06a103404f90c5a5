"""Where a rank stands among the others: the named mesh, and which ranks load the same samples."""

from dataclasses import dataclass

import torch
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

    @property
    def rank(self) -> int:
        return self.ranks.get_rank()

    @property
    def size(self) -> int:
        return self.ranks.size()

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Return sums over samples, of which each rank gives those of its own, added up over the ranks, in place."""
        total = all_reduce_sum(sums)
        if self.copies > 1:
            total = total / self.copies if total.is_floating_point() else total // self.copies
        return total


def build_mesh(device: torch.device, layout: Layout) -> Mesh:
    """Build the mesh; all ranks call this."""
    axes = layout.axes
    ranks = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    dp_rank = ranks.get_local_rank("dp_replicate") * layout.dp_shard + ranks.get_local_rank("dp_shard")
    return Mesh(ranks, dp_rank, layout.dp_size, layout.copies)
