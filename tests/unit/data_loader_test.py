import math
import threading
import time
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import DataConfig
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.corpus import TokenSplit
from bigtrain.data.read.loader import TrainLoader, validation_batches
from bigtrain.data.read.packing import SyntheticSamples
from bigtrain.data.read.stream import SampleStream
from bigtrain.errors import DataError
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.tasks.causal_lm import CausalLM

T = 4


def counting_split(num_tokens):
    """Token ``i`` is ``i``, so the first token of a sample tells its id."""
    return TokenSplit("train", np.arange(num_tokens, dtype=np.uint32), "f")


def stream_of(split, global_batch_size=4, **data):
    config = DataConfig(sequence_length=T, **data)
    return SampleStream(split.name, {"data": split}, config, seed=3, global_batch_size=global_batch_size)


def loader(split, *, global_batch_size=4, micro_batch_size=2, dp_rank=0, dp_size=1, first_step=0, prefetch_steps=2):
    return TrainLoader(
        stream_of(split, global_batch_size),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        start=Cursor(first_step, first_step * global_batch_size),
        prefetch_steps=prefetch_steps,
        pin_memory=False,
        objective=CausalLM(),
    )


def first_steps(split, num_steps, **settings):
    with loader(split, **settings) as batches:
        return [next(batches) for _ in range(num_steps)]


@st.composite
def topologies(draw):
    """(global batch, micro-batch, dp_size), which need not divide."""
    return draw(st.integers(1, 60)), draw(st.integers(1, 6)), draw(st.integers(1, 7))


def rows(step_batches):
    """Per step: the tokens of all samples that are no padding, as lists."""
    return [
        [
            tokens.tolist()
            for batch in step.micro_batches
            for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True)
            if targets[0] != IGNORE_INDEX
        ]
        for step in step_batches
    ]


def test_a_step_has_tokens_and_shifted_targets():
    (step,) = first_steps(counting_split(100), 1, global_batch_size=6, micro_batch_size=3)
    assert step.step == 0 and step.num_targets == step.global_num_targets == 6 * T and len(step.micro_batches) == 2
    for batch in step.micro_batches:
        assert batch["tokens"].shape == batch["targets"].shape == (3, T)
        assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
        assert batch["tokens"].is_contiguous() and batch["targets"].is_contiguous()
        assert torch.equal(batch["targets"], batch["tokens"] + 1)


@settings(deadline=None, max_examples=15)
@given(topology=topologies(), num_tokens=st.integers(T + 1, 400), first_step=st.integers(0, 1000))
def test_the_global_batch_is_the_same_for_any_topology(topology, num_tokens, first_step):
    global_batch_size, micro_batch_size, dp_size = topology
    split = counting_split(num_tokens)
    alone = rows(first_steps(split, 2, global_batch_size=global_batch_size, micro_batch_size=1, first_step=first_step))
    ranks = [
        first_steps(
            split,
            2,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
            first_step=first_step,
        )
        for rank in range(dp_size)
    ]
    assert [[*chain(*parts)] for parts in zip(*map(rows, ranks), strict=True)] == alone
    shapes = {(len(step.micro_batches), *step.micro_batches[0]["tokens"].shape) for steps in ranks for step in steps}
    assert shapes == {(math.ceil(math.ceil(global_batch_size / dp_size) / micro_batch_size), micro_batch_size, T)}
    for step in (0, 1):
        assert sum(steps[step].num_targets for steps in ranks) == global_batch_size * T
        assert len({(steps[step].after, steps[step].global_num_targets) for steps in ranks}) == 1


def test_an_epoch_visits_every_sample_once():
    steps = first_steps(counting_split(24 * T + 1), 12)  # two epochs of 24 samples
    firsts = [row[0] // T for step in rows(steps) for row in step]
    assert sorted(firsts[:24]) == sorted(firsts[24:]) == list(range(24)) and firsts[:24] != firsts[24:]


def test_a_resumed_loader_continues_where_the_first_stopped():
    split = counting_split(1000)
    whole = first_steps(split, 9)
    resumed = first_steps(split, 4, first_step=5, prefetch_steps=7)
    assert [step.step for step in resumed] == [5, 6, 7, 8]
    assert rows(resumed) == rows(whole)[5:]
    assert rows(first_steps(split, 4, first_step=6)) != rows(whole)[5:]


class DamagedSplit(TokenSplit):
    """Has two shards, of which the second is gone."""

    def read(self, shard):
        if shard == 1:
            raise DataError("shard gone")
        return super().read(shard)


def test_an_error_in_the_background_is_raised_at_its_step():
    split = DamagedSplit("train", [np.arange(24 * T + 1), np.arange(T + 1)], "f")  # sample 24 is in the second
    (bad_step,) = np.flatnonzero(stream_of(split, 1).ids(0, 25) == 24).tolist()
    assert bad_step > 0
    with loader(split, global_batch_size=1, micro_batch_size=1, prefetch_steps=4) as batches:
        assert [next(batches).step for _ in range(bad_step)] == list(range(bad_step))
        for _ in range(2):  # asked again, it says so again
            with pytest.raises(DataError, match="shard gone"):
                next(batches)


class CountingSplit(TokenSplit):
    """Counts how often it was read."""

    num_reads = 0

    def read(self, shard):
        self.num_reads += 1
        return super().read(shard)


def read_ahead(prefetch_steps):
    """Return how many steps are read while the consumer, who has taken one, asks for nothing."""
    split = CountingSplit("train", np.arange(100), "f")
    with loader(split, micro_batch_size=4, prefetch_steps=prefetch_steps) as batches:
        next(batches)
        before, deadline = -1, time.monotonic() + 60
        while before != split.num_reads and time.monotonic() < deadline:  # until it stands still
            before = split.num_reads
            time.sleep(0.3)
        return split.num_reads


def test_batches_are_prepared_while_the_consumer_works(monkeypatch):
    monkeypatch.setattr("bigtrain.data.read.loader._STEPS_AT_ONCE", 1)
    assert read_ahead(8) >= read_ahead(1) + 4


def test_close_ends_the_thread_promptly():
    before = threading.active_count()
    batches = loader(CountingSplit("train", np.arange(100), "f"), micro_batch_size=4, prefetch_steps=100)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    batches.close()
    assert threading.active_count() == before


def test_a_split_shorter_than_a_sample_is_an_error():
    with pytest.raises(DataError, match=r"the train split is shorter than one sample of 4 \+ 1 tokens"):
        loader(counting_split(T))
    with pytest.raises(DataError, match=r"data\.validation_fraction"):
        next(validate(counting_split(T), 1, (1, 1, 1), 0))
    assert len(first_steps(counting_split(T + 1), 3)) == 3


def validate(split, batches, topology, dp_rank):
    global_batch_size, micro_batch_size, dp_size = topology
    return validation_batches(
        stream_of(split, global_batch_size),
        batches=batches,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        objective=CausalLM(),
    )


def validated_samples(split, batches, topology):
    """Number of micro-batches of each rank, and all samples that count."""
    ranks = [list(chain.from_iterable(validate(split, batches, topology, rank))) for rank in range(topology[2])]
    samples = []
    for batch in (batch for rank in ranks for batch in rank):
        assert batch["tokens"].shape == batch["targets"].shape == (topology[1], T)
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            assert torch.equal(targets, tokens + 1) or torch.all(targets == IGNORE_INDEX)
            samples += [int(tokens[0]) // T] if targets[0] != IGNORE_INDEX else []
    return [len(rank) for rank in ranks], samples


@settings(deadline=None, max_examples=60)
@given(topology=topologies(), num_samples=st.integers(1, 80), batches=st.integers(1, 5))
def test_validation_counts_each_chosen_sample_once_for_any_topology(topology, num_samples, batches):
    split = counting_split(num_samples * T + 1)
    counts, samples = validated_samples(split, batches, topology)
    assert len(set(counts)) == 1 and counts[0] >= 1, "every rank takes part in every collective"
    assert len(samples) == len(set(samples)) == min(batches * topology[0], num_samples)
    assert sorted(samples) == sorted(validated_samples(split, batches, (topology[0], 1, 1))[1])
    if len(samples) == num_samples:
        assert sorted(samples) == list(range(num_samples))


def test_validation_samples_are_spread_over_the_split():
    _, samples = validated_samples(counting_split(1000 * T + 1), 2, (5, 5, 1))
    assert samples == list(range(0, 1000, 100))


def test_synthetic_samples_are_a_function_of_their_id():
    samples = SyntheticSamples("train", 100, 16)
    whole = samples.gather(np.arange(50))
    tokens = whole["tokens"]
    assert tokens.shape == (50, 16) and tokens.min() >= 0 and whole["targets"].max() < 100
    assert np.array_equal(whole["targets"][:, :-1], tokens[:, 1:]) and whole["targets"].min() >= 0
    assert np.array_equal(samples.gather(np.array([7, 49]))["tokens"], tokens[[7, 49]])
    assert not np.array_equal(SyntheticSamples("validation", 100, 16).gather(np.arange(50))["tokens"], tokens)
    assert len(np.unique(tokens, axis=0)) == 50


def test_ragged_targets_differ_per_sample_and_are_counted():
    split = SyntheticSamples("train", 64, T, is_ragged=True)
    (step,) = first_steps(split, 1, global_batch_size=64, micro_batch_size=8)
    counted = torch.cat([batch["targets"] != IGNORE_INDEX for batch in step.micro_batches])
    lengths = counted.sum(dim=1)
    assert step.num_targets == int(lengths.sum()) and step.global_num_targets is None
    assert set(lengths.tolist()) == {1, 2, 3, 4}
    assert torch.equal(counted, torch.arange(T) < lengths[:, None]), "only a tail is masked"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches():
    with TrainLoader(
        stream_of(counting_split(100)),
        global_batch_size=4,
        micro_batch_size=2,
        dp_rank=0,
        dp_size=1,
        start=Cursor(),
        prefetch_steps=2,
        pin_memory=True,
        objective=CausalLM(),
    ) as batches:
        batch = next(batches).micro_batches[0]
    assert batch["tokens"].is_pinned() and batch["targets"].is_pinned()
    on_device = batch.to(torch.device("cuda"))
    assert torch.equal(on_device["targets"].cpu(), batch["targets"])
