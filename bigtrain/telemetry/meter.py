"""Times optimizer steps."""

import time
from collections.abc import Callable

from bigtrain.telemetry import names


class StepMeter:
    """Turns the ends of optimizer steps into seconds and tokens per second.

    A step lasts from the end of the one before, so the wait for data counts; what happens between the end of a
    step and :meth:`skip` (validation, a checkpoint) does not.

    On a device that runs ahead of the host, a single value says when the host was let go; means over a logging
    interval are exact, because an interval ends in a synchronisation.
    """

    def __init__(self, tokens_per_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin the first step now.

        Args:
            tokens_per_step: Tokens of an optimizer step over all ranks.
            clock: Returns monotonic seconds.
        """
        self._tokens_per_step = tokens_per_step
        self._clock = clock
        self._begin = clock()

    def skip(self) -> None:
        """Begin the next step now: the time since the last one ended belongs to none."""
        self._begin = self._clock()

    def step_done(self, step: int) -> dict[str, float]:
        """End the step after which ``step`` steps of the run are done, and begin the next one.

        Returns:
            ``tokens`` of the run so far, ``step_seconds`` and ``tokens_per_second`` of the step.
        """
        now = self._clock()
        seconds = max(now - self._begin, 1e-9)  # a coarse clock may not have moved
        self._begin = now
        return {
            names.TOKENS: step * self._tokens_per_step,
            names.STEP_SECONDS: seconds,
            names.TOKENS_PER_SECOND: self._tokens_per_step / seconds,
        }
