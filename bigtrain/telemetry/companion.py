"""Dashboards as readers of the run's files, each in a process of its own.

A dashboard's client in the training process would replace exit hooks, record the command line, and block whenever its
server is away. The training process only starts a companion, which follows ``metrics.jsonl``, ``events.jsonl`` and
``samples.jsonl`` at its own pace and ends after the training process, however that ends, has nothing left to log.

``<run>/<backend>_cursor.json`` holds how far a run is logged: steps by number, events by their place in the file. Steps
that a run repeats after going back are taken back, as far as the dashboard can. The request is JSON in an environment
variable; a line on standard input, or its end, signals the end of the training.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from bigtrain.files import read_json, write_anew
from bigtrain.log import get_logger
from bigtrain.processes import start_beside
from bigtrain.telemetry import names
from bigtrain.telemetry.files import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, Tail, only_steps, read_jsonl

REQUEST_VARIABLE = "BIGTRAIN_COMPANION_REQUEST"
_POLL_SECONDS = 0.5
_FAILURE_FILE = "failure.json"  # see supervise/failures.py
_CAUSE_SECONDS = 3.0  # for the watchdog to write it


class Companion:
    """A dashboard's process, started beside the training; nothing waits for it, and its failure is only a message."""

    def __init__(
        self,
        label: str,
        command: Sequence[str],
        request: dict[str, Any],
        *,
        say: Callable[[str], None] | None = None,
        advice: str = "",
    ) -> None:
        """Start ``command`` with a request of :func:`request_for`.

        ``say`` is called with each message, from another thread, by default the project's log; ``advice`` is appended
        to the one that it is still busy when the training ends.
        """
        self._label, self._advice = label, advice
        self._log_path = Path(request["log"])
        self._say = say or get_logger().info
        self._process: subprocess.Popen[str] | None = None
        try:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            with self._log_path.open("a") as log:
                self._process = start_beside(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, REQUEST_VARIABLE: json.dumps(request)},
                )
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
        """Signal the end of the training and wait for at most ``timeout_seconds``; the companion then goes on alone."""
        if self._process is None:
            return
        try:
            self._process.stdin.write("end\n")
            self._process.stdin.close()
        except OSError:  # it has already exited
            pass
        try:
            self._process.wait(timeout_seconds)
            self._listener.join(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._say(f"{self._label}: still busy in the background (process {self._process.pid}){self._advice}")


def request_for(run_directory: Path, label: str, **values: Any) -> dict[str, Any]:
    """Return what a companion is to do: plain data without secrets. Its standard error goes to ``log``."""
    run = run_directory.absolute()
    files = {"directory": str(run), "log": f"{run}/log/{label}.log", "cursor": f"{run}/{label}_cursor.json"}
    return {**files, "training_pid": os.getpid(), **values}


def read_request(environ: dict[str, str]) -> tuple[dict[str, Any], Callable[[str], None]]:
    """Return, in a companion, its request and a function that sends messages to the training process."""
    messages, sys.stdout = sys.stdout, sys.stderr

    def say(text: str) -> None:
        try:
            print(text, file=messages, flush=True)
        except OSError:  # the training process is gone
            print(text, file=sys.stderr)

    return json.loads(environ[REQUEST_VARIABLE]), say


def follow_until_end(sink: "Sink", request: dict[str, Any]) -> None:
    """Log new records until the training process ends; report one that died without a word."""
    follower = Follower(Path(request["directory"]), sink, Path(request["cursor"]))
    has_ended = False
    while not has_ended:
        has_ended = bool(select.select([sys.stdin], [], [], _POLL_SECONDS)[0])
        has_ended = has_ended or os.getppid() != request["training_pid"]
        follower.log_new()
    # Do not block: a child forked by the training process may hold its end of the pipe.
    if not select.select([sys.stdin], [], [], 0)[0] or sys.stdin.readline() == "":
        follower.report_death()


class Sink(Protocol):
    """A dashboard."""

    def log(self, row: dict[str, float]) -> None:
        """Log the metrics of a step or of a validation; ``step`` and ``tokens`` are the axes."""

    def event(self, event: dict[str, Any]) -> None: ...

    def samples(self, samples: list[dict[str, Any]]) -> None:
        """Log all generated texts so far."""

    def take_back(self, step: int, *, differs: bool) -> int | None:
        """Void what was logged after ``step``, the last one that is still part of the run.

        ``differs`` says whether some of these steps may have other numbers now. Returns the step after which everything
        is logged again; None if what was logged may stay.
        """


class Follower:
    """Passes each new step, event and text of a run to a sink once, in order."""

    def __init__(self, directory: Path, sink: Sink, cursor_path: Path) -> None:
        self._directory, self._sink, self._cursor_path = directory, sink, cursor_path
        self._texts = Tail(directory / SAMPLES_FILE)
        self._samples: list[dict[str, Any]] = []
        self._attempt: int | None = None
        self._read_from_the_beginning()
        self._cursor = self._load_cursor()

    def _read_from_the_beginning(self) -> None:
        self._metrics, self._events = Tail(self._directory / METRICS_FILE), Tail(self._directory / EVENTS_FILE)
        self._num_events = 0  # read so far, without repeated events

    def _load_cursor(self) -> dict[str, Any]:
        cursor = {"train": 0, **dict.fromkeys(names.REPEATED_EVENTS, 0), "events": 0, "num_samples": 0}
        cursor |= read_json(self._cursor_path)
        events = read_jsonl(self._directory / EVENTS_FILE)
        events = [event for event in events if event.get("event") not in names.REPEATED_EVENTS]
        if "time" in cursor:  # written before events were counted
            time_passed_on, validated = cursor.pop("time"), cursor.pop("val")
            cursor |= {"validation": validated, "checkpoint": cursor["train"]}
            cursor["events"] = sum(event.get(names.TIME, "") <= time_passed_on for event in events)
        if cursor["events"] > len(events):  # the file was removed
            cursor["events"] = 0
        return cursor

    def log_new(self) -> None:
        while True:
            metrics = self._metrics
            # Events that change the meaning of steps are written before them.
            records = metrics.read()
            while events := self._events.read():
                if self._events.began_anew:
                    self._num_events = 0
                for event in events:
                    if self._pass_on(event):
                        break
            if metrics is self._metrics:
                if not records:
                    break
                self._log_steps(records)
        while texts := self._texts.read():
            self._samples += texts
        if len(self._samples) > self._cursor["num_samples"]:
            self._move_cursor(num_samples=len(self._samples))
            self._sink.samples(self._samples)

    def report_death(self) -> None:
        """Report that the training process died, with the cause that the watchdog found."""
        cause = self._cause()
        kind = "hang" if cause.get("kind") == "hang" else "fault"
        self._sink.event({"event": kind, "error": cause.get("summary", "the training process was killed or has died")})

    def _cause(self) -> dict[str, Any]:
        """Wait for the watchdog's record of this launch."""
        deadline = time.monotonic() + _CAUSE_SECONDS
        while time.monotonic() < deadline:
            cause = read_json(self._directory / _FAILURE_FILE)
            if cause and cause.get("attempt") == self._attempt:
                return cause
            time.sleep(0.1)
        return {}

    def _log_steps(self, records: list[dict[str, Any]]) -> None:
        fresh = [record for record in only_steps(records) if record[names.STEP] > self._cursor["train"]]
        if fresh:
            self._move_cursor(train=max(record[names.STEP] for record in fresh))
        for record in fresh:
            self._log(record, "train")

    def _log(self, record: dict[str, Any], section: str) -> None:
        non_finite = {key: float(text) for key, text in record.get("non_finite", {}).items()}
        numbers = {key: value for key, value in {**record, **non_finite}.items() if isinstance(value, int | float)}
        self._sink.log({names.dashboard_name(key, section): value for key, value in numbers.items()})

    def _pass_on(self, event: dict[str, Any]) -> bool:
        """Pass on an event, if it is new; return whether the files have to be read from the beginning again."""
        kind, step = event["event"], event.get(names.STEP) or 0
        if kind in names.REPEATED_EVENTS:
            if step > self._cursor[kind]:
                self._move_cursor(**{kind: step})
                if section := {"validation": "val", "test": "test"}.get(kind):
                    self._log(event, section)
                else:
                    self._sink.event(event)
            return False
        self._num_events += 1
        if kind in names.LAUNCH_EVENTS:
            self._attempt = event.get("attempt")
        if self._num_events <= self._cursor["events"]:
            return False
        self._move_cursor(events=self._num_events)
        has_gone_back = self._take_back(event, step)
        self._sink.event(event)
        return has_gone_back

    def _take_back(self, event: dict[str, Any], step: int) -> bool:
        """Void the logged steps that ``event`` says are no longer part of the run; return whether there were any."""
        logged, differs = self._cursor["train"], True
        if event["event"] in names.LAUNCH_EVENTS:
            # The recorder compares the superseded steps with their repetition.
            differs = logged > step + event.get("superseded_steps", 0)
        elif event["event"] == names.SUPERSEDED_EVENT:
            step -= 1
        elif event["event"] != "finished":
            return False
        if logged <= step or (after := self._sink.take_back(step, differs=differs)) is None:
            return False
        steps = {key: min(self._cursor[key], after) for key in ("train", *names.REPEATED_EVENTS)}
        samples = {"num_samples": self._cursor["num_samples"] if after else 0}
        self._cursor = self._load_cursor()  # a sink may have written it, too
        self._move_cursor(events=self._num_events, **steps, **samples)
        self._read_from_the_beginning()
        return True

    def _move_cursor(self, **moved: int) -> None:
        # Before logging: after a crash in between, a step is missing on the dashboard rather than doubled.
        self._cursor |= moved
        write_anew(self._cursor_path, json.dumps(self._cursor))
