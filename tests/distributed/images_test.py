"""Images, augmented and mixed: the run of one process at every world size, and continued elsewhere the same run."""

import base64
import json
import os

import numpy as np
import pytest

import bigtrain
from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import EngineKind
from bigtrain.data.read.images import Augmentation
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.run.directory import label_names
from bigtrain.run.inspection import inspect_run
from bigtrain.run.step import train_step
from bigtrain.telemetry.history import read_history
from bigtrain.telemetry.report import render
from bigtrain.testing.parity import Case, compare, compute, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.tasks_test import RUN, assert_continues_elsewhere, launch, records

Image = pytest.importorskip("PIL.Image")
SETTINGS = [
    *("+model=cnn_digits", "model.settings.channels=[8,8]", "model.settings.dense_dim=16", "task=classification"),
    *("task.num_labels=3", "model.settings.num_outputs=3", "data=images", "data.validation_fraction=0.2", *RUN),
    *("data.augment.crop_padding=1", "data.augment.flip=true", "data.augment.rotation=15", "data.augment.mixup=0.4"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """60 images in three directories."""
    place = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(60):
        directory = place / "pictures" / f"class{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(directory / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def given(place):
    return [*SETTINGS, f"data.path={place}/pictures", f"data.root={place}/data", f"run.root={place}/runs"]


def trace_with_augmentation_of_the_rank(config, *args):
    """Break the promise: each rank draws its own crops."""
    right = Augmentation._hash
    Augmentation._hash = lambda self, purpose, places: right(self, purpose, places + int(os.environ["RANK"]))
    return trace(config, *args)


def test_engines_and_worlds_agree_and_augmentation_of_the_rank_is_seen(given):
    config = read_run(given)
    reference = compute(config, Case(EngineKind.ddp, 1, 2))
    assert len(set(reference.losses)) == 4
    for case in (Case(EngineKind.fsdp, 2, 1), Case(EngineKind.zero2, 3, 2), Case(EngineKind.ddp, 3, 4)):
        difference = compare(compute(config, case), reference)
        print(case, difference)
        assert difference.loss <= 1e-6 and difference.grad_norm <= 1e-5, case
    wrong = configure(config, Case(EngineKind.ddp, 2, 1))
    found = run_ranks(trace_with_augmentation_of_the_rank, 2, wrong, train_step, None, timeout_seconds=200)[0]
    assert compare(found, reference).loss > 1e-3


@pytest.mark.slow
def test_continued_elsewhere_it_is_the_same_run_with_the_same_metrics(given, place):
    assert_continues_elsewhere(given, place)
    assert (place / "runs" / "parts" / "data.json").read_text() == (place / "runs" / "whole" / "data.json").read_text()


def test_images_with_several_labels_are_trained_on_and_predicted(place):
    lines = []
    for file in sorted((place / "pictures").rglob("*.png")):
        dark = np.asarray(Image.open(file)).mean() < 127
        labels = [name for name, holds in (("dark", dark), ("zero", "class0" in str(file))) if holds]
        lines.append(json.dumps({"file_name": str(file), "labels": labels}))
    (place / "several").mkdir()
    (place / "several" / "metadata.jsonl").write_text("\n".join(lines))
    given = [*(s for s in SETTINGS if "num_" not in s and "mixup" not in s), "task.multi_label=true", "engine=ddp"]
    given += [f"data.path={place}/several", f"data.root={place}/data", f"run.root={place}/runs", "run.name=several"]
    run = bigtrain.train(*given)
    metrics = bigtrain.validate(run)
    assert 0 <= metrics["f1"] <= 1 and "auc" in metrics and label_names(run.directory) == ["dark", "zero"]
    answers = bigtrain.predict(run, place / "pictures" / "class1")
    assert len(answers) == 20 and all(set(answer["labels"]) <= {"dark", "zero"} for answer in answers)
    with pytest.raises(ConfigError, match=r"data.augment.mixup: .*task.multi_label"):
        bigtrain.train(*given, "data.augment.mixup=0.4")
    with pytest.raises(BigtrainError, match="several labels"):
        bigtrain.train(*(s for s in given if "multi_label" not in s), "run.name=one")
    with pytest.raises(BigtrainError, match="one label"):
        bigtrain.train(*given, f"data.path={place}/pictures", "run.name=other")


def test_the_last_validation_is_told_and_a_step_is_shown(given, place):
    launch(2, *given, "engine=fsdp", "run.name=told", "validation.batches=100")
    run = place / "runs" / "told"
    facts = json.loads((run / "classification.json").read_text())
    confusion = np.array(facts["confusion"])
    last = [e for e in records(place, "told", "events") if e["event"] == "validation"][-1]
    assert facts["labels"] == ["class0", "class1", "class2"] == label_names(run) and facts["step"] == 4
    assert np.trace(confusion) / confusion.sum() == pytest.approx(last["accuracy"])
    assert len(facts["wrong"]) == min(confusion.sum() - np.trace(confusion), 24) > 0
    assert [m["probability"] for m in facts["wrong"]] == sorted(
        (m["probability"] for m in facts["wrong"]), reverse=True
    )
    pixels = {np.asarray(Image.open(path)).tobytes() for path in (place / "pictures").rglob("*.png")}
    assert all(base64.b64decode(mistake["pixels"]) in pixels for mistake in facts["wrong"])
    page = render([read_history(run)])
    assert page.count("data:image/png;base64") == len(facts["wrong"]) and "<th>class2</th>" in page
    lines = list(inspect_run(run, step=2, num_samples=1))
    assert "moved by" in lines[2] and "rotated by" in lines[2] and "% of row" in lines[2]
    assert [len(line) for line in lines[3:11]] == [3 + 16] * 8, "8x8 pixels, two characters each"
