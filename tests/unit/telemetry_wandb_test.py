"""wandb: offline for real, each step once over kills and resumes, and never in the way."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.config import TrainConfig, WandbMode
from bigtrain.telemetry.companion import Companion
from bigtrain.telemetry.files import JsonLines
from bigtrain.telemetry.wandb_logger import forget, has_api_key, start_wandb
from tests.wandb_files import read_history, read_records

CANARY = "hf_CANARYCANARYCANARYCANARY"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


def start(run: Path, said: list[str], mode: WandbMode = WandbMode.auto, **options: object) -> Companion:
    config = TrainConfig()
    config.run.name, config.data.path, config.logging.wandb = "my run", f"s3://u:{CANARY}@bucket", mode
    return start_wandb(run, config, say=said.append, **options)


def write_steps(run: Path, first: int, last: int) -> None:
    file = JsonLines(run / "metrics.jsonl")
    for step in range(first, last + 1):
        loss = float("nan") if step == 3 else 1 / step
        file.write({"step": step, "tokens": step * 10, "loss": loss, "tokens_per_second": 5.0})
    file.close()


def write_event(run: Path, kind: str, **fields: object) -> None:
    file = JsonLines(run / "events.jsonl")
    file.write({"event": kind, **fields})
    file.close()


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_without_a_key_it_is_written_offline_once_per_step_and_without_secrets(tmp_path: Path) -> None:
    run, said = tmp_path / "run", []
    write_steps(run, 1, 5)
    logger = start(run, said)
    write_event(run, "validation", step=5, loss=2.5, perplexity=12.2, time="now")
    wait_until(lambda: len(said) > 0)
    write_steps(run, 6, 8)
    logger.close(timeout_seconds=30)
    assert len(said) == 1 and said[0].startswith(f"wandb: logging offline; upload with: wandb sync {run}")

    # A resumed launch repeats steps 7 and 8 and the validation, and goes on.
    file = JsonLines(run / "metrics.jsonl")
    file.remove(lambda record: record["step"] > 6)
    file.close()
    write_steps(run, 7, 10)
    write_event(run, "validation", step=5, loss=2.5, perplexity=12.2)
    start(run, said).close(timeout_seconds=30)

    rows = read_history(run)
    train = [row for row in rows if "train/loss" in row]
    assert [int(row["step"]) for row in train] == list(range(1, 11))
    assert {"step", "tokens", "train/loss", "perf/tokens_per_second"} <= train[0].keys()
    assert train[2]["train/loss"] == "NaN"
    assert [(row["step"], row["val/loss"], row["val/perplexity"]) for row in rows if "val/loss" in row] == [
        ("5", "2.5", "12.2")
    ]
    files = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and {path.stem for path in files} == {f"run-{(run / 'wandb_id').read_text().strip()}"}
    (run / "wandb_cursor.json").unlink()  # without the cursor they would be there twice
    start(run, said).close(timeout_seconds=30)
    assert [int(row["step"]) for row in read_history(run) if "train/loss" in row] == [*range(1, 11), *range(1, 11)]
    written = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert b"my run" in files[0].read_bytes() and not any(b"CANARY" in data for data in written)


def test_a_killed_training_process_leaves_every_step_logged_and_no_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from telemetry_wandb_test import start, write_steps
        logger = start(Path(sys.argv[1]), said := [])
        write_steps(Path(sys.argv[1]), 1, 20)
        while not said:
            time.sleep(0.1)
        time.sleep(0.5)  # it follows the files by now
        print(logger._process.pid, flush=True)
        time.sleep(60)
        """
    )
    command = [sys.executable, "-c", script, run, str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    companion = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (run / "failure.json").write_text('{"kind": "hang", "summary": "rank 3 on n1, in data of step 20: hung"}')
    wait_until(lambda: not Path(f"/proc/{companion}/cmdline").exists() or not has_command_line(companion))
    assert [int(row["step"]) for row in read_history(run)] == list(range(1, 21))
    (alert,) = read_records(run, "alert")
    assert (alert.title, alert.level) == ("my run: hang", "ERROR") and "rank 3 on n1" in alert.text


def has_command_line(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # a zombie that nobody reaps has none
    except OSError:
        return False


@pytest.mark.parametrize(
    "program",
    ["import time; time.sleep(600)", "import sys, time; sys.stdin.read(); time.sleep(600)"],
    ids=["never listens", "never ends"],
)
def test_a_wandb_that_hangs_delays_nothing(tmp_path: Path, program: str) -> None:
    said = []
    logger = start(tmp_path, said, command=(sys.executable, "-c", program))
    logger.close(timeout_seconds=0.2)
    assert logger._process.poll() is None, "nobody has waited for its end"
    assert len(said) == 1 and "still busy in the background" in said[0] and "wandb sync" in said[0]
    logger._process.kill()
    logger._listener.join(10)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((sys.executable, "-c", "raise SystemExit(3)"), "wandb: stopped; the run goes on without"),
        (("/nonexistent/python",), "wandb: cannot start it"),
    ],
)
def test_a_wandb_that_fails_costs_one_message(tmp_path: Path, command: tuple[str, ...], message: str) -> None:
    said = []
    logger = start(tmp_path, said, command=command)
    logger.close(timeout_seconds=10)
    assert len(said) == 1 and said[0].startswith(message)


@pytest.mark.parametrize(
    ("mode", "environ", "message"),
    [
        (WandbMode.online, {}, "wandb: logging.wandb=online, but there is no key"),
        (WandbMode.auto, {"WANDB_MODE": "disabled"}, "wandb: switched off by WANDB_MODE"),
        (WandbMode.auto, {"WANDB_DISABLED": "true"}, "wandb: switched off by WANDB_MODE or WANDB_DISABLED"),
    ],
)
def test_a_mode_that_cannot_be_had_is_told_and_never_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: WandbMode, environ: dict[str, str], message: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    said = []
    start(tmp_path, said, mode).close(timeout_seconds=30)
    assert said[0].startswith(message)
    assert len(said) == 1 or "logging offline" in said[1]


def test_wandbs_own_variables_hold_where_no_setting_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"WANDB_PROJECT": "mine", "WANDB_ENTITY": "team", "WANDB_NAME": "shown", "WANDB_RUN_GROUP": "sweep"}
    for name, value in {
        **wanted,
        "WANDB_TAGS": "a,b",
        "WANDB_MODE": "dryrun",
        "WANDB_DIR": str(tmp_path / "x"),
    }.items():
        monkeypatch.setenv(name, value)
    said = []
    start(tmp_path, said).close(timeout_seconds=30)
    assert said[0] == "wandb: WANDB_DIR is not used: its files go to wandb/ in the run"
    (run,) = read_records(tmp_path, "run")[:1]
    assert (run.project, run.entity, run.display_name, run.run_group) == tuple(wanted.values())
    assert list(run.tags) == ["a", "b"]


def test_a_server_that_is_away_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    program = (
        "import sys; from bigtrain.telemetry import wandb_logger as w; w._INIT_SECONDS = 3; sys.exit(w._companion())"
    )
    run, said = tmp_path / "run", []
    logger = start(run, said, command=(sys.executable, "-c", program))
    write_steps(run, 1, 5)
    logger.close(timeout_seconds=30)
    assert len(said) == 2 and said[0].startswith("wandb: cannot log online (")
    assert said[1].startswith("wandb: logging offline; upload with: wandb sync ")
    assert [int(row["step"]) for row in read_history(run)] == [1, 2, 3, 4, 5]


def test_an_export_becomes_an_artifact_of_the_run(tmp_path: Path) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    run.mkdir()
    (run / "wandb_id").write_text("abcd1234\n")
    script = (
        "import sys, wandb; from datetime import *; from pathlib import Path; from bigtrain.config import *; "
        "from bigtrain.telemetry.wandb_logger import log_export; config = TrainConfig(); config.run.name = 'first'; "
        "times = [datetime.now() + timedelta(seconds=n) for n in range(3)]; "  # the names that wandb would give now
        "[Path(sys.argv[1], f'wandb/offline-run-{t:%Y%m%d_%H%M%S}-abcd1234').mkdir(parents=True) for t in times]; "
        "print(log_export(Path(sys.argv[1]), Path(sys.argv[2]), config, WandbMode.offline, 7))"
    )
    command = [sys.executable, "-c", script, run, exported]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1].startswith("offline; upload with: wandb sync ")
    assert len(list(run.glob("wandb/offline-run-*"))) == 4, "it has taken no other one's directory"
    (artifact,) = read_records(run, "artifact")
    assert (artifact.name, artifact.type) == ("first-export", "model")
    assert [entry.path for entry in artifact.manifest.contents] == ["config.json"]
    assert [record.run_id for record in read_records(run, "run")] == ["abcd1234"]


def test_a_key_is_found_where_wandb_login_leaves_it(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert not has_api_key(environ)
    (tmp_path / ".netrc").write_text("machine other.example login user password x\n")
    assert not has_api_key(environ)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_api_key(environ)
    assert not has_api_key({**environ, "WANDB_BASE_URL": "https://wandb.example"})
    assert not has_api_key({**environ, "NETRC": str(tmp_path / "missing")})
    assert has_api_key({"HOME": "/nonexistent", "WANDB_API_KEY": "x"})


def test_a_training_that_begins_anew_begins_a_new_wandb_run(tmp_path: Path) -> None:
    (tmp_path / "wandb_id").write_text("old\n")
    (tmp_path / "wandb_cursor.json").write_text("{}")
    forget(tmp_path)
    forget(tmp_path)
    assert list(tmp_path.iterdir()) == []
