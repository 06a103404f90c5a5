"""A first pass over the documents: how much there is, which are for validation, what a BPE is trained on."""

import hashlib
import heapq
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bigtrain.config import DataConfig
from bigtrain.data.sources import iterate_documents
from bigtrain.errors import DataError

_BPE_SAMPLE_CHARACTERS = 10_000_000
_PIECE_CHARACTERS = 1 << 16
_QUIET_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(kw_only=True, slots=True)
class Survey:
    """What the first pass found."""

    num_documents: int = 0
    """Documents that are not empty."""
    num_text_bytes: int = 0
    """Their size as UTF-8."""
    num_empty_documents: int = 0
    """Documents without text, which are left out."""
    num_repaired_documents: int = 0
    """Documents with text that was not valid UTF-8."""
    validation_bound: int = 0
    """A document is for validation if its :func:`document_hash` is below this."""
    bpe_sample: list[str] = field(default_factory=list)
    """Up to 10 M characters of training text, spread over the corpus; only for ``bpe``."""


def survey_documents(config: DataConfig, advance: Callable[[int], None]) -> Survey:
    """Read all documents once.

    Args:
        config: Source, tokenizer and validation fraction.
        advance: Told the bytes of text of each document.

    Raises:
        DataError: fewer than two documents, or what the source raises.
    """
    survey, sampler = Survey(), _Sampler(_BPE_SAMPLE_CHARACTERS if config.tokenizer == "bpe" else 0)
    lowest, highest = 1 << 64, -1
    for document in iterate_documents(config):
        survey.num_repaired_documents += document.is_repaired
        if not document.text:
            survey.num_empty_documents += 1
            continue
        num_bytes = len(document.text.encode())
        survey.num_documents += 1
        survey.num_text_bytes += num_bytes
        position = document_hash(document.id)
        lowest, highest = min(lowest, position), max(highest, position)
        sampler.add(document.id, document.text, position)
        advance(num_bytes)
    if survey.num_documents < 2:
        raise DataError(
            f"data={config.source.name} data.path={config.path}: {survey.num_documents} document(s) with text, but "
            "training and validation need at least one each; cut the text into several files or jsonl lines"
        )
    # In a small corpus chance may leave a split empty: the lowest goes to validation, the highest to training.
    survey.validation_bound = min(max(int(config.validation_fraction * 2**64), lowest + 1), highest)
    survey.bpe_sample = sampler.texts(survey.validation_bound)
    return survey


def document_hash(document_id: str) -> int:
    """Return a number in [0, 2**64) that decides the split of a document, whatever else the corpus holds."""
    return int.from_bytes(hashlib.sha256(b"bigtrain split " + document_id.encode()).digest()[:8])


def cut(text: str) -> Iterator[str]:
    """Cut a long text into pieces of 64 k to 128 k characters that are tokenised one by one.

    This bounds the memory and lets one long document use all cores. A cut falls after a line end
    between two visible characters where there is one: there, byte-level tokenizers start a new
    word anyway, and the ids are those of the whole.
    """
    start = 0
    while len(text) - start > 2 * _PIECE_CHARACTERS:
        line_end = _QUIET_LINE_END.search(text, start + _PIECE_CHARACTERS, start + 2 * _PIECE_CHARACTERS)
        end = line_end.end() if line_end else start + 2 * _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


class _Sampler:
    """Keeps the pieces of text with the lowest hashes, so many as fit."""

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self._num_characters = 0
        self._heap: list[tuple[int, int, str]] = []  # highest piece hash on top: (-piece hash, document hash, piece)

    def add(self, document_id: str, text: str, position: int) -> None:
        if not self._max_characters:
            return
        for number, piece in enumerate(cut(text)):
            heapq.heappush(self._heap, (-document_hash(f"{document_id} {number}"), position, piece))
            self._num_characters += len(piece)
        while self._num_characters > self._max_characters and len(self._heap) > 1:
            self._num_characters -= len(heapq.heappop(self._heap)[2])

    def texts(self, validation_bound: int) -> list[str]:
        """Return the pieces of training documents."""
        return [piece for _, position, piece in sorted(self._heap, reverse=True) if position >= validation_bound]
