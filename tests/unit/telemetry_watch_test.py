"""What a terminal shows of a run, live and from its files alone."""

import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from bigtrain.telemetry.view import FollowedRun, RunView, sparkline

SCRIPT = Path(__file__).parents[2] / "launch" / "watch.py"


def record(step: int, **changes: Any) -> dict[str, Any]:
    found = {"step": step, "tokens": step * 100, "loss": 10 / step, "grad_norm": 0.5, "lr": 1e-3}
    return {**found, "step_seconds": 2.0, "tokens_per_second": 50.0, **changes}


def drawn(view: RunView, **options: Any) -> str:
    out = io.StringIO()
    RichConsole(file=out, width=100, color_system=None).print(view.render(**options))
    return out.getvalue()


def write(run: Path, steps: range, *events: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("train: {steps: 20, log_every_steps: 1}\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record(step)) + "\n" for step in steps)
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def test_a_view_shows_progress_loss_machine_and_what_happened():
    view = RunView(100)
    assert "no step yet" in drawn(view)
    machine = {"perf/mfu_causal": 0.431, "memory/peak_allocated_bytes": 60.5 * 2**30, "data/wait_fraction": 0.01}
    for step in range(1, 41):
        view.add(record(step, **(machine if step == 30 else {})))
    view.add_event({"event": "validation", "step": 40, "loss": 0.3, "time": "2026-01-02T03:04:05+00:00"})
    text = drawn(view, show_events=True)
    for words in (
        "step 40/100",
        "40%",
        "0:02:00 left",
        "loss 0.2500",
        "50 tok/s",
        "mfu 43.1%",
        "device memory 60.5 GiB",
        "data wait 1.0%",
    ):
        assert words in text
    assert "03:04:05Z  validation  step 40  loss 0.3000" in text and "validation 0.3000" in text
    assert "▁" in text or "." in text


def test_a_resumed_run_takes_its_steps_back():
    view = RunView(20)
    for step in (1, 2, 3, 4, 3, 4, 5):
        view.add(record(step))
    assert [step for step, _ in view._losses] == [1, 2, 3, 4, 5]
    view.add(record(6, loss=None))
    view.add(record(7, loss=math.nan, grad_norm=None))
    assert len(view._losses) == 5 and "step 7/20" in drawn(view) and "grad norm nan" in drawn(view)


def test_a_resumed_run_takes_its_validations_back():
    view = RunView(20)
    for kind, step in (("start", 0), ("validation", 5), ("fault", 12), ("validation", 10), ("resume", 8)):
        view.add_event({"event": kind, "step": step, "loss": 0.5})
    assert [(event["event"], event["step"]) for event in view.events] == [
        ("start", 0),
        ("validation", 5),
        ("fault", 12),
        ("resume", 8),
    ]


def test_a_sparkline_falls_with_the_loss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    line = sparkline([8 - i / 10 for i in range(80)], 8)
    assert line == "█▇▆▅▄▃▂▁" or (len(line) == 8 and list(line) == sorted(line, reverse=True) and line[0] == "█")
    assert sparkline([1.0, 1.0, 1.0]) == "▁▁▁"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert sparkline([2.0, 1.0]).isascii()


def test_a_run_is_followed_by_its_files_through_a_resume(tmp_path: Path):
    (tmp_path / "run").mkdir()
    followed = FollowedRun(tmp_path / "run")
    followed.read()
    assert followed.state() == "begins"
    write(tmp_path / "run", range(1, 11), {"event": "start", "step": 0, "time": "a"})
    followed.read()
    assert (followed.state(), followed.view.last["step"], followed.view.total_steps) == ("running", 10, 20)
    old = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[:5]
    (tmp_path / "run/new").write_text("\n".join(old) + "\n")
    (tmp_path / "run/new").replace(tmp_path / "run/metrics.jsonl")  # as a resume takes lines back
    write(
        tmp_path / "run",
        range(6, 21),
        {"event": "resume", "step": 5, "time": "b"},
        {"event": "finished", "step": 20, "time": "c"},
    )
    followed.read()
    assert followed.state() == "finished" and [step for step, _ in followed.view._losses] == list(range(1, 21))
    assert [event["event"] for event in followed.view.events] == ["start", "resume", "finished"]


def test_throughput_is_that_of_the_last_steps():
    view = RunView(20)
    for seconds in (1.0, 3.0):
        view.add(record(1, step_seconds=seconds, tokens_per_second=100 / seconds))
    assert "50 tok/s" in drawn(view)


def test_a_launch_that_ends_without_a_word_is_noticed_by_its_silence(tmp_path: Path):
    write(tmp_path / "run", range(1, 11), {"event": "finished", "step": 10})  # by the launch before this one
    attempt = tmp_path / "run/attempt.json"
    attempt.touch()  # as whoever has the run does every 3 s
    for path in (tmp_path / "run").iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
    followed = FollowedRun(tmp_path / "run")
    followed.read()
    assert followed.state() == "no sign of life for 1:00:00" and followed.is_over()
    os.utime(attempt, (time.time() + 3600,) * 2)  # a sign, by a clock that is fast
    followed.read()
    assert followed.state() == "running" and not followed.is_over()


@pytest.mark.parametrize(
    ("code", "state"), [(0, "finished"), (75, "stopped"), (1, "failed: rank 3 died"), (2, "failed: rank 3 died")]
)
def test_a_launch_that_leaves_word_has_ended_at_once(tmp_path: Path, code: int, state: str):
    write(tmp_path / "run", range(1, 11), {"event": "start", "step": 0})
    (tmp_path / "run/attempt.json").touch()
    (tmp_path / "run/exit.json").write_text(json.dumps({"code": code, "reason": "rank 3 died"}))
    followed = FollowedRun(tmp_path / "run")
    followed.read()
    assert followed.state() == state and followed.is_over()


def test_the_command_says_how_runs_stand_and_writes_nothing(tmp_path: Path):
    write(tmp_path / "a", range(1, 11), {"event": "stop", "step": 10, "reason": "SIGTERM", "time": "x"})
    write(tmp_path / "b", range(1, 21), {"event": "finished", "step": 20, "time": "x"})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    command = [sys.executable, SCRIPT, "a", "b"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    for words in ("a: stopped", "step 10/20", "stop  step 10  SIGTERM", "b: finished", "step 20/20"):
        assert words in result.stdout
    assert "\x1b" not in result.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_command_ends_with_the_run_that_it_shows_on_a_terminal(tmp_path: Path):
    import pty

    write(tmp_path / "a", range(1, 11))
    parent, child = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color"}
    command = [sys.executable, SCRIPT, "a", "every_seconds=0.1"]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, cwd=tmp_path, env=environ)
    os.close(child)
    output, deadline = b"", time.monotonic() + 60
    while b"step 10/20" not in output and time.monotonic() < deadline:
        output += os.read(parent, 65536)
    write(tmp_path / "a", range(11, 21), {"event": "finished", "step": 20, "time": "x"})
    while time.monotonic() < deadline:
        try:
            output += os.read(parent, 65536)
        except OSError:
            break
    os.close(parent)
    assert process.wait(10) == 0
    assert "finished" in output.decode() and re.search(r"step 20/20", output.decode())


def test_a_directory_that_is_not_there_is_one_line(tmp_path: Path):
    command = [sys.executable, SCRIPT, "missing", "every_seconds=0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "missing: there is no such directory; name one",
        "every_seconds=0.0: must be more than 0",
    ]
