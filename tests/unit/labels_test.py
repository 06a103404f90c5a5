"""Labelled documents: read from tables, directories and packages, kept beside the tokens, read back a document a sample."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import Content, DataConfig, DataSource, Inputs, OnBad
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.read.corpus import Corpus
from bigtrain.data.read.documents import DocumentSamples, PairSamples
from bigtrain.data.read.index import LabelKind, read_index
from bigtrain.data.streams import require_labels
from bigtrain.errors import DataError
from bigtrain.tasks.classification import Classification
from tests.documents import iterate_documents

WORDS = ["red", "green", "blue"]
NUM_BYTES_IDS = 257


def config(path: Path, root: Path, **settings) -> DataConfig:
    given = {"source": DataSource.jsonl, "content": Content.labelled, "tokenizer": "bytes", "validation_fraction": 0.2}
    return DataConfig(path=str(path), root=str(root / "data"), prepare_processes=1, **given | settings)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples_of(directory: Path, split: str, length: int) -> tuple[DocumentSamples, dict[str, np.ndarray]]:
    samples = DocumentSamples(Corpus.open(directory, vocab_size=NUM_BYTES_IDS).split(split), length)
    return samples, dict(samples.gather(np.arange(int(samples.shard_samples.sum()))))


def texts_of(samples: dict[str, np.ndarray]) -> list[str]:
    """Return the text of each sample, which begins with an end-of-text token."""
    rows = zip(samples["tokens"], samples["lengths"], strict=True)
    return [bytes(row[1:length].astype(np.uint8)).decode() for row, length in rows]


@pytest.mark.parametrize("shard_tokens", [1 << 20, 64])
def test_every_document_has_its_label_in_both_splits_and_all_shards(tmp_path, shard_tokens):
    rows = [{"text": f"{WORDS[i % 3]} {i}", "label": WORDS[i % 3]} for i in range(60)]
    directory = prepare(
        config(write_rows(tmp_path / "a.jsonl", rows), tmp_path, shard_tokens=shard_tokens), progress=False
    )
    index = read_index(directory)
    assert (index.labels.kind, index.labels.names) == (LabelKind.one, sorted(WORDS))
    assert (len(index.train.shards) > 3) == (shard_tokens == 64)
    found = {}
    for split in ("train", "validation"):
        _, samples = samples_of(directory, split, 16)
        assert samples["tokens"].shape[1] == 16 and (samples["tokens"][:, 0] == NUM_BYTES_IDS - 1).all()
        names = [index.labels.names[label] for label in samples["labels"]]
        found |= dict(zip(texts_of(samples), names, strict=True))
    assert found == {row["text"]: row["label"] for row in rows}


def test_a_table_of_any_kind_is_the_same_corpus(tmp_path):
    rows = [(f"a, {i}", str(i % 2)) for i in range(20)]
    write_rows(tmp_path / "a.jsonl", [{"text": text, "label": int(label)} for text, label in rows])
    (tmp_path / "a.csv").write_text("label,text\n" + "".join(f'{label},"{text}"\n' for text, label in rows))
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    kinds = {"a.jsonl": DataSource.jsonl, "a.csv": DataSource.csv, "a.tsv": DataSource.csv}
    corpora = [
        prepare(config(tmp_path / name, tmp_path, source=source), progress=False) for name, source in kinds.items()
    ]
    assert len({read_index(directory).fingerprint for directory in corpora}) == 1
    assert read_index(corpora[0]).labels.names == ["0", "1"]


def test_directories_name_the_labels_of_text(tmp_path):
    for label in WORDS:
        (tmp_path / "books" / label).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "books" / label / f"{i}.txt").write_text(f"{label} {i}")
    given = config(tmp_path / "books", tmp_path, source=DataSource.text)
    documents = list(iterate_documents(given))
    assert [document.labels.names[0] for document in documents] == [document.text.split()[0] for document in documents]
    (tmp_path / "books" / "alone.txt").write_text("no label")
    with pytest.raises(DataError, match=r"alone\.txt: lies in no directory below"):
        list(iterate_documents(given))


def test_the_standard_library_is_labelled_by_package_and_split_by_file(tmp_path):
    given = DataConfig(content=Content.labelled)
    documents = list(iterate_documents(given))
    labels = {document.labels.names[0] for document in documents}
    assert {"asyncio", "email", "test"} <= labels and "json" not in labels  # which is small
    assert all(document.id.startswith(f"{document.labels.names[0]}/") for document in documents)
    assert all(document.group == document.id.partition("#")[0] for document in documents)
    lengths = [len(document.text) for document in documents]
    assert 400 < np.median(lengths) < 700


def test_pairs_of_the_standard_library_are_neighbours_in_a_file():
    given = DataConfig(content=Content.seq2seq)
    documents = [document for document in iterate_documents(given) if document.group == "json/decoder.py"]
    assert len(documents) > 10 and all(document.is_parted for document in documents)
    for one, other in pairwise(documents):
        ((middle, end),) = one.answers
        assert end == len(one.text) and 400 < middle < 1000
        assert int(other.id.partition("#")[2]) == int(one.id.partition("#")[2]) + end, "no piece is in two pairs"


def test_several_labels_and_numbers(tmp_path):
    several = [{"text": f"row {i}", "label": WORDS[: i % 4]} for i in range(20)]
    directory = prepare(config(write_rows(tmp_path / "s.jsonl", several), tmp_path), progress=False)
    assert read_index(directory).labels.kind is LabelKind.several
    _, samples = samples_of(directory, "train", 16)
    for text, row in zip(texts_of(samples), samples["labels"], strict=True):
        names = set(WORDS[: int(text.split()[1]) % 4])
        assert row.tolist() == [int(name in names) for name in sorted(WORDS)]
    numbers = [{"text": f"row {i}", "label": [i / 2, -i]} for i in range(20)]
    given = config(write_rows(tmp_path / "n.jsonl", numbers), tmp_path, content=Content.numbers)
    _, samples = samples_of(prepare(given, progress=False), "train", 16)
    places = [int(text.split()[1]) for text in texts_of(samples)]
    assert samples["values"].tolist() == [[i / 2, -i] for i in places]


def test_the_first_token_of_a_word_has_its_label(tmp_path):
    rows = [{"text": ["ab", "c", f"d{i}"], "label": ["x", "y", "x"]} for i in range(20)]
    given = config(write_rows(tmp_path / "t.jsonl", rows), tmp_path, content=Content.tagged)
    directory = prepare(given, progress=False)
    assert read_index(directory).labels.kind is LabelKind.per_token
    _, samples = samples_of(directory, "train", 16)
    # The end of a text, "ab", " ", "c", " ", "d<i>", padding; a space before a word is a token of its own in bytes.
    assert (samples["labels"][:, :7] == [-100, 0, -100, -100, 1, -100, 0]).all()
    assert (samples["labels"][:, 7:] == -100).all()


def test_a_document_that_is_too_long_is_cut_and_counted(tmp_path):
    rows = [{"text": "word " * i, "label": i % 2} for i in range(1, 21)]
    directory = prepare(config(write_rows(tmp_path / "a.jsonl", rows), tmp_path), progress=False)
    samples, gathered = samples_of(directory, "train", 32)
    assert samples.num_cut() == (gathered["lengths"] == 32).sum() > 5
    assert all("word word word ".startswith(text[:15]) for text in texts_of(gathered))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "a"}, "no field 'label'"),
        ({"text": "a", "label": None}, "a document without a label"),
        ({"text": "a", "label": ""}, "a document without a label"),
        ({"text": "a", "label": ["x", ""]}, "field 'label' is '': a label is text or a whole number"),
        ({"text": "a", "label": 0.5}, "a label is text or a whole number"),
        ({"text": "a", "label": {"x": 1}}, "a label is text or a whole number"),
        ({"text": ["a"], "label": "x"}, "field 'text' is list, not text"),
    ],
)
def test_a_row_without_a_proper_label_is_named_or_skipped(tmp_path, row, told):
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(9)]
    path = write_rows(tmp_path / "a.jsonl", [*rows, row])
    with pytest.raises(DataError, match=told) as error:
        prepare(config(path, tmp_path), progress=False)
    assert "a.jsonl:10" in str(error.value)
    if "no field" not in told:
        directory = prepare(config(path, tmp_path, on_bad_row=OnBad.skip), progress=False)
        index = read_index(directory)
        assert index.train.num_documents + index.validation.num_documents == 9


def test_csv_that_is_none_is_named(tmp_path):
    for text, told in (
        ("text,label\na,b,c\n", "a.csv:2: 3 columns, but the header has 2"),
        ("words,label\na,b\n", "no column 'text'; set data.text_field to one of"),
        ("text;label\na;b\n", "to one of .'text;label'.; columns of csv are separated by commas, of tsv by tabs"),
        ('text,label\n"a,b\n', "a.csv:2: unexpected end of data"),
        ("text,label,label\na,b,c\n", "a.csv: the header names label twice"),
        ("", "a.csv: no column 'text'"),
    ):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(DataError, match=told):
            list(iterate_documents(config(tmp_path / "a.csv", tmp_path, source=DataSource.csv)))


def test_csv_is_read_as_other_programs_write_it(tmp_path):
    text = f'\ufefftext,label\r\n"said ""no"",\r\nand left",no\r\n\r\n{"x" * 200_000},\u00b2\r\n--1,1e3\r\n\r\n'
    (tmp_path / "a.csv").write_text(text, newline="")
    given = config(tmp_path / "a.csv", tmp_path, source=DataSource.csv, validation_fraction=0.0)
    texts = {document.text: document.labels.names[0] for document in iterate_documents(given)}
    assert texts == {'said "no",\r\nand left': "no", "x" * 200_000: "\u00b2", "--1": "1e3"}
    assert read_index(prepare(given, progress=False)).labels.names == ["1e3", "no", "\u00b2"]


def test_labels_that_are_not_those_of_the_task_are_named(tmp_path):
    rows = [{"text": f"row {i}", "label": WORDS[i % 3]} for i in range(9)]
    labels = read_index(prepare(config(write_rows(tmp_path / "a.jsonl", rows), tmp_path), progress=False)).labels
    require_labels(labels, Classification(inputs=Inputs.tokens, num_labels=3), where="here")
    with pytest.raises(DataError, match=r"3 labels \(blue, green, red\), not 2; set task.num_labels=3"):
        require_labels(labels, Classification(inputs=Inputs.tokens, num_labels=2), where="here")
    with pytest.raises(DataError, match="all documents have the label red; there is nothing to tell apart"):
        require_labels(dataclasses.replace(labels, size=1, names=["red"]), Classification(num_labels=2), where="here")
    with pytest.raises(DataError, match="have no labels; the task needs one label per document"):
        require_labels(None, Classification(inputs=Inputs.tokens, num_labels=2), where="here")


EOS = NUM_BYTES_IDS - 1


def pairs_config(path: Path, root: Path, **settings) -> DataConfig:
    given = {"content": Content.seq2seq, "source_field": "en", "target_field": "uk"}
    return config(path, root, **given | settings)


def test_a_source_and_its_target_are_a_sample(tmp_path):
    rows = [{"en": f"word {i}", "uk": f"слово {i}"} for i in range(20)]
    directory = prepare(pairs_config(write_rows(tmp_path / "p.jsonl", rows), tmp_path), progress=False)
    found = {}
    for split in ("train", "validation"):
        pairs = PairSamples(Corpus.open(directory, vocab_size=NUM_BYTES_IDS).split(split), 10, 16)
        samples = pairs.gather(np.arange(int(pairs.shard_samples.sum())))
        assert samples["source"].shape[1] == 10 and samples["targets"].shape[1] == 16 and pairs.num_cut() == 0
        for source, length, tokens, targets in zip(*samples.values(), strict=True):
            is_target = targets != -100
            written = targets[is_target]
            assert written[-1] == EOS and tokens[0] == EOS and (tokens[1 : len(written)] == written[:-1]).all()
            assert (source[length:] == 0).all() and not is_target[len(written) :].any()
            text = bytes(written[:-1].astype(np.uint8)).decode()
            found[bytes(source[:length].astype(np.uint8)).decode()] = text
    assert found == {row["en"]: row["uk"] for row in rows}


def test_a_source_with_several_targets_is_in_one_split_and_what_is_long_is_cut(tmp_path):
    rows = [{"en": f"word {i // 4}", "uk": f"слово {i}"} for i in range(80)]
    directory = prepare(pairs_config(write_rows(tmp_path / "p.jsonl", rows), tmp_path), progress=False)
    sources = {}
    for split in ("train", "validation"):
        pairs = PairSamples(Corpus.open(directory, vocab_size=NUM_BYTES_IDS).split(split), 8, 10)
        samples = pairs.gather(np.arange(int(pairs.shard_samples.sum())))
        assert pairs.num_cut() == len(samples["source"]), "every target is longer"
        assert (samples["targets"] != -100).all() and (samples["targets"] != EOS).all()
        sources[split] = {row.tobytes() for row in samples["source"]}
    assert len(sources["train"]) + len(sources["validation"]) == 20 and not sources["train"] & sources["validation"]


def test_a_pair_without_a_target_is_left_out(tmp_path):
    rows = [{"en": f"word {i}", "uk": f"{i}" if i % 5 else ""} for i in range(20)]
    directory = prepare(pairs_config(write_rows(tmp_path / "p.jsonl", rows), tmp_path), progress=False)
    index = read_index(directory)
    assert index.num_empty_documents == 4
    assert index.train.num_documents + index.validation.num_documents == 16
