"""Processes of a launch: which rank this one is, and how one is started beside the ranks. No torch.

The only place that reads the launchers' environment variables.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.errors import ConfigError

STOP_SIGNALS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What ends ranks in order: a closed terminal, its keys, a limit of CPU time, launchers and batch systems."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Position of this process in the world."""

    rank: int  # 0 ... world_size - 1 over all nodes
    world_size: int  # number of processes
    local_rank: int  # 0 ... local_world_size - 1 on this node
    local_world_size: int  # number of processes on this node

    @staticmethod
    def from_env() -> "RankInfo":
        """Read what launchers set, by default rank 0 of 1; ConfigError if it is no number or beyond the world size."""
        world_size = _number("WORLD_SIZE", 1)
        # The deepspeed launcher has a name of its own for it.
        local_name = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
        info = RankInfo(_number("RANK", 0), world_size, _number("LOCAL_RANK", 0), _number(local_name, world_size))
        if info.rank >= info.world_size or info.local_rank >= info.local_world_size:
            raise ConfigError(
                f"RANK={info.rank} of WORLD_SIZE={info.world_size}, LOCAL_RANK={info.local_rank} of "
                f"{local_name}={info.local_world_size}: ranks count from 0 and are below the sizes"
            )
        return info

    def publish(self) -> None:
        """Put into the environment what libraries read there; launchers leave it out for a single process."""
        for name, value in (("RANK", self.rank), ("WORLD_SIZE", self.world_size), ("LOCAL_RANK", self.local_rank)):
            os.environ.setdefault(name, str(value))


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not (value.isascii() and value.isdecimal()):
        raise ConfigError(f"{name}={value} in the environment is no number; a launcher such as torchrun sets it")
    return int(value)


def master_address() -> tuple[str, int]:
    """Return where the ranks find each other; ConfigError if the environment does not say so."""
    host, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", 0)
    if not host or not 0 < port < 2**16:
        raise ConfigError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} needs MASTER_ADDR and MASTER_PORT (1 to 65535), the node of rank 0 and a "
            "free port there, the same for all ranks; torchrun sets them"
        )
    return host, port


def has_agent_store() -> bool:
    """Return whether the store at :func:`master_address` is torchrun's, and rank 0 serves none."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def interface_names(present: Sequence[str], *, cuda: bool) -> Iterator[tuple[str, str, bool]]:
    """Yield the variables that name network interfaces, their values, and whether those are among ``present``.

    gloo takes names, NCCL the beginnings of names, or names after ``=``; what ``^`` excludes need not be there
    (NCCL's documentation of NCCL_SOCKET_IFNAME).
    """
    if value := os.environ.get("GLOO_SOCKET_IFNAME"):
        yield "GLOO_SOCKET_IFNAME", value, all(name.partition(":")[0] in present for name in value.split(","))
    if (value := os.environ.get("NCCL_SOCKET_IFNAME")) and cuda and not value.startswith("^"):
        exact, names = value.startswith("="), value.removeprefix("=").split(",")
        found = (there == name or (not exact and there.startswith(name)) for there in present for name in names)
        yield "NCCL_SOCKET_IFNAME", value, any(found)


LAUNCHERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "mpirun_rsh": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "flux": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
}
"""Programs that start processes of which each would take itself for a whole run, and how these know of each other."""


def lone_ranks() -> str | None:
    """Say why this process must not train by itself: it is one of several that were not told to be ranks."""
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


def num_usable_cpus() -> int:
    """Return how many processors this process may run on; macOS does not bind processes to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def only_zero_is_success() -> bool:
    """Return whether the launcher would report a stop's own code as a failure, and --max-restarts undo the stop."""
    return bool(os.environ.keys() & {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"})


def start_beside(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Start a process that ends by itself when the ranks have; signals that stop ranks never reach it.

    A terminal sends them to a whole session, and Slurm to every process of a step, also to one that has just begun.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the new process has the same mask, for good
    try:
        return subprocess.Popen(command, start_new_session=True, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
