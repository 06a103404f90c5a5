"""A run that is followed from outside, by what it adds to its files."""

import time
from pathlib import Path

from bigtrain.telemetry.files import EVENTS_FILE, METRICS_FILE, Tail, only_steps
from bigtrain.telemetry.history import read_flat_config, run_state
from bigtrain.telemetry.view import RunView


class FollowedRun:
    """Reads what is new in the directory of a run, which may not have begun; never writes there."""

    def __init__(self, directory: Path) -> None:
        """Begin at the run's beginning."""
        self.name = directory.resolve().name
        self.view = RunView()
        self._directory = directory
        self._metrics, self._events = Tail(directory / METRICS_FILE), Tail(directory / EVENTS_FILE)
        self._config: dict[str, object] = {}

    def read(self) -> None:
        """Take what was added since the last call."""
        self._config = read_flat_config(self._directory) or self._config  # another launch may have changed it
        steps = self._config.get("train.steps")
        self.view.total_steps = steps if isinstance(steps, int) else None
        while records := self._metrics.read():
            for record in only_steps(records):
                self.view.add(record)
        while events := self._events.read():
            for event in events:
                self.view.add_event(event)

    def state(self) -> str:
        """Return ``begins``, ``running``, ``finished``, ``stopped`` or ``ended``."""
        if not self.view.last:
            return "begins"
        steps = self._config.get("train.log_every_steps")
        interval = self.view.step_seconds * (steps if isinstance(steps, int) else 10)
        last = self.view.events[-1].get("event") if self.view.events else None
        return run_state(last, (self._directory / METRICS_FILE).stat().st_mtime, interval, time.time())
