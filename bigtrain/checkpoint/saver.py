"""Saving behind the training loop, which waits for a copy in memory at most, never for a disk.

Each rank copies its share of the state to host memory (staging), writes it to one file in a new directory, and votes.
If all succeeded rank 0 commits, else it removes the directory. Staging overlaps the next forward and backward passes;
the loop calls :meth:`Saver.wait_until_staged` before it changes the state.
"""

import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigtrain import log
from bigtrain.checkpoint.manifest import decode_tensor
from bigtrain.checkpoint.shard import Piece, write_shard
from bigtrain.checkpoint.store import (
    RunState,
    checkpoint_path,
    checkpoints_directory,
    commit,
    find_checkpoints,
    prune,
    remove_leftovers,
)
from bigtrain.config import CheckpointConfig
from bigtrain.config.convert import to_dict
from bigtrain.distributed.collectives import broadcast_json, gather_json
from bigtrain.engine.state import Box, Entry
from bigtrain.errors import CheckpointError, of_all_ranks
from bigtrain.files import FileRecord


@dataclass(frozen=True, slots=True)
class SaveReport:
    """How a save ended, the same on every rank."""

    step: int
    path: Path
    error: str | None  # what went wrong on which rank; None if the checkpoint is complete
    seconds: float = 0.0  # how long it took, on this rank


class Saver:
    """Saves the state of one run, one checkpoint at a time."""

    def __init__(
        self,
        run_directory: Path,
        entries: Mapping[str, Entry],
        config: CheckpointConfig,
        *,
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        """Prepare; collective, as all other methods. CheckpointError: there is no room for two checkpoints.

        ``run_directory`` may be set to another one between two saves. Before it commits rank 0 asks ``is_ours`` whether
        the directory still belongs to this launch.
        """
        self.run_directory = run_directory
        self._is_ours = is_ours
        self._entries = entries
        self._config = config
        # A new thread's current device is GPU 0, so its stream would wait for the wrong one.
        on_gpu = torch.cuda.is_available()
        begin: tuple[Any, ...] = (torch.cuda.set_device, (torch.cuda.current_device(),)) if on_gpu else ()
        self._thread = ThreadPoolExecutor(1, "checkpoint", *begin)
        self._group = dist.new_group(backend="gloo")  # separate: collectives of two threads must not interleave
        self._launch = broadcast_json(uuid.uuid4().hex[:8], group=self._group)
        self._pending: Future[SaveReport] | None = None
        self._staged = threading.Event()
        self._staged.set()
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.num_failures = 0  # since the last complete save
        self.last_error: str | None = None
        self._check_room()

    def save(self, run_state: RunState) -> None:
        """Begin to save; the save before must have been finished."""
        assert self._pending is None
        self._staged.clear()
        ready = None
        if torch.cuda.is_available():
            ready = torch.cuda.Event()
            ready.record()
        self._pending = self._thread.submit(self._save, run_state, ready)
        if not self._config.asynchronous:
            self._pending.exception()

    def wait_until_staged(self) -> None:
        if not self._staged.is_set():  # to wait takes a lock
            self._staged.wait()

    def poll(self) -> SaveReport | None:
        """Return the report of a save that has ended since the last call, if any."""
        return self.finish() if self._pending is not None and self._pending.done() else None

    def finish(self) -> SaveReport | None:
        """Wait for the save under way, if any, and return its report."""
        if self._pending is None:
            return None
        report, self._pending = self._pending.result(), None
        self.num_failures = self.num_failures + 1 if report.error else 0
        self.last_error = report.error
        return report

    def _save(self, run_state: RunState, ready: torch.cuda.Event | None) -> SaveReport:
        begin = time.monotonic()
        final = checkpoint_path(self.run_directory, run_state.step)
        partial = final.with_name(f"{final.name}.tmp-{self._launch}")
        votes = gather_json(self._write(partial, ready), group=self._group)
        error = self._decide(votes, partial, final, run_state) if dist.get_rank() == 0 else None
        error = broadcast_json(error, group=self._group)
        return SaveReport(run_state.step, final, error, time.monotonic() - begin)

    def _write(self, partial: Path, ready: torch.cuda.Event | None) -> dict[str, object]:
        """Write this rank's file and return its vote; errors are votes too, because the others wait for them."""
        try:
            try:
                pieces = self._stage(ready)
            finally:
                self._staged.set()
            if problem := _not_finite(pieces):
                raise CheckpointError(problem)
            if dist.get_rank() == 0:
                partial.parent.mkdir(exist_ok=True)  # but not the run's directory, which may have been renamed
            partial.mkdir(parents=dist.get_rank() > 0, exist_ok=True)
            file, tensors = write_shard(partial / f"rank-{dist.get_rank():05d}.safetensors", pieces)
            return {"file": to_dict(file), "tensors": to_dict(tensors)}
        except Exception as error:
            return {"error": f"rank {dist.get_rank()}: {type(error).__name__}: {error}"}

    def _decide(self, votes: list[dict[str, Any]], partial: Path, final: Path, run_state: RunState) -> str | None:
        """Commit if every rank succeeded, else remove what was written; on rank 0 only."""
        errors = [str(vote["error"]) for vote in votes if "error" in vote]
        if not errors and not self._is_ours():
            errors = [f"{self.run_directory} was renamed or removed, or another launch has taken the run over"]
        if not errors:
            try:
                files = [FileRecord(**vote["file"]) for vote in votes]
                tensors = [decode_tensor(record) for vote in votes for record in vote["tensors"]]
                commit(partial, final, run_state, files, tensors)
            except Exception as error:
                errors = [f"rank 0: {type(error).__name__}: {error}"]
        if errors:
            shutil.rmtree(partial, ignore_errors=True)
            return "; ".join(errors)
        try:
            prune(self.run_directory, self._config.keep)
        except (OSError, CheckpointError) as error:  # the checkpoint is complete nevertheless
            log.get_logger().warning(f"old checkpoints could not be deleted: {error}")
        return None

    @torch.no_grad()
    def _stage(self, ready: torch.cuda.Event | None) -> list[Piece]:
        """Copy this rank's share of the state into host buffers, which are reused from save to save."""
        stream = torch.cuda.Stream() if ready else None
        with torch.cuda.stream(stream):
            if stream:
                stream.wait_event(ready)
            pieces = [
                self._copy(key, entry.shape, box) for key, entry in self._entries.items() for box in entry.own_boxes()
            ]
        if stream:
            stream.synchronize()
        return pieces

    def _copy(self, key: str, shape: tuple[int, ...], box: Box) -> Piece:
        if not self._config.asynchronous and box.view.device.type == "cpu":
            return Piece(key, shape, box.offsets, box.view)  # the loop waits for the disk
        place = key, box.offsets
        if place not in self._buffers:
            pinned = box.view.device.type == "cuda"
            self._buffers[place] = torch.empty(box.view.shape, dtype=box.view.dtype, pin_memory=pinned)
        self._buffers[place].copy_(box.view, non_blocking=True)
        return Piece(key, shape, box.offsets, self._buffers[place])

    def _check_room(self) -> None:
        own = sum(b.view.numel() * b.view.element_size() for e in self._entries.values() for b in e.own_boxes())
        sizes = gather_json(own, group=self._group)
        problem = self._make_room(sum(sizes)) if dist.get_rank() == 0 else None
        if problem := broadcast_json(problem, group=self._group):
            raise of_all_ranks(CheckpointError(problem))

    def _make_room(self, num_bytes: int) -> str | None:
        """Remove leftovers and return the problem if there is too little room; on rank 0 only."""
        directory = checkpoints_directory(self.run_directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.run_directory)
            # A resumed run already has checkpoints; the next one comes on top.
            number = max(1, 2 - len(find_checkpoints(self.run_directory)))
            free, needed = shutil.disk_usage(directory).free, number * num_bytes
        except OSError as error:
            where = f" (a link to {directory.readlink()}, which is not there)" if directory.is_symlink() else ""
            return f"{directory}{where} cannot be written: {error.strerror}"
        except CheckpointError as error:
            return str(error)
        if free >= needed:
            return None
        unit, size = ("GiB", 2**30) if needed >= 2**30 else ("MiB", 2**20)
        return (
            f"{directory}: {free / size:.1f} {unit} are free, but {('one more checkpoint needs', 'two checkpoints need')[number - 1]} "
            f"{needed / size:.1f} {unit}; make room, or choose another run.root"
        )


def _not_finite(pieces: list[Piece]) -> str | None:
    """Return a message about a tensor with non-finite numbers, if there is one; one pass over memory."""
    for key, tensor in ((piece.key, piece.tensor) for piece in pieces if piece.tensor.is_floating_point()):
        if math.isfinite(tensor.sum().item()):  # not finite if a number is not, or on overflow
            continue
        if count := tensor.numel() - int(tensor.isfinite().sum()):
            return f"{count} numbers of {key} are not finite"
    return None
