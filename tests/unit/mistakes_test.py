"""What people get wrong on the way to a run: one sentence that says what, where and what would be right."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.checkpoint.store import Origin
from bigtrain.cli import hydra_cli
from bigtrain.config import DataConfig, DataSource, ModelConfig, ModelKind, RunConfig, TrainConfig, WandbMode
from bigtrain.config.check import ignored_settings, resolve
from bigtrain.data.prepare.chat import _read_messages
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.prepare.files import find_files
from bigtrain.errors import CheckpointError, ConfigError, DataError
from bigtrain.models.hf.build import read_hf_config, with_hf_shape
from bigtrain.run.data import elsewhere
from bigtrain.run.directory import locate
from bigtrain.run.inspection import inspect_step
from bigtrain.run.launching import require_place
from bigtrain.run.recovery import Start
from bigtrain.run.sampling import sample_run
from bigtrain.telemetry.wandb_logger import start_wandb

REPOSITORY = Path(__file__).parents[2]


def warned(*args: str) -> list[str]:
    return ignored_settings(hydra_cli.compose_run(TrainConfig, ["+model=gpt_nano", *args]))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("model.rope_theta=5e5", "model.rope_theta is ignored by model.positions=learned"),
        ("model.rope_scaling.factor=8", "model.rope_scaling is ignored by model.positions=learned"),
        ("scheduler=constant scheduler.min_lr_ratio=0.5", "scheduler.min_lr_ratio is ignored by scheduler=constant"),
        ("bad_numbers.spike_window_steps=9", "bad_numbers.spike_window_steps is ignored by bad_numbers.spike_zscore=0"),
        (
            "data=jsonl data.path=x data.content=chat data.text_field=t",
            "data.text_field is ignored by data.content=chat",
        ),
        ("data=text data.path=x data.text_field=t", "data.text_field is ignored by data=text"),
        (
            "data=text data.path=a/b.jsonl",
            "data.path=a/b.jsonl: data=text reads it as plain text; its rows are read by",
        ),
    ],
)
def test_what_has_no_effect_is_named(args: str, told: str):
    (found,) = warned(*args.split())
    assert found.startswith(told)


@pytest.mark.parametrize(
    "args",
    [
        "model.positions=rope model.rope_theta=5e5 model.rope_scaling.factor=8",
        "scheduler.min_lr_ratio=0.5 bad_numbers.spike_window_steps=9 bad_numbers.spike_zscore=6",
        "data=jsonl data.path=x.jsonl data.text_field=t",
    ],
)
def test_what_has_an_effect_is_not(args: str):
    assert warned(*args.split()) == []


def test_what_is_given_twice_is_told(capsys: pytest.CaptureFixture[str]):
    config = hydra_cli.compose_run(TrainConfig, ["+model=gpt_nano", "run.name=a", "run.name=b"])
    assert config.run.name == "b"
    assert "run.name is given 2 times; the last one counts, run.name=b" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"^\+model=gpt_nano \+model=llama3_1b: write one of them$"):
        hydra_cli.compose_run(TrainConfig, ["+model=gpt_nano", "+model=llama3_1b"])


def test_a_split_of_one_file_is_refused_unless_its_name_says_it(tmp_path: Path):
    for name in ("good.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    config = DataConfig(source=DataSource.jsonl, path=str(tmp_path / "good.jsonl"), split="test")
    with pytest.raises(DataError, match="no file is named after a split"):
        find_files(config)
    assert find_files(dataclasses.replace(config, path=str(tmp_path / "test.jsonl"))).files
    assert find_files(dataclasses.replace(config, split="train")).files
    with pytest.raises(DataError, match="no split 'train'"):
        find_files(dataclasses.replace(config, path=str(tmp_path / "test.jsonl"), split="train"))


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": "user", "name": None}])
def test_a_message_without_content_is_named(message: dict[str, None]):
    chat = [{"role": "user", "content": ""}, message]
    with pytest.raises(ValueError, match="field 'messages', message 1 has no content"):
        _read_messages(chat, "messages")
    _read_messages([chat[0], message | {"tool_calls": [{"a": 1}]}], "messages")


def hf_config(directory: Path, **changes: int) -> str:
    shape = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9) | changes
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    return str(directory)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_shape_of_transformers_that_is_none_is_refused(tmp_path: Path, key: str, value: int):
    model = ModelConfig(kind=ModelKind.hf, name=hf_config(tmp_path))
    assert with_hf_shape(model).num_layers == 1
    hf_config(tmp_path, **{key: value})
    with pytest.raises(ConfigError, match=rf"{key}={value}.*must be at least 1|config.json is not read"):
        with_hf_shape(model)


def test_what_is_no_model_directory_is_said_without_the_hub(tmp_path: Path):
    (tmp_path / "x.bin").touch()
    with pytest.raises(ConfigError, match=rf"{tmp_path} has no config.json, which describes a model of transformers$"):
        read_hf_config(str(tmp_path))
    with pytest.raises(ConfigError, match="a file; name the directory"):
        read_hf_config(str(tmp_path / "x.bin"))


def test_runs_that_have_no_checkpoint_are_not_proposed(tmp_path: Path):
    for name in ("empty", "other", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "full" / "checkpoints" / "step-00000002").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        locate(tmp_path / "empty")
    assert str(caught.value).endswith(f"that has one, such as {tmp_path / 'full'}")
    with pytest.raises(CheckpointError, match=rf"of a run; name that, {tmp_path / 'full'}, or one of them"):
        locate(tmp_path / "full" / "checkpoints")


def test_where_no_run_can_be_is_said_before_anything_is_prepared(tmp_path: Path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"{tmp_path / 'file'} is not a directory"):
            require_place(TrainConfig(run=RunConfig(root=str(root), name="x")), Start())
    require_place(TrainConfig(run=RunConfig(root=str(tmp_path / "a" / "b"), name="x")), Start())
    assert not (tmp_path / "a").exists()
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    config = TrainConfig(run=RunConfig(root=str(tmp_path), name="x"))
    with pytest.raises(ConfigError, match=r"model.safetensors is cut off or damaged"):
        require_place(config, Start(Origin(published=str(tmp_path))))


def test_the_data_of_a_run_that_is_looked_at_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    relative = DataConfig(source=DataSource.jsonl, path="../d/good.jsonl")
    told = r"no such file.*data.path=../d/good.jsonl counts from the directory where it"
    with pytest.raises(DataError, match=told), elsewhere(relative):
        find_files(relative)
    absolute = dataclasses.replace(relative, path=str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"as a pattern$"), elsewhere(absolute):
        find_files(absolute)


def test_a_step_beyond_the_run_is_shown_as_such(tmp_path: Path):
    config = TrainConfig(run=RunConfig(root=str(tmp_path), name="x"), data=DataConfig(source=DataSource.synthetic))
    config = resolve(config)
    assert next(inspect_step(config, step=1000, num_samples=1)).endswith("of the run")
    assert next(inspect_step(config, step=1001, num_samples=1)).endswith("which ends at train.steps=1000")


def test_a_mode_of_wandb_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("bigtrain.telemetry.wandb_logger.Companion", lambda *_, **__: None)
    config = TrainConfig()
    config.logging.wandb = WandbMode.auto
    for mode, num_warnings in (("offline", 0), ("ofline", 1)):
        monkeypatch.setenv("WANDB_MODE", mode)
        start_wandb(tmp_path, config)
        assert len(caplog.messages) == num_warnings
    assert caplog.messages == ["WANDB_MODE=ofline: unknown and taken as offline; did you mean 'offline'?"]


def launch(*args: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environ
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_rank_that_is_no_number_is_said_once(tmp_path: Path):
    done = launch("+model=gpt_nano", cwd=tmp_path, RANK="x")
    assert (done.returncode, done.stderr) == (
        2,
        "RANK=x in the environment is no number; a launcher such as torchrun sets it\n",
    )


def test_a_launcher_beside_another_package_says_which_one_runs(tmp_path: Path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "bigtrain").mkdir()
    (tmp_path / "bigtrain" / "__init__.py").touch()
    script = (REPOSITORY / "launch" / "where.py").read_text()
    (tmp_path / "launch" / "where.py").write_text(script)
    told = {}
    for root in (REPOSITORY, tmp_path):
        command = [sys.executable, str(root / "launch" / "where.py"), "--help"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        told[root] = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert told[REPOSITORY].stderr == ""
    assert f"runs the bigtrain of {REPOSITORY}, not of {tmp_path}" in told[tmp_path].stderr


def test_a_source_on_the_fly_without_any_text_is_refused_when_it_is_looked_at(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    path = str(tmp_path / "a.jsonl")
    config = DataConfig(source=DataSource.jsonl, path=path, root=str(tmp_path), on_the_fly=True, tokenizer="bytes")
    with pytest.raises(DataError, match=rf"data=jsonl data.path={path}: none of its documents has text$"):
        prepare(config, progress=False)


def test_a_run_of_which_every_step_was_bad_has_not_finished(tmp_path: Path):
    settings = "data=synthetic engine=ddp model.init_std=1e30 train.steps=2 train.global_batch_size=2"
    done = launch("+model=gpt_nano", *settings.split(), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "all 2 steps of runs/gpt_nano have bad numbers, so nothing was learnt" in done.stderr
    assert "2 samples = 2 x 1 micro-batches x 1 ranks; 512 tokens" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_text_that_ends_where_the_model_does_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * 9}) + "\n" for i in range(4)))
    settings = "data=jsonl data.path=a.jsonl data.tokenizer=bytes engine=ddp model.max_positions=16 train.steps=1"
    done = launch("+model=gpt_nano", *settings.split(), "train.global_batch_size=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    options = {"prompts": ["text"], "num_samples": 1, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}
    for length, told in (
        (3, []),
        (40, ["a text ends where the model does: it takes 16 tokens in all, and the prompt has 4"]),
    ):
        sample_run(tmp_path / "runs" / "gpt_nano", max_new_tokens=length, **options)
        assert caplog.messages == told


def test_helpers_that_are_just_starting_end_without_a_word(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "from bigtrain.cli import hydra_cli\nfrom bigtrain.data.read.workers import Helpers\n"
        "if __name__ == '__main__':\n    Helpers(2)._pool.submit(abs, 1)\n    hydra_cli.leave(2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, "")
