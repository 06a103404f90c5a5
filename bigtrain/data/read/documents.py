"""Samples that are documents: one each, with what it is labelled with, or as a source and a target."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig
from bigtrain.data.read.batch import Samples
from bigtrain.data.read.corpus import FileSplit
from bigtrain.data.read.index import LabelKind
from bigtrain.data.read.packing import SHARDS_KEPT, ShardedSamples
from bigtrain.tasks.base import IGNORE_INDEX


def document_samples(split: FileSplit, data: DataConfig) -> "DocumentSamples | PairSamples":
    """Return the documents of a split as samples: pairs where part of each counts."""
    if split.has_answers:
        return PairSamples(split, data.source_length or data.sequence_length, data.sequence_length)
    return DocumentSamples(split, data.sequence_length)


class DocumentSamples(ShardedSamples):
    """``tokens`` of a document, filled up with 0, their number ``lengths``, and ``labels`` or ``values``.

    Of a document that is longer than a sample, the first tokens are taken, and its last one, with which tokenizers end it.
    Documents of tokenizers that add no token of their own begin with an end-of-text token, as they do in a row of
    documents, so that there is a place which stands for the whole.
    """

    is_full = False

    def __init__(self, split: FileSplit, sequence_length: int) -> None:
        super().__init__(split, sequence_length, document_mask=False)
        self.shard_samples = split.shard_documents
        self._kind = split.labels.kind if split.labels else None
        self._labels = lru_cache(maxsize=SHARDS_KEPT)(split.read_labels)

    def documents(self, sample_id: int) -> NDArray[np.int64]:
        """Return the document of each of the T places of a sample, numbered within its shard, -1 for padding."""
        (shard,), (local,) = self._locate(np.array([sample_id]))
        begins, ends = self._ranges(int(shard), np.array([local]))
        length = min(int(ends[0] - begins[0]), self.sequence_length)
        return np.where(np.arange(self.sequence_length) < length, local, -1)

    def num_cut(self) -> int:
        """Return how many documents are longer than a sample."""
        lengths = [np.diff(self._ranges(shard, slice(None)), axis=0) for shard in range(len(self.shard_samples))]
        return sum(int((part > self.sequence_length).sum()) for part in lengths)

    def _ranges(self, shard: int, local: NDArray[np.int64] | slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where documents begin and end among the tokens of a shard, without the end-of-text token added to each.

        Where that token opens them instead, they begin one token before themselves: with the one of the document before.
        """
        offsets = np.asarray(self._documents(shard), dtype=np.int64)
        begins, ends = offsets[:-1][local], offsets[1:][local] - 1
        return (begins, ends) if self._split.adds_special else (begins - 1, ends)

    def _gather_shard(self, shard: int, local: NDArray[np.int64]) -> Samples:
        begins, ends = self._ranges(shard, local)
        tokens = self._split.read(shard)
        lengths = np.minimum(ends - begins, self.sequence_length)
        samples = Samples(tokens=self._rows(tokens, begins, ends, filling=0), lengths=lengths)
        if self._kind is None:
            return samples
        labels = self._nothing(shard) if shard in self._split.skipped else self._labels(shard)
        if self._kind is LabelKind.per_token:
            samples["labels"] = self._rows(labels, begins, ends, filling=IGNORE_INDEX)
        elif self._kind is LabelKind.numbers:
            samples["values"] = labels[local].astype(np.float32)
        else:
            samples["labels"] = labels[local].astype(np.int64)
        return samples

    def _nothing(self, shard: int) -> NDArray[Any]:
        """Return labels that do not count, for a shard that is left out."""
        if self._kind is LabelKind.numbers:
            return np.full((self.shard_samples[shard], self._split.labels.size), np.nan, dtype=np.float32)
        num_rows = self._split.shard_tokens if self._kind is LabelKind.per_token else self.shard_samples
        return np.full(num_rows[shard], IGNORE_INDEX, dtype=np.int32)

    def _rows(self, row: NDArray[Any], begins: NDArray, ends: NDArray, *, filling: int) -> NDArray[np.int64]:
        """Return the ranges of a shard as rows, int64 ``(N, T)``."""
        rows = self._pool.take(len(begins), self.sequence_length)
        rows[:] = filling
        for place, begin, end in zip(rows, begins.tolist(), ends.tolist(), strict=True):
            length = min(end - begin, self.sequence_length)
            place[:length] = row[
                np.arange(begin, begin + length)
            ]  # -1 is the end-of-text token at the end of the shard
            if length < end - begin and self._split.adds_special:
                place[length - 1] = row[end - 1]
        return rows


class PairSamples(ShardedSamples):
    """``source``, filled up with 0, and its number of tokens ``source_lengths``; ``tokens`` and ``targets`` of a decoder.

    A source is what does not count of a document, the target what does, with the token that ends it. The decoder reads that
    token first, then the target but for its end. Of what is longer than S or T the first tokens are taken, and the last one
    where a tokenizer ends texts itself.
    """

    is_full = False

    def __init__(self, split: FileSplit, source_length: int, sequence_length: int) -> None:
        super().__init__(split, sequence_length, document_mask=False)
        self.shard_samples = split.shard_documents
        self._source_length = source_length
        self._begins_of_targets = lru_cache(maxsize=SHARDS_KEPT)(self._find_targets)

    def documents(self, sample_id: int) -> NDArray[np.int64]:
        """See :class:`DocumentSamples`; of the targets."""
        (shard,), (local,) = self._locate(np.array([sample_id]))
        samples = self._gather_shard(int(shard), np.array([local]))
        return np.where(samples["targets"][0] == IGNORE_INDEX, -1, local)

    def num_cut(self) -> int:
        """Return how many documents have a longer source or target than a sample."""
        num_cut = 0
        for shard in range(len(self.shard_samples)):
            begins, middles, ends = self._ranges(shard, slice(None))
            is_cut = (middles - begins > self._source_length) | (ends - middles > self.sequence_length)
            num_cut += int(is_cut.sum())
        return num_cut

    def _find_targets(self, shard: int) -> NDArray[np.int64]:
        """Return the first token of each document that counts."""
        offsets = np.asarray(self._documents(shard), dtype=np.int64)
        counted = np.append(np.flatnonzero(self._split.counted(shard)), offsets[-1])
        return np.minimum(counted[np.searchsorted(counted, offsets[:-1])], offsets[1:])

    def _ranges(self, shard: int, local: NDArray[np.int64] | slice) -> tuple[NDArray, NDArray, NDArray]:
        """Return where sources begin, targets begin and targets end."""
        offsets = np.asarray(self._documents(shard), dtype=np.int64)
        return offsets[:-1][local], self._begins_of_targets(shard)[local], offsets[1:][local] - self._split.adds_special

    def _gather_shard(self, shard: int, local: NDArray[np.int64]) -> Samples:
        row = self._split.read(shard)
        begins, middles, ends = self._ranges(shard, local)
        sources = self._pool.take(len(local), self._source_length)
        tokens, targets = (self._pool.take(len(local), self.sequence_length) for _ in range(2))
        lengths = np.minimum(middles - begins, self._source_length)
        for place, (begin, middle, end) in enumerate(
            zip(begins.tolist(), middles.tolist(), ends.tolist(), strict=True)
        ):
            self._put(sources[place], row[begin:middle], filling=0)
            self._put(targets[place], row[middle:end], filling=IGNORE_INDEX)
        tokens[:, 0] = self._split.eos_id
        tokens[:, 1:] = np.where(targets[:, :-1] == IGNORE_INDEX, 0, targets[:, :-1])
        return Samples(source=sources, source_lengths=lengths, tokens=tokens, targets=targets)

    def _put(self, place: NDArray[np.int64], tokens: NDArray[Any], *, filling: int) -> None:
        length = min(len(tokens), len(place))
        place[:length], place[length:] = tokens[:length], filling
        if length < len(tokens) and self._split.adds_special:
            place[length - 1] = tokens[-1]

    def _any_counted(self, shard: int, counted: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return np.ones(int(self.shard_samples[shard]), dtype=np.bool_)
