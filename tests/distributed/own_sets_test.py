"""Sets of their own that a run is validated and tested on, and what `bigtrain validate` says of any set."""

import json
from pathlib import Path

import numpy as np
import pytest

import bigtrain
from bigtrain.checkpoint.store import find_checkpoints, read_run_state
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.telemetry.history import read_history
from bigtrain.telemetry.report import render
from tests.distributed.launches import SMALL, events, fork, metrics
from tests.distributed.predict_test import LABELS

right = pytest.importorskip("sklearn.metrics")
SETS = [
    *("data.validation.sets.near.path=near.npz", "data.validation.sets.far.path=far.npz", "data.test.path=test.npz"),
    *("validation.every_steps=6", "validation.batches=100", "validation.metric=far/accuracy"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a training table and three others, and a run of one process."""
    place = tmp_path_factory.mktemp("sets")
    random = np.random.default_rng(1)
    for name, num_rows in (("table", 120), ("near", 45), ("far", 31), ("test", 50)):
        features = random.random((num_rows, 6), dtype=np.float32)
        if name == "near":
            features[[4, 7]] = np.load(place / "table.npz")["features"][[100, 3]]
        labels = np.where(random.random(num_rows) < 0.7, (4 * features[:, 0]).astype(np.int64), 2)
        np.savez(place / f"{name}.npz", features=features, labels=labels)
    done = fork("train.py", *LABELS, *SETS, "run.name=sets", cwd=place)
    assert done.code == 0, done.err
    seen = "data.validation.sets.near: 2 of 45 documents or records are trained on too, such as number 4, 7"
    assert seen in done.out + done.err and "sets.far: " not in done.out + done.err
    return place


def predicted(place: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of a table and what the run predicts."""
    with np.load(place / f"{name}.npz") as table:
        answers = bigtrain.predict(place / "runs/sets", {"features": table["features"]})
        return table["labels"], np.array([answer["label"] for answer in answers])


def validated(place: Path, *args: str, world_size: int = 1) -> dict:
    done = fork("validate.py", "checkpoint=runs/sets", *args, "json=true", cwd=place, world_size=world_size)
    assert done.code == 0, done.err
    return json.loads(done.out.splitlines()[-1])


def test_sets_have_their_own_metrics_and_all_together_plain_ones(place: Path):
    run = place / "runs/sets"
    last = events(run, "validation")[-1]
    pairs = {name: predicted(place, name) for name in ("near", "far")}
    for name, (labels, found) in pairs.items():
        assert last[f"{name}/accuracy"] == pytest.approx(right.accuracy_score(labels, found))
        assert last[f"{name}/mcc"] == pytest.approx(right.matthews_corrcoef(labels, found))
    labels, found = (np.concatenate(part) for part in zip(*pairs.values(), strict=True))
    assert last["accuracy"] == pytest.approx(right.accuracy_score(labels, found))
    assert last["f1"] == pytest.approx(right.f1_score(labels, found, average="macro"))
    assert last["accuracy"] != pytest.approx((last["near/accuracy"] + last["far/accuracy"]) / 2)
    (tested,) = events(run, "test")
    assert tested["accuracy"] == pytest.approx(right.accuracy_score(*predicted(place, "test"))) and tested["step"] == 12
    standing = read_run_state(find_checkpoints(run)[-1]).standing
    assert standing.metric == "far/accuracy" and standing.value == last["far/accuracy"]
    drawn = metrics(run)[-1]["data/epochs/data"]
    assert drawn == pytest.approx(12 * 16 / 120)  # of all rows: nothing is held out


def test_the_report_shows_every_metric_of_validations_the_best_one_and_the_test(place: Path):
    pytest.importorskip("matplotlib")
    page = render([read_history(place / "runs/sets")])
    for name in ("accuracy", "far/accuracy", "mcc"):
        assert f"curve-validation-{name}-sets" in page
    best = read_run_state(find_checkpoints(place / "runs/sets")[-1]).standing
    assert f"far/accuracy {best.best:.4g} after step {best.best_step}" in page and "<td>test</td><td>loss " in page


def test_any_set_is_validated_alike_on_any_number_of_ranks(place: Path):
    whole = validated(place, "set=test")
    labels, found = predicted(place, "test")
    assert whole["confusion"] == right.confusion_matrix(labels, found, labels=range(4)).tolist()
    for world_size, args in ((2, ["set=test"]), (3, ["data.path=test.npz"])):
        other = validated(place, *args, world_size=world_size)
        assert other.pop("loss") == pytest.approx(whole["loss"], rel=1e-6)
        assert other == {name: value for name, value in whole.items() if name != "loss"}
    near = validated(place, "set=validation/near")
    assert near["accuracy"] == pytest.approx(right.accuracy_score(*predicted(place, "near")))
    shown = fork("validate.py", "checkpoint=runs/sets", "set=test", cwd=place)
    table, _, by_label = shown.out.partition("predicted as")[2].partition("\n\n")
    assert len(table.split()) == 25 and by_label.split()[:4] == ["label", "precision", "recall", "f1"]
    wrong = fork("validate.py", "checkpoint=runs/sets", "set=validation/nearer", cwd=place)
    assert wrong.code == 2 and "the run has validation, validation/far, validation/near, test" in wrong.err


def test_a_run_goes_on_with_other_sets_and_says_so(place: Path):
    changed = [*SETS, "data.validation.sets.far.path=test.npz", "train.steps=14"]
    done = fork("train.py", *LABELS, *changed, "run.name=sets", cwd=place)
    assert done.code == 0 and "data.validation.sets.far.path: far.npz -> test.npz" in done.out, done.err
    held_out = fork("train.py", *LABELS, "train.steps=16", "run.name=sets", "validation.every_steps=2", cwd=place)
    assert held_out.code == 2 and "was trained on other data" in held_out.err  # a share of it would be held out now
    shutil_free = fork("train.py", *LABELS, "data.validation.sets.far.source=records", "run.name=none", cwd=place)
    assert shutil_free.code == 0, shutil_free.err  # of what is trained on, all of it


def test_text_is_prepared_with_the_tokenizer_of_the_training_data_and_labels_have_its_numbers(place: Path):
    def write(name: str, labels: str, first: int) -> None:
        rows = [
            {"text": f"{label} {label * i} {i}", "label": label} for i in range(first, first + 12) for label in labels
        ]
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("letters.jsonl", "abc", 1)
    write("other.jsonl", "bc", 7)
    args = [
        "+model=lstm",
        "model.settings.vocab_size=300",
        "model.settings.hidden_dim=8",
        "model.settings.num_inputs=8",
    ]
    args += [
        "model.vocab_size=300",
        "data.sequence_length=24",
        "task=classification",
        "task.num_labels=3",
        "data=jsonl",
    ]
    args += ["model.settings.num_outputs=3", "data.path=letters.jsonl", "data.content=labelled"]
    args += ["data.tokenizer_vocab_size=300", "data.validation.path=other.jsonl", "validation.every_steps=15"]
    args += ["train.steps=30", "train.global_batch_size=16", "optimizer.lr=3e-2", "engine=ddp", "engine.precision=fp32"]
    done = fork("train.py", *args, "run.name=letters", cwd=place)
    assert done.code == 0, done.err
    assert "data.validation: 12 of 24 documents or records are trained on too" in done.out + done.err
    rows = [json.loads(line) for line in (place / "other.jsonl").read_text().splitlines()]
    found = bigtrain.predict(place / "runs/letters", place / "other.jsonl")
    accuracy = np.mean([answer["label"] == row["label"] for answer, row in zip(found, rows, strict=True)])
    assert events(place / "runs/letters", "validation")[-1]["accuracy"] == pytest.approx(accuracy) and accuracy > 0.4
    write("unknown.jsonl", "bd", 1)
    wrong = fork("validate.py", "checkpoint=runs/letters", "data.path=unknown.jsonl", cwd=place)
    assert wrong.code == 2 and "labels that the training data has not: d" in wrong.err


def test_images_are_normalised_as_the_training_data_and_not_augmented(place: Path):
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for directory, classes, brightness in (("seen", 3, 256), ("unseen", 2, 128)):
        for number in range(24):
            path = place / directory / f"class{number % classes + 3 - classes}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(random.integers(0, brightness, (8, 8), dtype=np.uint8)).save(path)
    args = ["+model=cnn_digits", "model.settings.channels=[8]", "model.settings.num_pools=1", "task=classification"]
    args += ["model.settings.num_outputs=3", "data=images", "data.path=seen", "engine=ddp"]
    args += ["data.augment.flip=true", "data.validation.path=unseen", "validation.every_steps=8", "train.steps=8"]
    args += ["train.global_batch_size=8", "scheduler.warmup_steps=1", "engine.precision=fp32", "optimizer.lr=1e-2"]
    done = fork("train.py", *args, "run.name=images", cwd=place)
    assert done.code == 0, done.err
    facts = json.loads((place / "runs/images/data.json").read_text())
    paths = sorted((place / "unseen").glob("*/*.png"))
    pixels = np.stack([np.asarray(image.open(path), dtype=np.float32) for path in paths])[:, None]
    normalised = (pixels - np.float32(facts["mean"])) / np.float32(facts["deviation"])
    found = bigtrain.predict(place / "runs/images", {"pixels": normalised})
    named = bigtrain.predict(place / "runs/images", place / "unseen")
    assert [row.pop("file") for row in named] == [str(path.relative_to(place / "unseen")) for path in paths]
    assert named == found
    accuracy = np.mean([row["label"] == path.parent.name for row, path in zip(found, paths, strict=True)])
    assert events(place / "runs/images", "validation")[-1]["accuracy"] == pytest.approx(accuracy)
    assert validated(place, "checkpoint=runs/images", "data.path=unseen")["accuracy"] == pytest.approx(accuracy)


def test_bits_per_byte_are_those_of_the_corpus(place: Path):
    (place / "texts").mkdir()
    for number in range(9):
        (place / f"texts/{number}.txt").write_text(f"what is said {number} times is true; " * (number + 3))
    args = [*SMALL, "data=text", "data.path=texts", "data.tokenizer=bpe", "data.tokenizer_vocab_size=270"]
    args += [
        "model.vocab_size=270",
        "data.validation.path=texts/8.txt",
        "validation.metric=bits_per_byte",
        "engine=ddp",
    ]
    done = fork("train.py", *args, "validation.every_steps=8", "run.name=bytes", cwd=place)
    assert done.code == 0, done.err
    (event,) = events(place / "runs/bytes", "validation")
    tokenizer = load_tokenizer(place / "runs/bytes")
    text = (place / "texts/8.txt").read_text()
    num_tokens = len(tokenizer.encode(text).ids) + 1
    bits = event["loss"] / np.log(2) * num_tokens / len(text.encode())
    assert event["bits_per_byte"] == pytest.approx(bits) and bits < event["loss"] / np.log(2)
    none = fork("train.py", *SMALL, "validation.every_steps=2", "validation.metric=bits_per_byte", cwd=place)
    assert none.code == 2 and "validation.metric=bits_per_byte: these data have none" in none.err
