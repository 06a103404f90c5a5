"""Text that is tokenised while training: parts of a source, each tokenised when it is wanted, in windows of samples.

The tokens of a part go through a cache on the node's disk: one process of the node makes them, in a helper process so
that the training does not feel it, and the others read them; what a kill interrupts is made again.

Consecutive parts, in an order drawn from seed and epoch, are a window: its documents are packed together and its
samples shuffled. All of that is a function of the source, the settings and the window's number alone. Only where in the
run a window begins depends on those before it: a checkpoint keeps that for the window in which it stands, with which a
resumed run begins.
"""

import os
import time
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.config import DataConfig, Packing
from bigtrain.data.order.cursor import WindowPlace
from bigtrain.data.order.permutation import derive_key, permute
from bigtrain.data.read.batch import ArrayPool, Samples, gather_groups
from bigtrain.data.read.cache import Ahead, NodeCache, cache_directory, explained
from bigtrain.data.read.corpus import TokenSplit
from bigtrain.data.read.dropped import Dropped, tell_bad_rows
from bigtrain.data.read.packing import PackedSplit, build_packing, no_samples, unanswered
from bigtrain.errors import DataError, counted
from bigtrain.log import get_logger

_PARTS_AHEAD = 4
MOST_VALIDATION_PARTS = 32  # unless they have not enough for one sample
_NUM_ATTEMPTS = 3
_POLL_SECONDS = 0.01
_DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
_INDEX_BITS = 28  # of a sample id: its number in the window; above them the window's


class PartTokens(NamedTuple):
    tokens: NDArray[np.unsignedinteger]  # all documents on end, each with its end-of-text token, ``(n,)``
    lengths: NDArray[np.int64]  # tokens of each document
    counted: NDArray[np.uint8] | None  # 1 where a token counts as a target, ``(n,)``; None when all do
    left_out: NDArray[np.int64]  # documents of the part, of both splits: empty, left out by a filter, repaired
    bad: Dropped  # what ``data.on_bad_row=skip`` has left out of the part
    num_bytes: int  # size of the part, both splits, in the cache


class LiveParts:
    def __init__(
        self,
        make: Callable[[int, str, NodeCache], None],
        config: DataConfig,
        *,
        identity: str,
        fingerprint: str,
        num_parts: int,
        window_parts: int,
        num_threads: int,
    ) -> None:
        """Tokenise nothing yet.

        ``make`` tokenises a part into the cache under a name with ``identity``; ``num_threads`` at a time, ahead of
        need. ``window_parts`` are shuffled together, unless configured otherwise.
        """
        self.fingerprint = fingerprint
        self.num_parts = num_parts
        self.window_parts = config.shuffle_window_shards or window_parts
        self.has_answers = config.content.has_answers
        self._source = make
        self._config = config
        self._identity = identity
        self._cache = NodeCache(cache_directory(config), int(config.cache_gib * 2**30))
        self._ahead = Ahead(self._make, num_threads)

    def load(self, number: int, split: str) -> PartTokens:
        """Return one split of a part; DataError as the source raises, or if the cache cannot be used."""
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
        """Refuse a window that does not fit into the cache: its parts would be tokenised again and again."""
        num_bytes = sum(part.num_bytes for part in window)
        if num_bytes > self._cache.max_bytes:
            raise DataError(
                f"data.cache_gib={self._config.cache_gib}: too small for the tokens of the {len(window)} parts of "
                f"{self._config.path} that are shuffled at a time; use at least {1.1 * num_bytes / 2**30:.2g} or a smaller "
                "data.shuffle_window_shards"
            )

    def _name(self, number: int) -> str:
        return f"{self._identity[:32]}-{number}"

    def _make(self, number: int) -> None:
        self._source(number, self._name(number), self._cache)


def _read(handle: BinaryIO, split: str) -> PartTokens:
    """Read what ``prepare/live.py`` has written; every array is compared with its checksum."""
    with np.load(handle, allow_pickle=False) as arrays:
        tokens, lengths, left_out = arrays[f"{split}.tokens"], arrays[f"{split}.lengths"], arrays["left_out"]
        bad = Dropped()
        if "bad" in arrays:
            bad = Dropped(documents=int(arrays["bad"]), examples=arrays["bad_examples"].tolist())
        num_bytes = os.fstat(handle.fileno()).st_size
        return PartTokens(tokens, lengths, arrays.get(f"{split}.counted"), left_out, bad, num_bytes)


def _join(parts: Sequence[PartTokens], fingerprint: str, split: str) -> TokenSplit:
    """Return parts as one shard, in which documents are packed together."""
    tokens = np.concatenate([part.tokens for part in parts])
    documents = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]).astype(np.int64)
    counted = None
    if any(part.counted is not None for part in parts):
        counts = [np.ones(len(p.tokens), np.uint8) if p.counted is None else p.counted for p in parts]
        counted = np.concatenate(counts)
    return TokenSplit(split, tokens, fingerprint, documents=[documents], counted=[counted])


def validation_split(parts: LiveParts, *, num_tokens: int, sequence_length: int) -> TokenSplit:
    """Return validation documents of the first parts, about ``num_tokens``; other parts' are left out everywhere."""
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
    return _join(found, parts.fingerprint, "validation")


class _Window(NamedTuple):
    packed: PackedSplit
    answered: NDArray[np.int64] | None  # samples with a target that counts, which are drawn; None: all
    num_samples: int
    content: str  # hash of the window's tokens and documents


class LiveSamples:
    """The samples of one source in the order of the run, without end."""

    num_ids = num_samples = 1 << 56  # sample ids are below this; how many samples there are is not known
    num_left_out = 0  # found while going

    def __init__(
        self,
        parts: LiveParts,
        data: DataConfig,
        *,
        seed: int,
        place: WindowPlace | None = None,
        keeps_all: bool = False,
    ) -> None:
        self.fingerprint = parts.fingerprint
        self.is_full = not parts.has_answers and data.packing is not Packing.best_fit
        self._parts = parts
        self._data = data
        self._seed = seed
        self._keeps_all = keeps_all
        self._windows_per_epoch = -(-parts.num_parts // parts.window_parts)
        self._first_window = place.window if place else 0
        self._begins = [place.first_sample if place else 0]  # first sample of each known window
        self._contents: dict[int, str] = {}
        self._window = lru_cache(maxsize=2)(self._open)
        self._pool = ArrayPool()

    def ids(self, first: int, count: int) -> NDArray[np.int64]:
        found = [np.empty(0, dtype=np.int64)]
        while count:
            number = self._find(first)
            begin, end = (self._begins[number - self._first_window + i] for i in (0, 1))
            taken = min(count, end - first)
            places = np.arange(first - begin, first - begin + taken)
            local = permute(places, end - begin, derive_key(self._seed, number))
            answered = self._window(number).answered
            found.append((number << _INDEX_BITS) + (local if answered is None else answered[local]))
            first, count = first + taken, count - taken
        return np.concatenate(found)

    def gather(self, sample_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Samples:
        numbers, local = sample_ids >> _INDEX_BITS, sample_ids & (1 << _INDEX_BITS) - 1
        return gather_groups(
            numbers, lambda number, rows: self._window(number).packed.gather(local[rows], positions[rows]), self._pool
        )

    def documents(self, sample_id: int) -> NDArray[np.int64]:
        return self._window(sample_id >> _INDEX_BITS).packed.documents(sample_id & (1 << _INDEX_BITS) - 1)

    def epochs(self, count: int) -> float:
        return (self._known(count - 1) + 1) / self._windows_per_epoch if count else 0.0

    def place(self, position: int) -> WindowPlace:
        number = self._known(position)
        first_sample = self._begins[number - self._first_window]
        return WindowPlace(window=number, first_sample=first_sample, content=self._content(number))

    def is_at(self, place: WindowPlace) -> bool:
        """Return whether the window of a checkpoint has the text that it had."""
        return self._content(place.window) == place.content

    def _content(self, number: int) -> str:
        return self._contents.get(number) or self._window(number).content

    def _find(self, position: int) -> int:
        """Return the number of the window that holds a position."""
        if position < self._begins[0]:  # before the launch began: all windows up to there are counted
            self._first_window, self._begins = 0, [0]
        while position >= self._begins[-1]:
            number = self._first_window + len(self._begins) - 1
            self._begins.append(self._begins[-1] + self._window(number).num_samples)
            epoch_ago = len(self._begins) - 1 - self._windows_per_epoch
            if epoch_ago >= 0 and self._begins[epoch_ago] == self._begins[-1]:
                raise DataError(no_samples("train", self._data.sequence_length, self.num_left_out))
        return self._known(position)

    def _known(self, position: int) -> int:
        """Return the same of a position that was drawn; unlike the above it may be called beside the loader's thread."""
        return self._first_window + max(bisect_right(self._begins, position) - 1, 0)

    def _open(self, number: int) -> _Window:
        """Tokenise what the window needs, as far as that has not been done, and pack it; begin with the next one."""
        chosen = self._numbers(number)
        self._parts.prefetch([*chosen, *self._numbers(number + 1)])
        parts = [self._parts.load(part, "train") for part in chosen]
        self._parts.require_room(parts)
        num_empty, num_filtered, num_repaired = np.sum([part.left_out for part in parts], axis=0).tolist()
        if num_empty or num_filtered or num_repaired:
            get_logger().info(
                f"window {number} of the text: {counted(num_empty, 'empty document')} and {num_filtered} by data.filters left out, "
                f"invalid UTF-8 in {num_repaired} replaced by U+FFFD"
            )
        bad = Dropped()
        for part in parts:
            bad.merge(part.bad)
        if bad.documents:
            get_logger().warning(f"window {number} of the text: {tell_bad_rows(bad)}")
        split = _join(parts, self.fingerprint, "train")
        data = self._data
        packed = build_packing(split, data.sequence_length, data.packing, data.document_mask, data.long_chats)
        digest = xxhash.xxh3_64(split.read(0).tobytes())
        digest.update(split.documents(0).tobytes())
        if (marks := split.counted(0)) is not None:
            digest.update(marks.tobytes())
        self._contents[number] = digest.hexdigest()
        answered, num_samples = None if self._keeps_all else packed.answered(), int(packed.shard_samples.sum())
        if answered is not None:
            self.num_left_out += num_samples - len(answered)
            get_logger().warning(unanswered(num_samples - len(answered), num_samples, f" in window {number}"))
            num_samples = len(answered)
        return _Window(packed, answered, num_samples, self._contents[number])

    def _numbers(self, number: int) -> list[int]:
        epoch, window = divmod(number, self._windows_per_epoch)
        first = window * self._parts.window_parts
        places = np.arange(first, min(first + self._parts.window_parts, self._parts.num_parts))
        return permute(places, self._parts.num_parts, derive_key(self._seed, epoch, -1)).tolist()
