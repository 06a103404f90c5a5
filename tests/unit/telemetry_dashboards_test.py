"""Dashboards show what the files of the run say, also after the run went back, was copied, or a clock was wrong."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import TrainConfig, WandbMode
from bigtrain.telemetry.companion import Follower
from bigtrain.telemetry.files import read_jsonl
from bigtrain.telemetry.recorder import Recorder
from bigtrain.telemetry.tensorboard_logger import start_tensorboard
from bigtrain.telemetry.wandb_logger import start_wandb
from tests.tensorboard_files import EVENT_FILES, read_events, read_scalars
from tests.wandb_files import read_history, read_leveldb_log, read_records

AHEAD = "2999-01-01T00:00:00.000+00:00"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


class Shown:
    """A dashboard that keeps what it is told, and can forget steps as TensorBoard does or not."""

    def __init__(self, *, forgets: bool = True) -> None:
        self.rows: dict[str, list[dict[str, float]]] = {"train": [], "val": []}
        self.events: list[str] = []
        self.taken_back: list[tuple[int, bool]] = []
        self.forgets = forgets

    def log(self, row: dict[str, float]) -> None:
        self.rows["val" if "val/loss" in row else "train"].append(row)

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event["event"])

    def samples(self, samples: list[dict[str, Any]]) -> None:
        pass

    def take_back(self, step: int, *, differs: bool) -> int | None:
        self.taken_back.append((step, differs))
        if not self.forgets:
            return None
        self.rows = {key: [row for row in rows if row["step"] <= step] for key, rows in self.rows.items()}
        return step


def launch(
    run: Path,
    sink: Any,
    first: int,
    last: int,
    *,
    lr: float = 1e-3,
    tokens: int = 10,
    kind: str = "resume",
    ends: str = "stop",
) -> None:
    """Write what a launch writes that begins after step ``first``, and follow it after every step."""
    follower = Follower(run, sink, run / "cursor.json") if sink else None
    before = read_jsonl(run / "metrics.jsonl")[:first] if first else []
    done = before[-1]["tokens"] if before else 0
    with Recorder(TrainConfig(), run, first) as recorder:
        recorder.event(kind, step=first, attempt=1)
        for step in range(first + 1, last + 1):
            done += tokens
            recorder.metrics(
                [{"step": step, "tokens": done, "loss": 1 / step, "grad_norm": 1.0, "lr": lr}
                 | {"step_seconds": 1.0, "tokens_per_second": 10.0, "data_digest": f"{step}"}]
            )  # fmt: skip
            if step % 5 == 0:
                recorder.event("validation", step=step, tokens=done, loss=lr, perplexity=1.0)
            if follower:
                follower.log_new()
        recorder.event(ends, step=last)
    if follower:
        follower.log_new()


def of_files(run: Path) -> dict[int, tuple[float, float]]:
    return {record["step"]: (record["lr"], record["tokens"]) for record in read_jsonl(run / "metrics.jsonl")}


def of_rows(rows: list[dict[str, float]]) -> dict[int, tuple[float, float]]:
    assert len({row["step"] for row in rows}) == len(rows), "each step once"
    return {int(row["step"]): (row["train/lr"], row["tokens"]) for row in rows}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_run_that_went_back_is_shown_as_its_files_have_it(tmp_path: Path) -> None:
    shown = Shown()
    launch(tmp_path, shown, 0, 12, kind="start")
    launch(tmp_path, shown, 8, 16, lr=5e-3, tokens=40)
    assert of_rows(shown.rows["train"]) == of_files(tmp_path)
    assert [(row["step"], row["tokens"], row["val/loss"]) for row in shown.rows["val"]] == [
        (5, 50, 1e-3),
        (10, 160, 5e-3),
        (15, 360, 5e-3),
    ]
    assert shown.taken_back == [(8, False)]  # at its start nobody knows yet whether the steps differ
    assert shown.events == ["start", "stop", "resume", "superseded", "stop"]
    # Negative control: a dashboard that takes nothing back, though it is told twice, shows something else.
    stubborn, other = Shown(forgets=False), tmp_path / "b"
    launch(other, stubborn, 0, 12, kind="start")
    launch(other, stubborn, 8, 16, lr=5e-3, tokens=40)
    assert stubborn.taken_back == [(8, False), (8, True)]
    assert of_rows(stubborn.rows["train"]) != of_files(other)


def test_steps_that_are_repeated_with_the_same_numbers_may_stay(tmp_path: Path) -> None:
    shown = Shown(forgets=False)
    launch(tmp_path, shown, 0, 12, kind="start")
    launch(tmp_path, shown, 8, 16)
    assert shown.taken_back == [(8, False)]
    assert of_rows(shown.rows["train"]) == of_files(tmp_path)
    assert "superseded" not in shown.events


@pytest.mark.parametrize("case", ["finished earlier", "lines were lost with the machine"])
def test_logged_steps_that_nobody_compares_are_taken_back(tmp_path: Path, case: str) -> None:
    shown = Shown(forgets=False)
    launch(tmp_path, shown, 0, 12, kind="start")
    if case == "finished earlier":
        launch(tmp_path, shown, 8, 10, ends="finished")
        assert shown.taken_back == [(8, False), (10, True)]
    else:
        lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:10]))
        launch(tmp_path, shown, 8, 12)
        assert shown.taken_back == [(8, True)]


def test_files_that_are_replaced_under_a_reader_are_read_on_at_the_same_place(tmp_path: Path) -> None:
    shown = Shown()
    follower = Follower(tmp_path, shown, tmp_path / "cursor.json")
    for first, last, kind in ((0, 12, "start"), (8, 16, "resume"), (12, 20, "resume")):
        launch(tmp_path, None, first, last, kind=kind, lr=1e-3 * last)
        follower.log_new()
    assert shown.events == ["start", "stop", *["resume", "superseded", "stop"] * 2]
    assert of_rows(shown.rows["train"]) == of_files(tmp_path)


def test_events_are_passed_on_by_their_place_whatever_the_clock_says(tmp_path: Path) -> None:
    shown = Shown()
    launch(tmp_path, shown, 0, 4, kind="start")
    text = (tmp_path / "events.jsonl").read_text()
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps(json.loads(e) | {"time": AHEAD}) + "\n" for e in text.splitlines())
    )
    shown.events.clear()
    launch(tmp_path, shown, 4, 6, kind="resume")
    assert shown.events == ["resume", "stop"]
    # Removed, the file begins anew; the cursor of an older version told the events by their time.
    (tmp_path / "events.jsonl").unlink()
    shown.events.clear()
    launch(tmp_path, shown, 6, 7)
    assert shown.events == ["resume", "stop"]
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["time"]
    (tmp_path / "cursor.json").write_text(json.dumps({"train": 7, "val": 5, "time": last, "num_samples": 0}))
    shown.events.clear()
    launch(tmp_path, shown, 7, 8)
    assert shown.events == ["resume", "stop"]


def test_tensorboard_reads_the_newest_launch_last_and_forgets_what_was_given_up(tmp_path: Path) -> None:
    launch(tmp_path, None, 0, 12, kind="start")
    start_tensorboard(tmp_path).close(timeout_seconds=30)
    (first,) = tmp_path.glob(EVENT_FILES)  # written when the clock was a day ahead
    first.rename(first.with_name(f"events.out.tfevents.{int(time.time()) + 86400}.host"))
    assert dict(read_scalars(tmp_path)["train/lr"])[12] == pytest.approx(1e-3)
    launch(tmp_path, None, 8, 16, lr=5e-3, tokens=40)
    start_tensorboard(tmp_path).close(timeout_seconds=30)
    start_tensorboard(tmp_path).close(timeout_seconds=30)  # has nothing to add, and takes nobody's file
    assert len(list(tmp_path.glob(EVENT_FILES))) == 3
    shown, files = read_scalars(tmp_path), of_files(tmp_path)
    assert dict(shown["train/lr"]) == pytest.approx({step: lr for step, (lr, _) in files.items()})
    assert len(shown["train/lr"]) == 16
    assert dict(shown["tokens"]) == {step: tokens for step, (_, tokens) in files.items()}
    texts = [value.tag for event in read_events(tmp_path) for value in event.summary.value if "events/" in value.tag]
    assert [text.split("/")[1] for text in texts] == ["start", "stop", "resume", "superseded", "stop"]


def follow_with_wandb(run: Path, name: str) -> list[str]:
    said: list[str] = []
    config = TrainConfig()
    config.run.name, config.logging.wandb = name, WandbMode.offline
    start_wandb(run, config, say=said.append).close(timeout_seconds=60)
    return said


def run_id(run: Path) -> str:
    return (run / "wandb_id").read_text().strip()


def rows_of(run: Path, wandb_id: str) -> list[dict[str, Any]]:
    """Return the rows of a wandb run, with plain values."""
    only = run.parent / f"only-{wandb_id}"
    shutil.rmtree(only, ignore_errors=True)
    for path in run.glob(f"wandb/offline-run-*-{wandb_id}"):
        shutil.copytree(path, only / "wandb" / path.name)
    return [{key: json.loads(value) for key, value in row.items()} for row in read_history(only)]


def test_wandb_gets_a_whole_run_beside_the_one_whose_steps_were_given_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch(run, None, 0, 12, kind="start")
    follow_with_wandb(run, "a")
    old = run_id(run)
    launch(run, None, 8, 16, lr=5e-3, tokens=40)
    said = follow_with_wandb(run, "a")
    new = run_id(run)
    assert new != old and any(old in line and new in line and "given up" in line for line in said), said
    assert of_rows([row for row in rows_of(run, new) if "train/lr" in row]) == of_files(run)
    assert [(row["step"], row["tokens"]) for row in rows_of(run, new) if "val/loss" in row] == [
        (5, 50),
        (10, 160),
        (15, 360),
    ]
    names = {record.run_id: record.display_name for record in read_records(run, "run")}
    assert names == {old: "a (given up after step 8)", new: "a"}
    launch(run, None, 16, 18, lr=5e-3, tokens=40)
    follow_with_wandb(run, "a")
    assert run_id(run) == new
    assert of_rows([row for row in rows_of(run, new) if "train/lr" in row]) == of_files(run)


def test_a_copied_run_is_another_wandb_run_and_a_moved_one_the_same(tmp_path: Path) -> None:
    run, copy, moved = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    launch(run, None, 0, 2, kind="start")
    follow_with_wandb(run, "a")
    first = run_id(run)
    shutil.copytree(run, copy)
    launch(copy, None, 2, 4, lr=1e-4)
    said = follow_with_wandb(copy, "b")
    assert run_id(copy) != first and any("is a copy of" in line and first in line for line in said), said
    assert of_rows([row for row in rows_of(copy, run_id(copy)) if "train/lr" in row]) == of_files(copy)
    run.rename(moved)
    launch(moved, None, 2, 4)
    assert not any("copy" in line for line in follow_with_wandb(moved, "a"))
    assert run_id(moved) == first
    second = run_id(copy)
    assert not any("copy" in line for line in follow_with_wandb(copy, "b"))
    assert run_id(copy) == second
    assert read_leveldb_log(next(moved.glob("wandb/*/*.wandb")).read_bytes())
