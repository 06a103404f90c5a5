"""Shards of tokens cut into samples of T tokens and T targets.

``concat``: documents lie on end and are cut every T tokens. Every token but a shard's first, and a rest shorter than a
sample at its end, is a target exactly once per epoch.

``best_fit``, by default where only answers count: no document is cut unless it is longer than T. Documents (and the pieces of longer ones) are put into
samples by best-fit decreasing (Johnson 1973; for language models Ding et al., "Fewer Truncations Improve Language
Modeling", 2024), shard by shard; every token is a target exactly once per epoch, and the rest is padding. Of chats that are longer than T
the beginning is kept, unless ``data.long_chats`` says otherwise.

Either way a place in a sample belongs to the document of its *target*: the end-of-text token before a document opens
it. With a document mask, positions count from 0 at each document, and the model attends within a document only.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bigtrain.config import LongChats, Packing
from bigtrain.data.order.permutation import derive_key, mix64
from bigtrain.data.read.batch import ArrayPool, Samples, gather_groups
from bigtrain.data.read.corpus import Split
from bigtrain.data.read.records import RecordSplit
from bigtrain.errors import DataError, counted
from bigtrain.tasks.base import IGNORE_INDEX

SHARDS_KEPT = 64  # shards whose documents are remembered


def build_packing(
    split: "AnySplit",
    sequence_length: int,
    packing: Packing | None,
    document_mask: bool,
    long_chats: LongChats = LongChats.cut,
) -> "PackedSplit":
    """Cut ``split``, unless it is samples already, into those of ``sequence_length`` tokens."""
    if isinstance(split, RecordSplit | SyntheticSamples):
        return split
    if packing_for(split, packing) is Packing.best_fit:
        return BestFitSamples(split, sequence_length, document_mask, long_chats)
    return ConcatSamples(split, sequence_length, document_mask)


def packing_for(split: Any, packing: Packing | None) -> Packing:
    """Return how a split is packed: by default so that answers stay with their prompts."""
    return packing or (Packing.best_fit if split.has_answers else Packing.concat)


def no_samples(split: str, sequence_length: int, num_unanswered: int, component: str = "") -> str:
    """Return what to say of a split without a single sample that has a target."""
    if num_unanswered:
        return (
            f"the {split} split{component} has no target that counts: in none of its {num_unanswered} samples of "
            f"{sequence_length} tokens is any of an answer, which long prompts leave behind; use more data, a larger "
            "data.sequence_length or data.packing=best_fit"
        )
    return (
        f"the {split} split{component} is shorter than one sample of {sequence_length} + 1 tokens; use more text, a "
        "larger share (data.validation_fraction) or a smaller data.sequence_length"
    )


def unanswered(num_left_out: int, num_samples: int, where: str = "") -> str:
    """Return what to say of samples that are left out."""
    return (
        f"{num_left_out} of {num_samples} training samples{where} have no target that counts (long prompts "
        "without their answers) and are left out; a larger data.sequence_length has fewer of them, as has "
        "data.packing=best_fit in place of concat"
    )


class ShardedSamples:
    """What both kinds of packing have in common: ids are looked up shard by shard."""

    shard_samples: NDArray[np.int64]  # samples in each shard, int64 ``(num_shards,)``
    is_full: bool  # whether every place of every sample is known to be a target that counts

    def __init__(self, split: Split, sequence_length: int, document_mask: bool) -> None:
        self._split = split
        # Read from a file every time, and needed for every batch.
        self._documents = lru_cache(maxsize=SHARDS_KEPT)(split.documents)
        self.sequence_length = sequence_length
        self._document_mask = document_mask
        self._pool = ArrayPool()

    def gather(self, sample_ids: NDArray[np.int64], positions: NDArray[np.int64] | None = None) -> Samples:
        """Return the samples with these ids, int64 ``(N,)``, which count through the shards."""
        shards, local = self._locate(sample_ids)
        if len(self.shard_samples) == 1:
            return self._gather_shard(0, local)
        if not len(sample_ids):
            none = self._new_samples(0)
            return Samples(none, positions=none["tokens"]) if self._document_mask else none
        return gather_groups(shards, lambda shard, rows: self._gather_shard(shard, local[rows]), self._pool)

    def answered(self) -> NDArray[np.int64] | None:
        """Return the samples with a target that counts, ascending; None when all are, or shards may turn out missing."""
        if not self._split.has_answers or self._split.may_skip:
            return None
        has_target = [self._has_target(shard) for shard in range(len(self.shard_samples))]
        found = np.flatnonzero(np.concatenate([np.empty(0, dtype=np.bool_), *has_target]))
        return None if len(found) == self.shard_samples.sum() else found

    def _has_target(self, shard: int) -> NDArray[np.bool_]:
        counted, num_samples = self._split.counted(shard), int(self.shard_samples[shard])
        if counted is None or not num_samples:
            return np.ones(num_samples, dtype=np.bool_)
        return self._any_counted(shard, counted)

    def _locate(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if len(self.shard_samples) == 1:
            return np.zeros_like(sample_ids), sample_ids
        ends = np.cumsum(self.shard_samples)
        if len(sample_ids) and not 0 <= int(sample_ids.min()) <= int(sample_ids.max()) < int(ends[-1]):
            raise IndexError(f"samples are numbered from 0 to {ends[-1] - 1}")
        shards = np.searchsorted(ends, sample_ids, side="right")
        return shards, sample_ids - (ends - self.shard_samples)[shards]

    def _new_samples(self, num_samples: int) -> Samples:
        shape = (num_samples, self.sequence_length)
        return Samples(tokens=self._pool.take(*shape), targets=self._pool.take(*shape))

    def _gather_shard(self, shard: int, local: NDArray[np.int64]) -> Samples:
        raise NotImplementedError

    def _any_counted(self, shard: int, counted: NDArray[np.uint8]) -> NDArray[np.bool_]:
        raise NotImplementedError


class ConcatSamples(ShardedSamples):
    """Samples that begin every T tokens."""

    def __init__(self, split: Split, sequence_length: int, document_mask: bool) -> None:
        super().__init__(split, sequence_length, document_mask)
        self.is_full = not (split.has_answers or split.may_skip)
        self.shard_samples = np.maximum(split.shard_tokens - 1, 0) // sequence_length

    def documents(self, sample_id: int) -> NDArray[np.int64]:
        """Return the document of each of the T places of a sample, numbered within its shard, -1 for padding."""
        (shard,), (local,) = self._locate(np.array([sample_id]))
        targets = local * self.sequence_length + 1 + np.arange(self.sequence_length)
        return np.searchsorted(self._documents(int(shard)), targets, side="right") - 1

    def _gather_shard(self, shard: int, local: NDArray[np.int64]) -> Samples:
        windows = _windows(self._split.read(shard), self.sequence_length)[local]
        samples = self._new_samples(len(local))
        samples["tokens"][:], samples["targets"][:] = windows[:, :-1], windows[:, 1:]
        counted = self._split.counted(shard)
        if counted is not None:
            is_counted = _windows(counted, self.sequence_length)[local][:, 1:]
            samples["targets"][is_counted == 0] = IGNORE_INDEX
        if self._document_mask:
            samples["positions"] = self._positions(shard, local)
        return samples

    def _any_counted(self, shard: int, counted: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return (_windows(counted, self.sequence_length)[:, 1:] != 0).any(axis=1)

    def _positions(self, shard: int, local: NDArray[np.int64]) -> NDArray[np.int64]:
        begins = self._documents(shard)
        is_begin = np.zeros((len(local), self.sequence_length), dtype=np.bool_)
        is_begin[:, 0] = True
        first_targets = local * self.sequence_length + 1
        low = np.searchsorted(begins, first_targets)
        high = np.searchsorted(begins, first_targets + self.sequence_length)
        for row, (first, begin, end) in enumerate(zip(first_targets, low, high, strict=True)):
            is_begin[row, begins[begin:end] - first] = True
        return positions_from_begins(is_begin)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the documents of a shard are packed; pieces are ordered by sample."""

    first_piece: NDArray[np.int64]  # of each sample, and the end, ``(num_samples + 1,)``
    starts: NDArray[np.int64]  # first token of each piece in the shard
    lengths: NDArray[np.int64]  # tokens of each piece, at most T
    openers: NDArray[np.int64]  # token before each piece; of a document's first piece its last token


class BestFitSamples(ShardedSamples):
    """Samples of whole documents."""

    is_full = False

    def __init__(self, split: Split, sequence_length: int, document_mask: bool, long_chats: LongChats) -> None:
        super().__init__(split, sequence_length, document_mask)
        self._long_chats = long_chats if split.has_answers else LongChats.split
        if long_chats is LongChats.refuse and (num_long := self.num_cut()):
            raise DataError(
                f"{counted(num_long, 'chat')} of more than data.sequence_length={sequence_length} tokens in the {split.name} "
                "split; use a larger one, or data.long_chats=cut, drop or split"
            )
        self._plan = lru_cache(maxsize=SHARDS_KEPT)(self._pack)
        num_shards = len(split.shard_tokens)
        counts = (len(self._plan(shard).first_piece) - 1 for shard in range(num_shards))
        self.shard_samples = np.fromiter(counts, dtype=np.int64, count=num_shards)

    def documents(self, sample_id: int) -> NDArray[np.int64]:
        (shard,), (local,) = self._locate(np.array([sample_id]))
        plan = self._plan(int(shard))
        pieces = slice(plan.first_piece[local], plan.first_piece[local + 1])
        numbers = np.searchsorted(self._documents(int(shard)), plan.starts[pieces], side="right") - 1
        places = np.repeat(numbers, plan.lengths[pieces])
        return np.concatenate([places, np.full(self.sequence_length - len(places), -1)])

    def num_cut(self) -> int:
        """Return how many chats are longer than a sample, and not split."""
        if self._long_chats is LongChats.split:
            return 0
        lengths = (np.diff(self._documents(shard)) for shard in range(len(self._split.shard_tokens)))
        return sum(int((of_shard > self.sequence_length).sum()) for of_shard in lengths)

    def _pack(self, shard: int) -> _Plan:
        offsets = np.asarray(self._documents(shard), dtype=np.int64)
        if self._long_chats is LongChats.split:
            starts, lengths, openers = cut_documents(offsets, self.sequence_length)
        else:
            lengths = np.diff(offsets)
            is_kept = lengths <= self.sequence_length if self._long_chats is LongChats.drop else lengths > 0
            starts, openers = offsets[:-1][is_kept], offsets[1:][is_kept] - 1
            lengths = np.minimum(lengths[is_kept], self.sequence_length)
        sample_of_piece = pack_best_fit(lengths, self.sequence_length)
        by_sample = np.argsort(sample_of_piece, kind="stable")
        num_samples = int(sample_of_piece.max(initial=-1)) + 1
        first_piece = np.searchsorted(sample_of_piece[by_sample], np.arange(num_samples + 1))
        return _Plan(first_piece, starts[by_sample], lengths[by_sample], openers[by_sample])

    def _gather_shard(self, shard: int, local: NDArray[np.int64]) -> Samples:
        plan, tokens, counted = self._plan(shard), self._split.read(shard), self._split.counted(shard)
        samples = self._new_samples(len(local))
        samples["tokens"][:] = 0
        samples["targets"][:] = IGNORE_INDEX
        is_begin = np.zeros((len(local), self.sequence_length), dtype=np.bool_)
        is_begin[:, 0] = True
        for row, sample in enumerate(local.tolist()):
            place = 0
            for piece in range(plan.first_piece[sample], plan.first_piece[sample + 1]):
                start, length = int(plan.starts[piece]), int(plan.lengths[piece])
                samples["tokens"][row, place] = tokens[plan.openers[piece]]
                samples["tokens"][row, place + 1 : place + length] = tokens[start : start + length - 1]
                samples["targets"][row, place : place + length] = tokens[start : start + length]
                if counted is not None:
                    ignored = self._counted(counted, start, length, int(plan.openers[piece]) + 1) == 0
                    samples["targets"][row, place : place + length][ignored] = IGNORE_INDEX
                is_begin[row, place] = True
                place += length
            if place < self.sequence_length:
                is_begin[row, place] = True
        if self._document_mask:
            samples["positions"] = positions_from_begins(is_begin)
        return samples

    def _counted(self, counted: NDArray[np.uint8], start: int, length: int, end: int) -> NDArray[np.uint8]:
        """Return what counts of a piece of a document that goes on to ``end``."""
        counts = counted[start : start + length]
        if self._long_chats is LongChats.split or start + length >= end or not counted[start + length]:
            return counts
        parted = np.append(-1, np.flatnonzero(counts == 0))[-1] + 1  # where the answer begins that is cut
        return np.where(np.arange(length) < parted, counts, 0) if counts[:parted].any() else counts

    def _any_counted(self, shard: int, counted: NDArray[np.uint8]) -> NDArray[np.bool_]:
        plan = self._plan(shard)
        before = np.concatenate([[0], np.cumsum(counted != 0)])
        in_piece = before[plan.starts + plan.lengths] - before[plan.starts]
        return np.add.reduceat(in_piece, plan.first_piece[:-1]) != 0


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticSamples:
    """Samples computed from their ids: some tokens are more frequent than others, nothing else can be learnt."""

    name: str  # different names hold different samples
    vocab_size: int  # tokens lie in ``[0, vocab_size)``
    sequence_length: int
    is_ragged: bool = False  # count only the first targets of each sample, a different number in each (at least one)
    document_mask: bool = False  # each sample is a document of its own
    is_remote = has_answers = may_skip = False
    shard_samples = np.array([1 << 20])

    @property
    def fingerprint(self) -> str:
        """What the samples are a function of, besides their ids."""
        return f"synthetic-{self.vocab_size}{'-ragged' * self.is_ragged}"

    @property
    def is_full(self) -> bool:
        return not self.is_ragged

    def gather(self, sample_ids: NDArray[np.int64], positions: NDArray[np.int64] | None = None) -> Samples:
        columns = np.arange(self.sequence_length + 1, dtype=np.uint64)
        uniform = (mix64(self._hash(sample_ids)[:, None] + columns) >> np.uint64(11)) * 2.0**-53
        windows = (self.vocab_size * uniform * uniform * uniform).astype(np.int64)
        samples = Samples(tokens=windows[:, :-1].copy(), targets=windows[:, 1:].copy())
        if self.is_ragged:
            num_counted = 1 + self._hash(~sample_ids) % np.uint64(self.sequence_length)
            samples["targets"][columns[:-1] >= num_counted[:, None]] = IGNORE_INDEX
        if self.document_mask:
            samples["positions"] = np.tile(np.arange(self.sequence_length), (len(sample_ids), 1))
        return samples

    def answered(self) -> None:
        """Every sample has a target that counts."""

    def documents(self, sample_id: int) -> NDArray[np.int64]:
        return np.zeros(self.sequence_length, dtype=np.int64)

    def _hash(self, values: NDArray[np.int64]) -> NDArray[np.uint64]:
        key = derive_key(*self.name.encode())
        return mix64(mix64(values.astype(np.uint64)) ^ np.uint64(key))


def _windows(row: NDArray, length: int) -> NDArray:
    """Return the windows of ``length + 1`` that begin every ``length``, without a copy.

    numpy's own function is as slow as to gather a batch, but takes rows that are not contiguous, as of a skipped shard.
    """
    if not row.flags.c_contiguous:
        return sliding_window_view(row, length + 1)[::length]
    shape = max(len(row) - 1, 0) // length, length + 1
    return np.ndarray(shape, row.dtype, row, strides=(length * row.itemsize, row.itemsize))


def positions_from_begins(is_begin: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return positions that count from 0 at every begin, bool ``(N, T)``, whose first column is True."""
    places = np.arange(is_begin.shape[1])
    return places - np.maximum.accumulate(np.where(is_begin, places, 0), axis=1)


def cut_documents(
    offsets: NDArray[np.int64], max_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut documents, given by ascending offsets ``(num_documents + 1,)``, that are longer than ``max_tokens``.

    Returns of each piece the first token, the number of tokens, and the token that stands before it; empty ones vanish.
    """
    document_tokens = np.diff(offsets)
    num_pieces = -(-document_tokens // max_tokens)
    document = np.repeat(np.arange(len(document_tokens)), num_pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    starts = offsets[document] + number * max_tokens
    lengths = np.minimum(offsets[document + 1] - starts, max_tokens)
    return starts, lengths, np.where(number == 0, offsets[document + 1] - 1, starts - 1)


def pack_best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Put pieces into bins: the longest first, each into the fullest bin that has room; return the bin of each, int64.

    Pieces of one length are placed together. Best-fit fills the bin with the least sufficient room until it has too
    little of it, because nothing between is fuller: a bin with room r takes ``r // length`` pieces at once.
    """
    bin_of_piece = np.empty(len(lengths), dtype=np.int64)
    bins_by_room: list[list[NDArray[np.int64]]] = [[] for _ in range(capacity + 1)]
    has_bins = np.zeros(capacity + 1, dtype=np.bool_)
    order = np.argsort(-lengths, kind="stable")
    num_bins = 0
    for pieces in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if len(order) else []:
        length = int(lengths[pieces[0]])
        for room in [*(np.flatnonzero(has_bins[length:]) + length).tolist(), capacity]:
            if not len(pieces):
                break
            num_wanted = -(-len(pieces) // (room // length))
            if has_bins[room]:
                bins, others = np.split(np.concatenate(bins_by_room[room]), [num_wanted])
                bins_by_room[room], has_bins[room] = [others], len(others) > 0
            else:
                bins = np.arange(num_bins, num_bins + num_wanted)
                num_bins += num_wanted
            places = np.repeat(np.arange(len(bins)), room // length)[: len(pieces)]
            bin_of_piece[pieces[: len(places)]] = bins[places]
            pieces = pieces[len(places) :]
            left = room - length * np.bincount(places)
            for new_room in np.unique(left).tolist():
                bins_by_room[new_room].append(bins[left == new_room])
                has_bins[new_room] = True
    return bin_of_piece


AnySplit = Split | SyntheticSamples | RecordSplit
PackedSplit = ConcatSamples | BestFitSamples | SyntheticSamples | RecordSplit
