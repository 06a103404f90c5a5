"""Files that have to be the same later: what one holds, and that it is on the disk."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

PIECE_BYTES = 1 << 22
"""Hashed and written or read at a time: small enough to stay in the processor's cache between the two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint or of a corpus."""

    name: str
    """Plain file name."""
    num_bytes: int
    """Size."""
    xxh3: str
    """XXH3 128-bit hash of the content, hexadecimal."""


def hash_content(file: BinaryIO) -> str:
    """Return the XXH3 128-bit hash of an open file from its beginning on, in hexadecimal."""
    file.seek(0)
    digest = xxhash.xxh3_128()
    buffer = bytearray(PIECE_BYTES)
    view = memoryview(buffer)
    while count := file.readinto(buffer):
        digest.update(view[:count])
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
