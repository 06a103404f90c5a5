"""One data set of a run as samples, in the order in which they are drawn as if it were alone.

Text that is tokenised while training has its own: :class:`bigtrain.data.read.live.LiveSamples`.
"""

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig, Packing
from bigtrain.data.order.permutation import Order, derive_key, mix64
from bigtrain.data.read.corpus import FileSplit
from bigtrain.data.read.documents import document_samples
from bigtrain.data.read.packing import AnySplit, build_packing
from bigtrain.errors import DataError

WINDOW_SHARDS = 8
"""Shards that data which has to be fetched is shuffled within, unless configured otherwise."""


class StoredSamples:
    """Samples of a prepared corpus, records, or synthetic ones: all are known from the beginning."""

    num_cut = 0
    """Documents that are longer than the sample that each is."""

    def __init__(
        self,
        split: AnySplit,
        data: DataConfig,
        seed: int,
        *,
        keeps_all: bool = False,
        most_samples: int | None = None,
    ) -> None:
        """Cut the split into samples; those without a target that counts are left out unless ``keeps_all``.

        Of more than ``most_samples``, so many are drawn: the same ones with every seed, more of them for a larger number.
        DataError if a shard cannot be had, or the cache is too small.
        """
        window = data.shuffle_window_shards or (WINDOW_SHARDS if split.is_remote else None)
        if split.is_remote:
            _require_room(split, window, data.cache_gib)
        if data.packing is Packing.documents and isinstance(split, FileSplit):
            packed = document_samples(split, data)
            self.num_cut = packed.num_cut()
        else:
            packed = build_packing(split, data.sequence_length, data.packing, data.document_mask)
        self.fingerprint = split.fingerprint
        self.split = split
        self.num_ids, self.is_full = int(packed.shard_samples.sum()), packed.is_full
        self._answered = None if keeps_all else packed.answered()
        self.num_left_out = 0 if self._answered is None else self.num_ids - len(self._answered)
        if most_samples is not None:
            self._answered = _some_of(
                np.arange(self.num_ids) if self._answered is None else self._answered, most_samples
            )
        ends = np.cumsum(packed.shard_samples)
        drawn = (
            np.diff(np.searchsorted(self._answered, [0, *ends])) if self._answered is not None else packed.shard_samples
        )
        self.order = Order(drawn, seed, window)
        self.num_samples = self.order.num_samples
        self.gather, self.documents = packed.gather, packed.documents
        self._fetching: list[int] = []

    def ids(self, first: int, count: int) -> NDArray[np.int64]:
        ids = self.order.ids(first, count)
        return ids if self._answered is None else self._answered[ids]

    def epochs(self, count: int) -> float:
        return count / max(self.num_samples, 1)

    def prefetch(self, first: int) -> None:
        """Begin to fetch what is needed from a position on: this window of shards and the next, if they are remote."""
        shards = self.order.shards_ahead(first, min(2 * self.order.window_shards, self.split.cache_shards)).tolist()
        if shards != self._fetching:
            self._fetching = shards
            self.split.prefetch(shards)


def _some_of(ids: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Return ``number`` of the ids, ascending, by the hash of each."""
    hashes = mix64(ids.astype(np.uint64) ^ np.uint64(derive_key(*b"most samples")))
    return np.sort(ids[np.argsort(hashes, kind="stable")[:number]])


def _require_room(split: FileSplit, window_shards: int, cache_gib: float) -> None:
    """Refuse windows that do not fit into the cache: every shard would be fetched again and again.

    The window cannot follow the cache, because the order must not depend on the machine.
    """
    cached = split.cache_shards
    if cached < min(window_shards, len(split.shard_tokens)):
        raise DataError(
            f"data.cache_gib={cache_gib} holds {cached} shards of the {split.name} split, which is shuffled within "
            f"{window_shards} at a time; use a larger data.cache_gib or data.shuffle_window_shards={max(cached, 1)}"
        )
