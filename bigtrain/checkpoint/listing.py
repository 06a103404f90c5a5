"""Checkpoints of a run and their condition, for the command line; without torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint.manifest import MANIFEST_FILE
from bigtrain.checkpoint.store import (
    RunState,
    checkpoints_directory,
    find_damaged,
    find_leftovers,
    find_problems,
    is_complete,
    read_run_state,
)
from bigtrain.config import Verify
from bigtrain.errors import CheckpointError, UnreadableError
from bigtrain.files import such_as_runs


@dataclass(frozen=True, slots=True)
class Listed:
    """One directory among the checkpoints of a run."""

    path: Path
    step: int
    num_bytes: int  # size of its files
    run_state: RunState | None  # None if it cannot be read
    status: str  # ``complete``, ``set aside`` or ``unfinished``
    problems: list[str]  # what is damaged; never looked for in what is unfinished


def list_checkpoints(
    path: Path, verify: Verify, *, progress: Callable[[str], None] = lambda file: None
) -> list[Listed]:
    """Return what lies among the checkpoints of a run, or about one checkpoint.

    Args:
        path: directory of a run, or of a checkpoint.
        verify: applies to complete ones and those that were set aside.
        progress: called with each file that is about to be verified.

    Raises:
        CheckpointError: there is nothing.
    """
    if (path / MANIFEST_FILE).is_file():
        return [_look_at(path, "complete", verify, progress)]
    directory = checkpoints_directory(path)
    found = {other: "complete" for other in directory.glob("step-*") if is_complete(other)}
    found |= dict.fromkeys(find_damaged(path), "set aside") | dict.fromkeys(find_leftovers(path), "unfinished")
    if not found:
        raise CheckpointError(f"{path} has no checkpoints; name the directory of a run{such_as_runs(path)}")
    ordered = sorted(found, key=lambda other: (_step_in(other), other.name))
    return [_look_at(other, found[other], verify, progress) for other in ordered]


def _look_at(path: Path, status: str, verify: Verify, progress: Callable[[str], None]) -> Listed:
    try:
        problems = [] if status == "unfinished" else find_problems(path, verify, progress=progress)
    except UnreadableError as error:
        problems = [str(error)]
    try:
        run_state = read_run_state(path)
    except CheckpointError:
        run_state = None
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Listed(path, _step_in(path, run_state), num_bytes, run_state, status, problems)


def _step_in(path: Path, run_state: RunState | None = None) -> int:
    number = re.match(r"step-(\d+)", path.name)
    return int(number[1]) if number else run_state.step if run_state else 0
