"""The checkpoints of a run: found by name, set aside when damaged, deleted when no longer kept."""

import dataclasses
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bigtrain.checkpoint.manifest import (
    MANIFEST_FILE,
    RUN_STATE_FILE,
    FileRecord,
    Manifest,
    TensorRecord,
    encode_manifest,
    read_manifest,
    verify_bytes,
    verify_file,
    write_hashed,
)
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.schema import from_dict

MIN_KEPT = 2
"""So many of the newest are kept whatever ``keep`` says: the newest may turn out to be damaged."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Everything besides tensors that a run continues from."""

    step: int
    """Completed optimizer steps. Learning rate and random numbers follow from it and from the configuration."""
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
    validation_loss: float | None = None
    """Loss of the validation at this step, if there was one."""


def checkpoints_directory(run_directory: Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return run_directory / "checkpoints"


def checkpoint_path(run_directory: Path, step: int) -> Path:
    """Return the directory of the complete checkpoint of a step."""
    return checkpoints_directory(run_directory) / f"step-{step:08d}"


def find_checkpoints(run_directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first; what a kill left behind has other names."""
    found = checkpoints_directory(run_directory).glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d{8,}", p.name)), key=step_of)


def find_damaged(run_directory: Path) -> list[Path]:
    """Return the checkpoints of a run that were set aside."""
    return sorted(checkpoints_directory(run_directory).glob("step-*.damaged-*"))


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's directory."""
    return int(path.name.removeprefix("step-"))


def read_run_state(path: Path) -> RunState:
    """Return the run state of a checkpoint.

    Raises:
        CheckpointError: there is no complete checkpoint at ``path``.
    """
    try:
        return RunState(**json.loads((path / RUN_STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error


def commit(
    partial: Path, final: Path, run_state: RunState, files: list[FileRecord], tensors: list[TensorRecord]
) -> None:
    """Turn a directory into which all ranks have written durably into a complete checkpoint.

    The rename is what makes it one; before, there is none, and whatever happens afterwards it is whole.
    """
    text = json.dumps(dataclasses.asdict(run_state), indent=1).encode()
    state_file = _write_durably(partial / RUN_STATE_FILE, text)
    manifest = Manifest(files=[*files, state_file], tensors=_merge(tensors))
    _write_durably(partial / MANIFEST_FILE, encode_manifest(manifest))
    sync_directory(partial)
    if final.exists():
        raise FileExistsError(f"{final} exists; a checkpoint is never overwritten")
    os.rename(partial, final)
    sync_directory(final.parent)


def _merge(tensors: list[TensorRecord]) -> list[TensorRecord]:
    merged: dict[str, TensorRecord] = {}
    for tensor in tensors:
        if tensor.key in merged:
            merged[tensor.key].chunks.extend(tensor.chunks)
        else:
            merged[tensor.key] = tensor
    return list(merged.values())


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for a whole one, and return its new name."""
    for number in range(1000):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not aside.exists():
            os.rename(path, aside)
            return aside
    raise CheckpointError(f"{path}: a thousand damaged copies stand beside it; remove them")


def prune(run_directory: Path, keep: str) -> None:
    """Delete the checkpoints that are not to be kept, and what killed saves left behind.

    Args:
        run_directory: of the run; nobody is saving into it.
        keep: as ``checkpoint.keep``: rules separated by commas; whatever one of them keeps is kept.
    """
    found = find_checkpoints(run_directory)
    kept = {path for rule in keep.split(",") for path in _kept_by(rule.split(), found)} | set(found[-MIN_KEPT:])
    for path in found:
        if path not in kept:
            # Deleting takes a while; what is half deleted must not look complete.
            doomed = path.with_name(f"{path.name}.deleting")
            os.rename(path, doomed)
    for path in checkpoints_directory(run_directory).glob("step-*"):
        if ".tmp-" in path.name or path.name.endswith(".deleting"):
            shutil.rmtree(path, ignore_errors=True)


def _kept_by(rule: list[str], found: list[Path]) -> list[Path]:
    match rule:
        case ["all"]:
            return found
        case ["latest", number]:
            return found[-int(number) :]
        case ["every", number]:
            return [path for path in found if step_of(path) % int(number) == 0]
        case ["best"]:
            losses = {path: read_run_state(path).validation_loss for path in found}
            validated = [path for path in found if losses[path] is not None]
            return [min(validated, key=lambda path: losses[path])] if validated else []
    raise AssertionError(rule)


def _write_durably(path: Path, data: bytes) -> FileRecord:
    digest = xxhash.xxh3_128()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_hashed(descriptor, memoryview(data), digest)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(name=path.name, num_bytes=len(data), xxh3=digest.hexdigest())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
