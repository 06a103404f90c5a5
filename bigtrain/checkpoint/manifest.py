"""The manifest of a checkpoint: its files with sizes and hashes, and where each piece of each tensor lies.

The hash (XXH3, 128 bits) finds damage; it runs at the speed of memory, where SHA-256 would take seconds
per rank. It does not find tampering: nothing in a checkpoint is executed, so a forged one can hold wrong
numbers but no code.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.schema import from_dict

MANIFEST_FILE = "manifest.json"
FORMAT = 1


@dataclass(kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    """Plain file name."""
    num_bytes: int
    """Size."""
    xxh3: str
    """XXH3 128-bit hash of the content, hexadecimal."""


@dataclass(kw_only=True, slots=True)
class Chunk:
    """One box of a tensor, in row-major order somewhere in a file."""

    offsets: list[int]
    """Where the box begins in the tensor."""
    sizes: list[int]
    """Shape of the box."""
    file: str
    """Name of the file."""
    start_byte: int
    """Where the box begins in the file."""


@dataclass(kw_only=True, slots=True)
class TensorRecord:
    """One tensor of the state."""

    key: str
    """``model.<name>`` or ``optim.state.<name>.<key>``."""
    dtype: str
    """safetensors' name of the element type, such as ``F32``."""
    shape: list[int]
    """Shape of the whole tensor."""
    chunks: list[Chunk]
    """Boxes that are disjoint and cover the tensor."""


@dataclass(kw_only=True, slots=True)
class Manifest:
    """Content of ``manifest.json``."""

    format: int = FORMAT
    """Version of this layout."""
    files: list[FileRecord]
    """All files except the manifest."""
    tensors: list[TensorRecord]
    """The state."""


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as two lines: the hash of the second one, and JSON."""
    body = json.dumps(dataclasses.asdict(manifest), separators=(",", ":")).encode()
    return xxhash.xxh3_128_hexdigest(body).encode() + b"\n" + body + b"\n"


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint; the files themselves are not looked at.

    Raises:
        CheckpointError: missing, damaged, of another version, or naming files outside of its directory.
    """
    path = directory / MANIFEST_FILE
    try:
        found, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(
            f"{path}: no manifest, so this is not a complete checkpoint ({error.strerror})"
        ) from error
    expected = xxhash.xxh3_128_hexdigest(body.removesuffix(b"\n")).encode()
    if found != expected or not body.endswith(b"\n"):
        raise CheckpointError(f"{path}: damaged: its hash is {expected.decode()}, expected {_printable(found)}")
    try:
        manifest = from_dict(Manifest, json.loads(body))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.format}, this version reads format {FORMAT}")
    _check_names(manifest, path)
    return manifest


def _check_names(manifest: Manifest, path: Path) -> None:
    """Refuse names that lead out of the directory, and chunks in files that nobody verifies."""
    names = {file.name for file in manifest.files}
    for name in names:
        if name in ("", ".", "..") or os.path.basename(name) != name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path}: {name!r} is not a plain file name")
    for tensor in manifest.tensors:
        for chunk in tensor.chunks:
            if chunk.file not in names:
                raise CheckpointError(f"{path}: {tensor.key} lies in {chunk.file!r}, which is not listed")


def verify_file(directory: Path, record: FileRecord, *, content: bool) -> str | None:
    """Compare a file with its record.

    Args:
        directory: of the checkpoint.
        record: what the file should be.
        content: whether to read the file and compare its hash, besides the size.

    Returns:
        What is wrong, naming the file with what was expected and found; None if nothing is.
    """
    path = directory / record.name
    try:
        num_bytes = path.stat().st_size
        if num_bytes != record.num_bytes:
            return f"{path}: {num_bytes} bytes, expected {record.num_bytes}"
        found = hash_file(path) if content else record.xxh3
    except OSError as error:
        return f"{path}: {error.strerror}, expected {record.num_bytes} bytes"
    return None if found == record.xxh3 else f"{path}: its hash is {found}, expected {record.xxh3}"


def hash_file(path: Path) -> str:
    """Return the XXH3 128-bit hash of a file's content."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(1 << 22)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _printable(raw: bytes) -> str:
    return raw[:40].decode("ascii", "replace")
