"""Heads of transformers' networks: a trunk of another run with a fresh head, exports with labels, and the way back."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

import bigtrain
from bigtrain.config import Precision, Scored
from bigtrain.config.score import ScoreConfig
from bigtrain.engine.state import MODEL
from bigtrain.errors import ConfigError
from bigtrain.run.data import open_data
from bigtrain.run.directory import find_whole, read_config
from bigtrain.run.export import export
from bigtrain.run.frozen import WeightReader
from bigtrain.run.scoring import score_samples

SIZES = "vocab_size: 300, num_attention_heads: 4, num_hidden_layers: 2, hidden_size: 32, intermediate_size: 48"
BERT = [
    "+model=hf",
    f"model.settings={{{SIZES}, hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}}",
    "model.architecture=bert",
]
RUN = ["engine=ddp", "train.global_batch_size=4", "train.micro_batch_size=4", "data.sequence_length=12"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of a masked language model, and one of a classifier that began with its trunk and did not move."""
    place = tmp_path_factory.mktemp("heads")
    (place / "text.txt").write_text("\n".join(f"a line with {number} words in it" for number in range(400)))
    given = [*RUN, f"data.root={place}/data", f"run.root={place}"]
    text = ["data=text", f"data.path={place}/text.txt", "data.tokenizer=bytes"]
    bigtrain.train(*BERT, *given, *text, "task=masked_lm", "run.name=masked", "train.steps=2")
    rows = [{"text": f"line {number}", "label": ["no", "yes", "so"][number % 3]} for number in range(40)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = ["data=jsonl", "data.content=labelled", f"data.path={place}/rows.jsonl", "data.tokenizer=bytes"]
    task = ["task=classification", f"model.init_from={place}/masked", "optimizer.lr=1e-30"]
    bigtrain.train(*BERT, *given, *labelled, *task, "run.name=labelled", "train.steps=1")
    return place


def test_a_trunk_of_another_run_is_taken_bit_for_bit_and_its_head_is_not(place):
    masked, labelled = (WeightReader(find_whole(place / name)[1]) for name in ("masked", "labelled"))
    weights = [key for key in labelled.keys if key.startswith("model")]
    trunk = [key for key in weights if ".bert." in key and ".pooler." not in key]
    assert len(trunk) > 30 and all(torch.equal(masked.read(key), labelled.read(key)) for key in trunk)
    fresh = {key.partition("causal_lm.")[2] for key in weights if key not in trunk}
    assert fresh == {f"{name}.{kind}" for name in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}
    with pytest.raises(ConfigError, match="another trunk than this model's"):
        settings = [BERT[0], BERT[1].replace("hidden_layers: 2", "hidden_layers: 3"), BERT[2], *RUN]
        bigtrain.train(
            *(*settings, "task=masked_lm", "data=synthetic", "run.name=other", f"run.root={place}"),
            *(f"data.root={place}/data", f"model.init_from={place}/masked"),
        )


def test_logits_and_embeddings_that_are_scored_are_those_of_transformers(place):
    config = read_config(place / "labelled")
    torch.manual_seed(0)
    shape = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    bert = transformers.BertConfig(**shape, vocab_size=300, num_labels=3, initializer_range=0.5)
    model = transformers.BertForSequenceClassification(bert).eval()
    model.save_pretrained(place / "scorer")
    stream = open_data(config)["train"]
    batch = stream.gather(np.arange(stream.num_ids))
    mask = torch.arange(12) < batch["lengths"][:, None]
    with torch.no_grad():
        found = model(input_ids=batch["tokens"], attention_mask=mask, output_hidden_states=True)
    means = (found.hidden_states[-1] * mask[..., None]).sum(dim=1) / batch["lengths"][:, None]
    asked = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, expected in (("logits", found.logits), ("embeddings", means)):
        assert mask.sum() < mask.numel() and expected.std(dim=0).min() > 0.01, "samples differ, in length too"
        score_samples(ScoreConfig(**asked, out=str(place / name), by=str(place / "scorer"), what=Scored[name]))
        assert np.abs(np.load(place / name / f"train.{name}.npy") - expected.numpy()).max() <= 1e-5


def test_an_export_has_the_labels_and_opens_with_the_same_logits(place):
    out = place / "exported"
    export(place / "labelled", out, precision=Precision.fp32, max_shard_bytes=2**30)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert sorted(model.config.id2label.values()) == ["no", "so", "yes"]
    reader = WeightReader(find_whole(place / "labelled")[1])
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, reader.read(f"{MODEL}causal_lm.{name}")), name
    ids, lengths = np.arange(3, 27).reshape(2, 12), np.array([12, 7])
    asked = bigtrain.predict(place / "labelled", {"tokens": ids, "lengths": lengths})
    mask = torch.arange(12) < torch.from_numpy(lengths)[:, None]
    with torch.no_grad():
        logits = model(torch.from_numpy(ids), attention_mask=mask.long()).logits
    for answer, found in zip(asked, logits.softmax(-1), strict=True):
        assert model.config.id2label[int(found.argmax())] == answer["label"]
        assert float(found.max()) == pytest.approx(answer["probability"], rel=1e-5)
    (asked,) = bigtrain.predict(place / "labelled", ["line 3"])
    with torch.no_grad():
        found = model(**transformers.AutoTokenizer.from_pretrained(out)(["line 3"], return_tensors="pt")).logits
    assert float(found.softmax(-1).max()) == pytest.approx(asked["probability"], rel=1e-5), "texts begin alike"
    with pytest.raises(ConfigError, match=r"has 3 labels \(.*\), but the task has 2; set task.num_labels=3"):
        np.savez(place / "rows.npz", tokens=np.ones((9, 12), int), lengths=np.full(9, 12), labels=np.arange(9) % 2)
        bigtrain.train(
            *("+model=hf", f"model.name={out}", "model.pretrained=true", *RUN, f"run.root={place}", "run.name=again"),
            *("task=classification", "task.inputs=tokens", "data=records", f"data.path={place}/rows.npz"),
        )


def test_a_masked_language_model_is_exported_with_its_mask(place):
    export(place / "masked", place / "mask", precision=Precision.fp32, max_shard_bytes=2**30)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "mask")
    assert tokenizer.mask_token == "[MASK]" and tokenizer.mask_token_id == 257


def test_adapters_train_a_fresh_head_too_and_peft_opens_both(place):
    peft = pytest.importorskip("peft")
    labelled = ["data=jsonl", "data.content=labelled", f"data.path={place}/rows.jsonl", "data.tokenizer=bytes"]
    task = ["task=classification", "task.num_labels=3", f"model.init_from={place}/masked", "+adapter=lora"]
    bigtrain.train(
        *(*BERT, *RUN, f"data.root={place}/data", f"run.root={place}", *labelled, *task),
        *("run.name=adapted", "train.steps=3", "optimizer.lr=1e-2", "scheduler.warmup_steps=0"),
    )
    options = {"precision": Precision.fp32, "max_shard_bytes": 2**30}
    export(place / "masked", place / "trunk", **options)
    export(place / "adapted", place / "merged", **options)
    export(place / "adapted", place / "adapter", merge=False, **options)
    classifier = transformers.AutoModelForSequenceClassification
    merged = classifier.from_pretrained(place / "merged").eval()
    opened = peft.PeftModel.from_pretrained(
        classifier.from_pretrained(place / "trunk", num_labels=3), str(place / "adapter")
    ).eval()
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        assert (merged(ids).logits - opened(ids).logits).abs().max() <= 1e-5
