"""Sides that take turns, each in processes of its own, and what benchmarks say about the machine.

All sides live at the same time on the same machine, and one of them computes while the others sleep, so that whatever
else the machine does falls on all; only so can their peak memory be told apart. A side is a function that trains: it
calls :meth:`Pacer.step_done` after every step, which is where it sleeps. The first step of a turn is not timed: it
finds the processor's caches, and on a GPU the allocator's, empty.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bigtrain.config import Precision
from bigtrain.telemetry.peak import published_peak
from bigtrain.testing.ranks import RankFailedError, run_ranks

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 7200.0
# Ranks are forked from a server that is not started in this directory, but has to find these modules.
_PATHS = [str(REPOSITORY / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(_PATHS)


class Pacer:
    """What one rank of a side has of the arrangement; the first turn warms up."""

    def __init__(self, connection: Connection, num_turns: int, turn_steps: int) -> None:
        self._connection = connection
        self._turns_left, self._turn_steps = num_turns, turn_steps
        self._steps, self._start = 0, (0.0, 0.0)

    def begin(self) -> None:
        """Sleep until it is this side's turn; to be called before the first step, and by :meth:`step_done`."""
        self._connection.recv()
        self._steps = 0
        _reset_peak()

    def step_done(self) -> None:
        """Count a step, time the turn, and sleep when it is over."""
        self._steps += 1
        if self._steps == 1:
            _synchronise()
            self._start = time.perf_counter(), time.process_time()
        if self._steps < 1 + self._turn_steps:
            return
        _synchronise()
        seconds, cpu_seconds = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        peak = peak_bytes()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # for the others
        self._connection.send((seconds / self._turn_steps, cpu_seconds / self._turn_steps, peak))
        self._turns_left -= 1
        if self._turns_left:
            self.begin()


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was allocated to begin with, and is free, is nobody's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the largest allocation on the GPU, or on a CPU the largest resident size, since the turn began."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()) if sys.platform == "linux" else None
    return int(match[1]) * 1024 if match else 0


@dataclass(slots=True)
class Measured:
    """What a side took, without the turn that warmed up."""

    seconds: list[float] = field(default_factory=list)
    """Wall-clock seconds per step of every turn, of the slowest rank."""
    cpu_seconds: list[float] = field(default_factory=list)
    """CPU seconds per step of every turn, of all threads of all ranks."""
    peak_bytes: int = 0
    """Largest peak of any turn, all ranks together."""
    results: list[Any] = field(default_factory=list)
    """What the side has returned on each rank."""

    def add_turn(self, reports: list[tuple[float, float, int]]) -> None:
        if not reports:
            return  # the side has failed
        seconds, cpu_seconds, peaks = zip(*reports, strict=True)
        self.seconds.append(max(seconds))
        self.cpu_seconds.append(sum(cpu_seconds))
        self.peak_bytes = max(self.peak_bytes, sum(peaks))


Side = Callable[[Pacer], Any]
"""Trains ``num_turns * (1 + turn_steps)`` steps, telling of each; picklable. Finds its rank in the environment."""


def take_turns(
    sides: Mapping[str, Side], *, world_size: int, threads: int, num_turns: int, turn_steps: int, together: int = 1
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Let ``sides`` compute in turns; return what was measured of each, and why some have failed.

    Args:
        sides: by name.
        world_size: ranks of every side.
        threads: of every rank.
        num_turns: of every side, one of them to warm up.
        turn_steps: timed steps of a turn; one more comes before them.
        together: so many sides at a time warm up (import, compile, allocate), where memory allows it.
    """
    groups = {name: _Group(side, world_size, threads, num_turns, turn_steps) for name, side in sides.items()}
    names = list(groups)
    for first in range(0, len(names), together):
        batch = [groups[name] for name in names[first : first + together]]
        for group in batch:
            group.start_turn()
        for group in batch:
            group.end_turn()
    for turn in range(1, num_turns):
        # Not always the same neighbours: what a side leaves behind in caches is then spread over all.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            groups[name].start_turn()
            groups[name].measured.add_turn(groups[name].end_turn())
    for group in groups.values():
        group.join()
    measured = {name: group.measured for name, group in groups.items() if not group.failure}
    return measured, {name: group.failure for name, group in groups.items() if group.failure}


class _Group:
    """The parent's end of one side: starts its ranks in a thread and talks to them."""

    def __init__(self, side: Side, world_size: int, threads: int, num_turns: int, turn_steps: int) -> None:
        self.measured, self.failure = Measured(), ""
        pipes = [Pipe() for _ in range(world_size)]
        self._connections = [ours for ours, _ in pipes]
        theirs = [child for _, child in pipes]
        self._arguments = (_play, world_size, side, theirs, num_turns, turn_steps)
        self._environ = {"OMP_NUM_THREADS": str(threads)}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.measured.results = run_ranks(*self._arguments, timeout_seconds=PATIENCE_SECONDS, environ=self._environ)
        except RankFailedError as error:
            self.failure = str(error)

    def start_turn(self) -> None:
        for connection in self._connections:
            connection.send(None)

    def end_turn(self) -> list[tuple[float, float, int]]:
        """Return what the ranks report, nothing if one has failed."""
        reports = []
        for connection in self._connections:
            while not connection.poll(0.5):
                if not self._thread.is_alive():
                    return []
            reports.append(connection.recv())
        return reports

    def join(self) -> None:
        self._thread.join()


def _play(side: Side, connections: list[Connection], num_turns: int, turn_steps: int) -> Any:
    """Run a side on this rank, without its chatter on standard output."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return side(Pacer(connections[int(os.environ["RANK"])], num_turns, turn_steps))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the 25th percentile, the median and the 75th percentile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine() -> str:
    """Return what the figures were taken on."""
    cpus = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    cpu = f"{os.cpu_count()} x {(cpus or [platform.machine()])[0]}, load {os.getloadavg()[0]:.1f}"
    device = f"{torch.cuda.get_device_name()} beside {cpu}" if torch.cuda.device_count() else cpu
    return f"{device}; {versions('torch', 'deepspeed')}, Python {platform.python_version()}"


def versions(*packages: str) -> str:
    """Return ``name version`` of the packages that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def peak_flops(precision: Precision) -> float | None:
    """Return the data sheet's rate of this machine's GPU, for fp8 that of bf16; None on a CPU and on an unknown one."""
    kind = Precision.bf16 if precision is Precision.fp8 else precision
    peak = published_peak(torch.cuda.get_device_name(), kind.name) if torch.cuda.device_count() else None
    return peak.flops_per_second if peak else None


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to this file, one object per line")


def write_json(path: Path | None, benchmark: str, **fields: Any) -> None:
    """Add one object with the figures and the machine to ``path``."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"benchmark": benchmark, "machine": machine(), **fields}) + "\n")
