"""Stopping: a wish to stop is noted, and all ranks agree on the step boundary at which they stop."""

import contextlib
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from bigtrain.errors import StopError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REASONS = (
    "run.stop_after_steps",
    "run.max_minutes",
    *(number.name for number in SIGNALS),
    "stop file",
    "checkpoint.max_failures",
)
"""Why a run stops before its end; where ranks have different reasons, the last of these counts."""
STOP_FILE = "STOP"
FORCE_AFTER_SECONDS = 2.0
"""A launcher repeats the terminal's Ctrl-C at once; only a later one means that the user insists."""


class StopSignal:
    """From entering on, SIGINT, SIGTERM and SIGUSR1 set a flag instead of ending the process.

    Leaving puts the handlers back, unless a stop is wanted or something has failed.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why this rank wants to stop: one of :data:`REASONS`."""
        self.at_once = False
        """Whether a signal raises a StopError too: there is nothing to save yet, and nobody who asks for the flag."""
        self._first_time = 0.0

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Then the process only has to end, and what a launcher sends, or repeats, must not disturb that.
        if self.reason is None and error is None:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

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


class StopAgreement:
    """Agreement of all ranks to stop at the same step, without waiting for each other.

    The exchange that a rank starts after one step is read after the next one, when it has long
    been completed in the background; so every rank learns of a wish at the same step boundary.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def poll(self, reason: str | None) -> str | None:
        """Return why a rank wanted to stop at the previous call, if one did; every rank calls this once per step.

        Args:
            reason: one of :data:`REASONS` if this rank wants to stop.
        """
        if dist.get_world_size() == 1:
            return reason
        agreed = self.settle()
        wish = torch.tensor([0 if reason is None else 1 + REASONS.index(reason)])
        self._pending = (dist.all_reduce(wish, dist.ReduceOp.MAX, group=self._group, async_op=True), wish)
        return agreed

    def settle(self) -> str | None:
        """Wait for the exchange under way, if any, and return its result."""
        if self._pending is None:
            return None
        work, wish = self._pending
        work.wait()
        self._pending = None
        return REASONS[int(wish) - 1] if wish else None
