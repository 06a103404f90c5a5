"""The watchdog of a node: a process beside the ranks, standard library only, that reads heartbeats and process states.

A thread inside a rank would hang with it. A rank that dies is recorded. When one stays in a phase beyond its deadline,
the stacks of all ranks of the node are recorded and the ranks killed, so that the launcher restarts from the newest
checkpoint.
"""

import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bigtrain.files import is_locked
from bigtrain.processes import start_beside
from bigtrain.supervise.attempt import has_decided, has_failed
from bigtrain.supervise.failures import Failure, describe, record_failures, sum_up
from bigtrain.supervise.heartbeat import PHASES, Beat, read_beats

STACK_SIGNAL = signal.SIGUSR2  # answered by faulthandler with the stacks, without the interpreter
STACKS_SECONDS = 2.0
LOOK_SECONDS = 5.0
PATIENT_LOOKS = 3  # looks that find the run failed on another node before the waiting ranks of this one are killed
FED_PHASES = ("starting", "data", "validation")  # in which a rank may wait for a file that is fetched or tokenised
FETCHING_FILE = ".fetching"  # touched in the run's directory while a rank waits for such a file, or exports a profile
FRESH_SECONDS = 30.0  # for how long that counts; the clocks of the nodes may differ by as much
SAVE_SECONDS = 3.0  # for a hung rank to save its profile
_STOPPED, _DEAD = "Tt", "ZX"


@dataclass(frozen=True, slots=True)
class Watch:
    beats: str  # directory of the heartbeats of this node
    run: str  # directory of the run
    attempt: int
    interval_seconds: float
    kills: bool  # kill hung ranks; deaths are recorded in any case
    cache: str = ""  # directory where files are fetched and tokenised for the ranks of this node
    fetch_seconds: float = 0.0  # a file that has not grown for so long is not waited for


def start_watchdog(watch: Watch) -> "subprocess.Popen[bytes]":
    """Start the watchdog of this node, which ends with its ranks."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return start_beside(
        [sys.executable, "-m", __name__, json.dumps(asdict(watch))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


def stacks_path(beats: Path, rank: int) -> Path:
    """Return where a rank writes its stacks."""
    return beats / f"{rank:05d}.stacks"


def question_path(beats: Path, rank: int) -> Path:
    """Return the pipe by which a rank is asked to save its profile; it removes the pipe afterwards."""
    return beats / f"{rank:05d}.question"


def watch_node(watch: Watch) -> None:
    """Watch until all ranks of this node have ended."""
    place, reported = Path(watch.beats), set[int]()
    resumed_ns = next_look_ns = num_looks = 0
    deaths, num_oom_kills = Deaths(), _num_oom_kills()
    while True:
        deaths.wait(watch.interval_seconds)
        beats = read_beats(place)
        deaths.expect([beat.pid for beat in beats])
        state = {beat.rank: _process_state(beat.pid) for beat in beats}
        living = [beat for beat in beats if state[beat.rank] not in _DEAD]
        dead = [b for b in beats if b not in living and b.phase != "ending" and b.rank not in reported]
        reported.update(beat.rank for beat in dead)
        if dead and not has_decided(Path(watch.run), watch.attempt):
            oom = _num_oom_kills() != num_oom_kills
            found = {beat: _death(_read(stacks_path(place, beat.rank)), oom=oom) for beat in dead}
            _report(watch, "died", found, beats)
        if not living:
            break
        now_ns = time.monotonic_ns()
        if all(state[beat.rank] in _STOPPED for beat in living):
            resumed_ns = now_ns  # the whole job is suspended, which is no hang
        suspect = next((b for b in living if state[b.rank] in _STOPPED), min(living, key=_progress))
        is_stopped = state[suspect.rank] in _STOPPED
        if not is_stopped and _is_waited_for(watch, suspect, now_ns):
            resumed_ns = now_ns  # nor do ranks hang that wait for this one
        late = [b for b in living if now_ns - max(b.since_ns, resumed_ns) > b.deadline_ns - b.since_ns]
        if late and _is_fresh(Path(watch.run, FETCHING_FILE), FRESH_SECONDS):
            resumed_ns = now_ns
        elif late and watch.kills:
            _end_hung(watch, suspect, living, stopped=is_stopped)
        if now_ns > next_look_ns and watch.kills:
            next_look_ns = now_ns + int(LOOK_SECONDS * 1e9)
            num_looks = num_looks + 1 if has_failed(Path(watch.run), watch.attempt) else 0
            if num_looks > PATIENT_LOOKS:  # a failure on another node, of which the launcher did not tell this one
                reported.update(beat.rank for beat in living)
                for beat in living:
                    _send(beat.pid, signal.SIGKILL)
    _end(watch, beats)


class Deaths:
    """Waits for the end of processes: the first death is seen before the launcher has killed the others."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}

    def expect(self, pids: list[int]) -> None:
        """Wait for these too, where the system has pidfds."""
        for pid in pids:
            if pid not in self._files and hasattr(os, "pidfd_open"):
                with contextlib.suppress(OSError):
                    self._files[pid] = os.pidfd_open(pid)

    def wait(self, seconds: float) -> None:
        """Wait until one more has ended, at most so long."""
        ready, _, _ = select.select([file for file in self._files.values() if file >= 0], [], [], seconds)
        for pid, file in self._files.items():
            if file in ready:
                os.close(file)
                self._files[pid] = -1


def _is_waited_for(watch: Watch, suspect: Beat, now_ns: int) -> bool:
    """Return whether a rank may take its time for data or a profile; tell the watchdogs of other nodes."""
    has_time = suspect.phase == "profile" and now_ns < suspect.deadline_ns
    if watch.cache and suspect.phase in FED_PHASES:
        with contextlib.suppress(OSError):  # files of other users, and file servers that do not answer
            files = Path(watch.cache).glob("*.partial")
            has_time = any(_is_fresh(path, watch.fetch_seconds) and is_locked(path) for path in files)
    if has_time and now_ns - suspect.since_ns > 1e9:
        with contextlib.suppress(OSError):
            Path(watch.run, FETCHING_FILE).touch()
    return has_time


def _is_fresh(path: Path, seconds: float) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime < seconds
    return False


def _progress(beat: Beat) -> tuple[int, int, int]:
    """Order ranks by progress: those that wait for another one are further."""
    return beat.step, PHASES.index(beat.phase), beat.since_ns


def _death(stacks: str, *, oom: bool) -> tuple[str, str]:
    """Return why a process ended without a word, and its stacks."""
    why = "killed (by the out-of-memory killer?)" if oom else "killed (by kill -9?)"
    why = "crashed in native code" if "Fatal Python error" in stacks else why
    return f"the process ended without a word: {why}", stacks


def _num_oom_kills() -> float:
    """Return the number of processes killed by the out-of-memory killer since boot; NaN if unknown."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return float(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return math.nan  # which differs from itself


def _end_hung(watch: Watch, suspect: Beat, living: list[Beat], *, stopped: bool) -> None:
    place, now_ns = Path(watch.beats), time.monotonic_ns()
    seconds, limit = (now_ns - suspect.since_ns) / 1e9, (suspect.deadline_ns - suspect.since_ns) / 1e9
    awake = [beat for beat in living if _process_state(beat.pid) not in _STOPPED]
    questions = [path for beat in awake if _ask(path := question_path(place, beat.rank))]
    deadline = time.monotonic() + SAVE_SECONDS
    while any(path.exists() for path in questions) and time.monotonic() < deadline:
        time.sleep(0.05)
    for beat in living:
        _send(beat.pid, STACK_SIGNAL)
        _send(beat.pid, signal.SIGCONT)  # a stopped process shows nothing
    paths, sizes = [stacks_path(place, beat.rank) for beat in living], [-1]
    before: list[int] = []
    deadline = time.monotonic() + STACKS_SECONDS
    while not (sizes == before and all(sizes)) and time.monotonic() < deadline:  # until the files have stopped growing
        time.sleep(0.1)
        before, sizes = sizes, [path.stat().st_size for path in paths if path.exists()]
    how = "stopped (SIGSTOP)" if stopped else "hung"
    ended = "all ranks of the node are ended" if len(living) > 1 else "the process is ended"
    error = f"{how}: in this phase for {seconds:.0f} s, the limit is {limit:.0f} s (supervision.hang_seconds); {ended}"
    stacks = "\n".join(f"rank {beat.rank}:\n{_read(stacks_path(place, beat.rank))}" for beat in living)
    for beat in living:
        _send(beat.pid, signal.SIGKILL)
    _report(watch, "hang", {suspect: (error, stacks)}, living)
    while any(_process_state(beat.pid) not in _DEAD for beat in living):
        time.sleep(0.05)
    _end(watch, living)
    sys.exit(0)


def _end(watch: Watch, beats: list[Beat]) -> None:
    """Summarise the records of ranks, on the node of rank 0, and remove the heartbeats."""
    run = Path(watch.run)
    if any(beat.rank == 0 for beat in beats) and not has_decided(run, watch.attempt):
        sum_up(run, watch.attempt, beats)
    shutil.rmtree(watch.beats, ignore_errors=True)


def _report(watch: Watch, kind: str, found: dict[Beat, tuple[str, str]], beats: list[Beat]) -> None:
    """Record ranks that have failed, with error and stacks, and say so."""
    failures = [
        Failure(kind=kind, rank=beat.rank, phase=beat.phase, step=beat.step, error=error, detail=stacks)
        for beat, (error, stacks) in found.items()
    ]
    summary = record_failures(Path(watch.run), watch.attempt, failures, beats)
    with contextlib.suppress(OSError):
        print(describe(watch.run, summary), file=sys.stderr, flush=True)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""


def _ask(question: Path) -> bool:
    """Wake the thread of a rank that waits for the question; return whether it has one."""
    with contextlib.suppress(OSError):
        os.close(os.open(question, os.O_WRONLY | os.O_NONBLOCK))
        return True
    return False


def _process_state(pid: int) -> str:
    """Return the state letter of a process in ``/proc``; ``X`` if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        pass
    if Path("/proc").is_dir():
        return "X"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "X"
    return "R"


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


if __name__ == "__main__":
    watch_node(Watch(**json.loads(sys.argv[1])))
