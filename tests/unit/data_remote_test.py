import dataclasses
import fcntl
import functools
import json
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import DataConfig, DataSource, OnBad
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.read import remote as remote_module
from bigtrain.data.read.cache import NodeCache
from bigtrain.data.read.corpus import open_corpus
from bigtrain.data.read.index import INDEX_FILE, read_index
from bigtrain.data.read.remote import RemoteDirectory, ShardCache
from bigtrain.errors import DataError, ShardError

SHARD_TOKENS = 2000


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A corpus of about ten shards."""
    root = tmp_path_factory.mktemp("prepared")
    for i in range(40):
        (root / f"{i:02}.txt").write_text(f"document {i}\n" + "some words again and again\n" * i)
    return prepare(
        DataConfig(
            source=DataSource.text,
            path=f"{root}/*.txt",
            root=str(root / "data"),
            tokenizer="bytes",
            validation_fraction=0.2,
            shard_tokens=SHARD_TOKENS,
        ),
        progress=False,
    )


@pytest.fixture
def store(prepared, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(prepared, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote_module, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(remote_module, "LONGEST_WAIT_SECONDS", 0.002)


def config_of(store, tmp_path, **changes):
    return DataConfig(
        source=DataSource.prepared, path=f"file://{store}", cache_directory=str(tmp_path / "cache"), **changes
    )


def open_train(store, tmp_path, **changes):
    return open_corpus(config_of(store, tmp_path, **changes), vocab_size=257).split("train")


def tokens_of(split):
    return [np.array(split.read(shard)).tolist() for shard in range(len(split.shard_tokens))]


def local_tokens(store):
    config = DataConfig(source=DataSource.prepared, path=str(store))
    return tokens_of(open_corpus(config, vocab_size=257).split("train"))


@pytest.fixture
def requests(monkeypatch):
    """Every request as (name, start, end)."""
    seen, read_once = [], RemoteDirectory._read_once

    def recorded(self, name, start, end):
        seen.append((name, start, end))
        return read_once(self, name, start, end)

    monkeypatch.setattr(RemoteDirectory, "_read_once", recorded)
    return seen


def shard_requests(requests):
    return [name for name, start, _ in requests if start is not None]


def test_shards_from_a_url_are_those_of_the_directory(prepared, tmp_path):
    split = open_train(prepared, tmp_path)
    assert split.is_remote and split.cache_shards > 10 and len(split.shard_tokens) > 5
    assert tokens_of(split) == local_tokens(prepared)
    for shard, num_tokens in enumerate(split.shard_tokens):
        assert split.documents(shard)[-1] == num_tokens and split.counted(shard) is None


class WholeFiles(SimpleHTTPRequestHandler):
    """A web server that knows no ranges, fails every other time and keeps one directory to itself."""

    num_requests, num_bytes = 0, 0

    def do_GET(self):
        kind = type(self)
        kind.num_requests += 1
        if "secret" in self.path:
            self.send_error(403)
        elif kind.num_requests % 2:
            self.send_error(500)
        else:
            super().do_GET()

    def copyfile(self, source, outputfile):
        self.send_counted(source.read(), outputfile)

    def send_counted(self, content, outputfile):
        type(self).num_bytes += len(content)  # before it is sent: the client goes on at once
        outputfile.write(content)

    def log_message(self, *args):
        pass


class Ranges(WholeFiles):
    """One that knows them."""

    def copyfile(self, source, outputfile):
        first, last = self.headers["Range"].removeprefix("bytes=").split("-") if self.headers["Range"] else (0, -2)
        source.seek(int(first))
        self.send_counted(source.read(int(last) + 1 - int(first) if self.headers["Range"] else -1), outputfile)

    def send_response(self, code, message=None):
        super().send_response(206 if code == 200 and self.headers["Range"] else code, message)

    def send_header(self, keyword, value):
        if keyword == "Content-Length" and self.headers["Range"]:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            value = str(min(int(value), last + 1) - first)
        super().send_header(keyword, value)


HUB = "/datasets/somebody/corpus/resolve/main/shards/"


class Hub(Ranges):
    """A Hugging Face hub with a data set repository, so far as the file system of its package asks for it."""

    def do_GET(self):
        address = self.path.partition("?")[0]
        if address.startswith("/api/datasets/somebody/corpus/tree/main/shards"):
            files = [path for path in Path(self.directory).iterdir() if path.is_file()]
            kind = {"type": "file", "oid": "0" * 40}
            self.answer([kind | {"path": f"shards/{path.name}", "size": path.stat().st_size} for path in files])
        elif address in ("/api/datasets/somebody/corpus", "/api/datasets/somebody/corpus/revision/main"):
            self.answer({"id": "somebody/corpus", "sha": "0" * 40, "siblings": []})
        elif address.startswith(HUB):
            self.path = f"/{address.removeprefix(HUB)}"
            SimpleHTTPRequestHandler.do_GET(self)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def do_POST(self):
        assert self.path == "/api/datasets/somebody/corpus/paths-info/main"
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer([])  # asked for files that the listing does not have

    def answer(self, value):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())


def test_a_hugging_face_hub_is_read_by_ranges(store, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(remote_module, "RANGE_BYTES", 1500)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=store)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)  # as HF_ENDPOINT does
        config = DataConfig(
            source=DataSource.prepared,
            path="hf://datasets/somebody/corpus/shards",
            cache_directory=str(tmp_path / "cache"),
        )
        prepare(config, progress=False)
        split = open_corpus(config, vocab_size=257).split("train")
        before = Hub.num_bytes
        assert tokens_of(split) == local_tokens(store)
        assert Hub.num_bytes - before == sum(shard.tokens.num_bytes for shard in read_index(store).train.shards)
        for path in ("datasets/somebody/corpus/shards/elsewhere", "datasets/somebody/else"):
            with pytest.raises(DataError, match=rf"hf://{path}: no prepared corpus here"):
                prepare(dataclasses.replace(config, path=f"hf://{path}"), progress=False)
        server.shutdown()


@pytest.mark.parametrize("handler", [WholeFiles, Ranges])
def test_a_web_server_will_do(prepared, tmp_path, monkeypatch, handler):
    monkeypatch.setattr(remote_module, "RANGE_BYTES", 1500)
    serve = functools.partial(handler, directory=prepared)
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = DataConfig(
            source=DataSource.prepared,
            path=f"http://127.0.0.1:{server.server_port}/",
            cache_directory=str(tmp_path / "cache"),
        )
        prepare(config, progress=False)
        split = open_corpus(config, vocab_size=257).split("train")
        before = handler.num_bytes
        assert tokens_of(split) == local_tokens(prepared)
        assert handler.num_bytes - before == sum(shard.tokens.num_bytes for shard in read_index(prepared).train.shards)
        for name, problem in (("nowhere", "no prepared corpus here"), ("secret", "may not be read: 403")):
            with pytest.raises(DataError, match=rf"/{name}.*: {problem}"):
                prepare(dataclasses.replace(config, path=f"{config.path}{name}"), progress=False)
        server.shutdown()


def test_prepare_fetches_what_a_run_keeps(prepared, tmp_path):
    config = config_of(prepared, tmp_path)
    directory = prepare(config, progress=False)
    assert directory == prepare(config, progress=False)
    assert sorted(path.name for path in directory.iterdir()) == ["index.json", "tokenizer.json"]
    assert read_index(directory, check_sizes=False) == read_index(prepared)


def test_each_shard_is_fetched_once_for_all_processes_of_a_node(prepared, tmp_path, requests):
    # Caches of their own, as the ranks of a node have them; flock does not care that they share a process.
    splits = [open_train(prepared, tmp_path) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(tokens_of, splits))
    assert found == [local_tokens(prepared)] * 6
    names = shard_requests(requests)
    assert len(names) == len(set(names)) == len(splits[0].shard_tokens)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_shards_are_fetched_ahead_in_the_background(prepared, tmp_path, requests):
    split = open_train(prepared, tmp_path)
    split.prefetch([3, 1])
    deadline = time.monotonic() + 10
    while len(shard_requests(requests)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    while list((tmp_path / "cache").glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    fetched = [f"train-0000{shard}.{end}" for shard in (3, 1) for end in ("bin", "documents.npy")]
    assert sorted(shard_requests(requests)) == sorted(fetched)
    split.read(1), split.read(3), split.documents(3)
    assert len(shard_requests(requests)) == 4


def test_a_full_cache_makes_room_and_stays_below_its_limit(prepared, tmp_path, requests):
    largest = max(shard.tokens.num_bytes + shard.documents.num_bytes for shard in read_index(prepared).train.shards)
    limit = 3 * largest
    split = open_train(prepared, tmp_path, cache_gib=limit / 2**30)
    assert split.cache_shards == 3 and len(split.shard_tokens) > 6
    for _ in range(2):
        for shard, expected in enumerate(local_tokens(prepared)):
            assert split.read(shard).tolist() == expected
            sizes = [path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file()]
            assert sum(sizes) <= limit
    assert len(split._open) <= 4, "maps of evicted files would keep their space"
    before = len(requests)
    split.read(len(split.shard_tokens) - 1)
    assert len(requests) == before, "the newest are kept"


def test_a_cache_too_small_for_two_shards_is_refused(prepared, tmp_path):
    with pytest.raises(DataError, match=r"data\.cache_gib=1e-06: too small for two shards"):
        open_train(prepared, tmp_path, cache_gib=1e-6)


def test_a_killed_download_is_continued(prepared, tmp_path, requests, monkeypatch):
    code = f"""
        import time
        from pathlib import Path
        from bigtrain.data.read import remote
        from bigtrain.data.read.index import read_index
        remote.RANGE_BYTES = 500
        read_once = remote.RemoteDirectory._read_once
        def stuck(self, name, start, end):
            if start >= 1000:
                print("ready", flush=True)
                time.sleep(60)
            return read_once(self, name, start, end)
        remote.RemoteDirectory._read_once = stuck
        cache = remote.ShardCache(remote.RemoteDirectory("file://{prepared}"), Path("{tmp_path}/cache"), 1 << 20)
        cache.open(read_index("{prepared}").train.shards[0].tokens)
    """
    process = subprocess.Popen([sys.executable, "-uc", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    split = open_train(prepared, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(split.read, 0)
        time.sleep(0.2)
        assert not waiting.done(), "the other process holds the lock"
        process.kill()
        process.wait()
        assert waiting.result(timeout=20).tolist() == local_tokens(prepared)[0]
    (start,) = [start for name, start, _ in requests if name == "train-00000.bin"]
    assert start == 1000


def test_a_stale_partial_file_is_not_trusted(prepared, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    file = read_index(prepared).train.shards[0].tokens
    (cache / f"{file.xxh3}.{file.num_bytes}.partial").write_bytes(b"\0" * (file.num_bytes - 7))
    assert tokens_of(open_train(prepared, tmp_path)) == local_tokens(prepared)


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(prepared, tmp_path):
    tokens_of(open_train(prepared, tmp_path))
    for path in (tmp_path / "cache").iterdir():
        if path.is_file() and path.stat().st_size:
            path.write_bytes(b"\xff" + path.read_bytes()[1:])
    assert tokens_of(open_train(prepared, tmp_path)) == local_tokens(prepared)


def fail_sometimes(monkeypatch, errors):
    """Let requests for shards raise ``errors``, one each, and then succeed."""
    read_once, remaining = RemoteDirectory._read_once, list(errors)

    def failing(self, name, start, end):
        if start is not None and remaining:
            raise remaining.pop(0)
        return read_once(self, name, start, end)

    monkeypatch.setattr(RemoteDirectory, "_read_once", failing)


class StrangeError(Exception):
    """As libraries raise them: not an OSError."""


def test_faults_that_pass_are_waited_out(prepared, tmp_path, monkeypatch, caplog):
    fail_sometimes(monkeypatch, [OSError("500"), TimeoutError(), ConnectionResetError(), StrangeError("half a body")])
    assert open_train(prepared, tmp_path).read(0).tolist() == local_tokens(prepared)[0]


def test_faults_that_stay_end_after_a_bounded_number_of_tries(prepared, tmp_path, monkeypatch):
    fail_sometimes(monkeypatch, [OSError("500")] * 1000)
    # Even with skip: a store that does not answer says nothing about the shard.
    for policy in OnBad:
        with pytest.raises(DataError, match=r"train-00000\.bin: OSError: 500; given up after 8 tries") as caught:
            open_train(prepared, tmp_path, on_bad_shard=policy).read(0)
        assert not isinstance(caught.value, ShardError)


def test_a_forbidden_file_is_named_at_once(prepared, tmp_path, monkeypatch, requests):
    fail_sometimes(monkeypatch, [PermissionError("403")])
    with pytest.raises(DataError, match=r"train-00000\.bin: may not be read: 403"):
        open_train(prepared, tmp_path).read(0)


BAD = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-3] + b"\xff" + path.read_bytes()[-2:]),
}
SAID = {
    True: {"missing": "missing", "empty": "damaged: 0 bytes", "truncated": "damaged: .* says", "flipped": "damaged"},
    False: {"missing": "missing", "empty": "0 bytes", "truncated": "bytes, index.json says", "flipped": "the content"},
}


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_shard_is_named_and_stops_the_run(store, tmp_path, damage):
    BAD[damage](store / "train-00002.bin")
    with pytest.raises(DataError, match=rf"train-00002\.bin: .*{SAID[True][damage]}"):
        tokens_of(open_train(store, tmp_path))
    # A local corpus is looked at before the run.
    with pytest.raises(DataError, match=rf"train-00002\.bin: .*{SAID[False][damage]}"):
        prepare(DataConfig(source=DataSource.prepared, path=str(store)), progress=False)


@pytest.mark.parametrize("damage", BAD)
@pytest.mark.parametrize("is_remote", [True, False])
def test_a_bad_shard_can_be_skipped_without_changing_the_order(store, tmp_path, damage, is_remote):
    expected = local_tokens(store)
    BAD[damage](store / "train-00002.bin")
    config = config_of(store, tmp_path, on_bad_shard=OnBad.skip)
    if not is_remote:
        config.path = str(store)
    prepare(config, progress=False)
    split = open_corpus(config, vocab_size=257).split("train")
    assert [len(tokens) for tokens in expected] == split.shard_tokens.tolist()
    assert split.counted(2).tolist() == [0] * len(expected[2]) and split.counted(1) is None
    assert split.skipped == {2} and split.read(1).tolist() == expected[1]
    assert split.read(2).tolist() == [0] * len(expected[2])
    fresh = open_corpus(config, vocab_size=257).split("train")
    fresh.read(2)
    assert fresh.skipped == {2}, "whichever is asked for first"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index: index["train"]["shards"][0]["tokens"].update(name="../secret"), "is not a plain file name"),
        (lambda index: index["train"]["shards"][0]["tokens"].update(name="/etc/passwd"), "is not a plain file name"),
        (lambda index: index.update(format=1), "format 1, this version reads format 2"),
        (lambda index: index.pop("tokenizer"), "tokenizer: missing"),
        (lambda index: index["tokenizer"]["file"].update(xxh3="0" * 32), "not the tokenizer that the corpus was"),
        (lambda index: index["tokenizer"].update(vocab_size=300), "has 300 ids, but model.vocab_size=257"),
    ],
)
def test_a_wrong_index_is_refused(store, tmp_path, change, problem):
    index = json.loads((store / INDEX_FILE).read_text())
    change(index)
    (store / INDEX_FILE).write_text(json.dumps(index))
    config = config_of(store, tmp_path)
    with pytest.raises(DataError, match=problem):
        prepare(config, progress=False)
        open_corpus(config, vocab_size=257)


def test_urls_that_cannot_be_opened_are_explained(tmp_path):
    for url, problem in (
        (f"file://{tmp_path}/nowhere", r"no prepared corpus here \(no index\.json\)"),
        ("nonsense://bucket/corpus", "cannot be opened: Protocol not known: nonsense"),
        *([] if find_spec("gcsfs") else [("gs://bucket/corpus", "cannot be opened: .* install gcsfs")]),
    ):
        with pytest.raises(DataError, match=problem):
            prepare(DataConfig(source=DataSource.prepared, path=url, root=str(tmp_path)), progress=False)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/corpus", "S3FileSystem"),
        ("hf://datasets/somebody/corpus", "HfFileSystem"),
        ("https://somewhere.org/corpus", "HTTPFileSystem"),
    ],
)
def test_each_kind_of_url_has_its_file_system(url, name):
    remote = RemoteDirectory(url)
    assert type(remote._file_system).__name__ == name and remote._root.endswith("corpus")


def test_a_cache_that_cannot_be_written_is_explained(prepared, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be used as a cache: .* choose another data\.cache_directory"):
        open_train(prepared, tmp_path)


def test_a_full_disk_is_explained_and_not_retried(prepared, tmp_path, monkeypatch):
    split = open_train(prepared, tmp_path)

    def full(self, file, handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardCache, "_download", full)
    with pytest.raises(DataError, match=r"No space left on device; .* a smaller data\.cache_gib"):
        split.read(0)


def test_eviction_leaves_what_others_are_fetching(prepared, tmp_path):
    """A partial file in use counts with the size it will have; one of a killed process is removed."""
    cache = NodeCache(tmp_path / "cache", 1000)
    used, dead = (tmp_path / "cache" / f"{name}.900.partial" for name in ("used", "dead"))
    dead.write_bytes(b"x" * 500)
    with open(used, "wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        cache.make_room()
        assert used.exists() and not dead.exists()
    cache.make_room()
    assert used.exists(), "nothing is removed while all fits"


def test_no_thread_keeps_a_process_alive(prepared, tmp_path):
    split = open_train(prepared, tmp_path)
    split.prefetch([0])
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "fetch")


def test_a_corpus_on_this_machine_needs_no_cache(prepared, tmp_path):
    config = DataConfig(source=DataSource.prepared, path=str(prepared), root=str(tmp_path / "data"))
    assert prepare(config, progress=False) == Path(prepared)
    split = open_corpus(config, vocab_size=257).split("train")
    assert not split.is_remote and split.cache_shards is None
    split.prefetch([0])  # there is nothing to fetch
    assert not (tmp_path / "data").exists()
    with pytest.raises(DataError, match="no prepared corpus here"):
        prepare(DataConfig(source=DataSource.prepared, path=str(tmp_path)), progress=False)
