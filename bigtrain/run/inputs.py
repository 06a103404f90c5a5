"""Inputs of a trained network from a file or a program: rows of columns, or text that the run's tokenizer reads."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.config import TaskKind, TrainConfig
from bigtrain.data.prepare.images import read_image
from bigtrain.data.prepare.tables import csv_lines, csv_record
from bigtrain.data.read.index import read_index
from bigtrain.data.read.records import Arrays, Records, read_npz
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.errors import DataError, as_data_error
from bigtrain.files import read_json
from bigtrain.run.collation import first_token
from bigtrain.run.directory import FACTS_FILE
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import Field, Objective

FORMATS = (".jsonl", ".csv", ".tsv", ".txt", ".npz")
Row = Mapping[str, Any]
Finish = Callable[[Any, dict[str, Any]], dict[str, Any]]


class Unlabelled(Objective):
    """The inputs of an objective, without its targets."""

    def __init__(self, objective: Objective) -> None:
        self.inputs = {name: field for name, field in objective.fields.items() if field.is_input}
        self.targets = objective.fields.keys() - self.inputs.keys()

    @property
    def fields(self) -> Mapping[str, Field]:
        return self.inputs

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return np.zeros(len(next(iter(samples.values()))), dtype=np.int64)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        raise NotImplementedError("without targets there is no loss")


class Rows:
    """Rows as a dataset of the columns that a network takes; what else is in a row is left alone."""

    def __init__(self, rows: list[Any], where: str, read: Callable[[Any], Row], finish: Finish | None = None) -> None:
        self._rows, self._where, self._read, self._finish = rows, where, read, finish

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Row:
        try:
            return self._read(self._rows[row])
        except (ValueError, TypeError, KeyError) as error:
            told = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{self._where}:{row + 1}: {told}") from error

    def finished(self, row: int, answer: dict[str, Any]) -> dict[str, Any]:
        return self._finish(self._rows[row], answer) if self._finish else answer


def _encoder(run: Path, length: int, source_first: Callable[[], int | None] | None) -> Callable[[Any], Row]:
    """Return what makes columns of a text as of a corpus; ``source_first`` is a decoder's first token, if any."""
    tokenizer, record = load_tokenizer(run), read_index(run, check_sizes=False).tokenizer
    first = source_first() if source_first else None

    def encode(text: Any) -> Row:
        text = _joined(text)
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is no text")
        ids = tokenizer.encode(text, add_special_tokens=record.adds_special).ids
        if not record.adds_special and not source_first:
            ids = [record.eos_id, *ids]
        if len(ids) > length:
            ids = [*ids[: length - 1], ids[-1]] if record.adds_special else ids[:length]
        if not source_first:
            return {"tokens": np.array(ids, dtype=np.int64), "lengths": len(ids)}
        ids = ids or [record.eos_id]  # of an empty line
        source = np.zeros(length, dtype=np.int64)
        source[: len(ids)] = ids
        return {
            "source": source,
            "source_lengths": len(ids),
            "tokens": np.array([record.eos_id if first is None else first]),
        }

    return encode


def _joined(text: Any) -> Any:
    """Return the text of a list of words, and everything else as it is."""
    is_list = isinstance(text, list) and all(isinstance(word, str) for word in text)
    return " ".join(text) if is_list else text


def _words(run: Path, length: int, text: str | list[str]) -> list[tuple[str, int]]:
    """Return the words of a text, and the place of the first token of each among the ``length`` that a sample has."""
    tokenizer, adds_special = load_tokenizer(run), read_index(run, check_sizes=False).tokenizer.adds_special
    if isinstance(text, list):
        ends = np.cumsum([len(word) + 1 for word in text])
        spans = [(word, int(end) - len(word) - 1) for word, end in zip(text, ends, strict=True)]
    else:
        spans = [(match[0], match.start()) for match in re.finditer(r"\S+", text)]
    offsets = tokenizer.encode(_joined(text), add_special_tokens=adds_special).offsets
    reached = np.maximum.accumulate([end for _, end in offsets] or [0])
    first = np.searchsorted(reached, [start for _, start in spans], side="right") + (not adds_special)
    places = zip(spans, first.tolist(), strict=True)
    return [(word, place) for (word, _), place in places if place < length - adds_special]


def open_inputs(inputs: Path | Mapping[str, Any] | list[Any], run: Path, config: TrainConfig) -> Records:
    """Return the inputs for the network of a run, which has its tokenizer.

    ``inputs`` are a directory of images; a file (``.jsonl``, ``.csv`` with a header, ``.txt`` with a text a line,
    ``.npz``); arrays by column; or rows. DataError: there is no such file, or nothing in it that the network takes.
    """
    where = str(inputs) if isinstance(inputs, Path) else "inputs"
    objective = Unlabelled(build_objective(config.task))
    wanted = list(objective.fields)
    if isinstance(inputs, Path) and inputs.is_dir():
        dataset: Any = _pictures(inputs, run, config)
    elif isinstance(inputs, Mapping) or (isinstance(inputs, Path) and inputs.suffix == ".npz"):
        columns = read_npz(inputs)[:] if isinstance(inputs, Path) else inputs
        if missing := [name for name in wanted if name not in columns]:
            raise DataError(f"{where}: it lacks {', '.join(missing)}; it has {', '.join(columns)}")
        dataset = Arrays({name: columns[name] for name in wanted}, where=where)
    else:
        rows = _read(inputs) if isinstance(inputs, Path) else inputs
        try:
            is_json = isinstance(inputs, Path) and inputs.suffix == ".jsonl"
            dataset = Rows(rows, where, *_reader(rows, objective, run, config, is_json=is_json))
        except ValueError as error:
            raise DataError(f"{where}:1: {error}") from error
    if not len(dataset):
        raise DataError(f"{where}: it has no row")
    return Records(dataset, objective, where=where, sequence_length=config.data.sequence_length)


def _pictures(directory: Path, run: Path, config: TrainConfig) -> Rows:
    """Return the images below a directory, in the order of their names, normalised as those of the training data."""
    facts = read_json(run / FACTS_FILE)
    if "image_shape" not in facts:
        raise DataError(f"{directory}: a directory, which only a run on data=images reads")
    size, _, channels = facts["image_shape"]
    mean, deviation = (np.array(facts[name], dtype=np.float32) for name in ("mean", "deviation"))

    def read(path: Path) -> Row:
        pixels = read_image(path, size, channels, resizes=config.data.image_size is not None)
        return {"pixels": np.moveaxis((pixels - mean) / deviation, -1, 0)}

    return Rows(list_images(directory), str(directory), read)


def list_images(directory: Path) -> list[Path]:
    """Return the files below a directory, but for hidden ones, in the order of their names."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))


def _read(path: Path) -> list[Any]:
    """Return the rows of a file: text, or mappings; those of JSON are read when they are wanted."""
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: one of {', '.join(FORMATS)} is read, by the name's ending")
    is_table = path.suffix in (".csv", ".tsv")
    newline = "" if is_table else None
    with as_data_error(path, OSError, ValueError), path.open(encoding="utf-8-sig", newline=newline) as file:
        if is_table:
            (_, columns), *rows = csv_lines(file, path)
            return [csv_record(columns, values, f"{path}:{line}") for line, values in rows]
        content = file.read()
    return content.removesuffix("\n").split("\n") if content else []


def _reader(
    rows: Iterable[Any], objective: Unlabelled, run: Path, config: TrainConfig, *, is_json: bool
) -> tuple[Callable[[Any], Row], Finish | None]:
    """Return what makes columns of a row, of one with text its tokens, of a row of a table its numbers; and its answer."""
    wanted, data, first = list(objective.fields), config.data, next(iter(rows), None)
    sample = json.loads(first) if is_json else first
    has = sample if isinstance(sample, Mapping) else {}
    is_source = "source" in wanted and "source_lengths" not in has
    is_table = wanted == ["features"] and "features" not in has
    encode, text_field = None, data.source_field if is_source else data.text_field
    if is_source:
        encode = _encoder(run, data.source_length or data.sequence_length, lambda: first_token(config.model))
    elif "tokens" in wanted and "tokens" not in has:
        encode = _encoder(run, data.sequence_length or 1, None)
    has_words = encode is not None and config.task.kind == TaskKind.token_classification

    def text_of(row: Any) -> Any:
        row = json.loads(row) if is_json else row
        if not isinstance(row, Mapping):
            return row
        return row["words" if has_words and text_field not in row else text_field]

    def read(row: Any) -> Row:
        if encode:
            return encode(text_of(row))
        row = json.loads(row) if is_json else row
        if not isinstance(row, Mapping):
            raise ValueError(f"{row!r} has no columns; the network takes {', '.join(wanted)}")
        if is_table:  # its columns are the features, in their order
            numbers = [float(value) for name, value in row.items() if name not in objective.targets]
            return {"features": np.array(numbers, dtype=np.float32)}
        return {name: row[name] for name in wanted}

    def label_words(row: Any, answer: dict[str, Any]) -> dict[str, Any]:
        words = _words(run, data.sequence_length, text_of(row))
        return {"words": [word for word, _ in words], "labels": [answer["labels"][place] for _, place in words]}

    def leave_empty(row: Any, answer: dict[str, Any]) -> dict[str, Any]:
        return answer | {"text": ""} if "text" in answer and not _joined(text_of(row)).strip() else answer

    return read, label_words if has_words else leave_empty if is_source else None
