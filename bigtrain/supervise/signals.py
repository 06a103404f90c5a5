"""Stop requests by signal, file or time limit; before the run is taken, a signal ends the process at once.

Imports nothing slow: signals are handled from the first moments of the process.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from bigtrain.errors import EXIT_FINISHED, EXIT_RESUMABLE, StopError
from bigtrain.processes import STOP_SIGNALS, RankInfo, only_zero_is_success

REASONS = (
    "run.stop_after_steps",
    "run.max_minutes",
    *(number.name for number in STOP_SIGNALS),
    "stop file",
    "checkpoint.max_failures",
    MOVED := "renamed or removed directory",
)
"""Why a run stops before its end; where ranks have different reasons, the last of these counts."""
STOP_FILE = "STOP"
FORCE_AFTER_SECONDS = 2.0  # A launcher repeats the terminal's Ctrl-C at once; a later one is the user's second
_PR_SET_PDEATHSIG = 1
STOP_WITH_PARENT = "BIGTRAIN_STOP_WITH_PARENT"
"""In the environment of a launch that is not to outlive the process that has started it."""


class EarlyStop:
    """Ends the process by ``os._exit`` at a stop signal, until :class:`StopSignal` listens: nothing is to be saved."""

    def __init__(self) -> None:
        # Records the reason, once it is known where. Only for a single process: to one of several ranks, SIGTERM may be
        # the launcher's answer to the failure of another one.
        self.leave_word: Callable[[str], None] = lambda reason: None
        self._pid = os.getpid()
        _stop_with_torchrun()
        for number in STOP_SIGNALS:
            # A batch script lets ranks ignore a signal that it repeats until all of them have begun.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        info, reason = RankInfo.from_env(), signal.Signals(number).name
        if info.rank == 0 and os.getpid() == self._pid:
            unless = "unless another rank has failed, " if info.world_size > 1 else ""
            with contextlib.suppress(OSError):  # a terminal that is closed
                os.write(2, f"stopped by {reason} before the first step; {unless}the same command continues\n".encode())
            if info.world_size == 1:
                with contextlib.suppress(Exception):
                    self.leave_word(reason)
        os._exit(EXIT_FINISHED if only_zero_is_success() else EXIT_RESUMABLE)


def _stop_with_torchrun() -> None:
    """Ask for SIGTERM when torchrun, or a sweep, is killed (kill -9, SIGUSR1): its ranks would train on."""
    if {"TORCHELASTIC_RUN_ID", STOP_WITH_PARENT} & os.environ.keys() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignal:
    """Records stop signals as a flag, to the end of the process: what a launcher repeats does not disturb the end."""

    def __init__(self) -> None:
        self.reason: str | None = None  # of REASONS
        self.at_once = False  # raise a StopError too, while there is nothing to save
        self._first_time = 0.0

    def listen(self) -> None:
        """Take the signals over; SIGHUP stays ignored where it is, as nohup wants."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def request(self, reason: str | None) -> None:
        """Request a stop, unless ``reason`` is None; the first reason stays."""
        self.reason = self.reason or reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.reason is None:
            self.reason, self._first_time = signal.Signals(number).name, now
            if self.at_once:
                raise StopError(f"stopped by {self.reason} before the first step; the same command continues")
        elif number == signal.SIGINT and now - self._first_time > FORCE_AFTER_SECONDS:
            raise KeyboardInterrupt


class StopLimits:
    """The other stop requests: the file ``STOP`` in the run's directory, and a time limit."""

    CHECK_SECONDS = 0.5

    def __init__(self, directory: Path, max_minutes: float | None, *, started: float) -> None:
        """Set the limit of a launch that ``started`` at a time of ``time.monotonic``."""
        self._file = directory / STOP_FILE
        self._end = None if max_minutes is None else started + 60 * max_minutes
        self._next_look = 0.0
        self.save_seconds = 0.0  # the longest save so far, for which the time limit leaves room

    def reached(self) -> str | None:
        """Return the reason to stop, if any; stats the file at most twice a second."""
        now = time.monotonic()
        if self._end is not None and now + self.save_seconds >= self._end:
            return "run.max_minutes"
        if now < self._next_look:
            return None
        self._next_look = now + self.CHECK_SECONDS
        return "stop file" if self._file.exists() else None

    def honour(self) -> None:
        """Remove the stop file, so that the next launch continues."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)
