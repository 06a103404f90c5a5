"""``launch/parity.py``: what it compares, what it refuses, and its exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.cli import parity
from bigtrain.config import EngineKind, Precision
from bigtrain.errors import ConfigError

LAUNCH = Path(__file__).parents[2] / "launch"

SMALL = [
    "+model=gpt_nano",
    "model.num_layers=1",
    "model.hidden_dim=16",
    "model.vocab_size=64",
    "data=synthetic",
    "data.sequence_length=16",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "steps=3",
]


def run(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LAUNCH / "parity.py"), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=120, check=False)


def test_all_engines_and_two_worlds_are_the_default():
    config = parity.read(["+model=gpt_nano"])
    assert (config.engines, config.worlds, config.steps) == (list(EngineKind), [1, 2], 20)
    assert config.engine.precision is Precision.fp32
    assert (config.model.name, config.data.sequence_length) == ("gpt_nano", 256)


def test_settings_of_the_run_arrive():
    config = parity.read([*SMALL, "engines=[hsdp]", "worlds=[2,4]", "engine.dp_shard=2", "train.seed=7"])
    assert (config.engines, config.worlds, config.engine.dp_shard, config.train.seed) == (
        [EngineKind.hsdp],
        [2, 4],
        2,
        7,
    )


def test_layouts_are_compared_under_the_engines_that_have_them():
    config = parity.read([*SMALL, "parallel.tp=2"])
    assert config.engines == [EngineKind[kind] for kind in ("ddp", "fsdp", "hsdp", "zero1", "zero2")]
    assert config.worlds == [2]
    config = parity.read([*SMALL, "parallel.tp=2", "engines=[fsdp]", "worlds=[4]"])
    assert (config.engines, config.worlds) == ([EngineKind.fsdp], [4]), "and with one process"
    config = parity.read([*SMALL, "parallel.tp=2", "parallel.cp=2"])
    assert (config.engines, config.worlds) == ([EngineKind.ddp, EngineKind.fsdp, EngineKind.hsdp], [4])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["parallel.tp=2", "worlds=[2,3]", "engines=[ddp]"],
            "ddp world 3: parallel.tp=2 does not divide the world size 3; use 2 or 4 ranks",
        ),
        (["parallel.tp=2", "engines=[fsdp,zero3]"], "zero3 world 2: parallel.tp=2: engine=zero3 owns whole parameters"),
        (
            ["worlds=[2,3]", "engines=[ddp,hsdp]", "engine.dp_shard=2"],
            "hsdp world 3: engine.dp_shard=2 does not divide the world size 3",
        ),
        (["engine.offload=cpu", "engines=[ddp,zero2]", "worlds=[1]"], "ddp world 1: engine.offload=cpu is not offered"),
        (["engine=zero2"], "engine=zero2: write 'engines=[zero2]'"),
        (["engine.kind=zero2"], "engine.kind=zero2: write 'engines=[zero2]'"),
        (["engines=[ddp,fdsp]"], "engines[1]: unknown value 'fdsp'; did you mean 'fsdp'?"),
        (["world=[1]"], "world: unknown key; did you mean 'worlds'?"),
        (["train.stpes=1"], "train.stpes: unknown key; did you mean 'train.steps'?"),
        (["worlds=[]"], "nothing to compare"),
        (["worlds=[0]"], "worlds[0]=0: must be at least 1"),
        (["steps=5", "train.steps=4"], "steps=5: must be at most train.steps=4"),
        (["engines=[ddp]", "worlds=[2]"], "nothing to compare"),
        (["engines=[]"], "nothing to compare"),
    ],
)
def test_a_mistake_is_named_with_its_case(args: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        parity.read([*SMALL, *args])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="starts its own processes"):
        parity.read(SMALL)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"worlds=\[1, 2\]: this machine has 1 GPU"):
        parity.run(parity.read(SMALL))


def test_engines_that_agree_end_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    code = parity.run(parity.read([*SMALL, "engines=[ddp,fsdp]", "worlds=[2]", "data.synthetic_ragged=true"]))
    out, err = capsys.readouterr()
    assert code == 0, err
    _, reference, row, verdict = out.splitlines()
    assert "DistributedDataParallel" in reference
    assert "FSDPModule" in row and row.endswith("agrees")
    assert verdict.startswith("all 1 cases agree with ddp world 2 micro 1 in fp32 over 3 steps")
    assert "[1/1] fsdp world 2 micro 1 ... " in err
    assert list(tmp_path.iterdir()) == []


def test_a_case_that_differs_and_one_that_fails_end_with_1(tmp_path: Path):
    # Every rank draws a dropout of its own, and Accelerate is configured for something that is not offered.
    broken = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}
    result = run(*SMALL, "engines=[ddp,accelerate]", "model.dropout=0.5", cwd=tmp_path, **broken)
    assert result.returncode == 1
    verdicts = [line.split()[-1] for line in result.stdout.splitlines()]
    assert verdicts[2:5] == ["DIFFERS", "FAILED", "FAILED"]
    assert "only 0 of 3 cases agree" in result.stdout
    assert "accelerate is configured for ZeRO stage 0" in result.stderr


def test_help_says_what_is_compared(tmp_path: Path):
    help_page = run("--help", cwd=tmp_path).stdout
    for text in ("engines=", "worlds=", "steps=20", "1e-5", "2e-3", "Exit codes"):
        assert text in help_page
