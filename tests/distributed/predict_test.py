"""What a run says of new inputs: the same on any number of ranks, in order, and after a kill where it was."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bigtrain
from bigtrain.checkpoint.shard import TensorReader
from bigtrain.checkpoint.store import find_checkpoints
from bigtrain.errors import BigtrainError
from bigtrain.run.data import open_data
from tests.distributed.launches import LAUNCH, Launch, fork

NUM_ROWS = 43
TABLE = [
    *("+model=mlp_mnist", "model.settings.num_inputs=6", "model.settings.hidden_dims=[8]", "data=records"),
    *("train.steps=12", "train.global_batch_size=16", "optimizer.lr=3e-2", "scheduler.warmup_steps=1"),
    *("engine.precision=fp32", "engine=ddp", "logging.layer_norms_every_steps=0"),
]
LABELS = [*TABLE, "task=classification", "task.num_labels=4", "model.settings.num_outputs=4", "data.path=table.npz"]
VALUES = [*TABLE, "task=regression", "task.num_values=2", "model.settings.num_outputs=2", "data.path=values.npz"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with tables, inputs, and two trained runs."""
    place = tmp_path_factory.mktemp("predict")
    random = np.random.default_rng(1)
    features = random.random((120, 6), dtype=np.float32)
    np.savez(place / "table.npz", features=features, labels=(4 * features[:, 0]).astype(np.int64))
    np.savez(place / "values.npz", features=features, values=features[:, :2] * 3)
    np.savez(place / "new.npz", features=features[:NUM_ROWS], labels=np.zeros(NUM_ROWS))
    with (place / "new.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerows([["labels", *"abcdef"], *([0, *row] for row in features[:NUM_ROWS].tolist())])
    (place / "new.jsonl").write_text(
        "".join(json.dumps({"features": row, "id": i}) + "\n" for i, row in enumerate(features[:NUM_ROWS].tolist()))
    )
    for name, args in (("labels", LABELS), ("values", VALUES)):
        done = fork("train.py", *args, f"run.name={name}", cwd=place)
        assert done.code == 0, done.err
    return place


def outputs(place: Path, run: str) -> np.ndarray:
    """Return what the network computes of the inputs, in numpy."""
    reader = TensorReader(find_checkpoints(place / "runs" / run)[-1])
    weights = [reader.read(key).double().numpy() for key in reader.records if key.startswith("model.")]
    (first, first_bias), (last, last_bias) = ((w, b) for w, b in zip(weights[::2], weights[1::2], strict=True))
    features = np.load(place / "new.npz")["features"].astype(np.float64)
    return np.maximum(features @ first.T + first_bias, 0) @ last.T + last_bias


def predict(place: Path, *args: str, world_size: int = 1, code: int = 0) -> str:
    done = fork("predict.py", *args, cwd=place, world_size=world_size)
    assert done.code == code, done.err
    return done.out + done.err


def test_labels_are_those_computed_by_hand_on_any_number_of_ranks(place: Path):
    logits = outputs(place, "labels")
    right = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for world_size, inputs in ((1, "new.npz"), (2, "new.csv"), (3, "new.jsonl")):
        args = [f"inputs={inputs}", f"out={world_size}.jsonl", "top_k=2", "batch_size=4", "part_rows=9"]
        said = predict(place, "checkpoint=runs/labels", *args, world_size=world_size)
        assert f"{world_size}.jsonl: {NUM_ROWS} predictions" in said
    first = (place / "1.jsonl").read_bytes()
    assert first == (place / "2.jsonl").read_bytes() == (place / "3.jsonl").read_bytes()
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["labels"] for row in rows] == np.argsort(-right, axis=1)[:, :2].tolist() and len(rows) == NUM_ROWS
    assert np.allclose([row["probabilities"] for row in rows], -np.sort(-right, axis=1)[:, :2], atol=1e-6)
    assert not list(place.glob("*.parts"))


def test_values_are_written_as_csv_and_given_to_programs(place: Path):
    predict(place, "checkpoint=runs/values", "inputs=new.npz", "out=values.csv")
    with (place / "values.csv").open() as file:
        found = [json.loads(row["values"]) for row in csv.DictReader(file)]
    assert np.allclose(found, outputs(place, "values"), atol=1e-5)
    features = np.load(place / "new.npz")["features"]
    assert [row["values"] for row in bigtrain.predict(place / "runs/values", {"features": features})] == found
    assert bigtrain.predict(place / "runs/values", [{"features": row} for row in features])[3]["values"] == found[3]


def test_killed_it_goes_on_where_it_was(place: Path):
    args = ["checkpoint=runs/labels", "inputs=many.npz", "out=many.jsonl", "part_rows=2", "batch_size=1"]
    features = np.random.default_rng(2).random((1200, 6), dtype=np.float32)
    np.savez(place / "many.npz", features=features)
    parts = place / "many.jsonl.parts"
    with Launch([sys.executable, str(LAUNCH / "predict.py"), *args], place) as running:
        running.wait_until(lambda: len(list(parts.glob("*.jsonl"))) > 3)
    num_done = len(list(parts.glob("*.jsonl")))
    assert num_done < 600 and not (place / "many.jsonl").exists()
    assert "has parts of another request (wanted)" in predict(place, *args, "top_k=2", code=2)
    marked = {"label": "made before the kill"}
    (parts / "00000001.jsonl").write_text(f"{json.dumps(marked)}\n" * 2)
    said = predict(place, *args, world_size=2)
    assert f"{num_done} of 600 parts are there already" in said
    rows = [json.loads(line) for line in (place / "many.jsonl").read_text().splitlines()]
    assert len(rows) == 1200 and rows[2] == rows[3] == marked
    again = bigtrain.predict(place / "runs/labels", {"features": features[4:]}, batch_size=1)
    assert rows[4:] == again
    assert "exists already" in predict(place, *args, code=2)


def test_what_does_not_fit_is_a_sentence(place: Path):
    (place / "bad.jsonl").write_text('{"features": [1, 2, 3, 4, 5, 6]}\n{"feature": 1}\n')
    (place / "torn.jsonl").write_text('{"features": [1, 2\n')
    (place / "torn.tsv").write_text("a\tb\n1\t2\n1\t2\t3\n")
    (place / "words.txt").write_text("the cat sat\n")
    run = place / "runs/labels"
    for inputs, told in (
        (place / "torn.jsonl", "torn.jsonl:1: Expecting"),
        (place / "words.txt", "words.txt:1: 'the cat sat' has no columns; the network takes features"),
        (place / "bad.jsonl", "bad.jsonl:2: it lacks 'features'"),
        (place / "torn.tsv", "torn.tsv:3: 3 columns, but the header has 2"),
        (place / "none.jsonl", "none.jsonl: cannot be read"),
        (place / "new.png", "one of .jsonl, .csv, .tsv, .txt, .npz is read"),
        ({"pixels": np.zeros(3)}, "inputs: it lacks features; it has pixels"),
        ([], "inputs: it has no row"),
    ):
        with pytest.raises(BigtrainError) as error:
            bigtrain.predict(run, inputs)
        assert told in str(error.value) and error.value.exit_code == 2
    for asked, of, told in (
        ({"threshold": 0.5}, "labels", "likeliest of 4 labels is taken"),
        ({"threshold": 0.5, "top_k": 2}, "labels", "top_k=2, threshold=0.5: leave one of them out"),
        ({"top_k": 2}, "values", "task=regression gives no probabilities"),
    ):
        with pytest.raises(BigtrainError, match=told):
            bigtrain.predict(place / "runs" / of, place / "new.npz", **asked)
    assert not torch.distributed.is_initialized(), "a program goes on, and may train"


def test_text_is_read_as_in_training_and_labels_have_their_names(place: Path):
    texts = [
        f"{'the cat sat' if i % 2 else 'a dog ran'} {i * 7919 % 100} times {'and on ' * (i % 9)}" for i in range(80)
    ]
    lines = [json.dumps({"text": text, "label": "cat" if i % 2 else "dog"}) for i, text in enumerate(texts)]
    (place / "pets.jsonl").write_text("\n".join(lines) + "\n")
    (place / "pets.txt").write_text("\n".join(texts) + "\n")
    args = [
        "+model=lstm",
        "model.settings.vocab_size=257",
        "model.settings.hidden_dim=8",
        "model.settings.num_inputs=8",
    ]
    args += ["model.vocab_size=257", "data.sequence_length=32", "task=classification", "data=jsonl"]
    args += [
        f"data.path={place}/pets.jsonl",
        "data.content=labelled",
        "data.tokenizer=bytes",
        f"data.root={place}/data",
    ]
    args += ["train.steps=30", "train.global_batch_size=16", "optimizer.lr=3e-2", "engine=ddp", "engine.precision=fp32"]
    done = fork("train.py", *args, "run.name=pets", f"run.root={place}/runs", cwd=place)
    assert done.code == 0, done.err
    predict(place, "checkpoint=runs/pets", "inputs=pets.txt", "out=pets.out.jsonl")
    found = [json.loads(line) for line in (place / "pets.out.jsonl").read_text().splitlines()]
    assert {row["label"] for row in found} == {"cat", "dog"}
    assert found == bigtrain.predict(place / "runs/pets", place / "pets.jsonl")
    run = bigtrain.load_run(place / "runs/pets")
    train = open_data(run.config)["train"]
    samples = train.gather(np.arange(train.num_samples))
    again = bigtrain.predict(run, {name: samples[name].numpy() for name in ("tokens", "lengths")})
    told = sorted((row["label"], round(row["probability"], 6)) for row in found)
    assert len(again) > 60 and {(row["label"], round(row["probability"], 6)) for row in again} <= set(told)
