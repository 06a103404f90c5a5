"""Samples without a target that counts: not drawn, but named; runs that began with them go on with them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import Content, DataConfig, DataSource, Packing
from bigtrain.data.order.cursor import Cursor, chain_digest
from bigtrain.data.prepare.corpus import prepare
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


@given(split=masked_splits(), packing=st.sampled_from([Packing.concat, Packing.best_fit]))
@settings(deadline=None)
def test_answered_are_the_samples_with_a_target(split, packing):
    packed = build_packing(split, T, packing, document_mask=False)
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
    stream = open_in(tmp_path, [90] * 30, packing=packing)["train"]
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
    fitting = open_in(tmp_path / "validation", [900] * 12, packing=Packing.best_fit)["validation"]
    require_validation_targets(fitting, batches=1000, global_batch_size=1, objective=CausalLM())
