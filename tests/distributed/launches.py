"""Launchers as users start them, in processes of their own, and the same forked from a server to save the imports."""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import psutil
import torch

from bigtrain.testing.ranks import run_ranks

LAUNCH = Path(__file__).parents[2] / "launch"
TRAIN = str(LAUNCH / "train.py")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_SECONDS = 100.0
# A run of a second: two odd-sized layers on synthetic tokens.
SMALL = [
    "+model=gpt_nano",
    "model.vocab_size=97",
    "model.num_layers=2",
    "model.hidden_dim=24",
    "model.num_heads=3",
    "model.max_positions=16",
    "data=synthetic",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.steps=8",
    "train.log_every_steps=1",
    "optimizer.lr=1e-2",
    "scheduler.warmup_steps=2",
]


@dataclass(frozen=True, slots=True)
class Result:
    """How a launch ended and what it said."""

    code: int
    out: str
    err: str


class Launch:
    """A command that runs; leaving the context ends it and everything that it started."""

    def __init__(self, command: list[str], cwd: Path, **env: str) -> None:
        self._start = {"args": command, "cwd": cwd, "env": environment(**env)}

    def __enter__(self) -> "Launch":
        self._stack = contextlib.ExitStack()
        # Files, not pipes: nobody has to read them while the command runs.
        self._out = self._stack.enter_context(tempfile.TemporaryFile("w+"))
        self._err = self._stack.enter_context(tempfile.TemporaryFile("w+"))
        self.process = subprocess.Popen(**self._start, stdout=self._out, stderr=self._err)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            whole = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            for process in whole:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        self._stack.close()

    def wait_until(self, condition: Callable[[], bool], timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Wait until ``condition`` holds while the command runs."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert self.process.poll() is None, f"ended too early: {self._result()}"
            assert time.monotonic() < deadline, f"not in time: {self._result()}"
            time.sleep(0.02)

    def output(self) -> str:
        """Return what the command has said so far; its place in the file, which it shares with us, stays."""
        return os.pread(self._out.fileno(), 1 << 20, 0).decode()

    def result(self, timeout_seconds: float = TIMEOUT_SECONDS) -> Result:
        """Wait for the end."""
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not in time: {self._result()}") from None
        return self._result()

    def _result(self) -> Result:
        return Result(self.process.poll(), _content(self._out), _content(self._err))


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment without what a launcher or a test may have put into it."""
    foreign = ("TORCHELASTIC", "ACCELERATE", "HYDRA", "WANDB")
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith(foreign)}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} | changes


def program(name: str) -> str:
    """Return the path of a launcher that was installed with the package's dependencies."""
    return str(Path(sys.executable).with_name(name))


def torchrun(world_size: int, *args: str) -> list[str]:
    """Return the command that starts a script on ``world_size`` ranks."""
    return [program("torchrun"), "--standalone", f"--nproc-per-node={world_size}", *args]


def launch(command: list[str], cwd: Path, timeout_seconds: float = TIMEOUT_SECONDS, **env: str) -> Result:
    """Run a command to its end."""
    with Launch(command, cwd, **env) as running:
        return running.result(timeout_seconds)


def fork(
    script: str,
    *args: str,
    cwd: Path,
    world_size: int = 1,
    timeout_seconds: float = TIMEOUT_SECONDS,
    env: Mapping[str, str] | None = None,
) -> Result:
    """Run a launcher on ranks that need no imports; return rank 0's end. Of a setting given twice the last one is passed on."""
    args = tuple({arg.partition("=")[0]: arg for arg in args}.values())
    names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
    variables = {name: environment()[name] for name in names} | dict(env or {})
    return run_ranks(_run_script, world_size, script, args, cwd, timeout_seconds=timeout_seconds, environ=variables)[0]


def _run_script(script: str, args: tuple[str, ...], cwd: Path) -> Result:
    torch.set_num_threads(1)
    os.chdir(cwd)
    sys.argv = [script, *args]
    from bigtrain.cli import hydra_cli

    hydra_cli.RANK_0_HEAD_START_SECONDS = 0.5
    hydra_cli.leave = sys.exit  # this process has to tell how it went
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        code: Any = 0
        try:
            runpy.run_path(str(LAUNCH / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return Result(code, _content(out), _content(err))


def _content(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read()


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of the steps of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return what of one kind happened in a run."""
    records = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == kind]


def trajectory(run: Path) -> list[tuple[int, float, float, float]]:
    """Return (step, loss, gradient norm, learning rate) of every step of a run."""
    return [(record["step"], record["loss"], record["grad_norm"], record["lr"]) for record in metrics(run)]


def num_steps(run: Path) -> int:
    """Return how many steps of a run, which may not have begun, are written."""
    try:
        return (run / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def watchdogs_left(seconds: float = 20) -> list[psutil.Process]:
    """Return the watchdogs that this process has started and that do not end in time."""
    dogs = [child for child in psutil.Process().children() if _is_watchdog(child)]
    return psutil.wait_procs(dogs, timeout=seconds)[1]


def _is_watchdog(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # it has ended
        return "bigtrain.supervise.watchdog" in process.cmdline()
    return False
