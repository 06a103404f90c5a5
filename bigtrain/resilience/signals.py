"""Stopping: a signal sets a flag, and all ranks agree on the step boundary at which they stop."""

import signal
import time
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FORCE_AFTER_SECONDS = 2.0
"""A launcher repeats the terminal's Ctrl-C at once; only a later one means that the user insists."""


class StopSignal:
    """From entering on, SIGINT, SIGTERM and SIGUSR1 set a flag instead of ending the process.

    Leaving puts the handlers back unless a stop is wanted.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why this rank wants to stop: the name of the signal, or what :meth:`request` was told."""
        self._first_time = 0.0

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Once it is to stop the process only has to end, and what a launcher repeats must not disturb that.
        if self.reason is None:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def request(self, reason: str) -> None:
        """Want to stop without a signal; the first reason stays."""
        self.reason = self.reason or reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.reason is None:
            self.reason, self._first_time = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._first_time > FORCE_AFTER_SECONDS:
            raise KeyboardInterrupt


class StopAgreement:
    """Agreement of all ranks to stop at the same step, without waiting for each other.

    The exchange that a rank starts after one step is read after the next one, when it has long
    been completed in the background; so every rank learns of a signal at the same step boundary.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def poll(self, wants_stop: bool) -> bool:
        """Return whether any rank wanted to stop at the previous call; every rank calls this once per step."""
        if dist.get_world_size() == 1:
            return wants_stop
        agreed = self.settle()
        flag = torch.tensor([int(wants_stop)])
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)
        return agreed

    def settle(self) -> bool:
        """Wait for the exchange under way, if any, and return its result."""
        if self._pending is None:
            return False
        work, flag = self._pending
        work.wait()
        self._pending = None
        return bool(flag)
