"""Saves that are killed at a chosen moment; imports little, because every killed process is a new one."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bigtrain.checkpoint.manifest import MANIFEST_FILE, RUN_STATE_FILE, Manifest, encode_manifest
from bigtrain.checkpoint.shard import Piece, write_shard
from bigtrain.checkpoint.store import checkpoint_path, checkpoints_directory, find_checkpoints
from bigtrain.files import write_durably
from tests.faults import saves

OPERATIONS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")
OLD = (1, 2)
NEW, NEXT = 3, 4


def die_at(number: int) -> None:
    """Let this process be killed at the ``number``-th moment: before, after, or within a file operation."""
    moments = itertools.count(1)

    def moment() -> None:
        if next(moments) == number:
            saves.kill_here()

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            moment()
            if name == "write":
                half = function(args[0], args[1][: len(args[1]) // 2])
                moment()
                return half + function(args[0], args[1][half:])
            result = function(*args, **kwargs)
            moment()
            return result

        return operation

    for name in OPERATIONS:
        setattr(os, name, wrap(name, getattr(os, name)))


def save_and_die(directory: Path, number: int, rank: int = 0) -> None:
    """Save the new checkpoint, which also deletes the oldest one, on a rank that is killed on the way."""
    saves.join()
    if dist.get_rank() == rank:
        die_at(number)
    (report,) = saves.save(directory, NEW)
    assert report.error is None, report.error


def save_in_place(directory: Path, number: int) -> None:
    """The protocol that is not used: all files, durably and the manifest last, straight under the final name."""
    die_at(number)
    path = checkpoint_path(directory, NEW)
    path.mkdir()
    state = saves.make_state(NEW, whole=True)
    pieces = [Piece(key, e.shape, b.offsets, b.view) for key, e in state.items() for b in e.boxes]
    file, tensors = write_shard(path / "rank-00000.safetensors", pieces)
    run_state = json.dumps(dataclasses.asdict(saves.make_run_state(NEW))).encode()
    state_file = write_durably(path / RUN_STATE_FILE, [memoryview(run_state)])
    manifest = encode_manifest(Manifest(files=[file, state_file], tensors=tensors))
    write_durably(path / MANIFEST_FILE, [memoryview(manifest)])


def save_next(directory: Path) -> None:
    saves.join()
    (report,) = saves.save(directory, NEXT)
    assert report.error is None, report.error


def newest_whole(directory: Path) -> int:
    """Return the step of the newest checkpoint; every one that has the name of a complete one is whole."""
    return [saves.whole_step(path) for path in find_checkpoints(directory)][-1]


def enumerate_crashes(root: Path, attempt: Callable[[Path, int], None]) -> list[int]:
    """Kill ``attempt`` at every moment; return the step that is newest after each, the last one after no kill."""
    assert saves.in_fork(saves.save_all, root / "old", OLD) == 0
    newest = []
    for number in itertools.count(1):
        directory = saves.copy_run(root / "old", root / str(number))
        code = saves.in_fork(attempt, directory, number)
        assert code in (0, -9), code
        newest.append(newest_whole(directory))
        assert saves.in_fork(save_next, directory) == 0
        assert newest_whole(directory) == NEXT
        kept = [newest[-1], NEXT]
        assert saves.names(directory) == [f"step-{step:08d}" for step in kept], "leftovers"
        if code == 0:
            return newest
    raise AssertionError


def record_operations(directory: Path) -> list[tuple[str, str]]:
    """Save and return (operation, path below the checkpoints) in order."""
    log: list[tuple[str, str]] = []
    paths: dict[int, str] = {}

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            where = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else paths.get(args[0], "")
            if name == "open":
                paths[result] = where
            log.append((name, str(where).replace(f"{checkpoints_directory(directory)}", "")))
            return result

        return operation

    saves.join()
    for name in OPERATIONS:
        setattr(os, name, wrap(name, getattr(os, name)))
    saves.save(directory, NEW)
    return log
