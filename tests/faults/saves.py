"""Small checkpoints for the tests of faults, whose content says which save it belongs to."""

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from bigtrain.checkpoint.loader import load_checkpoint, verify_checkpoint
from bigtrain.checkpoint.manifest import MANIFEST_FILE, RUN_STATE_FILE
from bigtrain.checkpoint.saver import Saver, SaveReport
from bigtrain.checkpoint.store import RunState, checkpoints_directory, read_run_state
from bigtrain.config import CheckpointConfig, Verify
from bigtrain.distributed.collectives import init_process_group
from bigtrain.engine.state import Box, Entry
from bigtrain.processes import RankInfo

SHAPES = {
    "model.weight": (64, 48),
    "model.bias": (48,),
    "optim.state.weight.exp_avg": (64, 48),
    "optim.state.weight.step": (),
}
NUM_VALUES = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def join() -> None:
    """Join the process group; a world of one uses no port, so that its copies do not meet there."""
    info = RankInfo.from_env()
    if info.world_size == 1:
        os.environ.pop("MASTER_ADDR", None)
    torch.set_num_threads(1)
    init_process_group(info, torch.device("cpu"), timeout_seconds=60)


def make_state(step: int | None, *, whole: bool = False, scale: int = 1) -> dict[str, Entry]:
    """Return this rank's rows of the state after ``step``: no value occurs twice or in another step.

    Args:
        step: None for a state to load into.
        whole: all rows, as on a world of one.
        scale: factor of the first dimension of everything that has one.
    """
    rank, world_size = (0, 1) if whole else (dist.get_rank(), dist.get_world_size())
    entries, first = {}, 1
    for key, shape in SHAPES.items():
        shape = (shape[0] * scale, *shape[1:]) if shape else ()
        values = torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        first += values.numel()
        values = values + step * 2**20 if step is not None else torch.full(shape, torch.nan)
        rows = shape[0] if shape else 1
        begin, end = rows * rank // world_size, rows * (rank + 1) // world_size
        if shape:
            boxes = (Box((begin, *(0 for _ in shape[1:])), values[begin:end]),)
        else:
            boxes = (Box((), values),) if rank == world_size - 1 else ()
        entries[key] = Entry(shape, torch.float32, boxes)
    return entries


def make_run_state(
    step: int, config: Mapping[str, Any] | None = None, loss: float | None = None, world_size: int = 1
) -> RunState:
    return RunState(step, 16 * step, step, "synthetic", dict(config or {}), {"bigtrain": "0"}, world_size, loss)


def save(
    directory: Path,
    *steps: int,
    keep: str = "latest 2",
    asynchronous: bool = False,
    scale: int = 1,
    config: Mapping[str, Any] | None = None,
) -> list[SaveReport]:
    """Save the states of ``steps`` one after the other."""
    entries = make_state(0, scale=scale)
    saver = Saver(directory, entries, CheckpointConfig(keep=keep, asynchronous=asynchronous))
    reports = []
    for step in steps:
        for key, entry in make_state(step, scale=scale).items():
            for box, new in zip(entries[key].boxes, entry.boxes, strict=True):
                box.view.copy_(new.view)
        saver.save(make_run_state(step, config, world_size=dist.get_world_size()))
        saver.wait_until_staged()
        for entry in entries.values():
            for box in entry.boxes:
                box.view.fill_(-1)  # training goes on
        reports.append(saver.finish())
    return reports


def save_all(directory: Path, steps: tuple[int, ...], options: Mapping[str, Any] | None = None) -> None:
    """Save with success; for a rank that has joined nothing yet."""
    join()
    for report in save(directory, *steps, **(options or {})):
        assert report.error is None, report.error


def whole_step(path: Path, *, scale: int = 1) -> int:
    """Verify and load a checkpoint and return its step; its tensors, all of them, are that step's."""
    problems = verify_checkpoint(path, Verify.full)
    assert problems == [], f"{path} is damaged: {problems}"
    step = read_run_state(path).step
    state = make_state(None, whole=True, scale=scale)
    load_checkpoint(path, state)
    for key, entry in make_state(step, whole=True, scale=scale).items():
        assert torch.equal(state[key].boxes[0].view, entry.boxes[0].view), f"{path}: {key} is a mixture"
    return step


def names(directory: Path) -> list[str]:
    """Return what lies among the checkpoints of a run."""
    return sorted(path.name for path in checkpoints_directory(directory).iterdir())


def in_fork(function: Callable[..., object], *args: object) -> int:
    """Call a function in a copy of this process, which has no threads yet; return its exit code or minus the signal."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        function(*args)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def kill_here() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def copy_run(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to))


def forge_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a checkpoint as somebody would who knows how its hash is made."""
    values = json.loads((path / MANIFEST_FILE).read_bytes().partition(b"\n")[2])
    change(values)
    write_manifest(path, json.dumps(values).encode())


def write_manifest(path: Path, body: bytes) -> None:
    (path / MANIFEST_FILE).write_bytes(xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body + b"\n")


def forge_file(path: Path, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint and what the manifest says of it."""
    (path / name).write_bytes(data)

    def change(values: dict[str, Any]) -> None:
        for file in values["files"]:
            if file["name"] == name:
                file.update(num_bytes=len(data), xxh3=xxhash.xxh3_128_hexdigest(data))

    forge_manifest(path, change)


def forge_run_state(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((path / RUN_STATE_FILE).read_text())
    change(values)
    forge_file(path, RUN_STATE_FILE, json.dumps(values).encode())


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of everything inside JSON."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*place, key))
