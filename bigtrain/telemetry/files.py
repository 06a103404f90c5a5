"""JSON Lines files that survive kills, torn tails and full disks, and their readers."""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtrain.files import sync
from bigtrain.log import get_logger

METRICS_FILE = "metrics.jsonl"  # one object per optimizer step
EVENTS_FILE = "events.jsonl"  # all other events
SAMPLES_FILE = "samples.jsonl"  # texts that were generated from checkpoints of the run
IMAGES_FILE = "images.json"  # what a generator made at validations
CLASSIFICATION_FILE = "classification.json"  # confusion matrix and wrong images of the last validation

_MAX_PENDING_LINES = 100_000  # kept in memory while writes fail
_REPAIR_CHUNK_BYTES = 1 << 16
_TAIL_BYTES = 1 << 23
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class JsonLines:
    """An append-only file with one JSON object a line and one writer.

    Whole lines reach the system in :meth:`flush`: a kill loses what was not flushed and leaves at most one torn line,
    which the next opening repairs. A refused write (full disk, quota) is one warning; the lines are kept and retried.
    NaN and infinity are written as null and named: ``{"loss": null, "non_finite": {"loss": "nan"}}``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[bytes] = []
        self._is_refused = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._size_bytes = _repair(self._file, self._path)

    def write(self, record: dict[str, Any]) -> None:
        self._pending.append(_encode(record))

    def flush(self, durable: bool = False) -> None:
        """Hand the lines to the system; with ``durable`` also fsync."""
        data = rest = memoryview(b"".join(self._pending))
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            self._size_bytes += len(data)
            self._pending.clear()
            if durable:
                os.fsync(self._file)
            self._is_refused = False
        except OSError as error:
            self._keep_for_later(error)

    def _keep_for_later(self, error: OSError) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._size_bytes)  # take back what was written of a line
        del self._pending[:-_MAX_PENDING_LINES]
        if not self._is_refused:
            get_logger().warning(f"cannot write {self._path}: {error}; training goes on and writing is tried again")
        self._is_refused = True

    def remove(self, is_superseded: Callable[[dict[str, Any]], bool]) -> int:
        """Remove the lines for which ``is_superseded`` holds, atomically; return their number. Damaged lines stay."""
        self.flush()
        num_removed = 0
        temporary = self._path.with_name(self._path.name + ".tmp")
        with self._path.open("rb") as source, temporary.open("wb") as target:
            for line in source:
                record = _decode(line)
                if record is not None and is_superseded(record):
                    num_removed += 1
                else:
                    target.write(line)
            target.flush()
            os.fsync(target.fileno())
        if num_removed == 0:
            temporary.unlink()
            return 0
        os.close(self._file)
        temporary.replace(self._path)
        sync(self._path.parent)
        self._open()
        return num_removed

    def close(self) -> None:
        self.flush(durable=True)
        os.close(self._file)


class Tail:
    """Reads what was added to a JSON Lines file since the last call; the file may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._position_bytes = 0
        self.began_anew = False
        """Whether the last records are the first of the file, which may have been replaced."""

    def read(self) -> list[dict[str, Any]]:
        """Return the records of new whole lines, of a long file those of some MB."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._position_bytes:
                self._inode, self._position_bytes = status.st_ino, 0  # replaced: read it again
            file.seek(self._position_bytes)
            self.began_anew = self._position_bytes == 0
            data = file.read(_TAIL_BYTES)
        data = data[: data.rfind(b"\n") + 1]
        self._position_bytes += len(data)
        return [record for line in data.splitlines() if (record := _decode(line)) is not None]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of ``path``, none if it is missing; warns of damaged lines other than a torn last one."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = [_decode(line) for line in lines]
    for number, (line, record) in enumerate(zip(lines, records, strict=True), start=1):
        if record is None and line and number < len(lines):
            get_logger().warning(f"{path}: line {number} is damaged and ignored")
    return [record for record in records if record is not None]


def repair(directory: Path) -> None:
    """Repair the files of a finished run as opening them for writing does."""
    for path in (directory / METRICS_FILE, directory / EVENTS_FILE):
        if path.exists():
            JsonLines(path).close()


def only_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records that have a step."""
    return [record for record in records if isinstance(record.get("step"), int)]


def _encode(record: dict[str, Any]) -> bytes:
    try:
        text = _ENCODER.encode(record)
    except (TypeError, ValueError):  # something that JSON lacks; rare, so a walk in Python will do
        non_finite: dict[str, str] = {}
        plain = {str(key): _plain(value, str(key), non_finite) for key, value in record.items()}
        text = _ENCODER.encode(plain | {"non_finite": non_finite} if non_finite else plain)
    return text.encode(errors="replace") + b"\n"


def _plain(value: Any, name: str, non_finite: dict[str, str]) -> Any:
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        non_finite[name] = str(float(value))
        return None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{name}.{key}", non_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}.{index}", non_finite) for index, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        return _plain(value.item(), name, non_finite)
    return str(value)


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _repair(file: int, path: Path) -> int:
    """Terminate a whole last line, cut off a torn one; return the size in bytes."""
    size = os.fstat(file).st_size
    begin, tail = size, b""
    while begin > 0 and b"\n" not in tail:
        length = min(_REPAIR_CHUNK_BYTES, begin)
        begin -= length
        tail = os.pread(file, length, begin) + tail
    tail = tail[tail.rfind(b"\n") + 1 :]
    if not tail:
        return size
    if _decode(tail) is not None:
        return size + os.write(file, b"\n")
    get_logger().warning(f"{path}: removed a torn last line of {len(tail)} bytes")
    os.ftruncate(file, size - len(tail))
    return size - len(tail)
