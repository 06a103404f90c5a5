"""Files that others rely on: what one holds, that it is on the disk, and locks that end with their process."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BufferedRandom, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from bigtrain.errors import ConfigError, as_data_error
from bigtrain.log import get_logger

CONFIG_FILE = "config.yaml"
RUN_FILES = (CONFIG_FILE, "metrics.jsonl")  # a directory that has one of them is a run
PIECE_BYTES = 1 << 22  # hashed and written or read at a time, within the processor's cache

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint or of a corpus."""

    name: str  # plain file name
    num_bytes: int  # size
    xxh3: str  # XXH3 128-bit hash of the content, hexadecimal


def hash_content(file: BufferedIOBase | RawIOBase) -> str:
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


def such_as_runs(near: Path, *, holding: str = "") -> str:
    """Return ``", such as <run>, <run>"`` with runs, ``holding`` a pattern, near a path or in ``runs``; "" if none."""
    places = [near, *list(near.parents)[:2], Path("runs")]
    beside = (sorted(path.parent for path in place.glob(f"*/{RUN_FILES[0]}")) for place in places)
    having = ([run for run in runs if not holding or any(run.glob(holding))] for runs in beside)
    found = next(filter(None, having), [])
    return f", such as {', '.join(map(str, found[:4]))}" if found else ""


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError that says what to do about a run's directory."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error}; mend that or choose another run.root") from error


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path, fill: Callable[[Path], None]) -> None:
    """Create ``directory`` atomically with what ``fill`` writes, unless it is there or another process does."""
    if directory.exists():
        return
    work = directory.with_name(f".{directory.name}.partial")
    lock = work.with_suffix(".lock")
    with as_data_error(directory, problem="cannot be written"):
        work.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, wait=True):
            if not directory.exists():
                work.mkdir(exist_ok=True)
                fill(work)
                _publish(work, directory)
            lock.unlink(missing_ok=True)


def _publish(work: Path, directory: Path) -> None:
    """Rename the finished ``work`` to ``directory``, durably."""
    for path in (*work.rglob("*"), work):
        sync(path)
    try:
        work.rename(directory)
    except OSError:
        if not directory.exists():
            raise
        get_logger().info("%s was prepared by another process at the same time; using that", directory)
    sync(directory.parent)


def write_anew(path: Path, content: str | bytes) -> None:
    """Write text or bytes to ``path`` durably, whole or not at all, also where several processes do."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_durably(path: Path, parts: Iterable[memoryview]) -> FileRecord:
    """Write a new file, hashed on the way, so that it is on the disk; OSError if it exists or cannot be written."""
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


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[BufferedRandom | None]:
    """Hold a lock that ends with this process and give the locked file; None if it is taken and ``wait`` is false."""
    while True:
        with contextlib.ExitStack() as stack:
            handle = stack.enter_context(open(path, "a+b"))
            if not _lock(handle, path, stack, wait=wait):
                yield None
                return
            # Whoever had the lock before may have renamed or removed the file.
            if _is_file(path, handle):
                yield handle
                return


def is_locked(path: Path) -> bool:
    """Return whether there is such a file, and some process or thread holds its lock."""
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
        handle = stack.enter_context(open(path, "r+b"))  # NFS locks only what can be written
        return not _lock(handle, path, stack, wait=False)
    return False


def try_lock(file: int, path: Path, *, wait: bool = False) -> bool | None:
    """Lock an open file; return True, False if it is taken, or None, saying so once, if there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _say_no_locks(path.parent, error.strerror)
        return None
    return True


def _lock(handle: BinaryIO, path: Path, stack: contextlib.ExitStack, *, wait: bool) -> bool:
    got = try_lock(handle.fileno(), path, wait=wait)
    if got is None:
        place = Path(tempfile.gettempdir(), f"bigtrain-locks-{os.getuid()}")
        place.mkdir(mode=0o700, exist_ok=True)
        stand_in = place / hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()
        got = try_lock(stack.enter_context(stand_in.open("a+b")).fileno(), stand_in, wait=wait)
    return got is not False


@functools.cache
def _say_no_locks(directory: Path, reason: str) -> None:
    get_logger().warning(
        f"the file system of {directory} has no locks ({reason}): signs of life say who has a run, so that one that was "
        "killed is waited for; do not prepare the same data on two machines at once"
    )


def _is_file(path: Path, handle: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
