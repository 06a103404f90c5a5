"""Waiting for data that somebody is fetching is no hang, however long; everything else still is one."""

import contextlib
import fcntl
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest

from bigtrain.data.read import loader
from bigtrain.data.read.stream import SampleStream
from bigtrain.supervise import watchdog
from bigtrain.supervise.heartbeat import Heartbeat
from bigtrain.supervise.watchdog import FETCHING_FILE, Watch, watch_node
from tests.distributed.launches import metrics, num_steps
from tests.faults.data_s3_test import URL, corpus, server, store  # noqa: F401  fixtures
from tests.faults.injection import RUN, train
from tests.faults.object_store import FaultyStore

LIMIT = 0.5
STILL_SECONDS = 8.0  # without a new step: the run waits for data
SETTINGS = ["data.source=prepared", f"data.path={URL}", "data.shuffle_window_shards=1", "model.vocab_size=257"]
SETTINGS += ["train.steps=150", "supervision.hang_seconds=3", "supervision.first_hang_seconds=30"]


@contextmanager
def watched(tmp_path: Path, *phases: str) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes that stand still, each in a phase that is over time in a moment, and a watchdog beside them."""
    beats, run, cache = (tmp_path / name for name in ("beats", "run", "cache"))
    for directory in (beats, run, cache):
        directory.mkdir(exist_ok=True)
    processes = [subprocess.Popen(["sleep", "60"]) for _ in phases]
    for rank, (process, phase) in enumerate(zip(processes, phases, strict=True)):
        beat = Heartbeat(beats / f"{rank:05d}.beat", rank=rank, hang_seconds=LIMIT, first_hang_seconds=LIMIT)
        beat._slots[0] = process.pid
        beat.enter(phase, 3)
    watch = Watch(str(beats), str(run), 1, interval_seconds=0.02, kills=True, cache=str(cache), fetch_seconds=10.0)

    def watch_them() -> None:
        with contextlib.suppress(SystemExit):
            watch_node(watch)

    thread = threading.Thread(target=watch_them, daemon=True)
    thread.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
        thread.join(20)


def fetched(tmp_path: Path) -> TextIO:
    """Return a file of the cache that somebody is at as long as it is open."""
    path = tmp_path / "cache" / "shard.100.partial"
    path.parent.mkdir(exist_ok=True)
    file = open(path, "w")  # noqa: SIM115  the caller closes it
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def environ() -> dict[str, str]:
    """What tells the ranks where the store is."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def live_on(processes: list["subprocess.Popen[bytes]"], seconds: float) -> bool:
    time.sleep(seconds)
    return all(process.poll() is None for process in processes)


def end(processes: list["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        assert process.wait(10) < 0


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "FRESH_SECONDS", 1.0)


@pytest.mark.parametrize(
    ("phase", "later"), [("starting", "data"), ("data", "forward_backward"), ("validation", "checkpoint")]
)
def test_ranks_that_wait_for_a_file_and_those_that_wait_for_them_are_left_alone(tmp_path: Path, phase: str, later: str):
    with fetched(tmp_path) as file, watched(tmp_path, phase, later) as ranks:
        assert live_on(ranks, 4 * LIMIT)
        file.close()
        end(ranks)
    found = json.loads((tmp_path / "run/failure.json").read_text())
    assert (found["kind"], found["rank"], found["phase"]) == ("hang", 0, phase)
    assert (tmp_path / "run" / FETCHING_FILE).exists()


@pytest.mark.parametrize("phase", ["profile", "logging"])
def test_a_profile_has_a_limit_of_its_own_and_others_wait_for_it(tmp_path: Path, phase: str):
    with watched(tmp_path, "data", "forward_backward") as ranks:
        exporting = Heartbeat(tmp_path / "beats/00000.beat", hang_seconds=LIMIT, first_hang_seconds=20 * LIMIT)
        exporting._slots[0] = ranks[0].pid
        for _ in range(4 if phase == "logging" else 1):  # by now it has the limit of a phase that is known
            exporting.enter("data", 2)
            exporting.enter(phase)
        if phase == "profile":
            assert live_on(ranks, 4 * LIMIT)
            exporting.enter("data", 3)
        end(ranks)


def test_a_rank_that_computes_may_not_hang_while_files_are_fetched(tmp_path: Path):
    with fetched(tmp_path), watched(tmp_path, "optimizer", "forward_backward") as ranks:
        end(ranks)


def test_a_file_that_nobody_is_at_or_of_which_nothing_comes_is_not_waited_for(tmp_path: Path):
    fetched(tmp_path).close()
    with watched(tmp_path, "data") as ranks:
        end(ranks)
    with fetched(tmp_path) as file:
        os.utime(file.name, (time.time() - 11,) * 2)
        with watched(tmp_path, "data") as ranks:
            end(ranks)


def test_ranks_of_other_nodes_are_left_alone_as_long_as_they_hear_of_it(tmp_path: Path):
    (word := tmp_path / "run" / FETCHING_FILE).parent.mkdir()
    word.touch()
    with watched(tmp_path, "forward_backward") as ranks:
        for _ in range(20):
            word.touch()
            assert live_on(ranks, 0.1)
        end(ranks)


def load_step_by_step() -> None:
    loader._STEPS_AT_ONCE = 1


def test_a_run_waits_for_a_slow_store(
    store: FaultyStore,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def slow_down(_processes: list[object]) -> None:
        deadline = time.monotonic() + 90
        while num_steps(tmp_path / RUN) < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        store.faults += [(r"train-.*\.bin", "500"), (r"train-.*\.bin", "hang")]
        steps, since = 0, time.monotonic()
        while time.monotonic() < min(since + STILL_SECONDS, deadline):  # on a busy machine the loader is far ahead
            if steps != num_steps(tmp_path / RUN):
                steps, since = num_steps(tmp_path / RUN), time.monotonic()
            time.sleep(0.1)
        store.released.set()

    monkeypatch.setattr(store, "hang_seconds", 90.0)
    ended = train(tmp_path, *SETTINGS, environ=environ(), prepare=load_step_by_step, meanwhile=slow_down)
    assert ended.codes == [0, 0], ended
    assert not store.faults
    assert max(record["data_wait_seconds"] for record in metrics(tmp_path / RUN)[10:]) > 3, "longer than a hang"


def hang_the_loader() -> None:
    gather, calls = SampleStream.gather, []

    def hang(self: SampleStream, *args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            time.sleep(1000)
        return gather(self, *args)

    SampleStream.gather = hang


def test_a_loader_that_hangs_is_found(store: FaultyStore, tmp_path: Path):  # noqa: F811
    ended = train(tmp_path, *SETTINGS, environ=environ(), prepare=hang_the_loader)
    assert ended.codes == [-9, -9], ended
    found = json.loads((tmp_path / RUN / "failure.json").read_text())
    assert (found["kind"], found["phase"]) == ("hang", "data")
    assert "data_wait_test.py" in found["detail"], "the stacks show where"
