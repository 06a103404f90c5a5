"""Columns beside samples, which ``bigtrain score`` has written: a row for each sample by its number."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.config.convert import from_dict
from bigtrain.data.read.batch import Samples
from bigtrain.errors import ConfigError, DataError, as_data_error, some
from bigtrain.files import FileRecord, hash_content, read_json

SCORES_FILE = "scores.json"
FORMAT = 1


@dataclass(kw_only=True, slots=True)
class ScoredSet:
    """The columns of one set of samples."""

    content: str
    """What the samples are, as :attr:`bigtrain.data.read.stream.SampleStream.content` says."""
    num_samples: int
    """Rows of each column."""
    columns: dict[str, FileRecord]
    """npy files by the name of the column."""


@dataclass(kw_only=True, slots=True)
class ScoresIndex:
    """Content of ``scores.json``."""

    format: int
    model: dict[str, str]
    """What scored: where its weights are from, and their hash."""
    what: str
    """See :class:`bigtrain.config.Scored`."""
    id_bound: int
    """Ids of tokens in the columns are below it."""
    sets: dict[str, ScoredSet]
    """By the name of the stream: ``train``, ``validation``, ``test/news``, ..."""


class Scores:
    """Columns of a set, mapped into memory."""

    def __init__(self, columns: dict[str, NDArray[Any]], identity: str) -> None:
        self._columns = columns
        self._identity = identity

    def __call__(self, sample_ids: NDArray[np.int64]) -> Samples:
        """Return the rows of some samples."""
        return Samples({name: column[sample_ids] for name, column in self._columns.items()})

    def __str__(self) -> str:
        """Return what tells these columns from others, for the digest of the data."""
        return self._identity


def read_scores(directory: Path, *, vocab_size: int) -> ScoresIndex:
    """Return the index of scored columns; DataError if there is none, or it has ids that an embedding has no row for."""
    where = f"data.scores={directory}"
    values = read_json(directory / SCORES_FILE)
    if not values:
        raise DataError(f"{where}: has no {SCORES_FILE}; bigtrain score out={directory} writes it")
    try:
        index = from_dict(ScoresIndex, values)
    except ConfigError as error:
        raise DataError(f"{where}/{SCORES_FILE}: damaged: {error}; score again") from error
    if index.format != FORMAT:
        raise DataError(f"{where}/{SCORES_FILE}: format {index.format}, this version reads {FORMAT}; score again")
    if index.id_bound > vocab_size:
        raise DataError(f"{where}: has ids up to {index.id_bound - 1}, but model.vocab_size={vocab_size}")
    return index


def open_scores(
    directory: Path, index: ScoresIndex, name: str, content: str, wanted: Collection[str], *, verify: bool
) -> Scores:
    """Return those columns of a set that a task reads, by the names that it has for them.

    Args:
        directory: Where the columns are.
        index: Of them.
        name: Of the set.
        content: What its samples are; DataError if others were scored.
        wanted: Names; DataError if none of them is there.
        verify: Whether to compare the files with their hashes.
    """
    where = f"data.scores={directory}"
    if name not in index.sets:
        raise DataError(f"{where}: the set {name} was not scored, only {some(index.sets, 8)}; score it with the others")
    scored = index.sets[name]
    if scored.content != content:
        raise DataError(
            f"{where}: other samples were scored ({scored.content}) than those of {name} ({content}); score these, with "
            "the same data, tokenizer, sequence_length and packing"
        )
    columns = {}
    for column, file in scored.columns.items():
        if column not in wanted:
            continue
        path = directory / Path(file.name).name
        with as_data_error(path, OSError, ValueError):
            columns[column] = np.load(path, mmap_mode="r", allow_pickle=False)
            is_changed = path.stat().st_size != file.num_bytes
            if verify and not is_changed:
                with path.open("rb", buffering=0) as handle:
                    is_changed = hash_content(handle) != file.xxh3
        if is_changed or len(columns[column]) != scored.num_samples:
            raise DataError(f"{path}: is not what was written; score again")
    if not columns:
        raise DataError(f"{where}: has {some(scored.columns, 8)}, none of which this task reads")
    hashes = "".join(file.xxh3 for _, file in sorted(scored.columns.items()))
    return Scores(columns, f"scores {xxhash.xxh3_64_hexdigest(hashes.encode())}")
