"""Samples without a target that counts: not drawn, but named; runs that began with them go on with them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import ComponentConfig, Content, DataConfig, DataSource, LongChats, Packing
from bigtrain.data.order.cursor import Cursor, chain_digest
from bigtrain.data.prepare.corpus import prepare, prepare_components
from bigtrain.data.prepare.live import open_live
from bigtrain.data.read.corpus import TokenSplit
from bigtrain.data.read.index import read_index
from bigtrain.data.read.loader import require_validation_targets
from bigtrain.data.read.packing import build_packing
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.workers import Helpers
from bigtrain.data.streams import open_streams
from bigtrain.errors import DataError
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.tasks.causal_lm import CausalLM

T = 16
FATES = [LongChats.cut, LongChats.drop, LongChats.split]


@st.composite
def masked_splits(draw):
    """Shards of documents of which little counts, sometimes nothing."""
    lengths = draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=3))
    rare = draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    documents = [np.cumsum([0, *shard]) for shard in lengths]
    tokens = [random.integers(1, 99, ends[-1]).astype(np.uint16) for ends in documents]
    counted = [(random.integers(0, rare, len(shard)) == 0).astype(np.uint8) for shard in tokens]
    return TokenSplit("train", tokens, "f", documents=documents, counted=counted)


@given(split=masked_splits(), packing=st.sampled_from([Packing.concat, None]), long_chats=st.sampled_from(FATES))
@settings(deadline=None)
def test_answered_are_the_samples_with_a_target(split, packing, long_chats):
    packed = build_packing(split, T, packing, document_mask=False, long_chats=long_chats)
    everything = np.arange(packed.shard_samples.sum())
    targets = packed.gather(everything)["targets"]
    has_target = (targets != IGNORE_INDEX).any(axis=1)
    answered = packed.answered()
    assert (everything if answered is None else answered).tolist() == np.flatnonzero(has_target).tolist()
    assert (answered is None) == has_target.all(), "nothing changes for data that needs nothing left out"


def config_in(directory, prompts, **changes):
    """Pairs with prompts of these lengths, in bytes."""
    rows = [{"prompt": f"{i:03}".ljust(length, "."), "answer": "yes"} for i, length in enumerate(prompts)]
    directory.mkdir(exist_ok=True)
    (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"source": DataSource.jsonl, "path": str(directory / "pairs.jsonl"), "root": str(directory / "data")}
    settings = {"content": Content.pairs, "tokenizer": "bytes", "sequence_length": T, "validation_fraction": 0.2}
    settings |= {"packing": Packing.concat}
    return DataConfig(**given | settings | changes)


def open_in(directory, prompts, previous=None, **changes):
    config = config_in(directory, prompts, **changes)
    corpus = prepare(config, progress=False)
    return open_streams(config, {"data": corpus}, vocab_size=257, seed=3, global_batch_size=4, previous=previous)


def first_step(stream):
    ids = stream.ids(0, 4)
    return stream.state(Cursor(), Cursor(1, 4, chain_digest(Cursor().digest, ids, stream.content)))


@pytest.mark.parametrize("packing", [Packing.concat, Packing.best_fit])
def test_every_sample_that_is_drawn_has_a_target(tmp_path, packing):
    stream = open_in(tmp_path, [90] * 30, packing=packing, long_chats=LongChats.split)["train"]
    assert stream.num_left_out > 40
    ids = stream.ids(0, 2 * stream.num_samples)
    assert len(set(ids.tolist())) == stream.num_samples and (np.bincount(ids)[ids] == 2).all()
    assert (stream.gather(ids)["targets"].numpy() != IGNORE_INDEX).any(axis=1).all()
    assert stream.components["data"].epochs(stream.num_samples) == 1.0


def test_a_run_that_began_with_all_samples_goes_on_with_them(tmp_path):
    """And one that began without those that have no target goes on without them."""
    config = config_in(tmp_path, [90] * 30)
    new = open_in(tmp_path, [90] * 30)["train"]
    corpus = prepare(config, progress=False)
    split = new.components["data"].split
    old = SampleStream("train", {"data": split}, config, seed=3, global_batch_size=4, keeps_all=True)
    assert old.num_left_out == 0 and first_step(old).digest != first_step(new).digest
    for began in (old, new):
        again = open_in(tmp_path, [90] * 30, previous=first_step(began))["train"]
        assert again.ids(4, 60).tolist() == began.ids(4, 60).tolist()
    assert corpus.exists()


def test_on_the_fly_too(tmp_path, monkeypatch):
    monkeypatch.setattr("bigtrain.data.prepare.sources._PART_BYTES", 900)
    config = config_in(tmp_path, [90] * 40, on_the_fly=True, shuffle_window_shards=2)
    directory = prepare(config, progress=False)

    def stream(previous=None):
        parts = open_live(directory, config, read_index(directory), Helpers(1))
        return SampleStream("train", {"data": parts}, config, seed=3, global_batch_size=4, previous=previous)

    whole = stream()
    ids = whole.ids(0, 60)
    assert (whole.gather(ids)["targets"].numpy() != IGNORE_INDEX).any(axis=1).all() and whole.num_left_out > 40
    after = Cursor(1, 4, chain_digest(Cursor().digest, ids[:4], whole.content))
    state = whole.state(Cursor(), after)
    again = stream(state)
    assert again.continues(state) and again.ids(4, 56).tolist() == ids[4:].tolist()


def test_splits_without_a_target_are_named(tmp_path):
    with pytest.raises(DataError, match=r"the train split has no target that counts.*larger data\.sequence_length"):
        open_in(tmp_path / "train", [900, 901], sequence_length=600)["train"].require_samples()
    sizes = {"batches": 1, "global_batch_size": 1}
    validation = open_in(tmp_path / "validation", [900] * 12)["validation"]
    with pytest.raises(DataError, match=r"no target that counts.*validation\.batches=1"):
        require_validation_targets(validation, **sizes, objective=CausalLM())
    split = {"packing": Packing.best_fit, "long_chats": LongChats.split}
    fitting = open_in(tmp_path / "validation", [900] * 12, **split)["validation"]
    require_validation_targets(fitting, batches=1000, global_batch_size=1, objective=CausalLM())


CHATS = [[1, 0, 0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 0]]
"""Which tokens of a chat count. Of samples of 8 the first three are too long."""


def split_of(chats):
    tokens = np.arange(10, 10 + sum(map(len, chats)), dtype=np.uint16)
    ends, counted = np.cumsum([0, *map(len, chats)]), np.concatenate(chats).astype(np.uint8)
    return TokenSplit("train", [tokens], "f", documents=[ends], counted=[counted])


@pytest.mark.parametrize(
    ("fate", "counts"),
    [
        (LongChats.cut, [[1, 0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1], [0] * 8, [0, 1, 0]]),
        (LongChats.drop, [[0, 1, 0]]),
        (
            LongChats.split,
            [[1, 0, 0, 1, 1, 0, 0, 1], [1, 1], [0, 0, 1, 1, 1, 1, 1, 1], [1, 0], [0] * 8, [1, 1], [0, 1, 0]],
        ),
    ],
)
def test_of_a_long_chat_an_answer_is_whole_or_the_only_one(fate, counts):
    packed = build_packing(split_of(CHATS), 8, None, document_mask=True, long_chats=fate)
    targets = packed.gather(np.arange(packed.shard_samples.sum()))["targets"]
    found = np.sort(targets[targets != IGNORE_INDEX])
    starts = {LongChats.cut: [0, 10, 20, 30], LongChats.drop: [30], LongChats.split: [0, 8, 10, 18, 20, 28, 30]}[fate]
    expected = [
        10 + start + i for start, piece in zip(starts, counts, strict=True) for i, one in enumerate(piece) if one
    ]
    assert found.tolist() == expected
    assert packed.num_cut() == (0 if fate is LongChats.split else 3)


def test_an_answer_that_ends_with_the_sample_is_whole():
    (chat,) = chats = [[0, 1, 0, 0, 0, 0, 1, 1, 0, 1]]
    packed = build_packing(split_of(chats), 8, None, document_mask=False)
    assert (packed.gather(np.array([0]))["targets"][0] != IGNORE_INDEX).astype(int).tolist() == chat[:8]


def test_long_chats_are_refused_and_are_in_the_digest(tmp_path):
    said = r"9 chats of more than data\.sequence_length=16 tokens in the train split; use a larger one"
    prompts = {"prompts": [3] * 12 + [40] * 10, "packing": None}
    with pytest.raises(DataError, match=said):
        open_in(tmp_path, long_chats=LongChats.refuse, **prompts)
    streams = {fate: open_in(tmp_path, long_chats=fate, **prompts)["train"] for fate in FATES}
    assert [stream.num_cut for stream in streams.values()] == [9, 9, 0]
    assert streams[LongChats.cut].content.endswith("16 best_fit  cut 9")
    assert streams[LongChats.split].content.endswith("16 best_fit "), "as runs of old recorded it"
    short = open_in(tmp_path / "short", [3] * 22, packing=None)["train"]
    assert short.content.endswith("16 best_fit "), "nothing is cut"


def test_a_run_that_cut_answers_from_their_prompts_goes_on_so(tmp_path):
    prompts = [3] * 12 + [40] * 10
    new = open_in(tmp_path, prompts, packing=None)["train"]
    for old in ({"packing": Packing.concat}, {"packing": None, "long_chats": LongChats.split}):
        began = open_in(tmp_path, prompts, **old)["train"]
        assert began.ids(0, 40).tolist() != new.ids(0, 40).tolist()
        again = open_in(tmp_path, prompts, packing=None, previous=first_step(began))["train"]
        assert again.ids(4, 36).tolist() == began.ids(4, 36).tolist() and again.content == began.content


def test_chats_and_text_in_one_mixture(tmp_path):
    """Text is cut on end, chats are not; of text every token counts."""
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{i} " * 30}) for i in range(20)))
    parts = {
        "chats": ComponentConfig(content=Content.pairs),
        "text": ComponentConfig(content=Content.text, path=str(tmp_path / "text.jsonl"), weight=2.0),
    }
    config = config_in(tmp_path, [3] * 22, packing=None, mixture=parts)
    directories = dict(prepare_components(config, progress=False))
    stream = open_streams(config, directories, vocab_size=257, seed=3, global_batch_size=4)["train"]
    assert " 16 best_fit concat " in stream.content
    ids = stream.ids(0, 30)
    origins = np.array([stream.origin_of(int(i))[0] for i in ids])
    counts = (stream.gather(ids)["targets"].numpy() != IGNORE_INDEX).sum(axis=1)
    assert (origins == "text").sum() == 20 and (counts[origins == "text"] == T).all()
    assert set(counts[origins == "chats"].tolist()) <= {4, 8}, "yes and its end, of one chat or two"
