"""Text that is tokenised while training: the same samples, however often the run is interrupted."""

import dataclasses
import gzip
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import (
    ComponentConfig,
    Content,
    DataConfig,
    DataSource,
    Duplicates,
    FilterConfig,
    OnBad,
    Packing,
    TrainConfig,
    is_live,
)
from bigtrain.config.check import check_data, ignored_settings
from bigtrain.data.order.cursor import Cursor, chain_digest
from bigtrain.data.prepare import live, sources, survey
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.prepare.live import open_live
from bigtrain.data.read import live as read_live
from bigtrain.data.read import remote
from bigtrain.data.read.corpus import Corpus
from bigtrain.data.read.index import read_index
from bigtrain.data.read.live import validation_split
from bigtrain.data.read.loader import TrainLoader, validation_batches
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.workers import Helpers
from bigtrain.errors import DataError, UnreachableError
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.tasks.causal_lm import CausalLM

T = 16
END = 256
HERE = SimpleNamespace(num_processes=0, call=lambda function, *args: function(*args))
"""Tokenises when it is asked to, in this process, and not before."""


@pytest.fixture(autouse=True, scope="module")
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_PART_BYTES", 300)
        yield


def write_texts(path, num_documents=60):
    generator = random.Random(1)
    texts = [f"<{i}>" + chr(97 + i % 26) * generator.randrange(60) for i in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def config_in(directory, **changes):
    return DataConfig(
        **{
            "source": DataSource.jsonl,
            "path": str(directory / "text.jsonl"),
            "root": str(directory / "data"),
            "tokenizer": "bytes",
            "on_the_fly": True,
            "sequence_length": T,
            "validation_fraction": 0.15,
            "shuffle_window_shards": 3,
        }
        | changes
    )


def open_parts(config, helpers=HERE):
    directory = prepare(config, progress=False)
    return open_live(directory, config, read_index(directory), helpers)


def stream_of(config, previous=None, seed=3, **others):
    splits = {"data": open_parts(config), **others} if is_live(config) else others
    return SampleStream(
        "train", dict(sorted(splits.items())), config, seed=seed, global_batch_size=8, previous=previous
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("live")
    write_texts(directory / "text.jsonl")
    return directory


def step(stream, cursor):
    """Train one step."""
    ids = stream.ids(cursor.samples, 8)
    return Cursor(cursor.step + 1, cursor.samples + 8, chain_digest(cursor.digest, ids, stream.content))


def epoch_of(stream):
    """All ids of the first epoch."""
    component = stream.components["data"]
    component.ids(0, 1)
    while len(component._begins) <= component._windows_per_epoch:
        component.ids(component._begins[-1], 1)
    return stream.ids(0, component._begins[component._windows_per_epoch])


def documents_in(stream, ids):
    """Documents among the targets of some samples, by their text; only whole where nothing is cut."""
    targets = stream.gather(ids)["targets"].numpy()
    text = bytes(np.where(targets == END, 0, targets)[targets != IGNORE_INDEX].astype(np.uint8).tolist())
    return Counter(text.decode().split("\0")[:-1])


@pytest.mark.parametrize("packing", [Packing.concat, Packing.best_fit])
def test_every_training_document_is_there_once_an_epoch_and_no_validation_document(place, packing):
    config = config_in(place, packing=packing, sequence_length=100 if packing is Packing.best_fit else T)
    stream = stream_of(config)
    parts = open_parts(config)
    assert parts.num_parts > 8
    expected = {"train": Counter(), "validation": Counter()}
    for split, found in expected.items():
        for number in range(parts.num_parts):
            tokens = parts.load(number, split).tokens
            found.update(bytes(np.where(tokens == END, 0, tokens).astype(np.uint8)).decode().split("\0")[:-1])
    both = expected["train"] + expected["validation"]
    assert both == Counter(json.loads(line)["text"] for line in (place / "text.jsonl").read_text().splitlines())
    assert expected["validation"], "otherwise this shows nothing"
    ids = epoch_of(stream)
    assert len(set(ids.tolist())) == len(ids)
    if packing is Packing.best_fit:
        assert documents_in(stream, ids) == expected["train"]
    else:  # the rest of a window that is shorter than a sample is left, and its first token is no target
        num_tokens = sum(len(text.encode()) + 1 for text in expected["train"].elements())
        windows = stream.components["data"]._windows_per_epoch
        assert num_tokens - windows * (T + 1) <= len(ids) * T <= num_tokens - windows


def test_epochs_and_seeds_have_different_orders(place):
    stream = stream_of(config_in(place))
    first, second = (
        stream.components["data"]._numbers(i)[:3] for i in (0, stream.components["data"]._windows_per_epoch)
    )
    assert first != second
    assert stream.ids(0, 20).tolist() != stream_of(config_in(place), seed=4).ids(0, 20).tolist()


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_any_split_of_the_run_into_launches_has_the_same_samples(place, data):
    config = config_in(
        place,
        packing=data.draw(st.sampled_from([Packing.concat, Packing.best_fit])),
        shuffle_window_shards=data.draw(st.integers(1, 5)),
    )
    stream, cursor, whole = stream_of(config), Cursor(), []
    for _ in range(30):
        cursor = step(stream, cursor)
        whole.append(cursor)
    launches = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=5))
    cursor, state, stream = Cursor(), None, stream_of(config)
    for num_steps in launches:
        for _ in range(min(num_steps, 30 - cursor.step)):
            before, cursor = cursor, step(stream, cursor)
            assert cursor == whole[cursor.step - 1]
            state = stream.state(before, cursor)
        stream = stream_of(config, previous=state)
        assert stream.continues(state)
        assert not stream.continues(dataclasses.replace(state, digest="0" * 16))
        if state.previous_samples:
            opened = stream.components["data"]
            assert opened._first_window == state.places["data"].window, "nothing before is looked at again"


def test_a_resume_that_counts_wrongly_is_found(place):
    stream = stream_of(config_in(place))
    before = Cursor(10, 80)
    state = stream.state(before, step(stream, before))
    wrong = dataclasses.replace(state.places["data"], first_sample=state.places["data"].first_sample + 1)
    assert not stream_of(config_in(place), previous=dataclasses.replace(state, places={"data": wrong})).continues(state)
    for change in ({"packing": Packing.best_fit}, {"shuffle_window_shards": 2}):
        assert not stream_of(config_in(place, **change), previous=state).continues(state)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_global_batch_is_the_same_for_any_world(place, dp_size):
    config, ranks = config_in(place, packing=Packing.best_fit, document_mask=True), []
    for rank in range(dp_size):
        loader = TrainLoader(
            stream_of(config),
            global_batch_size=8,
            micro_batch_size=2,
            dp_rank=rank,
            dp_size=dp_size,
            start=Cursor(),
            prefetch_steps=2,
            pin_memory=False,
            objective=CausalLM(),
        )
        with loader:
            ranks.append([next(loader) for _ in range(12)])
    stream, cursor = stream_of(config), Cursor()
    for parts in zip(*ranks, strict=True):
        batch = stream.gather(stream.ids(cursor.samples, 8))
        cursor = step(stream, cursor)
        assert all(part.after == cursor and part.global_num_targets is None for part in parts)
        rows = [row for part in parts for micro in part.micro_batches for row in micro["targets"].tolist()]
        assert rows == batch["targets"].tolist()


def test_a_run_that_goes_back_to_before_its_launch_counts_from_the_beginning(place):
    whole = stream_of(config_in(place))
    before = Cursor(20, 160)
    state = whole.state(before, step(whole, before))
    resumed = stream_of(config_in(place), previous=state)
    assert resumed.components["data"]._first_window > 0
    resumed.leave_out(30, 60)
    whole.leave_out(30, 60)
    assert resumed.ids(0, 200).tolist() == whole.ids(0, 200).tolist()


def test_a_mixture_with_a_prepared_corpus(place):
    mixture = {"data": ComponentConfig(weight=0.75), "stored": ComponentConfig(weight=0.25)}
    config = config_in(place, mixture=mixture)
    stored = prepare(config_in(place, on_the_fly=False, prepare_processes=1), progress=False)
    split = Corpus.open(stored, vocab_size=257).split("train")
    stream = stream_of(config, stored=split)
    ids = stream.ids(0, 80)
    is_live_sample = ids < stream.components["data"].num_ids
    assert is_live_sample.sum() == 60
    alone = stream_of(config_in(place)).ids(0, 60)
    assert ids[is_live_sample].tolist() == alone.tolist(), "the other one changes nothing"
    batch = stream.gather(ids[:8])
    assert batch["tokens"].shape == (8, T)
    assert {stream.origin_of(int(sample))[0] for sample in ids[:8]} == {"data", "stored"}
    state = stream.state(Cursor(3, 24), step(stream, Cursor(3, 24)))
    assert stream_of(config, previous=state, stored=split).continues(state) and set(state.places) == {"data"}


def test_answers_count_and_nothing_else(tmp_path):
    lines = [json.dumps({"prompt": f"question {i}? ", "answer": f"answer {i}"}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    stream = stream_of(config_in(tmp_path, content=Content.pairs, packing=Packing.best_fit, sequence_length=60))
    assert not stream.is_full
    counted = documents_in(stream, epoch_of(stream))
    assert len(counted) > 40 and all(text.startswith("answer ") for text in counted)


# Validation


def test_validation_documents_come_from_the_first_parts_only_as_far_as_needed(place):
    config = config_in(place, packing=Packing.best_fit)
    parts = open_parts(config)
    some = validation_split(parts, num_tokens=40, sequence_length=T)
    everything = validation_split(parts, num_tokens=10**9, sequence_length=T)
    assert 40 <= len(some.read(0)) < len(everything.read(0))
    assert np.array_equal(some.read(0), everything.read(0)[: len(some.read(0))])
    assert len(validation_split(parts, num_tokens=0, sequence_length=T).read(0)) == 0
    stream = SampleStream("validation", {"data": everything}, config, seed=0, global_batch_size=4)
    batches = chain.from_iterable(
        validation_batches(
            stream,
            batches=2,
            global_batch_size=4,
            micro_batch_size=4,
            dp_rank=0,
            dp_size=1,
            objective=CausalLM(),
        )
    )
    assert sum((batch["targets"] != IGNORE_INDEX).sum().item() for batch in batches) > 40


def test_far_parts_are_not_tokenised_for_validation(place, monkeypatch):
    monkeypatch.setattr(read_live, "MOST_VALIDATION_PARTS", 2)
    parts, loaded = open_parts(config_in(place)), []
    load = parts.load
    monkeypatch.setattr(parts, "load", lambda number, split: loaded.append(number) or load(number, split))
    assert len(validation_split(parts, num_tokens=10**9, sequence_length=T).read(0)) > T
    assert loaded == list(range(len(loaded))) and len(loaded) < parts.num_parts


# The cache


def counted_work(monkeypatch):
    done, tokenise = [], live._tokenise
    monkeypatch.setattr(live, "_tokenise", lambda *task: done.append(task[1]) or tokenise(*task))
    return done


def test_each_part_is_tokenised_once_for_all_processes_of_a_node(tmp_path, monkeypatch):
    write_texts(tmp_path / "text.jsonl")
    done = counted_work(monkeypatch)
    ranks = [threading.Thread(target=epoch_of, args=(stream_of(config_in(tmp_path)),)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert len(done) == len(set(done)) == open_parts(config_in(tmp_path)).num_parts


def test_the_next_window_is_tokenised_before_it_is_needed(tmp_path):
    write_texts(tmp_path / "text.jsonl")
    helpers = SimpleNamespace(num_processes=2, call=HERE.call)
    parts = open_parts(config_in(tmp_path), helpers)
    stream = SampleStream("train", {"data": parts}, config_in(tmp_path), seed=3, global_batch_size=8)
    component = stream.components["data"]
    stream.ids(0, 1)
    wanted = [parts._name(number) for window in (0, 1) for number in component._numbers(window)]
    deadline = time.monotonic() + 20
    while not all(map(parts._cache.holds, wanted)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held = [number for number in range(parts.num_parts) if parts._cache.holds(parts._name(number))]
    assert len(held) == len(set(wanted)) < parts.num_parts


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path, caplog):
    write_texts(tmp_path / "text.jsonl", 12)
    parts = open_parts(config_in(tmp_path))
    good = parts.load(0, "train")
    path = parts._cache.path(parts._name(0))
    content = path.read_bytes()
    places = range(0, len(content), max(len(content) // 60, 1))
    damages = [content[:0], content[:-30], *(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :] for i in places)]
    for damaged in damages:
        path.write_bytes(damaged)
        again = parts.load(0, "train")
        assert np.array_equal(again.tokens, good.tokens) and np.array_equal(again.lengths, good.lengths)
    assert len(caplog.records) > 20


def test_what_a_killed_process_left_is_made_again(tmp_path):
    write_texts(tmp_path / "text.jsonl", 12)
    parts = open_parts(config_in(tmp_path))
    good = parts.load(0, "train").tokens
    path = parts._cache.path(parts._name(0))
    content = path.read_bytes()
    path.unlink()
    path.with_name(f"{path.name}.0.partial").write_bytes(content[:50] + b"x" * 2 * len(content))
    assert np.array_equal(parts.load(0, "train").tokens, good) and path.stat().st_size == len(content)


def test_a_cache_has_to_hold_a_window(tmp_path):
    write_texts(tmp_path / "text.jsonl")
    config = config_in(tmp_path)
    expected = stream_of(config).ids(0, 60)
    sizes = [path.stat().st_size for path in (tmp_path / "data/cache").iterdir() if path.suffix != ".lock"]
    room = dataclasses.replace(config, cache_gib=3 * max(sizes) / 2**30, cache_directory=str(tmp_path / "room"))
    assert stream_of(room).ids(0, 60).tolist() == expected.tolist()
    assert len(list((tmp_path / "room").iterdir())) < len(sizes)
    small = dataclasses.replace(config, cache_gib=2 * min(sizes) / 2**30, cache_directory=str(tmp_path / "small"))
    with pytest.raises(DataError, match=r"data\.cache_gib=.*: too small for the tokens of the 3 parts .* use at least"):
        stream_of(small).ids(0, 1)


def test_equal_documents_are_never_in_both_splits(tmp_path):
    texts = [f"text number {i % 30}" for i in range(150)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parts, found = open_parts(config_in(tmp_path, validation_fraction=0.3)), {}
    for split in ("train", "validation"):
        tokens = np.concatenate([parts.load(number, split).tokens for number in range(parts.num_parts)])
        found[split] = bytes(np.where(tokens == END, 0, tokens).astype(np.uint8)).decode().split("\0")[:-1]
    assert sorted(found["train"] + found["validation"]) == sorted(texts) and found["validation"]
    assert not set(found["train"]) & set(found["validation"])


def killed(signal_number):
    os.kill(os.getpid(), signal_number)


def test_helpers_that_are_killed_are_done_without():
    helpers = Helpers(1)
    assert helpers.call(os.getpid) != os.getpid()
    helpers._pool.submit(killed, signal.SIGTERM).exception(20)
    assert helpers.call(os.getpid) != os.getpid(), "what a scheduler sends to everybody leaves them alone"
    helpers._pool.submit(killed, signal.SIGKILL).exception(20)
    assert helpers.call(os.getpid) == os.getpid()


# Other text


def test_text_that_is_no_longer_what_it_was_is_found(tmp_path):
    write_texts(tmp_path / "text.jsonl")
    config = config_in(tmp_path)
    stream = stream_of(config)
    state = stream.state(Cursor(3, 24), step(stream, Cursor(3, 24)))
    path = tmp_path / "text.jsonl"
    os.utime(path, (1, 1))
    assert stream_of(config, previous=state).continues(state), "a copy will do"
    path.write_text(path.read_text().replace("aa", "ab"))
    again = stream_of(config, previous=state)
    assert again.fingerprint == stream.fingerprint and not again.continues(state), "found by its content"
    path.write_text(path.read_text() + '{"text": "more"}\n')
    assert stream_of(config).fingerprint != stream.fingerprint
    other = stream_of(config, previous=state)
    assert other.components["data"]._first_window == 0, "other text begins at its beginning"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: path.unlink(), r"text\.jsonl: no longer the file of \d+ bytes"),
        (lambda path: path.write_text(path.read_text()[:-9]), r"text\.jsonl: no longer the file"),
        (lambda path: path.write_text(path.read_text().replace("{", "[")), r"text\.jsonl:\d+: not valid JSON"),
    ],
)
def test_text_that_changes_under_the_run_is_named(tmp_path, change, problem):
    write_texts(tmp_path / "text.jsonl")
    stream = stream_of(config_in(tmp_path))
    change(tmp_path / "text.jsonl")
    with pytest.raises(DataError, match=problem):
        stream.ids(0, 1)


def test_odd_documents_are_counted_and_none_is_lost(tmp_path, caplog):
    caplog.set_level("INFO", "bigtrain")
    long = "long " * 200
    good = [json.dumps({"text": text}) for text in (long, *(f"text number {i}" for i in range(40)))]
    odd = ['{"text": ""}', '{"text": null}', '{"text": "12345678901"}', "", '{"text": "sm"}']
    (tmp_path / "text.jsonl").write_bytes("\n".join([*odd, *good, ""]).encode() + b'{"text": "bad \xff bytes in it"}\n')
    config = config_in(
        tmp_path, filters=FilterConfig(min_characters=3), packing=Packing.best_fit, validation_fraction=1e-9
    )
    config.shuffle_window_shards = 100
    stream = stream_of(config)
    targets = stream.gather(epoch_of(stream))["targets"].numpy()
    num_tokens = (
        len(long)
        + sum(len(f"text number {i}") + 1 for i in range(40))
        + 1
        + 12
        + len("bad \ufffd bytes in it".encode())
        + 1
    )
    assert (targets != IGNORE_INDEX).sum() == num_tokens
    assert "2 empty documents and 1 by data.filters left out, invalid UTF-8 in 1 replaced" in caplog.text


def test_bad_rows_and_files_are_left_out_the_same_for_any_world(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    texts = write_texts(tmp_path / "in" / "a.jsonl")
    lines = (tmp_path / "in" / "a.jsonl").read_text().splitlines()
    lines[7], lines[40] = "no JSON", '{"body": "x"}'
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    packed = gzip.compress("\n".join(lines).encode())
    (tmp_path / "in" / "half.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    good = Counter(text for number, text in enumerate(texts) if number not in (7, 40))
    changes = {"path": str(tmp_path / "in"), "validation_fraction": 1e-9, "packing": Packing.best_fit}
    config = config_in(tmp_path, **changes, on_bad_row=OnBad.skip)
    config.sequence_length = 80
    stream = stream_of(config)
    assert documents_in(stream, epoch_of(stream)) == good
    told = "\n".join(line for line in caplog.messages if "data.on_bad_row=skip" in line)
    assert all(place in told for place in ("a.jsonl:8: not valid", "a.jsonl:41: no field", "half.jsonl.gz: cannot"))
    ranks = []
    for rank in range(2):
        loader = TrainLoader(
            stream_of(config),
            global_batch_size=8,
            micro_batch_size=2,
            dp_rank=rank,
            dp_size=2,
            start=Cursor(),
            prefetch_steps=2,
            pin_memory=False,
            objective=CausalLM(),
        )
        with loader:
            ranks.append([next(loader).after.digest for _ in range(4)])
    cursor, digests = Cursor(), []
    for _ in range(4):
        cursor = step(stream, cursor)
        digests.append(cursor.digest)
    assert ranks == [digests, digests]
    with pytest.raises(DataError, match=r"a\.jsonl:8: not valid JSON|half\.jsonl\.gz"):
        epoch_of(stream_of(dataclasses.replace(config, on_bad_row=OnBad.stop)))


def test_a_source_that_does_not_answer_is_waited_for(place, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.002)
    config = config_in(place, cache_directory=str(tmp_path))
    expected = stream_of(config_in(place)).ids(0, 60).tolist()
    calls, read_part = [], survey.read_part

    def flaky(*args):
        calls.append(args)
        for number, document in enumerate(read_part(*args)):
            if number == 1 and len(calls) % 3:
                raise UnreachableError("half a shard")
            yield document

    monkeypatch.setattr(survey, "read_part", flaky)
    assert stream_of(config).ids(0, 60).tolist() == expected and len(calls) > 8
    monkeypatch.setattr(remote, "NUM_ATTEMPTS", 2)
    with pytest.raises(DataError, match="half a shard; given up after 2 tries"):
        stream_of(config_in(place, cache_directory=str(tmp_path / "other"))).ids(0, 60)


def test_a_streamed_dataset_is_read_shard_by_shard(tmp_path):
    import datasets

    texts = [f"document number {i}" for i in range(40)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"), num_shards=4)
    config = config_in(tmp_path, source=DataSource.datasets, path=str(tmp_path / "saved"), packing=Packing.best_fit)
    config.sequence_length, config.validation_fraction = 40, 1e-9
    for streaming in (False, True):
        config.streaming = streaming
        stream = stream_of(config)
        assert documents_in(stream, epoch_of(stream)) == Counter(texts)


def test_a_damaged_plan_is_named(tmp_path):
    write_texts(tmp_path / "text.jsonl")
    config = config_in(tmp_path)
    (path := prepare(config, progress=False) / live.PLAN_FILE).write_text("{}")
    with pytest.raises(DataError, match=r"parts\.json: \d+ bytes, index\.json says"):
        prepare(config, progress=False)
    with pytest.raises(DataError, match=r"parts\.json: cannot be read"):
        live.read_plan(path.parent)


def test_text_shorter_than_a_sample_is_an_error(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"the train split is shorter than one sample of 16 \+ 1 tokens"):
        stream_of(config_in(tmp_path, validation_fraction=1e-9)).ids(0, 1)
    (tmp_path / "text.jsonl").write_text("")
    with pytest.raises(DataError, match=r"none of its documents has text"):
        stream_of(config_in(tmp_path)).ids(0, 1)
    (tmp_path / "text.jsonl").unlink()
    with pytest.raises(DataError, match="no such file or directory"):
        stream_of(config_in(tmp_path))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokenizer": "bpe"}, "data.on_the_fly=true: a bpe is trained on the whole text"),
        (
            {"filters": FilterConfig(duplicates=Duplicates.exact)},
            "data.filters.duplicates=exact: duplicates are found by",
        ),
        ({"mixture": {"web": ComponentConfig(max_epochs=2)}}, "data.mixture.web.max_epochs: not offered on the fly"),
        ({"tokenizer": "byte"}, "data.tokenizer=byte: did you mean bytes?"),
        ({"tokenizer": "BPE"}, "data.tokenizer=BPE: did you mean bpe?"),
    ],
)
def test_what_cannot_be_done_on_the_fly_is_said(tmp_path, changes, problem):
    assert any(found.startswith(problem) for found in check_data(config_in(tmp_path, **changes)))
    for name in ("gpt2", "google/byt5-small", "./byte", "bytes", str(tmp_path)):
        assert check_data(config_in(tmp_path, tokenizer=name)) == []


def test_where_it_has_no_effect_it_is_said(tmp_path):
    config = TrainConfig(data=DataConfig(source=DataSource.synthetic, on_the_fly=True))
    assert "data.on_the_fly is ignored by data=synthetic" in ignored_settings(config)
    assert "data.shard_tokens is ignored by data.on_the_fly=true" in ignored_settings(
        TrainConfig(data=config_in(tmp_path, shard_tokens=7))
    )
