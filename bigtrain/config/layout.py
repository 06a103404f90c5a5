"""How the ranks of a run are laid out: the sizes of the mesh's axes as integers, which need no process group."""

import dataclasses
import math
from dataclasses import dataclass

from bigtrain.config import EngineConfig, EngineKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The axes of the mesh, the slowest network first."""

    dp_replicate: int = 1
    """Copies of the state."""
    dp_shard: int = 1
    """Ranks that share one copy of the state."""

    @property
    def axes(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @property
    def world_size(self) -> int:
        return math.prod(self.axes.values())

    @property
    def dp_size(self) -> int:
        """Ranks that load different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def copies(self) -> int:
        """Ranks that load the same samples."""
        return self.world_size // self.dp_size


def layout_of(engine: EngineConfig, *, world_size: int, local_world_size: int) -> Layout:
    """Return the layout of a checked configuration: ``fsdp`` and ZeRO share one copy of the state among all ranks."""
    dp_shard = world_size
    if engine.kind in (EngineKind.ddp, EngineKind.accelerate):
        dp_shard = 1
    elif engine.kind is EngineKind.hsdp:
        dp_shard = engine.dp_shard or local_world_size
    return Layout(dp_replicate=world_size // dp_shard, dp_shard=dp_shard)
