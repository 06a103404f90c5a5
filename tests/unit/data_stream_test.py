import dataclasses
import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.checkpoint.store import RunState
from bigtrain.config import (
    ComponentConfig,
    Content,
    DataConfig,
    DataSource,
    ModelConfig,
    Packing,
    TrainConfig,
    WeightChangeConfig,
    component_data,
)
from bigtrain.config.check import check_data
from bigtrain.config.convert import from_dict, to_dict
from bigtrain.data.order.cursor import Cursor, chain_digest
from bigtrain.data.prepare.corpus import prepare, prepare_components
from bigtrain.data.read.corpus import FileSplit, TokenSplit
from bigtrain.data.read.index import read_index
from bigtrain.data.read.loader import TrainLoader, validation_batches
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.data.streams import open_streams
from bigtrain.errors import CheckpointError, DataError
from bigtrain.run.data import check_continuation, remarks
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.tasks.causal_lm import CausalLM

T = 4


def split_of(name, shard_lengths, first_token):
    """Shards of documents; all tokens of all splits differ."""
    tokens, documents = [], []
    for lengths in shard_lengths:
        size = sum(lengths)
        tokens.append(np.arange(first_token, first_token + size, dtype=np.uint32))
        documents.append(np.cumsum([0, *lengths]))
        first_token += size
    return TokenSplit("train", tokens, name, documents=documents)


@st.composite
def mixed_data(draw):
    """A data section with one to three components, and their splits."""
    names = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True).map(sorted))
    shards = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=3)
    splits, mixture = {}, {}
    for number, name in enumerate(names):
        lengths = draw(shards.filter(lambda shards: any(sum(lengths) > T for lengths in shards)))
        splits[name] = split_of(name, lengths, 10_000 * number + 1)
        changes = draw(st.lists(st.integers(1, 9), max_size=1))
        later = [WeightChangeConfig(step=step, weight=draw(st.sampled_from([0.3, 1.0]))) for step in changes]
        mixture[name] = ComponentConfig(weight=draw(st.sampled_from([0.1, 0.5, 1.0])), later_weights=later)
    data = DataConfig(
        sequence_length=T,
        mixture=mixture,
        packing=draw(st.sampled_from(Packing)),
        document_mask=draw(st.booleans()),
        shuffle_window_shards=draw(st.none() | st.integers(1, 3)),
    )
    return data, splits


@st.composite
def topologies(draw, global_batch_size):
    """(micro-batch, ranks) that divide a global batch."""
    dp_size = draw(st.sampled_from([n for n in (1, 2, 3, 4) if global_batch_size % n == 0]))
    per_rank = global_batch_size // dp_size
    return draw(st.sampled_from([n for n in range(1, per_rank + 1) if per_rank % n == 0])), dp_size


def stream_of(data, splits, **kwargs):
    return SampleStream("train", splits, data, **{"seed": 1, "global_batch_size": 12} | kwargs)


def steps_of(data, splits, topology, start, num_steps, prefetch_steps=1):
    """Per step: all rows of the global batch in order, and the cursor after it."""
    micro_batch_size, dp_size = topology
    ranks = []
    for rank in range(dp_size):
        loader = TrainLoader(
            stream_of(data, splits),
            global_batch_size=12,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
            start=start,
            prefetch_steps=prefetch_steps,
            pin_memory=False,
            objective=CausalLM(),
        )
        with loader:
            ranks.append([next(loader) for _ in range(num_steps)])
    rows = [
        [
            row
            for part in parts
            for batch in part.micro_batches
            for row in zip(*map(rows_of, tensors(batch)), strict=True)
        ]
        for parts in zip(*ranks, strict=True)
    ]
    for parts in zip(*ranks, strict=True):
        num_targets = sum((row != IGNORE_INDEX).sum().item() for part in parts for row in targets_of(part))
        assert sum(part.num_targets for part in parts) == num_targets
        assert {part.global_num_targets for part in parts} <= {None, num_targets}
        assert (parts[0].global_num_targets is None) == (data.packing is Packing.best_fit)
    cursors = [{part.after for part in parts} for parts in zip(*ranks, strict=True)]
    assert all(len(same) == 1 for same in cursors), "the cursor is the same on every rank"
    return rows, [cursor for (cursor,) in cursors]


def targets_of(step_batch):
    return [batch["targets"] for batch in step_batch.micro_batches]


def tensors(batch):
    return list(batch.values())


def rows_of(tensor):
    return [tuple(row) for row in tensor.tolist()]


@settings(deadline=None, max_examples=15)
@given(drawn=mixed_data(), data=st.data())
def test_killed_and_resumed_anywhere_every_step_is_the_same(drawn, data):
    config, splits = drawn
    rows, cursors = steps_of(config, splits, (12, 1), Cursor(), 8)
    killed_after = data.draw(st.integers(0, 7))
    start = cursors[killed_after - 1] if killed_after else Cursor()
    topology, prefetch = data.draw(topologies(12)), data.draw(st.integers(1, 4))
    resumed, resumed_cursors = steps_of(config, splits, topology, start, 8 - killed_after, prefetch)
    assert resumed == rows[killed_after:] and resumed_cursors == cursors[killed_after:]


@settings(deadline=None, max_examples=40)
@given(drawn=mixed_data())
def test_each_component_is_drawn_as_if_it_were_alone_and_once_per_epoch(drawn):
    config, splits = drawn
    stream = stream_of(config, splits)
    ids = stream.ids(0, 400)
    begin = 0
    for name, component in stream.components.items():
        size = component.order.num_samples
        own = ids[(ids >= begin) & (ids < begin + size)] - begin
        alone = stream_of(dataclasses.replace(config, mixture={}), {name: splits[name]})
        assert own.tolist() == alone.ids(0, len(own)).tolist()
        assert stream.progress(400)[name] == (len(own) * T, len(own) / size)
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
        begin += size


@settings(deadline=None, max_examples=20)
@given(drawn=mixed_data(), data=st.data())
def test_a_checkpoint_knows_whether_the_data_continues(drawn, data):
    config, splits = drawn
    stream = stream_of(config, splits)
    before = Cursor(3, 36, "0123456789abcdef")
    after = Cursor(4, 48, chain_digest(before.digest, stream.ids(36, 12), stream.content))
    state = stream.state(before, after)
    assert stream_of(config, splits, previous=state).continues(state)
    assert sum(state.counts.values()) == 48
    assert not stream.continues(dataclasses.replace(state, digest="0" * 16))
    if stream.num_samples > 50:
        assert not stream_of(config, splits, seed=2).continues(state)
    # Other texts and other ways to cut them may have the same numbers.
    assert not stream_of(dataclasses.replace(config, document_mask=not config.document_mask), splits).continues(state)


def two_components(**weights):
    lengths = [[T * 100 + 1]]
    splits = {name: split_of(name, lengths, 1000 * number) for number, name in enumerate(sorted(weights))}
    mixture = {name: ComponentConfig(weight=weight) for name, weight in weights.items()}
    return DataConfig(sequence_length=T, mixture=mixture), splits


def test_another_mixture_begins_where_the_old_one_ended():
    data, splits = two_components(a=0.75, b=0.25)
    state = stream_of(data, splits).state(Cursor(3, 36), Cursor(4, 48))
    assert state.counts == {"a": 36, "b": 12}
    other, three = two_components(a=1.0, c=1.0)
    three["a"] = splits["a"]
    changed = stream_of(other, three, previous=state)
    ids = changed.ids(48, 10)
    alone = stream_of(dataclasses.replace(data, mixture={}), {"a": splits["a"]}).ids(36, 5)
    assert ids[ids < 100].tolist() == alone.tolist(), "a goes on where it was"
    # The change is part of the next checkpoint: whoever resumes from that one needs no change.
    later = changed.state(Cursor(5, 60), Cursor(6, 72))
    assert (later.origin_samples, later.origin_counts) == (48, {"a": 36, "c": 0})
    assert stream_of(other, three, previous=later).ids(72, 12).tolist() == changed.ids(72, 12).tolist()


def test_the_end_of_the_data_is_told_before_the_run_begins():
    data, splits = two_components(a=1.0, b=1.0)
    for component in data.mixture.values():
        component.max_epochs = 2
    stream = stream_of(data, splits)
    stream.require_steps(Cursor(), 33, 12)
    with pytest.raises(DataError, match=r"train\.steps=34: there is data for 33 steps of 12 samples.*train\.steps=33"):
        stream.require_steps(Cursor(), 34, 12)
    with pytest.raises(DataError, match=r"data\.mixture\.b is shorter than one sample"):
        stream_of(data, splits | {"b": split_of("b", [[2]], 0)}).require_steps(Cursor(), 1, 12)


def test_validation_takes_every_component():
    data, splits = two_components(a=1.0, b=0.5)
    stream = SampleStream("validation", splits, data, seed=1, global_batch_size=10)
    batches = chain.from_iterable(
        validation_batches(
            stream,
            batches=2,
            global_batch_size=10,
            micro_batch_size=5,
            dp_rank=0,
            dp_size=1,
            objective=CausalLM(),
        )
    )
    firsts = [token for batch in batches for token in batch["tokens"][:, 0].tolist()]
    assert firsts == [1000 * (i // 10) + T * 10 * (i % 10) for i in range(20)]


class RemoteSplit(TokenSplit, FileSplit):
    """Has to be fetched into a cache of so many shards, and notes what it is asked to fetch."""

    is_remote = True
    cache_shards = 5

    def prefetch(self, shards):
        self.asked.append(list(shards))


def test_shards_are_asked_for_before_they_are_needed():
    data = DataConfig(sequence_length=T, shuffle_window_shards=2)
    split = RemoteSplit("train", [np.arange(T * 6 + 1, dtype=np.uint32)] * 7, "f")
    split.asked = []
    stream = stream_of(data, {"data": split}, global_batch_size=6)
    needed = []
    for step in range(7):
        stream.prefetch(step * 6)
        needed.append(set((stream.ids(step * 6, 6) // 6).tolist()))
    assert len(split.asked) == 4, "once per window"
    for window, asked in enumerate(split.asked):
        assert set.union(*needed[2 * window : 2 * window + 2]) == set(asked[:2])
        assert len(asked) == min(4, 7 - 2 * window)


def test_a_cache_that_cannot_hold_a_window_is_refused():
    split = RemoteSplit("train", [np.arange(T * 6 + 1, dtype=np.uint32)] * 12, "f")
    with pytest.raises(DataError, match=r"holds 5 shards .* within 8 at a time; .* or data\.shuffle_window_shards=5"):
        stream_of(DataConfig(sequence_length=T), {"data": split})


def test_synthetic_components_hold_different_samples():
    mixture = {"a": ComponentConfig(), "b": ComponentConfig()}
    data = DataConfig(source=DataSource.synthetic, sequence_length=16, mixture=mixture)
    stream = open_streams(data, {}, vocab_size=97, seed=0, global_batch_size=4)["train"]
    samples = stream.gather(np.array([5, stream.num_samples // 2 + 5]))
    assert samples["tokens"][0].tolist() != samples["tokens"][1].tolist()
    assert stream.origin_of(5)[0] == "a" and stream.origin_of(stream.num_samples - 1)[0] == "b"


@pytest.mark.parametrize(
    ("component", "problem"),
    [
        ({"weight": -1.0}, "data.mixture.web.weight=-1.0: must be at least 0"),
        ({"weight": 0.0}, "data.mixture: at least one component needs a positive weight"),
        ({"max_epochs": 0}, "data.mixture.web.max_epochs=0: must be at least 1"),
        (
            {"source": "text"},
            "data.mixture.web.path: missing; data.mixture.web.source=text needs data.mixture.web.path=",
        ),
        ({"later_weights": [{"step": 5, "weight": 1.0}, {"step": 5, "weight": 2.0}]}, "steps [5, 5] must be ascending"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_said(component, problem):
    component = {"source": "synthetic"} | component
    data = from_dict(DataConfig, {"source": "synthetic", "mixture": {"web": component}})
    assert from_dict(DataConfig, to_dict(data)) == data
    assert any(found.startswith(problem) or problem in found for found in check_data(data)), check_data(data)


def test_a_mixture_trains_one_bpe_on_all_components(tmp_path):
    for name, word in (("a", "banana"), ("b", "kiwi")):
        lines = [json.dumps({"text": f"{word} {word} number {i}"}) + "\n" for i in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    mixture = {name: ComponentConfig(path=str(tmp_path / f"{name}.jsonl")) for name in "ab"}
    data = DataConfig(
        source=DataSource.jsonl,
        root=str(tmp_path / "data"),
        tokenizer_vocab_size=280,
        prepare_processes=1,
        sequence_length=16,
        mixture=mixture,
    )
    directories = dict(prepare_components(data, progress=False))
    first, second = (load_tokenizer(directory) for directory in directories.values())
    assert first.to_str() == second.to_str()
    assert len(first.encode(" banana").ids) == len(first.encode(" kiwi").ids) == 1, "it has seen both"
    assert open_streams(data, directories, vocab_size=280, seed=0, global_batch_size=4)["train"].num_samples > 10
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert dict(prepare_components(data, progress=False)) == directories
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "found again"
    alone = prepare(component_data(data)["a"], progress=False)
    assert len(load_tokenizer(alone).encode(" kiwi").ids) > 1
    data.mixture["c"] = ComponentConfig(source=DataSource.prepared, path="corpus")
    assert any("use that one: data.tokenizer=corpus" in problem for problem in check_data(data))


def test_components_share_one_tokenizer(tmp_path):
    text = "".join(json.dumps({"text": f"document {i} has the words of number {i}"}) + "\n" for i in range(300))
    (tmp_path / "text.jsonl").write_text(text)
    common = {"root": str(tmp_path / "data"), "validation_fraction": 0.1, "prepare_processes": 1, "sequence_length": 16}
    of_text = common | {"source": DataSource.jsonl, "path": str(tmp_path / "text.jsonl")}
    first = prepare(DataConfig(**of_text, tokenizer_vocab_size=300), progress=False)
    alike = prepare(DataConfig(**of_text, tokenizer=str(first), text_field="text"), progress=False)
    other = prepare(DataConfig(**of_text, tokenizer="bytes"), progress=False)
    assert load_tokenizer(alike).to_str() == load_tokenizer(first).to_str()

    def opened(*directories):
        mixture = {f"part{i}": ComponentConfig(path=str(path)) for i, path in enumerate(directories)}
        data = DataConfig(**common, source=DataSource.prepared, mixture=mixture)
        paths = {f"part{i}": path for i, path in enumerate(directories)}
        return open_streams(data, paths, vocab_size=300, seed=0, global_batch_size=4)["train"]

    assert opened(first, alike).num_samples > 0
    with pytest.raises(DataError, match=r"different tokenizers \(part0: .*, part1: bytes\)"):
        opened(first, other)


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_what_is_odd_but_not_wrong_is_said(tmp_path, on_the_fly):
    pairs = [json.dumps({"prompt": f"{i}+{i}=", "answer": f"{2 * i}"}) + "\n" for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(pairs))
    data = DataConfig(
        source=DataSource.jsonl,
        path=str(tmp_path / "pairs.jsonl"),
        root=str(tmp_path / "data"),
        content=Content.pairs,
        tokenizer="bytes",
        sequence_length=16,
        prepare_processes=1,
        on_the_fly=on_the_fly,
    )
    directories = dict(prepare_components(data, progress=False))

    def said(packing, **model):
        changed = dataclasses.replace(data, packing=packing)
        config = TrainConfig(data=changed, model=ModelConfig(**model))
        stream = open_streams(changed, directories, vocab_size=config.model.vocab_size, seed=0, global_batch_size=4)[
            "train"
        ]
        return [remark.partition(" ")[0].rstrip(",") for remark in remarks(config, stream)]

    assert said(Packing.concat, vocab_size=384) == ["data.packing=concat"]
    assert said(Packing.best_fit, vocab_size=384) == [], "257 ids, padded to a multiple of 128"
    assert said(Packing.best_fit, vocab_size=385) == ["model.vocab_size=385"]
    assert said(Packing.best_fit, vocab_size=50257, init_from="gpt2") == [], "its weights have so many"


def test_text_that_is_prepared_otherwise_now_is_continued_as_it_was(tmp_path):
    """As bigtrain itself once did; a setting that it did not have then has not changed."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"the cat {i} sat on a mat " * 9)
    data = DataConfig(
        source=DataSource.text, path=str(tmp_path / "*.txt"), root=str(tmp_path / "data"), tokenizer="bytes"
    )
    data = dataclasses.replace(data, validation_fraction=0.3, sequence_length=8)
    config, streams = TrainConfig(data=data), {}
    for tokenizer in ("bytes", "bpe"):
        changed = dataclasses.replace(data, tokenizer=tokenizer, tokenizer_vocab_size=257)
        corpus = prepare(changed, progress=False)
        streams[corpus] = open_streams(changed, {"data": corpus}, vocab_size=300, seed=0, global_batch_size=1)["train"]
    then, now = streams
    former = to_dict(config)
    former["data"].pop("on_bad_row")
    former["data"]["split"] = "train"
    state = RunState(1, 8, 1, read_index(then).fingerprint, former, {}, 1)
    assert check_continuation(state, config, streams[then], 1) == []
    with pytest.raises(CheckpointError) as caught:
        check_continuation(state, config, streams[now], 1)
    said = str(caught.value).splitlines()
    assert said[0].startswith("the checkpoint was trained on other data") and "no setting has changed" in said[1]
    assert said[2].strip() == f"its own text, as it was prepared then: data=prepared data.path={then}"
    for path in then.iterdir():
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        check_continuation(state, config, streams[now], 1)
    assert len(str(caught.value).splitlines()) == 3
