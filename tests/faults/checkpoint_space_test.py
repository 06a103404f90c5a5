"""No room for a checkpoint: said with the reason, nothing half-written stays, the older ones do, training goes on."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bigtrain.checkpoint import saver
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import checkpoint_path, checkpoints_directory, find_checkpoints
from bigtrain.config import CheckpointConfig
from bigtrain.errors import CheckpointError
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import SMALL, TRAIN, Result, events, fork, launch, num_steps
from tests.faults import saves

SCALE = 40
CHECKPOINT_BYTES = 4 * sum(
    entry.boxes[0].view.numel() for entry in saves.make_state(0, whole=True, scale=SCALE).values()
)
Mount = Callable[[Path, float], None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """A function that makes a directory a file system of so many bytes, or changes its size."""
    mounted = []

    def mount_tmpfs(path: Path, num_bytes: float) -> None:
        path.mkdir(parents=True, exist_ok=True)
        options = f"size={int(num_bytes)}" + (",remount" if path in mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no mount: {error}")
        if done.returncode:
            pytest.skip(f"mounting is not allowed: {done.stderr.strip()}")
        mounted.append(path)

    yield mount_tmpfs
    for path in set(mounted):
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def assert_older_stay(directory: Path) -> None:
    assert [saves.whole_step(path, scale=SCALE) for path in find_checkpoints(directory)] == [1, 2]
    assert saves.names(directory) == ["step-00000001", "step-00000002"], "leftovers"


def save_on_a_full_disk(directory: Path, asynchronous: bool) -> list[Any]:
    """Save 1 and 2, which fit, 3, which does not, and 4 after somebody has made room."""
    saves.join()
    options = {"scale": SCALE, "asynchronous": asynchronous, "keep": "all"}
    reports = saves.save(directory, 1, 2, 3, **options)
    assert_older_stay(directory)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoint_path(directory, 1))
    dist.barrier()
    return [report.error for report in [*reports, *saves.save(directory, 4, **options)]]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_full_disk_costs_one_checkpoint(asynchronous: bool, mount: Mount, tmp_path: Path):
    mount(checkpoints_directory(tmp_path), 2.6 * CHECKPOINT_BYTES)
    for errors in run_ranks(save_on_a_full_disk, 2, tmp_path, asynchronous):
        assert [errors[i] for i in (0, 1, 3)] == [None, None, None]
        assert "No space left on device" in errors[2]
        assert "rank " in errors[2]
    assert saves.whole_step(checkpoint_path(tmp_path, 4), scale=SCALE) == 4


def save_with_limit_on_one_rank(directory: Path, asynchronous: bool) -> list[Any]:
    """The same where nothing may be mounted: rank 1 may not write files as large as its own."""
    saves.join()
    options = {"scale": SCALE, "asynchronous": asynchronous, "keep": "all"}
    errors = [report.error for report in saves.save(directory, 1, 2, **options)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHECKPOINT_BYTES // 4, limits[1]))
    errors += [report.error for report in saves.save(directory, 3, **options)]
    assert_older_stay(directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return [*errors, *(report.error for report in saves.save(directory, 4, **options))]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_rank_that_cannot_write_is_named(asynchronous: bool, tmp_path: Path):
    for errors in run_ranks(save_with_limit_on_one_rank, 2, tmp_path, asynchronous):
        assert [errors[i] for i in (0, 1, 3)] == [None, None, None]
        assert errors[2] == "rank 1: OSError: [Errno 27] File too large"
    assert saves.whole_step(checkpoint_path(tmp_path, 4), scale=SCALE) == 4


def count_failures(directory: Path) -> list[int]:
    """Save alternately without and with a limit; return the number of failures in a row after each save."""
    saves.join()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    entries = saves.make_state(0, scale=SCALE)
    one = Saver(directory, entries, CheckpointConfig(asynchronous=True))
    counts = []
    for step, limited in enumerate([False, True, True, False, True], start=1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (CHECKPOINT_BYTES // 4 if limited else limits[0], limits[1]))
        one.save(saves.make_run_state(step))
        one.wait_until_staged()
        report = one.finish()
        assert (report.error is not None) == limited
        counts.append(one.num_failures)
    return counts


def test_failures_in_a_row_are_counted_alike_on_all_ranks(tmp_path: Path):
    assert run_ranks(count_failures, 2, tmp_path) == [[0, 1, 2, 0, 1]] * 2


def save_to_own_disks(directory: Path) -> str | None:
    saves.join()
    (report,) = saves.save(directory / str(dist.get_rank()), 1)
    return report.error


def test_a_rank_that_writes_to_a_disk_of_its_own_is_noticed(tmp_path: Path):
    for error in run_ranks(save_to_own_disks, 2, tmp_path):
        assert "rank-00001.safetensors" in error
        assert "all nodes must share the file system of run.root" in error
    assert saves.names(tmp_path / "0") == []


# Before the first step


def open_saver(directory: Path, num_existing: int, free_checkpoints: float) -> str | None:
    """Return what a new saver says of a disk with so much room."""
    saves.join()
    saves.save(directory, *range(1, num_existing + 1), scale=SCALE, keep="all")
    leftover = checkpoints_directory(directory) / "step-00000009.tmp-killed"
    leftover.mkdir()
    usage = shutil.disk_usage(directory)
    saver.shutil.disk_usage = lambda _: usage._replace(free=int(free_checkpoints * CHECKPOINT_BYTES))
    try:
        Saver(directory, saves.make_state(0, scale=SCALE), CheckpointConfig())
    except CheckpointError as error:
        return str(error)
    finally:
        assert not leftover.exists(), "what a killed save left may be what fills the disk"
    return None


@pytest.mark.parametrize(
    ("num_existing", "free_checkpoints", "message"),
    [
        (0, 2.0, None),
        (0, 1.9, "MiB are free, but two checkpoints need"),
        (1, 1.0, None),
        (1, 0.9, "one more checkpoint needs"),
        (2, 1.0, None),  # or the run that just fitted could not be continued
        (3, 0.9, "one more checkpoint needs"),
    ],
)
def test_room_is_checked_before_the_first_step(
    num_existing: int, free_checkpoints: float, message: str | None, tmp_path: Path
):
    said = run_ranks(open_saver, 1, tmp_path, num_existing, free_checkpoints)[0]
    assert (said is None) == (message is None)
    assert (message or "") in (said or "")


# As a user sees it

RUN = Path("runs/gpt_nano")


def assert_stopped_for_lack_of_room(result: Result, run: Path, reason: str) -> None:
    assert result.code == 2
    assert "Traceback" not in result.err
    assert "failures in a row" in result.err
    assert reason in (run / "failure.json").read_text()
    assert reason in (run / "exit.json").read_text()
    assert reason in result.out + result.err
    failed = events(run, "checkpoint_failed")
    assert len(failed) >= 2
    assert all(reason in event["error"] for event in failed)
    assert num_steps(run) > failed[0]["step"], "training went on"


def test_a_run_on_a_full_disk_stops_with_the_reason_and_continues_when_there_is_room(mount: Mount, tmp_path: Path):
    settings = [*SMALL, "checkpoint.every_steps=1", "checkpoint.max_failures=2", "train.steps=40"]
    assert fork("train.py", *settings, "run.name=size", "run.stop_after_steps=1", cwd=tmp_path).code == 75
    (path,) = find_checkpoints(tmp_path / "runs/size")
    num_bytes = sum((file.stat().st_size + 4095) // 4096 * 4096 for file in path.iterdir())

    room = checkpoints_directory(tmp_path / RUN)
    mount(room, 1.5 * num_bytes)
    refused = fork("train.py", *settings, cwd=tmp_path)
    assert refused.code == 2
    assert "two checkpoints need" in refused.err
    assert "Traceback" not in refused.err
    assert not find_checkpoints(tmp_path / RUN)

    mount(room, 2.5 * num_bytes)
    result = fork("train.py", *settings, cwd=tmp_path)
    assert_stopped_for_lack_of_room(result, tmp_path / RUN, "rank 0: OSError: [Errno 28] No space left on device")
    assert saves.names(tmp_path / RUN) == ["step-00000001", "step-00000002"]
    assert "continues from runs/gpt_nano/checkpoints/step-00000002" in result.err

    mount(room, 4 * num_bytes)
    result = fork("train.py", *settings, "run.stop_after_steps=4", cwd=tmp_path)
    assert result.code == 75
    assert [event["step"] for event in events(tmp_path / RUN, "resume")] == [2]
    assert saves.names(tmp_path / RUN) == ["step-00000005", "step-00000006"]


def test_a_run_that_may_not_write_large_files_stops_with_the_reason(tmp_path: Path):
    settings = [*SMALL, "checkpoint.every_steps=1", "checkpoint.max_failures=2", "train.steps=40"]
    command = f"ulimit -f 60 && exec {sys.executable} {TRAIN} {' '.join(settings)} checkpoint.asynchronous=false"
    result = launch(["bash", "-c", command], tmp_path)
    assert_stopped_for_lack_of_room(result, tmp_path / RUN, "rank 0: OSError: [Errno 27] File too large")
    assert "continues from the beginning" in result.err
    assert saves.names(tmp_path / RUN) == []
    assert len(events(tmp_path / RUN, "checkpoint_failed")) == 3, "the third one is the last attempt"
