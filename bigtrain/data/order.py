"""Which samples belong to which optimizer step: pure functions over integers.

Position ``p`` counts samples from the beginning of the run over all ranks. Optimizer step ``s``
takes the positions ``[s * global_batch_size, (s + 1) * global_batch_size)``; epoch
``p // num_samples`` visits every sample once, in an order drawn from the seed and the epoch.
Nothing depends on the world size, the micro-batch or where a run was resumed, no permutation is
ever stored, and seeking costs the same everywhere.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1
_NUM_ROUNDS = 6


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit integers bijectively (the finaliser of SplitMix64, Steele et al. 2014, variant 13 of Stafford).

    Args:
        values: uint64, any shape.

    Returns:
        uint64, the same shape.
    """
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """Return a 64-bit key for a sequence of integers, each taken modulo 2**64."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        # An array of one element: unlike scalars, arrays wrap around without a warning.
        key = mix64((key ^ np.array([part & _MASK_64], dtype=np.uint64)) + np.uint64(_GOLDEN))
    return int(key[0])


def permute(positions: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Map ``[0, size)`` onto itself, one to one, in a pseudo-random order chosen by ``key``.

    A Feistel network permutes the next power of two; values that fall outside are sent through
    again until they fall inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002), fewer than one extra pass on average. Memory and time do not depend on ``size``.

    Args:
        positions: int64 in ``[0, size)``, any shape.
        size: Number of elements, at most 2**62.
        key: Chooses the permutation; taken modulo 2**64.

    Returns:
        int64, the same shape.
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


def sample_ids(first: int, count: int, num_samples: int, seed: int) -> NDArray[np.int64]:
    """Return the samples at the positions ``[first, first + count)`` of the run.

    Args:
        first: First position, counted over all epochs.
        count: Number of positions.
        num_samples: Samples in one epoch, at least 1.
        seed: Seed of the order.

    Returns:
        int64 ids in ``[0, num_samples)``, shape ``(count,)``.
    """
    positions = np.arange(first, first + count, dtype=np.int64)
    epochs, offsets = np.divmod(positions, num_samples)
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        inside = epochs == epoch
        ids[inside] = permute(offsets[inside], num_samples, derive_key(seed, epoch))
    return ids


def rank_slice(global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int, micro_batch: int) -> slice:
    """Return the part of a global batch that one rank computes in one micro-batch.

    The global batch is cut into ``dp_size`` equal runs of consecutive samples, rank after rank, and
    each run into micro-batches. Over all ranks and micro-batches every sample occurs exactly once,
    so the global batch is the same for any world and any micro-batch.

    Args:
        global_batch_size: Samples of an optimizer step; a multiple of ``dp_size * micro_batch_size``.
        micro_batch_size: Samples per rank and micro-batch.
        dp_rank: Position of the rank among those that split the data.
        dp_size: Number of such ranks.
        micro_batch: Index of the micro-batch, from 0.
    """
    per_rank = global_batch_size // dp_size
    assert per_rank * dp_size == global_batch_size and per_rank % micro_batch_size == 0
    assert 0 <= dp_rank < dp_size and 0 <= micro_batch < per_rank // micro_batch_size
    start = dp_rank * per_rank + micro_batch * micro_batch_size
    return slice(start, start + micro_batch_size)


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
