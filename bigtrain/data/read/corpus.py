"""Prepared corpora. A split is a row of shards, each holding whole documents; samples never cross a shard."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig, DataSource, OnBad
from bigtrain.data.read.cache import cache_directory
from bigtrain.data.read.index import SPLITS, CorpusIndex, LabelKind, SplitRecord, check_file, parse_index, read_index
from bigtrain.data.read.remote import RemoteDirectory, ShardCache, is_url, read_remote_index
from bigtrain.errors import DataError, ShardError, as_data_error
from bigtrain.files import FileRecord
from bigtrain.log import get_logger

SplitName = Literal["train", "validation"]


class LocalFiles:
    """Files of a prepared corpus in a directory; those of a remote one are a :class:`ShardCache`."""

    max_bytes = None  # everything is at hand

    def __init__(self, directory: Path, *, verify: bool) -> None:
        self.directory = directory
        self._verify = verify

    def open(self, file: FileRecord) -> BinaryIO:
        """Return a file, open for reading; ShardError if it is missing or damaged."""
        path = self.directory / file.name
        check_file(self.directory, file, content=self._verify)
        with as_data_error(path):
            return open(path, "rb")


@dataclass(frozen=True, slots=True)
class Corpus:
    files: LocalFiles | ShardCache  # where it lies
    index: CorpusIndex  # what is in it
    skip_bad_shards: bool = False  # go on without shards that are missing or damaged for good

    @classmethod
    def open(cls, directory: str | Path, *, vocab_size: int, skip_bad_shards: bool = False) -> "Corpus":
        """Open a prepared corpus in a local directory for a model with ``vocab_size`` embeddings.

        The tokens are not read, but with ``skip_bad_shards`` hashed when a shard is first read. Raises as
        :func:`open_corpus`.
        """
        index = read_index(directory, check_sizes=not skip_bad_shards)
        check_file(Path(directory), index.tokenizer.file)
        require_vocab(index, vocab_size, str(directory))
        return cls(LocalFiles(Path(directory), verify=skip_bad_shards), index, skip_bad_shards)

    def split(self, name: SplitName) -> "FileSplit":
        return FileSplit(name, getattr(self.index, name), self)


def require_vocab(index: CorpusIndex, vocab_size: int, where: str) -> None:
    """Refuse a corpus whose tokenizer has more ids than the model has embeddings."""
    if index.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{where}: the tokenizer {index.tokenizer.name} has {index.tokenizer.vocab_size} ids, but "
            f"model.vocab_size={vocab_size}; set model.vocab_size={index.tokenizer.vocab_size} or more (with +model=hf, where "
            "config.json decides, take the model's own tokenizer instead: data.tokenizer=<model.name>), or choose a smaller "
            "tokenizer (data.tokenizer, data.tokenizer_vocab_size)"
        )


class TokenSplit:
    """Shards in memory; see :class:`FileSplit`."""

    is_remote = may_skip = False

    def __init__(
        self,
        name: str,
        tokens: NDArray[np.unsignedinteger] | Sequence[NDArray[np.unsignedinteger]],
        fingerprint: str,
        *,
        documents: Sequence[NDArray[np.int64]] | None = None,
        counted: Sequence[NDArray[np.uint8] | None] | None = None,
    ) -> None:
        """Wrap the tokens of one shard or a sequence of shards; by default each is one document, all counted."""
        self.name = name
        self.fingerprint = fingerprint
        self._shards = [tokens] if isinstance(tokens, np.ndarray) else list(tokens)
        self._documents = documents or [np.array([0, len(shard)]) for shard in self._shards]
        self._counted = counted or [None] * len(self._shards)
        self.shard_tokens = np.array([len(shard) for shard in self._shards], dtype=np.int64)
        self.has_answers = any(shard is not None for shard in self._counted)

    def documents(self, shard: int) -> NDArray[np.int64]:
        return self._documents[shard]

    def read(self, shard: int) -> NDArray[np.unsignedinteger]:
        return self._shards[shard]

    def counted(self, shard: int) -> NDArray[np.uint8] | None:
        return self._counted[shard]


class FileSplit:
    """Shards in files, as memory maps."""

    def __init__(self, name: str, record: SplitRecord, corpus: Corpus) -> None:
        self.name = name
        self.fingerprint = corpus.index.fingerprint
        self.is_remote = corpus.files.max_bytes is not None  # then :meth:`prefetch`, and keep to few shards at a time
        self.shard_tokens = np.array([shard.num_tokens for shard in record.shards], dtype=np.int64)
        self.shard_documents = np.array([shard.num_documents for shard in record.shards], dtype=np.int64)
        self.bytes_per_token = record.num_text_bytes / max(record.num_tokens, 1)  # of UTF-8
        self.labels = corpus.index.labels
        self.eos_id = corpus.index.tokenizer.eos_id
        self.adds_special = corpus.index.tokenizer.adds_special  # around documents, by the tokenizer
        self.skipped: set[int] = set()  # shards that could not be had so far and whose tokens do not count
        self._records = record.shards
        self._dtype = np.dtype(corpus.index.dtype).newbyteorder("<")
        self._files = corpus.files
        self.may_skip = corpus.skip_bad_shards  # whether shards that cannot be had are left out
        self.has_answers = any(shard.counted for shard in record.shards)  # some tokens do not count as targets
        self._open: dict[str, tuple[FileRecord, NDArray]] = {}

    @property
    def cache_shards(self) -> int | None:
        if self._files.max_bytes is None:
            return None
        largest = max(sum(file.num_bytes for file in shard.files) for shard in self._records)
        return self._files.max_bytes // max(largest, 1)

    def documents(self, shard: int) -> NDArray[np.int64]:
        """Return the offsets of a shard's documents and its end, int64 ``(num_documents + 1,)``; never skipped."""
        record = self._records[shard]
        offsets = self._load(record.documents, record.num_documents + 1)
        if offsets.ndim != 1 or offsets[-1] != record.num_tokens:
            raise DataError(f"{record.documents.name}: its documents are not those of the index")
        return offsets

    def read(self, shard: int) -> NDArray[np.unsignedinteger]:
        """Return the tokens of a shard, uint16 or uint32 ``(n,)``; do not keep it for longer than it is needed.

        ShardError if the shard is missing or damaged for good, unless such shards are skipped: then zeros.
        """
        return self._map(shard, self._records[shard].tokens, self._dtype)

    def counted(self, shard: int) -> NDArray[np.uint8] | None:
        """Return uint8 ``(n,)``, 1 where a token counts as a target; None when all do. None of a skipped shard does."""
        if self.may_skip:
            self.read(shard)
        file = self._records[shard].counted
        return self._map(shard, file, np.dtype(np.uint8)) if file or shard in self.skipped else None

    def read_labels(self, shard: int) -> NDArray[Any]:
        record = self._records[shard]
        per_token = self.labels.kind is LabelKind.per_token
        return self._load(record.labels, record.num_tokens if per_token else record.num_documents)

    def all_labels(self) -> NDArray[Any]:
        return np.concatenate([self.read_labels(shard) for shard in range(len(self._records))])

    def _load(self, file: FileRecord, num_rows: int) -> NDArray[Any]:
        with as_data_error(file.name, OSError, ValueError), self._files.open(file) as handle:
            array = np.load(handle, allow_pickle=False)
        if len(array) != num_rows:
            raise DataError(f"{file.name}: its {len(array)} rows are not those of the index")
        return array

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin to fetch ``shards``, if they are remote, in the background and in this order."""
        if isinstance(self._files, ShardCache):
            self._files.prefetch([file for shard in shards for file in self._records[shard].files])

    def _map(self, shard: int, file: FileRecord, dtype: np.dtype) -> NDArray:
        """Return a file as a memory map, or zeros if its shard is skipped."""
        nothing = np.broadcast_to(np.zeros((), dtype), self.shard_tokens[shard])
        if shard in self.skipped:
            return nothing
        if file.name in self._open:
            return self._open[file.name][1]
        try:
            with self._files.open(file) as handle:
                # An empty file cannot be mapped.
                mapped = np.memmap(handle, dtype, mode="r").view(np.ndarray) if file.num_bytes else np.empty(0, dtype)
        except ShardError as error:
            if not self.may_skip:
                raise ShardError(f"{error}; data.on_bad_shard=skip goes on without it") from error
            self.skipped.add(shard)
            num_tokens, so_far = self.shard_tokens[shard], len(self.skipped)
            get_logger().warning("%s; skipped: its %d tokens do not count (%d so far)", error, num_tokens, so_far)
            return nothing
        if isinstance(self._files, ShardCache):  # a map keeps the space of a file that has left the cache
            self._open = {name: entry for name, entry in self._open.items() if self._files.holds(entry[0])}
        self._open[file.name] = (file, mapped)
        return mapped


Split = TokenSplit | FileSplit


def open_corpus(config: DataConfig, *, vocab_size: int, directory: str | Path | None = None) -> Corpus:
    """Open what was prepared in ``directory``; DataError: missing, damaged, or of more ids than ``vocab_size``."""
    skips = config.on_bad_shard is OnBad.skip
    if config.source is DataSource.prepared and is_url(config.path):
        corpus = _open_remote(config, vocab_size, skips)
    else:
        corpus = Corpus.open(directory or config.path, vocab_size=vocab_size, skip_bad_shards=skips)
    name = corpus.index.tokenizer.name
    if config.tokenizer == "bytes" and name != "bytes":
        raise DataError(f"data.tokenizer=bytes, but {config.path} was prepared with {name}; leave data.tokenizer out")
    return corpus


def _open_remote(config: DataConfig, vocab_size: int, skip_bad_shards: bool) -> Corpus:
    remote = RemoteDirectory(config.path)
    # Not the copy that rank 0 has fetched, which may lie on the disk of another node.
    index = parse_index(read_remote_index(remote), remote.url)
    require_vocab(index, vocab_size, config.path)
    cache = ShardCache(remote, cache_directory(config), int(config.cache_gib * 2**30))
    corpus = Corpus(cache, index, skip_bad_shards)
    if min(corpus.split(name).cache_shards for name in SPLITS if getattr(corpus.index, name).shards) < 2:
        raise DataError(f"data.cache_gib={config.cache_gib}: too small for two shards of {config.path}")
    return corpus
