import json
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.config import Content, DataConfig, DataSource, Duplicates, FilterConfig
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.prepare.sources import source_parts
from bigtrain.data.prepare.survey import (
    exact_duplicates,
    minhash,
    near_duplicates,
    rejection,
    repeated_line_share,
    symbol_share,
)
from bigtrain.data.read.corpus import Corpus, open_corpus
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.errors import DataError

WORDS = [f"word{i}" for i in range(2000)]


def prose(seed, num_words=200):
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def config_of(tmp_path, records, **changes):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(
        source=DataSource.jsonl,
        path=str(tmp_path / "a.jsonl"),
        root=str(tmp_path / "data"),
        tokenizer="bytes",
        validation_fraction=0.3,
        **changes,
    )


def texts_of(directory, splits=("train", "validation")):
    corpus, tokenizer = Corpus.open(directory, vocab_size=257), load_tokenizer(directory)
    texts = []
    for split in map(corpus.split, splits):
        for shard in range(len(split.shard_tokens)):
            offsets = split.documents(shard)
            tokens = split.read(shard)
            texts += [tokenizer.decode(tokens[a : b - 1]) for a, b in pairwise(offsets)]
    return sorted(texts)


def test_shares_are_those_of_a_document_that_can_be_counted_by_hand():
    assert repeated_line_share("abcd\n ab\n\nabcd \nabcd\nxy") == pytest.approx(8 / 16)
    assert repeated_line_share("") == repeated_line_share("one line") == 0
    assert symbol_share("ab1 é -- _\n!?") == pytest.approx(5 / 9)
    assert symbol_share(" \n") == 0 and symbol_share("東京") == 0


@pytest.mark.parametrize(
    ("filters", "rejected"),
    [
        ({}, None),
        ({"min_characters": 12}, None),
        ({"min_characters": 13}, "min_characters"),
        ({"max_characters": 12}, None),
        ({"max_characters": 11}, "max_characters"),
        ({"max_repeated_line_share": 0.5}, None),
        ({"max_repeated_line_share": 0.4}, "max_repeated_line_share"),
        ({"max_symbol_share": 0.2}, None),
        ({"max_symbol_share": 0.1}, "max_symbol_share"),
    ],
)
def test_each_filter_has_its_bound(filters, rejected):
    assert rejection("abcd-\nabcd-\n", FilterConfig(**filters)) == rejected


@given(st.lists(st.integers(0, 5), max_size=30))
def test_of_equal_documents_the_first_stays(values):
    hashes = np.array([(value % 2, value) for value in values], dtype=np.uint64).reshape(-1, 2)
    assert exact_duplicates(hashes).tolist() == [value in values[:i] for i, value in enumerate(values)]


def test_similar_documents_are_found_and_others_are_not():
    texts = [prose(i) for i in range(300)]
    words = texts[7].split()
    slightly, half = [*words[:100], "changed", *words[101:]], [*words[:100], *prose(999, 100).split()]
    changed = [" ".join(slightly), " ".join(half), texts[7].upper() + "!"]
    flags = list(near_duplicates(map(minhash, texts + changed), 0.8))
    assert flags == [False] * 300 + [True, False, True]


def test_very_short_documents_can_be_compared():
    assert list(near_duplicates(map(minhash, ["", "one", "two", "one"]), 0.8))[2:] == [False, True]


def test_what_is_left_out_is_counted_by_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("bigtrain.data.prepare.sources._PART_BYTES", 8000)  # several parts, for two processes
    kept = [prose(i) for i in range(20)]
    texts = [*kept, "short", kept[3], "-" * 500, "same line\n" * 50, kept[5].replace("word7 ", "other "), ""]
    filters = FilterConfig(
        min_characters=10, max_repeated_line_share=0.5, max_symbol_share=0.5, duplicates=Duplicates.near
    )
    config = config_of(tmp_path, [{"text": text} for text in texts], filters=filters, prepare_processes=2)
    assert len(source_parts(config)) > 2
    directory = prepare(config, progress=False)
    report = json.loads((directory / "report.json").read_text())
    found = {reason: dropped["documents"] for reason, dropped in report["dropped"].items()}
    expected = {"min_characters": 1, "max_symbol_share": 1, "max_repeated_line_share": 1, "exact_duplicate": 1}
    changed = kept[5].replace("word7 ", "other ") == kept[5]
    assert found == expected | ({"exact_duplicate": 2} if changed else {"near_duplicate": 1})
    assert report["dropped"]["min_characters"]["examples"] == [f"a.jsonl:{len(kept) + 1}"]
    assert report["empty_documents"] == 1 and report["documents"] == 20 and 0.9 < report["unique_share"] < 1
    assert texts_of(directory) == sorted(kept)


def test_without_filters_nothing_is_left_out(tmp_path):
    texts = ["same"] * 5 + ["-", "x" * 100]
    directory = prepare(config_of(tmp_path, [{"text": text} for text in texts]), progress=False)
    assert texts_of(directory) == sorted(texts)
    assert json.loads((directory / "report.json").read_text())["unique_share"] == pytest.approx(105 / 121)


def test_equal_documents_are_never_in_both_splits(tmp_path):
    texts = [prose(i % 40, 10) for i in range(200)]
    config = config_of(tmp_path, [{"text": text} for text in texts])
    directory = prepare(config, progress=False)
    train, validation = (texts_of(directory, [split]) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts)
    assert len(set(train)) > 5 and len(set(validation)) > 5, "otherwise this shows little"
    assert not set(train) & set(validation)
    # A part of the text has the same sides, as do other data sets of a mixture with the same texts.
    few = config_of(tmp_path, [{"text": text} for text in texts[:17]], shard_tokens=1000)
    directory = prepare(few, progress=False)
    assert set(texts_of(directory, ["train"])) <= set(train)
    assert set(texts_of(directory, ["validation"])) <= set(validation)


def test_filters_that_leave_nothing_are_explained(tmp_path):
    config = config_of(tmp_path, [{"text": "a"}, {"text": "b"}], filters=FilterConfig(min_characters=5))
    with pytest.raises(DataError, match=r"0 documents with text \(left out by data\.filters: min_characters 2\)"):
        prepare(config, progress=False)


def test_of_a_pair_only_the_tokens_of_the_answer_count(tmp_path):
    pairs = [{"prompt": f"{i}+{i}=", "answer": f"{2 * i}"} for i in range(30)]
    config = config_of(tmp_path, pairs, content=Content.pairs, shard_tokens=60)
    directory = prepare(config, progress=False)
    corpus, counted_texts = open_corpus(config, vocab_size=257, directory=directory), []
    assert len(corpus.index.train.shards) > 1
    for split in map(corpus.split, ("train", "validation")):
        for shard in range(len(split.shard_tokens)):
            tokens, counted, offsets = split.read(shard), split.counted(shard), split.documents(shard)
            assert counted.dtype == np.uint8 and counted.shape == tokens.shape
            for start, stop in pairwise(offsets):
                counted_texts.append(bytes(tokens[start : stop - 1][counted[start : stop - 1] == 1].tolist()).decode())
                assert tokens[stop - 1] == 256 and counted[stop - 1] == 1, "that the answer ends is learnt too"
    assert sorted(counted_texts) == sorted(pair["answer"] for pair in pairs)
