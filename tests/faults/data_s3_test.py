"""The real S3 protocol: a prepared corpus in moto's server, read through fsspec and s3fs while the server misbehaves."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import DataConfig, DataSource, OnBad
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.read import remote as remote_module
from bigtrain.data.read.corpus import Corpus, open_corpus
from bigtrain.errors import DataError, ShardError
from tests.faults.object_store import FaultyStore, serve

URL = "s3://bucket/some/corpus"
LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (root / f"{i:02}.txt").write_text(f"document {i}\n" + "some words again and again\n" * (20 + i))
    config = DataConfig(
        source=DataSource.text, path=f"{root}/*.txt", root=str(root / "data"), tokenizer="bytes", shard_tokens=5000
    )
    return prepare(config, progress=False)


@pytest.fixture(scope="module")
def server(corpus):
    """The corpus in a bucket; s3fs finds the server as it finds any: by the environment."""
    import fsspec

    settings = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with serve() as (endpoint, store), pytest.MonkeyPatch.context() as patch:
        for name, value in (settings | {"AWS_ENDPOINT_URL": endpoint}).items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # it would remember the server of another module
        file_system = fsspec.filesystem("s3")
        file_system.makedirs("bucket", exist_ok=True)
        file_system.put(f"{corpus}/", f"{URL}/", recursive=True)
        yield store


@pytest.fixture
def store(server: FaultyStore, monkeypatch) -> FaultyStore:
    server.faults.clear(), server.seen.clear()
    monkeypatch.setattr(remote_module, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(remote_module, "REQUEST_SECONDS", 1.5)
    return server


def config_of(tmp_path, **changes):
    return DataConfig(source=DataSource.prepared, path=URL, cache_directory=str(tmp_path / "cache"), **changes)


def tokens_of(corpus: Corpus):
    split = corpus.split("train")
    return [np.array(split.read(shard)).tolist() for shard in range(len(split.shard_tokens))]


def test_the_corpus_is_the_same_from_the_bucket(store, corpus, tmp_path):
    opened = open_corpus(config_of(tmp_path), vocab_size=257)
    assert tokens_of(opened) == tokens_of(Corpus.open(corpus, vocab_size=257))
    assert len(opened.index.train.shards) > 3
    downloads = [path for path, _ in store.seen]
    assert len(downloads) == len(set(downloads)) and len(downloads) >= 4


@pytest.mark.parametrize("fault", ["500", "503", "slow", "truncated", "hang"])
def test_faults_on_the_way_change_nothing(store, corpus, tmp_path, fault):
    store.faults += [("index.json", fault), ("train-00000.bin", fault), ("train-00001.bin", fault)]
    assert tokens_of(open_corpus(config_of(tmp_path), vocab_size=257)) == tokens_of(Corpus.open(corpus, vocab_size=257))
    assert [injected for _, injected in store.seen if injected] == [fault] * 3
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_store_that_keeps_failing_ends_the_run_and_names_the_shard(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "NUM_ATTEMPTS", 2)
    monkeypatch.setattr(remote_module, "REQUEST_SECONDS", 0.5)
    split = open_corpus(config_of(tmp_path, on_bad_shard=OnBad.skip), vocab_size=257).split("train")
    store.faults += [("train-00001.bin", "hang")] * 100
    with pytest.raises(DataError, match=r"s3://bucket/some/corpus/train-00001\.bin: .*given up after 2 tries"):
        split.read(1)
    store.faults.clear()
    assert len(split.read(1)) == split.shard_tokens[1], "the fault has passed"


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_shard_that_is_bad_in_the_bucket_stops_or_is_skipped(store, corpus, tmp_path, damage):
    import fsspec

    file_system, path = fsspec.filesystem("s3"), f"{URL}/train-00002.bin"
    content = (corpus / "train-00002.bin").read_bytes()
    try:
        if damage == "missing":
            file_system.rm(path)
        else:
            file_system.pipe(path, content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ShardError, match=r"corpus/train-00002\.bin: .*data\.on_bad_shard=skip goes on without"):
            tokens_of(open_corpus(config_of(tmp_path), vocab_size=257))
        split = open_corpus(config_of(tmp_path, on_bad_shard=OnBad.skip), vocab_size=257).split("train")
        assert not split.counted(2).any() and split.skipped == {2} and split.counted(1) is None
    finally:
        file_system.pipe(path, content)


def test_a_bucket_without_a_corpus_is_named_without_a_traceback(store, tmp_path):
    settings = ["data=prepared", "data.path=s3://bucket/nowhere", f"data.root={tmp_path}"]
    done = subprocess.run(
        [sys.executable, LAUNCH / "prepare.py", *settings], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "s3://bucket/nowhere: no prepared corpus here (no index.json)" in done.stderr


def test_processes_share_the_cache_while_the_server_misbehaves(store, corpus, tmp_path):
    store.faults += [("train-0000[012]", fault) for fault in ("500", "truncated", "slow", "503")]
    code = f"""
        from bigtrain.config import DataConfig, DataSource
        from bigtrain.data.read import remote
        from bigtrain.data.read.corpus import open_corpus
        remote.FIRST_WAIT_SECONDS = 0.01
        config = DataConfig(source=DataSource.prepared, path="{URL}", cache_directory="{tmp_path}/cache")
        split = open_corpus(config, vocab_size=257).split("train")
        split.prefetch(range(len(split.shard_tokens)))
        print(sum(int(split.read(shard).sum()) for shard in range(len(split.shard_tokens))))
    """
    environ = os.environ | {"PYTHONPATH": str(LAUNCH.parent)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) for _ in range(3)]
    sums = {process.communicate(timeout=120)[0].strip() for process in processes}
    expected = sum(sum(tokens) for tokens in tokens_of(Corpus.open(corpus, vocab_size=257)))
    assert sums == {str(expected)} and all(process.returncode == 0 for process in processes)
    for name in {path for path, _ in store.seen if path.endswith(".bin")}:
        assert sum(path == name and fault in ("", "slow") for path, fault in store.seen) == 1, "once for all"
