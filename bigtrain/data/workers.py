"""One function over many tasks on all cores, results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from bigtrain.errors import DataError
from bigtrain.log import get_logger

Task = TypeVar("Task", bound=tuple)
Result = TypeVar("Result")


def run_tasks(function: Callable[..., Result], tasks: Iterable[Task], num_processes: int) -> Iterator[Result]:
    """Yield ``function(*task)`` for every task, in order; with one process, in this one.

    Args:
        function: module-level function.
        tasks: picklable arguments; read so far ahead as the processes need.
        num_processes: worker processes; they end when this process does, however it ends.

    Raises:
        DataError: what ``function`` raises, or that a worker was killed.
    """
    # Processes of a daemon (ranks that a test has started) are not allowed.
    if num_processes < 2 or multiprocessing.current_process().daemon:
        yield from (function(*task) for task in tasks)
        return
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=_begin)
    running: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(function, *task))
            if len(running) >= 2 * num_processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that prepared data was killed, perhaps for want of memory; the same command goes on where it "
            "was, with data.prepare_processes=<fewer> it needs less"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Helpers:
    """Processes that work for the threads of this one; they are started when they are needed."""

    def __init__(self, num_processes: int | None) -> None:
        """Start up to ``num_processes``, by default 2."""
        self.num_processes = num_processes or 2
        self._pool = ProcessPoolExecutor(self.num_processes, multiprocessing.get_context("spawn"), initializer=_begin)
        self._here = multiprocessing.current_process().daemon

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Return ``function(*args)``, a module-level function and picklable arguments, computed in another process.

        Where there can be none, and when one was killed, it is computed in this one: the run goes on.
        """
        try:
            if not self._here:
                return self._pool.submit(function, *args).result()
        except BrokenProcessPool:
            get_logger().warning("a helper process was killed, perhaps for want of memory; its work is now done here")
            self._here = True
        return function(*args)


def _begin() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the main process ends this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
