"""Stopping: signals, a file and a time limit become a wish to stop; before the run is taken, a signal ends it at once.

Nothing slow is imported here: a process is to end in order from its first moments on.
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
FORCE_AFTER_SECONDS = 2.0
"""A launcher repeats the terminal's Ctrl-C at once; only a later one means that the user insists."""


_PR_SET_PDEATHSIG = 1


class EarlyStop:
    """From its making until :class:`StopSignal` listens, stop signals end this process with the code of a stop.

    There is nothing to save and nobody to agree with, and libraries that are being imported may swallow exceptions: the
    process ends where it stands.
    """

    def __init__(self) -> None:
        self.leave_word: Callable[[str], None] = lambda reason: None
        """Records the stop for a reason; for a single process, once it is known where.

        To one of several ranks SIGTERM may be the launcher's answer to another one, which has failed without a record.
        """
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
    """Have SIGTERM sent to this rank when torchrun ends without a word (kill -9, SIGUSR1): it would train on."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class StopSignal:
    """Once it listens, stop signals set a flag, until the process ends.

    So what a launcher sends, or repeats, when the run has ended does not disturb its last words and its exit code.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why this rank wants to stop: one of :data:`REASONS`."""
        self.at_once = False
        """Whether a signal raises a StopError too: there is nothing to save yet, and nobody who asks for the flag."""
        self._first_time = 0.0

    def listen(self) -> None:
        """Take the signals over; SIGHUP stays ignored where it is, as nohup wants."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def request(self, reason: str | None) -> None:
        """Want to stop without a signal, unless ``reason`` is None; the first reason stays."""
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
    """What besides signals ends a launch: the file ``STOP`` in the run's directory, and a time limit."""

    CHECK_SECONDS = 0.5

    def __init__(self, directory: Path, max_minutes: float | None, *, started: float) -> None:
        """Look at nothing yet.

        Args:
            directory: of the run.
            max_minutes: time limit of this launch; None if there is none.
            started: when it began, in monotonic seconds.
        """
        self._file = directory / STOP_FILE
        self._end = None if max_minutes is None else started + 60 * max_minutes
        self._next_look = 0.0
        self.save_seconds = 0.0
        """The longest save so far: the time limit is kept with such a save at the end."""

    def reached(self) -> str | None:
        """Return the reason to stop, if there is one; looks at the file twice a second at most."""
        now = time.monotonic()
        if self._end is not None and now + self.save_seconds >= self._end:
            return "run.max_minutes"
        if now < self._next_look:
            return None
        self._next_look = now + self.CHECK_SECONDS
        return "stop file" if self._file.exists() else None

    def honour(self) -> None:
        """Remove the stop file, so that the next launch goes on."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)
