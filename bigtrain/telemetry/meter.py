"""Times optimizer steps and their phases."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bigtrain.telemetry import names


class StepMeter:
    """Times steps and their phases.

    A step lasts from the end of the one before, so waiting for data counts; time between the end of a step and
    :meth:`skip` (validation, a checkpoint) does not. On a device that runs ahead of the host only means over a logging
    interval are exact, because an interval ends in a synchronisation; phases on the device are timed there, by events
    in the interval's last step.
    """

    def __init__(
        self,
        step_size: int,
        clock: Callable[[], float] = time.perf_counter,
        device: torch.device | None = None,
        unit: str = names.TOKENS,
    ) -> None:
        """Begin the first step now; ``step_size`` is in tokens or samples, as ``unit`` says, over all ranks."""
        self._step_size, self._unit = step_size, unit
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
        """Attribute the time since the last mark to ``phase``, one of :data:`names.PHASES`."""
        now = self._clock()
        self._seconds[phase] += now - self._mark
        self._mark = now
        if phase in self._events:
            self._events[phase].record()

    def data_ready(self, micro_batches: Sequence[Any]) -> None:
        """End the wait for data; count the pairs that the document mask leaves, if there is one."""
        for batch in micro_batches:
            positions = batch.get("positions")  # counted from 0 at each document
            if positions is not None:
                self._num_pairs += int(positions.sum()) + positions.numel()
                self._num_masked_tokens += positions.numel()
        self.mark(names.DATA_SECONDS)

    def step_done(self, done: int) -> dict[str, float]:
        """End a step and begin the next; return ``tokens`` (or ``samples``), ``step_seconds`` and ``tokens_per_second``."""
        now = self._clock()
        seconds = max(now - self._begin, 1e-9)  # a coarse clock may not have moved
        self._begin = now
        self._num_steps += 1
        return {
            self._unit: done,
            names.STEP_SECONDS: seconds,
            f"{self._unit}_per_second": self._step_size / seconds,
        }

    def phases(self) -> dict[str, float]:
        """Return mean seconds by phase since the last call, and pairs per token; the device must have finished."""
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
