"""Canaries: no secret of the environment or the command line is in any file that a run writes, or in what it says."""

import base64
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bigtrain.config import TrainConfig
from bigtrain.run import launching
from tests.distributed.launches import LAUNCH, SMALL, TRAIN, Launch, Result, environment, fork, launch, num_steps

ENVIRONMENT = {
    "WANDB_API_KEY": "c0ffee00canary1234567890abcdef1234567890",
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanaryCana",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARYCAN1",
    "AWS_SECRET_ACCESS_KEY": "canary/wJalrXUtnFEMI/K7MDENG/bPxRfiCY",
    "AWS_SESSION_TOKEN": "canarySessionTokenFwoGZXIvYXdzEBY",
}
PASSWORD = "canaryhunter2"
SECRETS = [*ENVIRONMENT.values(), PASSWORD]
# Settings in which people put secrets by mistake.
CARELESS = [
    f"data.path=https://me:{PASSWORD}@host.example/corpus",
    f"data.split={ENVIRONMENT['WANDB_API_KEY']}",
]


def found(data: bytes) -> list[str]:
    """Return the secrets in ``data``, as they are or in base64."""
    forms = {secret: (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"=")) for secret in SECRETS}
    return [secret for secret, encoded in forms.items() if any(form in data for form in encoded)]


def leaks(directory: Path) -> dict[str, list[str]]:
    """Return the files below ``directory`` that hold a secret, by content or by name."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    assert len(paths) > 5
    contents = {str(path): path.read_bytes() + str(path).encode() for path in paths}
    return {path: secrets for path, data in contents.items() if (secrets := found(data))}


def said(result: Result) -> list[str]:
    return found(f"{result.out}\n{result.err}".encode())


@pytest.mark.parametrize("where", ["config.yaml", "log/train.log"])
def test_a_canary_in_a_file_is_found(where: str, tmp_path: Path):
    for i in range(6):
        (tmp_path / str(i)).write_text("nothing")
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"token: {base64.b64encode(ENVIRONMENT['HF_TOKEN'].encode()).decode()}")
    assert leaks(tmp_path) == {str(path): [ENVIRONMENT["HF_TOKEN"]]}


def test_no_file_of_a_run_and_no_command_line_holds_a_secret(tmp_path: Path):
    run = tmp_path / "runs/gpt_nano"
    training = [*SMALL, "train.steps=1000000", "validation.every_steps=4", "logging=wandb", "logging.wandb=offline"]
    with Launch([sys.executable, TRAIN, *training], tmp_path, **ENVIRONMENT) as running:
        running.wait_until(lambda: num_steps(run) >= 4)
        process = psutil.Process(running.process.pid)
        lines = [" ".join(p.cmdline()) for p in [process, *process.children(recursive=True)]]
        process.send_signal(signal.SIGTERM)
        assert running.result().code == 75
    assert len(lines) >= 2  # the companion of wandb
    assert found("\n".join(lines).encode()) == []
    # Settings that have changed are named when the run goes on.
    end = ["run.stop_after_steps=4", *CARELESS]
    result = fork("train.py", *training, *end, cwd=tmp_path, world_size=2, env=ENVIRONMENT)
    assert result.code == 75, result
    for written in ("config.yaml", "events.jsonl", "log/train.log", "wandb"):
        assert (run / written).exists()
    assert leaks(tmp_path) == {}
    assert "changed since the checkpoint: data.path" in f"{result.out}{result.err}"
    assert said(result) == []


def test_what_is_said_of_a_mistake_holds_no_secret(tmp_path: Path):
    data = ["data=text", "data.tokenizer=bytes", "model.vocab_size=300"]
    data.append(f"data.path=https://me:{PASSWORD}@host.example/books")
    result = launch([sys.executable, TRAIN, *SMALL, *data], tmp_path, **ENVIRONMENT)
    assert result.code == 2, result
    assert "host.example/books" in result.err
    assert said(result) == []
    result = launch([sys.executable, TRAIN, *SMALL, f"data.source={ENVIRONMENT['HF_TOKEN']}"], tmp_path, **ENVIRONMENT)
    assert result.code == 2, result
    assert said(result) == []


def test_a_fault_is_shown_without_secrets(tmp_path: Path):
    script = tmp_path / "fault.py"
    script.write_text(
        "from bigtrain.cli import hydra_cli\n"
        f"def run(config): raise RuntimeError('cannot reach https://me:{PASSWORD}@host.example')\n"
        "hydra_cli.main(hydra_cli.read_run, run, lambda: '')\n"
    )
    result = launch([sys.executable, str(script), *SMALL], tmp_path, **ENVIRONMENT)
    assert result.code == 1
    assert "RuntimeError: cannot reach https://***@host.example" in result.err
    assert said(result) == []


def test_what_torchrun_shows_of_a_fault_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bigtrain.cli import train

    def fail(config: TrainConfig) -> int:
        raise RuntimeError(f"cannot reach https://me:{PASSWORD}@host.example")

    monkeypatch.setattr(launching, "run", fail)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(RuntimeError):
        train.run(TrainConfig())
    shown = json.loads((tmp_path / "error.json").read_text())["message"]
    assert shown["message"] == "RuntimeError: cannot reach https://***@host.example"
    assert "in fail" in shown["extraInfo"]["py_callstack"]
    assert PASSWORD not in str(shown)


def test_a_job_for_slurm_holds_no_secret(tmp_path: Path):
    submit = [sys.executable, str(LAUNCH / "submit.py"), "+model=gpt_nano", "cluster=slurm_cpu"]
    env = environment(**ENVIRONMENT, PATH="/nowhere")
    plain = subprocess.run(submit, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "no sbatch here" in plain.stderr
    script = (tmp_path / "runs/gpt_nano/job.sbatch").read_text()
    assert "exec bash" in script
    assert found(script.encode()) == []
    careless = subprocess.run(
        [*submit, *CARELESS], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert careless.returncode == 2
    assert found(f"{careless.stdout}{careless.stderr}".encode()) == []
