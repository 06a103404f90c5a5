"""Files on this node's disk that are made when they are wanted and not there, shared by all processes of the node.

A file gets its name only when it is complete; until then it is ``<name>.<size>.partial``, locked by the process that
writes it. The lock is flock's and dies with the process: another one goes on where a killed one has stopped. Files
that were not used for longest make room for new ones. Who waits for a partial file does not hang
(:mod:`bigtrain.supervise.watchdog`).
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from bigtrain.config import DataConfig
from bigtrain.errors import ShardError, as_data_error
from bigtrain.files import is_locked, locked


class NodeCache:
    """A directory of such files."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Keep up to ``max_bytes`` of files in ``directory``; DataError if it cannot be made."""
        self.directory = directory
        self.max_bytes = max_bytes
        with explained(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.directory / name

    def holds(self, name: str) -> bool:
        return self.path(name).exists()

    def is_being_made(self, name: str) -> bool:
        """Return whether another process or thread is at a file of unknown size."""
        return is_locked(self.directory / f"{name}.0.partial")

    def open(self, name: str) -> BufferedReader | None:
        """Return a file, open for reading, or None; it counts as used, and stays readable when it leaves the cache."""
        try:
            handle = open(self.path(name), "rb")  # noqa: SIM115  the caller closes it
        except FileNotFoundError:
            return None
        with contextlib.suppress(FileNotFoundError):  # it may leave the cache at any time
            os.utime(self.path(name))
        return handle

    def discard(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def making(self, name: str, num_bytes: int, *, wait: bool) -> Iterator[BufferedRandom | None]:
        """Give the partial file, locked, to be completed; at the end of the context it gets its name.

        Gives None for a file that is there, or that another one makes unless it is to ``wait``. A size of 0 is not
        known.
        """
        partial = self.directory / f"{name}.{num_bytes}.partial"
        with locked(partial, wait=wait) as handle:
            if handle is None:
                yield None
            elif self.holds(name):
                partial.unlink()
                yield None
            else:
                self.make_room()
                os.utime(handle.fileno())  # the watchdog sees by its time that somebody is at it
                try:
                    yield handle
                except ShardError:  # there is nothing to go on with
                    partial.unlink()
                    raise
                partial.rename(self.path(name))

    def make_room(self) -> None:
        """Remove the files that were not used for longest until what is there and what is coming fits."""
        with locked(self.directory / "eviction.lock", wait=True):
            num_bytes, removable = 0, []
            for path in self.directory.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    if path.suffix == ".partial" and is_locked(path):
                        num_bytes += int(path.suffixes[-2][1:])  # what it will have
                    elif path.is_file():
                        num_bytes += stat.st_size
                        removable.append((stat.st_mtime_ns, stat.st_size, path))
            for _, size, path in sorted(removable):
                if num_bytes <= self.max_bytes:
                    return
                if path.name != "eviction.lock":
                    path.unlink(missing_ok=True)
                    num_bytes -= size


def explained(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Turn what the disk of a cache refuses into a DataError that says what to do."""
    advice = "; choose another data.cache_directory or a smaller data.cache_gib"
    return as_data_error(directory, problem="cannot be used as a cache", advice=advice)


class Ahead:
    """Background threads that fetch what will be needed, in the order in which it was asked for."""

    def __init__(self, fetch: Callable[[Any], None], num_threads: int) -> None:
        """Call ``fetch`` with what is wanted; what goes wrong is left to whoever needs it."""
        self._fetch = fetch
        self._wanted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: set[Any] = set()
        # Daemons, so that the end of the process waits for no download; a killed one leaves nothing wrong.
        for _ in range(num_threads):
            threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def want(self, items: Iterable[Hashable]) -> None:
        for item in items:
            if item not in self._waiting:
                self._waiting.add(item)
                self._wanted.put(item)

    def _work(self) -> None:
        while True:
            item = self._wanted.get()
            with contextlib.suppress(Exception):
                self._fetch(item)
            self._waiting.discard(item)


def cache_directory(config: DataConfig) -> Path:
    """Return where this node keeps what was fetched or tokenised."""
    return Path(config.cache_directory or Path(config.root, "cache"))
