"""A run that is killed twice and resumed, as its dashboards and readers see it."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.distributed.collectives import init_process_group
from bigtrain.files import locked
from bigtrain.processes import RankInfo
from bigtrain.telemetry import names
from bigtrain.telemetry.history import read_history
from bigtrain.telemetry.profiling import communication_seconds
from bigtrain.telemetry.view import FollowedRun
from bigtrain.telemetry.wandb_dashboard import build_dashboard
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import SMALL, TRAIN, Launch, Result, events, fork, metrics, num_steps
from tests.tensorboard_files import read_scalars
from tests.wandb_files import read_history as read_wandb
from tests.wandb_files import read_records

CANARY = "hf_CANARYCANARYCANARYCANARY"
NUM_STEPS = 300
COMMAND = [
    *SMALL,
    f"train.steps={NUM_STEPS}",
    "train.log_every_steps=5",
    "checkpoint.every_steps=25",
    "validation.every_steps=100",
    "validation.batches=1",
    "logging=wandb",
    "logging.tensorboard=true",
    "logging.layer_norms_every_steps=20",
    f"data.path=s3://user:{CANARY}@bucket",
    "engine=ddp",
    "profile.steps=[11,12]",
]
DOCUMENT = Path(__file__).parents[2] / "docs/metrics.md"
SAMPLE = {"step": 25, "prompt": "Once", "text": " upon a time"}


def wait_for(value: Callable[[], Any], condition: Callable[[Any], bool], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not condition(found := value()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def wait_for_wandb(directory: Path, num_launches: int) -> None:
    """Wait until the companions of all launches have begun and ended; each holds the lock of its log."""
    wait_for(lambda: len(list(directory.glob("wandb/offline-run-*/*.wandb"))), lambda n: n == num_launches)
    with locked(directory / "log/wandb.log", wait=True):
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run: two launches killed in their steps, and one that finishes."""
    cwd = tmp_path_factory.mktemp("telemetry")
    directory = cwd / "runs/gpt_nano"
    for number, kill_after in enumerate((70, 170), 1):
        with Launch([sys.executable, TRAIN, *COMMAND], cwd, MY_TOKEN=CANARY) as running:
            running.wait_until(lambda n=kill_after: num_steps(directory) >= n)
            running.process.kill()
            assert running.result().code == -9
        followed = FollowedRun(directory)
        followed.read()
        assert re.match(
            "failed: rank 0 on .* ended without a word", wait_for(followed.state, lambda state: state != "running")
        )
        # A companion that is slow would log the end of its launch after all of the next one.
        wait_for_wandb(directory, number)
    (directory / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    result: Result = fork("train.py", *COMMAND, cwd=cwd)
    assert result.code == 0, result.err
    wait_for_wandb(directory, 3)  # it may go on behind the run
    return directory


def test_the_files_hold_each_step_once_with_its_sections(run: Path):
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    logged = [record for record in records if "time" in record]
    assert {record["step"] for record in logged} >= set(range(5, NUM_STEPS + 1, 5))
    for record in logged:
        assert {key.partition("/")[0] for key in record if "/" in key} >= {"train", "perf", "memory", "data"}
        assert 0 < record["perf/mfu_causal"] < record["perf/mfu_full_attention"]
        assert 0 < record["perf/goodput"] <= 1 and record["memory/host_rss_bytes"] > 2**26
    assert [record["step"] for record in records if "optim/update_ratio/blocks.0" in record] == list(
        range(20, NUM_STEPS + 1, 20)
    )


def test_every_number_is_documented(run: Path):
    documented = set(re.findall(r"`([\w/]+)(?:/<\w+>)?`", DOCUMENT.read_text()))
    known = {value for value in vars(names).values() if isinstance(value, str) and re.fullmatch(r"\w+/\w+", value)}
    written = {re.sub(r"^((data|optim)/\w+)/.*", r"\1", key) for record in metrics(run) for key in record}
    assert "loss" in written and "optim/update_ratio" in written & known
    assert known | written <= documented


def test_the_phases_of_a_step_add_up_to_it(run: Path):
    records = metrics(run)
    pairs = []
    for i in range(NUM_STEPS - 100, NUM_STEPS, 5):
        interval = records[i : i + 5]
        phases = sum(
            value for key, value in interval[-1].items() if key.startswith("perf/") and key.endswith("_seconds")
        )
        pairs.append((phases, sum(record["step_seconds"] for record in interval) / 5))
    assert sum(a for a, _ in pairs) == pytest.approx(sum(b for _, b in pairs), rel=0.1)


def test_the_start_tells_the_environment_without_secrets(run: Path):
    launches = [*events(run, "start"), *events(run, "resume")]
    assert len(launches) == 3
    for launch in launches:
        assert launch["environment"]["packages"]["torch"] and launch["peak_source"].startswith("measured")
        assert len(launch["environment"]["commit"]) >= 40
    assert [launch["superseded_steps"] > 0 for launch in launches] == [False, True, True]
    assert CANARY not in (run / "events.jsonl").read_text() + (run / "config.yaml").read_text()


def test_the_profile_that_was_asked_for_is_there_once(run: Path):
    (event,) = events(run, "profile")
    assert (event["step"], event["path"]) == (12, "runs/gpt_nano/profile/steps-11-12.trace.json.gz")
    assert sorted(path.name for path in (run / "profile").iterdir()) == ["steps-11-12.trace.json.gz", "steps-11-12.txt"]


def test_wandb_holds_each_step_once_in_order_with_the_expected_keys(run: Path):
    rows = read_wandb(run)
    train = [row for row in rows if "train/loss" in row]
    assert [int(row["step"]) for row in train] == list(range(1, NUM_STEPS + 1))
    assert {"tokens", "train/grad_norm", "train/lr", "perf/tokens_per_second", "perf/step_seconds"} <= train[0].keys()
    sectioned = {
        "train/perplexity",
        "perf/mfu_causal",
        "perf/data_seconds",
        "memory/host_rss_bytes",
        "data/wait_fraction",
    }
    assert all(sectioned <= row.keys() for row in train[4::5])
    assert "optim/grad_norm/blocks.1" in train[19]
    validations = [row for row in rows if "val/loss" in row]
    assert [int(row["step"]) for row in validations] == list(range(100, NUM_STEPS + 1, 100))
    assert [float(row["tokens"]) for row in validations] == [int(row["step"]) * 8 * 16 for row in validations]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_dashboard_shows_what_runs_log(run: Path):
    logged = set().union(*(row.keys() for row in read_wandb(run)))
    of_a_gpu = {value for value in vars(names).values() if str(value).startswith(("system/", "memory/"))}
    panels = [panel for section in build_dashboard("mine", "me", "bigtrain").sections for panel in section.panels]
    assert len(panels) > 10
    for panel in panels:
        assert panel.x in logged
        assert set(panel.y or []) <= logged | of_a_gpu, panel.title
        assert panel.y or any(re.fullmatch(panel.metric_regex, key) for key in logged), panel.title


def test_wandb_continues_one_run_and_is_told_what_happened(run: Path):
    files = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3 and {path.stem for path in files} == {f"run-{(run / 'wandb_id').read_text().strip()}"}
    assert {record.glob_name or record.name for record in read_records(run, "metric")} >= {
        "val/loss",
        "perf/*",
        "optim/*",
    }
    alerts = read_records(run, "alert")
    told = [(alert.title.removeprefix("gpt_nano: "), alert.level) for alert in alerts]
    assert told == [*[("fault", "ERROR"), ("resume", "WARN")] * 2, ("finished", "INFO")]
    settings: dict[str, Any] = {}
    for config in (*(record.config for record in read_records(run, "run")), *read_records(run, "config")):
        settings |= {item.key or item.nested_key[0]: item.value_json for item in config.update}
    assert "optimizer" in settings and "commit" in settings["launch"]
    tables = [row for row in read_wandb(run) if any(key.startswith("samples") for key in row)]
    assert len(tables) == 1
    table = json.loads(next(run.glob("wandb/*/files/media/table/samples*.json")).read_text())
    assert table["data"] == [[25, "Once", " upon a time"]]
    assert not any(CANARY.encode() in path.read_bytes() for path in run.glob("wandb/**/*") if path.is_file())


def traced_collectives(_: None) -> dict[str, float]:
    init_process_group(RankInfo.from_env(), torch.device("cpu"), timeout_seconds=60)
    with torch.profiler.profile() as traced:
        for _ in range(3):
            torch.distributed.all_reduce(torch.ones(2**20))
    return communication_seconds(traced.events(), 1)


def test_the_trace_of_ranks_tells_their_communication():
    for told in run_ranks(traced_collectives, 2, None):
        assert 0 < told["communication_seconds"] < 10
        assert 0 < told["exposed_communication_seconds"] <= told["communication_seconds"]


def test_tensorboard_shows_each_step_once_as_the_files_have_it(run: Path):
    shown, records = read_scalars(run), metrics(run)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, NUM_STEPS + 1))
    for name, key in (("train/loss", "loss"), ("tokens", "tokens"), ("perf/step_seconds", "step_seconds")):
        assert dict(shown[name]) == pytest.approx({record["step"]: record[key] for record in records})


def test_a_reader_of_the_files_knows_of_the_lost_work(run: Path):
    history = read_history(run)
    assert (history.state, history.records[-1]["step"], len(history.launches())) == ("finished", NUM_STEPS, 3)
    assert 0 < history.train_seconds() < history.held_seconds()


def test_a_finished_run_that_is_launched_again_mends_its_files(run: Path):
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole + b'{"step": 301, "lo')
    result = fork("train.py", *COMMAND, cwd=run.parents[1])
    assert result.code == 0 and "is finished at step 300" in result.err
    assert (run / "metrics.jsonl").read_bytes() == whole
