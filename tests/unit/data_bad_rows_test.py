"""What is wrong with a row or a file is said; ``data.on_bad_row=skip`` leaves it out, counted and named."""

import bz2
import dataclasses
import gzip
import json
import lzma
import zipfile

import pyarrow
import pytest
from pyarrow import parquet

from bigtrain.cli.prepare import describe
from bigtrain.config import Content, DataConfig, DataSource, OnBad, TrainConfig
from bigtrain.config.check import ignored_settings
from bigtrain.data.prepare import live
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.prepare.sources import read_part, source_fingerprint, source_parts
from bigtrain.data.read.dropped import Dropped
from bigtrain.errors import DataError
from tests.documents import iterate_documents


def config_of(source, path, **changes):
    return DataConfig(source=DataSource[source], path=str(path), **changes)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(*values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


def refusal(source, path, **changes):
    """Return the sentence that refuses a source."""
    with pytest.raises(DataError) as raised:
        list(iterate_documents(config_of(source, path, **changes)))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def skipped(source, path, **changes):
    """Return the texts that are left with data.on_bad_row=skip, and what was left out."""
    config, bad = config_of(source, path, on_bad_row=OnBad.skip, **changes), Dropped()
    texts = [document.text for part in source_parts(config) for document in read_part(config, part, bad)]
    return [text for text in texts if text], bad


# What is wrong is said


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [rows("häßlich", "x"), '\n {"text": "x"}\n', '[{"text": "x"}]'])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_other_encodings_are_named(tmp_path, encoding, text, pack):
    path = write(tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl"), pack(text.encode(encoding)))
    assert refusal("jsonl", path).startswith(f"{path}: {encoding[:6].upper()}, not JSON lines in UTF-8")


def test_text_in_other_encodings_is_named(tmp_path):
    for encoding, what in [("utf-16", "UTF-16"), ("utf-16-le", "binary or UTF-16"), ("utf-32", "UTF-32")]:
        assert what in refusal("text", write(tmp_path / "a.txt", "wide text".encode(encoding)))
    assert "UTF-16" in refusal("text", write(tmp_path / "a.txt", "漢字".encode("utf-16")))
    (document,) = iterate_documents(config_of("text", write(tmp_path / "a.txt", "marked".encode("utf-8-sig"))))
    assert document.text == "marked"


def zipped(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "pack", "what"),
    [
        ("a.jsonl.xz", lzma.compress, "packed by xz"),
        ("a.jsonl", lzma.compress, "packed by xz"),
        ("a.jsonl.bz2", bz2.compress, "packed by bzip2"),
        ("a.jsonl", gzip.compress, "packed by gzip"),
        ("a.jsonl", lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True), "packed by zstd"),
        ("a.jsonl", lambda raw: pyarrow.Codec("lz4").compress(raw, asbytes=True), "packed by lz4"),
        ("a.jsonl", lambda _: b"\0\0\0\0 a hole", "binary"),
        ("a.jsonl", lambda _: b"%PDF-1.7", "a PDF"),
    ],
)
def test_files_packed_otherwise_are_named(tmp_path, name, pack, what):
    path = write(tmp_path / name, pack(rows("one", "two").encode()))
    told = f"{path}: {what}, not JSON lines in UTF-8, plain or packed by gzip (.gz) or zstd (.zst)"
    assert refusal("jsonl", path) == told
    texts, bad = skipped("jsonl", path)
    assert (texts, bad.documents, bad.examples) == ([], 1, [told])


def test_tables_by_another_name_are_named(tmp_path):
    table = pyarrow.table({"text": ["x"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    write(tmp_path / "a.zip", zipped(tmp_path / "z", rows("x")))
    for name, what in [("a.parquet", "a Parquet file"), ("a.arrow", "an Arrow file"), ("a.zip", "a zip archive")]:
        assert what in refusal("jsonl", (tmp_path / name).rename(tmp_path / "a.jsonl"))
        assert what in refusal("text", tmp_path / "a.jsonl")
        for source in ("parquet", "arrow"):
            if source not in name:
                assert f"it begins as {what}" in refusal(source, tmp_path / "a.jsonl")


PRETTY = json.dumps({"text": "one", "tags": ["a", "b"]}, indent=2)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (PRETTY, "an object over several lines"),
        (f"\n{PRETTY}\n{PRETTY}\n", "an object over several lines"),
        ('{"text": "one",\n "n": 1}\n', "an object over several lines"),
        (json.dumps([{"text": "one"}] * 3, indent=1), "one array over several lines"),
        ("[\n" + ",\n".join([json.dumps({"text": "long " * 100})] * 100) + "\n]\n", "one array over several lines"),
        ('[{"text": "one"},\n{"text": "two"}]', "one array over several lines"),
    ],
)
def test_json_over_several_lines_is_named(tmp_path, text, what):
    path = write(tmp_path / "a.jsonl", text)
    told = refusal("jsonl", path)
    assert told.startswith(f"{path}:{1 + text.startswith(chr(10))}: ") and what in told
    assert "one object per line is meant" in told
    texts, bad = skipped("jsonl", path)
    assert (texts, bad.documents) == ([], 1), "the whole file is written so"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": ', "not valid JSON: Expecting value at character"),
        ('{"text": "cut of', "not valid JSON: Invalid control character at character 17"),
        ('{"text": "a\0b"}', "not valid JSON: Invalid control character at character 12"),
        ('[{"text": "x"}]', "expected a JSON object, found list; one object per line is meant"),
        (
            '{"text": "x"} {"text": "y"}',
            "not valid JSON: Extra data at character 15; one object per line is meant, and",
        ),
        ('"x"', "expected a JSON object, found str"),
        ("text,label", "not valid JSON: Expecting value at character 1; one object per line is meant, and this line"),
        ('{"text": 3}', "field 'text' is int, not text"),
        ('{"text": ["x"]}', "field 'text' is list, not text"),
        ('{"body": "x", "id": 1}', "no field 'text'; set data.text_field to one of ['body', 'id']"),
        ('{"n": ' + "1" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
    ],
)
@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_bad_line_is_named_or_left_out(tmp_path, line, problem, number, end):
    lines = [json.dumps({"text": f"good {i}"}) for i in range(4)]
    lines.insert(number - 1, line)
    path = write(tmp_path / "a.jsonl", "".join(line + end for line in lines))
    told = refusal("jsonl", path)
    assert told.startswith(f"{path}:{number}: {problem}") and told.endswith("; or leave such out: data.on_bad_row=skip")
    texts, bad = skipped("jsonl", path)
    assert texts == [f"good {i}" for i in range(4)] and bad.documents == 1
    assert bad.examples[0].startswith(f"{path}:{number}: {problem}")


def test_null_and_odd_but_valid_rows_are_no_bad_rows(tmp_path):
    odd = [b'\xef\xbb\xbf{"text": "mark"}', b'{"text": null}', b"", b'{"text": "\\ud800"}', b'{"text": "x\xff"}']
    odd += [json.dumps({"text": "long " * 50_000}).encode()]
    path = write(tmp_path / "a.jsonl", b"\r\n".join(odd))
    texts, bad = skipped("jsonl", path)
    assert [text[:5] for text in texts] == ["mark", "\ufffd", "x\ufffd", "long "] and bad.documents == 0
    messages = [None, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]]
    write(path, "".join(json.dumps({"messages": value}) + "\n" for value in messages))
    empty, chat = iterate_documents(config_of("jsonl", path, content=Content.chat))
    assert empty.text == "" and "!" in chat.text


# Rows and files that are left out


def test_half_a_file_gives_none_of_its_rows(tmp_path):
    whole = {"a.jsonl": rows("a1", "a2").encode(), "c.jsonl.gz": gzip.compress(rows("c1").encode())}
    many = "".join(rows(f"row {i} " + "z" * (i % 97)) for i in range(5000)).encode()
    zstd = pyarrow.Codec("zstd").compress(many, asbytes=True)
    packed = gzip.compress(many)
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # its checksum
    half = {"b.jsonl.gz": packed[: len(packed) // 2], "d.jsonl.zst": zstd[: len(zstd) // 2], "e.jsonl.gz": b""}
    half |= {"f.jsonl.gz": bytes(flipped), "g.jsonl.gz": b"plain"}
    for name, content in {**whole, **half}.items():
        write(tmp_path / name, content)
    texts, bad = skipped("jsonl", tmp_path)
    assert texts == ["a1", "a2", "c1"] and bad.documents == len(half)
    for name in half:
        assert name in refusal("jsonl", tmp_path / name)
        assert name in skipped("jsonl", tmp_path / name)[1].examples[0]


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_half_a_table_gives_none_of_its_rows(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr("bigtrain.data.prepare.sources._PART_BYTES", part_bytes)
    table = pyarrow.table({"text": [f"row {i}" for i in range(3000)]})
    parquet.write_table(table, tmp_path / "whole.parquet", row_group_size=1000, compression="none")
    raw = (tmp_path / "whole.parquet").read_bytes()
    write(tmp_path / "cut.parquet", raw[: len(raw) // 2])
    write(tmp_path / "empty.parquet", b"")
    parquet.write_table(table.rename_columns(["body"]), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    texts, bad = skipped("parquet", tmp_path)
    assert texts == [f"row {i}" for i in range(3000)]
    told = " ".join(
        skipped("parquet", tmp_path / f"{name}.parquet")[1].examples[0] for name in ("cut", "other", "numbers")
    )
    assert "cut.parquet: cannot be read" in told and "begins as a Parquet file" in told
    assert "no column 'text'; set data.text_field to one of ['body']" in told and "has type int64, not text" in told
    assert bad.documents >= 4


def test_half_an_arrow_file_gives_none_of_its_rows(tmp_path):
    table = pyarrow.table({"text": [f"row {i}" for i in range(3000)]})
    for kind in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        with kind(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
        assert len(skipped("arrow", tmp_path / "a.arrow")[0]) == 3000
        raw = (tmp_path / "a.arrow").read_bytes()
        texts, bad = skipped("arrow", write(tmp_path / "a.arrow", raw[: len(raw) // 2]))
        assert (texts, bad.documents) == ([], 1)
        assert "a.arrow: cannot be read" in refusal("arrow", tmp_path / "a.arrow")


def test_bad_chats_and_rows_of_tables_are_named_by_row(tmp_path):
    good = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    table = pyarrow.table({"messages": [good, [{"role": "robot", "content": "x"}], good]})
    parquet.write_table(table, tmp_path / "a.parquet")
    texts, bad = skipped("parquet", tmp_path, content=Content.chat)
    assert len(texts) == 2 and "a.parquet: row 1: " in bad.examples[0] and bad.documents == 1
    assert "a.parquet: row 1: " in refusal("parquet", tmp_path, content=Content.chat)


def test_binary_text_files_are_left_out(tmp_path):
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.bin", b"\0\1")
    texts, bad = skipped("text", tmp_path)
    assert texts == ["one"] and "b.bin" in bad.examples[0]


def test_what_the_system_says_of_a_file_is_no_bad_row(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", rows("one"))
    config = config_of("jsonl", path, on_bad_row=OnBad.skip)
    (part,) = source_parts(config)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        list(read_part(config, part))


def test_files_without_the_right_to_read_are_left_out_when_the_source_is_looked_at(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", rows(name))
    monkeypatch.setattr("os.access", lambda path, _: path.name != "b.jsonl")
    assert skipped("jsonl", tmp_path)[0] == ["a"]
    monkeypatch.setattr("os.access", lambda path, _: False)
    with pytest.raises(DataError, match=r"no file .*not read: a\.jsonl, b\.jsonl \(not readable\)"):
        skipped("jsonl", tmp_path)


# The corpus knows of it


def test_a_corpus_without_bad_rows_is_another_one_and_says_what_it_lacks(tmp_path, caplog, capsys):
    lines = [json.dumps({"text": f"good {i}"}) for i in range(30)]
    for number in (4, 9, 14, 19):
        lines[number] = "bad"
    write(tmp_path / "in" / "a.jsonl", "\n".join(lines))
    config = config_of("jsonl", tmp_path / "in", root=str(tmp_path / "out"), tokenizer="bytes", prepare_processes=1)
    with pytest.raises(DataError, match=r"a\.jsonl:5: "):
        prepare(config, progress=False)
    directory = prepare(dataclasses.replace(config, on_bad_row=OnBad.skip), progress=False)
    report = json.loads((directory / "report.json").read_text())
    assert report["documents"] == 26 and report["bad_rows"]["count"] == 4
    assert [f"a.jsonl:{n}: " in told for n, told in zip((5, 10, 15), report["bad_rows"]["examples"], strict=True)]
    assert "data.on_bad_row=skip: 4 bad rows or files left out: " in caplog.text
    describe(directory, tells_bad_rows=False)
    assert "bad rows" not in capsys.readouterr().out
    describe(directory)
    assert "4 bad rows or files: " in capsys.readouterr().out
    write(tmp_path / "in" / "a.jsonl", "\n".join(line for line in lines if line != "bad"))
    clean = prepare(config, progress=False)
    assert "bad_rows" not in json.loads((clean / "report.json").read_text())
    shards = [sorted(path.read_bytes() for path in place.glob("train-*.bin")) for place in (directory, clean)]
    assert shards[0] == shards[1] and directory.name != clean.name


def test_if_all_rows_are_bad_the_reason_is_said(tmp_path):
    write(tmp_path / "a.jsonl", rows("one", "two"))
    config = config_of("jsonl", tmp_path, text_field="body", on_bad_row=OnBad.skip, root=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"0 documents.*2 bad rows or files left out: .*no field 'body'"):
        prepare(config, progress=False)


def test_the_setting_enters_no_fingerprint_unless_it_skips(tmp_path):
    write(tmp_path / "a.jsonl", rows(*(f"text {i}" for i in range(9))))
    config = config_of("jsonl", tmp_path, root=str(tmp_path / "out"), tokenizer="bytes", on_the_fly=True)
    plans = [
        live.read_plan(prepare(dataclasses.replace(config, on_bad_row=policy), progress=False)) for policy in OnBad
    ]
    assert plans[0].fingerprint != plans[1].fingerprint and plans[0].parts == plans[1].parts
    assert len({source_fingerprint(dataclasses.replace(config, on_bad_row=policy)) for policy in OnBad}) == 1


def test_where_the_policy_has_no_effect_it_is_said(tmp_path):
    data = DataConfig(source=DataSource.prepared, path=str(tmp_path), on_bad_row=OnBad.skip)
    assert any(told.startswith("data.on_bad_row is ignored") for told in ignored_settings(TrainConfig(data=data)))
