"""Directories that are there whole or not at all."""

from collections.abc import Callable
from pathlib import Path

from bigtrain.errors import as_data_error
from bigtrain.files import locked, sync
from bigtrain.log import get_logger


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
