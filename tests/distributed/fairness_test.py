"""Accuracy by group, and of images moved against their label: sums, equal at every engine and world size."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import Inputs
from bigtrain.errors import ConfigError
from bigtrain.tasks.base import split_sums
from bigtrain.tasks.classification import Classification
from tests.distributed.launches import events, fork

ROWS = 120
ARGS = [
    *("+model=cnn_digits", "model.settings.channels=[8,8]", "task=classification", "task.inputs=pixels"),
    *("task.num_labels=3", "data=records", "data.path=rows.npz", "data.validation_fraction=0.4", "train.steps=6"),
    *("train.global_batch_size=12", "optimizer.lr=1e-2", "scheduler.warmup_steps=0", "validation.every_steps=3"),
    *("validation.batches=4", "validation.fgsm=[0.01,0.2]", "task.group_by=region"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with images whose label shows in region 0, and hardly in region 3."""
    directory, random = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    labels, region = random.integers(3, size=ROWS), random.choice([-1, 0, 3], size=ROWS)
    pixels = random.normal(128, 20, size=(ROWS, 1, 8, 8)).astype(np.float32)
    pixels[np.arange(ROWS), 0, labels * 2] += np.where(region == 0, 80, 5)[:, None]
    np.savez(directory / "rows.npz", pixels=pixels, labels=labels, region=region)
    return directory


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, float]:
    result = fork("train.py", *ARGS, "engine=ddp", "run.name=whole", cwd=place)
    assert result.code == 0, result.err
    return events(place / "runs/whole", "validation")[-1]


def numbers(event: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in event.items() if isinstance(value, float)}


def test_groups_and_steps_have_their_accuracy(whole: dict[str, float]):
    assert whole["region_0/accuracy"] > whole["region_3/accuracy"]
    assert whole["region_gap"] == whole["region_0/accuracy"] - whole["region_3/accuracy"]
    assert "region_1/accuracy" not in whole
    assert whole["fgsm_0.2/accuracy"] < whole["fgsm_0.01/accuracy"] <= whole["accuracy"]


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("fsdp", 3), ("zero2", 2), ("zero3", 2)])
def test_they_are_equal_under_all_engines(engine: str, world_size: int, place: Path, whole: dict[str, float]):
    run = f"{engine}-{world_size}"
    result = fork("train.py", *ARGS, f"engine={engine}", f"run.name={run}", cwd=place, world_size=world_size)
    assert result.code == 0, result.err
    found = numbers(events(place / "runs" / run, "validation")[-1])
    assert found == pytest.approx(numbers(whole), abs=1e-5)
    assert {key: value for key, value in found.items() if "accuracy" in key} == pytest.approx(
        {key: value for key, value in numbers(whole).items() if "accuracy" in key}, abs=1e-12
    )


def test_measuring_changes_no_number_of_the_training(place: Path, whole: dict[str, float]):
    plain = [arg for arg in ARGS if not arg.startswith("validation.fgsm")]
    assert fork("train.py", *plain, "engine=ddp", "run.name=plain", cwd=place).code == 0
    lines = [(place / "runs" / run / "metrics.jsonl").read_text().splitlines() for run in ("plain", "whole")]
    assert len(lines[0]) == len(lines[1]) == 6
    assert [events(place / "runs" / run, "validation")[-1]["loss"] for run in ("plain", "whole")] == [whole["loss"]] * 2


def test_a_group_is_counted_apart_from_the_others():
    objective = Classification(inputs=Inputs.features, num_labels=2, group_by="sex")
    network = torch.nn.Linear(1, 2)
    network.eval()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0], [1.0]]))
        network.bias.zero_()
    features = torch.tensor([[1.0], [1.0], [-1.0], [-1.0], [1.0]])
    labels, groups = torch.tensor([1, 0, 0, 1, -100]), torch.tensor([0, 0, 5, -1, 5])
    loss, *flat = objective(network, features, labels, groups).tolist()
    sums = split_sums(objective, flat, held_out=True)
    metrics = objective.metrics(loss, sums)
    assert (metrics["accuracy"], metrics["sex_0/accuracy"], metrics["sex_5/accuracy"]) == (0.5, 0.5, 1.0)
    assert metrics["sex_gap"] == 0.5
    plain = dataclasses.replace(objective, group_by=None)
    assert loss == plain(network, features, labels)[0].item()
    assert loss == pytest.approx(F.cross_entropy(network(features), labels, reduction="sum").item())


def test_what_has_no_groups_or_pixels_is_refused():
    with pytest.raises(ConfigError, match=r"task\.group_by=region: a column of data=records"):
        read_run(["+model=bert_mini", "task=classification", "data.content=labelled", "task.group_by=region"])
    with pytest.raises(ConfigError, match=r"validation\.fgsm: changes pixels against a label"):
        read_run(["+model=gpt_nano", "validation.every_steps=1", "validation.fgsm=[0.1]"])
