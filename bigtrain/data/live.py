"""Text that is tokenised while training: the parts of a source, each tokenised when it is wanted.

What every process has to know of the source is found out once, when a run begins (:func:`write_plan`). The tokens of
a part go through a cache on the node's disk: one process of the node makes them, in a helper process so that the
training does not feel it, and the others read them; what a kill interrupts is made again.
"""

import dataclasses
import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import Content, DataConfig, OnBad
from bigtrain.data.cache import Ahead, NodeCache, explained
from bigtrain.data.chat import CHAT_FILE
from bigtrain.data.corpus import TokenSplit
from bigtrain.data.files import SourceFile
from bigtrain.data.index import CorpusIndex
from bigtrain.data.quality import Dropped, rejection
from bigtrain.data.records import document_fields
from bigtrain.data.remote import patiently
from bigtrain.data.sources import Part, read_part, source_fingerprint
from bigtrain.data.tokenise import SPLIT_BY, SPLITS, Coding, TokenBuffer, encoder, split_of
from bigtrain.data.workers import Helpers
from bigtrain.errors import DataError, UnreachableError
from bigtrain.log import get_logger
from bigtrain.schema import to_dict

PLAN_FILE = "parts.json"
_WINDOW_BYTES, _WINDOW_PARTS = 1 << 26, 8
_PARTS_AHEAD = 4
MOST_VALIDATION_PARTS = 32
"""Parts in which validation documents are looked for, unless they have not enough for one sample."""
_NUM_ATTEMPTS = 3
_POLL_SECONDS = 0.01
_DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


class PartTokens(NamedTuple):
    """One split of a part."""

    tokens: NDArray[np.unsignedinteger]
    """All documents on end, each with its end-of-text token, ``(n,)``."""
    lengths: NDArray[np.int64]
    """Tokens of each document."""
    counted: NDArray[np.uint8] | None
    """1 where a token counts as a target, ``(n,)``; None when all do."""
    left_out: NDArray[np.int64]
    """Documents of the part, of both splits: empty, left out by a filter, repaired."""
    bad: Dropped
    """What ``data.on_bad_row=skip`` has left out of the part."""
    num_bytes: int
    """Size of the part, both splits, in the cache."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a source before it is read."""

    fingerprint: str
    """What decides the documents, their order and their tokens, wherever the files lie."""
    is_fast: bool
    """See :class:`bigtrain.data.tokenise.Coding`."""
    window_parts: int
    """Parts that are shuffled together unless configured otherwise: 8 of usual size, fewer large ones."""
    sizes: dict[str, int]
    """Bytes of each file, by path."""
    parts: list[Part]
    """Parts of the source."""


def write_plan(directory: Path, config: DataConfig, parts: list[Part], tokenizer_hash: str, is_fast: bool) -> str:
    """Write what :func:`read_plan` reads; return the fingerprint.

    Raises:
        DataError: the source is missing.
    """
    files = sorted({file for part in parts for file in part.files})
    facts = [
        source_fingerprint(config, with_times=False),
        [[[file.name for file in part.files], *part[1:]] for part in parts],
        tokenizer_hash,
        config.content.name,
        document_fields(config),
        to_dict(config.filters),
        [SPLIT_BY, config.validation_fraction],
        *["on_bad_row"] * (config.on_bad_row is OnBad.skip),
    ]
    sizes = {str(file.path): file.path.stat().st_size for file in files}
    # How large the shards of a streamed dataset are is not known, but they are seldom small.
    part_bytes = _WINDOW_BYTES if config.streaming else max(sum(sizes.values()) // max(len(parts), 1), 1)
    plan = {
        "fingerprint": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
        "is_fast": is_fast,
        "window_parts": max(min(_WINDOW_BYTES // part_bytes, _WINDOW_PARTS), 1),
        "sizes": sizes,
        "parts": [[[[file.name, str(file.path)] for file in part.files], *part[1:]] for part in parts],
    }
    (directory / PLAN_FILE).write_text(json.dumps(plan))
    return plan["fingerprint"]


def read_plan(directory: Path) -> Plan:
    """Return the plan in a directory.

    Raises:
        DataError: it cannot be read.
    """
    path = directory / PLAN_FILE
    try:
        values = json.loads(path.read_text())
        parts = [
            Part(tuple(SourceFile(name, Path(where)) for name, where in files), *place)
            for files, *place in values.pop("parts")
        ]
        return Plan(parts=parts, **values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove {directory} and start again") from error


class _Task(NamedTuple):
    """One part to be tokenised, for a helper."""

    name: str
    cache: NodeCache
    config: DataConfig
    part: Part
    sizes: list[int]
    tokenizer: Path
    coding: Coding
    dtype: str


class LiveParts:
    """The parts of a source as tokens."""

    def __init__(self, directory: Path, config: DataConfig, index: CorpusIndex, helpers: Helpers) -> None:
        """Open what was found out of a source; nothing is tokenised yet.

        Raises:
            DataError: the plan or the cache cannot be used.
        """
        plan = read_plan(directory)
        self.fingerprint = plan.fingerprint
        self.num_parts = len(plan.parts)
        self.window_parts = config.shuffle_window_shards or plan.window_parts
        """Parts that are shuffled together."""
        self.has_answers = config.content is not Content.text
        self._plan = plan
        self._directory = directory
        # What the template was when the plan was made, wherever the file of the settings is now.
        chat = directory / CHAT_FILE
        self._config = dataclasses.replace(config, chat_template=str(chat)) if chat.exists() else config
        self._index = index
        self._helpers = helpers
        self._cache = NodeCache(cache_directory(config), int(config.cache_gib * 2**30))
        record, bound = index.tokenizer, int(config.validation_fraction * 2**64)
        self._coding = Coding(plan.is_fast, record.eos_id, bound, record.adds_special, record.reads_special)
        self._ahead = Ahead(self._make, helpers.num_processes)

    def load(self, number: int, split: str) -> PartTokens:
        """Return one split of a part.

        Raises:
            DataError: what the source raises; the cache cannot be used.
        """
        name = self._name(number)
        for _ in range(_NUM_ATTEMPTS):
            with explained(self._cache.directory):
                while (handle := self._cache.open(name)) is None:
                    if self._cache.is_being_made(name):
                        time.sleep(_POLL_SECONDS)
                    else:
                        self._make(number)
            with handle:
                try:
                    return _read(handle, split)
                except _DAMAGE as error:
                    get_logger().warning("%s is damaged (%s) and is made again", self._cache.path(name), error)
                    self._cache.discard(name)
        raise DataError(f"{self._cache.path(name)}: damaged {_NUM_ATTEMPTS} times in a row; look at this disk")

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to tokenise parts in this order; what goes wrong is left to :meth:`load`."""
        self._ahead.want(number for number in numbers if not self._cache.holds(self._name(number)))

    def require_room(self, window: Sequence[PartTokens]) -> None:
        """Refuse a window that does not fit into the cache: its parts would be tokenised again and again.

        Raises:
            DataError: it does not.
        """
        num_bytes = sum(part.num_bytes for part in window)
        if num_bytes > self._cache.max_bytes:
            raise DataError(
                f"data.cache_gib={self._config.cache_gib}: too small for the tokens of the {len(window)} parts of "
                f"{self._config.path} that are shuffled at a time; use at least {1.1 * num_bytes / 2**30:.2g} or a smaller "
                "data.shuffle_window_shards"
            )

    def _name(self, number: int) -> str:
        return f"{self._index.identity[:32]}-{number}"

    def _make(self, number: int) -> None:
        part = self._plan.parts[number]
        task = _Task(
            name=self._name(number),
            cache=self._cache,
            config=self._config,
            part=part,
            sizes=[self._plan.sizes[str(file.path)] for file in part.files],
            tokenizer=self._directory,
            coding=self._coding,
            dtype=self._index.dtype,
        )
        self._helpers.call(make_part, task)


def cache_directory(config: DataConfig) -> Path:
    """Return where this node keeps what was fetched or tokenised."""
    return Path(config.cache_directory or Path(config.root, "cache"))


def make_part(task: _Task) -> None:
    """Tokenise one part into the cache, unless it is there or another process is at it.

    Raises:
        DataError: what the source raises; it is not what it was; the cache cannot be written.
    """
    with explained(task.cache.directory), task.cache.making(task.name, 0, wait=False) as handle:
        if handle is None:
            return
        where = f"data.path={task.config.path}"
        arrays = patiently(lambda: _tokenise(task), where, may_pass=lambda error: isinstance(error, UnreachableError))
        handle.truncate(0)
        with open(handle.name, "r+b") as file:  # the locked one only appends
            np.savez(file, **arrays)


def _tokenise(task: _Task) -> dict[str, NDArray]:
    for file, size in zip(task.part.files, task.sizes, strict=True):
        if not file.path.exists() or file.path.stat().st_size != size:
            raise DataError(f"{file.path}: no longer the file of {size} bytes that it was when this launch began")
    encode = encoder(task.tokenizer, task.coding)
    buffers = {split: TokenBuffer(np.dtype(task.dtype)) for split in SPLITS}
    num_empty = num_filtered = num_repaired = 0
    bad = Dropped()
    for document in read_part(task.config, task.part, bad):
        if not document.text:
            num_empty += 1
        elif rejection(document.text, task.config.filters):
            num_filtered += 1
        else:
            num_repaired += document.is_repaired
            buffers[split_of(document, task.coding)].add(document, encode, task.coding.eos_id)
    arrays = {"left_out": np.array([num_empty, num_filtered, num_repaired])}
    if bad.documents:
        arrays |= {"bad": np.array(bad.documents), "bad_examples": np.array(bad.examples)}
    for split, buffer in buffers.items():
        tokens, counted = buffer.take()
        arrays |= {f"{split}.tokens": tokens, f"{split}.lengths": np.array(buffer.lengths, dtype=np.int64)}
        arrays |= {} if counted is None else {f"{split}.counted": counted}
    return arrays


def _read(handle: BinaryIO, split: str) -> PartTokens:
    """Read what :func:`make_part` has written; every array is compared with its checksum."""
    with np.load(handle, allow_pickle=False) as arrays:
        tokens, lengths, left_out = arrays[f"{split}.tokens"], arrays[f"{split}.lengths"], arrays["left_out"]
        bad = Dropped()
        if "bad" in arrays:
            bad = Dropped(documents=int(arrays["bad"]), examples=arrays["bad_examples"].tolist())
        num_bytes = os.fstat(handle.fileno()).st_size
        return PartTokens(tokens, lengths, arrays.get(f"{split}.counted"), left_out, bad, num_bytes)


def join(parts: Sequence[PartTokens], fingerprint: str, split: str) -> TokenSplit:
    """Return parts as one shard, in which documents are packed together."""
    tokens = np.concatenate([part.tokens for part in parts])
    documents = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]).astype(np.int64)
    counted = None
    if any(part.counted is not None for part in parts):
        counts = [np.ones(len(p.tokens), np.uint8) if p.counted is None else p.counted for p in parts]
        counted = np.concatenate(counts)
    return TokenSplit(split, tokens, fingerprint, documents=[documents], counted=[counted])


def validation_split(parts: LiveParts, *, num_tokens: int, sequence_length: int) -> TokenSplit:
    """Return the validation documents of the first parts: so many that there are ``num_tokens``, if that is not too far.

    Validation documents of the other parts are neither trained nor validated on.

    Raises:
        DataError: as :meth:`LiveParts.load`.
    """
    found, num_found = [], 0
    for number in range(parts.num_parts):
        enough = num_tokens if number < MOST_VALIDATION_PARTS else min(num_tokens, sequence_length + 1)
        if num_found >= enough:
            break
        parts.prefetch(range(number, min(number + _PARTS_AHEAD, parts.num_parts)))
        found.append(parts.load(number, "validation"))
        num_found += len(found[-1].tokens)
    if not found:
        return TokenSplit("validation", np.empty(0, dtype=np.uint16), parts.fingerprint)
    return join(found, parts.fingerprint, "validation")
