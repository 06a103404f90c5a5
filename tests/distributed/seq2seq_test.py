"""Sequence to sequence from pairs of text: what is written in validation and predicted is the same at every world size."""

import json
from pathlib import Path

import pytest

from bigtrain.run.validation import WRITTEN_METRICS
from tests.distributed.launches import fork

ROOT = Path(__file__).parents[2]
MODEL = (
    "{vocab_size: 258, d_model: 16, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
    "decoder_attention_heads: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32, max_position_embeddings: 64, dropout: 0.0, "
    "pad_token_id: 257, eos_token_id: 256, bos_token_id: 256, decoder_start_token_id: 256, forced_eos_token_id: 256}"
)
SETTINGS = [
    *("+model=hf", "model.architecture=marian", f"model.settings={MODEL}", "task=seq2seq", "data=jsonl"),
    *("data.content=seq2seq", "data.tokenizer=bytes", "data.sequence_length=12", "data.source_length=10"),
    *("data.validation_fraction=0.3", "engine.precision=fp32", "train.steps=60", "train.global_batch_size=8"),
    *("optimizer.lr=2e-2", "scheduler.warmup_steps=5", "validation.every_steps=30", "validation.batches=3"),
    "validation.written_samples=13",
]


def launch(world_size, script, *args):
    done = fork(f"{script}.py", *args, cwd=ROOT, world_size=world_size)
    assert done.code == 0, done.out + done.err


def events(run, kind):
    return [e for line in (run / "events.jsonl").read_text().splitlines() if (e := json.loads(line))["event"] == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("pairs")
    pairs = [{"source": letter * (i % 5 + 1), "target": letter.upper()} for i in range(60) for letter in "abcdefgh"]
    (place / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    given = [*SETTINGS, f"data.path={place}/pairs.jsonl", f"data.root={place}/data", f"run.root={place}/runs"]
    launch(1, "train", *given, "engine=ddp", "run.name=one")
    launch(3, "train", *given, "engine=fsdp", "run.name=three")
    return place / "runs"


def test_what_is_written_and_its_metrics_do_not_depend_on_the_world(runs):
    one, three = (events(runs / name, "validation") for name in ("one", "three"))
    assert [e["step"] for e in one] == [30, 60] == [e["step"] for e in three]
    for found, right in zip(three, one, strict=True):
        assert found["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert {name: found[name] for name in WRITTEN_METRICS} == {name: right[name] for name in WRITTEN_METRICS}
    texts = [event["samples"] for event in events(runs / "one", "written")]
    assert texts == [event["samples"] for event in events(runs / "three", "written")]
    last = texts[-1]
    assert len(last) == 10 and all(text["target"] == text["source"][0].upper() for text in last)
    assert one[-1]["exact"] > 0.2, "a letter of eight by chance"


def test_predictions_are_texts_in_the_order_of_the_sources(runs, tmp_path):
    seen = events(runs / "one", "written")[-1]["samples"]
    sources = [text["source"] for text in seen]
    (tmp_path / "sources.txt").write_text("\n".join([sources[0], "", *sources[1:], ""]))
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.jsonl"
        launch(world_size, "predict", f"checkpoint={runs}/one", f"inputs={tmp_path}/sources.txt", f"out={out}")
        written = [json.loads(line)["text"] for line in out.read_text().splitlines()]
        assert written == [seen[0]["written"], "", *(text["written"] for text in seen[1:])]
