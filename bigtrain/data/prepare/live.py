"""Sources that are tokenised while training: the plan of their parts, and the tokens of one part."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig, OnBad
from bigtrain.config.convert import to_dict
from bigtrain.data.prepare.chat import CHAT_FILE
from bigtrain.data.prepare.files import Part, SourceFile
from bigtrain.data.prepare.records import document_fields
from bigtrain.data.prepare.sources import source_fingerprint
from bigtrain.data.prepare.survey import Tally, candidates
from bigtrain.data.prepare.tokenise import SPLIT_BY, Coding, EncodeDocument, TokenBuffer, encoder, split_of
from bigtrain.data.read.cache import NodeCache, explained
from bigtrain.data.read.index import SPLITS, CorpusIndex
from bigtrain.data.read.remote import patiently
from bigtrain.data.read.workers import Helpers
from bigtrain.errors import DataError, UnreachableError, as_data_error

if TYPE_CHECKING:
    from bigtrain.data.read.live import LiveParts

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
    plan: dict[str, Any] = {
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
    advice = f"; remove {directory} and start again"
    with as_data_error(path, OSError, ValueError, TypeError, KeyError, advice=advice):
        values = json.loads(path.read_text())
        parts = [
            Part(tuple(SourceFile(name, Path(where)) for name, where in files), *place)
            for files, *place in values.pop("parts")
        ]
        return Plan(parts=parts, **values)


def open_live(directory: Path, config: DataConfig, index: CorpusIndex, helpers: Helpers) -> "LiveParts":
    """Open a planned source; nothing is tokenised yet. DataError if plan or cache cannot be used."""
    from bigtrain.data.read.live import LiveParts  # torch, which helpers do without

    plan, record = read_plan(directory), index.tokenizer
    bound = int(config.validation_fraction * 2**64)
    coding = Coding(plan.is_fast, record.eos_id, bound, record.adds_special, record.reads_special)
    # The template as of the plan; data.chat_template may have changed or moved.
    chat = directory / CHAT_FILE
    own = dataclasses.replace(config, chat_template=str(chat)) if chat.exists() else config

    def make(number: int, name: str, cache: NodeCache) -> None:
        part = plan.parts[number]
        sizes = [plan.sizes[str(file.path)] for file in part.files]
        helpers.call(make_part, name, cache, own, part, sizes, directory, coding, index.dtype)

    return LiveParts(
        make,
        config,
        identity=index.identity,
        fingerprint=plan.fingerprint,
        num_parts=len(plan.parts),
        window_parts=plan.window_parts,
        num_threads=helpers.num_processes,
    )


def make_part(
    name: str,
    cache: NodeCache,
    config: DataConfig,
    part: Part,
    sizes: list[int],
    directory: Path,
    coding: Coding,
    dtype: str,
) -> None:
    """Tokenise one part into the cache under ``name``, unless it is there or another process does."""
    with explained(cache.directory), cache.making(name, 0, wait=False) as handle:
        if handle is None:
            return

        def tokenise() -> dict[str, Any]:
            return _tokenise(config, part, sizes, encoder(directory, coding), coding, np.dtype(dtype))

        where = f"data.path={config.path}"
        arrays = patiently(tokenise, where, may_pass=lambda error: isinstance(error, UnreachableError))
        handle.truncate(0)
        with open(handle.name, "r+b") as file:  # the locked one only appends
            np.savez(file, **arrays)


def _tokenise(
    config: DataConfig, part: Part, sizes: list[int], encode: EncodeDocument, coding: Coding, dtype: np.dtype
) -> dict[str, NDArray]:
    for file, size in zip(part.files, sizes, strict=True):
        if not file.path.exists() or file.path.stat().st_size != size:
            raise DataError(f"{file.path}: no longer the file of {size} bytes that it was when this launch began")
    buffers, tally = {split: TokenBuffer(dtype) for split in SPLITS}, Tally()
    for document in candidates(config, part, tally):
        buffers[split_of(document, coding)].add(document, encode, coding.eos_id)
    num_filtered = sum(dropped.documents for dropped in tally.dropped.values())
    arrays = {"left_out": np.array([tally.empty.documents, num_filtered, tally.num_repaired])}
    if tally.bad.documents:
        arrays |= {"bad": np.array(tally.bad.documents), "bad_examples": np.array(tally.bad.examples)}
    for split, buffer in buffers.items():
        tokens, counted = buffer.take()
        arrays |= {f"{split}.tokens": tokens, f"{split}.lengths": np.array(buffer.lengths, dtype=np.int64)}
        arrays |= {} if counted is None else {f"{split}.counted": counted}
    return arrays
