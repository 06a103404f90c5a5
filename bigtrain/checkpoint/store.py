"""Checkpoints of a run on disk: written beside, renamed when complete, found by name.

``<run>/checkpoints/step-00001000/`` holds an ordinary DCP checkpoint and ``run_state.json``. A
directory with that name is complete; what a kill leaves behind has ``.tmp-`` in its name.
"""

import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from bigtrain.checkpoint.planner import EntryLoadPlanner, EntrySavePlanner
from bigtrain.distributed import broadcast_json
from bigtrain.engine.state import Entry
from bigtrain.errors import CheckpointError

RUN_STATE_FILE = "run_state.json"


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything besides tensors that a run continues from."""

    step: int
    """Completed optimizer steps. Learning rate and random numbers follow from it."""
    tokens: int
    """Tokens trained on."""
    samples: int
    """Sequences trained on: the cursor of the data order."""
    data_fingerprint: str
    """What the samples are numbers of."""
    config: dict[str, Any]
    """The resolved configuration."""
    versions: dict[str, str]
    """Software that wrote the checkpoint."""
    world_size: int
    """Ranks that wrote the checkpoint."""


def checkpoints_directory(run_directory: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return run_directory / "checkpoints"


def find_checkpoints(run_directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    directory = checkpoints_directory(run_directory)
    found = [p for p in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_run_state(path: Path) -> RunState:
    """Return the run state of a checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint at ``path``.
    """
    try:
        return RunState(**json.loads((path / RUN_STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error


def save_checkpoint(run_directory: Path, entries: Mapping[str, Entry], run_state: RunState) -> Path:
    """Write a checkpoint; every rank calls this and it is complete when it returns.

    Returns:
        The directory of the checkpoint.
    """
    final = checkpoints_directory(run_directory) / f"step-{run_state.step:08d}"
    attempt = broadcast_json(uuid.uuid4().hex[:8])
    directory = final.with_name(f"{final.name}.tmp-{attempt}")
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    dcp.save({}, storage_writer=dcp.FileSystemWriter(directory), planner=EntrySavePlanner(entries))
    if dist.get_rank() == 0:
        _write_durably(directory / RUN_STATE_FILE, json.dumps(dataclasses.asdict(run_state), indent=1))
        directory.rename(final)
        _sync_directory(final.parent)
    dist.barrier()
    return final


def load_checkpoint(path: Path, entries: Mapping[str, Entry]) -> None:
    """Fill the boxes of ``entries`` from the checkpoint at ``path``; every rank, or one process without a group.

    Raises:
        CheckpointError: tensors are missing or have other shapes.
    """
    try:
        dcp.load(
            {},
            storage_reader=dcp.FileSystemReader(path),
            planner=EntryLoadPlanner(entries),
            no_dist=not dist.is_initialized(),
        )
    except dcp.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path}: {first}") from error


def prune_checkpoints(run_directory: Path, keep: str) -> None:
    """Delete old checkpoints as ``keep`` (``all`` or ``latest N``) says, and what killed saves left behind."""
    directory = checkpoints_directory(run_directory)
    stale = list(directory.glob("step-*.tmp-*"))
    if keep != "all":
        stale += find_checkpoints(run_directory)[: -int(keep.removeprefix("latest "))]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
