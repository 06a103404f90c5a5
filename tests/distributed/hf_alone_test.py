"""A run of a Hugging Face model goes on after its base is gone and it was moved, from another directory."""

import json
import shutil
from pathlib import Path

import pytest

from bigtrain.config import Precision
from bigtrain.run.evaluation import validate_run
from bigtrain.run.export import export
from bigtrain.run.sampling import sample_run
from tests.distributed.launches import Result, fork, metrics
from tests.unit.hf_base_test import differences, write_base

SETTINGS = [
    *("+model=hf", "model.pretrained=true", "model.name=base", "data=jsonl", "data.sequence_length=16", "engine=ddp"),
    *(
        "run.name=x",
        "train.global_batch_size=2",
        "optimizer.lr=1e-30",
        "scheduler=constant",
        "scheduler.warmup_steps=0",
    ),
    *("validation.batches=1", "data.validation_fraction=0.3", "train.log_every_steps=1"),
]


ALL_TOKENS = {"top_k": None, "top_p": None, "seed": 0}


def test_a_run_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    write_base(first / "base")
    lines = [json.dumps({"text": f"text {i} of sixty, which is not very long"}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    data = [f"data.path={tmp_path}/text.jsonl", f"data.root={tmp_path}/data"]

    def run(script: str, *args: str, cwd: Path) -> Result:
        result = fork(script, *args, cwd=cwd)
        assert result.code == 0, result.err
        return result

    run("train.py", *SETTINGS, *data, "train.steps=1", cwd=first)
    shutil.copytree(first / "runs/x", first / "runs/stays")
    run("train.py", *SETTINGS, *data, "train.steps=2", "run.name=stays", cwd=first)

    shutil.move(first / "runs/x", second / "moved/x")
    shutil.move(first / "base", tmp_path / "gone")
    corpora = sorted((tmp_path / "data").iterdir())
    run("train.py", *SETTINGS, *data, "train.steps=2", "run.root=moved", cwd=second)
    assert sorted((tmp_path / "data").iterdir()) == corpora, "the corpus was prepared again"
    moved, stayed = (metrics(directory) for directory in (second / "moved/x", first / "runs/stays"))
    keys = ("step", "loss", "grad_norm", "data_digest")
    assert [[r[k] for k in keys] for r in moved] == [[r[k] for k in keys] for r in stayed]
    assert "model:\n  name: base\n" in (second / "moved/x/config.yaml").read_text(), "the run's own place is no setting"

    monkeypatch.chdir(tmp_path)
    path = Path("second/moved/x")
    assert sample_run(path, ["text"], num_samples=1, max_new_tokens=4, temperature=0, **ALL_TOKENS)
    assert validate_run(path).metrics["loss"] > 0
    export(path, Path("out"), precision=Precision.fp32, max_shard_bytes=10**9)
    assert differences(Path("gone"), Path("out"), same_values=True) == []

    # Another model under its name is refused.
    write_base(second / "base", rms_norm_eps=0.1)
    refused = fork("train.py", *SETTINGS, *data, "train.steps=4", "run.root=moved", cwd=second)
    assert refused.code == 2
    assert "rms_norm_eps differ: choose another run.name" in refused.err

    # So is one that lacks a file, before anything is prepared.
    (second / "base/model.safetensors").rename(second / "base/pytorch_model.bin")
    refused = fork("train.py", *SETTINGS, f"data.path={tmp_path}/text.jsonl", "run.name=new", cwd=second)
    assert (refused.code, refused.err.count("\n")) == (2, 1) and not (second / "data").exists()
    assert refused.err.startswith(
        "base has no model.safetensors, only pytorch_model.bin; only safetensors files are read"
    )
