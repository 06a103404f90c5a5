"""Samples that are documents: one each, with what it is labelled with, or as a source and a target."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig, Packing
from bigtrain.data.read.batch import Samples
from bigtrain.data.read.corpus import FileSplit
from bigtrain.data.read.index import LabelKind
from bigtrain.data.read.packing import SHARDS_KEPT, ShardedSamples
from bigtrain.tasks.base import IGNORE_INDEX


def document_samples(split: FileSplit, data: DataConfig) -> "DocumentSamples":
    """Return the documents of a split as samples: pairs where part of each counts, or two parts."""
    if data.packing is Packing.preferences:
        return (RatedSamples if split.labels else PreferenceSamples)(split, data.sequence_length)
    if split.has_answers:
        return PairSamples(split, data.source_length or data.sequence_length, data.sequence_length)
    return DocumentSamples(split, data.sequence_length)


class DocumentSamples(ShardedSamples):
    """``tokens`` of a document, filled up with 0, their number ``lengths``, and ``labels`` or ``values``.

    Of a document that is longer than a sample, the first tokens are taken, and its last one, with which tokenizers end
    it. Documents of tokenizers that add no token of their own begin with an end-of-text token, as they do in a row of
    documents, so that there is a place which stands for the whole.
    """

    is_full = False
    _split: FileSplit

    def __init__(self, split: FileSplit, sequence_length: int) -> None:
        super().__init__(split, sequence_length, document_mask=False)
        self.shard_samples = split.shard_documents
        self._kind = split.labels.kind if split.labels else None
        self._labels = lru_cache(maxsize=SHARDS_KEPT)(split.read_labels)
        self._keeps_end = split.adds_special  # of what is cut

    def documents(self, sample_id: int) -> NDArray[np.int64]:
        """Return the number of a sample's document within its shard, int64 ``(1,)``."""
        return self._locate(np.array([sample_id]))[1]

    def num_cut(self) -> int:
        return sum(int(self._are_cut(shard).sum()) for shard in range(len(self.shard_samples)))

    def _are_cut(self, shard: int) -> NDArray[np.bool_]:
        begins, ends = self._ranges(shard, slice(None))
        return ends - begins > self.sequence_length

    def _ranges(self, shard: int, local: NDArray[np.int64] | slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where documents begin and end among the tokens of a shard, without the end-of-text token added to each.

        Where that token opens them instead, they begin one token before themselves: with the one of the document
        before.
        """
        offsets = np.asarray(self._documents(shard), dtype=np.int64)
        begins, ends = offsets[:-1][local], offsets[1:][local] - 1
        return (begins, ends) if self._split.adds_special else (begins - 1, ends)

    def _gather_shard(self, shard: int, local: NDArray[np.int64]) -> Samples:
        begins, ends = self._ranges(shard, local)
        tokens = self._split.read(shard)
        samples = Samples(
            tokens=self._rows(tokens, begins, ends, self.sequence_length),
            lengths=np.minimum(ends - begins, self.sequence_length),
        )
        if self._kind is None:
            return samples
        labels = self._nothing(shard) if shard in self._split.skipped else self._labels(shard)
        if self._kind is LabelKind.per_token:
            samples["labels"] = self._rows(labels, begins, ends, self.sequence_length, filling=IGNORE_INDEX)
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
        several = (self._split.labels.size,) if self._kind is LabelKind.several else ()
        return np.full((num_rows[shard], *several), IGNORE_INDEX, dtype=np.int32)

    def _rows(
        self, row: NDArray[Any], begins: NDArray, ends: NDArray, length: int, *, filling: int = 0
    ) -> NDArray[np.int64]:
        """Return ranges of a shard, cut and filled up to ``length``, int64 ``(N, length)``."""
        rows = self._pool.take(len(begins), length)
        rows[:] = filling
        for place, begin, end in zip(rows, begins.tolist(), ends.tolist(), strict=True):
            num_taken = max(min(end - begin, length), 0)
            # -1 is the end-of-text token of the last document.
            place[:num_taken] = row[np.arange(begin, begin + num_taken)]
            if num_taken < end - begin and self._keeps_end:
                place[num_taken - 1] = row[end - 1]
        return rows


class PairSamples(DocumentSamples):
    """``source``, filled up with 0, and its number of tokens ``source_lengths``; ``tokens`` and ``targets`` of a decoder.

    A source is what does not count of a document, the target what does, with the token that ends it. The decoder reads
    that token first, then the target but for its end. What is longer than S or T is cut as in :class:`DocumentSamples`.
    """

    def __init__(self, split: FileSplit, source_length: int, sequence_length: int) -> None:
        super().__init__(split, sequence_length)
        self._source_length = source_length
        self._begins_of_targets = lru_cache(maxsize=SHARDS_KEPT)(self._find_targets)

    def _are_cut(self, shard: int) -> NDArray[np.bool_]:
        begins, middles, ends = self._parts(shard, slice(None))
        return (middles - begins > self._source_length) | (ends - middles > self.sequence_length)

    def _find_targets(self, shard: int) -> NDArray[np.int64]:
        offsets = np.asarray(self._documents(shard), dtype=np.int64)
        counted = np.append(np.flatnonzero(self._split.counted(shard)), offsets[-1])
        return np.minimum(counted[np.searchsorted(counted, offsets[:-1])], offsets[1:])

    def _parts(self, shard: int, local: NDArray[np.int64] | slice) -> tuple[NDArray, NDArray, NDArray]:
        """Return where sources begin, targets begin and targets end."""
        offsets = np.asarray(self._documents(shard), dtype=np.int64)
        return offsets[:-1][local], self._begins_of_targets(shard)[local], offsets[1:][local] - self._split.adds_special

    def _gather_shard(self, shard: int, local: NDArray[np.int64]) -> Samples:
        row = self._split.read(shard)
        begins, middles, ends = self._parts(shard, local)
        targets = self._rows(row, middles, ends, self.sequence_length, filling=IGNORE_INDEX)
        tokens = self._pool.take(len(local), self.sequence_length)
        tokens[:, 0] = self._split.eos_id
        tokens[:, 1:] = np.where(targets[:, :-1] == IGNORE_INDEX, 0, targets[:, :-1])
        return Samples(
            source=self._rows(row, begins, middles, self._source_length),
            source_lengths=np.minimum(middles - begins, self._source_length),
            tokens=tokens,
            targets=targets,
        )

    def _any_counted(self, shard: int, counted: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return np.ones(int(self.shard_samples[shard]), dtype=np.bool_)


class PreferenceSamples(DocumentSamples):
    """``chosen`` and ``rejected`` tokens, int64 ``(N, T)``, filled up with 0, and the targets of their answers.

    A document is both, one behind the other: each a prompt, then an answer, which counts and goes on to its end. Of what
    is longer than a sample the first tokens are taken.
    """

    def __init__(self, split: FileSplit, sequence_length: int) -> None:
        super().__init__(split, sequence_length)
        self._bounds, self._keeps_end = lru_cache(maxsize=SHARDS_KEPT)(self._find_bounds), False

    def _find_bounds(self, shard: int) -> NDArray[np.int64]:
        """Return where both texts and their answers begin, and the end: int64 ``(documents, 5)``."""
        offsets = np.asarray(self._documents(shard), dtype=np.int64)
        begins, ends = offsets[:-1], offsets[1:] - 1
        is_counted = np.asarray(self._split.counted(shard)) != 0

        def first(value: bool, places: NDArray[np.int64]) -> NDArray[np.int64]:
            found = np.append(np.flatnonzero(is_counted == value), offsets[-1])
            return np.minimum(found[np.searchsorted(found, places)], ends)

        answer = first(True, begins)
        second = first(False, answer)
        return np.stack([begins, answer, second, first(True, second), ends], axis=1)

    def _are_cut(self, shard: int) -> NDArray[np.bool_]:
        begins, _, seconds, _, ends = self._bounds(shard).T
        return np.maximum(seconds - begins, ends - seconds) > self.sequence_length + 1

    def _gather_shard(self, shard: int, local: NDArray[np.int64]) -> Samples:
        row, bounds = self._split.read(shard), self._bounds(shard)[local]
        samples = Samples()
        for name, first in (("chosen", 0), ("rejected", 2)):
            begins, answers, ends = bounds[:, first : first + 3].T
            samples[name] = self._rows(row, begins, ends - 1, self.sequence_length)
            targets = self._rows(row, begins + 1, ends, self.sequence_length, filling=IGNORE_INDEX)
            in_prompt = np.arange(self.sequence_length) < (answers - begins - 1)[:, None]
            targets[in_prompt] = IGNORE_INDEX
            samples[f"{name}_targets"] = targets
        return samples

    def _any_counted(self, shard: int, counted: NDArray[np.uint8]) -> NDArray[np.bool_]:
        begins, answers, seconds, others, _ = self._bounds(shard).T
        room = self.sequence_length
        return (answers - begins <= room) & (others - seconds <= room) & (others > seconds)


class RatedSamples(PreferenceSamples):
    """As ``chosen`` a prompt with its answer, and as ``rejected`` with that of the next document of the shard.

    ``labels`` are 1 of good answers. What an answer becomes to another prompt says how far a model has moved at all.
    """

    def _gather_shard(self, shard: int, local: NDArray[np.int64]) -> Samples:
        row, (begins, answers, ends, *_) = self._split.read(shard), self._bounds(shard).T
        samples = Samples()
        for name, others in (("chosen", local), ("rejected", (local + 1) % len(begins))):
            texts = self._pool.take(len(local), self.sequence_length + 1)
            counted = np.zeros_like(texts, dtype=np.bool_)
            texts[:] = 0
            for place, is_counted, own, other in zip(texts, counted, local, others, strict=True):
                parts = row[begins[own] : answers[own]], row[answers[other] : ends[other]]
                text = np.concatenate(parts)[: len(place)]
                place[: len(text)] = text
                is_counted[len(parts[0]) : len(text)] = True
            samples[name] = texts[:, :-1]
            samples[f"{name}_targets"] = np.where(counted[:, 1:], texts[:, 1:], IGNORE_INDEX)
        is_good = np.array([name == "true" for name in self._split.labels.names])
        samples["labels"] = is_good[self._labels(shard)[local]].astype(np.int64)
        return samples

    def _any_counted(self, shard: int, counted: NDArray[np.uint8]) -> NDArray[np.bool_]:
        begins, answers, *_ = self._bounds(shard).T
        return answers - begins <= self.sequence_length
