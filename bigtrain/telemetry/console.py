"""Rank 0's console: a progress display on a terminal, plain lines elsewhere, and always ``train.log``."""

import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from bigtrain.log import get_logger, redact
from bigtrain.telemetry import names
from bigtrain.telemetry.text import describe, format_duration
from bigtrain.telemetry.view import RunView

_REDRAW_SECONDS = 1.0  # between redraws, which hold the GIL for milliseconds
_MAX_WAITING = 1000  # queued lines
_CLOSE_SECONDS = 5.0  # to drain the queue at the end of a run


class Console:
    """Rank 0's display; a context manager.

    On a terminal a progress bar stays at the bottom and messages scroll above it; elsewhere each call prints a plain
    line. The same lines are appended to the log file with their time (UTC). The project's log messages go the same way.
    A terminal, pipe or disk that fails never raises, and one that blocks stops nobody: a thread writes from a bounded
    queue, and lines that overflow it are in the file only.
    """

    def __init__(
        self,
        total_steps: int,
        log_file: Path,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Draw where standard output is a capable terminal, or as ``is_terminal`` says."""
        self._total_steps = total_steps
        self._log_path = log_file
        can_draw = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self._is_terminal = can_draw if is_terminal is None else is_terminal
        self._clock = clock
        self._first: tuple[float, int] | None = None  # time and step of the first call of metrics
        self._lock = threading.Lock()  # of the log file

    def __enter__(self) -> "Console":
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log: TextIO | None = self._log_path.open("a", encoding="utf-8", errors="replace", buffering=1)
        self._streams, self._output = (sys.stdout, sys.stderr), _Output(sys.stdout)
        self._live = _LiveDisplay(self._total_steps, self._clock, self._output) if self._is_terminal else None
        self._waiting = SimpleQueue[Callable[[], Any] | None]()
        self._thread = threading.Thread(target=self._show_waiting, daemon=True)
        self._thread.start()
        self._handlers = get_logger().handlers
        get_logger().handlers = [_ToConsole(self)]
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        get_logger().handlers = self._handlers
        self._waiting.put(None)
        self._thread.join(_CLOSE_SECONDS)
        sys.stdout, sys.stderr = self._streams  # rich's replacements would block on its lock, held by a stuck thread
        with self._lock:
            if self._log:
                self._log.close()
                self._log = None

    def metrics(self, record: dict[str, Any]) -> None:
        step = record[names.STEP]
        left = self._seconds_left(step, record[names.STEP_SECONDS])
        line = f"step {step}/{self._total_steps}  {describe(record)}  {format_duration(left)} left"
        self._to_file(line)
        self._show(
            partial(self._live.metrics, record, left) if self._live else partial(self._output.write, f"{line}\n")
        )

    def _seconds_left(self, step: int, step_seconds: float) -> float:
        """Estimate by the mean pace since the first call, with pauses but without start-up and compilation."""
        now = self._clock()
        first_time, first_step = self._first = self._first or (now, step)
        pace = (now - first_time) / (step - first_step) if step > first_step else step_seconds
        return max(self._total_steps - step, 0) * pace

    def event(self, event: dict[str, Any]) -> None:
        if self._live:
            self._show(partial(self._live.event, event))

    def message(self, text: str) -> None:
        self.keep(text)
        text = redact(text)
        self._show(partial(self._live.message, text) if self._live else partial(self._output.write, f"{text}\n"))

    def keep(self, text: str) -> None:
        for line in redact(text).splitlines():
            self._to_file(line)

    def _show(self, shown: Callable[[], Any]) -> None:
        if self._waiting.qsize() < _MAX_WAITING:
            self._waiting.put(shown)

    def _show_waiting(self) -> None:
        while shown := self._waiting.get():
            shown()
        if self._live:
            self._live.close()

    def _to_file(self, line: str) -> None:
        with self._lock:
            if self._log is None:
                return
            try:
                self._log.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}\n")
                return
            except OSError as error:
                self._log, why = None, error
        self.message(f"cannot write {self._log_path}: {why}; its lines are shown here only")


class _Output:
    """Unbuffered standard output: the lock of Python's buffer would block the interpreter's exit in a stuck write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        try:
            self._file: int | None = stream.fileno()
        except (OSError, ValueError):  # a replacement, such as pytest's
            self._file = None
        self._is_gone = False

    def write(self, text: str) -> int:
        if not self._is_gone:
            try:
                self._write(text)
            except OSError:
                self._is_gone = True
                # Otherwise the interpreter's flush at exit would fail again and change the exit code.
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), 1 if self._file is None else self._file)
        return len(text)

    def _write(self, text: str) -> None:
        if self._file is None:
            self._stream.write(text)
            return
        rest = memoryview(text.encode(self.encoding, "replace"))
        while rest:
            rest = rest[os.write(self._file, rest) :]

    def flush(self) -> None: ...


class _LiveDisplay:
    """Draws the run below the messages, at most once in ``_REDRAW_SECONDS``."""

    def __init__(self, total_steps: int, clock: Callable[[], float], output: Any) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._view = RunView(total_steps)
        self._clock = clock
        self._console = RichConsole(file=output, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._drawn_at = -math.inf
        self._seconds_left = math.nan
        self._live.start()

    def metrics(self, record: dict[str, Any], seconds_left: float) -> None:
        self._view.add(record)
        self._seconds_left = seconds_left
        if self._clock() - self._drawn_at >= _REDRAW_SECONDS:
            self._drawn_at = self._clock()
            self._draw()

    def event(self, event: dict[str, Any]) -> None:
        self._view.add_event(event)

    def message(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._live.update(self._view.render(seconds_left=self._seconds_left), refresh=True)


class _ToConsole(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.message(self.format(record))
