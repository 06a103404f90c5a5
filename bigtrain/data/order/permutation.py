"""Which samples belong to which optimizer step: pure functions over integers.

Position ``p`` counts samples from the beginning of the run over all ranks; epoch ``p // num_samples`` visits every
sample once, in an order drawn from the seed and the epoch. Nothing depends on the world size, the micro-batch or where
a run was resumed, no permutation is ever stored, and seeking costs the same everywhere.

Local data is shuffled as a whole. Where shards have to be fetched, they are shuffled and then the samples within
windows of some shards, so that reading along needs one window at a time, and each shard once per epoch.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1
_NUM_ROUNDS = 6


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash uint64 bijectively (the finaliser of SplitMix64, Steele et al. 2014, variant 13 of Stafford)."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """Return a 64-bit key for a sequence of integers, each taken modulo 2**64."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        # Arrays, unlike scalars, wrap around without a warning.
        key = mix64((key ^ np.array([part & _MASK_64], dtype=np.uint64)) + np.uint64(_GOLDEN))
    return int(key[0])


def permute(positions: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Map int64 ``positions`` in ``[0, size)``, any shape, one to one onto that range in a pseudo-random order.

    A Feistel network permutes the next power of two; values outside go through it again (cycle walking: Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), less than once on average. ``size`` is at most 2**62.
    """
    num_bits = max(size - 1, 1).bit_length()
    counters = np.arange(1, _NUM_ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    round_keys = mix64(np.array([key & _MASK_64], dtype=np.uint64) + counters)
    values = _feistel(positions.astype(np.uint64), num_bits, round_keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        walked = _feistel(values.flat[outside], num_bits, round_keys)
        values.flat[outside] = walked
        outside = outside[walked >= size]
    return values.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Order:
    """The order in which the samples of one data set are drawn, epoch after epoch, without end."""

    shard_samples: NDArray[np.int64]  # ``(num_shards,)``; ids count through the shards in order
    seed: int
    window_shards: int | None = None  # shuffle within so many shards at a time; None shuffles everything at once

    @cached_property
    def num_samples(self) -> int:
        return int(self.shard_samples.sum())

    def ids(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the samples at positions ``[first, first + count)``, counted over all epochs, int64 ``(count,)``."""
        num_samples = self.num_samples
        ids, done = np.empty(count, dtype=np.int64), 0
        while done < count:
            epoch, begin = divmod(first + done, num_samples)
            end = min(begin + count - done, num_samples)
            offsets = np.arange(begin, end, dtype=np.int64)
            if self.window_shards is None:
                shuffled = permute(offsets, num_samples, derive_key(self.seed, epoch))
            else:
                shuffled = self._windowed(offsets, epoch)
            ids[done : done + end - begin] = shuffled
            done += end - begin
        return ids

    def shards_ahead(self, first: int, num_shards: int) -> NDArray[np.int64]:
        """Return up to ``num_shards`` shards that are needed from a position on in this epoch, window by window."""
        if self.window_shards is None:
            return np.arange(min(num_shards, len(self.shard_samples)))
        epoch, offset = divmod(first, self.num_samples)
        shards, ends, _ = _shard_order(self, epoch)
        window = int(np.searchsorted(ends, offset, side="right")) // self.window_shards
        return shards[window * self.window_shards :][:num_shards]

    def _windowed(self, offsets: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Shuffle the shards, then the samples within each run of ``window_shards`` shards."""
        _, ends, shifts = _shard_order(self, epoch)
        last = np.arange(self.window_shards, len(ends) + self.window_shards, self.window_shards)
        window_ends = ends[np.minimum(last, len(ends)) - 1]
        windows = np.searchsorted(window_ends, offsets, side="right")
        shuffled = np.empty_like(offsets)
        for window in np.unique(windows).tolist():
            inside = windows == window
            begin = int(window_ends[window - 1]) if window else 0
            size = int(window_ends[window]) - begin
            shuffled[inside] = begin + permute(offsets[inside] - begin, size, derive_key(self.seed, epoch, window))
        return shuffled + shifts[np.searchsorted(ends, shuffled, side="right")]


@lru_cache(maxsize=16)
def _shard_order(order: Order, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the shards in the order of an epoch, where each ends in that order, and what ids differ by from it."""
    num_shards = len(order.shard_samples)
    shards = permute(np.arange(num_shards), num_shards, derive_key(order.seed, epoch, -1))
    samples = order.shard_samples[shards]
    ends = np.cumsum(samples)
    first_ids = np.cumsum(order.shard_samples) - order.shard_samples
    return shards, ends, first_ids[shards] - (ends - samples)


def rank_share(global_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Return which samples of a global batch a rank computes: runs of consecutive ones, equal but for the last."""
    per_rank = -(-global_batch_size // dp_size)
    first, last = (min(rank * per_rank, global_batch_size) for rank in (dp_rank, dp_rank + 1))
    return range(first, last)


def _feistel(values: NDArray[np.uint64], num_bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute ``[0, 2**num_bits)``: each half in turn is XORed with a keyed hash of the other."""
    low_bits = (num_bits + 1) // 2
    shift = np.uint64(low_bits)
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << (num_bits - low_bits)) - 1)
    low, high = values & low_mask, values >> shift
    for round_number, round_key in enumerate(round_keys):
        if round_number % 2:
            low = low ^ (mix64(high ^ round_key) & low_mask)
        else:
            high = high ^ (mix64(low ^ round_key) & high_mask)
    return (high << shift) | low
