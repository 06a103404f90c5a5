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
    cp: ProcessGroup | None = None  # the ranks that share every sequence; None where it is one rank
    token_multiple: int = 1  # what the length of a sequence divides by
    experts: DeviceMesh | None = (
        None  # the same ranks as ``replicate``, ``efsdp``, ``ep``, where experts are shared out
    )
    pp_rank: int = 0  # which of the ranks that have some blocks each this is
    pp_size: int = 1  # among how many ranks the blocks are dealt out

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

    @property
    def pp(self) -> ProcessGroup:
        """The ranks that have some blocks each."""
        return self.ranks.get_group("pp")

    def replica_of(self, *, is_expert: bool) -> tuple[int, int]:
        """Return which of the ranks with the same part of a whole tensor this is, and how many there are."""
        if self.experts is None or not is_expert:
            return self.replica, self.num_replicas
        sizes = self.experts.size(0), self.experts.size(1)
        place = self.experts.get_local_rank("replicate"), self.experts.get_local_rank("efsdp")
        return place[0] * sizes[1] + place[1], sizes[0] * sizes[1]

    @property
    def replica(self) -> int:
        """Which of the ranks with the same part of every matrix this is."""
        return self.rank % (self.size // self.pp_size) // self.tp_size

    @property
    def num_replicas(self) -> int:
        return self.size // self.pp_size // self.tp_size

    def of_sequences(self, sums: torch.Tensor) -> torch.Tensor:
        """Return sums over whole sequences, of which each rank gives what it has computed of them, in place."""
        for group in (self.cp, self.pp if self.pp_size > 1 else None):
            if group is not None:
                dist.all_reduce(sums, group=group)
        return sums

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Return sums over samples, of which each rank gives those of its own, added up over the ranks, in place."""
        total = all_reduce_sum(sums)
        if self.copies > 1:
            total = total / self.copies if total.is_floating_point() else total // self.copies
        return total

    def of_first(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of the first of the ranks that load the same samples, in place."""
        for group in (self.cp, self.tp if self.tp_size > 1 else None):
            if group is not None:
                dist.broadcast(values, group=group, group_src=0)
        return values


def build_mesh(device: torch.device, layout: Layout) -> Mesh:
    """Build the mesh; all ranks call this."""
    axes = layout.axes
    ranks = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    num_holders, state, cp = layout.dp_shard * layout.tp, None, None
    if layout.tp == layout.pp == 1 and num_holders > 1:
        state = ranks.get_group("dp_shard")
    elif num_holders * layout.pp > 1:  # one group, for sums one after the other would give replicas other last bits
        places = torch.arange(layout.world_size).view(layout.pp, layout.dp_replicate, num_holders)
        places = places.transpose(0, 1).reshape(layout.dp_replicate, -1)
        state = DeviceMesh(device.type, places, mesh_dim_names=("copies", "state")).get_group("state")
    if layout.cp > 1:
        sizes = layout.pp, layout.dp_size, layout.cp, layout.tp
        cp = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "dp", "cp", "tp")).get_group("cp")
    experts = None
    if layout.ep > 1:
        axes = layout.expert_axes
        experts = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        state = state or experts.get_group("ep")
    stage_size = layout.world_size // layout.pp
    return Mesh(
        ranks,
        dp_rank=ranks.get_rank() % stage_size // (layout.cp * layout.tp),
        dp_size=layout.dp_size,
        copies=layout.copies,
        tp_rank=ranks.get_local_rank("tp"),
        tp_size=layout.tp,
        state=state,
        cp=cp,
        token_multiple=layout.token_multiple,
        experts=experts,
        pp_rank=ranks.get_rank() // stage_size,
        pp_size=layout.pp,
    )
