"""Which samples of a set have the content of a sample that is trained on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.data.read.corpus import FileSplit
from bigtrain.data.read.records import RecordSplit
from bigtrain.data.read.stream import SampleStream, StoredSamples

_ROWS_AT_ONCE = 1024
_MOST_TOKENS = 500_000_000  # more would be read for too long at every start


def seen_in_training(train: SampleStream, measured: SampleStream) -> tuple[list[int], int] | None:
    """Return which samples of a set are trained on too, and how many it has; None where that cannot be compared."""
    trained = [part.split for part in train.components.values() if isinstance(part, StoredSamples)]
    own = [part.split for part in measured.components.values() if isinstance(part, StoredSamples)]
    kind = type(own[0]) if own else None
    if len(trained) < len(train.components) or kind not in (FileSplit, RecordSplit):
        return None
    same = [split for split in trained if type(split) is kind and not split.is_remote]
    if (
        len(same) < len(trained)
        or sum(int(split.shard_tokens.sum()) for split in same if isinstance(split, FileSplit)) > _MOST_TOKENS
    ):
        return None
    lengths = np.unique(np.concatenate([_lengths(split) for split in own]))
    found = [content for split in own for content in _contents(split, lengths)]
    common = set(found) & {content for split in same for content in _contents(split, lengths)}
    return [number for number, content in enumerate(found) if content in common], len(found)


def _lengths(split: Any) -> NDArray[np.int64]:
    """Return the length of each document; records have none."""
    if isinstance(split, RecordSplit):
        return np.empty(0, dtype=np.int64)
    return np.concatenate(
        [np.empty(0, np.int64), *(np.diff(split.documents(i)) for i in range(len(split.shard_tokens)))]
    )


def _contents(split: Any, lengths: NDArray[np.int64]) -> Iterator[int]:
    """Yield a hash of each record, or of each document that has one of these lengths, which are few to read."""
    if isinstance(split, RecordSplit):
        for first in range(0, len(split.rows), _ROWS_AT_ONCE):
            yield from split.records.content_hashes(split.rows[first : first + _ROWS_AT_ONCE])
        return
    for shard in range(len(split.shard_tokens)):
        offsets, tokens = split.documents(shard), split.read(shard)
        for document in np.flatnonzero(np.isin(np.diff(offsets), lengths)).tolist():
            yield xxhash.xxh3_64_intdigest(tokens[offsets[document] : offsets[document + 1]].tobytes())
