"""Files that have to be the same later: what one holds, and that it is on the disk."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

CONFIG_FILE = "config.yaml"
RUN_FILES = (CONFIG_FILE, "metrics.jsonl")
"""A directory that has one of them is a run."""
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


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of ``path``; empty if it is missing or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def such_as_runs(near: Path) -> str:
    """Return ``", such as <run>, <run>"`` with runs in or beside ``near``, or in ``runs``; nothing if there are none."""
    places = [near, *list(near.parents)[:2], Path("runs")]
    found = next((runs for place in places if (runs := sorted(place.glob(f"*/{RUN_FILES[0]}")))), [])
    return f", such as {', '.join(str(run.parent) for run in found[:4])}" if found else ""


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, parts: Iterable[memoryview]) -> FileRecord:
    """Write a new file, hashed on the way, so that it is on the disk.

    Raises:
        OSError: it exists, or could not be written, for instance because the disk is full.
    """
    digest, num_bytes = xxhash.xxh3_128(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for part in parts:
            for start in range(0, len(part), PIECE_BYTES):
                piece = part[start : start + PIECE_BYTES]
                digest.update(piece)
                num_bytes += len(piece)
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(name=path.name, num_bytes=num_bytes, xxh3=digest.hexdigest())
