"""Who this process is: the only place that reads the launchers' environment variables. No torch."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Position of this process in the world."""

    rank: int
    """0 ... world_size - 1 over all nodes."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """0 ... local_world_size - 1 on this node."""
    local_world_size: int
    """Number of processes on this node."""

    @staticmethod
    def from_env() -> "RankInfo":
        """Read what torchrun, ``accelerate launch`` or ``deepspeed`` set; a plain process is rank 0 of 1."""
        world_size = os.environ.get("WORLD_SIZE", "1")
        # The deepspeed launcher has a name of its own for it.
        local_world_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size
        return RankInfo(
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(world_size),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_world_size=int(local_world_size),
        )

    def publish(self) -> None:
        """Put into the environment what libraries read there; launchers leave it out for a single process."""
        for name, value in (("RANK", self.rank), ("WORLD_SIZE", self.world_size), ("LOCAL_RANK", self.local_rank)):
            os.environ.setdefault(name, str(value))


def only_zero_is_success() -> bool:
    """Return whether the launcher would report a stop's own code as a failure, and --max-restarts undo the stop."""
    return bool(os.environ.keys() & {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"})
