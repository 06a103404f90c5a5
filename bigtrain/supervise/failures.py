"""The first cause of a failure: every rank that fails leaves a record, and few of them summarise.

``failures/attempt-00003/rank-00001.json`` is the record of a rank, ``failure.json`` in the run's directory the summary
of the newest attempt that failed. If every rank of a large job summarised, they would read ranks² files. So only the
writer of the first record of each kind does, and finally the watchdog of rank 0's node.

The first cause is not the earliest record: when a rank dies, others report their lost connections before the death is
noticed. An exception or a hang goes before a death, and a death before a lost connection.
"""

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import EXIT_FAULT
from bigtrain.files import read_json, write_anew
from bigtrain.log import redact
from bigtrain.supervise.attempt import FAILURE_FILE, holds, make_room, now, write_exit
from bigtrain.supervise.heartbeat import Beat

ATTEMPTS = "failures"  # directory of the records of all attempts
_ROUNDS = 3
_ORDER = ("exception", "hang", "died", "connection")
_CONNECTION_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_CONNECTION_WORDS = ("gloo/transport", "connection closed by peer", "connection reset by peer", "nccl", "tcpstore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    kind: str  # exception, hang, died (killed or crashed) or connection (to a rank that is gone)
    rank: int
    phase: str
    step: int  # the optimizer step under way, from 1
    error: str  # one line
    detail: str = ""  # traceback or stacks
    host: str = ""
    time: str = ""
    code: int = EXIT_FAULT  # of the run if this is the first cause


def is_lost_connection(error: BaseException) -> bool:
    """Return whether ``error`` only says that another rank is gone."""
    if any(base.__name__ in _CONNECTION_TYPES for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _CONNECTION_WORDS)


def record_failures(directory: Path, attempt: int, failures: list[Failure], beats: list[Beat]) -> dict[str, Any]:
    """Write records of ranks that have none, and summarise the attempt if one is the first of its kind. Never raises.

    ``beats`` are the heartbeats of the ranks of this node. Returned is the first cause with ``summary``, a line about
    it, and ``others``, what the other ranks did.
    """
    place, host = directory / ATTEMPTS / f"attempt-{attempt:05d}", socket.gethostname()
    records = [redact({**asdict(failure), "host": host, "time": now()}) for failure in failures]
    make_room(directory, attempt)
    with contextlib.suppress(OSError):
        place.parent.mkdir(exist_ok=True)  # but not the run's directory, which may have been renamed
        place.mkdir(exist_ok=True)
        for record in records:
            _write_new(place / f"rank-{record['rank']:05d}.json", record)
    if not any([_is_first_of_kind(place, kind) for kind in {record["kind"] for record in records}]):
        return read_json(place / FAILURE_FILE) or _sum_up(records, attempt, beats)
    return sum_up(directory, attempt, beats, records)


def sum_up(
    directory: Path, attempt: int, beats: list[Beat], records: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Summarise the records of an attempt (``records`` if none can be read) in ``failure.json`` and ``exit.json``."""
    place = directory / ATTEMPTS / f"attempt-{attempt:05d}"
    found: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for _ in range(_ROUNDS):  # other ranks may write their records meanwhile
        read = [values for path in sorted(place.glob("rank-*.json")) if (values := read_json(path))] or records or []
        if read == found:
            break
        found, summary = read, _sum_up(read, attempt, beats)
        if summary == read_json(place / FAILURE_FILE):
            break
        write_exit(directory, code=summary["code"], reason=summary["summary"], step=summary["step"], attempt=attempt)
        with contextlib.suppress(OSError):
            if holds(directory, attempt):
                write_anew(directory / FAILURE_FILE, json.dumps(summary, indent=1))
            write_anew(place / FAILURE_FILE, json.dumps(summary, indent=1))
    return summary


def _is_first_of_kind(place: Path, kind: str) -> bool:
    try:
        os.close(os.open(place / f".{kind}", os.O_CREAT | os.O_EXCL))
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def describe(run: str, summary: dict[str, Any]) -> str:
    """Return the summary of a failure in a few lines for the console."""
    lines = [f"{run} has failed (attempt {summary['attempt']}). First cause: {summary['summary']}"]
    others = [f"rank {o['rank']} in {o['phase']} of step {o['step']}" for o in summary["others"][:8]]
    if others:
        more = len(summary["others"]) - len(others)
        lines.append(f"  meanwhile: {', '.join(others)}{f' and {more} more' if more else ''}")
    lines.append(f"  everything known: {run}/{FAILURE_FILE}")
    return "\n".join(lines)


def _sum_up(records: list[dict[str, Any]], attempt: int, beats: list[Beat]) -> dict[str, Any]:
    ordered = sorted(records, key=lambda r: (_ORDER.index(r["kind"]), r["time"], r["rank"]))
    first, recorded, host = ordered[0], {record["rank"] for record in records}, socket.gethostname()
    others = [{key: r[key] for key in ("rank", "host", "phase", "step", "kind", "error")} for r in ordered[1:]]
    for beat in (beat for beat in beats if beat.rank not in recorded):
        others.append({"host": host, "rank": beat.rank, "phase": beat.phase, "step": beat.step})
    where = f"rank {first['rank']} on {first['host']}, in {first['phase']} of step {first['step']}"
    return {
        "summary": f"{where}: {first['error']}",
        "attempt": attempt,
        **first,
        "others": sorted(others, key=lambda other: other["rank"]),
    }


def _write_new(path: Path, record: dict[str, Any]) -> None:
    """Write the first record of a rank whole; a later one does not replace it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(record, indent=1))
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
