"""Whole tensors of a checkpoint, one at a time, for what reads checkpoints without an engine."""

from pathlib import Path

import torch

from bigtrain.checkpoint.manifest import TensorRecord, read_manifest
from bigtrain.checkpoint.shard import DTYPES, ShardReader


class TensorReader:
    """Assembles whole tensors from all ranks' files, one at a time."""

    def __init__(self, path: Path) -> None:
        """Read the manifest of a verified checkpoint; CheckpointError if it is missing or damaged."""
        self.records: dict[str, TensorRecord] = {tensor.key: tensor for tensor in read_manifest(path).tensors}
        self._shards = ShardReader(path)

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor on the CPU."""
        record = self.records[key]
        whole = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        for chunk in record.chunks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = self._shards.read(record.dtype, chunk)
        return whole
