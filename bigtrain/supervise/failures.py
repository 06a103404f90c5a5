"""What failed first: every rank that fails leaves a record, and few of them sum up.

When all ranks of a large job fail at once, and each would read what the others have left, they would read ranks² files. So the
first record of each kind is summed up with all others by its writer, and once more by the watchdog of rank 0's node
when the ranks of that node are gone; everybody else reads the sum alone.

``failures/attempt-00003/rank-00001.json`` is one rank's record, ``failure.json`` in the run's directory the
sum of the newest attempt that failed. The first cause is not the earliest record: when a rank dies
the others lose their connections to it, and say so before anybody has noticed the death. So a rank's own
exception, or a hang, goes before a death without a word, and that before a lost connection.
"""

import contextlib
import json
import os
import socket
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import EXIT_FAULT
from bigtrain.files import read_json
from bigtrain.log import redact
from bigtrain.supervise.attempt import FAILURE_FILE, holds, make_room, now, write_exit, write_json
from bigtrain.supervise.heartbeat import Beat

_ROUNDS = 3
_ORDER = ("exception", "hang", "died", "connection")
_CONNECTION_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_CONNECTION_WORDS = ("gloo/transport", "connection closed by peer", "connection reset by peer", "nccl", "tcpstore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one rank failed."""

    kind: str
    """``exception``, ``hang``, ``died`` (without a word) or ``connection`` (to a rank that is gone)."""
    rank: int
    phase: str
    step: int
    """The optimizer step under way, from 1."""
    error: str
    """What happened, in a line."""
    detail: str = ""
    """Traceback or stacks."""
    host: str = ""
    time: str = ""
    code: int = EXIT_FAULT
    """How the run ends if this is the first cause."""


def failure_of(error: BaseException, *, rank: int, phase: str, step: int) -> Failure:
    """Return the record of an exception."""
    kind = "connection" if is_lost_connection(error) else "exception"
    text = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    detail, code = "".join(traceback.format_exception(error)), getattr(error, "exit_code", EXIT_FAULT)
    return Failure(kind=kind, rank=rank, phase=phase, step=step, error=text, detail=detail, code=code)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether ``error`` only says that another rank is gone."""
    if any(base.__name__ in _CONNECTION_TYPES for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _CONNECTION_WORDS)


def record_failures(directory: Path, attempt: int, failures: list[Failure], beats: list[Beat]) -> dict[str, Any]:
    """Write the records, and, if one is the first of its kind, sum up all of this attempt.

    Never raises: what cannot be written is returned all the same.

    Args:
        directory: of the run.
        attempt: number of this launch.
        failures: new ones; a rank that has a record already keeps it.
        beats: what the ranks of this node do.

    Returns:
        The sum: the first cause with ``summary``, a line about it, and ``others``, what the other ranks did; as others have
        left it if it is not summed up anew.
    """
    place = _place(directory, attempt)
    host = socket.gethostname()
    records = [redact({**asdict(failure), "host": host, "time": now()}) for failure in failures]
    make_room(directory, attempt)
    with contextlib.suppress(OSError):
        place.parent.mkdir(exist_ok=True)  # but not the run's directory, which somebody may have renamed
        place.mkdir(exist_ok=True)
        for record in records:
            _write_new(place / f"rank-{record['rank']:05d}.json", record)
    if not any([_is_first_of_kind(place, kind) for kind in {record["kind"] for record in records}]):
        return read_json(place / FAILURE_FILE) or _sum_up(records, attempt, _states(beats))
    return sum_up(directory, attempt, beats, records)


def sum_up(
    directory: Path, attempt: int, beats: list[Beat], records: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Read all records of an attempt, leave ``failure.json`` and ``exit.json``, and return the sum; nothing without records.

    Args:
        directory: of the run.
        attempt: number of the launch.
        beats: what the ranks of this node do.
        records: what counts when none can be read.
    """
    place = _place(directory, attempt)
    found: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for _ in range(_ROUNDS):  # others may record what they know meanwhile, and nobody waits for anybody
        if (now_found := _read_records(place) or records or []) == found:
            break
        found = now_found
        summary = _sum_up(found, attempt, _states(beats))
        if summary == read_json(place / FAILURE_FILE):
            break
        write_exit(directory, code=summary["code"], reason=summary["summary"], step=summary["step"], attempt=attempt)
        with contextlib.suppress(OSError):
            if holds(directory, attempt):
                write_json(directory / FAILURE_FILE, summary)
            write_json(place / FAILURE_FILE, summary)
    return summary


def _place(directory: Path, attempt: int) -> Path:
    return directory / "failures" / f"attempt-{attempt:05d}"


def _states(beats: list[Beat]) -> list[dict[str, Any]]:
    host = socket.gethostname()
    return [{"host": host, "rank": beat.rank, "phase": beat.phase, "step": beat.step} for beat in beats]


def _is_first_of_kind(place: Path, kind: str) -> bool:
    """Return whether nobody has asked that before, or it cannot be known."""
    try:
        os.close(os.open(place / f".{kind}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def describe(run: str, summary: dict[str, Any]) -> str:
    """Return the sum of a failure in a few lines for the console."""
    lines = [f"{run} has failed (attempt {summary['attempt']}). First cause: {summary['summary']}"]
    others = [f"rank {o['rank']} in {o['phase']} of step {o['step']}" for o in summary["others"][:8]]
    if others:
        more = len(summary["others"]) - len(others)
        lines.append(f"  meanwhile: {', '.join(others)}{f' and {more} more' if more else ''}")
    lines.append(f"  everything known: {run}/{FAILURE_FILE}")
    return "\n".join(lines)


def _sum_up(records: list[dict[str, Any]], attempt: int, states: list[dict[str, Any]]) -> dict[str, Any]:
    ordered = sorted(records, key=lambda r: (_ORDER.index(r["kind"]), r["time"], r["rank"]))
    first, recorded = ordered[0], {record["rank"] for record in records}
    others = [{key: r[key] for key in ("rank", "host", "phase", "step", "kind", "error")} for r in ordered[1:]]
    others += [state for state in states if state["rank"] not in recorded]
    where = f"rank {first['rank']} on {first['host']}, in {first['phase']} of step {first['step']}"
    return {
        "summary": f"{where}: {first['error']}",
        "attempt": attempt,
        **first,
        "others": sorted(others, key=lambda other: other["rank"]),
    }


def _read_records(place: Path) -> list[dict[str, Any]]:
    return [values for path in sorted(place.glob("rank-*.json")) if (values := read_json(path))]


def _write_new(path: Path, record: dict[str, Any]) -> None:
    """Write the first record of a rank whole; a later one does not replace it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(record, indent=1))
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
