import warnings

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.order.permutation import Order, derive_key, permute, rank_share

seeds = st.integers(-(2**70), 2**70)


def sample_ids(first, count, num_samples, seed):
    return Order(np.array([num_samples]), seed).ids(first, count)


def global_batch(global_batch_size, dp_size, share_of=rank_share):
    """The samples of all ranks, in the order of ranks."""
    return [sample for rank in range(dp_size) for sample in share_of(global_batch_size, rank, dp_size)]


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_depends_on_the_key_and_looks_random():
    size, identity = 100_000, np.arange(100_000)
    orders = [permute(identity, size, key) for key in range(3)]
    for order in orders:
        # Of a random permutation: about one fixed point, one neighbouring pair, no correlation.
        assert (order == identity).sum() < 10
        assert (np.abs(np.diff(order)) == 1).sum() < 15
        assert abs(np.corrcoef(identity, order)[0, 1]) < 0.02
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.02


def test_every_value_comes_first_about_equally_often():
    for size in (3, 7, 20):
        firsts = [int(permute(np.arange(1), size, derive_key(0, k))[0]) for k in range(200 * size)]
        counts = np.bincount(firsts, minlength=size)
        assert np.all(np.abs(counts - 200) < 6 * np.sqrt(200)), (size, counts)


@given(num_samples=st.integers(1, 300), seed=seeds, epoch=st.integers(0, 10**6))
def test_each_sample_exactly_once_per_epoch(num_samples, seed, epoch):
    ids = sample_ids(epoch * num_samples, num_samples, num_samples, seed)
    assert sorted(ids.tolist()) == list(range(num_samples))


@given(num_samples=st.integers(1, 50), seed=seeds, first=st.integers(0, 500), cuts=st.lists(st.integers(0, 40)))
def test_reading_in_parts_gives_the_same_order(num_samples, seed, first, cuts):
    whole = sample_ids(first, sum(cuts), num_samples, seed)
    starts = np.cumsum([first, *cuts])
    parts = [sample_ids(int(start), count, num_samples, seed) for start, count in zip(starts, cuts, strict=False)]
    assert whole.tolist() == [i for part in parts for i in part.tolist()]


def test_epochs_and_seeds_have_different_orders():
    first, second = sample_ids(0, 1000, 500, seed=1).reshape(2, 500)
    assert (first != second).mean() > 0.9
    assert (first != sample_ids(0, 500, 500, seed=2)).mean() > 0.9


@given(size=st.integers(1, 200), dp_size=st.integers(1, 40))
def test_any_world_computes_the_same_global_batch(size, dp_size):
    assert global_batch(size, dp_size) == list(range(size))
    shares = [len(rank_share(size, rank, dp_size)) for rank in range(dp_size)]
    assert max(shares) == -(-size // dp_size) == shares[0]  # nobody computes more than the first, which has no padding


def test_that_property_would_notice_a_wrong_share():
    assert global_batch(8, 3, lambda size, rank, ranks: rank_share(size, min(rank, 1), ranks)) != list(range(8))


@settings(deadline=None)
@given(first=st.integers(0, 2**60))
def test_seeking_is_quick_anywhere_in_a_huge_corpus(first):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # integer overflow must wrap without a word
        ids = sample_ids(first, 512, 10**10, seed=0)  # a list of them all would take 80 GB
    assert ids.min() >= 0 and ids.max() < 10**10 and len(set(ids.tolist())) >= 511


def test_order_does_not_change_between_versions():
    """Runs are resumed by later versions: these values may never change."""
    assert sample_ids(0, 8, 10, seed=0).tolist() == [9, 2, 1, 0, 4, 6, 8, 3]
    assert sample_ids(10**12, 3, 10**10, seed=7).tolist() == [2659411465, 474217615, 2575655829]


# Windows of shards


@st.composite
def windowed_orders(draw):
    """Shards of any size, some empty, and a window."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    return Order(np.array(sizes), draw(st.integers(0, 99)), draw(st.integers(1, 14)))


@given(order=windowed_orders(), epoch=st.integers(0, 10**6))
def test_a_windowed_epoch_has_each_sample_once_and_each_shard_in_one_window(order, epoch):
    num_samples = order.num_samples
    ids = order.ids(epoch * num_samples, num_samples)
    assert sorted(ids.tolist()) == list(range(num_samples))
    shards = np.searchsorted(np.cumsum(order.shard_samples), ids, side="right")
    begin = 0
    for _ in range(0, len(order.shard_samples), order.window_shards):
        # What is left of the epoch says which shards come next; the first of them are this window's.
        if begin == num_samples:
            break
        window = order.shards_ahead(epoch * num_samples + begin, len(order.shard_samples))[: order.window_shards]
        size = int(order.shard_samples[window].sum())
        assert set(shards[begin : begin + size].tolist()) == {s for s in window.tolist() if order.shard_samples[s]}
        begin += size
    assert begin == num_samples


@given(order=windowed_orders(), first=st.integers(0, 300), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_a_windowed_order_read_in_parts_is_the_same(order, first, cuts):
    starts = np.cumsum([first, *cuts])
    parts = [order.ids(int(start), count).tolist() for start, count in zip(starts, cuts, strict=False)]
    assert order.ids(first, sum(cuts)).tolist() == [i for part in parts for i in part]


def test_windows_differ_from_epoch_to_epoch_and_mix_their_shards():
    order = Order(np.full(40, 500), seed=1, window_shards=8)
    first, second = order.ids(0, 40_000).reshape(2, 20_000)
    assert (first != second).mean() > 0.99
    assert set((first[:200] // 500).tolist()) == set((first[:4000] // 500).tolist()), "200 samples are from 8 shards"


def test_without_windows_shards_make_no_difference():
    parts = Order(np.array([3, 0, 7]), seed=5)
    assert parts.ids(4, 30).tolist() == sample_ids(4, 30, 10, seed=5).tolist()


@settings(deadline=None, max_examples=10)
@given(first=st.integers(0, 2**60))
def test_a_windowed_order_of_ten_billion_samples_is_ready_at_once(first):
    sizes = np.full(200_000, 50_000)  # a list of them all would take 80 GB
    ids = Order(sizes, seed=0, window_shards=8).ids(first, 512)
    assert ids.min() >= 0 and ids.max() < 10**10


def test_windowed_order_does_not_change_between_versions():
    order = Order(np.array([4, 1, 5]), seed=0, window_shards=2)
    assert order.ids(0, 20).tolist() == [2, 3, 0, 4, 1, 8, 6, 5, 9, 7, 3, 4, 2, 1, 0, 6, 8, 5, 9, 7]
