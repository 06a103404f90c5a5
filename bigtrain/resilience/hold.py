"""The hold of a launch on its run: a lock that ends with the process, and signs of life for those who meet it.

A lock alone is not enough on many nodes: one that is cut off may keep it, on a file server that has not noticed or in
a process that stands still, while Slurm has queued the job again elsewhere. So the holder touches the file now and then,
and who may wait takes over when that has stopped: it puts a new file in the place of the locked one. The old
holder sees that as soon as it moves again, and ends before it writes anything more.
"""

import contextlib
import errno
import fcntl
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bigtrain.errors import EXIT_NO_RESTART, ConfigError
from bigtrain.log import get_logger

BEAT_SECONDS = 3.0
LEASE_SECONDS = 30.0
"""A holder without a sign of life for so long is cut off."""
PATIENCE_SECONDS = 600.0
"""So long a restart waits for a holder that is alive: its watchdog may have to notice that other nodes are gone, which
takes three times the longest phase."""
_LOOK_SECONDS = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Hold:
    """A locked file; it is let go at the latest when the process ends."""

    def __init__(self, path: Path, file: int) -> None:
        """Take the open and locked ``file`` at ``path``."""
        self.file = file
        self._path = path
        self._released = threading.Event()
        self._lock = threading.Lock()  # the number of a closed file may be another file's

    def keep(self) -> None:
        """Give signs of life from now on, and end this process when another launch has taken over."""
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Let go."""
        with self._lock:
            self._released.set()
            os.close(self.file)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with self._lock, contextlib.suppress(OSError):
                if not self._released.is_set():
                    self._give_sign()

    def _give_sign(self) -> None:
        if _is_at(self._path, self.file) or not self._path.exists():  # to remove or rename it is not to take over
            os.utime(self.file)
            return
        print(
            f"{self._path.parent}: nothing was heard of this launch for a while, and another one has taken the run over; "
            "this one ends here",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_NO_RESTART)


def take_hold(path: Path, *, patient: bool) -> Hold:
    """Lock the file ``path``, which is made if needed.

    Args:
        path: its content says who has it: ``pid``, ``host`` and ``time``.
        patient: whether to wait for a holder that may be cut off; a holder that seems to be silent is always waited for.

    Raises:
        ConfigError: another process has it and is alive.
        OSError: the file cannot be opened.
    """
    sign, waited, silent = 0, 0.0, 0.0
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_mine = _lock(file, path)
        except OSError:
            os.close(file)
            raise
        if is_mine:
            if _is_at(path, file):
                return Hold(path, file)
            os.close(file)  # somebody else has just replaced it
            continue
        with os.fdopen(file, "rb") as held:
            status, content = os.fstat(file), held.read()
            # Only looks that succeed count: while the file server is away, neither side can say or hear anything.
            silent = silent + _LOOK_SECONDS if status.st_mtime_ns == sign else 0.0
            sign = status.st_mtime_ns
            if silent >= LEASE_SECONDS and _is_at(path, file):
                get_logger().warning(f"{_in_use(path, content)} gives no sign of life any more: taken over")
                _replace(path, content)
                continue
        patient = patient or time.time() - status.st_mtime > LEASE_SECONDS
        if not patient or waited > PATIENCE_SECONDS:
            advice = "wait for its end, stop it, or choose another run.name"
            raise ConfigError(f"{_in_use(path, content)}; {advice}")
        if waited == 0:
            get_logger().warning(f"{_in_use(path, content)}: waiting for its end or its silence")
        time.sleep(_LOOK_SECONDS)
        waited += _LOOK_SECONDS


def _lock(file: int, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        get_logger().warning(
            f"the file system of {path.parent} has no locks ({error.strerror}): a second launch of this run at the same "
            "time would not be noticed and would damage it"
        )
    return True


def _is_at(path: Path, file: int) -> bool:
    # Opened, because a client of a file server may answer stat from its cache for a minute.
    try:
        found = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return os.path.samestat(os.fstat(found), os.fstat(file))
    finally:
        os.close(found)


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    new.write_bytes(content)
    os.replace(new, path)


def _in_use(path: Path, content: bytes) -> str:
    owner: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        owner = dict(json.loads(content))
    who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('time')}"
    return f"{path.parent} is in use by another launch ({who})"
