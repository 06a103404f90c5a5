"""``index.json`` of a prepared corpus: what its files hold, and how to know that they still do."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from bigtrain.config.convert import from_dict, to_dict
from bigtrain.errors import ConfigError, DataError, ShardError, as_data_error
from bigtrain.files import FileRecord, hash_content

INDEX_FILE = "index.json"
PUBLISHED_DIRECTORY = "tokenizer"  # beside the index of a corpus or run: the files that its tokenizer was published as
FORMAT = 2
SPLITS: Final = ("train", "validation")


class LabelKind(Enum):
    """What a corpus has beside its text."""

    one = "one"  # a label per document: int32 ``(num_documents,)``
    several = "several"  # any number of labels per document: uint8 ``(num_documents, size)``, 1 where it has the label
    numbers = "numbers"  # numbers per document: float32 ``(num_documents, size)``
    per_token = "per_token"  # a label per token: int32 ``(num_tokens,)``, -100 where a token has none


@dataclass(kw_only=True, slots=True)
class LabelRecord:
    kind: LabelKind  # what a document has
    size: int  # different labels, or numbers of a document
    names: list[str]  # of the labels, in the order of their numbers; none of numbers


@dataclass(kw_only=True, slots=True)
class ShardRecord:
    """Whole documents in three files that can be mapped into memory or read by ranges."""

    tokens: FileRecord  # ids, end-of-text after each document; little endian ``CorpusIndex.dtype``
    documents: FileRecord  # npy, int64 ``(num_documents + 1,)``: offset in tokens of each document, and the end
    counted: FileRecord | None = None  # uint8 per token, 1 where it counts as a target; none when all do
    labels: FileRecord | None = None  # npy: what :class:`LabelKind` says, if the corpus has labels
    num_tokens: int  # with end-of-text tokens
    num_documents: int

    @property
    def files(self) -> list[FileRecord]:
        return [file for file in (self.tokens, self.documents, self.counted, self.labels) if file]


@dataclass(kw_only=True, slots=True)
class SplitRecord:
    shards: list[ShardRecord]
    num_tokens: int  # with end-of-text tokens
    num_documents: int  # empty ones are left out
    num_text_bytes: int  # size of the text as UTF-8
    unigram_nats_per_token: float
    """Cross-entropy of the split under the training split's token frequencies (each count plus one): what a model
    that knows only frequencies reaches. For the training split this is its unigram entropy."""


@dataclass(kw_only=True, slots=True)
class TokenizerRecord:
    name: str  # ``bpe``, ``bytes``, or the Hugging Face name
    file: FileRecord  # ``tokenizer.json``
    vocab_size: int  # largest token id plus one
    eos_id: int  # token that ends a document
    facts: str | None = None  # JSON: what tells a published tokenizer from others
    adds_special: bool = False  # documents are encoded whole, with what the tokenizer writes around them
    reads_special: bool = False  # whether the name of a special token inside a text is that token; else it is text
    published: list[FileRecord] = field(default_factory=list)  # below ``tokenizer/``; none of ours


@dataclass(kw_only=True, slots=True)
class LiveRecord:
    """A source that is tokenised while training; its splits have no shards."""

    plan: FileRecord  # what was found out of the source
    fingerprint: str  # identity of its documents, their order and their tokens: 16 hexadecimal digits


@dataclass(kw_only=True, slots=True)
class CorpusIndex:
    """Content of ``index.json``."""

    format: int
    identity: str  # SHA-256 of the settings and the source fingerprint that the corpus was made from
    source: str  # where the text came from, for people
    source_fingerprint: str  # fingerprint of the source at that time
    dtype: str  # ``uint16`` or ``uint32``
    num_empty_documents: int  # documents that were left out because they are empty
    num_repaired_documents: int  # documents in which invalid UTF-8 was replaced by U+FFFD
    tokenizer: TokenizerRecord
    train: SplitRecord  # documents to train on
    validation: SplitRecord  # documents that are never trained on
    labels: LabelRecord | None = None  # what documents are labelled with
    live: LiveRecord | None = None  # where the tokens come from if they were not prepared

    @property
    def files(self) -> list[FileRecord]:
        """Every file of the corpus except the index."""
        return [*self._deciding_files, *self.tokenizer.published]

    @property
    def _deciding_files(self) -> list[FileRecord]:
        shards = [*self.train.shards, *self.validation.shards]
        others = [self.tokenizer.file, *([self.live.plan] if self.live else [])]
        return [*others, *(file for shard in shards for file in shard.files)]

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens, wherever and whenever they were prepared: 16 hexadecimal digits."""
        if self.live:
            return self.live.fingerprint
        return hashlib.sha256("".join(file.xxh3 for file in self._deciding_files).encode()).hexdigest()[:16]


def write_index(directory: Path, index: CorpusIndex) -> None:
    """Write ``index.json``; it is complete on disk only after the caller's fsync."""
    text = json.dumps(to_dict(index), indent=2) + "\n"
    Path(directory, INDEX_FILE).write_text(text, encoding="utf-8")


def read_index(directory: str | Path, *, check_sizes: bool = True) -> CorpusIndex:
    """Read ``index.json`` of a prepared corpus or a run, and check sizes of files; DataError if one is wrong."""
    path = Path(directory, INDEX_FILE)
    if not path.exists():
        raise DataError(f"{directory}: no prepared corpus here; make it with python launch/prepare.py")
    with as_data_error(path):
        index = parse_index(path.read_bytes(), str(directory))
    for file in index.files if check_sizes else ():
        check_file(Path(directory), file, content=False)
    return index


def parse_index(text: bytes, where: str) -> CorpusIndex:
    """Return the content of an ``index.json`` in a directory or URL; DataError if it is damaged or points elsewhere."""
    path = f"{where}/{INDEX_FILE}"
    with as_data_error(path, ValueError, advice=f"; {_way_out(where)}"):
        values = json.loads(text)
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{path}: format {found!r}, this version reads format {FORMAT}; prepare the corpus again (launch/prepare.py)"
        )
    try:
        index = from_dict(CorpusIndex, values)
    except ConfigError as error:
        raise DataError(f"{path}: damaged: {error}; {_way_out(where)}") from error
    _check_index(index, where)
    return index


def verify_hashes(directory: str | Path, index: CorpusIndex) -> None:
    """Compare every file of a corpus, several at a time, with its index; raises as :func:`check_file`."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda file: check_file(Path(directory), file), index.files):
            pass


def check_file(directory: Path, file: FileRecord, *, content: bool = True) -> None:
    """Compare size and ``content`` of a file with its record; ShardError if it is missing or has changed."""
    path = directory / file.name
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ShardError(f"{path}: missing ({error.strerror}); {_way_out(directory)}") from error
    if num_bytes != file.num_bytes:
        raise ShardError(f"{path}: {num_bytes} bytes, index.json says {file.num_bytes}; {_way_out(directory)}")
    if content and (found := record_file(path).xxh3) != file.xxh3:
        raise ShardError(
            f"{path}: the content is not what was prepared (XXH3 {found[:16]}..., index says {file.xxh3[:16]}...); "
            f"{_way_out(directory)}"
        )


def record_file(path: Path) -> FileRecord:
    """Return the record of a finished file; DataError if it cannot be read."""
    with as_data_error(path), open(path, "rb", buffering=0) as file:
        return FileRecord(name=path.name, num_bytes=path.stat().st_size, xxh3=hash_content(file))


def _check_index(index: CorpusIndex, where: str) -> None:
    for file in index.files:
        # An index that came from elsewhere must not point out of its own directory.
        name = file.name
        if file in index.tokenizer.published:
            name = name.removeprefix(f"{PUBLISHED_DIRECTORY}/").removeprefix("additional_chat_templates/")
        if name in ("", ".", "..", INDEX_FILE) or "\\" in name or Path(name).name != name:
            raise DataError(f"{where}/{INDEX_FILE}: {file.name!r} is not a plain file name")
    if problem := next(_contradictions(index), None):
        raise DataError(f"{where}/{INDEX_FILE}: {problem}; {_way_out(where)}")


def _contradictions(index: CorpusIndex) -> Iterator[str]:
    if index.dtype not in ("uint16", "uint32"):
        yield f"dtype {index.dtype!r}, expected uint16 or uint32"
    if len({file.name for file in index.files}) != len(index.files):
        yield "two files have one name"
    item_bytes = {"uint16": 2, "uint32": 4}[index.dtype]
    for name, split in (("train", index.train), ("validation", index.validation)):
        for shard in split.shards:
            for file, token_bytes in ((shard.tokens, item_bytes), (shard.counted, 1)):
                if file and shard.num_tokens * token_bytes != file.num_bytes:
                    yield f"{shard.num_tokens} tokens of {token_bytes} bytes are not {file.num_bytes} bytes of {file.name}"
        for what in ("num_tokens", "num_documents"):
            if sum(getattr(shard, what) for shard in split.shards) != getattr(split, what):
                yield f"{name}.{what} is not the sum over its shards"


def _way_out(where: str | Path) -> str:
    return f"remove {where} and prepare the corpus again"
