"""Launches of a run: one at a time, counted; heartbeats and their deadlines."""

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from bigtrain.data.read.cache import NodeCache
from bigtrain.errors import ConfigError, NoRestartError, first_line
from bigtrain.files import is_locked
from bigtrain.supervise import failures, lease, watchdog
from bigtrain.supervise.attempt import (
    ATTEMPT_FILE,
    claim_run,
    read_exit,
    record_early_stop,
    write_exit,
)
from bigtrain.supervise.failures import Failure, is_lost_connection, record_failures
from bigtrain.supervise.heartbeat import Beat, Heartbeat, read_beats
from bigtrain.supervise.watchdog import Watch, watch_node


def claim(directory: Path, *, newest_step: int = 0) -> int:
    """Take the run and let it go, as a launch that ends."""
    number, held = take(directory, newest_step=newest_step)
    held.release()
    return number


def take(directory: Path, *, newest_step: int = 0) -> tuple[int, lease.Lease]:
    """Take the run, as a launch that begins."""
    return claim_run(directory, newest_step=newest_step, max_failed_attempts=3)


def test_a_run_is_held_until_it_is_released(tmp_path: Path):
    _, held = take(tmp_path)
    write_exit(tmp_path, code=1, reason="still there", step=1, attempt=1)
    with pytest.raises(ConfigError, match=f"in use by another launch \\(process {os.getpid()} on "):
        claim(tmp_path)
    record_early_stop(tmp_path, 0, "SIGTERM")
    assert read_exit(tmp_path)["reason"] == "still there", "a launch that is refused, or stops early, touches nothing"
    held.release()
    assert claim(tmp_path) == 2
    assert read_exit(tmp_path) == {}


def test_a_stop_before_the_run_is_taken_counts_as_a_launch(tmp_path: Path):
    record_early_stop(tmp_path / "runs/new", 0, "SIGTERM")
    found = read_exit(tmp_path / "runs/new")
    assert (found["code"], found["reason"], found["step"], found["attempt"]) == (75, "SIGTERM", 0, 1)
    assert claim(tmp_path / "runs/new") == 2
    (tmp_path / "file").write_text("no directory")
    record_early_stop(tmp_path / "file/run", 0, "SIGTERM")


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(logging.getLogger("bigtrain"), "propagate", True)
    assert claim(tmp_path) == 1
    assert "has no locks (No locks available)" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_has_caches_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flock, own = fcntl.flock, tmp_path / "cache"

    def refuse_there(file: int, operation: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).is_relative_to(own):
            raise OSError(number, os.strerror(number))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", refuse_there)
    cache = NodeCache(own, max_bytes=100)
    with cache.making("file", 3, wait=True) as handle:
        assert cache.making("file", 3, wait=False).__enter__() is None, (
            "processes of a machine still exclude each other"
        )
        assert is_locked(own / "file.3.partial")
        handle.write(b"abc")
    assert cache.open("file").read() == b"abc"


@pytest.mark.parametrize(
    ("code", "newest_step", "is_restart", "failures"),
    [
        (1, 5, True, 2),
        (None, 5, True, 2),  # it ended without a word
        (1, 6, True, 0),  # it made progress
        (1, 5, False, 0),  # a person tries again
        (75, 5, True, 0),
        (2, 5, True, 1),  # neither a failure nor progress
    ],
)
def test_only_restarts_after_failures_without_progress_count(
    code: int | None,
    newest_step: int,
    is_restart: bool,
    failures: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / ATTEMPT_FILE).write_text(json.dumps({"attempt": 7, "step": 5, "failures_without_progress": 1}))
    if code is not None:
        write_exit(tmp_path, code=code, reason="", step=5, attempt=7)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1" if is_restart else "0")
    assert claim(tmp_path, newest_step=newest_step) == 8
    assert json.loads((tmp_path / ATTEMPT_FILE).read_text())["failures_without_progress"] == failures


def test_too_many_are_refused_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ATTEMPT_FILE).write_text(json.dumps({"attempt": 7, "step": 5, "failures_without_progress": 2}))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    for _ in range(2):
        with pytest.raises(NoRestartError, match="3 launches in a row failed"):
            claim(tmp_path, newest_step=5)
        assert read_exit(tmp_path)["code"] == 3


def test_a_launcher_is_refused_where_a_person_has_to_look_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claim(tmp_path, newest_step=5)
    write_exit(tmp_path, code=3, reason="it diverges", step=5, attempt=1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(NoRestartError, match="not restarted, launched by hand it tries again: it diverges"):
        claim(tmp_path, newest_step=5)
    assert read_exit(tmp_path)["reason"] == "it diverges"
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert claim(tmp_path, newest_step=5) == 2


def test_a_damaged_record_does_not_stop_a_run(tmp_path: Path):
    (tmp_path / ATTEMPT_FILE).write_text('{"attempt": 7, "st')
    assert claim(tmp_path) == 1


# Who meets a launch that has the run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let leases be short."""
    times = {"BEAT_SECONDS": 0.1, "LEASE_SECONDS": 0.6, "PATIENCE_SECONDS": 1.5, "_LOOK_SECONDS": 0.1}
    for name, seconds in times.items():
        monkeypatch.setattr(lease, name, seconds)


HOLDER = """
import signal, sys
from pathlib import Path
from bigtrain.supervise import attempt, lease
lease.BEAT_SECONDS = 0.1
attempt.claim_run(Path(sys.argv[1]), newest_step=0, max_failed_attempts=3)
print("has it", flush=True)
signal.pause()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the run."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "has it\n"
        yield process
        process.kill()


@pytest.mark.usefixtures("quick")
def test_a_restart_takes_over_from_a_launch_that_is_cut_off(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    holder.send_signal(signal.SIGSTOP)
    number, taken = take(tmp_path)
    assert number == 2
    holder.send_signal(signal.SIGCONT)
    assert holder.wait(10) == 3, "it ends before it writes anything more"
    assert "another one has taken the run over" in holder.stderr.read()
    write_exit(tmp_path, code=1, reason="of the one that was cut off", step=1, attempt=1)
    assert read_exit(tmp_path) == {}
    assert record_failures(tmp_path, 1, [failure("died", 0)], [])["rank"] == 0
    assert not (tmp_path / "failure.json").exists()
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with pytest.raises(ConfigError, match="in use"):
        claim(tmp_path)
    taken.release()


@pytest.mark.usefixtures("quick", "holder")
def test_a_restart_is_refused_when_the_other_launch_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match="in use by another launch"):
        claim(tmp_path)


@pytest.mark.usefixtures("quick")
def test_a_restart_waits_for_the_end_of_the_other_launch(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    threading.Timer(0.5, holder.kill).start()
    assert claim(tmp_path) == 2


def failed_before(directory: Path) -> int:
    return json.loads((directory / ATTEMPT_FILE).read_text())["failures_without_progress"]


def reserve(directory: Path, *, newest_step: int = 0) -> int:
    """Take the run for ranks that are started next."""
    number, held = claim_run(directory, newest_step=newest_step, max_failed_attempts=3, reserve=True)
    held.release()
    return number


def test_a_launch_counts_once_whether_its_ranks_come_to_the_run_or_not(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert (reserve(tmp_path), failed_before(tmp_path)) == (1, 0)
    assert (claim(tmp_path), failed_before(tmp_path)) == (1, 0), "the launch that it was taken for"
    write_exit(tmp_path, code=1, reason="a rank raised", step=0, attempt=1)
    assert (reserve(tmp_path), failed_before(tmp_path)) == (2, 1)
    assert (reserve(tmp_path), failed_before(tmp_path)) == (3, 2), "nothing was heard of its ranks"
    with pytest.raises(NoRestartError, match="3 launches in a row"):
        reserve(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert (reserve(tmp_path), failed_before(tmp_path)) == (4, 0), "submitted anew"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert (reserve(tmp_path, newest_step=5), failed_before(tmp_path)) == (5, 0), "there is a newer checkpoint"


# First cause


def failure(kind: str, rank: int) -> Failure:
    return Failure(kind=kind, rank=rank, phase="data", step=3, error=f"{kind} of {rank}")


def test_a_lost_connection_is_a_cause_only_when_there_is_no_better(tmp_path: Path):
    assert record_failures(tmp_path, 1, [failure("connection", 0)], [])["rank"] == 0
    assert record_failures(tmp_path, 1, [failure("died", 2)], [])["rank"] == 2
    beats = [Beat(1, rank, "optimizer", 3, 0, 0) for rank in range(4)]
    summary = record_failures(tmp_path, 1, [failure("exception", 1)], beats)
    assert summary["error"] == "exception of 1"
    assert [(other["rank"], other.get("error")) for other in summary["others"]] == [
        (0, "connection of 0"),
        (2, "died of 2"),
        (3, None),
    ]
    assert record_failures(tmp_path, 1, [failure("died", 1)], [])["error"] == "exception of 1", "the first word stays"
    assert read_exit(tmp_path)["reason"] == summary["summary"]
    assert record_failures(tmp_path, 2, [failure("died", 3)], [])["rank"] == 3, "another attempt"
    assert json.loads((tmp_path / "failures/attempt-00001/failure.json").read_text())["rank"] == 1


def test_secrets_do_not_reach_a_record(tmp_path: Path):
    error = "cannot open https://user:hunter2@host/data"
    record_failures(tmp_path, 1, [Failure(kind="exception", rank=0, phase="data", step=1, error=error)], [])
    assert not [path for path in tmp_path.rglob("*.json") if "hunter2" in path.read_text()]


def test_what_cannot_be_written_is_said_all_the_same(tmp_path: Path):
    (tmp_path / "failures").write_text("a file")
    assert record_failures(tmp_path, 1, [failure("died", 2)], [])["error"] == "died of 2"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:54170"),
            True,
        ),
        (dist.DistBackendError("NCCL error in: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo/transport"), False),
    ],
)
def test_lost_connections_are_told_from_faults(error: Exception, expected: bool):
    assert is_lost_connection(error) == expected


# Heartbeats


def test_deadlines_follow_what_a_phase_usually_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 0

    def clock() -> int:
        return now

    monkeypatch.setattr(time, "monotonic_ns", clock)
    heart = Heartbeat(tmp_path / "00003.beat", rank=3, hang_seconds=10, first_hang_seconds=100)

    def allowed() -> float:
        (beat,) = read_beats(tmp_path)
        return (beat.deadline_ns - beat.since_ns) / 1e9

    assert allowed() == 100
    for seconds, expected in [(1, 100), (1, 100), (1, 100), (1, 10), (7, 10), (1, 21)]:
        heart.enter("data", 5)
        assert allowed() == expected
        now += seconds * 10**9
        heart.enter("optimizer")
    (beat,) = read_beats(tmp_path)
    assert (beat.pid, beat.rank, beat.phase, beat.step) == (os.getpid(), 3, "optimizer", 5)
    assert heart.seconds_in("data") == 12
    heart.took("data", 50)  # beside other phases
    for expected in (21, 150):
        heart.enter("data")
        assert allowed() == expected
        heart.enter("optimizer")


def test_waiting_for_a_batch_belongs_to_its_step():
    heart, steps = Heartbeat(), []
    heart.step = 7
    for item in heart.during("data", "ab"):
        steps.append((item, heart.step, heart.phase))
        heart.enter("optimizer")
    assert steps == [("a", 8, "data"), ("b", 9, "data")]


def test_ranks_that_wait_for_a_node_that_has_failed_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.05)
    beats, run = tmp_path / "beats", tmp_path / "run"
    beats.mkdir()
    run.mkdir()
    write_exit(run, code=1, reason="a rank on another node", step=0, attempt=1)
    with subprocess.Popen(["sleep", "60"]) as waiting:
        slots = Heartbeat(beats / "00000.beat")._slots
        slots[0] = waiting.pid
        watch_node(Watch(str(beats), str(run), attempt=1, interval_seconds=0.05, kills=True))
        assert waiting.wait(10) == -9
    assert not (run / "failure.json").exists()


# A storm: all ranks of a large job fail at once


NUM_RANKS, RANKS_PER_NODE = 128, 8


def storm(directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let all ranks fail at the same time, then the watchdogs end; return how many records were read."""
    num_read, lock, read = 0, threading.Lock(), failures.read_json

    def counted(path: Path) -> dict[str, object]:
        nonlocal num_read
        with lock:
            num_read += path.name.startswith("rank-")
        return read(path)

    monkeypatch.setattr(failures, "read_json", counted)
    kinds = ["exception" if rank == 77 else "connection" for rank in range(NUM_RANKS)]
    with ThreadPoolExecutor(NUM_RANKS) as pool:
        list(pool.map(lambda rank: record_failures(directory, 1, [failure(kinds[rank], rank)], []), range(NUM_RANKS)))
    for node in range(NUM_RANKS // RANKS_PER_NODE):
        ranks = range(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE)
        watch = Watch(str(directory / "beats"), str(directory), attempt=1, interval_seconds=1.0, kills=True)
        watchdog._end(watch, [Beat(1, rank, "data", 3, 0, 0) for rank in ranks])
    monkeypatch.undo()
    return num_read


def test_a_storm_of_failing_ranks_reads_few_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert storm(tmp_path, monkeypatch) <= 8 * NUM_RANKS
    found = json.loads((tmp_path / "failure.json").read_text())
    assert (found["rank"], found["error"]) == (77, "exception of 77")
    assert [other["rank"] for other in found["others"]] == [rank for rank in range(NUM_RANKS) if rank != 77]
    assert read_exit(tmp_path)["reason"] == found["summary"]
    # Negative control: when everybody sums up, they read ranks² records or so.
    monkeypatch.setattr(failures, "_is_first_of_kind", lambda place, kind: True)
    (tmp_path / "all").mkdir()
    assert storm(tmp_path / "all", monkeypatch) > 40 * NUM_RANKS


def test_an_error_that_says_nothing_has_a_first_line():
    assert first_line(NoRestartError()) == "NoRestartError"
    assert first_line(NoRestartError("\nwhat\nmore")) == "what"
