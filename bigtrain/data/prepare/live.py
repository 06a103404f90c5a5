"""Sources that are tokenised while training: the plan of their parts, and the tokens of one part."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig, OnBad
from bigtrain.config.convert import to_dict
from bigtrain.data.prepare.chat import CHAT_FILE
from bigtrain.data.prepare.files import Part, SourceFile
from bigtrain.data.prepare.quality import rejection
from bigtrain.data.prepare.records import document_fields
from bigtrain.data.prepare.sources import read_part, source_fingerprint
from bigtrain.data.prepare.tokenise import SPLIT_BY, Coding, TokenBuffer, encoder, split_of
from bigtrain.data.read.cache import NodeCache, explained
from bigtrain.data.read.dropped import Dropped
from bigtrain.data.read.index import SPLITS, CorpusIndex
from bigtrain.data.read.live import LiveParts
from bigtrain.data.read.remote import patiently
from bigtrain.data.read.workers import Helpers
from bigtrain.errors import DataError, UnreachableError

PLAN_FILE = "parts.json"
_WINDOW_BYTES, _WINDOW_PARTS = 1 << 26, 8


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of a source before it is read."""

    fingerprint: str  # of documents, their order and their tokens, independent of where files lie
    is_fast: bool  # see :class:`bigtrain.data.prepare.tokenise.Coding`
    window_parts: int  # parts that are shuffled together unless configured otherwise: 8 of usual size, fewer large ones
    sizes: dict[str, int]  # bytes of each file, by path
    parts: list[Part]


def write_plan(directory: Path, config: DataConfig, parts: list[Part], tokenizer_hash: str, is_fast: bool) -> str:
    """Write what :func:`read_plan` reads; return the fingerprint. DataError if the source is missing."""
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
    # Shard sizes of a streamed dataset are unknown, but seldom small.
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
    """Return the plan in a directory; DataError if it cannot be read."""
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


class Task(NamedTuple):
    """One part for a helper process to tokenise."""

    name: str
    cache: NodeCache
    config: DataConfig
    part: Part
    sizes: list[int]
    tokenizer: Path
    coding: Coding
    dtype: str


class Tokenisation:
    """How the parts of a source become tokens."""

    def __init__(self, directory: Path, config: DataConfig, index: CorpusIndex) -> None:
        """Read the plan in a directory; DataError if it cannot be read."""
        self._plan = plan = read_plan(directory)
        self.fingerprint, self.num_parts, self.window_parts = plan.fingerprint, len(plan.parts), plan.window_parts
        # The template as of the plan; data.chat_template may have changed or moved.
        chat = directory / CHAT_FILE
        self._config = dataclasses.replace(config, chat_template=str(chat)) if chat.exists() else config
        self._directory, self._dtype = directory, index.dtype
        record, bound = index.tokenizer, int(config.validation_fraction * 2**64)
        self._coding = Coding(plan.is_fast, record.eos_id, bound, record.adds_special, record.reads_special)

    def make(self, number: int, name: str, cache: NodeCache, helpers: Helpers) -> None:
        part = self._plan.parts[number]
        sizes = [self._plan.sizes[str(file.path)] for file in part.files]
        task = Task(name, cache, self._config, part, sizes, self._directory, self._coding, self._dtype)
        helpers.call(make_part, task)


def open_live(directory: Path, config: DataConfig, index: CorpusIndex, helpers: Helpers) -> LiveParts:
    """Open a planned source; nothing is tokenised yet. DataError if plan or cache cannot be used."""
    return LiveParts(Tokenisation(directory, config, index), config, index, helpers)


def make_part(task: Task) -> None:
    """Tokenise one part into the cache, unless it is there or another process does.

    Raises:
        DataError: the source is damaged or has changed, or the cache cannot be written.
    """
    with explained(task.cache.directory), task.cache.making(task.name, 0, wait=False) as handle:
        if handle is None:
            return
        where = f"data.path={task.config.path}"
        arrays = patiently(lambda: _tokenise(task), where, may_pass=lambda error: isinstance(error, UnreachableError))
        handle.truncate(0)
        with open(handle.name, "r+b") as file:  # the locked one only appends
            np.savez(file, **arrays)


def _tokenise(task: Task) -> dict[str, NDArray]:
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
