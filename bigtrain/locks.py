"""Locks that end with the process that holds them, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[BinaryIO | None]:
    """Hold a lock that ends with this process and give the locked file, or None if ``wait`` is false and it is taken."""
    while True:
        with open(path, "a+b") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            # Whoever had the lock before may have renamed or removed the file.
            if _is_file(path, handle):
                yield handle
                return


def is_locked(path: Path) -> bool:
    """Return whether there is such a file, and some process or thread holds its lock."""
    try:
        with open(path, "r+b") as handle:  # NFS locks only what can be written
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _is_file(path: Path, handle: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
