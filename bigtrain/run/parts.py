"""Output that all ranks make, a part at a time: killed and started again, only the rest is made, at any world size."""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from bigtrain.distributed.collectives import on_rank0
from bigtrain.errors import ConfigError, as_data_error
from bigtrain.files import read_json, write_anew
from bigtrain.log import get_logger
from bigtrain.telemetry.text import format_duration

T = TypeVar("T")

REQUEST_FILE = "request.json"
_SAY_EVERY_SECONDS = 10.0


def make_parts(
    out: Path, parts: Mapping[Path, T], request: Mapping[str, str], make: Callable[[T | None], str | bytes]
) -> None:
    """Have each part written by one of the ranks, which all call this; return when all are there.

    ``parts`` says what each file, all in one directory, is made of: ``make`` returns its content, and is called equally
    often on all ranks, with None where no part is left. ConfigError: ``out``, which the parts are of, exists or cannot
    be written, or there are parts of another ``request``, which decides their content. DataError: a part cannot be written.
    """
    paths, rank, world_size = list(parts), dist.get_rank(), dist.get_world_size()
    todo = on_rank0(partial(_begin, out, paths, request))
    begin = said = time.monotonic()
    for first in range(0, len(todo), world_size):
        now = todo[first : first + world_size]
        mine = paths[now[rank]] if rank < len(now) else None
        content = make(parts[mine] if mine else None)
        if mine:
            with as_data_error(mine, problem="cannot be written", advice="; make room, the same command goes on"):
                write_anew(mine, content)
        if time.monotonic() - said > _SAY_EVERY_SECONDS:
            said, num_done = time.monotonic(), first + len(now)
            left = format_duration((len(todo) - num_done) * (said - begin) / num_done)
            get_logger().info(f"{num_done} of {len(todo)} parts, {left} left")
    dist.barrier()  # until every rank has written its last part


def _begin(out: Path, parts: list[Path], request: Mapping[str, str]) -> list[int]:
    """Return the numbers of the parts that are still to be made."""
    if out.exists():
        raise ConfigError(f"out={out}: exists already; name another one, or remove it")
    directory = parts[0].parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        before = read_json(directory / REQUEST_FILE)
        if before and before != request:
            changed = ", ".join(key for key in request if before.get(key) != request[key])
            raise ConfigError(f"{directory} has parts of another request ({changed}); remove it, or name another out")
        write_anew(directory / REQUEST_FILE, json.dumps(request))
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error}") from error
    todo = [number for number, part in enumerate(parts) if not part.exists()]
    if len(todo) < len(parts):
        get_logger().info(f"{len(parts) - len(todo)} of {len(parts)} parts are there already")
    return todo
