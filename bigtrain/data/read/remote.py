"""A corpus behind any fsspec URL: its files are fetched ahead of need into a cache on this node's disk.

Cached files are named by the hash of their content, so that every process of the node, every run and
every corpus with the same shard share one copy.
"""

import hashlib
import os
import random
import time
from collections.abc import Callable, Sequence
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import BinaryIO, TypeVar

from bigtrain.config.packages import require
from bigtrain.data.read.cache import Ahead, NodeCache, explained
from bigtrain.data.read.index import INDEX_FILE, parse_index
from bigtrain.errors import BigtrainError, DataError, ShardError, StopError, as_data_error
from bigtrain.files import FileRecord, hash_content
from bigtrain.log import get_logger

T = TypeVar("T")

RANGE_BYTES = 8 << 20  # bytes per request
REQUEST_SECONDS = 60.0  # a request that has not ended by then has failed
NUM_ATTEMPTS = 8  # tries of a request, and of a file whose content is damaged, before giving up
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0  # less up to one half, by chance
NUM_FETCHERS = 2  # background threads per process


def is_url(path: str) -> bool:
    """Return whether ``path`` is a URL and not a local path."""
    return "://" in path


class RemoteDirectory:
    """Reads files below a URL and waits out faults that pass."""

    def __init__(self, url: str) -> None:
        """Take any URL that fsspec knows; credentials and endpoints are those of its file systems."""
        import fsspec

        if url.startswith("s3://"):
            require(f"data.path={url}", "s3fs", "s3")
        self.url = url.rstrip("/")
        with as_data_error(f"data.path={url}", ImportError, ValueError, problem="cannot be opened"):
            self._file_system, self._root = fsspec.core.url_to_fs(self.url)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return a file, or its bytes ``[start, end)``; ShardError if there is none, DataError if it cannot be read."""
        return self._ask(name, lambda: self._read_once(name, start, end))

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None where the server does not tell; raises as :meth:`read`."""
        return self._ask(name, lambda: self._file_system.size(f"{self._root}/{name}"))

    def _ask(self, name: str, function: Callable[[], T]) -> T:
        where = f"{self.url}/{name}"
        try:
            return patiently(function, where, may_pass=_may_pass)
        except FileNotFoundError as error:
            raise ShardError(f"{where}: missing") from error
        except BigtrainError:
            raise
        except Exception as error:  # what may not pass
            raise DataError(f"{where}: may not be read: {error}") from error

    def _read_once(self, name: str, start: int | None, end: int | None) -> bytes:
        import fsspec.asyn

        path = f"{self._root}/{name}"
        if getattr(self._file_system, "async_impl", False):
            read = self._file_system._cat_file  # the public method has no time-out
            content = fsspec.asyn.sync(
                self._file_system.loop, read, path, start=start, end=end, timeout=REQUEST_SECONDS
            )
        else:  # such as hf://; others read ahead, and each range opens the file anew
            content = self._file_system.cat_file(path, start=start, end=end, cache_type="none")
        if end is None or len(content) == end - start:
            return content
        if len(content) < end:
            raise OSError(f"{len(content)} bytes came instead of {end - start} from byte {start}")
        return content[start:]


def _may_pass(error: Exception) -> bool:
    """Return whether a fault may pass: not a missing or forbidden file; each library has its own classes."""
    is_final = isinstance(error, FileNotFoundError | PermissionError) or type(error).__name__ == "NoCredentialsError"
    return not is_final and getattr(error, "status", 0) not in (401, 403)


def patiently(function: Callable[[], T], where: str, *, may_pass: Callable[[Exception], bool]) -> T:
    """Call ``function`` up to ``NUM_ATTEMPTS`` times, again after errors that ``may_pass``; then raise a DataError."""
    for attempt in range(NUM_ATTEMPTS):
        try:
            return function()
        except Exception as error:
            if isinstance(error, StopError) or not may_pass(error):
                raise
            problem = f"{where}: {type(error).__name__}: {error}"
            if attempt == NUM_ATTEMPTS - 1:
                raise DataError(
                    f"{problem}; given up after {NUM_ATTEMPTS} tries, the same command continues"
                ) from error
            wait_seconds = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt) * random.uniform(0.5, 1)
            get_logger().warning("%s; trying again in %.1f s", problem, wait_seconds)
            time.sleep(wait_seconds)
    raise AssertionError


def read_remote_index(remote: RemoteDirectory) -> bytes:
    """Return the ``index.json`` of a prepared corpus at a URL, still to be parsed; DataError if there is none."""
    try:
        return remote.read(INDEX_FILE)
    except ShardError as error:
        raise DataError(
            f"{remote.url}: no prepared corpus here (no {INDEX_FILE}); make one with launch/prepare.py and copy its "
            "directory there"
        ) from error


def fetch_index(url: str, cache: Path) -> Path:
    """Copy index and tokenizer of a corpus at ``url`` below ``cache``; return the directory, or raise a DataError."""
    import xxhash

    remote = RemoteDirectory(url)
    directory = cache / "indexes" / hashlib.sha256(remote.url.encode()).hexdigest()[:16]
    text = read_remote_index(remote)
    record = parse_index(text, remote.url).tokenizer
    contents = {INDEX_FILE: text}
    for file in (record.file, *record.published):
        contents[file.name] = remote.read(file.name)
        if xxhash.xxh3_128_hexdigest(contents[file.name]) != file.xxh3:
            raise DataError(f"{remote.url}/{file.name}: not the tokenizer that the corpus was prepared with")
    with explained(cache):
        for name, content in contents.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.write_bytes(content)
            partial.replace(path)
    return directory


class ShardCache:
    """Files of a remote corpus in a cache on this node's disk, named by the hash of their content."""

    def __init__(self, remote: RemoteDirectory, directory: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._cache = NodeCache(directory, max_bytes)
        self._remote = remote
        self._verified: set[str] = set()
        self._ahead = Ahead(lambda file: self._fetch(file, wait=False), NUM_FETCHERS)

    def open(self, file: FileRecord) -> BinaryIO:
        """Return the file, which stays readable when it leaves the cache; ShardError if missing or damaged."""
        with explained(self._cache.directory):
            while (handle := self._cached(file)) is None:
                self._fetch(file, wait=True)
        return handle

    def holds(self, file: FileRecord) -> bool:
        return self._cache.holds(file.xxh3)

    def prefetch(self, files: Sequence[FileRecord]) -> None:
        """Begin to fetch ``files`` in this order; what goes wrong is left to :meth:`open`."""
        self._ahead.want(file for file in files if not self.holds(file))

    def _cached(self, file: FileRecord) -> BufferedReader | None:
        handle = self._cache.open(file.xxh3)
        # Once per process: disks and crashes damage files too.
        if handle and file.xxh3 not in self._verified:
            if hash_content(handle) != file.xxh3:
                get_logger().warning("%s is damaged and is fetched again", self._cache.path(file.xxh3))
                self._cache.discard(file.xxh3)
                handle.close()
                return None
            self._verified.add(file.xxh3)
        return handle

    def _fetch(self, file: FileRecord, *, wait: bool) -> None:
        """Put ``file`` into the cache; without ``wait``, do nothing if another process or thread is at it."""
        with self._cache.making(file.xxh3, file.num_bytes, wait=wait) as handle:
            if handle is not None:
                self._download(file, handle)
                self._verified.add(file.xxh3)

    def _download(self, file: FileRecord, handle: BufferedRandom) -> None:
        where = f"{self._remote.url}/{file.name}"
        # In the store itself; a body that is cut off on its way is another matter and tried again.
        if (size := self._remote.size(file.name)) not in (file.num_bytes, None):
            raise ShardError(f"{where}: damaged: {size} bytes, {INDEX_FILE} says {file.num_bytes}")
        for attempt in range(NUM_ATTEMPTS):
            position = handle.seek(0, os.SEEK_END)
            while position < file.num_bytes:
                end = min(position + RANGE_BYTES, file.num_bytes)
                position += handle.write(self._remote.read(file.name, position, end))
                handle.flush()  # what is there is not asked for again, even after a kill
            if hash_content(handle) == file.xxh3:
                return
            handle.truncate(0)
            get_logger().warning("%s: damaged on arrival, try %d of %d", where, attempt + 1, NUM_ATTEMPTS)
        raise ShardError(f"{where}: damaged: its content is not what was prepared, {NUM_ATTEMPTS} times in a row")
