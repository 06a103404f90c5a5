"""One launch of a run on this rank: its lease, its heartbeat, and the record of its end."""

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from bigtrain.config import SupervisionConfig
from bigtrain.distributed.collectives import on_rank0
from bigtrain.errors import EXIT_FAULT, BigtrainError, StopError, first_line
from bigtrain.files import read_json, writing
from bigtrain.log import get_logger
from bigtrain.supervise.attempt import FAILURE_FILE, claim_run, has_decided, has_failed, write_exit
from bigtrain.supervise.failures import Failure, describe, is_lost_connection, record_failures
from bigtrain.supervise.heartbeat import Heartbeat, beats_directory, read_beats
from bigtrain.supervise.lease import Lease
from bigtrain.supervise.signals import MOVED, StopSignal
from bigtrain.supervise.watchdog import STACK_SIGNAL, Watch, question_path, stacks_path, start_watchdog

_RECORD_SECONDS = 1.0  # until a failure that the launcher has noticed is recorded


class Launch:
    """A context manager around a run that records and re-raises its errors; nothing is written before :meth:`claim`."""

    def __init__(self, directory: Path, rank: int, config: SupervisionConfig) -> None:
        self.directory = directory
        self.rank = rank
        self.config = config
        self.attempt = 0  # number of this launch, from 1; 0 until the run is claimed
        self.started = time.monotonic()
        self.heartbeat = Heartbeat()
        self.signal = StopSignal()
        self._lease: Lease | None = None
        self._beat: Path | None = None  # file of this rank's heartbeat
        self._stacks: TextIO | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def claim(self, newest_step: Callable[[Path], int]) -> None:
        """Take the run for this launch, unless it has it; all ranks call this. From then on signals are handled in order.

        ConfigError: another launch has it, or its directory cannot be written. NoRestartError: see :func:`claim_run`.
        """

        def stop() -> None:
            if self.signal.reason is None:
                where = f"{self.directory} was renamed or removed while it is in use"
                get_logger().warning(f"{where}: this launch saves and stops")
                self.signal.request(MOVED)

        def take() -> int:
            most, step = self.config.max_failed_attempts, newest_step(self.directory)
            with writing(self.directory):
                number, self._lease = claim_run(
                    self.directory, newest_step=step, max_failed_attempts=most, on_move=stop
                )
            return number

        if self.attempt == 0:
            self.attempt = on_rank0(take)
            self.signal.at_once = True
            self.signal.listen()

    def is_here(self) -> bool:
        """Return, on rank 0, whether the run's directory is where it was taken; other ranks cannot tell."""
        return self._lease is None or self._lease.is_here()

    def follow(self) -> Path:
        """Return, on rank 0, where the run's directory is now; records go there."""
        if self._lease is not None:
            self.directory = self._lease.follow()
        return self.directory

    def supervise(
        self, launch_id: str, local_rank: int, save: Callable[[str], None] | None = None, cache: Path | None = None
    ) -> None:
        """Publish the heartbeat, and start the watchdog on the first rank of each node.

        ``launch_id`` is unique to the launch. ``save`` is called in a thread, with a name, before a hung process is
        killed. Waiting for data that is fetched into ``cache`` is no hang.
        """
        hang_seconds, first_hang_seconds = self.config.hang_seconds, self.config.first_hang_seconds
        place = beats_directory(f"{launch_id}-{self.rank - local_rank}")
        try:
            place.mkdir(mode=0o700, exist_ok=True)
            # Opened now: a rank that hangs cannot open anything any more.
            self._stacks = stacks_path(place, self.rank).open("w")
            faulthandler.enable(self._stacks)
            faulthandler.register(STACK_SIGNAL, self._stacks)
            self._beat = place / f"{self.rank:05d}.beat"
            self.heartbeat = Heartbeat(
                self._beat, rank=self.rank, hang_seconds=hang_seconds, first_hang_seconds=first_hang_seconds
            )
            if save:
                question = question_path(place, self.rank)
                os.mkfifo(question)
                threading.Thread(target=self._answer, args=(question, save), daemon=True).start()
            if local_rank == 0:
                watch = Watch(
                    beats=str(place),
                    run=str(self.directory),
                    attempt=self.attempt,
                    interval_seconds=min(0.5, hang_seconds / 8) if hang_seconds else 0.5,
                    kills=hang_seconds > 0,
                    cache=str(cache or ""),
                    fetch_seconds=first_hang_seconds,
                )
                self._watchdog = start_watchdog(watch)
        except OSError as error:
            get_logger().warning(f"no watchdog on this node: {error}")

    def _answer(self, question: Path, save: Callable[[str], None]) -> None:
        """Block in ``open`` until the watchdog asks; save, and remove the question."""
        with contextlib.suppress(OSError):
            question.open("rb").close()
            save(f"hang-step-{self.heartbeat.step}-rank-{self.rank}")
            question.unlink()

    def previous_failure(self) -> str | None:
        """Return the first cause of the previous launch's failure, if it failed."""
        found = read_json(self.directory / FAILURE_FILE)
        return found.get("summary") if found.get("attempt") == self.attempt - 1 else None

    def end(self, code: int, reason: str) -> None:
        if self.rank == 0 and self.attempt:
            write_exit(self.directory, code=code, reason=reason, step=self.heartbeat.step, attempt=self.attempt)

    def leave(self) -> None:
        """Take this rank's heartbeat away, on a process that goes on after the run: a watchdog ends with its ranks."""
        if self._beat is not None:
            self._beat.unlink(missing_ok=True)

    def __enter__(self) -> "Launch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.attempt == 0:
            if error is not None and is_lost_connection(error):
                get_logger().error(f"other ranks have ended before the first step: {first_line(error)}")
            return
        self.signal.at_once = False
        with contextlib.suppress(OSError):
            self.follow()
        raised, stop = error, error
        while stop is not None and not isinstance(stop, StopError):  # a library may have wrapped what a signal raised
            stop = stop.__cause__ or stop.__context__
        error = stop or error
        if isinstance(error, StopError):
            error.shared = True
            time.sleep(_RECORD_SECONDS)
            if has_failed(self.directory, self.attempt):  # the signal is the launcher's answer to that
                error.exit_code = EXIT_FAULT
                error.args = (f"ended by {self.signal.reason}; the first cause is in {self.directory / FAILURE_FILE}",)
            else:
                self.end(error.exit_code, str(self.signal.reason))
        elif isinstance(error, BigtrainError) and (error.shared or self._is_said_before_the_watchdog()):
            if self.rank == 0 and self._beat is not None:  # before that, exit.json says everything
                record_failures(self.directory, self.attempt, [self._failure(error)], [])
            self.end(error.exit_code, first_line(error))
        elif error is not None:
            self._record(error)
        self.heartbeat.enter("ending")
        # After a fault the lease is held until the process ends: other ranks may still run.
        if self._lease is not None and (error is None or isinstance(error, BigtrainError)):
            self._lease.release()
        if error is not None and error is not raised:
            raise error from None

    def _is_said_before_the_watchdog(self) -> bool:
        """Return whether rank 0 reports an error from before the watchdog was started."""
        if self._beat is not None:
            return False
        if self.rank > 0:
            time.sleep(_RECORD_SECONDS)
        return self.rank == 0 or has_decided(self.directory, self.attempt)

    def _failure(self, error: BaseException) -> Failure:
        return Failure(
            kind="connection" if is_lost_connection(error) else "exception",
            rank=self.rank,
            phase=self.heartbeat.phase,
            step=self.heartbeat.step,
            error=f"{type(error).__name__}: {error}".splitlines()[0][:500],
            detail="".join(traceback.format_exception(error)),
            code=getattr(error, "exit_code", EXIT_FAULT),
        )

    def _record(self, error: BaseException) -> None:
        failure = self._failure(error)
        if failure.kind == "connection" and has_decided(self.directory, self.attempt):
            return
        beats = read_beats(self._beat.parent) if self._beat else []
        summary = record_failures(self.directory, self.attempt, [failure], beats)
        text = describe(str(self.directory), summary)
        if isinstance(error, BigtrainError):
            error.shared = False
        if failure.kind == "connection":
            text = (
                f"rank {self.rank} has lost its connection to other ranks in {failure.phase} of step {failure.step}; "
                f"the first cause is in {self.directory / FAILURE_FILE}"
            )
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
