"""Launches of a run: one at a time, counted, and each leaves a record of how it ended.

``attempt.json`` says which launch has the run; it is locked as long as that lives. ``exit.json`` says how
the newest launch ended, in words that survive launchers which turn every exit code into 1. Scripts
that restart read it: ``{"code", "reason", "step", "attempt", "time"}`` with a code of
:mod:`bigtrain.errors`; it is absent while a launch runs.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bigtrain.errors import EXIT_FINISHED, EXIT_NO_RESTART, EXIT_RESUMABLE, EXIT_USER_ERROR, ConfigError, NoRestartError
from bigtrain.log import get_logger

ATTEMPT_FILE = "attempt.json"
EXIT_FILE = "exit.json"
FAILURE_FILE = "failure.json"

_RESTART_COUNTERS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def claim_run(directory: Path, *, newest_step: int, max_failed_attempts: int) -> tuple[int, int]:
    """Take the run for this launch; rank 0 calls it.

    Args:
        directory: of the run; it exists.
        newest_step: step of the newest complete checkpoint, 0 if there is none.
        max_failed_attempts: so many launches in a row that failed without a new checkpoint are restarted.

    Returns:
        The number of this launch, from 1, and the open file that keeps others out until it is closed or the
        process ends.

    Raises:
        ConfigError: another launch has the run.
        NoRestartError: a launcher has restarted this run, and it has failed too often without a new checkpoint.
        OSError: the directory cannot be written.
    """
    file = os.open(directory / ATTEMPT_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(file, directory)
        last = _read_json(file)
        number = int(last.get("attempt", 0)) + 1
        failures = _failures_in_a_row(directory, last, newest_step)
        if failures >= max_failed_attempts:
            reason = _exhausted(directory, failures, newest_step)
            write_exit(directory, code=EXIT_NO_RESTART, reason=reason, step=newest_step, attempt=number)
            raise NoRestartError(reason)
        (directory / EXIT_FILE).unlink(missing_ok=True)
        record = {
            "attempt": number,
            "failures_without_progress": failures,
            "step": newest_step,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": now(),
        }
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(record).encode() + b"\n", 0)
    except BaseException:
        os.close(file)
        raise
    return number, file


def write_exit(directory: Path, *, code: int, reason: str, step: int, attempt: int) -> None:
    """Leave the record of how a launch ended, whole or not at all; a disk that refuses it costs a warning."""
    values = {"code": code, "reason": reason, "step": step, "attempt": attempt, "time": now()}
    try:
        write_json(directory / EXIT_FILE, values)
    except OSError as error:
        get_logger().warning(f"cannot write {directory / EXIT_FILE}: {error}")


def read_exit(directory: Path) -> dict[str, Any]:
    """Return the record of how the newest launch ended; empty while it runs, or if it ended without a word."""
    return read_json(directory / EXIT_FILE)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write ``values`` to ``path``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w") as file:
            json.dump(values, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of ``path``; empty if it is missing or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def now() -> str:
    """Return the time of day (UTC), for people; nothing is decided by it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def is_restart() -> bool:
    """Return whether a launcher, not a person, has started this process."""
    return any(int(os.environ.get(name) or 0) > 0 for name in _RESTART_COUNTERS)


def _lock(file: int, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _read_json(file)
        raise ConfigError(
            f"{directory} is in use by another launch (process {owner.get('pid')} on {owner.get('host')}, since "
            f"{owner.get('time')}); wait for its end, stop it, or choose another run.name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        get_logger().warning(
            f"the file system of {directory} has no locks ({error.strerror}): a second launch of this run at the same "
            "time would not be noticed and would damage it"
        )


def _failures_in_a_row(directory: Path, last: dict[str, Any], newest_step: int) -> int:
    """Return how many launches up to now failed one after the other without a new checkpoint."""
    if not last or not is_restart():
        return 0
    code = read_exit(directory).get("code")
    if code in (EXIT_FINISHED, EXIT_RESUMABLE) or newest_step > int(last.get("step", 0)):
        return 0
    return int(last.get("failures_without_progress", 0)) + (code != EXIT_USER_ERROR)


def _exhausted(directory: Path, failures: int, step: int) -> str:
    cause = read_json(directory / FAILURE_FILE).get("summary", "unknown; see the log of the launcher")
    return (
        f"{directory} is not restarted any more: {failures} launches in a row failed without a checkpoint after step "
        f"{step}. First cause of the last failure: {cause}. Launched by hand it tries again; "
        "supervision.max_failed_attempts is the limit."
    )


def _read_json(file: int) -> dict[str, Any]:
    try:
        values = json.loads(os.pread(file, 1 << 16, 0))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
