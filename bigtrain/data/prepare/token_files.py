"""``data=tokens``: ids that other programs have written, read where they lie.

A corpus of ours is made whose shards are links to their files, with where the documents begin beside them: the order,
packing, mixtures, digests and checks are then those of any corpus. Files with a header, with another width of ids, or of
rows are written anew.

| file | written by |
| --- | --- |
| ``x.bin`` beside ``x.idx`` | Megatron-LM (``megatron/core/datasets/indexed_dataset.py``) |
| ``x.ds``, ``x.ds.index`` | datatrove's ``DocumentTokenizer``: ends of documents as uint64 |
| ``x.bin`` | nanoGPT, modded-nanogpt and llm.c (with a header of 256 int32), OLMo; uint16 or uint32 |
| ``x.npy`` | numpy, one row of ids |
| ``x.parquet`` | any program: a column ``input_ids`` with a list of ids per document |
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig
from bigtrain.data.prepare.files import SourceFile, find_files
from bigtrain.data.prepare.tokenise import cross_entropy_nats
from bigtrain.data.read.index import CorpusIndex, ShardRecord, SplitRecord, record_file
from bigtrain.errors import DataError, as_data_error

COLUMN = "input_ids"
_OF_MEGATRON, _OF_LLM_C = b"MMIDIDX\x00\x00", 20240520  # how their files begin
_MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_LLM_C_BYTES = 1024
_HELD_OUT = re.compile(r"(^|[-_.])(validation|valid|val)([-_.]|$)", re.IGNORECASE)
_CHUNK = 1 << 24  # ids that are looked at together


class TokenFile(NamedTuple):
    """The ids of one file."""

    ids: NDArray  # (n,), mapped where the file allows it
    ends: NDArray[np.int64] | None  # of documents; None where the file does not say
    is_plain: bool = False  # nothing else is in the file


def fill_tokens(work: Path, config: DataConfig, index: CorpusIndex, advance: Callable[[int], None]) -> None:
    """Write the shards of both splits, and complete ``index``; files named as ``val_0.bin`` are for validation.

    DataError: a file is none of these, or holds ids that the tokenizer has not.
    """
    files = [(file, open_tokens(file.path, index.tokenizer.vocab_size)) for file in find_files(config).files]
    width = max(2 if tokens.ids.itemsize <= 2 else 4 for _, tokens in files)
    dtype = np.dtype("<u2" if width == 2 and index.tokenizer.vocab_size <= 1 << 16 else "<u4")
    index.dtype = dtype.name
    split_counts = {}
    for split in ("train", "validation"):
        chosen = [pair for pair in files if bool(_HELD_OUT.search(Path(pair[0].name).stem)) == (split == "validation")]
        counts, shards = np.zeros(index.tokenizer.vocab_size, dtype=np.int64), list[ShardRecord]()
        for number, (file, tokens) in enumerate(chosen):
            shards.append(_write(work, f"{split}-{number:05}", file, tokens, dtype, index, counts))
            advance(file.path.stat().st_size)
        split_counts[split] = counts
        num_tokens, num_documents = (sum(getattr(s, what) for s in shards) for what in ("num_tokens", "num_documents"))
        record = SplitRecord(
            shards=shards,
            num_tokens=num_tokens,
            num_documents=num_documents,
            num_text_bytes=0,  # not known
            unigram_nats_per_token=0.0,
        )
        setattr(index, split, record)
    if not index.train.num_tokens:
        raise DataError(f"data.path={config.path}: no ids to train on; files named as val_0.bin are for validation")
    train = split_counts["train"]
    index.train.unigram_nats_per_token = cross_entropy_nats(train, train)
    if index.validation.num_tokens:
        index.validation.unigram_nats_per_token = cross_entropy_nats(split_counts["validation"], train + 1)


def open_tokens(path: Path, vocab_size: int) -> TokenFile:
    """Return the ids of a file, of which those without a description are as wide as ``vocab_size`` needs."""
    with as_data_error(path, OSError, ValueError):
        if path.suffix == ".parquet":
            return _open_rows(path)
        if path.suffix == ".npy":
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise DataError(f"{path}: an array {ids.shape} of {ids.dtype}; a row of whole numbers is read")
            return TokenFile(ids, None)
        if path.suffix == ".bin" and (index := path.with_suffix(".idx")).is_file():
            return _open_megatron(path, index)
        if path.suffix == ".bin" and np.fromfile(path, "<i4", count=1).tolist() == [_OF_LLM_C]:
            return TokenFile(np.memmap(path, "<u2", mode="r", offset=_LLM_C_BYTES), None)
        if path.suffix not in (".bin", ".ds"):
            raise DataError(
                f"{path}: no file of ids by its name (.bin, .ds, .npy, .parquet); text is read by data=jsonl, text"
            )
        dtype, ends = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4"), None
        if (index := Path(f"{path}.index")).is_file():
            ends = np.fromfile(index, "<u8").astype(np.int64)
            of_ends = path.stat().st_size / max(int(ends[-1]) if len(ends) else 0, 1)
            if of_ends not in (2, 4):
                raise DataError(
                    f"{path}: {path.stat().st_size} bytes are not the ids that {index.name} counts; copy both again"
                )
            dtype = np.dtype("<u2" if of_ends == 2 else "<u4")
        if path.stat().st_size % dtype.itemsize:
            raise DataError(f"{path}: {path.stat().st_size} bytes are no whole number of ids of {dtype.itemsize} bytes")
        return TokenFile(np.memmap(path, dtype, mode="r"), ends, is_plain=True)


def _open_megatron(path: Path, index: Path) -> TokenFile:
    """Read Megatron-LM's index: magic, version, type, numbers of sequences and documents, lengths, pointers, documents."""
    head = index.read_bytes()[:34]
    if not head.startswith(_OF_MEGATRON):
        raise DataError(f"{index}: is no index of Megatron-LM; rename it if {path.name} is something else")
    num_sequences, num_documents = (int(number) for number in np.frombuffer(head, "<u8", count=2, offset=18))
    dtype = np.dtype(_MEGATRON_TYPES.get(head[17], "<f4"))
    if dtype.kind not in "iu":
        raise DataError(f"{index}: describes numbers of type {head[17]}, which are no ids")
    lengths = np.fromfile(index, "<i4", count=num_sequences, offset=34).astype(np.int64)
    first = np.fromfile(index, "<i8", count=num_documents, offset=34 + 12 * num_sequences)
    if lengths.sum() * dtype.itemsize != path.stat().st_size:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes are not the {lengths.sum()} ids of {index.name}; copy both again"
        )
    ends = np.concatenate([[0], np.cumsum(lengths)])[first[1:]]
    return TokenFile(np.memmap(path, dtype, mode="r"), ends, is_plain=True)


def _open_rows(path: Path) -> TokenFile:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    if COLUMN not in schema.names:
        raise DataError(f"{path}: has no column {COLUMN}, but {', '.join(schema.names)}; of text use data=parquet")
    column = pyarrow.parquet.read_table(path, columns=[COLUMN]).column(0).combine_chunks()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return TokenFile(column.flatten().to_numpy(zero_copy_only=False), np.cumsum(lengths))


def _write(
    work: Path,
    name: str,
    file: SourceFile,
    tokens: TokenFile,
    dtype: np.dtype,
    index: CorpusIndex,
    counts: NDArray[np.int64],
) -> ShardRecord:
    """Write or link one shard, and add to ``counts`` ``(V,)`` how often each id occurs."""
    path = work / f"{name}.bin"
    path.unlink(missing_ok=True)
    found = [np.empty(0, dtype=np.int64)]
    is_linked = tokens.is_plain and tokens.ids.itemsize == dtype.itemsize
    with open(os.devnull if is_linked else path, "wb") as out:
        for start, chunk in _chunks(tokens.ids):
            if len(chunk) and not 0 <= int(chunk.min()) <= int(chunk.max()) < len(counts):
                wrong = int(chunk.max()) if chunk.max() >= len(counts) else int(chunk.min())
                raise DataError(
                    f"{file.path}: holds the id {wrong}, but the tokenizer {index.tokenizer.name} has {len(counts)} ids; "
                    "name the one by which it was made as data.tokenizer"
                )
            counts += np.bincount(chunk, minlength=len(counts))
            found.append(start + 1 + np.flatnonzero(chunk == index.tokenizer.eos_id))
            if not is_linked:
                chunk.astype(dtype).tofile(out)
    if is_linked:
        path.symlink_to(file.path.absolute())
    ends = np.concatenate(found) if tokens.ends is None else tokens.ends
    ends = np.unique(np.append(ends[ends > 0], len(tokens.ids)))  # without empty documents; the last may have no end
    np.save(work / f"{name}.documents.npy", np.concatenate([[0], ends]).astype(np.int64))
    return ShardRecord(
        tokens=record_file(path),
        documents=record_file(work / f"{name}.documents.npy"),
        num_tokens=len(tokens.ids),
        num_documents=len(ends),
    )


def _chunks(ids: NDArray) -> Iterator[tuple[int, NDArray]]:
    return ((start, np.asarray(ids[start : start + _CHUNK])) for start in range(0, len(ids), _CHUNK))
