"""Prepared corpora, read through memory maps, and a synthetic stand-in that needs no files.

Documents lie on end and are cut every T tokens: sample ``i`` holds the tokens
``[i * T, i * T + T]``, T inputs and, shifted by one, T targets, so every token but the first is a
target exactly once per epoch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bigtrain.data.index import CorpusIndex, SplitRecord, read_index, verify_file
from bigtrain.data.order import derive_key, mix64
from bigtrain.errors import DataError

SplitName = Literal["train", "validation"]


class Split(Protocol):
    """Samples with an id each; what the loader needs to know of data."""

    name: str
    fingerprint: str

    def num_samples(self, sequence_length: int) -> int:
        """Return how many samples of ``sequence_length`` tokens there are."""

    def gather(self, sample_ids: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
        """Return tokens, int64 ``(N, sequence_length + 1)``, of the samples ``(N,)``."""

    def counted_targets(self, sample_ids: NDArray[np.int64], sequence_length: int) -> NDArray[np.bool_] | None:
        """Return which targets count, bool ``(N, sequence_length)``, or None when all do."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A prepared corpus on disk."""

    directory: Path
    """Directory that holds ``index.json``."""
    index: CorpusIndex
    """What is in it."""

    @classmethod
    def open(cls, directory: str | Path, *, vocab_size: int) -> "Corpus":
        """Open a prepared corpus for a model with ``vocab_size`` embeddings.

        Sizes of all files and the hash of the tokenizer are compared with the index; the tokens are
        not read (:func:`bigtrain.data.index.verify_hashes` does that).

        Raises:
            DataError: a file is missing or damaged, or the tokenizer has more ids than the model.
        """
        index = read_index(directory)
        verify_file(Path(directory), index.tokenizer.file)
        if index.tokenizer.vocab_size > vocab_size:
            raise DataError(
                f"{directory}: the tokenizer {index.tokenizer.name} has {index.tokenizer.vocab_size} ids, but "
                f"model.vocab_size={vocab_size}; set model.vocab_size={index.tokenizer.vocab_size} or more, or choose "
                "a smaller tokenizer (data.tokenizer, data.tokenizer_vocab_size)"
            )
        return cls(Path(directory), index)

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens, wherever they lie: 16 hexadecimal digits."""
        return self.index.fingerprint

    def split(self, name: SplitName) -> "TokenSplit":
        """Map one split into memory."""
        record: SplitRecord = getattr(self.index, name)
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        tokens = np.memmap(self.directory / record.tokens.name, dtype=dtype, mode="r")
        return TokenSplit(name, tokens, self.fingerprint)


class TokenSplit:
    """One split of a corpus: a long row of tokens."""

    def __init__(self, name: str, tokens: NDArray[np.integer], fingerprint: str) -> None:
        """Wrap ``tokens``, 1-D, unsigned, usually a memory map, of the corpus with this ``fingerprint``."""
        self.name = name
        self.fingerprint = fingerprint
        self._tokens = tokens.view(np.ndarray)

    def num_samples(self, sequence_length: int) -> int:
        """Return how many samples of ``sequence_length`` tokens fit; a rest is left over."""
        return max(len(self._tokens) - 1, 0) // sequence_length

    def gather(self, sample_ids: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
        """Return the tokens of samples.

        Args:
            sample_ids: int64 ``(N,)`` in ``[0, num_samples)``.
            sequence_length: T.

        Returns:
            int64 ``(N, T + 1)``.
        """
        # Indexing rows of a strided view copies each window in one piece.
        windows = sliding_window_view(self._tokens, sequence_length + 1)[::sequence_length]
        return windows[sample_ids].astype(np.int64)

    def counted_targets(self, sample_ids: NDArray[np.int64], sequence_length: int) -> None:
        """Return None: every target counts."""


@dataclass(frozen=True, slots=True)
class SyntheticSplit:
    """Samples computed from their ids: some tokens are more frequent than others, nothing else can be learnt."""

    name: str
    """Different names hold different samples."""
    vocab_size: int
    """Tokens lie in ``[0, vocab_size)``."""
    is_ragged: bool
    """Count only the first targets of each sample, a different number in each (at least one)."""

    @property
    def fingerprint(self) -> str:
        """What the samples are a function of, besides their ids."""
        return f"synthetic-{self.vocab_size}{'-ragged' * self.is_ragged}"

    def num_samples(self, sequence_length: int) -> int:
        """Return 2**20, whatever the length."""
        return 1 << 20

    def gather(self, sample_ids: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
        """Return int64 ``(N, sequence_length + 1)``; neighbouring samples do not overlap."""
        columns = np.arange(sequence_length + 1, dtype=np.uint64)
        hashes = mix64(self._hash(sample_ids)[:, None] + columns)
        uniform = (hashes >> np.uint64(11)) * 2.0**-53
        return (self.vocab_size * uniform * uniform * uniform).astype(np.int64)

    def counted_targets(self, sample_ids: NDArray[np.int64], sequence_length: int) -> NDArray[np.bool_] | None:
        """Return bool ``(N, sequence_length)`` when ragged, else None."""
        if not self.is_ragged:
            return None
        num_counted = 1 + self._hash(~sample_ids) % np.uint64(sequence_length)
        return np.arange(sequence_length, dtype=np.uint64) < num_counted[:, None]

    def _hash(self, values: NDArray[np.int64]) -> NDArray[np.uint64]:
        key = derive_key(*self.name.encode())
        return mix64(mix64(values.astype(np.uint64)) ^ np.uint64(key))
