import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import Content, DataConfig, DataSource, FilterConfig, TrainConfig
from bigtrain.config.check import check_data, ignored_settings
from bigtrain.config.convert import to_dict
from bigtrain.data.prepare import tokenise
from bigtrain.data.prepare.corpus import _locate, prepare
from bigtrain.data.prepare.sources import source_parts
from bigtrain.data.prepare.tokenise import token_dtype
from bigtrain.data.read.corpus import Corpus, open_corpus
from bigtrain.data.read.index import read_index, verify_hashes
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.data.read.workers import workers
from bigtrain.errors import DataError

LAUNCH = Path(__file__).parents[2] / "launch"
FILES = (
    "train-00000.bin",
    "train-00000.documents.npy",
    "validation-00000.bin",
    "validation-00000.documents.npy",
    "tokenizer.json",
)


@pytest.fixture
def config(tmp_path):
    """A corpus of 40 small documents and an empty one."""
    for i in range(40):
        path = tmp_path / "texts" / f"{i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {i}\n" + "some words again and again, naïve 🙂\n" * i, encoding="utf-8")
    (tmp_path / "texts" / "empty.txt").touch()
    return DataConfig(
        source=DataSource.text,
        path=str(tmp_path / "texts"),
        root=str(tmp_path / "data"),
        tokenizer_vocab_size=300,
        validation_fraction=0.2,
    )


def small_config(tmp_path, pattern, **changes):
    root = str(tmp_path / "data")
    return DataConfig(source=DataSource.text, path=str(tmp_path / pattern), root=root, tokenizer="bytes", **changes)


def documents_of(directory, split):
    shards = Corpus.open(directory, vocab_size=1 << 20).split(split)
    return [
        shards.read(shard)[a:b].tolist()
        for shard in range(len(shards.shard_tokens))
        for a, b in pairwise(shards.documents(shard))
    ]


def first_shard(index):
    return index["train"]["shards"][0]


def splits(index):
    return index.train, index.validation


def prepare_in_process(config, *, before):
    """Start a process that prepares ``config`` after the statement ``before``."""
    code = f"""
        from pathlib import Path
        from bigtrain.config import DataConfig
        from bigtrain.config.convert import from_dict
        from bigtrain.data.prepare.corpus import prepare
        {before}
        print(prepare(from_dict(DataConfig, {to_dict(config)!r}), progress=False))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)


def directory_of(config):
    return _locate(config).directory


def verify(directory):
    verify_hashes(directory, read_index(directory))


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_every_document_is_kept_whole_in_one_split(config, tokenizer):
    directory = prepare(dataclasses.replace(config, tokenizer=tokenizer), progress=False)
    index, loaded = read_index(directory), load_tokenizer(directory)
    found = []
    for split in ("train", "validation"):
        documents = documents_of(directory, split)
        assert len(documents) == getattr(index, split).num_documents > 0
        assert all(ids[-1] == index.tokenizer.eos_id and index.tokenizer.eos_id not in ids[:-1] for ids in documents)
        found += [loaded.decode(ids[:-1]) for ids in documents]
    texts = [path.read_text(encoding="utf-8") for path in sorted((directory.parents[1] / "texts").glob("[0-9]*"))]
    assert sorted(found) == sorted(texts)
    assert index.num_empty_documents == 1
    assert index.train.num_text_bytes + index.validation.num_text_bytes == sum(len(t.encode()) for t in texts)
    verify(directory)


def test_documents_longer_than_a_piece_stay_one_document(tmp_path):
    texts = ["".join(f"line {i} of a long text\n" for i in range(first, first + 30_000)) for first in (0, 1)]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    directory = prepare(small_config(tmp_path, "*.txt"), progress=False)
    (ids,), (others,) = documents_of(directory, "train"), documents_of(directory, "validation")
    tokenizer = load_tokenizer(directory)
    assert sorted(tokenizer.decode(found[:-1]) for found in (ids, others)) == sorted(texts)


@pytest.mark.parametrize(("vocab_size", "item_bytes"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_large_vocabularies_use_wider_tokens(vocab_size, item_bytes):
    assert token_dtype(vocab_size).itemsize == item_bytes


def test_shards_hold_the_same_documents_in_the_same_order(config):
    one = prepare(config, progress=False)
    several = prepare(dataclasses.replace(config, shard_tokens=1000), progress=False)
    assert one != several
    index = read_index(several)
    assert len(index.train.shards) > 3
    assert all(shard.num_tokens >= 1000 for shard in index.train.shards[:-1])
    for split in ("train", "validation"):
        assert documents_of(one, split) == documents_of(several, split)


def test_entropies_are_those_of_the_tokens(config):
    directory = prepare(config, progress=False)
    index = read_index(directory)
    train, validation = (
        np.bincount(
            np.fromfile(directory / f"{split}-00000.bin", dtype=index.dtype), minlength=index.tokenizer.vocab_size
        )
        for split in ("train", "validation")
    )
    share = train / train.sum()
    assert index.train.unigram_nats_per_token == pytest.approx(-sum(p * math.log(p) for p in share if p))
    smoothed = (train + 1) / (train + 1).sum()
    expected = -(validation * np.log(smoothed)).sum() / validation.sum()
    assert index.validation.unigram_nats_per_token == pytest.approx(expected)


def test_a_document_stays_in_its_split_when_others_are_added(config, tmp_path):
    def validation_texts():
        directory = prepare(dataclasses.replace(config, tokenizer="bytes"), progress=False)
        loaded = load_tokenizer(directory)
        return {loaded.decode(ids[:-1]) for ids in documents_of(directory, "validation")}

    before = validation_texts()
    for i in range(100, 140):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"new {i}")
    after = validation_texts()
    assert {text for text in after if not text.startswith("new")} == before and len(after) > len(before)


def test_preparing_again_finds_it_and_touches_nothing(config):
    directory = prepare(config, progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert set(before) == {*FILES, "index.json", "report.json"}
    assert prepare(config, progress=True) == directory == directory_of(config)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_the_name_is_readable_and_follows_what_decides_the_content(config, tmp_path):
    assert directory_of(config).name.startswith("text-texts-bpe300-")
    assert directory_of(DataConfig()).name.startswith("stdlib-bpe4096-")
    variants = [
        config,
        dataclasses.replace(config, tokenizer="bytes"),
        dataclasses.replace(config, tokenizer_vocab_size=310),
        dataclasses.replace(config, validation_fraction=0.3),
        dataclasses.replace(config, path=str(tmp_path / "texts" / "0*.txt")),
    ]
    assert len({directory_of(variant).name for variant in variants}) == len(variants)
    # What does not matter for the content does not lead to a second copy.
    ignored = dataclasses.replace(config, text_field="other", split="other", sequence_length=7, prefetch_steps=9)
    assert directory_of(ignored) == directory_of(config)
    (tmp_path / "texts" / "39.txt").write_text("different")
    assert directory_of(config).name != directory_of(variants[1]).name
    with pytest.raises(DataError, match="no prepared corpus here"):
        open_corpus(config, vocab_size=300, directory=directory_of(config))


def test_the_same_source_gives_the_same_bytes_elsewhere(config, tmp_path):
    first = Corpus.open(prepare(config, progress=False), vocab_size=300)
    second = Corpus.open(
        prepare(dataclasses.replace(config, root=str(tmp_path / "other")), progress=False), vocab_size=300
    )
    assert first.index == second.index
    third = prepare(dataclasses.replace(config, validation_fraction=0.5), progress=False)
    assert Corpus.open(third, vocab_size=300).index.fingerprint != first.index.fingerprint
    assert (
        open_corpus(config, vocab_size=300, directory=directory_of(config)).split("validation").fingerprint
        == first.index.fingerprint
    )


def test_two_at_once_end_with_one_good_corpus(config):
    with ThreadPoolExecutor(4) as pool:
        directories = {*pool.map(lambda _: prepare(config, progress=False), range(4))}
    (directory,) = directories
    verify(directory)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_kill_leaves_nothing_that_looks_like_a_corpus(config):
    # The process is stopped for good at the worst moment: all is written but the rename.
    before = "Path.rename = lambda self, target: print('ready', flush=True) or __import__('time').sleep(60)"
    process = prepare_in_process(config, before=before)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    target = directory_of(config)
    leftovers = sorted(path.name for path in target.parent.iterdir())
    assert leftovers == [f".{target.name}.lock", f".{target.name}.partial"]
    verify(prepare(config, progress=False))
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def stop_after(monkeypatch, name, num_calls):
    """Let a function of the second pass raise what nobody catches at its call number ``num_calls``; count the calls."""
    function, calls = getattr(tokenise, name), []

    def counted(*args):
        if len(calls) == num_calls:
            raise KeyboardInterrupt
        calls.append(name)
        return function(*args)

    monkeypatch.setattr(tokenise, name, counted)
    return calls


def test_what_was_finished_before_a_kill_is_used(config, tmp_path, monkeypatch):
    monkeypatch.setattr("bigtrain.data.prepare.sources._PART_BYTES", 4000)
    config.shard_tokens, config.prepare_processes = 1000, 1
    whole = prepare(dataclasses.replace(config, root=str(tmp_path / "other")), progress=False)
    num_parts, num_shards = len(source_parts(config)), sum(len(split.shards) for split in splits(read_index(whole)))
    assert num_parts > 5 and num_shards > 5
    for name, total in (("kept_documents", num_parts), ("_read_ranges", num_shards)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, name, 3)
            prepare(config, progress=False)
        if name == "kept_documents":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                calls = stop_after(patch, name, total - 3)  # all the others, and then the shards
                stop_after(patch, "_read_ranges", 0)
                prepare(config, progress=False)
            assert len(calls) == total - 3
    with monkeypatch.context() as patch:
        calls = stop_after(patch, "_read_ranges", None)
        assert read_index(prepare(config, progress=False)) == read_index(whole)
    assert len(calls) == num_shards - 3


def test_tokens_of_other_parts_or_another_tokenizer_are_not_used(config, tmp_path, monkeypatch):
    whole = prepare(dataclasses.replace(config, root=str(tmp_path / "other")), progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bigtrain.data.prepare.sources._PART_BYTES", 4000)
        config.prepare_processes = 1
        stop_after(patch, "kept_documents", 3)
        prepare(config, progress=False)
    assert read_index(prepare(config, progress=False)) == read_index(whole)


def test_killed_for_good_it_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr("bigtrain.data.prepare.sources._PART_BYTES", 4000)
    whole = prepare(dataclasses.replace(config, root=str(tmp_path / "other"), shard_tokens=1000), progress=False)
    config.shard_tokens, config.prepare_processes = 1000, 2
    before = "from bigtrain.data.prepare import sources, tokenise, corpus as module; sources._PART_BYTES = 4000; "
    before += "module._join_split = lambda *a: print('ready', flush=True) or __import__('time').sleep(60)"
    process = prepare_in_process(config, before=before)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    calls = stop_after(monkeypatch, "kept_documents", 0)
    config.prepare_processes = 1
    assert read_index(prepare(config, progress=False)) == read_index(whole) and not calls


def test_workers_end_with_a_killed_main_process(tmp_path):
    code = """
        import multiprocessing, time
        from bigtrain.data.read.workers import workers
        with workers(2) as run:
            tasks = run(time.sleep, ((seconds,) for seconds in (0, 0, 60, 60, 60, 60)))
            next(tasks)
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            next(tasks), next(tasks)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_worker_that_is_killed_is_an_error_with_a_way_out():
    with (
        pytest.raises(DataError, match=r"was killed, perhaps for want of memory; the same command goes on"),
        workers(2) as run,
    ):
        list(run(os._exit, ((1,), (1,))))


def test_a_failure_says_what_and_the_next_try_succeeds(config, tmp_path):
    (tmp_path / "texts" / "zz.txt").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"zz\.txt: has zero bytes"):
        prepare(config, progress=False)
    (tmp_path / "texts" / "zz.txt").unlink()
    verify(prepare(config, progress=False))


def test_the_number_of_processes_changes_nothing(config, tmp_path, monkeypatch):
    expected = read_index(prepare(config, progress=False))
    monkeypatch.setattr("bigtrain.data.prepare.sources._PART_BYTES", 4000)  # several parts
    config = dataclasses.replace(config, root=str(tmp_path / "other"), prepare_processes=2)
    assert read_index(prepare(config, progress=False)) == expected


@pytest.mark.parametrize("name", [*FILES, "index.json"])
def test_a_missing_or_truncated_file_is_named(config, name):
    directory = prepare(config, progress=False)
    file = directory / name
    file.write_bytes(file.read_bytes()[:-1] if name != "index.json" else file.read_bytes()[:-100])
    for check in (lambda: prepare(config, progress=False), lambda: Corpus.open(directory, vocab_size=300)):
        with pytest.raises(DataError, match=f"{name}.*remove .* and prepare the corpus again"):
            check()
    file.unlink()
    with pytest.raises(DataError, match=name if name != "index.json" else "no prepared corpus here"):
        Corpus.open(directory, vocab_size=300)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_named(config, name):
    directory = prepare(config, progress=False)
    verify(directory)
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 4
    (directory / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: the content is not what was prepared"):
        verify(directory)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index: index.update(format=99), "format 99, this version reads format 2"),
        (lambda index: index.update(format=1), "format 1, this version reads format 2; prepare the corpus again"),
        (lambda index: index.pop("tokenizer"), "tokenizer: missing"),
        (lambda index: index.update(dtype="float64"), "dtype 'float64', expected uint16 or uint32"),
        (lambda index: index["train"].update(num_tokens=3), r"train\.num_tokens is not the sum over its shards"),
        (lambda index: first_shard(index).update(num_tokens=3), "3 tokens of 2 bytes are not"),
        (lambda index: first_shard(index)["tokens"].update(name="../secret.bin"), "is not a plain file name"),
        (lambda index: first_shard(index)["tokens"].update(name="/etc/passwd"), "is not a plain file name"),
        (lambda index: first_shard(index)["tokens"].update(name="..\\x"), "is not a plain file name"),
        (lambda index: first_shard(index)["documents"].update(name="tokenizer.json"), "two files have one name"),
        (lambda index: index.update(identity="x"), "made from another source"),
    ],
)
def test_a_wrong_index_is_refused(config, change, problem):
    directory = prepare(config, progress=False)
    index = json.loads((directory / "index.json").read_text())
    change(index)
    (directory / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=problem):
        prepare(config, progress=False)


def test_a_model_with_too_small_a_vocabulary_is_told_what_to_set(config):
    directory = prepare(config, progress=False)
    Corpus.open(directory, vocab_size=300)
    with pytest.raises(
        DataError,
        match=r"has 300 ids, but model.vocab_size=299; set model.vocab_size=300 or more .*data.tokenizer=<model.name>",
    ):
        Corpus.open(directory, vocab_size=299)


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["one"], "1 document with"),
        (["", ""], "0 documents with"),
        (["one", "one"], r"1 document with text, equal ones counted once"),
    ],
)
def test_too_small_a_corpus_is_an_error(tmp_path, texts, problem):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    with pytest.raises(DataError, match=problem + r".*cut the text into several files or jsonl lines"):
        prepare(small_config(tmp_path, "*.txt"), progress=False)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_both_splits_get_a_document_at_any_fraction(tmp_path, fraction):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    index = read_index(prepare(small_config(tmp_path, "*.txt", validation_fraction=fraction), progress=False))
    assert index.train.num_documents == index.validation.num_documents == 1


def test_a_place_that_cannot_be_written_is_an_error(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        prepare(dataclasses.replace(config, root=str(tmp_path / "file" / "data")), progress=False)


def test_prepare_tells_what_there_is_and_whether_it_is_enough(config, tmp_path):
    (tmp_path / "texts" / "00b.txt").write_bytes((tmp_path / "texts" / "00.txt").read_bytes())
    settings = [f"data.path={config.path}", f"data.root={config.root}", "data.tokenizer=bytes"]
    settings += ["data.filters.duplicates=exact", "+model=gpt_nano", "data.on_bad_row=skip", "data.split=test"]
    (tmp_path / "texts" / "bad.bin").write_bytes(b"\0")
    (tmp_path / "texts" / ".hidden").touch()
    done = subprocess.run(
        [sys.executable, LAUNCH / "prepare.py", "data=text", *settings],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    train = re.search(r"train +(\d+) documents, .* ([\d,]+) tokens in 1 shard", done.stdout)
    assert train and "left out    exact_duplicate: 1 document, 0.0 MB, such as 00b.txt" in done.stdout
    assert "bad rows or files" in done.stderr and "bad.bin: has zero bytes" in done.stderr
    assert "bad rows or files" not in done.stdout, "said once"
    assert "not read    .hidden (hidden)" in done.stdout and "data.split is ignored by data=text" in done.stderr
    found = re.search(r"enough\? +([\d.]+) tokens per parameter of gpt_nano \(([\d,]+)\)", done.stdout)
    num_tokens, num_parameters = (int(text.replace(",", "")) for text in (train[2], found[2]))
    assert float(found[1]) == pytest.approx(num_tokens / num_parameters, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shard_tokens": 0}, "data.shard_tokens=0: must be at least 1"),
        ({"cache_gib": 0.0}, "data.cache_gib=0.0: must be more than 0"),
        ({"prepare_processes": 0}, "data.prepare_processes=0: must be at least 1"),
        ({"filters": FilterConfig(min_characters=9, max_characters=8)}, "data.filters.max_characters=8: must not be"),
        ({"filters": FilterConfig(max_symbol_share=2.0)}, "data.filters.max_symbol_share=2.0: must be at most 1"),
        ({"filters": FilterConfig(near_similarity=0.0)}, "data.filters.near_similarity=0.0: must be more than 0"),
        ({"content": Content.chat}, "data.content=chat: data=stdlib has no records"),
        ({"source": DataSource.prepared}, "data.path: missing; data=prepared needs data.path=<directory or URL"),
    ],
)
def test_contradictions_are_found_before_anything_is_read(changes, problem):
    (found,) = check_data(DataConfig(**changes))
    assert found.startswith(problem)


def test_settings_without_effect_are_named():
    changed = {"cache_gib": 5.0, "messages_field": "m", "streaming": True, "filters": FilterConfig(near_similarity=0.5)}
    warnings = "\n".join(ignored_settings(TrainConfig(data=DataConfig(**changed))))
    for key in ("cache_gib", "messages_field", "streaming", "filters.near_similarity"):
        assert f"data.{key} is ignored" in warnings
    remote = DataConfig(source=DataSource.prepared, path="s3://bucket/corpus", cache_gib=5.0)
    assert ignored_settings(TrainConfig(data=remote)) == []
    (warning,) = ignored_settings(TrainConfig(data=dataclasses.replace(remote, tokenizer="gpt2")))
    assert warning.startswith("data.tokenizer is ignored by data=prepared")
