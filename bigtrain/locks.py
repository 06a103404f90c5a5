"""Locks that end with the process that holds them, however it ends; what to do where a file system has none."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bigtrain.log import get_logger

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[BinaryIO | None]:
    """Hold a lock that ends with this process and give the locked file, or None if ``wait`` is false and it is taken.

    Where the file system has no locks, processes of this machine still exclude each other.
    """
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
    """Lock an open file; return True, False if it is taken, or None, saying so once, if there are no locks.

    Raises:
        OSError: neither.
    """
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
