"""torch's profiler and memory snapshots for some steps, written to the run's ``profile/``."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bigtrain.config import ProfileConfig, TrainConfig
from bigtrain.errors import PreflightError, first_line
from bigtrain.log import get_logger
from bigtrain.plan import preflight
from bigtrain.processes import RankInfo
from bigtrain.telemetry import names
from bigtrain.telemetry.text import format_bytes

DIRECTORY = "profile"
_TABLE_ROWS = 40
_MEMORY_ENTRIES = 1_000_000


class Profiler:
    """Traces the steps ``profile.steps`` on rank 0; a context manager."""

    def __init__(
        self,
        config: ProfileConfig,
        run_directory: Path,
        *,
        rank: int,
        first_step: int,
        say: Callable[..., None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; ``say`` gets the event when files are written, ``begin`` is called before what may take minutes."""
        wanted = config.steps if rank == 0 else []
        self._first, self._last = wanted or (0, 0)
        self._wants_memory = config.memory and rank == 0
        self._memory = self._wants_memory and torch.cuda.is_available()
        self._directory = run_directory / DIRECTORY
        self._done_steps = first_step
        self._say, self._begin = say, begin
        self._profile: profile | None = None

    def __enter__(self) -> Self:
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_ENTRIES)
        elif self._wants_memory:
            get_logger().warning("profile.memory is ignored without a GPU: it is the GPU's allocator that is recorded")
        self.step_done(self._done_steps)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._profile and error is None:
            self._write(self._done_steps)
        if self._memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def step_done(self, step: int) -> bool:
        """Begin or end the trace between ``step`` and the next one; return whether that took time."""
        self._done_steps = step
        if self._profile and step == self._last:
            self._write(step)
            return True
        if self._last and step + 1 == self._first:
            self._begin()
            on_cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *on_cuda], record_shapes=True, profile_memory=self._memory
            )
            self._profile.start()
            return True
        return False

    def _write(self, last: int) -> None:
        self._begin()
        traced, self._profile = self._profile, None
        traced.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        name = self._directory / f"steps-{self._first}-{last}"
        traced.export_chrome_trace(f"{name}.trace.json.gz")
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        Path(f"{name}.txt").write_text(traced.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS))
        if self._memory:
            save_memory_snapshot(self._directory, f"steps-{self._first}-{last}")
        communication = communication_seconds(traced.events(), max(last - self._first + 1, 1))
        self._say("profile", step=last, path=f"{name}.trace.json.gz", **communication)


def communication_seconds(events: Iterable[Any], num_steps: int) -> dict[str, float]:
    """Return the seconds per step in which collectives ran, and in which nothing else did; empty without any.

    Of the profiler's events on a GPU kernels count, otherwise gloo's collectives and torch's operators.
    """
    kernels = [event for event in events if event.device_type != DeviceType.CPU]
    # An annotation, such as those of FSDP2, spans collectives and computes nothing.
    kernels = [event for event in kernels if not getattr(event, "is_user_annotation", False)]
    events = kernels or [event for event in events if event.name.startswith(("gloo:", "aten::"))]
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        is_collective = "nccl" in event.name.lower() or event.name.startswith("gloo:")
        spans[is_collective].append((event.time_range.start, event.time_range.end))
    if not spans[True]:
        return {}
    total = _covered(spans[True])
    exposed = min(_covered(spans[True] + spans[False]) - _covered(spans[False]), total)  # up to rounding
    seconds = {names.COMMUNICATION_SECONDS: total, names.EXPOSED_COMMUNICATION_SECONDS: exposed}
    return {name: microseconds / 1e6 / num_steps for name, microseconds in seconds.items()}


def _covered(spans: list[tuple[float, float]]) -> float:
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def save_memory_snapshot(directory: Path, name: str) -> Path | None:
    """Write what the GPU's allocator holds, for https://pytorch.org/memory_viz; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.memory.pickle"
    torch.cuda.memory._dump_snapshot(str(path))
    return path


def save_hang(run_directory: Path, name: str) -> None:
    """Write what a hanging rank still knows: its last collectives and what the GPU's allocator holds."""
    directory = run_directory / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    # torch's flight recorders, which record unless TORCH_FR_BUFFER_SIZE=0.
    for backend, function in (("nccl", "_dump_nccl_trace_json"), ("gloo", "_dump_fr_trace_json")):
        if dump := getattr(torch._C._distributed_c10d, function, None):
            (directory / f"{name}.{backend}.json").write_bytes(dump())
    save_memory_snapshot(directory, name)


def memory_facts(device: torch.device) -> dict[str, Any]:
    """Return the state of this rank's device memory in bytes; empty on a CPU."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    held, peak = torch.cuda.memory_reserved(device), torch.cuda.max_memory_allocated(device)
    return {"total": total, "free": free, "reserved by this process": held, "peak in use": peak}


_SMALLER = 0.85  # suggest settings that need at most this share of the estimate of the run that did not fit


@contextlib.contextmanager
def explained(config: TrainConfig, directory: Path, info: RankInfo, device: torch.device) -> Iterator[None]:
    """Turn a failed allocation in the body into a PreflightError that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_host = "DefaultCPUAllocator" in str(error)
        if not (is_host or isinstance(error, torch.OutOfMemoryError | MemoryError)):
            raise
        raise PreflightError(_message(config, directory, info, device, error)) from error


def _message(config: TrainConfig, directory: Path, info: RankInfo, device: torch.device, error: BaseException) -> str:
    held = ", ".join(f"{name} {format_bytes(value)}" for name, value in memory_facts(device).items())
    lines = [f"memory has run out: {first_line(error)}", *([held] if held else [])]
    with contextlib.suppress(OSError, RuntimeError):
        if snapshot := save_memory_snapshot(directory / DIRECTORY, f"out-of-memory-rank-{info.rank}"):
            lines.append(f"snapshot: {snapshot} (open it at pytorch.org/memory_viz; profile.memory=true adds stacks)")
    return "\n".join([*lines, *suggestions(config, info, device)])


def suggestions(config: TrainConfig, info: RankInfo, device: torch.device) -> list[str]:
    """Return lines on what to change for the run to need clearly less memory."""
    report = preflight(
        config,
        world_size=info.world_size,
        local_world_size=info.local_world_size,
        device_type=device.type,
        precision=config.engine.precision,
    )
    needed, _ = report.needed_bytes(report.estimate)
    machine = dataclasses.replace(report.machine, available_bytes=int(needed * _SMALLER))
    return dataclasses.replace(report, machine=machine).suggestions()
