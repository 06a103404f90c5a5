"""Second pass: the tokens of one part of the source, and shards put together from parts.

A part's tokens go into a directory ``parts/<number>``, in pieces that bound the memory, which is renamed when complete.
Once all parts are there, each shard is written and hashed by itself. What is finished survives a kill.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig
from bigtrain.config.convert import from_dict, to_dict
from bigtrain.data.prepare.encoder import (
    Coded,
    encode_both,
    encode_pieces,
    encode_tagged,
    encode_whole,
    fast_encoder,
    slow_encoder,
)
from bigtrain.data.prepare.files import Part
from bigtrain.data.prepare.records import NOT_FIRST, Document, number_labels
from bigtrain.data.prepare.survey import kept_documents, split_place
from bigtrain.data.read.index import SPLITS, LabelKind, LabelRecord, ShardRecord, record_file
from bigtrain.data.read.tokenizer import load_tokenizer, num_ids
from bigtrain.errors import DataError
from bigtrain.files import write_anew

PARTS_DIRECTORY = "parts"
LABELS_FILE = "{}.labels.npy"
SPLIT_BY = "content"  # decides the split of a document; part of a corpus's identity
_PIECE_TOKENS = 1 << 24


class Coding(NamedTuple):
    """How documents become tokens."""

    is_fast: bool  # whether the fast encoder is used, which has been compared with the slow one
    eos_id: int  # token that ends a document
    validation_bound: int  # documents whose text has a lower hash are for validation
    adds_special: bool = False  # see :class:`bigtrain.data.read.index.TokenizerRecord`
    reads_special: bool = False  # see there
    label_names: tuple[str, ...] = ()  # if each token has one


EncodeDocument = Callable[[Document], Coded]


def tokenise_part(
    config: DataConfig,
    part: Part,
    number: int,
    kept: NDArray[np.bool_],
    coding: Coding,
    labels: LabelRecord | None,
    work: Path,
) -> int:
    """Write the tokens and labels of a part's kept documents, unless that is done; return its text bytes."""
    directory = part_directory(work, number)
    if directory.exists():
        return int(np.load(directory / "text_bytes.npy").sum())
    unfinished = directory.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    encode, dtype = encoder(work, coding), token_dtype(num_ids(load_tokenizer(work)))
    buffers = {split: TokenBuffer(dtype) for split in SPLITS}
    for document in kept_documents(config, part, kept):
        split = split_of(document, coding)
        buffers[split].add(document, encode, coding.eos_id)
        if buffers[split].num_pending >= _PIECE_TOKENS:
            _append(unfinished, split, buffers[split])
    for split, buffer in buffers.items():
        _append(unfinished, split, buffer)
        np.save(unfinished / f"{split}.lengths.npy", np.array(buffer.lengths, dtype=np.int64))
        if labels is not None:
            np.save(unfinished / LABELS_FILE.format(split), buffer.take_labels(labels))
    text_bytes = [buffers[split].text_bytes for split in SPLITS]
    np.save(unfinished / "text_bytes.npy", np.array(text_bytes, dtype=np.int64))
    unfinished.rename(directory)
    return sum(text_bytes)


def part_directory(work: Path, number: int) -> Path:
    return work / PARTS_DIRECTORY / f"{number:06}"


@lru_cache(maxsize=8)
def encoder(work: Path, coding: Coding) -> EncodeDocument:
    """Return how the tokenizer in a directory encodes documents."""
    tokenizer = load_tokenizer(work, reads_special=coding.reads_special)
    if coding.label_names:
        return partial(encode_tagged, tokenizer, coding.label_names, adds_special=coding.adds_special)
    fast = fast_encoder(tokenizer, adds_special=coding.adds_special) if coding.is_fast else None
    encode = fast or slow_encoder(tokenizer, adds_special=coding.adds_special)
    return partial(encode_whole, tokenizer, encode) if coding.adds_special else partial(encode_pieces, encode)


def split_of(document: Document, coding: Coding) -> str:
    """Return the split of a document: equal texts are never on both sides."""
    return "validation" if split_place(document) < coding.validation_bound else "train"


class TokenBuffer:
    """Documents of one split of a part: all tokens concatenated, and the length of each document."""

    def __init__(self, dtype: np.dtype) -> None:
        self.text_bytes = 0
        self.lengths: list[int] = []
        self.num_pending = 0
        self._dtype = dtype
        self._tokens: list[NDArray] = []
        self._counted: list[NDArray[np.uint8]] = []
        self._labels: list[Any] = []

    def add(self, document: Document, encode: EncodeDocument, eos_id: int) -> None:
        tokens, counted, labels = encode(document) if document.second is None else encode_both(encode, document)
        self._tokens += [tokens.astype(self._dtype), np.array([eos_id], dtype=self._dtype)]
        if counted is not None:
            # The end of a pair's answer is a target; a template writes its own end.
            self._counted += [counted, np.array([not document.is_templated], dtype=np.uint8)]
        if labels is not None:
            self._labels += [labels, np.array([NOT_FIRST], dtype=np.int32)]
        elif document.labels is not None:
            self._labels.append(document.labels)
        self.lengths.append(len(tokens) + 1)
        self.text_bytes += len(document.text.encode())
        self.num_pending += self.lengths[-1]

    def take(self) -> tuple[NDArray, NDArray[np.uint8] | None]:
        """Return the tokens since the last call and, unless all count, which do."""
        tokens = np.concatenate([np.empty(0, self._dtype), *self._tokens])
        counted = np.concatenate(self._counted) if self._counted else None
        self._tokens, self._counted, self.num_pending = [], [], 0
        return tokens, counted

    def take_labels(self, record: LabelRecord) -> NDArray[Any]:
        if record.kind is LabelKind.per_token:
            return np.concatenate([np.empty(0, dtype=np.int32), *self._labels])
        return number_labels(record, self._labels)


def _append(directory: Path, split: str, buffer: TokenBuffer) -> None:
    for name, array in zip(("bin", "counted"), buffer.take(), strict=True):
        if array is not None and len(array):
            with open(directory / f"{split}.{name}", "ab") as file:
                array.tofile(file)


class ShardPlan(NamedTuple):
    name: str  # ``train-00000`` and so on
    lengths: NDArray[np.int64]  # tokens of each of its documents
    ranges: list[tuple[int, int, int]]  # (part, first token, end) in order


def plan_shards(split: str, lengths: list[NDArray[np.int64]], shard_tokens: int) -> list[ShardPlan]:
    """Cut the documents of all parts into shards; each ends with the document by which it has ``shard_tokens``."""
    ends = np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths]))
    part_ends = np.cumsum([int(part.sum()) for part in lengths])
    plans: list[ShardPlan] = []
    first = begin = 0
    while first < len(ends):
        last = min(int(np.searchsorted(ends, begin + shard_tokens)), len(ends) - 1)
        end = int(ends[last])
        ranges = []
        for part in range(int(np.searchsorted(part_ends, begin, side="right")), len(part_ends)):
            part_begin = int(part_ends[part - 1]) if part else 0
            if part_begin >= end:
                break
            ranges.append((part, max(begin, part_begin) - part_begin, min(end, int(part_ends[part])) - part_begin))
        document_lengths = np.diff(ends[first : last + 1], prepend=begin)
        plans.append(ShardPlan(f"{split}-{len(plans):05}", document_lengths, ranges))
        first, begin = last + 1, end
    return plans


def labels_of_shards(
    work: Path, plans: list[ShardPlan], split: str, num_parts: int, record: LabelRecord | None
) -> list[NDArray[Any] | None]:
    """Return the labels of each shard, if the corpus has labels."""
    if record is None:
        return [None] * len(plans)
    labels = np.concatenate([np.load(part_directory(work, i) / LABELS_FILE.format(split)) for i in range(num_parts)])
    sizes = [int(plan.lengths.sum()) if record.kind is LabelKind.per_token else len(plan.lengths) for plan in plans]
    return np.split(labels, np.cumsum(sizes)[:-1])[: len(plans)]


def write_shard(
    work: Path, plan: ShardPlan, vocab_size: int, has_counted: bool, labels: NDArray[Any] | None
) -> tuple[ShardRecord, NDArray]:
    """Write a shard, unless that is done; return its record and how often each token occurs."""
    done = work / PARTS_DIRECTORY / f"{plan.name}.json"
    counts_path = done.with_suffix(".counts.npy")
    if done.exists():
        return from_dict(ShardRecord, json.loads(done.read_text())), np.load(counts_path)
    split, dtype = plan.name.partition("-")[0], token_dtype(vocab_size)
    counts = np.zeros(vocab_size, dtype=np.int64)
    tokens_path, counted_path = work / f"{plan.name}.bin", work / f"{plan.name}.counted.bin"
    with open(tokens_path, "wb") as file:
        for tokens in _read_ranges(work, plan, f"{split}.bin", dtype):
            counts += np.bincount(tokens, minlength=vocab_size)
            tokens.tofile(file)
    if has_counted:
        with open(counted_path, "wb") as file:
            for counted in _read_ranges(work, plan, f"{split}.counted", np.dtype(np.uint8)):
                counted.tofile(file)
    documents_path = work / f"{plan.name}.documents.npy"
    np.save(documents_path, np.concatenate([[0], np.cumsum(plan.lengths)]).astype("<i8"))
    labels_path = work / f"{plan.name}.labels.npy"
    if labels is not None:
        np.save(labels_path, labels)
    record = ShardRecord(
        tokens=record_file(tokens_path),
        documents=record_file(documents_path),
        counted=record_file(counted_path) if has_counted else None,
        labels=None if labels is None else record_file(labels_path),
        num_tokens=int(plan.lengths.sum()),
        num_documents=len(plan.lengths),
    )
    np.save(counts_path, counts)
    write_anew(done, json.dumps(to_dict(record)))
    return record, counts


def _read_ranges(work: Path, plan: ShardPlan, name: str, dtype: np.dtype) -> Iterator[NDArray]:
    for part, start, stop in plan.ranges:
        for begin in range(start, stop, _PIECE_TOKENS):
            count = min(_PIECE_TOKENS, stop - begin)
            path = part_directory(work, part) / name
            found = np.fromfile(path, dtype=dtype, count=count, offset=begin * dtype.itemsize)
            if len(found) != count:  # after a crash of the machine
                raise DataError(f"{path}: shorter than it was written; remove {work} and prepare again")
            yield found


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest of uint16 and uint32, little endian, that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def cross_entropy_nats(counts: NDArray[np.int64], weights: NDArray[np.integer | np.floating]) -> float:
    """Return the cross-entropy in nats per token of ``counts`` ``(V,)`` under frequencies as ``weights`` ``(V,)``."""
    occurs = counts > 0
    log_probabilities = np.log(weights[occurs]) - np.log(weights.sum())
    return float(-(counts[occurs] * log_probabilities).sum() / counts.sum())
