"""The manifest of a checkpoint: its files with sizes and hashes, and where each piece of each tensor lies.

The hash (XXH3, 128 bits) finds damage at the speed of memory, where SHA-256 would take seconds per rank. It does not
find tampering, but nothing in a checkpoint is executed: a forged one can hold wrong numbers, no code.
"""

import errno
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bigtrain.config.convert import from_dict
from bigtrain.errors import CheckpointError, ConfigError, UnreadableError
from bigtrain.files import FileRecord, hash_content

MANIFEST_FILE = "manifest.json"
RUN_STATE_FILE = "run_state.json"
FORMAT = 1
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}  # bytes
SIGNS_OF_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}
"""What a lost file or a bad disk says; other errors (no permission, a stale mount) say nothing about the content."""


@dataclass(kw_only=True, slots=True)
class Chunk:
    """One box of a tensor, in row-major order in a file."""

    offsets: list[int]  # where the box begins in the tensor
    sizes: list[int]  # shape of the box
    file: str
    start_byte: int  # where the box begins in the file


@dataclass(kw_only=True, slots=True)
class TensorRecord:
    key: str  # ``model.<name>`` or ``optim.state.<name>.<key>``
    dtype: str  # safetensors' name of the element type, such as ``F32``
    shape: list[int]  # shape of the whole tensor
    chunks: list[Chunk]  # boxes that are disjoint and cover the tensor


@dataclass(kw_only=True, slots=True)
class Manifest:
    """Content of ``manifest.json``."""

    format: int = FORMAT
    files: list[FileRecord]  # all files except the manifest
    tensors: list[TensorRecord]


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as two lines: the hash of the second one, and JSON."""

    def fields(record: Any) -> dict[str, Any]:  # dataclasses.asdict would copy a million chunks
        return {name: getattr(record, name) for name in record.__slots__}

    body = json.dumps(manifest, separators=(",", ":"), default=fields).encode()
    return xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body + b"\n"


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a checkpoint, checked in itself but not against the files.

    CheckpointError: missing, damaged, naming files outside of its directory, or not describing whole tensors in its
    files. UnreadableError: of another version, or the file system cannot be read.
    """
    path = directory / MANIFEST_FILE
    try:
        found, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        _require_damage(error, path)
        raise CheckpointError(
            f"{path}: no manifest, so this is not a complete checkpoint ({error.strerror})"
        ) from error
    expected = xxhash.xxh3_128_hexdigest(body.removesuffix(b"\n")).encode()
    if found != expected or not body.endswith(b"\n"):
        told = found[:40].decode("ascii", "replace")
        raise CheckpointError(f"{path}: damaged: its hash is {expected.decode()}, expected {told}")
    try:
        values = json.loads(body)
        if values["format"] != FORMAT:
            raise UnreadableError(f"{path}: format {values['format']}, this version reads format {FORMAT}")
        files = [from_dict(FileRecord, file) for file in values["files"]]
        tensors = [decode_tensor(tensor) for tensor in values["tensors"]]
        manifest = Manifest(**{**values, "files": files, "tensors": tensors})
        problem = next(_problems(manifest), None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return manifest


def decode_tensor(values: dict[str, Any]) -> TensorRecord:
    """Build the record of a tensor from JSON; quick, because a large run has a million chunks."""
    return TensorRecord(**{**values, "chunks": [Chunk(**chunk) for chunk in values["chunks"]]})


def _problems(manifest: Manifest) -> Iterator[str]:
    """Yield what no save can have written: names that lead elsewhere, boxes that do not fit."""
    for file in manifest.files:
        name = file.name
        if name in ("", ".", "..", MANIFEST_FILE) or os.path.basename(name) != name or "\\" in name or "\0" in name:
            yield f"{name!r} is not the plain name of a file"
    files = {file.name: file.num_bytes for file in manifest.files}
    if len(files) < len(manifest.files) or RUN_STATE_FILE not in files:
        yield f"lists {', '.join(file.name for file in manifest.files)}, expected every file once and {RUN_STATE_FILE}"
    if len({tensor.key for tensor in manifest.tensors}) < len(manifest.tensors):
        yield "lists a tensor twice"
    for tensor in manifest.tensors:
        if problem := _tensor_problem(tensor, files):
            yield f"{tensor.key}: {problem}"
    spans = sorted(
        (chunk.file, chunk.start_byte, chunk.start_byte + num_bytes, tensor.key)
        for tensor in manifest.tensors
        for chunk in tensor.chunks
        if (num_bytes := math.prod(chunk.sizes) * ITEM_BYTES[tensor.dtype])
    )
    for (name, _, end, key), (other_name, start, _, other_key) in itertools.pairwise(spans):
        if name == other_name and start < end:
            yield f"{key} and {other_key} overlap in {name}"


def _tensor_problem(tensor: TensorRecord, files: dict[str, int]) -> str | None:
    """Return why the chunks are not disjoint boxes that cover the tensor and lie inside the files."""
    if not (isinstance(tensor.key, str) and tensor.dtype in ITEM_BYTES and _are_counts(tensor.shape)):
        return f"no tensor of type {tensor.dtype!r} and shape {tensor.shape!r}"
    for chunk in tensor.chunks:
        box = list(zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True))
        counts = _are_counts(chunk.offsets) and _are_counts(chunk.sizes) and _are_counts([chunk.start_byte])
        if not counts or any(offset + size > whole for offset, size, whole in box):
            return f"{chunk} is not a box of a tensor of shape {tensor.shape}"
        if chunk.file not in files:
            return f"lies in {chunk.file!r}, which is not listed"
        end = chunk.start_byte + math.prod(chunk.sizes) * ITEM_BYTES[tensor.dtype]
        if end > files[chunk.file]:
            return f"lies in bytes {chunk.start_byte} to {end} of {chunk.file}, which has {files[chunk.file]}"
    found, expected = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.shape)
    if found != expected or _overlap([chunk for chunk in tensor.chunks if math.prod(chunk.sizes)]):
        return f"its boxes do not cover its {expected} elements once (they have {found})"
    return None


def _are_counts(numbers: Any) -> bool:
    return type(numbers) is list and all(type(number) is int and number >= 0 for number in numbers)


def _overlap(chunks: list[Chunk]) -> bool:
    """Return whether boxes overlap; sweeps over the first dimension, along which nearly all are cut."""
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets):
        active = [a for a in active if _meet(a, chunk, 1)]
        if any(_meet(a, chunk, len(chunk.sizes)) for a in active):
            return True
        active.append(chunk)
    return False


def _meet(a: Chunk, b: Chunk, num_dims: int) -> bool:
    """Return whether two boxes overlap in the first ``num_dims`` dimensions."""
    pairs = zip(a.offsets[:num_dims], a.sizes, b.offsets, b.sizes, strict=False)
    return all(begin < other + size_b and other < begin + size_a for begin, size_a, other, size_b in pairs)


def verify_file(directory: Path, record: FileRecord, *, content: bool) -> str | None:
    """Return how a file differs from its record, in size and with ``content`` in its hash too; None if it does not."""
    path = directory / record.name
    try:
        num_bytes = path.stat().st_size
        found = hash_file(path) if content and num_bytes == record.num_bytes else record.xxh3
    except OSError as error:
        _require_damage(error, path)
        return f"{path}: {error.strerror}, expected {record.num_bytes} bytes"
    return _difference(path, record, num_bytes, found)


def read_verified(directory: Path, record: FileRecord) -> bytes:
    """Return the content of a small file, verified; raises as :func:`verify_file`, and CheckpointError."""
    path = directory / record.name
    try:
        data = path.read_bytes()
    except OSError as error:
        _require_damage(error, path)
        raise CheckpointError(f"{path}: {error.strerror}, expected {record.num_bytes} bytes") from error
    if problem := _difference(path, record, len(data), xxhash.xxh3_128_hexdigest(data)):
        raise CheckpointError(problem)
    return data


def _difference(path: Path, record: FileRecord, num_bytes: int, xxh3: str) -> str | None:
    if num_bytes != record.num_bytes:
        return f"{path}: {num_bytes} bytes, expected {record.num_bytes}"
    return None if xxh3 == record.xxh3 else f"{path}: its hash is {xxh3}, expected {record.xxh3}"


def hash_file(path: Path) -> str:
    """Return the XXH3 128-bit hash of a file's content."""
    with path.open("rb", buffering=0) as file:
        return hash_content(file)


def _require_damage(error: OSError, path: Path) -> None:
    if error.errno not in SIGNS_OF_DAMAGE:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror}; nothing is known to be damaged") from error
