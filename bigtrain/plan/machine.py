"""Memory that a rank can have."""

from dataclasses import dataclass
from pathlib import Path

NO_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class Machine:
    """What a rank runs on."""

    world_size: int  # number of ranks
    local_world_size: int  # ranks on this node
    device_type: str  # ``cuda`` or ``cpu``
    available_bytes: int  # what one rank can have on its device; on a CPU that is host memory
    available_host_bytes: int  # what one rank can have of the host's memory


def available_bytes(device_type: str, local_world_size: int) -> int:
    """Return the memory of one rank: its GPU's, or its share of what host and control group give without swapping."""
    if device_type == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return min(psutil.virtual_memory().available, cgroup_headroom_bytes()) // local_world_size


def cgroup_headroom_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the smallest distance to a memory limit of this process's control groups; inactive pages are free."""
    headrooms = [NO_LIMIT]
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        v1 = "memory" in controllers.split(",")
        if controllers and not v1:
            continue
        top = root / "memory" if v1 else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        # In a container the path is often the host's, and the limit is at the top.
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(top) and (directory / names[0]).exists():
                headrooms.append(_headroom_bytes(directory, *names))
    return min(headrooms)


def _headroom_bytes(directory: Path, limit_name: str, usage_name: str) -> int:
    limit = (directory / limit_name).read_text().strip()
    if limit == "max":
        return NO_LIMIT
    stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, int(limit) - int((directory / usage_name).read_text()) + reclaimable)
