"""Saving and loading 600 MB of state: bigtrain's checkpoints, torch.distributed.checkpoint (DCP) and torch.save.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --ranks 2 --directory /mnt/fast

All ways take turns in one process group, one save each per round, so that whatever else the machine or its
disk does falls on all of them. A save is begun, then comes the computation of a step (multiplications of
matrices, 0.7 seconds), then whatever has to be waited for before the weights may change. *Stall* is the time
that the loop spends in the calls, not in the computation. *Longer step* is what the save costs the step in
all, with what the background takes away from the computation: on a CPU both share the cores. *Total* is the
time until the checkpoint is complete; where ``fsync`` is not mentioned, the way does it by itself. Of several
ranks the slowest counts. Two ranks hold half of the rows each, as under FSDP; with torch.save each of them
writes a file of its own, which no other world size could read.
"""

import argparse
import hashlib
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bigtrain.checkpoint.loader import load_checkpoint, verify_checkpoint
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import RunState, checkpoint_path
from bigtrain.config import CheckpointConfig, Verify
from bigtrain.distributed.collectives import init_process_group, shut_down
from bigtrain.engine.state import Box, Entry
from bigtrain.processes import RankInfo
from bigtrain.testing.ranks import run_ranks

NUM_BLOCKS, HIDDEN_DIM = 12, 1024
OURS, OURS_SYNC = "bigtrain", "bigtrain, blocking"
DCP_ASYNC, DCP_STAGER, DCP_BLOCKING = "DCP async_save", "DCP async_save, shared-memory stager", "DCP save"
TORCH_SAVE, TORCH_SAVE_FSYNC = "torch.save, no fsync", "torch.save, then fsync"
LOAD_FULL, LOAD_OFF, LOAD_DCP = "bigtrain, verify=full", "bigtrain, verify=off", "DCP load"
LOAD_MMAP, LOAD_TORCH = "torch.load(mmap=True)", "torch.load"

Wait = Callable[[], object]
Begin = Callable[[Path], tuple[Wait, Wait]]
"""Begins to save to a path; returns what waits until the weights may change, and what waits for the end."""


@dataclass(frozen=True)
class Times:
    """Seconds of one save on one rank."""

    stall: float
    longer_step: float
    total: float


class Blocks(nn.Module):
    """This rank's rows of weights shaped like those of a Transformer: 151 million parameters in all."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        rows = {"qkv": (3, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}
        for number in range(NUM_BLOCKS):
            for name, (m, n) in rows.items():
                weight = torch.randn(m * HIDDEN_DIM // world_size, n * HIDDEN_DIM)
                self.register_parameter(f"{number}_{name}", nn.Parameter(weight, requires_grad=False))
            norm = torch.randn(HIDDEN_DIM // world_size)
            self.register_parameter(f"{number}_norm", nn.Parameter(norm, requires_grad=False))


def nothing() -> None:
    """Wait for nothing."""


def to_entries(module: nn.Module) -> dict[str, Entry]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    entries = {}
    for name, parameter in module.named_parameters():
        shape = (parameter.shape[0] * world_size, *parameter.shape[1:])
        offsets = (parameter.shape[0] * rank, *(0 for _ in shape[1:]))
        entries[f"model.{name}"] = Entry(shape, parameter.dtype, (Box(offsets, parameter.data),))
    return entries


def to_dtensors(module: nn.Module) -> dict[str, torch.Tensor]:
    if dist.get_world_size() == 1:
        return dict(module.named_parameters())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: DTensor.from_local(p.data, mesh, [Shard(0)]) for name, p in module.named_parameters()}


def make_savers(module: nn.Module, directory: Path) -> dict[str, Begin]:
    group = dist.new_group(backend="gloo")
    tensors = to_dtensors(module)
    staging = StagingOptions(
        use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
    )
    stager = DefaultStager(staging)

    def bigtrain(name: str, asynchronous: bool) -> Begin:
        config = CheckpointConfig(asynchronous=asynchronous, keep="all")
        saver = Saver(directory / name, to_entries(module), config)

        def begin(path: Path) -> tuple[Wait, Wait]:
            saver.save(RunState(int(path.name), 0, 0, "", {}, {}, dist.get_world_size()))
            if asynchronous:
                return saver.wait_until_staged, saver.finish
            saver.finish()
            return nothing, nothing

        return begin

    def dcp_async(path: Path) -> tuple[Wait, Wait]:
        return nothing, dcp.async_save(tensors, checkpoint_id=path, process_group=group).result

    def dcp_stager(path: Path) -> tuple[Wait, Wait]:
        response = dcp.async_save(tensors, checkpoint_id=path, process_group=group, async_stager=stager)
        return response.staging_completion.result, response.upload_completion.result

    def dcp_blocking(path: Path) -> tuple[Wait, Wait]:
        dcp.save(tensors, checkpoint_id=path, process_group=group)
        return nothing, nothing

    def torch_save(path: Path, fsync: bool = False) -> tuple[Wait, Wait]:
        path.mkdir(parents=True, exist_ok=True)
        with (path / f"{dist.get_rank()}.pt").open("wb") as file:
            torch.save(module.state_dict(), file)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        return nothing, nothing

    return {
        OURS: bigtrain("async", True),
        OURS_SYNC: bigtrain("sync", False),
        DCP_ASYNC: dcp_async,
        DCP_STAGER: dcp_stager,
        DCP_BLOCKING: dcp_blocking,
        TORCH_SAVE_FSYNC: lambda path: torch_save(path, fsync=True),
        TORCH_SAVE: torch_save,
    }


def make_loaders(module: nn.Module, directory: Path) -> dict[str, Wait]:
    """Write one checkpoint of each kind and return what loads them into the module."""
    entries, tensors = to_entries(module), to_dtensors(module)
    saver = Saver(directory / "load", entries, CheckpointConfig(asynchronous=False))
    saver.save(RunState(1, 0, 0, "", {}, {}, dist.get_world_size()))
    assert saver.finish().error is None
    ours, theirs = checkpoint_path(directory / "load", 1), directory / "load" / "dcp"
    dcp.save(tensors, checkpoint_id=theirs)
    file = directory / "load" / f"{dist.get_rank()}.pt"
    torch.save(module.state_dict(), file)

    def bigtrain(verify: Verify) -> None:
        assert verify_checkpoint(ours, verify) == []
        load_checkpoint(ours, entries)

    return {
        LOAD_FULL: lambda: bigtrain(Verify.full),
        LOAD_OFF: lambda: bigtrain(Verify.off),
        LOAD_MMAP: lambda: module.load_state_dict(torch.load(file, mmap=True, weights_only=True)),
        LOAD_TORCH: lambda: module.load_state_dict(torch.load(file, weights_only=True)),
        LOAD_DCP: lambda: dcp.load(tensors, checkpoint_id=theirs),
    }


def make_computation(seconds: float) -> Callable[[], None]:
    """Return something that takes so long on this machine as it is now: what a step computes."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        a @ b
        count += 1

    def compute() -> None:
        for _ in range(count):
            a @ b

    return compute


def time_save(begin: Begin, path: Path, compute: Callable[[], None]) -> Times:
    """Save once beside the computation of a step."""
    dist.barrier()
    start = time.perf_counter()
    compute()
    alone = time.perf_counter() - start
    dist.barrier()
    start = time.perf_counter()
    wait_until_staged, finish = begin(path)
    begun = time.perf_counter()
    compute()
    computed = time.perf_counter()
    wait_until_staged()
    changeable = time.perf_counter()
    finish()
    end = begun if finish is nothing else time.perf_counter()
    return Times(begun - start + changeable - computed, changeable - start - alone, end - start)


def measure(directory: Path, rounds: int, seconds: float) -> tuple[dict[str, list[Times]], dict[str, list[float]]]:
    """Return the times of every save and load on this rank, warm-up first."""
    info = RankInfo.from_env()
    init_process_group(info, torch.device("cpu"), timeout_seconds=600)
    torch.manual_seed(info.rank)
    module = Blocks(info.world_size)
    compute = make_computation(seconds)
    savers = make_savers(module, directory)
    saves: dict[str, list[Times]] = {name: [] for name in savers}
    for number in range(rounds + 1):
        for name, begin in rotated(savers, number):
            path = directory / name / str(number)
            saves[name].append(time_save(begin, path, compute))
            remove_files(directory)
    loaders = make_loaders(module, directory)
    loads: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, load in rotated(loaders, number):
            check_load(module, load, loads[name])
    shut_down()
    return saves, loads


def rotated(ways: dict[str, Callable], number: int) -> list[tuple[str, Callable]]:
    items = list(ways.items())
    return items[number % len(items) :] + items[: number % len(items)]


def remove_files(directory: Path) -> None:
    """Remove what has been saved, so that the disk does not go on writing it during the next one's turn."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in [*directory.glob("*/[0-9]*"), *directory.glob("*/checkpoints/step-*")]:
            shutil.rmtree(path)
    dist.barrier()


def check_load(module: nn.Module, load: Wait, times: list[float]) -> None:
    expected = next(module.parameters()).clone()
    next(module.parameters()).zero_()
    dist.barrier()
    start = time.perf_counter()
    load()
    dist.barrier()
    times.append(time.perf_counter() - start)
    assert torch.equal(next(module.parameters()), expected)


def median(values: list[float]) -> float:
    return statistics.median(values[1:])  # without the warm-up


def report(results: list[tuple[dict[str, list[Times]], dict[str, list[float]]]]) -> str:
    """Return the tables of one world size."""
    saves = {
        name: {
            field: [max(getattr(t, field) for t in ranks) for ranks in zip(*(r[0][name] for r in results), strict=True)]
            for field in ("stall", "longer_step", "total")
        }
        for name in results[0][0]
    }
    loads = {name: median([max(t) for t in zip(*(r[1][name] for r in results), strict=True)]) for name in results[0][1]}
    stall = {name: median(times["stall"]) for name, times in saves.items()}
    total = {name: median(times["total"]) for name, times in saves.items()}
    lines = [f"{'save, seconds':<38}{'stall':>8}{'1st':>8}{'longer step':>13}{'total':>8}{'x torch.save':>14}"]
    for name, times in saves.items():
        relative = total[name] / total[TORCH_SAVE_FSYNC]
        longer, first = median(times["longer_step"]), times["stall"][0]
        lines.append(f"{name:<38}{stall[name]:>8.3f}{first:>8.3f}{longer:>13.3f}{total[name]:>8.3f}{relative:>14.2f}")
    lines += ["", f"{'load, seconds':<38}{'':>8}{'total':>8}{'x torch.load(mmap=True)':>25}"]
    lines += [f"{name:<38}{'':>8}{seconds:>8.3f}{seconds / loads[LOAD_MMAP]:>25.2f}" for name, seconds in loads.items()]
    lines += [
        "",
        f"stall: 1/{stall[DCP_BLOCKING] / max(stall[OURS], 1e-4):.0f} of DCP's save (aim 1/40)",
        f"total: {total[OURS]:.3f} s beside a step, {total[OURS_SYNC]:.3f} s alone: {total[OURS_SYNC] / total[TORCH_SAVE_FSYNC]:.2f} x "
        f"torch.save with fsync (aim 2), {total[OURS_SYNC] / total[TORCH_SAVE]:.2f} x without",
        f"load:  {loads[LOAD_OFF] / loads[LOAD_MMAP]:.2f} x torch.load(mmap=True) without verification (aim 1.5), "
        f"{loads[LOAD_FULL] / loads[LOAD_MMAP]:.2f} x with",
    ]
    return "\n".join(lines)


def hash_rates() -> str:
    data = torch.randint(256, (1 << 26,), dtype=torch.uint8).numpy()
    rates = []
    for name, make in (("XXH3", xxhash.xxh3_128), ("SHA-256", hashlib.sha256)):
        begin = time.perf_counter()
        make(data).digest()
        rates.append(f"{name} {data.nbytes / (time.perf_counter() - begin) / 1e9:.1f} GB/s")
    return ", ".join(rates)


def machine(directory: Path) -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    load = os.getloadavg()[0]
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    place = max((m for m in mounts if directory.resolve().is_relative_to(m[0])), key=lambda m: len(m[0]))
    return (
        f"{os.cpu_count()} x {(names or [platform.processor()])[0]}, load {load:.1f}; {place[1]} at {place[0]}; "
        f"torch {torch.__version__}, Python {platform.python_version()}; {hash_rates()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes, started here (default 1 2)")
    parser.add_argument("--rounds", type=int, default=5, help="saves and loads of each kind, after one to warm up")
    parser.add_argument("--compute", type=float, default=0.7, help="seconds of computation per step (default 0.7)")
    parser.add_argument("--directory", type=Path, help="where to write (default: the directory for temporary files)")
    args = parser.parse_args()
    with torch.device("meta"):
        numel = sum(parameter.numel() for parameter in Blocks(1).parameters())
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=args.directory) as scratch:
            print(f"{ranks} rank(s), {numel / 1e6:.0f} million numbers, {4 * numel / 1e6:.0f} MB; {args.rounds} rounds")
            print(machine(Path(scratch)), end="\n\n", flush=True)
            results = run_ranks(measure, ranks, Path(scratch), args.rounds, args.compute, timeout_seconds=3600)
            print(report(results), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
