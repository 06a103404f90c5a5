"""The house's tasks under engines and worlds: each the run of one process, in loss, gradient norm and metrics."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import bigtrain
from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import EngineKind
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.testing.parity import Case, compare, compute
from tests.distributed.launches import fork, watchdogs_left

ROOT = Path(__file__).parents[2]
TINY_BERT = [
    "+model=bert_mini",
    "model.settings.num_hidden_layers=2",
    "model.settings.hidden_size=32",
    "model.settings.intermediate_size=48",
    "model.settings.vocab_size=272",
    "task=masked_lm",
    "data=text",
    "data.tokenizer=bytes",
    "data.sequence_length=32",
]
SIZES = "vocab_size: 97, num_attention_heads: 4, num_hidden_layers: 2, hidden_size: 32, intermediate_size: 48"
NO_DROPOUT = "hidden_dropout_prob: 0, attention_probs_dropout_prob: 0"
BERT = ["+model=hf", "model.architecture=bert", f"model.settings={{{SIZES}, {NO_DROPOUT}}}"]
T5 = "vocab_size: 97, num_heads: 4, num_layers: 2, d_model: 32, d_kv: 8, d_ff: 48, dropout_rate: 0"
VIT = f"image_size: 8, patch_size: 2, {SIZES.partition(', ')[2]}, {NO_DROPOUT}"
RECORDS = ["data=records", "data.validation_fraction=0.2"]
TASKS = {
    "masked_lm": TINY_BERT,
    "classification": [
        *("+model=cnn_mnist", "model.settings.image_size=8", "model.settings.pads=true", "model.settings.dense_dim=16"),
        *("model.settings.channels=[8,8]", "task=classification", "task.inputs=pixels", "task.num_labels=10", *RECORDS),
    ],
    "regression": [
        *("+model=mlp_mnist", "model.settings.num_inputs=6", "model.settings.num_outputs=2", "task=regression"),
        *("task.num_values=2", *RECORDS),
    ],
    "sequences": [
        *("+model=lstm", "model.settings.hidden_dim=8", "task=classification", "task.inputs=sequence", *RECORDS),
    ],
    "token_classification": [
        *(*BERT, "task=token_classification", "task.num_labels=5", "data.sequence_length=12", *RECORDS),
    ],
    "seq2seq": [
        *("+model=hf", "model.architecture=t5", f"model.settings={{{T5}}}", "task=seq2seq", *RECORDS),
        *(
            "data.sequence_length=12",
            "optimizer.eps=1e-4",
        ),  # gradients of T5's queries are as small as Adam's usual eps
    ],
    "texts": [
        *(*BERT, "task=classification", "task.inputs=tokens", "task.num_labels=3", "data.sequence_length=16", *RECORDS),
    ],
    "images": [
        *("+model=hf", "model.architecture=vit", f"model.settings={{{VIT}}}", "task=classification"),
        *("task.inputs=pixels", "task.num_labels=10", *RECORDS),
    ],
    "documents": [
        *("+model=lstm", "model.settings.hidden_dim=8", "model.settings.vocab_size=257", "model.settings.num_inputs=6"),
        *(
            "model.settings.num_outputs=3",
            "task=classification",
            "task.num_labels=3",
            "data=jsonl",
            "data.tokenizer=bytes",
        ),
        *("data.content=labelled", "data.sequence_length=24", "data.validation_fraction=0.2"),
    ],
}
SLOW = ("texts", "images")
RUN = [
    "engine.precision=fp32",
    "train.steps=4",
    "train.global_batch_size=7",
    "optimizer.lr=1e-2",
    "scheduler.warmup_steps=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data of every task: text; digits; a table; sequences."""
    place = tmp_path_factory.mktemp("tasks")
    for number in range(40):
        text = "\n".join(f"def function_{number * j % 97}(x): return x + {number + j}" for j in range(20))
        (place / f"{number}.txt").write_text(text)
    random = np.random.default_rng(0)
    pixels, labels = random.random((60, 1, 8, 8), dtype=np.float32), np.arange(60) % 10
    np.savez(place / "classification.npz", pixels=pixels, labels=np.where(labels == 3, -100, labels))
    features = random.random((60, 6), dtype=np.float32)
    values = np.stack([features.sum(axis=1), np.where(np.arange(60) % 5, features[:, 0], np.nan)], axis=1)
    np.savez(place / "regression.npz", features=features, values=values)
    sequence = random.random((60, 5, 1), dtype=np.float32)
    rows = [
        {"text": "word " * (number % 7) + str(number), "label": ["a", "b", "c"][number % 3]} for number in range(40)
    ]
    (place / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(place / "sequences.npz", sequence=sequence, labels=(sequence[:, -1, 0] > 0.5).astype(np.int64))
    tokens, lengths = random.integers(3, 97, (60, 12)), random.integers(1, 13, 60)
    is_token = np.arange(12) < lengths[:, None]
    texts = {"tokens": tokens, "lengths": lengths}
    np.savez(place / "token_classification.npz", **texts, labels=np.where(is_token, tokens % 5, -100))
    np.savez(place / "texts.npz", **texts, labels=np.where(np.arange(60) % 7 == 3, -100, tokens[:, 0] % 3))
    source = {"source": tokens[:, ::-1], "source_lengths": lengths}
    targets = np.where(is_token, tokens, -100)
    np.savez(place / "seq2seq.npz", **source, tokens=np.roll(tokens, 1, axis=1), targets=targets)
    np.savez(place / "images.npz", pixels=random.random((60, 3, 8, 8), dtype=np.float32), labels=np.arange(60) % 10)
    return place


def settings(task, place):
    path = place / {"masked_lm": "*.txt", "documents": "documents.jsonl"}.get(task, f"{task}.npz")
    return [*TASKS[task], *RUN, f"data.path={path}", f"data.root={place}/data", f"run.root={place}/runs"]


@pytest.mark.parametrize("task", [pytest.param(t, marks=pytest.mark.slow if t in SLOW else ()) for t in TASKS])
def test_engines_and_worlds_agree(task, place):
    config = read_run(settings(task, place))
    reference = compute(config, Case(EngineKind.ddp, 1, 2))
    assert len(set(reference.losses)) == 4
    for case in (Case(EngineKind.fsdp, 2, 1), Case(EngineKind.zero2, 3, 2), Case(EngineKind.zero3, 2, 4)):
        difference = compare(compute(config, case), reference)
        print(task, case, difference)
        assert difference.loss <= 1e-6 and difference.grad_norm <= 1e-5, case


def launch(world_size, *args):
    given = [*args, "validation.every_steps=2", "train.log_every_steps=1"]
    done = fork("train.py", *given, cwd=ROOT, world_size=world_size)
    assert done.code in (0, 75), done.out + done.err


def records(place, run, name):
    lines = (place / "runs" / run / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


LATER = [pytest.param(t, marks=pytest.mark.slow) for t in ("classification", "token_classification", "seq2seq", *SLOW)]


def assert_continues_elsewhere(given, place):
    """Check that a run which is stopped and continued by other engines and worlds has the numbers of the whole one."""
    launch(1, *given, "engine=ddp", "run.name=whole")
    launch(2, *given, "engine=zero2", "run.name=parts", "run.stop_after_steps=2")
    launch(3, *given, "engine=fsdp", "run.name=parts")
    whole, parts = records(place, "whole", "metrics"), records(place, "parts", "metrics")
    assert [r["data_digest"] for r in parts] == [r["data_digest"] for r in whole] and len(whole) == 4
    for found, right in zip(parts, whole, strict=True):
        assert found["loss"] == pytest.approx(right["loss"], rel=1e-6)
        assert found["train/accuracy"] == right["train/accuracy"]
    events = [[e for e in records(place, run, "events") if e["event"] == "validation"] for run in ("parts", "whole")]
    for found, right in zip(*events, strict=True):
        assert found["loss"] == pytest.approx(right["loss"], rel=1e-6) and found["accuracy"] == right["accuracy"]


@pytest.mark.parametrize("task", ["masked_lm", "documents", *LATER])
def test_stopped_and_continued_elsewhere_it_is_the_same_run_with_the_same_metrics(task, place):
    given = settings(task, place)
    assert_continues_elsewhere(given, place)
    for run in ("whole", "parts"):
        (place / "runs" / run).rename(place / "runs" / f"{run}-{task}")


def test_rows_that_say_their_own_length_are_counted_in_tokens(place):
    assert read_run(settings("sequences", place)).data.sequence_length is None
    launch(1, *settings("sequences", place), "run.name=rows")
    assert [r["tokens"] for r in records(place, "rows", "metrics")] == [35, 70, 105, 140]


def test_digits_are_learnt(place):
    found = importlib.util.find_spec("sklearn")
    if found is None:
        pytest.skip("scikit-learn is not installed, which has the digits")
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    pixels = table[:, :-1].reshape(-1, 1, 8, 8) / 16
    np.savez(place / "digits.npz", pixels=pixels, labels=table[:, -1].astype(np.int64))
    model = ["+model=cnn_mnist", "model.settings.image_size=8", "model.settings.pads=true"]
    task = [
        "task=classification",
        "task.inputs=pixels",
        "task.num_labels=10",
        *RECORDS,
        f"data.path={place}/digits.npz",
    ]
    run = ["train.steps=100", "train.global_batch_size=64", "optimizer.lr=3e-3", "scheduler.warmup_steps=10"]
    launch(1, *model, *task, *run, f"run.root={place}/runs", "run.name=digits", "engine=ddp", "validation.batches=6")
    last = [e for e in records(place, "digits", "events") if e["event"] == "validation"][-1]
    assert last["accuracy"] >= 0.9, last  # majority 0.10


def refused(*args):
    """Return what ends a launch in this process with code 2."""
    with pytest.raises(BigtrainError) as told:
        bigtrain.train(*args)
    assert told.value.exit_code == 2
    return str(told.value)


def test_labels_and_outputs_that_do_not_fit_are_named(place):
    features = np.zeros((40, 6), dtype=np.float32)
    labels = np.arange(40) % 10
    given = ["+model=mlp_mnist", "model.settings.num_inputs=6", "task=classification", *RECORDS, *RUN, "engine=ddp"]
    given += [f"run.root={place}/refused", f"data.path={place}/labels.npz"]

    def told(labels, *args):
        np.savez(place / "labels.npz", features=features, labels=labels)
        return refused(*given, *args)

    assert "row 0: labels is -1; it must be from 0 to 9, or -100" in told(labels - 1, "task.num_labels=10")
    assert "row 5: labels is 5; it must be from 0 to 4" in told(labels, "task.num_labels=5")
    assert "none of the" in told(np.full(40, -100), "task.num_labels=10")
    assert "task.num_labels=12, but the network returns (10) for each sample" in told(labels, "task.num_labels=12")
    assert not watchdogs_left(), "the failed run's would end a program that goes on"


def test_what_does_not_go_together_is_a_sentence(place):
    with pytest.raises(ConfigError, match="sees earlier tokens only"):
        read_run(["+model=gpt_nano", "task=masked_lm"])
    with pytest.raises(ConfigError, match=r"BatchNorm2d\) takes means over a micro-batch.*choose convnext or vit"):
        resnet = ["model.architecture=resnet", "task=classification", "task.inputs=pixels", "data=records"]
        bigtrain.train("+model=hf", *resnet, f"data.path={place}/images.npz", f"run.root={place}", "engine=ddp")
    with pytest.raises(ConfigError, match=r"packing=best_fit pads"):
        read_run([*settings("masked_lm", place), "data.packing=best_fit"])
    with pytest.raises(ConfigError, match=r"kernel_siz.*did you mean 'model.settings.kernel_size'"):
        read_run([*settings("classification", place), "model.settings.kernel_siz=5"])
