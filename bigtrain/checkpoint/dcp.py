"""A StorageReader with which ``torch.distributed.checkpoint`` (DCP) loads our checkpoints.

    from bigtrain.checkpoint.dcp import CheckpointReader
    state = {"model": model.state_dict()}
    torch.distributed.checkpoint.load(state, storage_reader=CheckpointReader("runs/x/checkpoints/step-00001000"))

Keys are those of torch's ``get_state_dict``: ``model.<name>`` and ``optim.state.<name>.<key>``. The wanted state may be
sharded in any way.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.shard import DTYPES, ShardReader
from bigtrain.checkpoint.store import find_problems
from bigtrain.config import Verify
from bigtrain.errors import CheckpointError


class CheckpointReader(StorageReader):
    """Reads a checkpoint for ``torch.distributed.checkpoint.load``; no pickle is read."""

    def __init__(self, path: str | os.PathLike[str], *, verify: Verify = Verify.full) -> None:
        """Open the directory of a checkpoint; the coordinator verifies it as ``verify`` says."""
        self._verify = verify
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._path = Path(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for record in read_manifest(self._path).tensors:
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in record.chunks]
            properties = TensorProperties(DTYPES[record.dtype])
            found[record.key] = TensorStorageMetadata(properties, torch.Size(record.shape), chunks)
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._tensors = {record.key: record for record in read_manifest(self._path).tensors}
        if is_coordinator and (problems := find_problems(self._path, self._verify)):
            raise CheckpointError("\n  ".join([f"{self._path} is damaged:", *problems]))

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        shards = ShardReader(self._path)
        with torch.no_grad():
            for item in plan.items:
                record = self._tensors[item.storage_index.fqn]
                offsets = list(item.storage_index.offset or [])
                chunk = next(chunk for chunk in record.chunks if chunk.offsets == offsets)
                stored = shards.read(record.dtype, chunk)
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    stored = stored.narrow(dim, offset, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(stored)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()
