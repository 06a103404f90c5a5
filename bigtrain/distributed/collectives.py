"""How this process talks to the others: the only place that starts and ends the process group."""

import datetime
import json
import math
import os
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from bigtrain import errors
from bigtrain.distributed.rendezvous import Patience, in_slices, meet, require_interfaces
from bigtrain.errors import BigtrainError, ConfigError, NetworkError, first_line
from bigtrain.log import get_logger
from bigtrain.processes import RankInfo


def pick_device(info: RankInfo) -> torch.device:
    """Return this rank's GPU, made current, or the CPU where there is none; warn of GPUs that torch cannot use."""
    if not torch.cuda.is_available():
        if info.local_rank == 0 and (unused := unused_gpus()):
            get_logger().error(unused)  # so that the first rank of every node says it
        return torch.device("cpu")
    if info.local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"{info.local_world_size} ranks on this node, but {torch.cuda.device_count()} GPUs; start as many "
            "(--nproc-per-node), or CUDA_VISIBLE_DEVICES= for the CPU"
        )
    device = torch.device("cuda", info.local_rank)
    torch.cuda.set_device(device)
    return device


def unused_gpus() -> str | None:
    """Say which GPUs the driver lists and why torch cannot use them; None if there are none, or they are hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    if not (gpus := [line.strip() for line in listed if line.strip()]):
        return None
    name, _, driver = gpus[0].rpartition(", ")
    try:
        torch.cuda.init()
        reason = "it sees no device"
    except Exception as error:  # an AssertionError of a build for CPUs, a RuntimeError of an old driver
        reason = first_line(error).partition(". ")[0]
    needs = f"; its build needs a driver for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return (
        f"training on the CPU, though nvidia-smi lists {len(gpus)} x {name} (driver {driver}), for torch "
        f"{torch.__version__} cannot use them: {reason}{needs}"
    )


def init_process_group(info: RankInfo, device: torch.device, *, timeout_seconds: float = 1800.0) -> None:
    """Start the default process group: gloo for CPU tensors, and nccl for CUDA tensors on a GPU.

    ConfigError: an address, a port or an interface is of no use, or another rank cannot begin. NetworkError: ranks do
    not find or reach each other in time.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    require_interfaces(cuda=device.type == "cuda")
    store = meet(info, timeout_seconds=timeout_seconds) if info.world_size > 1 else dist.HashStore()

    def connect() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread would use GPU 0
        gpu = device if device.type == "cuda" else None  # NCCL would guess it in the first collective
        dist.init_process_group(
            backend, timeout=timeout, rank=info.rank, world_size=info.world_size, store=store, device_id=gpu
        )

    try:
        in_slices(connect, Patience(math.inf), "connections to the other ranks")
    except RuntimeError as error:
        raise NetworkError(
            f"{socket.gethostname()} cannot connect to the other ranks: {first_line(error)}; GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME choose the network interface"
        ) from error


def shut_down() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all ranks in place and return it; no communication in a world of one."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def broadcast_json(value: Any, *, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's JSON-able ``value`` on every rank of ``group``, by default all."""
    if dist.get_world_size() == 1:
        return value
    payload = _encode(value)
    size = torch.tensor([payload.numel()])
    dist.broadcast(size, 0, group=group)
    if dist.get_rank() != 0:
        payload = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(payload, 0, group=group)
    return json.loads(payload.numpy().tobytes())


def gather_json(value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the JSON-able ``value`` of every rank, in rank order, on rank 0; an empty list elsewhere."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return [value]
    payload = _encode(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([payload.numel()]), group=group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[: payload.numel()] = payload
    is_root = dist.get_rank() == 0
    payloads = [torch.empty_like(padded) for _ in range(world_size)] if is_root else None
    dist.gather(padded, payloads, dst=0, group=group)
    return [json.loads(p[: int(n)].numpy().tobytes()) for p, n in zip(payloads or [], sizes, strict=False)]


def differing_rank(value: Any) -> int | None:
    """Return the first rank whose JSON-able ``value`` is not rank 0's, on every rank; None if all have the same."""
    found = gather_json(value)
    return broadcast_json(next((rank for rank, other in enumerate(found) if other != found[0]), None))


def on_rank0(function: Callable[[], Any], *, patience: datetime.timedelta | None = None) -> Any:
    """Call ``function`` on rank 0; return its JSON-able value, or raise its BigtrainError, on every rank.

    The others wait for ``patience``, by default as long as for any communication; without a process group there are
    none.
    """
    if not dist.is_initialized():
        return function()
    group = dist.new_group(backend="gloo", timeout=patience) if patience else None
    outcome: dict[str, Any] = {}
    if dist.get_rank() == 0:
        try:
            outcome = {"value": function()}
        except BigtrainError as error:
            outcome = {"error": type(error).__name__, "message": str(error)}
    outcome = broadcast_json(outcome, group=group)
    if "error" in outcome:
        raise errors.of_all_ranks(getattr(errors, outcome["error"])(outcome["message"]))
    return outcome["value"]
