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
SHORT = ["train.steps=6", "validation.every_steps=3", "optimizer.lr=1e-2", "scheduler.warmup_steps=0"]
GROUPS = [
    *("+model=mlp_digits", "model.settings={num_inputs:8,hidden_dims:[8]}", "task=classification", "task.num_labels=3"),
    *("data=records", "data.path=rows.npz", "data.validation_fraction=0.4", "train.global_batch_size=12"),
    *("validation.batches=4", "task.group_by=region", "run.name=groups", *SHORT),
]
ATTACKED = [
    *("+model=cnn_digits", "model.settings.channels=[8,8]", "data=digits", "task=classification", "task.num_labels=10"),
    *("train.global_batch_size=64", "validation.batches=2", "validation.fgsm=[0.01,0.2]", "run.name=attacked", *SHORT),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with rows whose label shows in region 0, and hardly in region 3."""
    directory, random = tmp_path_factory.mktemp("rows"), np.random.default_rng(0)
    labels, region = random.integers(3, size=ROWS), random.choice([-1, 0, 3], size=ROWS)
    features = random.normal(size=(ROWS, 8)).astype(np.float32)
    features[np.arange(ROWS), labels * 2] += np.where(region == 0, 4, 0.2)
    np.savez(directory / "rows.npz", features=features, labels=labels, region=region)
    return directory


def measured(place: Path, args: list[str], engine: str, world_size: int = 1) -> dict[str, float]:
    root = f"run.root=runs/{engine}-{world_size}"
    result = fork("train.py", *args, root, f"engine={engine}", cwd=place, world_size=world_size)
    assert result.code == 0, result.err
    name = next(arg for arg in args if arg.startswith("run.name=")).removeprefix("run.name=")
    event = events(place / root.removeprefix("run.root=") / name, "validation")[-1]
    return {key: value for key, value in event.items() if isinstance(value, float)}


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[dict[str, float], dict[str, float]]:
    return measured(place, GROUPS, "ddp"), measured(place, ATTACKED, "ddp")


def test_groups_and_steps_have_their_accuracy(whole: tuple[dict[str, float], dict[str, float]]):
    groups, attacked = whole
    assert groups["region_0/accuracy"] > groups["region_3/accuracy"]
    assert groups["region_gap"] == groups["region_0/accuracy"] - groups["region_3/accuracy"]
    assert "region_1/accuracy" not in groups
    assert attacked["fgsm_0.2/accuracy"] < attacked["fgsm_0.01/accuracy"] <= attacked["accuracy"]


LATER = [pytest.param(*case, marks=pytest.mark.slow) for case in (("fsdp", 3), ("zero2", 2))]


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("zero3", 2), *LATER])
def test_they_are_equal_under_all_engines(
    engine: str, world_size: int, place: Path, whole: tuple[dict[str, float], dict[str, float]]
):
    for args, expected in zip((GROUPS, ATTACKED), whole, strict=True):
        found = measured(place, args, engine, world_size)
        assert found == pytest.approx(expected, abs=1e-5)


def test_measuring_changes_no_number_of_the_training(place: Path, whole: tuple[dict[str, float], dict[str, float]]):
    plain = [arg for arg in ATTACKED if not arg.startswith(("validation.fgsm", "run.name"))]
    found = measured(place, [*plain, "run.name=plain"], "ddp")
    assert found == {key: value for key, value in whole[1].items() if not key.startswith("fgsm")}


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
    with pytest.raises(ConfigError, match=r"validation\.fgsm: it is for task=classification of data=images"):
        read_run(["+model=gpt_nano", "validation.every_steps=1", "validation.fgsm=[0.1]"])
