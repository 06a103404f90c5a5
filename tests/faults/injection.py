"""Runs with faults at a chosen (rank, step, phase), and without: the launcher, the ranks and the watchdog are real.

The product knows nothing of faults: a rank wraps what announces its phases before it begins to train.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.store import find_checkpoints
from bigtrain.supervise.heartbeat import Beat, Heartbeat, read_beats
from bigtrain.supervise.launch import Launch
from bigtrain.testing import ranks as local_ranks
from tests.distributed.launches import LAUNCH, SMALL, environment

TIMEOUT_SECONDS = 90.0
GRACE_SECONDS = 15.0  # on a busy machine; torchrun gives 30
RUN = Path("runs/gpt_nano")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong on one rank when it enters a phase of a step."""

    kind: str
    """One of :data:`ACTIONS`."""
    rank: int
    step: int
    phase: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How the ranks of a launch ended and what they said."""

    codes: list[int]
    said: list[str]


def train(
    cwd: Path,
    *args: str,
    faults: Sequence[Fault] = (),
    prepare: Callable[[], None] | None = None,
    world_size: int = 2,
    environ: Mapping[str, str] | None = None,
    meanwhile: Callable[[list[Any]], None] | None = None,
    log: str = "rank",
) -> Ended:
    """Run the training command on forked ranks; like torchrun, end all when one has failed.

    Args:
        cwd: working directory.
        args: settings, after those of the small model.
        faults: what goes wrong.
        prepare: module-level function called in every rank before it begins.
        world_size: number of ranks.
        environ: additional environment variables.
        meanwhile: called in this process with the ranks' processes as soon as they run.
        log: beginning of the names of the files with what the ranks say.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*local_ranks.PRELOAD, __name__])
    port = local_ranks.free_port()
    logs = [cwd / f"{log}-{rank}.log" for rank in range(world_size)]
    own = {key: environment()[key] for key in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")}
    processes, begun = [], time.monotonic_ns()
    for rank, path in enumerate(logs):
        variables = {**own, **(environ or {}), **local_ranks._rank_environ(rank, world_size, port)}
        work = (variables, cwd, path, [*SMALL, *args], [fault for fault in faults if fault.rank == rank], prepare)
        processes.append(context.Process(target=_rank_main, args=work, daemon=True))
        processes[-1].start()
    try:
        if meanwhile:
            meanwhile(processes)
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    deadline = time.monotonic() + 4 * GRACE_SECONDS
    pids = {process.pid for process in processes}
    while has_heartbeats(pids, begun):  # the watchdog, which has the last word, removes them
        assert time.monotonic() < deadline, "the watchdog does not end"
        time.sleep(0.05)
    return Ended([process.exitcode for process in processes], [path.read_text() for path in logs])


def _wait(processes: list[Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            for process in processes:
                if process.exitcode is None:
                    process.terminate()
        time.sleep(0.05)


def _rank_main(
    variables: dict[str, str],
    cwd: Path,
    log: Path,
    args: list[str],
    faults: list[Fault],
    prepare: Callable[[], None] | None,
) -> None:
    os.environ.update(variables)
    os.chdir(cwd)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    from bigtrain.cli import hydra_cli

    hydra_cli.RANK_0_HEAD_START_SECONDS = 0.5
    if prepare:
        prepare()
    inject(faults)
    sys.argv = ["train.py", *args]
    runpy.run_path(str(LAUNCH / "train.py"), run_name="__main__")


def inject(faults: Sequence[Fault]) -> None:
    """Let this rank have these faults."""
    enter, supervise = Heartbeat.enter, Launch.supervise

    def act(step: int, phase: str) -> None:
        for fault in faults:
            if (fault.step, fault.phase) == (step, phase):
                ACTIONS[fault.kind]()

    def enter_and_act(self: Heartbeat, phase: str, step: int | None = None) -> None:
        enter(self, phase, step)
        act(self.step, phase)

    def supervise_and_act(self: Launch, *args: Any) -> None:
        supervise(self, *args)
        act(0, "starting")

    Heartbeat.enter, Launch.supervise = enter_and_act, supervise_and_act


def _raise() -> None:
    raise ZeroDivisionError("a fault of this rank only")


def _hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(10_000)  # a call into native code that does not let other threads run


def _spoil_next_loss() -> None:
    """Make the next loss of this rank not-a-number, whichever engine computes it."""
    from bigtrain.engine import deepspeed_zero, native

    whole = native.sums_of

    def spoilt(model: Any, batch: Any) -> torch.Tensor:
        native.sums_of = deepspeed_zero.sums_of = whole
        return whole(model, batch) * torch.nan

    native.sums_of = deepspeed_zero.sums_of = spoilt


def _make_next_loss_infinite() -> None:
    """Make the next loss of this rank infinite, with a gradient that is finite."""
    from bigtrain.engine import native

    whole = native.sums_of

    def spoilt(model: Any, batch: Any) -> torch.Tensor:
        native.sums_of = whole
        return whole(model, batch) + torch.inf

    native.sums_of = spoilt


def _raise_next_loss() -> None:
    """Make the next loss of this rank, and its gradient, a hundred times as large."""
    from bigtrain.engine import native

    whole = native.sums_of

    def spoilt(model: Any, batch: Any) -> torch.Tensor:
        native.sums_of = whole
        return whole(model, batch) * 100

    native.sums_of = spoilt


def _run_out_of_memory() -> None:
    torch.empty(2**50)


def _turn_back_the_clock() -> None:
    clock = time.time
    time.time = lambda: clock() - 86_400.0


ACTIONS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "gil": _hold_the_interpreter,
    "raise": _raise,
    "nan": _spoil_next_loss,
    "inf": _make_next_loss_infinite,
    "spike": _raise_next_loss,
    "memory": _run_out_of_memory,
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "clock": _turn_back_the_clock,
    "die_slowly": lambda: (time.sleep(1.5), os.kill(os.getpid(), signal.SIGKILL)),
    "slow": lambda: time.sleep(0.3),
}


def state_hashes(run: Path) -> dict[str, str]:
    """Return the hashes of the weights and the optimizer state in the newest checkpoint, by file."""
    files = read_manifest(find_checkpoints(run)[-1]).files
    return {file.name: file.xxh3 for file in files if file.name.endswith(".safetensors")}


def has_heartbeats(pids: set[int], since_ns: int) -> bool:
    """Return whether the heartbeats of one of these processes are still there; older ones are of others with their numbers."""
    beats = [beat for place in Path("/dev/shm").glob("bigtrain-*") for beat in _beats(place)]
    return any(beat.pid in pids and beat.since_ns >= since_ns for beat in beats)


def _beats(place: Path) -> list[Beat]:
    with contextlib.suppress(OSError):  # it may go away at any time
        return read_beats(place)
    return []
