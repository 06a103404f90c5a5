"""One rank's file: boxes of tensors in safetensors' layout, hashed while they are written.

The layout is a length, a JSON header and raw memory, so any safetensors reader opens the file.
"""

import json
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from bigtrain.checkpoint.manifest import Chunk, TensorRecord, read_manifest
from bigtrain.errors import CheckpointError
from bigtrain.files import FileRecord, write_durably

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A box to be written, in host memory."""

    key: str
    shape: tuple[int, ...]  # shape of the whole tensor
    offsets: tuple[int, ...]
    tensor: torch.Tensor  # contiguous, on the CPU


def write_shard(path: Path, pieces: Iterable[Piece]) -> tuple[FileRecord, list[TensorRecord]]:
    """Write a rank's file durably; return its record, and of each piece the record of its tensor with one chunk."""
    pieces = list(pieces)
    header: dict[str, object] = {}
    records, position = [], 0
    for piece in pieces:
        num_bytes = piece.tensor.numel() * piece.tensor.element_size()
        name, sizes = NAMES[piece.tensor.dtype], list(piece.tensor.shape)
        header[f"{piece.key}@{','.join(map(str, piece.offsets))}"] = {
            "dtype": name,
            "shape": sizes,
            "data_offsets": [position, position + num_bytes],
        }
        chunk = Chunk(offsets=list(piece.offsets), sizes=sizes, file=path.name, start_byte=position)
        records.append(TensorRecord(key=piece.key, dtype=name, shape=list(piece.shape), chunks=[chunk]))
        position += num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    prefix = len(encoded).to_bytes(8, "little") + encoded
    for record in records:
        record.chunks[0].start_byte += len(prefix)
    contents = (piece.tensor.reshape(-1).view(torch.uint8).numpy() for piece in pieces)
    return write_durably(path, [memoryview(prefix), *(memoryview(content).cast("B") for content in contents)]), records


class ShardReader:
    """Reads chunks from the files of one checkpoint; each file is mapped once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._maps: dict[str, torch.Tensor] = {}

    def read(self, dtype: str, chunk: Chunk) -> torch.Tensor:
        """Return a read-only view of a chunk, read when it is copied; CheckpointError if its file is short."""
        if chunk.file not in self._maps:
            self._maps[chunk.file] = self._map(self._directory / chunk.file)
        mapped = self._maps[chunk.file]
        end = chunk.start_byte + math.prod(chunk.sizes) * DTYPES[dtype].itemsize
        if end > mapped.numel():
            path = self._directory / chunk.file
            raise CheckpointError(f"{path}: damaged: {mapped.numel()} bytes, expected at least {end}")
        raw = mapped[chunk.start_byte : end]
        if chunk.start_byte % DTYPES[dtype].itemsize:
            raw = raw.clone()
        return raw.view(DTYPES[dtype]).view(chunk.sizes)

    def _map(self, path: Path) -> torch.Tensor:
        try:
            with path.open("rb") as file:
                # Copy-on-write, because torch wants writable memory; nothing is ever written.
                return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            raise CheckpointError(f"{path}: damaged: {error}") from error


class TensorReader:
    """Assembles whole tensors from all ranks' files, one at a time."""

    def __init__(self, path: Path) -> None:
        """Read the manifest of a verified checkpoint; CheckpointError if it is missing or damaged."""
        self.records: dict[str, TensorRecord] = {tensor.key: tensor for tensor in read_manifest(path).tensors}
        self._shards = ShardReader(path)

    def read(self, key: str) -> torch.Tensor:
        record = self.records[key]
        whole = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        for chunk in record.chunks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = self._shards.read(record.dtype, chunk)
        return whole
