import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import LongChats, Packing
from bigtrain.data.read.batch import ArrayPool
from bigtrain.data.read.corpus import TokenSplit
from bigtrain.data.read.packing import SyntheticSamples, build_packing, pack_best_fit
from bigtrain.tasks.base import IGNORE_INDEX

T = 8
END = 0


@st.composite
def corpora(draw):
    """Shards of documents; each ends with END; every other token occurs once."""
    shards = draw(st.lists(st.lists(st.integers(0, 20), max_size=9), min_size=1, max_size=4))
    tokens, documents, number = [], [], 1
    for lengths in shards:
        row = []
        for length in lengths:
            row += [*range(number, number + max(length - 1, 0)), END][:length] if length else []
            number += length
        tokens.append(np.array(row, dtype=np.uint16))
        documents.append(np.cumsum([0, *lengths]))
    return TokenSplit("train", tokens, "f", documents=documents)


def gathered(split, packing, **kwargs):
    packed = build_packing(split, T, packing, **{"document_mask": True} | kwargs)
    return packed, packed.gather(np.arange(int(packed.shard_samples.sum())))


def runs(row_positions):
    """(begin, end) of the documents of a sample."""
    begins = [*np.flatnonzero(row_positions == 0).tolist(), len(row_positions)]
    return list(itertools.pairwise(begins))


@given(split=corpora())
def test_concatenated_samples_cover_each_shard_in_order(split):
    packed, samples = gathered(split, Packing.concat)
    assert packed.shard_samples.tolist() == [max(n - 1, 0) // T for n in split.shard_tokens]
    row = 0
    for shard, num_samples in enumerate(packed.shard_samples.tolist()):
        tokens = split.read(shard)
        used = slice(row, row + num_samples)
        assert samples["tokens"][used].ravel().tolist() == tokens[: num_samples * T].tolist()
        assert samples["targets"][used].ravel().tolist() == tokens[1 : num_samples * T + 1].tolist()
        row += num_samples
    assert samples["tokens"].dtype == samples["targets"].dtype == np.int64
    with pytest.raises(IndexError):
        packed.gather(np.array([row]))


@given(split=corpora())
def test_positions_count_from_the_token_before_each_document(split):
    packed, samples = gathered(split, Packing.concat)
    for sample in range(len(samples["tokens"])):
        shard, documents = (
            int(np.searchsorted(np.cumsum(packed.shard_samples), sample, "right")),
            packed.documents(sample),
        )
        for begin, end in runs(samples["positions"][sample]):
            assert len(set(documents[begin:end].tolist())) == 1, "a run of positions is within a document"
            assert samples["positions"][sample, begin:end].tolist() == list(range(end - begin))
            if begin:
                assert samples["tokens"][sample, begin] == END and documents[begin] != documents[begin - 1]
        assert shard < len(split.shard_tokens)


@given(split=corpora())
def test_best_fit_has_every_token_as_a_target_once_and_cuts_only_long_documents(split):
    packed, samples = gathered(split, Packing.best_fit)
    counted = samples["targets"] != IGNORE_INDEX
    everything = np.concatenate([split.read(shard) for shard in range(len(split.shard_tokens))])
    assert sorted(samples["targets"][counted].tolist()) == sorted(everything.tolist())
    pieces = []
    for sample in range(len(samples["tokens"])):
        documents = packed.documents(sample)
        assert ((documents >= 0) == counted[sample]).all(), "what is no document does not count"
        for begin, end in runs(samples["positions"][sample]):
            if not counted[sample, begin]:
                continue
            targets, tokens = samples["targets"][sample, begin:end], samples["tokens"][sample, begin:end]
            assert tokens[1:].tolist() == targets[:-1].tolist()
            pieces.append(targets.tolist())
            whole = len(set(documents[begin:end].tolist())) == 1
            assert whole, "attention stays within a document"
            if tokens[0] != END:  # which opens a document; else it is the next piece of a long one
                assert targets[0] in (tokens[0] + 1, END)
    lengths = np.concatenate([np.diff(split.documents(shard)) for shard in range(len(split.shard_tokens))])
    assert len(pieces) == sum(-(-length // T) for length in lengths.tolist())


def slow_best_fit(lengths, capacity):
    """The rule, word for word."""
    room, chosen = [], np.zeros(len(lengths), dtype=np.int64)
    for piece in np.argsort(-lengths, kind="stable"):
        fitting = [(r, b) for b, r in enumerate(room) if r >= lengths[piece]]
        if not fitting:
            room.append(capacity)
            fitting = [(capacity, len(room) - 1)]
        least = min(r for r, _ in fitting)
        bin_number = next(b for r, b in fitting if r == least)
        room[bin_number] -= lengths[piece]
        chosen[piece] = bin_number
    return chosen, room


@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_packing_is_best_fit_decreasing(lengths):
    lengths = np.array(lengths, dtype=np.int64)
    bins = pack_best_fit(lengths, 30)
    filled = np.bincount(bins, weights=lengths) if len(lengths) else np.zeros(0)
    _, room = slow_best_fit(lengths, 30)
    assert sorted(filled.tolist()) == sorted(30 - r for r in room)


def test_a_hundred_thousand_documents_are_packed_tightly_and_soon():
    lengths = np.random.default_rng(0).lognormal(6, 1, 100_000).astype(np.int64).clip(1, 2048)
    bins = pack_best_fit(lengths, 2048)
    assert np.bincount(bins, weights=lengths).max() <= 2048
    assert lengths.sum() / (2048 * (bins.max() + 1)) > 0.99


@given(split=corpora(), packing=st.sampled_from([Packing.concat, Packing.best_fit]))
def test_what_is_masked_in_the_data_does_not_count(split, packing):
    counted = [(split.read(shard) % 3 > 0).astype(np.uint8) for shard in range(len(split.shard_tokens))]
    shards = range(len(split.shard_tokens))
    tokens, documents = [split.read(s) for s in shards], [split.documents(s) for s in shards]
    masked = TokenSplit("train", tokens, "f", documents=documents, counted=counted)
    _, plain = gathered(split, packing)
    _, samples = gathered(masked, packing, long_chats=LongChats.split)
    expected = np.where(plain["targets"] % 3 > 0, plain["targets"], IGNORE_INDEX)
    assert (samples["targets"] == expected).all() and (samples["tokens"] == plain["tokens"]).all()


@settings(deadline=None)
@given(split=corpora(), packing=st.sampled_from([Packing.concat, Packing.best_fit]), data=st.data())
def test_samples_do_not_depend_on_what_is_gathered_with_them(split, packing, data):
    packed, whole = gathered(split, packing)
    ids = data.draw(st.lists(st.sampled_from(range(len(whole["tokens"]))), max_size=9)) if len(whole["tokens"]) else []
    some = packed.gather(np.array(ids, dtype=np.int64))
    for part, all_of_it in (
        (some["tokens"], whole["tokens"]),
        (some["targets"], whole["targets"]),
        (some["positions"], whole["positions"]),
    ):
        assert part.tolist() == all_of_it[ids].tolist()


def test_without_a_document_mask_there_are_no_positions():
    split = TokenSplit("train", np.arange(100, dtype=np.uint16), "f")
    for packing in (Packing.concat, Packing.best_fit):
        assert gathered(split, packing, document_mask=False)[1].keys() == {"tokens", "targets"}
    samples = SyntheticSamples("train", 100, T, document_mask=True).gather(np.arange(3))
    assert samples["positions"].tolist() == [list(range(T))] * 3


def test_memory_is_used_again_only_when_nobody_holds_it():
    pool = ArrayPool()
    first = pool.take(4, T)
    address = first.ctypes.data
    tensor = torch.from_numpy(first)
    assert pool.take(4, T).ctypes.data != address
    del first
    view = tensor[1:]
    del tensor
    assert pool.take(4, T).ctypes.data != address, "a view of a tensor holds it"
    del view
    assert pool.take(3, T).ctypes.data == address
    assert pool.take(4, T + 1).shape == (4, T + 1)


@given(split=corpora(), packing=st.sampled_from([Packing.concat, Packing.best_fit]))
def test_what_was_gathered_stays(split, packing):
    packed, whole = gathered(split, packing)
    before = [array.copy() for array in whole.values()]
    for _ in range(3):
        packed.gather(np.arange(len(whole["tokens"]))[::-1].copy())
    for array, kept in zip(whole.values(), before, strict=True):
        assert np.array_equal(array, kept)
