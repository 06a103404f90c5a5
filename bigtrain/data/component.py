"""One data set of a run as samples, in the order in which they are drawn as if it were alone."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig
from bigtrain.data.batch import Samples
from bigtrain.data.corpus import Split
from bigtrain.data.order import Order
from bigtrain.data.packing import build_packing
from bigtrain.errors import DataError

WINDOW_SHARDS = 8
"""Shards that data which has to be fetched is shuffled within, unless configured otherwise."""


class Component(Protocol):
    """What a stream needs to know of a data set."""

    fingerprint: str
    """What the sample ids are numbers of."""
    num_ids: int
    """Sample ids are below this."""
    is_full: bool
    """Whether every place of every sample is known to be a target that counts."""

    def ids(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the samples at the positions ``[first, first + count)``, counted over all epochs."""

    def gather(self, sample_ids: NDArray[np.int64]) -> Samples:
        """Return the samples with these ids, int64 ``(N,)``."""

    def documents(self, sample_id: int) -> NDArray[np.int64]:
        """Return the document of each place of a sample, -1 for padding."""

    def epochs(self, count: int) -> float:
        """Return how many passes the first ``count`` samples are, which have been drawn."""


class StoredSamples:
    """Samples of a prepared corpus, or synthetic ones: all are known from the beginning."""

    def __init__(self, split: Split, data: DataConfig, seed: int) -> None:
        """Cut the split into samples.

        Raises:
            DataError: a shard cannot be had, or the cache is too small.
        """
        window = data.shuffle_window_shards or (WINDOW_SHARDS if split.is_remote else None)
        _require_room(split, window, data)
        packed = build_packing(split, data.sequence_length, data.packing, data.document_mask)
        self.fingerprint = split.fingerprint
        self.split = split
        self.order = Order(packed.shard_samples, seed, window)
        self.num_ids, self.is_full = self.order.num_samples, packed.is_full
        self.ids, self.gather, self.documents = self.order.ids, packed.gather, packed.documents
        self._fetching: list[int] = []

    def epochs(self, count: int) -> float:
        """See :class:`Component`."""
        return count / max(self.num_ids, 1)

    def prefetch(self, first: int) -> None:
        """Begin to fetch what is needed from a position on: this window of shards and the next."""
        wanted, cached = 2 * (self.order.window_shards or WINDOW_SHARDS), _cache_shards(self.split)
        shards = self.order.shards_ahead(first, min(wanted, cached or wanted)).tolist()
        if shards != self._fetching:
            self._fetching = shards
            self.split.prefetch(shards)


def _cache_shards(split: Split) -> int | None:
    """Return how many shards of a split are at hand at a time; None when all are."""
    return getattr(split, "cache_shards", None)


def _require_room(split: Split, window_shards: int | None, data: DataConfig) -> None:
    """Refuse windows that do not fit into the cache: every shard would be fetched again and again.

    Raises:
        DataError: they do not; the window cannot follow the cache, because the order must not depend on the machine.
    """
    cached = _cache_shards(split)
    if cached is not None and cached < min(window_shards or len(split.shard_tokens), len(split.shard_tokens)):
        raise DataError(
            f"data.cache_gib={data.cache_gib} holds {cached} shards of the {split.name} split, which is shuffled within "
            f"{window_shards} at a time; use a larger data.cache_gib or data.shuffle_window_shards={max(cached, 1)}"
        )
