"""Rank 0's display: a progress display on a terminal, plain lines elsewhere, and always ``train.log``."""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from bigtrain.log import get_logger
from bigtrain.telemetry import names
from bigtrain.telemetry.text import describe, format_duration
from bigtrain.telemetry.view import RunView

_REDRAW_SECONDS = 0.1  # fastest rate at which the terminal is drawn


class Console:
    """Shows metrics and messages to the person who trains; a context manager.

    On a terminal a progress bar with the newest numbers stays at the bottom and messages scroll above
    it. Elsewhere each call prints a plain line. The same lines, with the time (UTC), are appended to the
    log file. While entered, the project's log messages come here too, so that they neither tear the
    display nor miss the file. A terminal, pipe or disk that goes away never raises.
    """

    def __init__(
        self,
        total_steps: int,
        log_file: Path,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describe the display; nothing is opened before it is entered.

        Args:
            total_steps: Optimizer steps of the whole run.
            log_file: File to append to; its directory is made.
            is_terminal: Whether to draw; by default whether standard output is a terminal that can.
            clock: Returns monotonic seconds.
        """
        self._total_steps = total_steps
        self._log_path = log_file
        self._is_terminal = _can_draw(sys.stdout) if is_terminal is None else is_terminal
        self._time_left = _TimeLeft(total_steps, clock)
        self._clock = clock
        self._lock = threading.RLock()

    def __enter__(self) -> "Console":
        """Open the log file and begin to draw."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log: TextIO | None = self._log_path.open("a", encoding="utf-8", errors="replace", buffering=1)
        self._display = _LiveDisplay(self._total_steps, self._clock) if self._is_terminal else _PlainDisplay()
        self._handlers = get_logger().handlers
        get_logger().handlers = [_ToConsole(self)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last numbers on the terminal and close the log file."""
        get_logger().handlers = self._handlers
        with self._lock:
            self._display.close()
            if self._log:
                self._log.close()
                self._log = None

    def metrics(self, record: dict[str, Any]) -> None:
        """Show the numbers of a step.

        Args:
            record: As in ``metrics.jsonl``; see :mod:`bigtrain.telemetry.names`.
        """
        step = record[names.STEP]
        seconds_left = self._time_left.after(step, record[names.STEP_SECONDS])
        progress, numbers = f"step {step}/{self._total_steps}", describe(record)
        left = f"{format_duration(seconds_left)} left"
        with self._lock:
            self._to_file(f"{progress}  {numbers}  {left}")
            self._display.metrics(record, seconds_left, f"{progress}  {numbers}  {left}")

    def event(self, event: dict[str, Any]) -> None:
        """Take what happened, for the display; messages say it in words."""
        with self._lock:
            self._display.event(event)

    def message(self, text: str) -> None:
        """Show ``text``, which may have several lines."""
        with self._lock:
            for line in text.splitlines():
                self._to_file(line)
            self._display.message(text)

    def _to_file(self, line: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}\n")
        except OSError as error:
            self._log = None
            self._display.message(f"cannot write {self._log_path}: {error}; its lines are shown here only")


class _PlainDisplay:
    """Prints lines to standard output until nobody listens any more."""

    def metrics(self, record: dict[str, Any], seconds_left: float, line: str) -> None:
        self.message(line)

    def event(self, event: dict[str, Any]) -> None:
        pass

    def message(self, text: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        _write_or_forget(lambda: print(text.encode(encoding, "replace").decode(encoding), flush=True))

    def close(self) -> None:
        pass


class _LiveDisplay:
    """Draws the run below the messages.

    It draws when it is told something and has no thread of its own, which would take the interpreter
    from the training loop between two logging intervals.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._view = RunView(total_steps)
        self._clock = clock
        self._console = RichConsole(force_terminal=True, highlight=False, markup=False, emoji=False)
        self._console.on_broken_pipe = _forget_output  # instead of raising SystemExit
        self._live = Live(console=self._console, auto_refresh=False)
        self._drawn_at = -math.inf
        self._is_gone = False
        self._try(self._live.start)

    def metrics(self, record: dict[str, Any], seconds_left: float, line: str) -> None:
        self._view.add(record)
        self._live.update(self._view.render(seconds_left=seconds_left))
        if self._clock() - self._drawn_at >= _REDRAW_SECONDS:
            self._drawn_at = self._clock()
            self._try(self._live.refresh)

    def event(self, event: dict[str, Any]) -> None:
        self._view.add_event(event)

    def message(self, text: str) -> None:
        self._try(lambda: self._console.print(text, soft_wrap=True))

    def close(self) -> None:
        self._try(self._live.stop)

    def _try(self, draw: Callable[[], None]) -> None:
        if not self._is_gone:
            self._is_gone = not _write_or_forget(draw)


class _ToConsole(logging.Handler):
    """Sends log messages to the console."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.message(self.format(record))


class _TimeLeft:
    """Estimates the seconds to the end from the mean pace since the first call, pauses included.

    The time before the first call is left out: it holds compilation and the first touch of memory.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._first: tuple[float, int] | None = None

    def after(self, step: int, step_seconds: float) -> float:
        now = self._clock()
        if self._first is None:
            self._first = (now, step)
        first_time, first_step = self._first
        pace = (now - first_time) / (step - first_step) if step > first_step else step_seconds
        return max(self._total_steps - step, 0) * pace


def _can_draw(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _write_or_forget(write: Callable[[], None]) -> bool:
    """Write to standard output; if its reader is gone, send it to nowhere from now on and return False."""
    try:
        write()
    except OSError:
        _forget_output()
        return False
    return True


def _forget_output() -> None:
    # Otherwise the interpreter would fail once more when it flushes at exit, and spoil the exit code.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
