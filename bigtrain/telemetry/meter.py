"""Times optimizer steps and their phases."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bigtrain.telemetry import names


class StepMeter:
    """Turns the ends of optimizer steps into seconds and tokens per second, and marks within them into phases.

    A step lasts from the end of the one before, so the wait for data counts; what happens between the end of a
    step and :meth:`skip` (validation, a checkpoint) does not.

    On a device that runs ahead of the host, a single value says when the host was let go; means over a logging
    interval are exact, because an interval ends in a synchronisation. There, the phases that the device computes
    are timed on the device, in the interval's last step: an event costs microseconds and no waiting.
    """

    def __init__(
        self,
        tokens_per_step: int,
        clock: Callable[[], float] = time.perf_counter,
        device: torch.device | None = None,
    ) -> None:
        """Begin the first step now; a step has so many tokens over all ranks."""
        self._tokens_per_step = tokens_per_step
        self._clock = clock
        self._begin = self._mark = clock()
        self._num_steps = self._num_pairs = self._num_masked_tokens = 0
        self._seconds = dict.fromkeys(names.PHASES, 0.0)
        on_cuda = device is not None and device.type == "cuda"
        timed = [phase for phase in self._seconds if on_cuda and phase != names.LOGGING_SECONDS]
        self._events = {phase: torch.cuda.Event(enable_timing=True) for phase in timed}

    def skip(self) -> None:
        """Begin the next step now: the time since the last one ended belongs to none."""
        self._begin = self._mark = self._clock()

    def mark(self, phase: str) -> None:
        """End a phase of the step: the time since the last mark is of ``phase``, one of the names ``perf/..._seconds``."""
        now = self._clock()
        self._seconds[phase] += now - self._mark
        self._mark = now
        if phase in self._events:
            self._events[phase].record()

    def data_ready(self, micro_batches: Sequence[Any]) -> None:
        """End the wait for the batch of a step, and count what its document mask leaves to attend to, if it has one."""
        for batch in micro_batches:
            positions = getattr(batch, "positions", None)  # counted from 0 at each document
            if positions is not None:
                self._num_pairs += int(positions.sum()) + positions.numel()
                self._num_masked_tokens += positions.numel()
        self.mark(names.DATA_SECONDS)

    def step_done(self, *, tokens: int) -> dict[str, float]:
        """End the step after which the run has trained on ``tokens``, and begin the next one.

        Returns:
            ``tokens`` of the run so far, ``step_seconds`` and ``tokens_per_second`` of the step.
        """
        now = self._clock()
        seconds = max(now - self._begin, 1e-9)  # a coarse clock may not have moved
        self._begin = now
        self._num_steps += 1
        return {
            names.TOKENS: tokens,
            names.STEP_SECONDS: seconds,
            names.TOKENS_PER_SECOND: self._tokens_per_step / seconds,
        }

    def phases(self) -> dict[str, float]:
        """Return the mean seconds per step of every phase since the last call; the device must have finished.

        Under a document mask also the pairs per token that it left.
        """
        means = {phase: seconds / max(self._num_steps, 1) for phase, seconds in self._seconds.items()}
        if self._events and self._num_steps:
            data, forward_backward = self._events[names.DATA_SECONDS], self._events[names.FORWARD_BACKWARD_SECONDS]
            staged, optimizer = self._events[names.CHECKPOINT_STALL_SECONDS], self._events[names.OPTIMIZER_SECONDS]
            means[names.FORWARD_BACKWARD_SECONDS] = data.elapsed_time(forward_backward) / 1000
            means[names.OPTIMIZER_SECONDS] = staged.elapsed_time(optimizer) / 1000
        if self._num_masked_tokens:
            means[names.PAIRS_PER_TOKEN] = self._num_pairs / self._num_masked_tokens
        self._num_steps = self._num_pairs = self._num_masked_tokens = 0
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return means
