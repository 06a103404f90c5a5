"""The house's tasks under engines and worlds: each the run of one process, in loss, gradient norm and metrics."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import bigtrain
from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import EngineKind, Precision
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.run.directory import read_config
from bigtrain.run.export import export
from bigtrain.run.inspection import inspect_step
from bigtrain.testing.parity import Case, compare, configure, trace
from bigtrain.testing.ranks import run_ranks
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
WAV2VEC2 = (
    f"{SIZES.replace('97', '257')}, conv_dim: [8, 8], conv_kernel: [10, 3], conv_stride: [5, 2], "
    "num_feat_extract_layers: 2, num_conv_pos_embeddings: 4, num_conv_pos_embedding_groups: 2, hidden_dropout: 0, "
    "attention_dropout: 0, activation_dropout: 0, feat_proj_dropout: 0, final_dropout: 0, feat_extract_norm: layer, "
    "do_stable_layer_norm: true"
)
WHISPER = (
    "vocab_size: 258, num_mel_bins: 8, d_model: 16, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
    "decoder_attention_heads: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32, max_source_positions: 10, "
    "max_target_positions: 8, dropout: 0, pad_token_id: 257, bos_token_id: 256, eos_token_id: 256, "
    "decoder_start_token_id: 256"
)
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
    "several_labels": [
        *("+model=mlp_mnist", "model.settings.num_inputs=6", "model.settings.num_outputs=4", "task=classification"),
        *("task.num_labels=4", "task.multi_label=true", "task.class_weights=balanced", *RECORDS),
    ],
    "sequences": [
        *("+model=lstm", "model.settings.hidden_dim=8", "task=classification", "task.inputs=sequence", *RECORDS),
        "task.class_weights=[0.5,3]",
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
    "denoise": [
        *("+model=hf", "model.architecture=t5", f"model.settings={{{T5.replace('97', '272')}}}", "task=denoise"),
        *("data=text", "data.tokenizer=bytes", "data.sequence_length=32", "optimizer.eps=1e-4"),
    ],
    "contrastive": [*BERT, "task=contrastive", "data.sequence_length=12", *RECORDS],
    "ctc": [
        *("+model=hf", "model.architecture=wav2vec2", f"model.settings={{{WAV2VEC2}}}", "task=ctc", *RECORDS),
        *("data.tokenizer=bytes", "validation.written_samples=8"),
    ],
    "speech": [
        *("+model=hf", "model.architecture=whisper", f"model.settings={{{WHISPER}}}", "task=speech", *RECORDS),
        *("data.tokenizer=bytes", "data.sequence_length=6", "validation.written_samples=8", "optimizer.eps=1e-4"),
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
    several = np.where(np.arange(60)[:, None] % 7 == 3, -100, features[:, :4] > 0.7)
    np.savez(place / "several_labels.npz", features=features, labels=several)
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
    said = np.array([list(f"{chr(97 + i % 5)} {chr(97 + i // 5 % 5)}".encode()) for i in range(60)])
    tones = np.stack([np.sin(np.arange(400) * row.sum() / 300) for row in said]).astype(np.float32)
    np.savez(place / "ctc.npz", audio=tones, audio_lengths=np.full(60, 400), targets=said)
    mels = (random.random((60, 8, 20)) + said[:, :1, None] % 5).astype(np.float32)
    ended = np.pad(said, ((0, 0), (0, 1)), constant_values=256)
    np.savez(place / "speech.npz", features=mels, tokens=np.roll(ended, 1, axis=1), targets=ended)
    np.savez(place / "images.npz", pixels=random.random((60, 3, 8, 8), dtype=np.float32), labels=np.arange(60) % 10)
    return place


def settings(task, place):
    path = place / {
        "masked_lm": "*.txt",
        "denoise": "*.txt",
        "contrastive": "seq2seq.npz",
        "documents": "documents.jsonl",
    }.get(task, f"{task}.npz")
    return [*TASKS[task], *RUN, f"data.path={path}", f"data.root={place}/data", f"run.root={place}/runs"]


def traces(configs):
    """Train each of several runs on this rank: ranks are started, and what they import, once for all of them."""
    return [trace(config) for config in configs]


@pytest.mark.parametrize("tasks", [[t for t in TASKS if t not in SLOW], pytest.param(SLOW, marks=pytest.mark.slow)])
def test_engines_and_worlds_agree(tasks, place):
    configs = [read_run(settings(task, place)) for task in tasks]

    def trajectories(case):
        given = [configure(config, case) for config in configs]
        return run_ranks(traces, case.world_size, given, timeout_seconds=400)[0]

    references = trajectories(Case(EngineKind.ddp, 1, 2))
    assert all(len(set(reference.losses)) == 4 for reference in references)
    others = (EngineKind.ddp, 2, 1), (EngineKind.fsdp, 2, 1), (EngineKind.zero2, 3, 2), (EngineKind.zero3, 2, 4)
    for case in (Case(*other) for other in others):
        for task, found, reference in zip(tasks, trajectories(case), references, strict=True):
            difference = compare(found, reference)
            print(task, case, difference)
            assert difference.loss <= 1e-6 and difference.grad_norm <= 1e-5, (task, case)


def launch(world_size, *args):
    given = [*args, "validation.every_steps=2", "train.log_every_steps=1"]
    done = fork("train.py", *given, cwd=ROOT, world_size=world_size)
    assert done.code in (0, 75), done.out + done.err


def records(place, run, name):
    lines = (place / "runs" / run / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


LATER = [
    pytest.param(t, marks=pytest.mark.slow)
    for t in ("classification", "token_classification", "seq2seq", "ctc", "speech", "contrastive", "denoise", *SLOW)
]


def assert_continues_elsewhere(given, place):
    """Check that a run which is stopped and continued by other engines and worlds has the numbers of the whole one."""
    launch(1, *given, "engine=ddp", "run.name=whole")
    launch(2, *given, "engine=zero2", "run.name=parts", "run.stop_after_steps=2")
    launch(3, *given, "engine=fsdp", "run.name=parts")
    whole, parts = records(place, "whole", "metrics"), records(place, "parts", "metrics")
    assert [r["data_digest"] for r in parts] == [r["data_digest"] for r in whole] and len(whole) == 4
    for found, right in zip(parts, whole, strict=True):
        assert found["loss"] == pytest.approx(right["loss"], rel=1e-6)
        assert found.get("train/accuracy") == right.get("train/accuracy")
    events = [[e for e in records(place, run, "events") if e["event"] == "validation"] for run in ("parts", "whole")]
    for found, right in zip(*events, strict=True):
        assert found["loss"] == pytest.approx(right["loss"], rel=1e-6) and found.keys() == right.keys()
        same = {"accuracy", "exact", "chrf", "rouge_l", "wer", "cer"} & found.keys()
        assert {name: found[name] for name in same} == {name: right[name] for name in same}


@pytest.mark.parametrize("task", ["masked_lm", "documents", *LATER])
def test_stopped_and_continued_elsewhere_it_is_the_same_run_with_the_same_metrics(task, place):
    given = settings(task, place)
    assert_continues_elsewhere(given, place)
    for run in ("whole", "parts"):
        (place / "runs" / run).rename(place / "runs" / f"{run}-{task}")


@pytest.mark.parametrize("noise", ["spans", "infilling"])
def test_what_is_hidden_is_shown(noise, place):
    config = read_run([*settings("denoise", place), f"task.noise={noise}", "engine=ddp"])
    told = "\n".join(inspect_step(config, step=2, num_samples=3))
    assert told == "\n".join(inspect_step(config, step=2, num_samples=3)) and told.count("with gaps") == 3
    source, target = (re.search(rf"{name}: (.*)", told)[1].split("│") for name in ("source", "target"))
    if noise == "spans":
        assert source.count("<271>") == target.count("<271>") == 1 and target[0] == "<271>"
    else:
        assert "<257>" in source and "<257>" not in target and len(target) == 32


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


def test_documents_have_several_labels_of_which_the_rare_ones_weigh_more(place):
    texts = [{"text": f"{'ab' * (i % 2)} {'cd' * (i % 3 == 0)} {i}", "label": ["ab"] * (i % 2)} for i in range(60)]
    for i, row in enumerate(texts):
        row["label"] += ["cd"] * (i % 3 == 0)
    (place / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    given = [*TASKS["documents"], "model.settings.num_outputs=2", "task.num_labels=2", "task.multi_label=true"]
    given += ["task.class_weights=balanced", f"data.path={place}/lists.jsonl", f"data.root={place}/data"]
    given += ["train.steps=60", "train.global_batch_size=8", "optimizer.lr=2e-2", "scheduler.warmup_steps=5"]
    given += ["engine=ddp", f"run.root={place}/runs", "run.name=lists", "validation.every_steps=30"]
    bigtrain.train(*given, "validation.metric=auc")
    run = place / "runs" / "lists"
    metrics = bigtrain.validate(run)
    assert metrics["auc"] > 0.9 and metrics["f1"] > 0.8, metrics
    weights = read_config(run).task.class_weights
    assert len(weights) == 2 and 0.7 < weights[0] < 1.5 < weights[1] < 2.6, "the numbers are recorded"
    found = bigtrain.predict(run, [row["text"] for row in texts[:12]])
    right = [set(answer["labels"]) == set(row["label"]) for answer, row in zip(found, texts, strict=False)]
    assert sum(right) >= 10 and all(p >= 0.5 for answer in found for p in answer["probabilities"])
    assert "the task needs one label per document" in refused(*given, "task.multi_label=false", "run.name=other")
    assert "class_weights=[1, 2, 3]: must be balanced, or a list of task.num_labels=2" in refused(
        *given, "task.class_weights=[1,2,3]"
    )


def test_words_get_the_label_of_their_first_token(place):
    rows = [[f"{'ab'[(i * j) % 2]}{j}", "c", f"{'ba'[i % 2]}x{i}"] for i in range(40) for j in range(2)]
    tags = [["first" if word[0] == "a" else "other" for word in row] for row in rows]
    lines = (json.dumps({"text": row, "label": tag}) for row, tag in zip(rows, tags, strict=True))
    (place / "tagged.jsonl").write_text("\n".join(lines))
    bert = [setting.replace("vocab_size: 97", "vocab_size: 257") for setting in BERT]
    given = [*bert, "task=token_classification", "task.num_labels=2", "data=jsonl", "data.content=tagged", "engine=ddp"]
    given += [f"data.path={place}/tagged.jsonl", "data.tokenizer=bytes", "data.sequence_length=16", f"run.root={place}"]
    given += ["train.steps=60", "train.global_batch_size=16", "optimizer.lr=1e-2", "scheduler.warmup_steps=5"]
    run = bigtrain.train(*given, f"data.root={place}/words", "run.name=tagged")
    texts = [{"text": rows[5]}, {"text": "a1  c bx"}, {"text": ["ab", "of two", "a"]}, {"text": "b " * 20}]
    found = bigtrain.predict(run, texts)
    assert found[0] == {"words": rows[5], "labels": tags[5]}
    assert found[1] == {"words": ["a1", "c", "bx"], "labels": ["first", "other", "other"]}
    assert found[2]["words"] == ["ab", "of two", "a"] and found[2]["labels"][::2] == ["first", "first"]
    assert found[3]["words"] == ["b"] * 8, "as many as a sample has room for"
    assert bigtrain.predict(run, [rows[5], {"words": rows[5]}, ""]) == [found[0], found[0], {"words": [], "labels": []}]
    (place / "words.jsonl").write_text(f"{json.dumps(rows[5])}\n{json.dumps({'words': rows[5]})}\n")
    assert bigtrain.predict(run, place / "words.jsonl") == [found[0]] * 2
    (index,) = (place / "words").glob("*/index.json")
    prepared = [setting for setting in given if not setting.startswith(("data", "train.steps"))]
    prepared += ["data=prepared", f"data.path={index.parent}", "data.sequence_length=16", "train.steps=1"]
    again = bigtrain.train(*prepared, f"run.root={place}", "run.name=prepared")
    assert bigtrain.predict(again, [rows[5]])[0]["words"] == rows[5]


def refused(*args, **kwargs):
    """Return what ends a launch in this process with code 2."""
    with pytest.raises(BigtrainError) as told:
        bigtrain.train(*args, **kwargs)
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
    assert "model.settings.num_outputs=10: task=classification predicts 12; leave num_outputs out" in told(
        labels, "task.num_labels=12", "model.settings.num_outputs=10"
    )
    assert not watchdogs_left(), "the failed run's would end a program that goes on"


def test_data_of_one_class_is_refused_and_fewer_samples_than_wanted_are_said(place, capfd):
    image = pytest.importorskip("PIL.Image")
    (place / "one/cat").mkdir(parents=True)
    for number in range(12):
        image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(place / f"one/cat/{number}.png")
    (place / "one.jsonl").write_text("".join(f'{{"text": "{i} {i}", "label": "cat"}}\n' for i in range(40)))
    given = [f"run.root={place}/refused", "task=classification", "engine=ddp", *RUN, f"data.root={place}/one_data"]
    of_text = ["+model=lstm", "model.settings.vocab_size=257", "model.vocab_size=257", "data.tokenizer=bytes"]
    of_text += ["data=jsonl", "data.content=labelled", "data.sequence_length=8", f"data.path={place}/one.jsonl"]
    for data in (["+model=cnn_digits", "data=images", f"data.path={place}/one"], of_text):
        assert re.search("all .* (label|class) cat; there is nothing to tell apart", refused(*given, *data))
    np.savez(place / "few.npz", features=np.zeros((40, 6), dtype=np.float32), labels=np.arange(40) % 3)
    few = ["+model=mlp_mnist", "model.settings.num_inputs=6", *RECORDS, "task.num_labels=3", "train.steps=1"]
    run = bigtrain.train(*given, *few, f"data.path={place}/few.npz", "data.max_train_samples=99", "run.name=few")
    assert re.search(
        r"data.max_train_samples=99: the data has \d+ training samples, all are trained on", capfd.readouterr().err
    )
    assert len(bigtrain.predict(run, np.load(place / "few.npz"), top_k=3)[0]["labels"]) == 3, "num_outputs follows"


def test_numbers_and_code_that_are_wrong_are_a_sentence_with_their_place(place):
    given = [f"run.root={place}/refused", "engine=ddp"]
    with np.load(place / "texts.npz") as texts:
        tokens = texts["tokens"].copy()
        tokens[:, 3] = 97
        np.savez(place / "ids.npz", **{**texts, "tokens": tokens})
    found = refused(*settings("texts", place), *given, f"data.path={place}/ids.npz")
    assert re.search(r"row \d+: tokens is 97; it must be from 0 to 96 \(model.vocab_size\)", found)
    with np.load(place / "regression.npz") as table:
        features = table["features"].copy()
        features[5, 1] = np.nan
        np.savez(place / "nan.npz", features=features, values=table["values"])
    found = refused(*settings("regression", place), *given, f"data.path={place}/nan.npz")
    assert "row 5: features is nan; it must be a finite number" in found

    class Shrinking(list):
        def __getitem__(self, row):
            if row == 20:
                del self[10:]
            return super().__getitem__(row)

    rows = Shrinking({"features": features[0], "values": np.zeros(2)} for _ in range(40))
    given = [*settings("regression", place), *given]
    found = refused(*(setting for setting in given if not setting.startswith("data")), data=rows)
    assert "row 20: IndexError" in found and "it had 40 rows, and has 10 now" in found


def test_frozen_batch_normalisation_keeps_its_means_under_every_engine(place):
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    base = transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape, num_labels=7))
    for buffer in filter(torch.is_floating_point, base.buffers()):
        buffer.uniform_(0.5, 1.5)
    base.save_pretrained(place / "resnet")
    told = ", ".join(f"{key}: {value}" for key, value in shape.items())
    given = ["+model=hf", "model.architecture=resnet", f"model.settings={{{told}}}", "model.freeze_batch_norm=true"]
    given += [
        "task=classification",
        "task.inputs=pixels",
        "task.num_labels=10",
        *RECORDS,
        *RUN,
        f"run.root={place}/runs",
    ]
    given += [f"data.path={place}/images.npz", f"data.root={place}/data"]
    assert "from scratch there are no means to keep" in refused(*given, "engine=ddp")
    config = read_run([*given, f"model.init_from={place}/resnet"])
    cases = Case(EngineKind.zero3, 2, 1), Case(EngineKind.ddp, 1, 7)
    found, right = (
        run_ranks(trace, case.world_size, configure(config, case), timeout_seconds=200)[0] for case in cases
    )
    assert (difference := compare(found, right)).loss <= 1e-6 and difference.grad_norm <= 1e-5
    run = bigtrain.train(*given, "engine=ddp", f"model.init_from={place}/resnet", "run.name=frozen")
    (place / "resnet").rename(place / "gone")
    again = bigtrain.train(*given, "engine=ddp", f"model.init_from={run.directory}", "run.name=again", "train.steps=1")
    for directory in (run.directory, again.directory):
        export(directory, directory / "out", precision=Precision.fp32, max_shard_bytes=2**30)
        opened = transformers.ResNetForImageClassification.from_pretrained(directory / "out").eval()
        kept = {name: buffer for name, buffer in base.named_buffers() if buffer.is_floating_point()}
        assert len(kept) == 12 and all(torch.equal(opened.get_buffer(name), value) for name, value in kept.items())
        pixels = np.load(place / "images.npz")["pixels"][:5]
        with torch.no_grad():
            probabilities = opened(torch.from_numpy(pixels)).logits.softmax(-1).max(-1).values
        asked = [answer["probability"] for answer in bigtrain.predict(directory, {"pixels": pixels})]
        assert asked == pytest.approx(probabilities.tolist(), rel=1e-5)


def test_what_does_not_go_together_is_a_sentence(place):
    with pytest.raises(ConfigError, match="sees earlier tokens only"):
        read_run(["+model=gpt_nano", "task=masked_lm"])
    with pytest.raises(ConfigError, match=r"BatchNorm2d\) takes means over a micro-batch.*choose convnext or vit"):
        resnet = ["model.architecture=resnet", "task=classification", "task.inputs=pixels", "data=records"]
        bigtrain.train("+model=hf", *resnet, f"data.path={place}/images.npz", f"run.root={place}", "engine=ddp")
    with pytest.raises(ConfigError, match=r"packing=best_fit pads"):
        read_run([*settings("masked_lm", place), "data.packing=best_fit"])
    with pytest.raises(ConfigError, match=r"task=denoise: data.content=pairs is for answers"):
        read_run([*settings("denoise", place), "data.content=pairs"])
    given = [f"run.root={place}/refused", "engine=ddp"]
    assert "task.mask_id=97: is a token of the text" in refused(
        *settings("masked_lm", place), *given, "task.mask_id=97"
    )
    few = [value.replace("272", "257") for value in settings("denoise", place)]
    assert "model.vocab_size=259 or more has rows" in refused(*few, *given)
    with pytest.raises(ConfigError, match=r"kernel_siz.*did you mean 'model.settings.kernel_size'"):
        read_run([*settings("classification", place), "model.settings.kernel_siz=5"])
