"""Text that is tokenised while training: the parts of a source, each tokenised when it is wanted.

What every process has to know of the source is found out once, when a run begins (``prepare/live.py``). The tokens of
a part go through a cache on the node's disk: one process of the node makes them, in a helper process so that the
training does not feel it, and the others read them; what a kill interrupts is made again.
"""

import os
import time
import zipfile
import zlib
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig
from bigtrain.data.read.cache import Ahead, NodeCache, cache_directory, explained
from bigtrain.data.read.corpus import TokenSplit
from bigtrain.data.read.dropped import Dropped
from bigtrain.data.read.index import CorpusIndex
from bigtrain.data.read.workers import Helpers
from bigtrain.errors import DataError
from bigtrain.log import get_logger

_PARTS_AHEAD = 4
MOST_VALIDATION_PARTS = 32
"""Parts in which validation documents are looked for, unless they have not enough for one sample."""
_NUM_ATTEMPTS = 3
_POLL_SECONDS = 0.01
_DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


class PartTokens(NamedTuple):
    """One split of a part."""

    tokens: NDArray[np.unsignedinteger]
    """All documents on end, each with its end-of-text token, ``(n,)``."""
    lengths: NDArray[np.int64]
    """Tokens of each document."""
    counted: NDArray[np.uint8] | None
    """1 where a token counts as a target, ``(n,)``; None when all do."""
    left_out: NDArray[np.int64]
    """Documents of the part, of both splits: empty, left out by a filter, repaired."""
    bad: Dropped
    """What ``data.on_bad_row=skip`` has left out of the part."""
    num_bytes: int
    """Size of the part, both splits, in the cache."""


class Source(Protocol):
    """What is tokenised, part by part: :class:`bigtrain.data.prepare.live.Tokenisation`."""

    fingerprint: str
    num_parts: int
    window_parts: int

    def make(self, number: int, name: str, cache: NodeCache, helpers: Helpers) -> None:
        """Tokenise a part into the cache under ``name``, unless it is there or another process is at it.

        Raises:
            DataError: what the source raises; it is not what it was; the cache cannot be written.
        """


class LiveParts:
    """The parts of a source as tokens."""

    def __init__(self, source: Source, config: DataConfig, index: CorpusIndex, helpers: Helpers) -> None:
        """Tokenise nothing yet.

        Raises:
            DataError: the cache cannot be used.
        """
        self.fingerprint = source.fingerprint
        self.num_parts = source.num_parts
        self.window_parts = config.shuffle_window_shards or source.window_parts
        """Parts that are shuffled together."""
        self.has_answers = config.content.has_answers
        self._source = source
        self._config = config
        self._index = index
        self._helpers = helpers
        self._cache = NodeCache(cache_directory(config), int(config.cache_gib * 2**30))
        self._ahead = Ahead(self._make, helpers.num_processes)

    def load(self, number: int, split: str) -> PartTokens:
        """Return one split of a part.

        Raises:
            DataError: what the source raises; the cache cannot be used.
        """
        name = self._name(number)
        for _ in range(_NUM_ATTEMPTS):
            with explained(self._cache.directory):
                while (handle := self._cache.open(name)) is None:
                    if self._cache.is_being_made(name):
                        time.sleep(_POLL_SECONDS)
                    else:
                        self._make(number)
            with handle:
                try:
                    return _read(handle, split)
                except _DAMAGE as error:
                    get_logger().warning("%s is damaged (%s) and is made again", self._cache.path(name), error)
                    self._cache.discard(name)
        raise DataError(f"{self._cache.path(name)}: damaged {_NUM_ATTEMPTS} times in a row; look at this disk")

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to tokenise parts in this order; what goes wrong is left to :meth:`load`."""
        self._ahead.want(number for number in numbers if not self._cache.holds(self._name(number)))

    def require_room(self, window: Sequence[PartTokens]) -> None:
        """Refuse a window that does not fit into the cache: its parts would be tokenised again and again.

        Raises:
            DataError: it does not.
        """
        num_bytes = sum(part.num_bytes for part in window)
        if num_bytes > self._cache.max_bytes:
            raise DataError(
                f"data.cache_gib={self._config.cache_gib}: too small for the tokens of the {len(window)} parts of "
                f"{self._config.path} that are shuffled at a time; use at least {1.1 * num_bytes / 2**30:.2g} or a smaller "
                "data.shuffle_window_shards"
            )

    def _name(self, number: int) -> str:
        return f"{self._index.identity[:32]}-{number}"

    def _make(self, number: int) -> None:
        self._source.make(number, self._name(number), self._cache, self._helpers)


def _read(handle: BinaryIO, split: str) -> PartTokens:
    """Read what a :class:`Source` has written; every array is compared with its checksum."""
    with np.load(handle, allow_pickle=False) as arrays:
        tokens, lengths, left_out = arrays[f"{split}.tokens"], arrays[f"{split}.lengths"], arrays["left_out"]
        bad = Dropped()
        if "bad" in arrays:
            bad = Dropped(documents=int(arrays["bad"]), examples=arrays["bad_examples"].tolist())
        num_bytes = os.fstat(handle.fileno()).st_size
        return PartTokens(tokens, lengths, arrays.get(f"{split}.counted"), left_out, bad, num_bytes)


def join(parts: Sequence[PartTokens], fingerprint: str, split: str) -> TokenSplit:
    """Return parts as one shard, in which documents are packed together."""
    tokens = np.concatenate([part.tokens for part in parts])
    documents = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]).astype(np.int64)
    counted = None
    if any(part.counted is not None for part in parts):
        counts = [np.ones(len(p.tokens), np.uint8) if p.counted is None else p.counted for p in parts]
        counted = np.concatenate(counts)
    return TokenSplit(split, tokens, fingerprint, documents=[documents], counted=[counted])


def validation_split(parts: LiveParts, *, num_tokens: int, sequence_length: int) -> TokenSplit:
    """Return the validation documents of the first parts: so many that there are ``num_tokens``, if that is not too far.

    Validation documents of the other parts are neither trained nor validated on.

    Raises:
        DataError: as :meth:`LiveParts.load`.
    """
    found, num_found = [], 0
    for number in range(parts.num_parts):
        enough = num_tokens if number < MOST_VALIDATION_PARTS else min(num_tokens, sequence_length + 1)
        if num_found >= enough:
            break
        parts.prefetch(range(number, min(number + _PARTS_AHEAD, parts.num_parts)))
        found.append(parts.load(number, "validation"))
        num_found += len(found[-1].tokens)
    if not found:
        return TokenSplit("validation", np.empty(0, dtype=np.uint16), parts.fingerprint)
    return join(found, parts.fingerprint, "validation")
