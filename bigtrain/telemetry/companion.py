"""Dashboards as readers of the run's files, each in a process of its own.

A dashboard's client in the training process would take its interpreter, its exit code, its command line, and its
time whenever a server is away. Here the training process starts a companion, and that is all it ever does: the
companion follows ``metrics.jsonl``, ``events.jsonl`` and ``samples.jsonl``, so it can be as slow as it likes, and
nothing is lost when it is. It ends when the training process ends, however that happens, after it has logged what
is in the files.

``<run>/<backend>_cursor.json`` holds how far a run is logged: a resumed run continues, and steps that it repeats are
not logged again. An environment variable holds what a companion is to do, as JSON; a line on standard input, or its
end, says that the training has ended.
"""

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from bigtrain.log import get_logger
from bigtrain.processes import start_beside
from bigtrain.telemetry import names
from bigtrain.telemetry.files import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, Tail

REQUEST_VARIABLE = "BIGTRAIN_COMPANION_REQUEST"
_POLL_SECONDS = 0.5
_FAILURE_FILE = "failure.json"  # see resilience/failures.py
_CAUSE_SECONDS = 3.0  # that the watchdog is given to write it


class Companion:
    """Starts and ends a companion; no call waits for it, and no failure of it is more than a message."""

    def __init__(
        self,
        label: str,
        command: Sequence[str],
        request: dict[str, Any],
        *,
        say: Callable[[str], None] | None = None,
        advice: str = "",
    ) -> None:
        """Start it.

        Args:
            label: Name of the dashboard, in front of every message.
            command: The companion's command line.
            request: What it is to do, as :func:`request_for` returns it.
            say: Receives its messages, from another thread; by default the project's log.
            advice: What to do if it is never done.
        """
        self._label, self._advice = label, advice
        self._log_path = Path(request["log"])
        self._say = say or get_logger().info
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = _start(command, request, self._log_path)
        except OSError as error:
            self._say(f"{label}: cannot start it ({error}); the run goes on without")
            return
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        for line in process.stdout:
            self._say(f"{self._label}: {line.rstrip()}")
        if process.wait() != 0:
            self._say(f"{self._label}: stopped; the run goes on without; see {self._log_path}")

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Tell the companion that the training has ended and wait so long at most; then it goes on alone."""
        if self._process is None:
            return
        try:
            self._process.stdin.write("end\n")
            self._process.stdin.close()
        except OSError:  # it ended before
            pass
        try:
            self._process.wait(timeout_seconds)
            self._listener.join(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._say(f"{self._label}: still busy in the background (process {self._process.pid}){self._advice}")


def request_for(run_directory: Path, label: str, **values: Any) -> dict[str, Any]:
    """Return what a companion of this process is to do, as plain data without secrets; its standard error goes to ``log``."""
    run = run_directory.absolute()
    files = {"directory": str(run), "log": f"{run}/log/{label}.log", "cursor": f"{run}/{label}_cursor.json"}
    return {**files, "training_pid": os.getpid(), **values}


def _start(command: Sequence[str], request: dict[str, Any], path: Path) -> "subprocess.Popen[str]":
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        return start_beside(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, REQUEST_VARIABLE: json.dumps(request)},
        )


def read_request(environ: dict[str, str]) -> tuple[dict[str, Any], Callable[[str], None]]:
    """Return, in a companion, what it is to do and how it speaks to the training process; stray prints go to its log."""
    messages, sys.stdout = sys.stdout, sys.stderr

    def say(text: str) -> None:
        try:
            print(text, file=messages, flush=True)
        except OSError:  # the training process is gone
            print(text, file=sys.stderr)

    return json.loads(environ[REQUEST_VARIABLE]), say


def lock(path: Path) -> TextIO:
    """Open ``path``, which may not exist yet, when no other process has it locked; closing it lets go."""
    file = path.open("a+")
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def follow_until_end(sink: "Sink", request: dict[str, Any]) -> None:
    """Log what is new until the training process ends, and then the rest; tell of one that was killed."""
    follower = Follower(Path(request["directory"]), sink, Path(request["cursor"]))
    has_ended = False
    while not has_ended:
        has_ended = bool(select.select([sys.stdin], [], [], _POLL_SECONDS)[0])
        has_ended = has_ended or os.getppid() != request["training_pid"]
        follower.log_new()
    # A child that the training process forked may hold its end of the pipe: nothing is waited for.
    if not select.select([sys.stdin], [], [], 0)[0] or sys.stdin.readline() == "":
        follower.tell_of_death()


class Sink(Protocol):
    """A dashboard."""

    def log(self, row: dict[str, float]) -> None:
        """Take the numbers of a step or of a validation; ``step`` and ``tokens`` are the axes."""

    def event(self, event: dict[str, Any]) -> None:
        """Take something that happened."""

    def samples(self, samples: list[dict[str, Any]]) -> None:
        """Take all generated texts so far, when there are new ones."""


class Follower:
    """Passes on what is new in the files of a run: each step, each event and each text once, in order."""

    def __init__(self, directory: Path, sink: Sink, cursor_path: Path) -> None:
        """Begin where the cursor is."""
        self._metrics, self._events = Tail(directory / METRICS_FILE), Tail(directory / EVENTS_FILE)
        self._texts = Tail(directory / SAMPLES_FILE)
        self._directory, self._begin = directory, time.time()
        self._cursor_path, self._sink = cursor_path, sink
        self._samples: list[dict[str, Any]] = []
        self._tokens_per_step = 0.0
        self._cursor: dict[str, Any] = {"train": 0, "val": 0, "time": "", "num_samples": 0}
        if self._cursor_path.exists():
            self._cursor |= json.loads(self._cursor_path.read_text())

    def log_new(self) -> None:
        """Pass on what was added to the files since the last call."""
        while records := self._metrics.read():
            self._tokens_per_step = records[-1].get(names.TOKENS, 0) / max(records[-1][names.STEP], 1)
            self._log_after_cursor("train", records)
        while events := self._events.read():
            validations = [event for event in events if event["event"] == "validation"]
            axis = [{names.TOKENS: self._tokens_per_step * event[names.STEP]} for event in validations]
            self._log_after_cursor("val", [tokens | event for tokens, event in zip(axis, validations, strict=True)])
            self._pass_on([event for event in events if event["event"] != "validation"])
        while texts := self._texts.read():
            self._samples += texts
        if len(self._samples) > self._cursor["num_samples"]:
            self._move_cursor("num_samples", len(self._samples))
            self._sink.samples(self._samples)

    def tell_of_death(self) -> None:
        """Pass on that the training process is gone without a word, and why, if the watchdog has found it out."""
        cause = self._cause()
        kind = "hang" if cause.get("kind") == "hang" else "fault"
        self._sink.event({"event": kind, "error": cause.get("summary", "the training process was killed or has died")})

    def _cause(self) -> dict[str, Any]:
        """Return what the watchdog writes, which takes it a moment."""
        path, deadline = self._directory / _FAILURE_FILE, time.monotonic() + _CAUSE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                if path.stat().st_mtime >= self._begin:
                    return json.loads(path.read_text())
            time.sleep(0.1)
        return {}

    def _log_after_cursor(self, section: str, records: list[dict[str, Any]]) -> None:
        fresh = [record for record in records if record[names.STEP] > self._cursor[section]]
        if not fresh:
            return
        self._move_cursor(section, max(record[names.STEP] for record in fresh))
        for record in fresh:
            self._sink.log({names.dashboard_name(key, section): value for key, value in _numbers(record).items()})

    def _pass_on(self, events: list[dict[str, Any]]) -> None:
        """Pass on events; a resumed run keeps the old ones, and the time tells which are new."""
        fresh = [event for event in events if event.get(names.TIME, "") > self._cursor["time"]]
        if fresh:
            self._move_cursor("time", max(event[names.TIME] for event in fresh))
        for event in fresh:
            self._sink.event(event)

    def _move_cursor(self, key: str, value: Any) -> None:
        # Before logging: after a crash in between, a step is missing on the dashboard rather than doubled.
        self._cursor[key] = value
        temporary = self._cursor_path.with_name(self._cursor_path.name + ".tmp")
        with temporary.open("w") as file:
            json.dump(self._cursor, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._cursor_path)


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    non_finite = {key: float(text) for key, text in record.get("non_finite", {}).items()}
    return {key: value for key, value in {**record, **non_finite}.items() if isinstance(value, (int, float))}
