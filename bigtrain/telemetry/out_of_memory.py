"""Out of memory: what was held, a snapshot, and what to change."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from bigtrain.config import TrainConfig
from bigtrain.errors import PreflightError, first_line
from bigtrain.plan import preflight
from bigtrain.processes import RankInfo
from bigtrain.telemetry.profiling import DIRECTORY, is_out_of_memory, memory_facts, save_memory_snapshot
from bigtrain.telemetry.text import format_bytes

_SMALLER = 0.85  # suggest settings that need at most this share of the estimate of the run that did not fit


@contextlib.contextmanager
def explained(config: TrainConfig, directory: Path, info: RankInfo, device: torch.device) -> Iterator[None]:
    """Turn a failed allocation in the body into a PreflightError that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
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
