"""Heartbeats: the phase and step of each rank of a node, and the deadline of the phase.

A rank writes six numbers into shared memory when it enters a phase, in a microsecond; the watchdog compares clocks. All
times are CLOCK_MONOTONIC, which the processes of a node share.
"""

import mmap
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PHASES = (
    "starting",
    "data",
    "forward_backward",
    "optimizer",
    "logging",
    "validation",
    "checkpoint",
    "profile",
    "ending",
)
"""In the order of a step. In ``profile``, rank 0 begins or exports a trace while the others wait."""
_FIELDS = ("pid", "rank", "phase", "step", "since_ns", "deadline_ns")
_NUM_BYTES = 8 * len(_FIELDS)
_WINDOW = 200  # durations of a phase that are remembered
_MIN_SEEN = 3
_RECOMPUTE_EVERY = 16
_PROFILE, _ENDING = PHASES.index("profile"), PHASES.index("ending")
_ENDING_SECONDS = 60.0  # ranks wait there until rank 0 has closed its files and dashboards, which takes up to 20 s


class Heartbeat:
    def __init__(
        self, path: Path | None = None, *, rank: int = 0, hang_seconds: float = 60.0, first_hang_seconds: float = 1800.0
    ) -> None:
        """Begin in the phase ``starting``; ``path`` is the file that the watchdog reads, if there is one.

        The deadline of a phase is ``hang_seconds``, or three times the longest of its last 200 durations if that is
        more; ``first_hang_seconds`` of one that has been seen fewer than three times, and of every profile.
        """
        self.step = 0  # the optimizer step under way, from 1
        self._floor_ns, self._first_ns = int(hang_seconds * 1e9), int(first_hang_seconds * 1e9)
        self._durations: list[deque[int]] = [deque(maxlen=_WINDOW) for _ in PHASES]
        self._num_seen = [0] * len(PHASES)
        self._total_ns = [0] * len(PHASES)
        self._limits_ns = [self._first_ns] * len(PHASES)
        self._limits_ns[_ENDING] = max(self._floor_ns, int(_ENDING_SECONDS * 1e9))
        self._phase, self._since_ns = 0, time.monotonic_ns()
        self._slots = memoryview(bytearray(_NUM_BYTES)).cast("q")
        if path is not None:
            with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                file.truncate(_NUM_BYTES)
                self._slots = memoryview(mmap.mmap(file.fileno(), _NUM_BYTES)).cast("q")
        self._slots[0], self._slots[1] = os.getpid(), rank
        self._slots[4], self._slots[5] = self._since_ns, self._since_ns + self._first_ns

    @property
    def phase(self) -> str:
        return PHASES[self._phase]

    def enter(self, phase: str, step: int | None = None) -> None:
        """Enter a phase of :data:`PHASES`; the one before ends."""
        now, old = time.monotonic_ns(), self._phase
        durations, seen = self._durations[old], self._num_seen[old] + 1
        durations.append(now - self._since_ns)
        self._total_ns[old] += now - self._since_ns
        self._num_seen[old] = seen
        if (seen < _RECOMPUTE_EVERY or seen % _RECOMPUTE_EVERY == 0) and seen >= _MIN_SEEN and old != _PROFILE:
            self._limits_ns[old] = max(self._floor_ns, 3 * max(durations))  # what is rare, as read-back, is usual too
        if step is not None:
            self.step = step
        new = self._phase = PHASES.index(phase)
        self._since_ns = now
        slots = self._slots
        # The deadline first: a reader in between sees the old phase with more time, never less.
        slots[5], slots[4], slots[2], slots[3] = now + self._limits_ns[new], now, new, self.step

    def took(self, phase: str, seconds: float) -> None:
        """Count a duration of ``phase`` that passed in the background: the next time it may have to be waited for."""
        self._durations[PHASES.index(phase)].append(int(seconds * 1e9))

    def during(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """Yield from ``items``; waiting for the next one is in ``phase`` of the next step."""
        iterator = iter(items)
        while True:
            self.enter(phase, self.step + 1)
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item

    def seconds_in(self, phase: str) -> float:
        return self._total_ns[PHASES.index(phase)] / 1e9


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat as it was read."""

    pid: int
    rank: int
    phase: str
    step: int
    since_ns: int  # when the phase began
    deadline_ns: int  # when it has to have ended


def read_beats(directory: Path) -> list[Beat]:
    """Return the heartbeats of the ranks of this node in rank order."""
    beats = []
    for path in sorted(directory.glob("*.beat")):
        data = path.read_bytes()
        if len(data) == _NUM_BYTES:
            pid, rank, phase, *others = memoryview(data).cast("q")
            beats.append(Beat(pid, rank, PHASES[phase], *others))
    return beats


def beats_directory(name: str) -> Path:
    """Return where the ranks of a launch on a node put their heartbeats, in shared memory if there is any."""
    place = Path("/dev/shm")
    if not os.access(place, os.W_OK):
        place = Path(tempfile.gettempdir())
    return place / f"bigtrain-{name}"
