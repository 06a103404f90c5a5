"""Progress of long work, as a bar on a terminal or lines in the log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bigtrain.log import get_logger

_REPORT_SECONDS = 10.0


@contextmanager
def reporter(title: str, total_bytes: int | None, progress: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that is called with each number of bytes done and shows the progress."""
    if progress and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total_bytes)
            yield lambda num_bytes: bar.advance(task, num_bytes)
    else:
        done_bytes, due = 0, time.monotonic() + _REPORT_SECONDS
        total = f" of {total_bytes / 1e6:.0f}" if total_bytes else ""

        def advance(num_bytes: int) -> None:
            nonlocal done_bytes, due
            done_bytes += num_bytes
            if time.monotonic() >= due:
                get_logger().info("%s: %.0f%s MB", title, done_bytes / 1e6, total)
                due = time.monotonic() + _REPORT_SECONDS

        yield advance
