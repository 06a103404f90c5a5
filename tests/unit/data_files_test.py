"""Every file that a path leads to is read once, or named."""

import dataclasses
import gzip
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pytest

from bigtrain.config import DataConfig, DataSource, OnBad
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.prepare.files import find_files, tell_left_out
from bigtrain.data.prepare.live import read_plan
from bigtrain.data.prepare.sources import source_fingerprint
from bigtrain.errors import DataError
from tests.documents import iterate_documents


def config_of(source, path, **changes):
    return DataConfig(source=DataSource[source], path=str(path), **changes)


def texts(source, path, **changes):
    return [document.text for document in iterate_documents(config_of(source, path, **changes))]


def account(source, path, **changes):
    """Return the names that are read, and those that are not by the reason."""
    found = find_files(config_of(source, path, **changes))
    return [file.name for file in found.files], found.left_out


def rows(*values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_arrow(path, *values, kind=pyarrow.ipc.new_stream):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": list(values)})
    with kind(path, table.schema) as writer:
        writer.write_table(table)


# Directories: endings, what is no data


def test_of_a_directory_every_file_is_read_or_named(tmp_path):
    zstd = pyarrow.Codec("zstd").compress(rows("zst"), asbytes=True)
    read = {"a.jsonl": rows("a"), "b.ndjson": rows("b"), "C.JSONL": rows("C"), "d.json.gz": gzip.compress(rows("d"))}
    read |= {"e.JSONL.GZ": gzip.compress(rows("e")), "f.jsonl.zst": zstd, "sub/g.Ndjson": rows("g")}
    others = ["README.md", "_SUCCESS", "x.jsonl.xz", "x.jsonl.bz2", "x.jsonl.zip", "part.csv", "meta.json"]
    hidden = [".part.crc", ".git/config"]
    for name, content in read.items():
        write(tmp_path / name, content)
    for name in [*others, *hidden]:
        write(tmp_path / name, "no")
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    names, left_out = account("jsonl", tmp_path)
    assert names == sorted(read)
    named = {name for names in left_out.values() for name in names}
    assert named == {*others, ".part.crc", ".git/", "broken.jsonl", "pipe.jsonl"}
    assert sorted(texts("jsonl", tmp_path)) == sorted(["a", "b", "C", "d", "e", "zst", "g"])


def test_what_is_not_read_is_said_once_and_kept_in_the_report(tmp_path, caplog):
    write(tmp_path / "in" / "a.jsonl", rows("one", "two"))
    config = config_of("jsonl", tmp_path / "in", tokenizer="bytes", root=str(tmp_path / "out"))
    prepare(config, progress=False)
    assert "not read" not in caplog.text, "there is nothing to say"
    for i in range(20):
        write(tmp_path / "in" / f"{i:02}.xz")
    directory = prepare(dataclasses.replace(config, validation_fraction=0.5), progress=False)
    (line,) = [line for line in caplog.messages if "not read" in line]
    assert "00.xz, 01.xz" in line and "07.xz, and 12 more (not *.jsonl or the like)" in line
    ((names),) = json.loads((directory / "report.json").read_text())["files_left_out"].values()
    assert len(names) == 20


def test_a_directory_without_data_says_what_there_is(tmp_path):
    write(tmp_path / "rows.json", "[]")
    write(tmp_path / ".hidden.jsonl", rows("x"))
    with pytest.raises(
        DataError, match=r"no file \*\.jsonl or .*not read: \.hidden\.jsonl \(hidden\); rows\.json \(not \*\.jsonl"
    ):
        texts("jsonl", tmp_path)


@pytest.mark.parametrize(("source", "ending"), [("parquet", ".PARQUET"), ("arrow", ".Arrow")])
def test_endings_in_capitals(tmp_path, source, ending):
    write(tmp_path / f"a{ending}")
    assert account(source, tmp_path)[0] == [f"a{ending}"]


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", rows("a"))
    write(tmp_path / "closed" / "b.jsonl", rows("b"))
    scandir = os.scandir

    def closed(path):  # to root, nothing is
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert account("jsonl", tmp_path) == (["a.jsonl"], {"not readable": ["closed/"]})


# The same file twice


@pytest.mark.parametrize(
    "pair", [("x.jsonl", "x.jsonl.gz"), ("x.jsonl.gz", "x.jsonl.ZST"), ("s/x.ndjson", "s/x.ndjson.gz")]
)
@pytest.mark.parametrize("pattern", ["", "**/x*"])
def test_packed_beside_not_packed_is_refused(tmp_path, pair, pattern):
    for name in pair:
        write(tmp_path / name, rows("x"))
    with pytest.raises(DataError) as raised:
        texts("jsonl", tmp_path / pattern)
    assert all(name in str(raised.value) for name in pair)


def test_equal_names_in_different_places_are_different_files(tmp_path):
    write(tmp_path / "a" / "x.jsonl", rows("a"))
    write(tmp_path / "b" / "x.jsonl.gz", gzip.compress(rows("b")))
    assert texts("jsonl", tmp_path) == ["a", "b"]


@pytest.mark.parametrize("pattern", ["", "*.jsonl", "**/*.jsonl", "[ar]*.jsonl"])
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_linked_file_is_read_once(tmp_path, pattern, link):
    write(tmp_path / "real.jsonl", rows("one", "two"))
    link(tmp_path / "again.jsonl", tmp_path / "real.jsonl")
    assert texts("jsonl", tmp_path / pattern) == ["one", "two"]
    names, left_out = account("jsonl", tmp_path / pattern)
    assert len(names) == 1 and "again.jsonl" in tell_left_out(left_out) and "real.jsonl" in tell_left_out(left_out)
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "real.jsonl").read_bytes())
    if pattern != "[ar]*.jsonl":
        assert len(texts("jsonl", tmp_path / pattern)) == 4, "a copy is another file"


def test_a_link_out_of_the_directory_is_read_and_the_place_of_all_does_not_matter(tmp_path):
    write(tmp_path / "blobs" / "1", rows("one"))
    for name in ("train.jsonl", "more.jsonl"):
        (tmp_path / "one").mkdir(exist_ok=True)
        (tmp_path / "one" / name).symlink_to("../blobs/1")
    assert account("jsonl", tmp_path / "one")[0] == ["more.jsonl"]
    (tmp_path / "two").symlink_to("one")
    assert account("jsonl", tmp_path / "two")[0] == ["more.jsonl"]
    one, two = (source_fingerprint(config_of("jsonl", tmp_path / name)) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("pattern", ["", "*/*.jsonl", "**/*.jsonl", "**"])
def test_a_linked_directory_is_read_once_and_circles_end(tmp_path, pattern):
    write(tmp_path / "real" / "a.jsonl", rows("a"))
    (tmp_path / "again").symlink_to("real")
    (tmp_path / "real" / "self").symlink_to(".")
    (tmp_path / "real" / "up").symlink_to("..")
    assert texts("jsonl", tmp_path / pattern) == ["a"]


# Names and patterns


def test_a_component_that_exists_is_a_name(tmp_path):
    for name in ("only[2]", "a[1]", "a1", "b*"):
        write(tmp_path / name / "x.txt", name)
    assert texts("text", tmp_path / "only[2]" / "*.txt") == ["only[2]"]
    assert texts("text", tmp_path / "a[1]" / "*.txt") == ["a[1]"]
    assert texts("text", tmp_path / "a[1]") == texts("text", tmp_path / "a[1]" / "x.txt") == ["a[1]"]
    assert texts("text", tmp_path / "b*" / "?.txt") == ["b*"]
    assert texts("text", tmp_path / "a[01]" / "*.txt") == ["a1"], "there is no directory of that name"
    assert texts("text", tmp_path / "*" / "x.txt") == ["a1", "a[1]", "b*", "only[2]"]


def test_what_the_name_would_match_as_a_pattern_is_named(tmp_path):
    for name in ("*.txt", "a.txt", "b.txt"):
        write(tmp_path / "in" / name, name)
    assert texts("text", tmp_path / "in" / "*.txt") == ["*.txt"]
    told = tell_left_out(find_files(config_of("text", tmp_path / "in" / "*.txt")).left_out)
    assert "in/a.txt" in told and "in/b.txt" in told
    for name in ("d[1]", "d1"):
        write(tmp_path / name / "x.txt")
    assert "d1" in tell_left_out(find_files(config_of("text", tmp_path / "d[1]" / "*.txt")).left_out)


def test_names_are_decided_in_each_directory(tmp_path):
    write(tmp_path / "p" / "x[1].txt", "bracket")
    write(tmp_path / "q" / "x1.txt", "plain")
    assert texts("text", tmp_path / "*" / "x[1].txt") == ["bracket", "plain"]


def test_directories_that_a_pattern_matches_are_named(tmp_path):
    write(tmp_path / "a.jsonl", rows("a"))
    write(tmp_path / "sub" / "b.jsonl", rows("b"))
    names, left_out = account("jsonl", tmp_path / "*")
    assert names == ["a.jsonl"] and "sub/" in tell_left_out(left_out)
    with pytest.raises(DataError, match=r"no file matches it as a pattern; not read: .*sub/ \(directories"):
        texts("jsonl", tmp_path / "s*")
    assert account("jsonl", tmp_path / "**") == (["a.jsonl", "sub/b.jsonl"], {})


def test_a_name_may_have_any_bytes(tmp_path):
    directory = os.fsencode(tmp_path / "in")
    os.mkdir(directory)
    for name in (b"\xff.jsonl", b"a\xe4.jsonl", b"\xfe.txt"):
        with open(directory + b"/" + name, "wb") as file:
            file.write(rows(*(f"{name} {i}" for i in range(9))))
    config = config_of("jsonl", tmp_path / "in", tokenizer_vocab_size=300, root=str(tmp_path / "out"))
    report = json.loads((prepare(config, progress=False) / "report.json").read_text())
    assert report["documents"] == 18 and [*report["files_left_out"].values()] == [["\ufffd.txt"]]


def test_a_path_that_the_system_refuses_is_named():
    with pytest.raises(DataError, match=r"data\.path=x+: cannot be read: .*too long"):
        texts("jsonl", "x" * 5000)


# Saved datasets


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import datasets

    root = tmp_path_factory.mktemp("saved")
    made = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(12)]})
    splits = {"train": made.select(range(6)), "validation": made.select([6, 7]), "test": made.select([8, 9])}
    datasets.DatasetDict(splits).save_to_disk(root / "dict")
    datasets.DatasetDict(splits).save_to_disk(root / "deep" / "below" / "dict")
    datasets.DatasetDict(only=splits["train"]).save_to_disk(root / "one")
    made.save_to_disk(root / "plain", num_shards=2)
    loaded = datasets.load_from_disk(root / "plain")
    loaded.map(lambda row: {"text": row["text"].upper()})
    loaded.shuffle(seed=1)
    assert len(list((root / "plain").glob("cache-*.arrow"))) == 2
    return root


def test_caches_beside_a_saved_dataset_are_named_and_not_read(saved):
    for path in (saved / "plain", saved / "plain" / "*.arrow", saved / "plain" / "**"):
        assert texts("arrow", path) == [f"row {i}" for i in range(12)]
    _, left_out = account("arrow", saved / "plain")
    ((_, names),) = left_out.items()
    assert len(names) == 2 and all(name.startswith("cache-") for name in names), "what describes the data is used"
    (cache,) = [path for path in (saved / "plain").glob("cache-*.arrow") if b"ROW 3" in path.read_bytes()]
    assert texts("arrow", cache)[3] == "ROW 3", "by its own name it is read"


@pytest.mark.parametrize("place", ["dict", "deep", "dict/**/*.arrow", "d*/**/*.arrow"])
def test_splits_of_a_saved_dataset(saved, place):
    with pytest.raises(DataError, match=r"holds the splits test, train, validation; set data\.split to one of them"):
        texts("arrow", saved / place)
    with pytest.raises(DataError, match=r"no split 'dev'; set data\.split to one of \['test', 'train', 'validation'\]"):
        texts("arrow", saved / place, split="dev")
    for split, expected in {"train": range(6), "validation": [6, 7], "test": [8, 9]}.items():
        found = texts("arrow", saved / place, split=split)
        assert sorted(set(found)) == [f"row {i}" for i in expected]


def test_on_the_fly_splits_are_chosen_too(saved, tmp_path):
    config = config_of("arrow", saved / "dict", tokenizer="bytes", root=str(tmp_path), on_the_fly=True)
    with pytest.raises(DataError, match=r"holds the splits test, train, validation;"):
        prepare(config, progress=False)
    directories = [prepare(dataclasses.replace(config, split=split), progress=False) for split in ("train", "test")]
    for split, directory in zip(("train", "test"), directories, strict=True):
        (part,) = read_plan(directory).parts
        assert [file.name for file in part.files] == [f"{split}/data-00000-of-00001.arrow"]


def test_a_split_of_its_own(saved):
    for path, changes in [
        ("one", {}),
        ("one", {"split": "only"}),
        ("dict/train", {}),
        ("dict/train", {"split": "train"}),
    ]:
        assert texts("arrow", saved / path, **changes) == [f"row {i}" for i in range(6)]
    assert texts("datasets", saved / "one") == texts("arrow", saved / "one")
    for path, there in [("one", "only"), ("dict/train", "train"), ("dict/train/data-00000-of-00001.arrow", "train")]:
        with pytest.raises(DataError, match=rf"no split 'test'; set data\.split to one of \['{there}'\]"):
            texts("arrow", saved / path, split="test")


def test_splits_that_are_links_or_are_linked(saved, tmp_path):
    shutil.copytree(saved / "dict", tmp_path / "dict")
    (tmp_path / "dict" / "test").rename(tmp_path / "elsewhere")
    (tmp_path / "dict" / "test").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "dict" / "latest").symlink_to("train")
    assert texts("arrow", tmp_path / "dict", split="test") == ["row 8", "row 9"]
    assert texts("arrow", tmp_path / "dict", split="train") == [f"row {i}" for i in range(6)]
    with pytest.raises(DataError, match=r"holds the splits test, train, validation;"):
        texts("arrow", tmp_path / "dict")


def test_files_without_splits_are_for_training(saved, tmp_path):
    for kind in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        write_arrow(tmp_path / f"{kind.__name__}.arrow", "x", kind=kind)
    assert texts("arrow", tmp_path) == texts("arrow", tmp_path, split="train") == ["x", "x"]
    for source, path in (("arrow", tmp_path), ("arrow", saved / "plain"), ("datasets", saved / "plain")):
        with pytest.raises(DataError, match=r"has no splits, so no 'test'; leave data\.split out"):
            texts(source, path, split="test")


def test_what_is_listed_is_there_and_what_is_not_listed_is_left_out(saved, tmp_path):
    import datasets

    made = datasets.load_from_disk(saved / "plain")
    made.save_to_disk(tmp_path / "cut", num_shards=3)
    (tmp_path / "cut" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: is not there, but .* lists it"):
        texts("arrow", tmp_path / "cut")
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "dict")
    made.save_to_disk(tmp_path / "dict" / "old")
    assert len(texts("arrow", tmp_path / "dict")) == 12
    assert "old/data-00000-of-00001.arrow" in tell_left_out(account("arrow", tmp_path / "dict")[1])


@pytest.mark.parametrize("source", ["arrow", "datasets"])
def test_a_selection_of_rows_by_an_old_version_is_refused(saved, tmp_path, source):
    import datasets

    datasets.load_from_disk(saved / "plain").save_to_disk(tmp_path / "old")
    state = json.loads((tmp_path / "old" / "state.json").read_text())
    write(tmp_path / "old" / "state.json", json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match="with a selection of rows, which is not read any more"):
        texts(source, tmp_path / "old")
    write(tmp_path / "old" / "state.json", json.dumps(state | {"_indices_data_files": None}))
    assert len(texts(source, tmp_path / "old")) == 12


def test_a_damaged_state_is_named(tmp_path):
    write_arrow(tmp_path / "data.arrow", "x")
    write(tmp_path / "state.json", "{")
    with pytest.raises(DataError, match=r"state\.json: cannot be read"):
        texts("arrow", tmp_path)


def test_splits_in_the_cache_of_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split, values in (("train", ["a", "b", "c"]), ("test", ["x"])):
        write(tmp_path / "files" / f"{split}.jsonl", rows(*values))
    made = datasets.load_dataset(str(tmp_path / "files"), split="train")
    made.map(lambda row: {"text": row["text"].upper()})
    place = Path(made.cache_files[0]["filename"]).parent
    with pytest.raises(DataError, match=r"holds the splits test, train;"):
        texts("arrow", place)
    assert texts("arrow", place, split="train") == ["a", "b", "c"] and texts("arrow", place, split="test") == ["x"]
    assert "cache-" in tell_left_out(account("arrow", place, split="train")[1])


def test_the_default_split_changes_no_fingerprint_of_datasets(saved):
    config = config_of("datasets", saved / "dict")
    assert source_fingerprint(config) == source_fingerprint(dataclasses.replace(config, split="train"))
    assert source_fingerprint(config) != source_fingerprint(dataclasses.replace(config, split="test"))


def test_files_that_were_right_before_have_the_fingerprint_that_they_had(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl.gz"):
        os.utime(write(tmp_path / name, rows(name)), ns=(7, 7))
    write(tmp_path / "README.md")
    expected = "f6683a1fec8c2f44ceb9b33cbec5bf043dd4abda2b26f2b7078da9a747e4b71f"
    assert source_fingerprint(config_of("jsonl", tmp_path)) == expected
    assert source_fingerprint(config_of("jsonl", tmp_path, on_bad_row=OnBad.skip)) == expected


def test_files_that_are_named_after_splits_are_chosen_by_the_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / "hub" / f"{name}.jsonl", rows(name))
    write(tmp_path / "plain/arxiv-00000-of-00002.jsonl", rows("a"))
    write(tmp_path / "plain/books-00001-of-00002.jsonl", rows("b"))
    write(tmp_path / "one/c4-train-00000-of-00001.jsonl", rows("c"))
    for path in ("hub", "hub/*.jsonl"):
        with pytest.raises(DataError, match=r"holds the splits test, train; set data.split to one of them"):
            account("jsonl", tmp_path / path)
    names, left_out = account("jsonl", tmp_path / "hub", split="train")
    assert names == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert left_out == {"not of data.split=train": ["test-00000-of-00001.jsonl"]}
    assert len(account("jsonl", tmp_path / "plain")[0]) == 2 and len(account("jsonl", tmp_path / "one")[0]) == 1
    with pytest.raises(DataError, match=r"no split 'other'; set data.split to one of \['test', 'train'\]"):
        account("jsonl", tmp_path / "hub", split="other")
    with pytest.raises(DataError, match=r"no file is named after a split.*leave data.split=train out"):
        account("jsonl", tmp_path / "plain", split="train")


@pytest.mark.parametrize(
    "names", [("train.jsonl", "test.jsonl"), ("Train.jsonl.gz", "dev.ndjson"), ("train.json.gz", "valid.jsonl")]
)
def test_files_that_are_called_as_splits_are_chosen_by_the_split(names, tmp_path):
    for place in ("flat", "deep/a", "deep/b"):
        for name in names:
            write(tmp_path / place / name, rows(f"{place}/{name}"))
    write(tmp_path / "flat/other.jsonl", rows("other"))
    write(tmp_path / "one/train.jsonl", rows("one"))
    write(tmp_path / "one/more.jsonl", rows("more"))
    other = names[1].partition(".")[0]
    for path in ("flat", "flat/*", "deep", "deep/**"):
        with pytest.raises(DataError, match=rf"holds the splits {', '.join(sorted([other, 'train']))}; set data.split"):
            account("jsonl", tmp_path / path)
    names_read, left_out = account("jsonl", tmp_path / "flat", split="train")
    assert names_read == [names[0]]
    assert {reason: sorted(left) for reason, left in left_out.items()} == {
        "not of data.split=train": sorted([names[1], "other.jsonl"])
    }
    assert account("jsonl", tmp_path / "deep", split=other)[0] == [f"a/{names[1]}", f"b/{names[1]}"]
    assert account("jsonl", tmp_path / "flat" / names[1])[0] == [names[1]], "what is named is meant"
    assert len(account("jsonl", tmp_path / "one")[0]) == 2


def test_names_that_begin_as_splits_are_no_splits(tmp_path):
    for name in ("train.py.jsonl", "trains.jsonl", "test_a.jsonl", "attest.jsonl", "train.jsonl.old.jsonl"):
        write(tmp_path / name, rows(name))
    assert len(account("jsonl", tmp_path)[0]) == 5


def test_a_split_that_is_listed_and_gone_is_named(tmp_path):
    write_arrow(tmp_path / "test/data-00000-of-00001.arrow", "a", "b")
    write(tmp_path / "test/state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    write(tmp_path / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match=r"holds the splits test, train"):
        account("arrow", tmp_path)
    with pytest.raises(DataError, match=r"train: is not there, but .*dataset_dict.json lists it; copy it again"):
        account("arrow", tmp_path, split="train")
    assert account("arrow", tmp_path, split="test")[0] == ["test/data-00000-of-00001.arrow"]
