"""The directory of a run: where it is, what is in it, and which checkpoint a launch continues from."""

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import RunState, checkpoint_path
from bigtrain.config import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    Load,
    ModelConfig,
    OptimizerKind,
    RopeScalingConfig,
    RunConfig,
    TrainConfig,
)
from bigtrain.config.check import resolve
from bigtrain.config.convert import to_dict
from bigtrain.distributed.collectives import init_process_group, shut_down
from bigtrain.engine.state import MODEL, whole_entry
from bigtrain.errors import CheckpointError, UnreadableError
from bigtrain.processes import RankInfo
from bigtrain.run.directory import (
    find_resume,
    keep_tokenizer,
    locate,
    read_config,
    write_config,
)
from bigtrain.telemetry.files import JsonLines, read_jsonl


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    init_process_group(RankInfo(0, 1, 0, 1), torch.device("cpu"))
    yield
    shut_down()


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return resolve(
        TrainConfig(
            run=RunConfig(root=str(tmp_path / "runs"), name="first"),
            model=ModelConfig(name="small", hidden_dim=24, num_heads=3),
            data=DataConfig(source=DataSource.synthetic),
        )
    )


def save(config: TrainConfig, *steps: int) -> list[Path]:
    """Save a checkpoint of one tensor at every step."""
    directory = config.run.directory
    saver = Saver(directory, {f"{MODEL}w": whole_entry(torch.arange(6.0))}, CheckpointConfig(keep="all"))
    for step in steps:
        saver.save(RunState(step, 0, 0, "synthetic", to_dict(config), {}, 1))
        report = saver.finish()
        assert report
        assert report.error is None
    return [checkpoint_path(directory, step) for step in steps]


def damage(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def with_resume(config: TrainConfig, resume: str, **run: str) -> TrainConfig:
    checkpoint = dataclasses.replace(config.checkpoint, resume=resume)
    return dataclasses.replace(config, checkpoint=checkpoint, run=dataclasses.replace(config.run, **run))


# Files


def test_the_directory_follows_from_root_and_name(config: TrainConfig, tmp_path: Path):
    assert config.run.directory == tmp_path / "runs/first"


def test_the_configuration_comes_back(config: TrainConfig):
    directory = config.run.directory
    write_config(directory, config)
    assert read_config(directory) == config
    write_config(directory, dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7)))
    assert read_config(directory).train.steps == 7
    assert [path.name for path in directory.iterdir()] == ["config.yaml"]


def test_a_failed_write_leaves_the_old_configuration(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    directory = config.run.directory
    write_config(directory, config)

    def full_disk(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_config(directory, config)
    assert read_config(directory) == config


def test_secrets_are_not_written(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "a-secret-canary")
    config.data.path = "s3://user:another-canary@host/a-secret-canary"
    write_config(config.run.directory, config)
    text = (config.run.directory / "config.yaml").read_text()
    assert "canary" not in text
    assert "s3://***@host" in text


def test_a_directory_without_a_configuration_is_not_a_run(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a run: it has no config\.yaml"):
        read_config(tmp_path / "nowhere")


def test_tokenizer_and_index_are_kept(tmp_path: Path):
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    for directory in (corpus, run):
        directory.mkdir()
    for name in ("index.json", "tokenizer.json", "train.bin"):
        (corpus / name).write_text(name)
    keep_tokenizer(run, corpus)
    assert {path.name: path.read_text() for path in run.iterdir()} == {
        "index.json": "index.json",
        "tokenizer.json": "tokenizer.json",
    }


def test_a_run_means_its_newest_checkpoint(config: TrainConfig):
    first, second = save(config, 9, 10)
    assert locate(config.run.directory) == (config.run.directory, second)
    assert locate(first) == (config.run.directory, first)


def test_what_a_kill_left_is_no_checkpoint(config: TrainConfig):
    (whole,) = save(config, 9)
    shutil.copytree(whole, whole.with_name("step-00000012.tmp-0123abcd"))
    assert locate(config.run.directory)[1] == whole
    shutil.rmtree(whole)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        locate(config.run.directory)


# Which checkpoint a launch continues from


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_run_has_none(resume: str, config: TrainConfig):
    assert find_resume(with_resume(config, resume)) is None


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_the_newest_is_found(resume: str, config: TrainConfig):
    *_, newest = save(config, 8, 9, 10)
    assert find_resume(with_resume(config, resume)) == newest


def test_never_and_must_refuse(config: TrainConfig):
    with pytest.raises(CheckpointError, match=r"resume=must, but .*runs/first has no complete checkpoint"):
        find_resume(with_resume(config, "must"))
    save(config, 5)
    with pytest.raises(CheckpointError, match=r"resume=never, but .*step-00000005 exists; choose another run\.name"):
        find_resume(with_resume(config, "never"))


def record(directory: Path, *records: dict[str, object]) -> None:
    events = JsonLines(directory / "events.jsonl")
    for event in records:
        events.write(event)
    events.close()


def saved(step: int) -> dict[str, object]:
    return {"event": "checkpoint", "step": step, "path": f"runs/first/checkpoints/step-{step:08d}"}


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew_by_itself(
    config: TrainConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("bigtrain"), "propagate", True)
    directory = config.run.directory
    record(directory, {"event": "start", "step": 0}, saved(4), saved(8), {"event": "fault", "step": 9})
    place = directory / "checkpoints"
    for where in (f"{place} is not there", f"{place} has no checkpoint now", f"{place} is a link to away, which"):
        for resume in ("auto", "must", "elsewhere"):
            with pytest.raises(CheckpointError, match=rf"first had saved step 8, but {re.escape(where)}") as caught:
                find_resume(with_resume(config, resume))
            assert "checkpoint.resume=never starts anew" in str(caught.value) and "\n" not in str(caught.value)
        assert find_resume(with_resume(config, "never")) is None
        assert "starts anew at step 0, and its metrics too" in caplog.text
        if place.is_dir():
            place.rmdir()
            place.symlink_to("away")
        elif not place.is_symlink():
            place.mkdir()


@pytest.mark.parametrize(
    "events",
    [
        [{"event": "start", "step": 0}],
        [{"event": "start"}, saved(4), {"event": "start"}],
        [{"event": "start"}, saved(8), {"event": "rollback", "step": 9, "first_bad_step": 7, "checkpoint": ""}],
        [{"event": "resume", "step": 60, "checkpoint": "seed"}, {"event": "checkpoint_failed", "step": 64}],
    ],
    ids=["killed before its first", "begun anew", "gone back to its beginning", "seeded, killed before its first"],
)
def test_a_run_that_has_saved_nothing_starts_again_by_itself(events: list[dict[str, object]], config: TrainConfig):
    record(config.run.directory, *events)
    assert find_resume(config) is None


@pytest.mark.parametrize(("code", "starts"), [(0, False), (75, False), (1, True), (2, True)])
def test_without_events_the_last_word_of_the_run_counts(code: int, starts: bool, config: TrainConfig):
    config.run.directory.mkdir(parents=True)
    (config.run.directory / "exit.json").write_text(json.dumps({"code": code, "step": 9, "attempt": 1}))
    if starts:
        assert find_resume(config) is None
    else:
        with pytest.raises(CheckpointError, match="had saved step 9"):
            find_resume(config)


def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    save(config, 5)

    def stale(path: Path) -> list[str]:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(os, "listdir", stale)
    with pytest.raises(UnreadableError, match="checkpoints: cannot be read: Stale file handle"):
        find_resume(config)


def test_a_path_starts_another_run_which_then_has_its_own(config: TrainConfig):
    first, second = save(config, 5, 6)
    for path, expected in ((config.run.directory, second), (first, first)):
        assert find_resume(with_resume(config, str(path), name="second")) == expected
    (own,) = save(with_resume(config, "auto", name="second"), 7)
    assert find_resume(with_resume(config, str(first), name="second")) == own


def test_a_path_without_a_checkpoint_is_refused(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # the checkout may have runs, as after make demo
    with pytest.raises(CheckpointError, match="elsewhere: there is no such directory; give auto, never, must"):
        find_resume(with_resume(config, str(tmp_path / "elsewhere")))
    with pytest.raises(CheckpointError, match=r"has no complete checkpoint; name the directory of a run that has one$"):
        find_resume(with_resume(config, str(tmp_path)))


def test_a_newer_checkpoint_that_is_gone_is_told(
    config: TrainConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("bigtrain"), "propagate", True)
    older, newer = save(config, 4, 8)
    record(config.run.directory, {"event": "start", "step": 0}, saved(4), saved(8))
    assert find_resume(config) == newer and caplog.text == ""
    shutil.rmtree(newer)
    assert find_resume(config) == older
    assert f"step 8 was saved too, and is not there any more; continuing from {older}" in caplog.text


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    config: TrainConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("bigtrain"), "propagate", True)
    older, newer = save(config, 5, 6)
    damage(newer)
    assert find_resume(config) == older
    assert "damaged checkpoint, set aside as" in caplog.text
    assert str(newer) in caplog.text
    assert not newer.exists()
    assert find_resume(config) == older
    (event,) = read_jsonl(config.run.directory / "events.jsonl")
    assert event["event"] == "damaged_checkpoint"
    assert event["path"].startswith(f"{newer}")
    assert any("safetensors" in problem for problem in event["problems"])


def test_a_run_with_damaged_checkpoints_only_does_not_start_anew(config: TrainConfig):
    for path in save(config, 5, 6):
        damage(path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
            find_resume(config)


def test_another_runs_damaged_checkpoint_is_refused_and_left_alone(config: TrainConfig):
    (path,) = save(config, 5)
    damage(path)
    with pytest.raises(CheckpointError, match="damaged"):
        find_resume(with_resume(config, str(path), name="second"))
    assert path.exists()


def test_settings_that_did_not_exist_when_it_was_saved_are_no_difference(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
):
    values = to_dict(config)
    for key in ("settings", "architecture", "norm_eps"):
        del values["model"][key]
    del values["task"]
    monkeypatch.setitem(globals(), "to_dict", lambda _: values)
    (path,) = save(config, 2)
    assert find_resume(config) == path
    config.model.norm_eps = 1e-3
    with pytest.raises(CheckpointError, match=r"model\.norm_eps: 1e-05 in the checkpoint, 0\.001 now"):
        find_resume(config)


@pytest.mark.parametrize("field", ["name", "dropout", "init_std"])
def test_what_is_no_part_of_the_shape_may_change(field: str, config: TrainConfig):
    (path,) = save(config, 5)
    changed = dataclasses.replace(config.model, **{field: "other" if field == "name" else 0.5})
    assert find_resume(dataclasses.replace(config, model=changed)) == path


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ({}, {"kind": OptimizerKind.sgd}, "optimizer.kind: adamw in the checkpoint, sgd now"),
        ({"kind": OptimizerKind.muon}, {}, "optimizer.kind: muon in the checkpoint, adamw now"),
        ({"kind": OptimizerKind.sgd}, {"kind": OptimizerKind.sgd, "betas": [0.0, 0.95]}, "optimizer.betas[0]: 0.9 in"),
    ],
)
def test_another_optimizer_is_refused_with_the_way_out(
    old: dict[str, Any], new: dict[str, Any], what: str, config: TrainConfig
):
    (path,) = save(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **old)), 5)
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **new))
    with pytest.raises(CheckpointError, match=re.escape(f"another optimizer ({what}")) as caught:
        find_resume(other)
    assert str(caught.value).endswith(f"checkpoint.resume={path} checkpoint.load=weights")
    assert "\n" not in str(caught.value)
    seeded = with_resume(other, str(path), name="second")
    seeded.checkpoint.load = Load.weights
    assert find_resume(seeded) == path
    # Its own checkpoints are loaded whole, whatever the command says.
    save(with_resume(config, "auto", name="second"), 7)
    if old == {}:
        with pytest.raises(CheckpointError, match="another optimizer"):
            find_resume(seeded)


def test_rates_of_the_optimizer_may_change(config: TrainConfig):
    (path,) = save(config, 5)
    changed = dataclasses.replace(config.optimizer, lr=1.0, betas=[0.0, 0.5], weight_decay=0.0)
    assert find_resume(dataclasses.replace(config, optimizer=changed)) == path


def test_another_shape_is_refused_with_all_differences(config: TrainConfig):
    save(config, 5)
    model = dataclasses.replace(config.model, num_layers=7, bias=False)
    with pytest.raises(CheckpointError) as caught:
        find_resume(dataclasses.replace(config, model=model))
    assert str(caught.value).splitlines()[1:] == [
        "  model.num_layers: 4 in the checkpoint, 7 now",
        "  model.bias: True in the checkpoint, False now",
    ]


def test_scaled_positions_of_before_they_had_a_kind_are_the_same(config: TrainConfig, monkeypatch: pytest.MonkeyPatch):
    def scaled(factor: float) -> TrainConfig:
        model = dataclasses.replace(config.model, rope_scaling=RopeScalingConfig(factor=factor))
        return dataclasses.replace(config, model=model)

    older = to_dict(scaled(8.0))
    del older["model"]["rope_scaling"]["kind"]
    monkeypatch.setattr(sys.modules[__name__], "to_dict", lambda _: older)
    (path,) = save(config, 5)
    assert find_resume(scaled(8.0)) == path
    with pytest.raises(CheckpointError, match=r"model\.rope_scaling\.factor: 8\.0 in the checkpoint, 9\.0 now"):
        find_resume(scaled(9.0))


def test_configuration_files_are_yaml_of_plain_values(config: TrainConfig):
    write_config(config.run.directory, config)
    values = yaml.safe_load((config.run.directory / "config.yaml").read_text())
    assert values["data"]["source"] == "synthetic"
    assert values["model"]["head_dim"] == 8
