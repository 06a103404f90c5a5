"""Columns beside samples, which ``bigtrain score`` has written: a row for each sample by its number."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.config.convert import from_dict
from bigtrain.errors import ConfigError, DataError, as_data_error, some
from bigtrain.files import FileRecord, hash_content

SCORES_FILE = "scores.json"
FORMAT = 1


@dataclass(kw_only=True, slots=True)
class ScoredSet:
    """The columns of one set of samples."""

    content: str  # what the samples are: their stream's ``content``
    num_samples: int
    columns: dict[str, FileRecord]  # npy files by the name of the column


@dataclass(kw_only=True, slots=True)
class ScoresIndex:
    """Content of ``scores.json``."""

    format: int
    model: dict[str, str]  # what scored: where its weights are from, and their hash
    id_bound: int  # ids of tokens in the columns are below it
    sets: dict[str, ScoredSet]  # by the name of the stream: ``train``, ``validation``, ``test/news``, ...


class Scores(NamedTuple):
    """Columns of a set, mapped into memory."""

    columns: dict[str, NDArray[Any]]
    told: str  # what tells them from others, for the digest of the data


def open_scores(
    directory: Path, name: str, content: str, wanted: Collection[str], *, vocab_size: int, verify: bool
) -> Scores:
    """Return the columns of a set that a task reads, those with a ``wanted`` name, compared with their hashes to ``verify``.

    DataError: there are none, they have changed, are of another ``content``, or have ids from ``vocab_size`` on.
    """
    where, path = f"data.scores={directory}", directory / SCORES_FILE
    with as_data_error(path, OSError, ValueError, ConfigError, advice="; bigtrain score writes it"):
        index = from_dict(ScoresIndex, json.loads(path.read_bytes()))
    if index.format != FORMAT or name not in index.sets:
        has = f"the sets {some(index.sets, 8)} in format {index.format}"
        raise DataError(
            f"{where}: has {has}, not {name} in format {FORMAT}; score again, with the settings of this run"
        )
    scored = index.sets[name]
    if scored.content != content:
        raise DataError(
            f"{where}: other samples were scored ({scored.content}) than those of {name} ({content}); score these, with "
            "the same data, tokenizer, sequence_length and packing"
        )
    if index.id_bound > vocab_size:
        raise DataError(f"{where}: has ids up to {index.id_bound - 1}, but model.vocab_size={vocab_size}")
    files = {column: file for column, file in scored.columns.items() if column in wanted}
    if not files:
        raise DataError(f"{where}: has {some(scored.columns, 8)}, none of which this task reads")
    columns = {column: _open(directory / Path(file.name).name, file, verify) for column, file in files.items()}
    hashes = "".join(file.xxh3 for _, file in sorted(files.items()))
    return Scores(columns, f"scores {xxhash.xxh3_64_hexdigest(hashes.encode())}")


def _open(path: Path, file: FileRecord, verify: bool) -> NDArray[Any]:
    with as_data_error(path, OSError, ValueError), path.open("rb", buffering=0) as handle:
        is_whole = path.stat().st_size == file.num_bytes and (not verify or hash_content(handle) == file.xxh3)
        if is_whole:
            return np.load(path, mmap_mode="r", allow_pickle=False)
    raise DataError(f"{path}: is not what was written; score again")
