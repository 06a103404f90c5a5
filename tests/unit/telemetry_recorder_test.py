"""One recorder per run: the files hold each fact once, through kills and resumes."""

import os
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bigtrain.config import TrainConfig
from bigtrain.telemetry.files import read_jsonl
from bigtrain.telemetry.recorder import NullRecorder, Recorder

ISSUE_KEYS = ["step", "tokens", "loss", "grad_norm", "lr", "step_seconds", "tokens_per_second"]


def records(first: int, last: int, seconds: float = 0.5, launch: int = 1) -> list[dict[str, float]]:
    return [
        dict(zip(ISSUE_KEYS, (step, step * 100, 1 / step, 0.1, 1e-3, seconds, 100 / seconds), strict=True))
        | {"launch": launch}
        for step in range(first, last + 1)
    ]


def open_recorder(run: Path, resume_step: int = 0) -> Recorder:
    return Recorder(TrainConfig(), run, resume_step)


def test_the_recorder_of_other_ranks_takes_everything_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with NullRecorder() as recorder:
        recorder.metrics(records(1, 2))
        recorder.event("validation", step=2, loss=1.0, perplexity=2.7)
        recorder.message("hello")
        recorder.close()
    assert capsys.readouterr().out == ""


def test_metrics_hold_one_object_per_step_with_the_promised_keys(tmp_path: Path) -> None:
    with open_recorder(tmp_path) as recorder:
        recorder.metrics([])
        recorder.metrics(records(1, 10))
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 10  # there at once
        recorder.metrics(records(11, 13))
    written = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in written] == list(range(1, 14))
    assert list(written[0])[:7] == ISSUE_KEYS


def test_events_carry_their_time_and_people_see_what_they_wait_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_recorder(tmp_path) as recorder:
        recorder.event("start", step=0, world_size=2)
        recorder.event("validation", step=5, loss=3.0, perplexity=20.0855)
        recorder.event("checkpoint", step=5, path=Path("runs/x/checkpoints/step-00000005"))
        recorder.event("finished", step=5)
        recorder.close()
    events = read_jsonl(tmp_path / "events.jsonl")
    assert [event["event"] for event in events] == ["start", "validation", "checkpoint", "finished"]
    assert events[1]["loss"] == 3.0 and events[1]["perplexity"] == 20.0855
    for event in events:
        assert abs((datetime.now(UTC) - datetime.fromisoformat(event["time"])).total_seconds()) < 60
    assert capsys.readouterr().out.splitlines() == [
        "validation after step 5: loss 3.0000, perplexity 20.09",
        "saved runs/x/checkpoints/step-00000005",
        "finished after step 5",
    ]


def test_an_exception_is_a_fault_in_the_stream(tmp_path: Path) -> None:
    with pytest.raises(ValueError), open_recorder(tmp_path) as recorder:
        recorder.metrics(records(1, 2))
        raise ValueError("bad luck")
    assert (
        read_jsonl(tmp_path / "events.jsonl")[-1].items() >= {"event": "fault", "error": "ValueError: bad luck"}.items()
    )
    with open_recorder(tmp_path, resume_step=2):
        pass
    assert read_jsonl(tmp_path / "events.jsonl")[-1]["event"] == "fault", "an orderly end is none"


def test_the_console_shows_the_last_step_and_the_mean_pace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_recorder(tmp_path) as recorder:
        recorder.metrics([*records(1, 1, seconds=0.01), *records(2, 2, seconds=0.19)])  # a device that ran ahead
    assert "step 2/1000  loss 0.5000" in capsys.readouterr().out
    assert "200 tokens  1.00k tok/s" in (tmp_path / "log" / "train.log").read_text()


def test_a_resume_supersedes_later_results_and_keeps_history(tmp_path: Path) -> None:
    with open_recorder(tmp_path) as recorder:
        recorder.event("start", step=0)
        recorder.metrics(records(1, 30))
        for step in (10, 20, 30):
            recorder.event("validation", step=step, loss=1.0, perplexity=2.7)
        recorder.event("checkpoint", step=20, path="p")
        recorder.event("fault", step=30, reason="lost")
    with open_recorder(tmp_path, resume_step=20) as recorder:
        recorder.event("resume", step=20, checkpoint="p")
        recorder.metrics(records(21, 30, launch=2))
        recorder.event("validation", step=30, loss=1.0, perplexity=2.7)
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 31))
    assert [record["launch"] for record in metrics] == [1] * 20 + [2] * 10
    events = [(event["event"], event["step"]) for event in read_jsonl(tmp_path / "events.jsonl")]
    assert events == [
        ("start", 0),
        ("validation", 10),
        ("validation", 20),
        ("checkpoint", 20),
        ("fault", 30),
        ("resume", 20),
        ("validation", 30),
    ]


def test_a_run_that_begins_anew_has_only_its_own_steps(tmp_path: Path) -> None:
    for _ in range(2):
        with open_recorder(tmp_path) as recorder:
            recorder.event("start", step=0)
            recorder.event("validation", step=0, loss=1.0, perplexity=2.7)
            recorder.metrics(records(1, 3))
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    events = [event["event"] for event in read_jsonl(tmp_path / "events.jsonl")]
    assert events == ["start", "start", "validation"]


def test_a_run_that_is_killed_twice_holds_each_step_once(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from telemetry_recorder_test import open_recorder, records
        run, resume, last = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
        with open_recorder(run, resume) as recorder:
            for step in range(resume + 1, last + 1):
                recorder.metrics(records(step, step))
                time.sleep(0.001)
            recorder.event("finished", step=last)
        """
    )
    for resume, until in ((0, 60), (50, 120), (100, None)):
        command = [sys.executable, "-c", script, str(Path(__file__).parent), tmp_path, str(resume), "200"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if until is None:
            process.communicate()
            assert process.returncode == 0
            break
        while not process.stdout.readline().startswith(f"step {until}/"):
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 201))


def test_an_ordinary_recorder_imports_nothing_heavy(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from bigtrain.config import TrainConfig
        from bigtrain.telemetry.recorder import Recorder
        with Recorder(TrainConfig(), Path(sys.argv[1]), 0) as recorder:
            recorder.message("x")
        print(sorted({"torch", "wandb", "rich", "matplotlib", "numpy", "hydra"} & sys.modules.keys()))
        """
    )
    command = [sys.executable, "-c", program, tmp_path]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout
    assert output.splitlines() == ["x", "[]"]
