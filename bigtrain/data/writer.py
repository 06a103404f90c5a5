"""Writes the shards of one split and counts their tokens."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.index import ShardRecord, SplitRecord, record_file

_FLUSH_TOKENS = 1 << 20


class SplitWriter:
    """Appends documents to shards, each ``<name>-<number>.bin`` with ``.documents.npy`` beside it."""

    def __init__(self, directory: Path, name: str, vocab_size: int, eos_id: int, *, shard_tokens: int) -> None:
        """Write below ``directory``; a shard ends with the document by which it has ``shard_tokens``."""
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self._directory = directory
        self._name = name
        self._dtype = token_dtype(vocab_size)
        self._eos_id = eos_id
        self._shard_tokens = shard_tokens
        self._shards: list[ShardRecord] = []
        self._num_text_bytes = 0
        self._start_shard()

    def append(self, ids: list[int], num_text_bytes: int) -> None:
        """Add tokens to the current document."""
        self._pending += ids
        self._num_tokens += len(ids)
        self._num_text_bytes += num_text_bytes

    def end_document(self) -> None:
        """Close the current document with an end-of-text token."""
        self.append([self._eos_id], 0)
        self._offsets.append(self._num_tokens)
        if self._num_tokens >= self._shard_tokens:
            self._end_shard()
            self._start_shard()
        elif len(self._pending) >= _FLUSH_TOKENS:
            self._flush()

    def finish(self) -> None:
        """Write what is left; ``counts`` is complete afterwards."""
        if self._num_tokens or not self._shards:
            self._end_shard()
        else:
            self._file.close()
            self._path.unlink()

    def record(self, unigram_nats_per_token: float) -> SplitRecord:
        """Return the index entry of the finished split."""
        return SplitRecord(
            shards=self._shards,
            num_tokens=sum(shard.num_tokens for shard in self._shards),
            num_documents=sum(shard.num_documents for shard in self._shards),
            num_text_bytes=self._num_text_bytes,
            unigram_nats_per_token=unigram_nats_per_token,
        )

    def _start_shard(self) -> None:
        self._path = self._directory / f"{self._name}-{len(self._shards):05}.bin"
        self._file = open(self._path, "wb")  # noqa: SIM115  closed at the end of the shard
        self._pending: list[int] = []
        self._offsets = [0]
        self._num_tokens = 0

    def _end_shard(self) -> None:
        self._flush()
        self._file.close()
        documents_path = self._path.with_suffix(".documents.npy")
        np.save(documents_path, np.array(self._offsets, dtype="<i8"))
        self._shards.append(
            ShardRecord(
                tokens=record_file(self._path),
                documents=record_file(documents_path),
                num_tokens=self._num_tokens,
                num_documents=len(self._offsets) - 1,
            )
        )

    def _flush(self) -> None:
        tokens = np.array(self._pending, dtype=self._dtype)
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        self._file.write(tokens.tobytes())
        self._pending = []


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest of uint16 and uint32, little endian, that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def cross_entropy_nats(counts: NDArray[np.int64], weights: NDArray[np.integer | np.floating]) -> float:
    """Return the cross-entropy in nats per token of tokens under frequencies proportional to ``weights``.

    Args:
        counts: How often each token occurs, ``(vocab_size,)``.
        weights: ``(vocab_size,)``, positive wherever ``counts`` is.
    """
    occurs = counts > 0
    log_probabilities = np.log(weights[occurs]) - np.log(weights.sum())
    return float(-(counts[occurs] * log_probabilities).sum() / counts.sum())
