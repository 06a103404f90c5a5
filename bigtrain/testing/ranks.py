"""Run a function on several ranks of this machine, with a hard time-out.

Ranks are forked from a server process that imports torch once, so a call costs a fraction of a second.
"""

import contextlib
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from bigtrain.config import parts

_PORTS = random.SystemRandom()
PRELOAD = ("torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "numpy")


class RankFailedError(Exception):
    """A rank raised, died or did not finish in time; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    environ: Mapping[str, str] | None = None,
) -> list[Any]:
    """Return what a module-level ``function(*args)`` returns on each rank process; RankFailedError names the first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, function.__module__])
    port, processes, connections = free_port(), [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        variables = {**(environ or {}), **_rank_environ(rank, world_size, port)}
        process = context.Process(
            target=_run_rank, args=(sender, variables, parts.imports(), function, args), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        connections.append(receiver)
    try:
        return _collect(processes, connections, time.monotonic() + timeout_seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    """Return a port that nobody listens on, not of those that the system gives to clients: one might take it before us."""
    while True:
        port = _PORTS.randrange(10_000, 20_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port


def _rank_environ(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _run_rank(
    sender: Connection,
    environ: Mapping[str, str],
    imports: list[str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environ)
    import torch

    share = max(1, (os.cpu_count() or 1) // int(environ["WORLD_SIZE"]))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))
    try:
        for typed in imports:
            parts.bring_in(typed)
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise
    finally:
        sender.close()


def _collect(processes: list[Any], connections: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    open_connections = {connection: rank for rank, connection in enumerate(connections)}
    while open_connections:
        ready = wait(list(open_connections), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailedError(f"no result in time from rank {sorted(open_connections.values())}")
        for connection in cast(list[Connection], ready):
            rank = open_connections.pop(connection)
            try:
                succeeded, value = connection.recv()
            except EOFError:
                processes[rank].join(5)
                raise RankFailedError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not succeeded:
                raise RankFailedError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(processes))]
