"""Functions over many tasks on all cores, results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from bigtrain import log
from bigtrain.errors import DataError
from bigtrain.processes import STOP_SIGNALS, RankInfo

Result = TypeVar("Result")
Run = Callable[[Callable[..., Result], Iterable[tuple]], Iterator[Result]]


@contextmanager
def workers(num_processes: int) -> Iterator[Run]:
    """Give a function that yields ``function(*task)`` for every task, in order; with one process, in this one.

    Tasks are read so far ahead as the processes need, which end when this one does. DataError if a worker was killed.
    """
    # Processes of a daemon (ranks that a test has started) are not allowed.
    if num_processes < 2 or multiprocessing.current_process().daemon:
        yield lambda function, tasks: (function(*task) for task in tasks)
        return
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=_begin)

    def run(function: Callable[..., Result], tasks: Iterable[tuple]) -> Iterator[Result]:
        running: deque[Future[Result]] = deque()
        for task in tasks:
            running.append(pool.submit(function, *task))
            if len(running) >= 2 * num_processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    try:
        yield run
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
        """Return ``function(*args)`` computed in another process, or here where there is none or it was killed."""
        try:
            if not self._here:
                return self._pool.submit(function, *args).result()
        except BrokenProcessPool:
            log.get_logger().warning(
                "a helper process was killed, perhaps for want of memory; its work is now done here"
            )
            self._here = True
        return function(*args)


def _begin() -> None:
    log.setup(RankInfo.from_env().rank)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in STOP_SIGNALS:  # the main process ends this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
