"""Saving behind the training loop: the loop waits for a copy in memory at most, never for a disk.

All ranks of a save: copy the own share of the state to host memory (staging), write it with its hash to
one file in a new directory, and vote. If all succeeded, rank 0 commits; otherwise it removes the directory.
Staging runs beside the next forward and backward passes, which leave the state alone; the loop calls
:meth:`Saver.wait_until_staged` before it changes anything.
"""

import shutil
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bigtrain.checkpoint.manifest import FileRecord, TensorRecord
from bigtrain.checkpoint.shard import Piece, write_shard
from bigtrain.checkpoint.store import (
    RunState,
    checkpoint_path,
    checkpoints_directory,
    commit,
    prune,
)
from bigtrain.config import CheckpointConfig
from bigtrain.distributed import broadcast_json, gather_json
from bigtrain.engine.state import Entry
from bigtrain.errors import CheckpointError
from bigtrain.schema import from_dict, to_dict


@dataclass(frozen=True, slots=True)
class SaveReport:
    """How a save ended, the same on every rank."""

    step: int
    path: Path
    error: str | None
    """What went wrong on which rank; None if the checkpoint is complete."""


class Saver:
    """Saves the state of one run, one checkpoint at a time."""

    def __init__(self, run_directory: Path, entries: Mapping[str, Entry], config: CheckpointConfig) -> None:
        """Prepare; every rank calls this, and all other methods, in the same order.

        Raises:
            CheckpointError: there is no room for two checkpoints.
        """
        self._run_directory = run_directory
        self._entries = entries
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._group = dist.new_group(backend="gloo")  # the thread's own: it must not meet the loop's collectives
        self._pending: Future[SaveReport] | None = None
        self._staged = threading.Event()
        self._staged.set()
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.num_failures = 0
        """Failed saves since the last complete one."""
        self._check_room()

    def save(self, run_state: RunState) -> None:
        """Begin to save; the save before this one has been finished."""
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
        """Wait until the state has been copied and may change again."""
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
        return report

    def _save(self, run_state: RunState, ready: torch.cuda.Event | None) -> SaveReport:
        final = checkpoint_path(self._run_directory, run_state.step)
        attempt = broadcast_json(uuid.uuid4().hex[:8], group=self._group)
        partial = final.with_name(f"{final.name}.tmp-{attempt}")
        vote: dict[str, object] = {}
        try:
            try:
                pieces = self._stage(ready)
            finally:
                self._staged.set()
            partial.mkdir(parents=True, exist_ok=True)
            file, tensors = write_shard(partial / f"rank-{dist.get_rank():05d}.safetensors", pieces)
            vote = {"file": to_dict(file), "tensors": to_dict(tensors)}
        except (OSError, RuntimeError, MemoryError) as error:
            vote = {"error": f"rank {dist.get_rank()}: {error}"}
        votes = gather_json(vote, group=self._group)
        error = self._decide(votes, partial, final, run_state) if dist.get_rank() == 0 else None
        return SaveReport(run_state.step, final, broadcast_json(error, group=self._group))

    def _decide(
        self, votes: list[dict[str, list[dict[str, object]]]], partial: Path, final: Path, run_state: RunState
    ) -> str | None:
        """Commit if every rank has succeeded, else remove what was written; on rank 0 only."""
        errors = [str(vote["error"]) for vote in votes if "error" in vote]
        if not errors:
            try:
                files = [from_dict(FileRecord, vote["file"]) for vote in votes]
                tensors = [from_dict(TensorRecord, record) for vote in votes for record in vote["tensors"]]
                commit(partial, final, run_state, files, tensors)
            except OSError as error:
                errors = [f"rank 0: {error}"]
        if errors:
            shutil.rmtree(partial, ignore_errors=True)
            return "; ".join(errors)
        prune(self._run_directory, self._config.keep)
        return None

    @torch.no_grad()
    def _stage(self, ready: torch.cuda.Event | None) -> list[Piece]:
        """Copy this rank's share of the state into host memory that is kept from save to save."""
        if ready is None:
            return self._copy()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            pieces = self._copy()
        stream.synchronize()
        return pieces

    def _copy(self) -> list[Piece]:
        pieces = []
        for key, entry in self._entries.items():
            for box in entry.own_boxes():
                place = key, box.offsets
                if place not in self._buffers:
                    pinned = box.view.device.type == "cuda"
                    self._buffers[place] = torch.empty(box.view.shape, dtype=box.view.dtype, pin_memory=pinned)
                self._buffers[place].copy_(box.view, non_blocking=True)
                pieces.append(Piece(key, entry.shape, box.offsets, self._buffers[place]))
        return pieces

    def _check_room(self) -> None:
        own = sum(b.view.numel() * b.view.element_size() for e in self._entries.values() for b in e.own_boxes())
        sizes = gather_json(own, group=self._group)
        problem = None
        if dist.get_rank() == 0:
            directory = checkpoints_directory(self._run_directory)
            directory.mkdir(parents=True, exist_ok=True)
            free, needed = shutil.disk_usage(directory).free, 2 * sum(sizes)
            if free < needed:
                problem = (
                    f"{directory}: {free / 2**30:.2f} GiB are free, but two checkpoints need {needed / 2**30:.2f} GiB; "
                    "make room, or choose another run.root"
                )
        if problem := broadcast_json(problem, group=self._group):
            raise CheckpointError(problem)
