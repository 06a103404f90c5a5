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


LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "mpirun_rsh": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "flux": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
}
"""Programs that start processes of which each would take itself for a whole run, and how these know of each other."""


def lone_ranks() -> str | None:
    """Say why this process must not train by itself: it is one of several, and nobody has told them that they are ranks."""
    if "RANK" in os.environ:
        return None
    for launcher, (size, rank) in LAUNCHERS.items():
        number, count = os.environ.get(rank, ""), os.environ.get(size, "1")
        if number.isdecimal() and count.isdecimal() and (int(number) > 0 or int(count) > 1):
            return (
                f"{launcher} has started several processes ({rank}={number}), each of which would train a run of its own: let "
                "it start one torchrun per node, as slurm/train.sbatch does, and torchrun the ranks; with RANK=0 "
                "WORLD_SIZE=1 in the environment a process trains by itself on purpose"
            )
    return None


def only_zero_is_success() -> bool:
    """Return whether the launcher would report a stop's own code as a failure, and --max-restarts undo the stop."""
    return bool(os.environ.keys() & {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"})
