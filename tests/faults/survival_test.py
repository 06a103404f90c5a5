"""A run that is killed, stopped, hung or broken goes on to the same weights, and says what happened first."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.store import find_checkpoints
from bigtrain.files import read_json
from bigtrain.supervise import lease, stragglers, watchdog
from bigtrain.supervise.attempt import ROOM_FILE, claim_run
from bigtrain.supervise.failures import Failure, record_failures
from tests.distributed.launches import events, metrics, num_steps, trajectory
from tests.faults.injection import RUN, Fault, state_hashes, train
from tests.tensorboard_files import read_scalars

SETTINGS = ["model.dropout=0.1", "train.steps=12", "checkpoint.every_steps=2", "validation.every_steps=4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without any fault."""
    cwd = tmp_path_factory.mktemp("whole")
    assert train(cwd, *SETTINGS).codes == [0, 0]
    return cwd / RUN


def assert_same(run: Path, whole: Path) -> None:
    """Check that a run has the losses, weights and optimizer state of the one without a fault, bit by bit."""
    assert trajectory(run) == trajectory(whole)
    assert state_hashes(run) == state_hashes(whole)


def failure(run: Path) -> dict:
    return json.loads((run / "failure.json").read_text())


def exit_record(run: Path) -> dict:
    return json.loads((run / "exit.json").read_text())


def test_killed_in_every_phase_the_run_goes_on_to_the_same_weights(whole: Path, tmp_path: Path):
    kills = [
        Fault("die_slowly", 1, 0, "starting"),
        Fault("kill", 0, 2, "data"),
        Fault("kill", 1, 4, "forward_backward"),
        Fault("kill", 0, 4, "validation"),
        Fault("kill", 1, 6, "optimizer"),
        Fault("kill", 0, 8, "checkpoint"),
        Fault("kill", 1, 10, "logging"),
    ]
    run = tmp_path / RUN
    for number, fault in enumerate(kills, start=1):
        ended = train(tmp_path, *SETTINGS, faults=[fault])
        assert ended.codes[fault.rank] == -9
        assert ended.codes[1 - fault.rank] not in (0, 75)
        found = failure(run)
        assert found["summary"].startswith(f"rank {fault.rank} on "), ended
        assert (found["kind"], found["phase"], found["step"]) == ("died", fault.phase, fault.step)
        assert (found["attempt"], exit_record(run)["attempt"], exit_record(run)["code"]) == (number, number, 1)
        assert [other["rank"] for other in found["others"]] == [1 - fault.rank]
    assert train(tmp_path, *SETTINGS).codes == [0, 0]
    assert_same(run, whole)
    assert exit_record(run)["code"] == 0
    assert sorted(path.name for path in (run / "failures").iterdir()) == [f"attempt-{n:05d}" for n in range(1, 8)]
    begun = [*events(run, "start"), *events(run, "resume")]
    assert [event["attempt"] for event in begun] == list(range(2, 9)), "the first one was killed before it began"
    assert all("the process ended without a word" in event["after"] for event in events(run, "resume"))
    assert len(find_checkpoints(run)) == 2


# Hangs

WATCHFUL = ["supervision.hang_seconds=1.5", "supervision.first_hang_seconds=20"]


@pytest.mark.parametrize(("kind", "word"), [("stop", "stopped (SIGSTOP)"), ("gil", "hung")])
def test_a_rank_that_stands_still_is_found_and_all_are_ended(kind: str, word: str, whole: Path, tmp_path: Path):
    ended = train(tmp_path, *SETTINGS, *WATCHFUL, faults=[Fault(kind, 1, 7, "data")])
    assert ended.codes == [-9, -9]
    found = failure(tmp_path / RUN)
    assert (found["kind"], found["rank"], found["phase"], found["step"]) == ("hang", 1, "data", 7)
    assert word in found["summary"]
    assert found["others"][0]["rank"] == 0
    for place in ("rank 0:", "rank 1:", "injection.py", "trainer.py"):
        assert place in found["detail"], "the stacks of all ranks"
    collectives = json.loads((tmp_path / RUN / "profile/hang-step-7-rank-0.gloo.json").read_text())["entries"]
    waiting = {entry["profiling_name"] for entry in collectives if not entry["retired"]}
    # The vote on stopping, which is looked at only in the next step, may wait too.
    assert {"gloo:all_gather"} <= waiting <= {"gloo:all_gather", "gloo:all_reduce"}, "rank 0 gathers the next weights"
    assert f"First cause: rank 1 on {found['host']}, in data of step 7" in ended.said[0]
    assert train(tmp_path, *SETTINGS).codes == [0, 0]
    assert_same(tmp_path / RUN, whole)


def test_a_job_that_is_suspended_as_a_whole_is_left_alone(tmp_path: Path):
    def suspend(processes: list[Any]) -> None:
        wait_for(lambda: num_steps(tmp_path / RUN) >= 5)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process.pid, number)
            time.sleep(2.5)

    slow = [Fault("slow", 0, step, "data") for step in range(6, 13)]
    assert train(tmp_path, *SETTINGS, *WATCHFUL, faults=slow, meanwhile=suspend).codes == [0, 0]
    assert not (tmp_path / RUN / "failure.json").exists()


def wait_for(condition: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Slow ranks


def compare_at_every_step() -> None:
    stragglers.CHECK_SECONDS = 0.0


def test_a_rank_that_keeps_the_others_waiting_is_named(tmp_path: Path):
    slow = [Fault("slow", 1, step, "data") for step in range(1, 9)]
    ended = train(tmp_path, "supervision.straggler_factor=3", faults=slow, prepare=compare_at_every_step)
    assert ended.codes == [0, 0]
    # A busy machine may slow down the processor of a rank too.
    found = [event for event in events(tmp_path / RUN, "straggler") if event["why"].startswith("waits")]
    assert {event["rank"] for event in found} == {1}
    assert f"rank 1 keeps the others waiting: it {found[0]['why']}" in ended.said[0]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([(1, 0, 1), (1, 0, 1), (1.4, 0, 1)], []),
        ([(1, 0, 1), (1, 0, 1), (1.6, 0, 1)], [(2, "computes 1.6 times slower than the median rank")]),
        ([(1, 0.1, 1), (1, 0.2, 1), (1, 0.3, 1)], []),
        ([(1, 0.0, 1), (1, 0.5, 1), (1, 0.0, 1)], [(1, "waits 0.5 s per step for data, the median rank 0 s")]),
    ],
)
def test_slow_is_measured_against_the_median(ranks: list[tuple[float, ...]], expected: list[tuple[int, str]]):
    assert [(slow.rank, slow.why) for slow in stragglers.slow_ranks(ranks, 1.5)] == expected


# First cause


def test_the_rank_that_raised_is_the_first_cause(tmp_path: Path):
    ended = train(tmp_path, *SETTINGS, faults=[Fault("raise", 1, 5, "optimizer")])
    assert ended.codes == [1, 1]
    found = failure(tmp_path / RUN)
    assert (found["kind"], found["rank"], found["phase"], found["step"]) == ("exception", 1, "optimizer", 5)
    assert found["error"] == "ZeroDivisionError: a fault of this rank only"
    assert "in before_update" in found["detail"]
    (other,) = found["others"]
    assert (other["rank"], other["kind"]) == (0, "connection")
    assert exit_record(tmp_path / RUN)["reason"] == found["summary"]
    assert "First cause: rank 1" in ended.said[1]
    assert "Traceback" in ended.said[1]
    assert "the first cause is in runs/gpt_nano/failure.json" in ended.said[0]
    assert "Traceback" not in ended.said[0], "it would hide the first cause"


def test_a_crash_in_native_code_leaves_its_stack(tmp_path: Path):
    ended = train(tmp_path, *SETTINGS, faults=[Fault("segfault", 0, 3, "forward_backward")])
    assert ended.codes[0] == -signal.SIGSEGV
    found = failure(tmp_path / RUN)
    assert (found["kind"], found["rank"]) == ("died", 0)
    assert "crashed in native code" in found["error"]
    assert "Fatal Python error: Segmentation fault" in found["detail"]


@pytest.mark.parametrize(("step", "phase"), [(0, "starting"), (4, "validation")])
def test_a_rank_that_runs_out_of_memory_ends_all_with_the_advice(step: int, phase: str, tmp_path: Path):
    ended = train(tmp_path, *SETTINGS, faults=[Fault("memory", 1, step, phase)])
    assert ended.codes == [1, 2]
    found = failure(tmp_path / RUN)
    assert (found["kind"], found["rank"], found["phase"], found["step"]) == ("exception", 1, phase, step)
    assert "memory has run out" in found["summary"]
    assert (exit_record(tmp_path / RUN)["code"], exit_record(tmp_path / RUN)["reason"]) == (2, found["summary"])
    message = ended.said[1].partition("[rank 1] memory has run out")[2]
    assert message.splitlines()[-1].removeprefix("[rank 1] ") in found["detail"], "with what to change"
    assert "Traceback" not in ended.said[0] + ended.said[1]


# Bad numbers


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs under ddp: ``good``, and ``bad`` whose fourth step has an infinite loss on rank 0."""
    cwd = tmp_path_factory.mktemp("left_out")
    assert train(cwd, "engine=ddp", "run.name=good").codes == [0, 0]
    assert train(cwd, "engine=ddp", "run.name=bad", faults=[Fault("inf", 0, 4, "data")]).codes == [0, 0]
    return cwd / "runs"


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_a_bad_loss_on_one_rank_leaves_the_step_out_on_all(engine: str, left_out: Path, tmp_path: Path):
    ended = train(tmp_path, f"engine={engine}", faults=[Fault("nan", 1, 4, "data")])
    assert ended.codes == [0, 0], ended
    run = tmp_path / RUN
    assert [event["step"] for event in events(run, "bad_step")] == [4]
    assert "not finite" in events(run, "bad_step")[0]["why"]
    losses, expected = ([loss for _, loss, _, _ in trajectory(path)] for path in (run, left_out / "bad"))
    assert losses[3] is expected[3] is None
    assert losses[:3] + losses[4:] == pytest.approx(expected[:3] + expected[4:], rel=1e-6)
    if engine == "ddp":
        assert state_hashes(run) == state_hashes(left_out / "bad"), "whichever rank it was and whatever was bad"


def test_a_good_step_does_change_the_weights(left_out: Path):
    assert state_hashes(left_out / "good") != state_hashes(left_out / "bad")


ROLL_BACK = ["train.steps=12", "checkpoint.every_steps=2", "bad_numbers.max_bad_steps=1", "train.log_every_steps=2"]
BAD = [Fault("nan", 1, 6, "data"), Fault("nan", 0, 7, "data")]


def skip_from_the_beginning(first: int, end: int) -> None:
    """Let the run leave out these samples from its first step on."""
    from bigtrain.run import launching

    open_data = launching.open_data

    def open_without(*args: Any) -> Any:
        streams = open_data(*args)
        streams["train"].leave_out(first, end)
        return streams

    launching.open_data = open_without


def test_too_many_bad_steps_go_back_and_leave_out_their_samples(tmp_path: Path):
    ended = train(tmp_path, *ROLL_BACK, faults=BAD, prepare=partial(once, "nan"))
    assert ended.codes == [0, 0], ended
    run = tmp_path / RUN
    assert [event["step"] for event in events(run, "bad_step")] == [6, 7]
    (back,) = events(run, "resume")
    assert back["step"] == 4, "the newest checkpoint before the first bad step"
    assert "16 samples are left out" in ended.said[0]
    assert [step for step, *_ in trajectory(run)] == list(range(1, 13))
    skip = partial(skip_from_the_beginning, 40, 56)
    assert train(tmp_path, *ROLL_BACK, "run.name=skipped", prepare=skip).codes == [0, 0]
    assert_same(run, tmp_path / "runs/skipped")
    # What is left out belongs to the state: a resume does the same.
    shutil.rmtree(find_checkpoints(run)[-1])
    assert train(tmp_path, *ROLL_BACK).codes == [0, 0]
    assert_same(run, tmp_path / "runs/skipped")


def once(kind: str) -> None:
    """Let each rank have one fault of this kind, though its step comes again after going back."""
    from tests.faults import injection

    spoil, done = injection.ACTIONS[kind], set()

    def spoil_once() -> None:
        if len(done) < 1:
            done.add(1)
            spoil()

    injection.ACTIONS[kind] = spoil_once


def test_a_spike_goes_back_and_leaves_out_its_samples(tmp_path: Path):
    spikes = ["bad_numbers.spike_zscore=6", "bad_numbers.spike_window_steps=8", "bad_numbers.max_bad_steps=0"]
    settings = ["engine=ddp", "train.steps=12", "checkpoint.every_steps=2", *spikes]
    ended = train(
        tmp_path,
        *settings,
        "logging.tensorboard=true",
        faults=[Fault("spike", 1, 9, "data")],
        prepare=partial(once, "spike"),
    )
    assert ended.codes == [0, 0], ended
    run = tmp_path / RUN
    (bad,) = events(run, "bad_step")
    assert bad["step"] == 9
    assert bad["why"].startswith("spike: loss ")
    (back,) = events(run, "rollback")
    assert (back["first_bad_step"], back["last_bad_step"]) == (9, 9)
    assert back["checkpoint"].endswith("step-00000008")
    assert [event["step"] for event in events(run, "resume")] == [8]
    # The step that is given up, of which two dashboards in a row were told, is on none of them.
    shown = {record["step"]: pytest.approx(record["loss"]) for record in metrics(run)}
    wait_for(lambda: dict(read_scalars(run).get("train/loss", [])) == shown)
    skip = partial(skip_from_the_beginning, 64, 72)
    assert train(tmp_path, *settings, "run.name=skipped", prepare=skip).codes == [0, 0]
    assert_same(run, tmp_path / "runs/skipped")  # the spike's update is undone: unlike that of a NaN, it was made


def test_a_seeded_run_without_a_checkpoint_of_its_own_goes_back_to_the_seed(tmp_path: Path):
    assert train(tmp_path, "engine=ddp", "train.steps=12", "run.name=seed").codes == [0, 0]
    settings = ["engine=ddp", "train.steps=20", "checkpoint.every_steps=0", "checkpoint.resume=runs/seed"]
    bad = [Fault("nan", 1, 15, "data"), Fault("nan", 0, 16, "data")]
    bounds = ["bad_numbers.max_bad_steps=1", "train.log_every_steps=2"]
    ended = train(tmp_path, *settings, *bounds, faults=bad, prepare=partial(once, "nan"))
    assert ended.codes == [0, 0], ended
    run, seed = tmp_path / RUN, tmp_path / "runs/seed"
    (back,) = events(run, "rollback")
    assert back["checkpoint"].endswith("runs/seed/checkpoints/step-00000012")
    assert [event["step"] for event in events(run, "resume")] == [12, 12]
    (step, loss, *_), *_ = trajectory(run)
    assert step == 13 and abs(loss - trajectory(seed)[-1][1]) < 0.5 * trajectory(seed)[0][1]


def test_a_run_that_diverges_again_and_again_stops_for_good(tmp_path: Path):
    ended = train(tmp_path, *ROLL_BACK, "bad_numbers.max_rollbacks=2", faults=BAD)
    assert ended.codes[0] == 3
    assert exit_record(tmp_path / RUN)["code"] == 3
    assert len(events(tmp_path / RUN, "rollback")) == 2
    (fault,) = events(tmp_path / RUN, "fault")
    assert "has gone back 2 times already" in fault["error"]
    assert "has gone back 2 times already" in read_json(tmp_path / RUN / "failure.json")["summary"]
    assert "has gone back 2 times already" in (tmp_path / RUN / "log/train.log").read_text().splitlines()[-1]
    assert "has gone back 2 times already" in ended.said[0]
    assert "Traceback" not in ended.said[0] + ended.said[1]


# Stopping, and launches that meet


def test_a_stop_file_and_a_time_limit_stop_and_save(whole: Path, tmp_path: Path):
    run = tmp_path / RUN
    slow = [Fault("slow", 1, step, "data") for step in range(2, 12)]

    def touch(processes: list[Any]) -> None:
        wait_for(lambda: num_steps(run) >= 1)
        (run / "STOP").touch()

    assert train(tmp_path, *SETTINGS, faults=slow, meanwhile=touch).codes == [75, 75]
    found = exit_record(run)
    assert (found["code"], found["reason"], found["attempt"]) == (75, "stop file", 1)
    assert not (run / "STOP").exists()
    stopped_at = found["step"]
    assert find_checkpoints(run)[-1].name == f"step-{stopped_at:08d}"
    assert train(tmp_path, *SETTINGS, "run.max_minutes=0.001").codes == [75, 75]
    assert (exit_record(run)["reason"], exit_record(run)["step"]) == ("run.max_minutes", stopped_at + 2)
    assert train(tmp_path, *SETTINGS).codes == [0, 0]
    assert exit_record(run) == {**exit_record(run), "code": 0, "reason": "finished", "step": 12, "attempt": 3}
    assert_same(run, whole)


def test_a_closed_terminal_stops_and_saves(tmp_path: Path):
    def hang_up(processes: list[Any]) -> None:
        wait_for(lambda: num_steps(tmp_path / RUN) >= 1)
        os.kill(processes[0].pid, signal.SIGHUP)

    assert train(tmp_path, "train.steps=10000", meanwhile=hang_up, world_size=1).codes == [75]
    found = exit_record(tmp_path / RUN)
    assert found["reason"] == "SIGHUP"
    assert find_checkpoints(tmp_path / RUN)[-1].name == f"step-{found['step']:08d}"
    assert not (tmp_path / RUN / "failure.json").exists()


def test_a_signal_before_the_first_step_is_a_stop(tmp_path: Path):
    ended = train(tmp_path, faults=[Fault("terminate", rank, 0, "starting") for rank in (0, 1)])
    assert ended.codes[0] == 75, ended
    assert "stopped by SIGTERM before the first step; the same command continues" in ended.said[0]
    assert ended.said[1] == ""
    found = exit_record(tmp_path / RUN)
    assert (found["code"], found["reason"], found["attempt"]) == (75, "SIGTERM", 1)
    assert not (tmp_path / RUN / "failure.json").exists()


def test_a_signal_that_answers_a_failure_is_no_stop(tmp_path: Path):
    faults = [Fault("raise", 1, 0, "starting"), Fault("slow", 0, 0, "starting"), Fault("terminate", 0, 0, "starting")]
    ended = train(tmp_path, faults=faults)
    assert ended.codes == [1, 1], ended
    assert exit_record(tmp_path / RUN)["code"] == 1
    assert failure(tmp_path / RUN)["rank"] == 1
    assert "ended by SIGTERM; the first cause is in runs/gpt_nano/failure.json" in ended.said[0]


def look_often() -> None:
    lease.BEAT_SECONDS = 0.2


def test_a_renamed_directory_stops_the_launch_saved_and_leaves_the_name_to_another(tmp_path: Path):
    run, kept, second = tmp_path / RUN, tmp_path / RUN.with_name("keep"), []

    def rename(processes: list[Any]) -> None:
        wait_for(lambda: num_steps(run) >= 3)
        run.rename(kept)
        second.append(train(tmp_path, world_size=1, log="second"))

    # Many saves, of which none may reach the new directory.
    often = ["train.steps=100000", "checkpoint.every_steps=2", "checkpoint.max_failures=1000"]
    first = train(tmp_path, *often, prepare=look_often, meanwhile=rename)
    assert first.codes == [3, 3], first.said
    found = exit_record(kept)
    assert (found["code"], found["reason"]) == (3, "renamed or removed directory")
    assert find_checkpoints(kept)[-1].name == f"step-{found['step']:08d}"
    assert num_steps(kept) == found["step"]
    assert "runs/gpt_nano was renamed or removed while it is in use: this launch saves and stops" in first.said[0]
    assert f"run.root={kept.parent} run.name=keep continue from there" in first.said[0]
    assert second[0].codes == [0], second[0].said
    assert [step for step, *_ in trajectory(run)] == list(range(1, 9))
    assert exit_record(run)["attempt"] == 1
    assert train(tmp_path, "run.name=keep", f"train.steps={found['step'] + 1}", world_size=1).codes == [0]
    assert exit_record(kept)["step"] == found["step"] + 1


def test_a_removed_directory_costs_no_step(tmp_path: Path):
    run, rescued = tmp_path / RUN, tmp_path / RUN.with_name("gpt_nano-rescued")

    def remove(processes: list[Any]) -> None:
        wait_for(lambda: num_steps(run) >= 3)
        run.rename(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")

    ended = train(tmp_path, "train.steps=100000", prepare=look_often, meanwhile=remove, world_size=1)
    assert ended.codes == [3], ended.said
    assert not run.exists()
    step = exit_record(rescued)["step"]
    assert find_checkpoints(rescued)[-1].name == f"step-{step:08d}"
    assert train(tmp_path, "run.name=gpt_nano-rescued", f"train.steps={step + 1}", world_size=1).codes == [0]
    assert [record[0] for record in trajectory(rescued)] == [step + 1]


def test_a_second_launch_is_refused_and_a_clock_may_jump(whole: Path, tmp_path: Path):
    second = []

    def launch_again(processes: list[Any]) -> None:
        wait_for(lambda: num_steps(tmp_path / RUN) >= 1)
        second.append(train(tmp_path, *SETTINGS, world_size=1, log="second"))

    slow = [Fault("slow", 1, step, "data") for step in range(3, 9)]
    clock = [Fault("clock", rank, 5, "forward_backward") for rank in (0, 1)]
    assert train(tmp_path, *SETTINGS, faults=[*slow, *clock], meanwhile=launch_again).codes == [0, 0]
    assert second[0].codes == [2]
    assert "runs/gpt_nano is in use by another launch (process " in second[0].said[0]
    assert "Traceback" not in second[0].said[0]
    assert exit_record(tmp_path / RUN)["code"] == 0
    assert_same(tmp_path / RUN, whole)  # and a clock that jumps back a day changes nothing


def test_a_grace_that_is_too_short_costs_what_is_after_the_last_checkpoint(whole: Path, tmp_path: Path):
    def end(processes: list[Any]) -> None:
        wait_for(lambda: num_steps(tmp_path / RUN) >= 7)
        for process in processes:
            process.terminate()
        time.sleep(0.1)
        for process in processes:
            process.kill()

    slow = [Fault("slow", 1, step, "data") for step in range(8, 13)]
    assert train(tmp_path, *SETTINGS, faults=slow, meanwhile=end).codes == [-9, -9]
    assert find_checkpoints(tmp_path / RUN)[-1].name >= "step-00000006"
    assert train(tmp_path, *SETTINGS).codes == [0, 0]
    assert_same(tmp_path / RUN, whole)


def test_restarts_without_progress_end(tmp_path: Path):
    early, limit = [Fault("raise", 0, 1, "data")], "supervision.max_failed_attempts=2"
    for count in range(2):
        restart = {"TORCHELASTIC_RESTART_COUNT": str(count)}
        assert train(tmp_path, limit, faults=early, environ=restart, world_size=1).codes == [1]
    refused = train(tmp_path, limit, environ={"SLURM_RESTART_COUNT": "1"}, world_size=1)
    assert refused.codes == [3]
    assert "2 launches in a row failed without a checkpoint after step 0" in refused.said[0]
    assert "ZeroDivisionError: a fault of this rank only" in refused.said[0], "with the first cause"
    assert exit_record(tmp_path / RUN)["code"] == 3
    assert train(tmp_path, limit, world_size=1).codes == [0], "a person may try"


def test_the_watchdog_imports_no_torch():
    assert "torch" not in Path(watchdog.__file__).read_text()


# Disks. These need to mount file systems of their own, and skip where that is not allowed.


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """A function that calls ``mount`` with options for a directory."""
    mounted: list[Path] = []

    def mount_at(path: Path, *options: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not allowed: {done.stderr.strip()}")
        if "remount,bind,ro" not in options:
            mounted.append(path)

    yield mount_at
    for path in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(path)])


def test_a_run_whose_directory_becomes_read_only_stops_and_goes_on_later(
    whole: Path, tmp_path: Path, mount: Callable[..., None]
):
    runs = tmp_path / "runs"

    def make_read_only(processes: list[Any]) -> None:
        wait_for(lambda: num_steps(tmp_path / RUN) >= 5)
        mount(runs, "--bind", str(runs))
        mount(runs, "-o", "remount,bind,ro")

    slow = [Fault("slow", 1, step, "data") for step in range(4, 12)]
    ended = train(tmp_path, *SETTINGS, "checkpoint.max_failures=2", faults=slow, meanwhile=make_read_only)
    assert ended.codes[0] == 2, ended
    assert "could not be saved" in ended.said[0]
    assert "Read-only file system" in ended.said[0]
    assert "Traceback" not in ended.said[0]
    refused = train(tmp_path, *SETTINGS)
    assert refused.codes[0] == 2
    assert "runs/gpt_nano cannot be written: [Errno 30] Read-only file system" in refused.said[0]
    subprocess.run(["umount", str(runs)], check=True)
    assert train(tmp_path, *SETTINGS).codes == [0, 0]
    assert_same(tmp_path / RUN, whole)


def test_a_disk_that_is_full_for_a_while_costs_no_line(whole: Path, tmp_path: Path, mount: Callable[..., None]):
    mount(tmp_path / "runs", "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    mount(tmp_path / RUN / "checkpoints", "-t", "tmpfs", "-o", "size=64m", "tmpfs")
    filler = tmp_path / "runs/filler"

    def fill(processes: list[Any]) -> None:
        wait_for(lambda: num_steps(tmp_path / RUN) >= 4)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 256)
        time.sleep(2.0)
        filler.unlink()

    slow = [Fault("slow", 1, step, "data") for step in range(5, 13)]
    ended = train(tmp_path, *SETTINGS, faults=slow, meanwhile=fill)
    assert ended.codes == [0, 0]
    assert_same(tmp_path / RUN, whole)


@pytest.mark.parametrize("has_room", [True, False])
def test_the_last_words_find_room_on_a_full_disk(tmp_path: Path, mount: Callable[..., None], has_room: bool):
    mount(tmp_path, "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    number, hold = claim_run(tmp_path, newest_step=0, max_failed_attempts=3)
    if not has_room:
        (tmp_path / ROOM_FILE).unlink()
    with contextlib.suppress(OSError), (tmp_path / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    error = Failure(
        kind="exception", rank=0, phase="checkpoint", step=4, error="OSError: no space left", detail="x" * 9999
    )
    record_failures(tmp_path, number, [error], [])
    hold.release()
    found = [read_json(tmp_path / name).get("attempt") for name in ("failure.json", "exit.json")]
    assert found == ([1, 1] if has_room else [None, None])
