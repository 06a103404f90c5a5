"""Live view of a run: progress, numbers, loss curve, memory and the last events."""

import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtrain.telemetry import names
from bigtrain.telemetry.files import EVENTS_FILE, METRICS_FILE, Tail, only_steps
from bigtrain.telemetry.history import how_ended, last_sign, read_flat_config, run_state
from bigtrain.telemetry.text import (
    describe,
    describe_event,
    describe_machine,
    describe_metrics,
    format_duration,
    pace,
)

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = ".:-=+*%#"
_SPARKLINE_COLUMNS = 48
MAX_COLUMNS = 120  # lines are hard to follow on a wider terminal
_MAX_POINTS = 4096
_MAX_EVENTS = 500
_PACE_STEPS = 50
_SHOWN_EVENTS = 4
_LOST_SECONDS = 120.0  # without a sign of life: the run counts as over


class RunView:
    """What a screen shows of a run; a step that is not the next one replaces those from it on, as after a resume."""

    def __init__(self, total_steps: int | None = None) -> None:
        self.total_steps = total_steps
        self.last: dict[str, Any] = {}
        self._machine: dict[str, Any] = {}
        self._losses: list[tuple[int, float]] = []
        self._recent: list[dict[str, Any]] = []
        self._events: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(self, record: dict[str, Any]) -> None:
        step, loss = record[names.STEP], record.get(names.LOSS)
        while self._losses and self._losses[-1][0] >= step:
            self._losses.pop()
        if loss is not None and math.isfinite(loss):
            self._losses.append((step, loss))
        if len(self._losses) > _MAX_POINTS:
            self._losses = [*self._losses[:-1:2], self._losses[-1]]
        self._recent = [*self._recent[-_PACE_STEPS + 1 :], record]
        self._machine = {**self._machine, **{key: value for key, value in record.items() if "/" in key}}
        self.last = record

    def add_event(self, event: dict[str, Any]) -> None:
        """Add an event, once; a launch voids repeated events after its first step."""
        if event.get("event") in names.LAUNCH_EVENTS:
            first = event.get(names.STEP) or 0
            self._events = {
                key: kept
                for key, kept in self._events.items()
                if kept.get("event") not in names.REPEATED_EVENTS or (kept.get(names.STEP) or 0) <= first
            }
        self._events[event.get("event"), event.get(names.STEP), event.get(names.TIME)] = event
        if len(self._events) > _MAX_EVENTS:
            del self._events[next(iter(self._events))]

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(self._events.values())

    def seconds_left(self) -> float:
        """Return the time to the end at the pace of the last steps."""
        if not self.total_steps or not self.last:
            return math.nan
        return max(self.total_steps - self.last[names.STEP], 0) * pace(self._recent)[0]

    def render(self, *, seconds_left: float | None = None, show_events: bool = False) -> Any:
        """Return a renderable of rich, with :meth:`seconds_left` unless given."""
        from rich.console import Group
        from rich.constrain import Constrain
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.last:
            return Text("no step yet")
        step, total = self.last[names.STEP], self.total_steps or self.last[names.STEP]
        left = format_duration(self.seconds_left() if seconds_left is None else seconds_left)
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        fraction = min(step / total, 1.0)
        bar.add_row(f"step {step}/{total}", ProgressBar(total=1.0, completed=fraction), f"{fraction:.0%}  {left} left")
        lines = [
            describe({**self.last, names.rate_of(self.last): pace(self._recent)[1]}),
            self._curve(),
            describe_machine(self._machine),
        ]
        if show_events:
            lines += [describe_event(event) for event in self.events[-_SHOWN_EVENTS:]]
        texts = (Text(line, no_wrap=True, overflow="ellipsis") for line in lines if line)
        return Constrain(Group(bar, *texts), MAX_COLUMNS)

    def _curve(self) -> str:
        losses = [loss for _, loss in self._losses]
        if len(losses) < 2:
            return ""
        validations = [event for event in self.events if event.get("event") == "validation"]
        last = f"  validation {describe_metrics(validations[-1]).removeprefix('loss ')}" if validations else ""
        return f"{sparkline(losses)}{last}"


class FollowedRun:
    """Follows a run through its files, which may not exist yet; never writes."""

    def __init__(self, directory: Path) -> None:
        self.name = directory.resolve().name
        self.view = RunView()
        self._directory = directory
        self._metrics, self._events = Tail(directory / METRICS_FILE), Tail(directory / EVENTS_FILE)
        self._sign = last_sign(directory)
        # A file server's clock may differ: the two are compared only here.
        self._heard_at = time.monotonic() - (max(time.time() - self._sign, 0.0) if self._sign else 0.0)

    def read(self) -> None:
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


def sparkline(values: Sequence[float], columns: int = _SPARKLINE_COLUMNS) -> str:
    """Return finite ``values`` as a line of blocks, each the mean of a bin; high first ones may be cut off."""
    columns = min(columns, len(values))
    bounds = [len(values) * i // columns for i in range(columns + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means[len(means) // 10 :])
    encoding = sys.stdout.encoding or getattr(sys.__stdout__, "encoding", None) or ""  # rich's replacement has none
    blocks = _BLOCKS if "utf" in encoding.lower() else _ASCII_BLOCKS
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[min(round((mean - low) * scale), len(blocks) - 1)] for mean in means)
