"""A run that is followed from outside, by what it adds to its files."""

import time
from pathlib import Path

from bigtrain.telemetry.files import EVENTS_FILE, METRICS_FILE, Tail, only_steps
from bigtrain.telemetry.history import how_ended, last_sign, read_flat_config, run_state
from bigtrain.telemetry.view import RunView

_LOST_SECONDS = 120.0  # without a sign of life: nobody waits any longer


class FollowedRun:
    """Follows a run through its files, which may not exist yet; never writes."""

    def __init__(self, directory: Path) -> None:
        self.name = directory.resolve().name
        self.view = RunView()
        self._directory = directory
        self._metrics, self._events = Tail(directory / METRICS_FILE), Tail(directory / EVENTS_FILE)
        self._sign = last_sign(directory)
        # A file server's clock may be another: only here are the two compared.
        self._heard_at = time.monotonic() - (max(time.time() - self._sign, 0.0) if self._sign else 0.0)

    def read(self) -> None:
        """Read what was added since the last call."""
        steps = read_flat_config(self._directory).get("train.steps")  # another launch may have changed it
        self.view.total_steps = steps if isinstance(steps, int) else self.view.total_steps
        while records := self._metrics.read():
            for record in only_steps(records):
                self.view.add(record)
        while events := self._events.read():
            for event in events:
                self.view.add_event(event)
        if (sign := last_sign(self._directory)) != self._sign:
            self._sign, self._heard_at = sign, time.monotonic()

    def state(self) -> str:
        """Return ``begins``, or see :func:`bigtrain.telemetry.history.run_state`."""
        state = run_state(self._directory, self.view.events, self._silent_seconds())
        return "begins" if state == "running" and not self.view.last else state

    def is_over(self) -> bool:
        """Return whether the run has ended or has been silent for too long."""
        return how_ended(self._directory, self.view.events) is not None or self._silent_seconds() > _LOST_SECONDS

    def _silent_seconds(self) -> float:
        return time.monotonic() - self._heard_at
