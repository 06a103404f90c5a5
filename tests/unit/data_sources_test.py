import dataclasses
import gzip
import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from bigtrain.config import Content, DataConfig, DataSource
from bigtrain.data.prepare.records import Document
from bigtrain.data.prepare.sources import read_part, source_fingerprint, source_parts
from bigtrain.errors import DataError
from tests.documents import iterate_documents


def read(source, path=None, **changes):
    path = None if path is None else str(path)
    return list(iterate_documents(DataConfig(source=DataSource[source], path=path, **changes)))


def fingerprint(source, path):
    return source_fingerprint(DataConfig(source=DataSource[source], path=str(path)))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(content):
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def test_stdlib_is_the_python_source_of_this_machine():
    documents = read("stdlib")
    ids = [document.id for document in documents]
    assert ids == sorted(set(ids)) and "abc.py" in ids and "json/decoder.py" in ids
    assert not [i for i in ids if "site-packages" in i or "__pycache__" in i]
    text = next(document.text for document in documents if document.id == "os.py")
    with open(os.__file__, encoding="utf-8", newline="") as file:
        assert text == file.read()
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_text_is_one_document_per_file_sorted_by_name(tmp_path):
    write(tmp_path / "b.txt", "two\r\n")
    write(tmp_path / "a" / "z.md", "one")
    write(tmp_path / "c.txt", "")
    write(tmp_path / ".hidden" / "x.txt", "no")
    write(tmp_path / ".hidden.txt", "no")
    assert read("text", tmp_path) == [
        Document("a/z.md", "one", False),
        Document("b.txt", "two\r\n", False),
        Document("c.txt", "", False),
    ]
    assert read("text", tmp_path / "b.txt") == [Document("b.txt", "two\r\n", False)]
    assert [document.id for document in read("text", tmp_path / "**" / "*.txt")] == ["b.txt", "c.txt"]


def test_linked_directories_are_read_once(tmp_path):
    write(tmp_path / "elsewhere" / "a.txt", "one")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "root")
    assert [document.id for document in read("text", tmp_path / "root")] == ["link/a.txt"]


def test_invalid_utf8_is_replaced_and_marked(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfgood \xff\xfe bad \xc3")
    assert read("text", tmp_path) == [Document("a.txt", "good \ufffd\ufffd bad \ufffd", True)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_jsonl_ids_are_places(tmp_path, suffix):
    lines = ['{"text": "one"}', "", '{"text": "naïve", "x": 1}', '{"text": null}', '{"text": "\\ud83d\\ude42 \\ud800"}']
    raw = "\n".join(lines).encode()
    pack = {"jsonl": bytes, "gz": gzip.compress, "zst": zstd}[suffix.rpartition(".")[2]]
    write(tmp_path / f"a{suffix}", pack(raw))
    write(tmp_path / "notes.md", "not read from a directory")
    assert read("jsonl", tmp_path) == [
        Document(f"a{suffix}@0", "one", False),
        Document(f"a{suffix}@17", "naïve", False),
        Document(f"a{suffix}@44", "", False),
        Document(f"a{suffix}@59", "🙂 \ufffd", True),
    ]


def test_jsonl_with_invalid_utf8_keeps_its_valid_part(tmp_path):
    write(tmp_path / "a.jsonl", b'{"text": "x\xffy"}\n')
    assert read("jsonl", tmp_path) == [Document("a.jsonl@0", "x\ufffdy", True)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"body": "x", "id": 1}', r"no field 'text'; set data.text_field to one of \['body', 'id'\]"),
        (
            '{"messages": []}',
            r"no field 'text'; set data.text_field to one of \['messages'\]; data.content=chat reads this row",
        ),
        ('{"chosen": "x", "rejected": "y"}', ".*; data.content=preference reads 'chosen' and 'rejected'"),
        ('{"text": 3}', "field 'text' is int, not text"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, problem):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=f"{path}:2: {problem}"):
        read("jsonl", path)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet_ids_are_rows_and_null_is_empty(tmp_path, kind):
    texts = [f"text {i}" for i in range(3000)]
    texts[1] = None
    table = pyarrow.table({"id": range(3000), "body": pyarrow.array(texts, kind)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    documents = read("parquet", tmp_path, text_field="body")
    assert [document.id for document in documents] == [f"a.parquet:{i}" for i in range(3000)]
    assert documents[:3] == [
        Document("a.parquet:0", "text 0", False),
        Document("a.parquet:1", "", False),
        Document("a.parquet:2", "text 2", False),
    ]
    with pytest.raises(DataError, match=r"no column 'text'; set data.text_field to one of \['body', 'id'\]"):
        read("parquet", tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet: the text column has type int64, not text"):
        read("parquet", tmp_path, text_field="id")


def test_damaged_files_are_named(tmp_path):
    whole = gzip.compress(b'{"text": "abc"}\n' * 1000)
    cases = {
        "cut.jsonl.gz": ("jsonl", whole[: len(whole) // 2]),
        "not.jsonl.gz": ("jsonl", b"plain text"),
        "not.jsonl.zst": ("jsonl", b"plain text"),
        "cut.jsonl.zst": ("jsonl", zstd(bytes(range(256)) * 4000)[:200]),
        "bad.arrow": ("arrow", b"ARROW1 no"),
        "empty.arrow": ("arrow", b""),
        "empty.parquet": ("parquet", b""),
        "empty.jsonl.gz": ("jsonl", b""),
        "empty.jsonl.zst": ("jsonl", b""),
        "bad.parquet": ("parquet", b"PAR1 no"),
        "binary.txt": ("text", b"ab\0cd"),
    }
    for name, (source, content) in cases.items():
        with pytest.raises(DataError, match=name):
            read(source, write(tmp_path / name, content))


def test_files_without_content_count_as_empty_documents(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, "" if name == "a.jsonl" else '{"text": "x"}')
    assert read("jsonl", tmp_path) == [Document("a.jsonl", "", False), Document("b.jsonl@0", "x", False)]
    assert read("text", write(tmp_path / "a.txt", "")) == [Document("a.txt", "", False)]


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such file or directory"):
        read("text", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no such file or directory, and no file matches"):
        read("text", tmp_path / "*.txt")
    with pytest.raises(DataError, match=r"no file \*\.jsonl or \*\.jsonl\.gz or \*\.jsonl\.zst"):
        read("jsonl", tmp_path)


def test_fingerprint_follows_the_files_but_not_their_place(tmp_path):
    file = write(tmp_path / "one" / "a.txt", "text")
    before = fingerprint("text", file.parent)
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprint("text", tmp_path / "two") == before
    assert fingerprint("text", tmp_path / "two") == before
    os.utime(tmp_path / "two" / "a.txt", ns=(1, 1))
    touched = fingerprint("text", tmp_path / "two")
    write(tmp_path / "two" / "b.txt", "")
    assert len({before, touched, fingerprint("text", tmp_path / "two")}) == 3


@pytest.fixture(scope="module")
def saved_dataset(tmp_path_factory):
    import datasets

    root = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(2500)], "n": list(range(2500))})
    datasets.DatasetDict({"train": rows, "test": rows.select([7, 5])}).save_to_disk(root / "dict")
    rows.save_to_disk(root / "single")
    write(root / "files" / "train.jsonl", "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(3)))
    return root


def test_saved_datasets(saved_dataset):
    documents = read("datasets", saved_dataset / "dict")
    assert documents[2499] == Document("2499", "row 2499", False) and len(documents) == 2500
    assert read("datasets", saved_dataset / "single") == documents
    assert [document.text for document in read("datasets", saved_dataset / "dict", split="test")] == ["row 7", "row 5"]
    streamed = read("datasets", saved_dataset / "dict", streaming=True)
    assert [document.text for document in streamed] == [document.text for document in documents]
    assert len({document.id for document in streamed}) == 2500
    assert fingerprint("datasets", saved_dataset / "dict") != fingerprint("datasets", saved_dataset / "single")
    with pytest.raises(DataError, match=r"no split 'other'; set data.split to one of \['test', 'train'\]"):
        read("datasets", saved_dataset / "dict", split="other")
    with pytest.raises(DataError, match=r"no column 'body'; set data.text_field to one of \['n', 'text'\]"):
        read("datasets", saved_dataset / "dict", text_field="body")


def test_the_splits_of_a_saved_dataset_are_different_sources(saved_dataset):
    config = DataConfig(source=DataSource.datasets, path=str(saved_dataset / "dict"))
    assert source_fingerprint(config) != source_fingerprint(dataclasses.replace(config, split="test"))


def test_datasets_by_name(saved_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    texts = [document.text for document in read("datasets", saved_dataset / "files")]
    assert texts == ["line 0", "line 1", "line 2"]
    with pytest.raises(DataError, match=r"cannot load this dataset \(data.subset=None, data.split=train\)"):
        read("datasets", tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files(saved_dataset, tmp_path, kind):
    table = pyarrow.table({"text": [f"row {i}" for i in range(2500)], "n": range(2500)})
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    documents = read("arrow", tmp_path)
    assert documents[2499] == Document("a.arrow:2499", "row 2499", False) and len(documents) == 2500
    with pytest.raises(DataError, match=r"a\.arrow: no column 'body'; set data.text_field to one of"):
        read("arrow", tmp_path, text_field="body")


def numbered_jsonl(path, num_lines):
    return write(
        path,
        "".join(json.dumps({"text": f"line {i} " + "é" * (i % 90)}) + "\n" * (1 + i % 2) for i in range(num_lines)),
    )


@pytest.mark.parametrize("part_bytes", [1, 1000, 1 << 20])
def test_parts_hold_every_document_once_and_in_order(tmp_path, monkeypatch, part_bytes):
    numbered_jsonl(tmp_path / "b.jsonl", 300)
    numbered_jsonl(tmp_path / "a.jsonl", 3)
    table = pyarrow.table({"text": [f"row {i}" for i in range(500)]})
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=70)
    for i in range(9):
        write(tmp_path / "texts" / f"{i}.txt", "some text" * i)
    for source, path in (("jsonl", tmp_path), ("parquet", tmp_path), ("text", tmp_path / "texts")):
        whole = read(source, path)
        with monkeypatch.context() as patch:
            patch.setattr("bigtrain.data.prepare.sources._PART_BYTES", part_bytes)
            config = DataConfig(source=DataSource[source], path=str(path))
            parts = source_parts(config)
            assert (len(parts) > 1) == (part_bytes < 1 << 20) or source == "text"
            assert [document for part in parts for document in read_part(config, part)] == whole


def test_lines_are_named_by_number_in_any_part(tmp_path, monkeypatch):
    path = numbered_jsonl(tmp_path / "a.jsonl", 50)
    with open(path, "a") as file:
        file.write("{broken\n")
    monkeypatch.setattr("bigtrain.data.prepare.sources._PART_BYTES", 100)
    with pytest.raises(DataError, match=r"a\.jsonl:76: not valid JSON"):
        read("jsonl", path)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]


def counted_text(document):
    return [document.text[start:stop] for start, stop in document.answers]


def test_of_a_chat_the_answers_count(tmp_path):
    write(tmp_path / "a.jsonl", json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": CHAT[:2]}))
    whole, without_answer = read("jsonl", tmp_path, content=Content.chat)
    assert whole.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n")
    assert counted_text(whole) == ["4<|im_end|>\n", "6<|im_end|>\n"]
    assert without_answer.text == "", "nothing to learn from: it is dropped and counted as empty"
    parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "a.parquet")
    (row,) = read("parquet", tmp_path, content=Content.chat)
    assert (row.text, row.answers) == (whole.text, whole.answers)


def test_of_a_pair_the_answer_counts(tmp_path):
    rows = [{"q": "2+2=", "a": "4"}, {"q": "2+2=", "a": None}, {"q": "\ud800 ", "a": "x\udc00"}]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    fields = {"content": Content.pairs, "prompt_field": "q", "answer_field": "a"}
    first, empty, odd = read("jsonl", tmp_path, **fields)
    assert (first.text, counted_text(first)) == ("2+2=4", ["4"]) and empty.text == ""
    assert (odd.text, counted_text(odd), odd.is_repaired) == ("\ufffd x\ufffd", ["x\ufffd"], True)
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: no field 'prompt'; set data\.prompt_field to one of \['a', 'q'\]"
    ):
        read("jsonl", tmp_path, content=Content.pairs)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "field 'messages' is str, not a list of messages"),
        (["hello"], "message 0: expected an object with role and content"),
        ([{"role": "robot", "content": "x"}], "message 0: role 'robot' is none of system, user, assistant, tool"),
        ([{"role": "user", "content": 3}], r"field 'messages\[0\]\.content' is int, not text"),
    ],
)
def test_bad_chats_are_named(tmp_path, messages, problem):
    write(tmp_path / "a.jsonl", json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{problem}"):
        read("jsonl", tmp_path, content=Content.chat)


def test_one_text_alone_is_cut_into_documents_at_line_ends(tmp_path):
    text = "".join(f"line {number}\n" for number in range(2000))
    write(tmp_path / "only.txt", text)
    found = read("text", str(tmp_path / "only.txt"))
    assert len(found) > 10 and len({document.id for document in found}) == len(found)
    assert "".join(document.text for document in found) == text
    assert all(document.text.endswith("\n") for document in found)
    for path in (tmp_path, tmp_path / "*.txt"):
        assert read("text", path) == found, "all that a directory or a pattern holds is as the file by its own name"
    write(tmp_path / "other.txt", text)
    assert len(read("text", tmp_path)) == 2, "a directory's files are its documents"
