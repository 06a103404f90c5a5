"""A run that is killed, stopped, hung or broken goes on to the same weights, and says what happened first."""

import json
from pathlib import Path

import pytest

from bigtrain.checkpoint.store import find_checkpoints
from tests.distributed.launches import events, trajectory
from tests.faults.injection import RUN, Fault, state_hashes, train

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
    resumed = [*events(run, "start"), *events(run, "resume")]
    assert [event["attempt"] for event in sorted(resumed, key=lambda e: e["attempt"])] == list(range(1, 9))
    assert all("the process ended without a word" in event["after"] for event in events(run, "resume"))
    assert len(find_checkpoints(run)) == 2
