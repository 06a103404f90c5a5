"""Launches of a run: one at a time, counted, each with a record of its end.

``attempt.json`` is the lease of the launch that holds the run (:mod:`bigtrain.supervise.lease`). ``exit.json`` is how
the newest launch ended, ``{"code", "reason", "step", "attempt", "time"}`` with a code of :mod:`bigtrain.errors`, for
scripts behind a launcher that turns every exit code into 1; it is absent while a launch runs.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bigtrain.errors import (
    EXIT_FAULT,
    EXIT_FINISHED,
    EXIT_NO_RESTART,
    EXIT_RESUMABLE,
    EXIT_USER_ERROR,
    BigtrainError,
    NoRestartError,
)
from bigtrain.files import read_json, write_anew
from bigtrain.log import get_logger, redact
from bigtrain.supervise.lease import Lease, take_lease

ATTEMPT_FILE = "attempt.json"
EXIT_FILE = "exit.json"
FAILURE_FILE = "failure.json"
ROOM_FILE = ".room"
_ROOM_BYTES = 2**20
_RESTART_COUNTERS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def claim_run(
    directory: Path,
    *,
    newest_step: int,
    max_failed_attempts: int,
    hurry: bool = False,
    reserve: bool = False,
    on_move: Callable[[], None] = lambda: None,
) -> tuple[int, Lease]:
    """Take the run for this launch, on rank 0; return the number of this launch, from 1, and its lease.

    A launcher's restart waits for a live holder, unless in a ``hurry``, and is refused (NoRestartError) after
    ``max_failed_attempts`` failures in a row without a new checkpoint. With ``reserve`` the run is taken for ranks that
    are started next, and count as failed if they never claim it. ``on_move`` is called when the directory is found
    renamed or removed. ConfigError: another launch has the run. OSError: the directory cannot be written.
    """
    lease = take_lease(directory / ATTEMPT_FILE, patient=is_restart() and not hurry, hurry=hurry)
    try:
        last = read_json(directory / ATTEMPT_FILE)
        is_reserved = not reserve and last.get("reserved", False)
        number = int(last.get("attempt", 0)) + (not is_reserved)
        ended = read_exit(directory)
        if is_restart() and ended.get("code") == EXIT_NO_RESTART:
            write_exit(directory, code=EXIT_NO_RESTART, reason=ended["reason"], step=newest_step, attempt=number)
            raise NoRestartError(f"not restarted, launched by hand it tries again: {ended['reason']}")
        code, failures = ended.get("code"), 0
        has_progress = code in (EXIT_FINISHED, EXIT_RESUMABLE) or newest_step > int(last.get("step", 0))
        if "attempt" in last and is_restart() and not has_progress:
            failures = int(last.get("failures_without_progress", 0)) + (code != EXIT_USER_ERROR and not is_reserved)
        if failures >= max_failed_attempts:
            cause = read_json(directory / FAILURE_FILE).get("summary", "unknown; see the log of the launcher")
            reason = (
                f"{directory} is not restarted any more: {failures} launches in a row failed without a checkpoint after "
                f"step {newest_step}. First cause of the last failure: {cause}. Launched by hand it tries again; "
                "supervision.max_failed_attempts is the limit."
            )
            write_exit(directory, code=EXIT_NO_RESTART, reason=reason, step=newest_step, attempt=number)
            raise NoRestartError(reason)
        (directory / EXIT_FILE).unlink(missing_ok=True)
        values = {"attempt": number, "failures_without_progress": failures, "step": newest_step, "time": now()}
        lease.write({**values, "reserved": reserve})
        keep_room(directory)
    except BaseException:
        lease.release()
        raise
    lease.keep(on_move)
    return number, lease


def record_early_stop(directory: Path, newest_step: int, reason: str) -> None:
    """Record a launch that is stopped before it takes the run, unless another one has it or the last verdict stands."""
    with contextlib.suppress(OSError, BigtrainError):
        if read_exit(directory).get("code") in (EXIT_FINISHED, EXIT_NO_RESTART):
            return
        directory.mkdir(parents=True, exist_ok=True)
        number, lease = claim_run(directory, newest_step=newest_step, max_failed_attempts=sys.maxsize, hurry=True)
        write_exit(directory, code=EXIT_RESUMABLE, reason=reason, step=newest_step, attempt=number)
        lease.release()


def holds(directory: Path, attempt: int) -> bool:
    """Return whether no later launch has taken the run."""
    return read_json(directory / ATTEMPT_FILE).get("attempt", attempt) <= attempt


def keep_room(directory: Path) -> None:
    """Reserve disk space, in ``.room``, for the records of a failure, if there is as much."""
    path = directory / ROOM_FILE
    try:
        path.write_bytes(os.urandom(_ROOM_BYTES))  # zeros would take nothing on a file system that compresses
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def make_room(directory: Path, attempt: int) -> None:
    """Free the reserved disk space for the records of a failure."""
    if holds(directory, attempt):
        with contextlib.suppress(OSError):
            (directory / ROOM_FILE).unlink(missing_ok=True)


def write_exit(directory: Path, *, code: int, reason: str, step: int, attempt: int) -> None:
    """Write the record of how a launch ended; warn where the disk refuses it."""
    if not holds(directory, attempt):
        return
    make_room(directory, attempt)
    values = {"code": code, "reason": redact(reason), "step": step, "attempt": attempt, "time": now()}
    try:
        write_anew(directory / EXIT_FILE, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        get_logger().warning(f"cannot write {directory / EXIT_FILE}: {error}")


def read_exit(directory: Path) -> dict[str, Any]:
    """Return the record of how the newest launch ended; empty while it runs or if it was killed."""
    return read_json(directory / EXIT_FILE)


def has_decided(directory: Path, attempt: int) -> bool:
    """Return whether a launch has recorded its end, other than a fault; its ranks then lose their connections."""
    found = read_exit(directory)
    return found.get("attempt") == attempt and found.get("code") != EXIT_FAULT


def has_failed(directory: Path, attempt: int) -> bool:
    """Return whether a rank of the launch has recorded a failure."""
    found = read_exit(directory)
    return found.get("attempt") == attempt and found.get("code") not in (EXIT_FINISHED, EXIT_RESUMABLE)


def now() -> str:
    """Return the time (UTC) for records; nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def is_restart() -> bool:
    """Return whether a launcher, not a person, has started this process."""
    return any(int(os.environ.get(name) or 0) > 0 for name in _RESTART_COUNTERS)
