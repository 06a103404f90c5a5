"""Samples that are records: the rows of a map-style dataset, each with named columns."""

import inspect
import math
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from bigtrain.data.order.permutation import derive_key, mix64
from bigtrain.data.read.batch import ArrayPool, Samples
from bigtrain.errors import MISTAKES, DataError, first_line, told_with_place
from bigtrain.log import get_logger
from bigtrain.tasks.base import Field, Objective

SEQUENCE = "T"  # letter of a field's shape that stands for ``data.sequence_length``
OF_IDS = ("tokens", "source", "targets")  # ids of a tokenizer, unless ``below`` says other
_ROWS_AT_ONCE = 1024
_PATIENCE_SECONDS = 5.0


class Dataset(Protocol):
    """Rows with named columns, numbers or arrays of numbers: the same ones in the same order in every process.

    Two more members are used where a dataset has them: ``fingerprint``, a text that names its rows, which are read and
    hashed at every start otherwise; and ``gather(rows, positions)``, which returns several rows at once as arrays ``(N,
    ...)``, given two arrays int64 ``(N,)``. What is masked or augmented is a function of a row's position in the run.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Mapping[str, Any]: ...


class _Column(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    filling: int | float
    sequence_axis: int | None  # dimension, counted from the end, along which a value may be shorter and is filled up
    below: int | None  # see :class:`bigtrain.tasks.base.Field`


class Records:
    """The rows of a dataset as arrays of the types and shapes that a task wants."""

    def __init__(self, dataset: Dataset, objective: Objective, *, where: str, sequence_length: int | None) -> None:
        """Take the shapes that the objective leaves open from the first row; DataError if it does not fit.

        Rows are filled up to ``sequence_length``, the size of the dimension ``T``; None takes that from the first row.
        """
        self._dataset, self._where = dataset, where
        self._gather = getattr(dataset, "gather", None)
        self._pool = ArrayPool()
        self._lock = Lock()  # of pool and dataset: the loader's thread goes on while validation reads
        self._fills_up = sequence_length is not None
        self._columns: dict[str, _Column] = {}
        self.num_rows = len(dataset)
        self.num_ids: int | None = None  # rows of the network's embedding, above all ids
        self._objective = objective
        self._has_target = np.ones(self.num_rows, dtype=np.bool_)  # unless the rows are read
        if self.num_rows:
            self._bind(objective.fields, sequence_length)
            self._require_idle_padding(objective)

    def read(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> Samples:
        """Return rows, int64 ``(N,)``, drawn at ``positions`` of the run; DataError if one is not like the others."""
        with self._lock:
            arrays = {name: self._pool.take(len(rows), *c.shape, dtype=c.dtype) for name, c in self._columns.items()}
            if self._gather is not None:
                self._put(arrays, self._gather(rows, positions), "rows")
            else:
                for place, row in enumerate(rows.tolist()):
                    places = {name: array[place, ...] for name, array in arrays.items()}
                    self._put(places, self._row(row), f"row {row}")
            self._require_values(arrays, rows)
            return Samples(arrays)

    @property
    def sequence_length(self) -> int | None:
        """Size of the dimension ``T``; None if no column has it."""
        axes = ((column.shape, column.sequence_axis) for column in self._columns.values())
        return next((shape[axis] for shape, axis in axes if axis is not None), None)

    @property
    def sample_size(self) -> int:
        """Numbers in a sample, all columns together."""
        return sum(math.prod(column.shape) for column in self._columns.values())

    def describe(self, row: int, position: int) -> str:
        """Return what the dataset says of a row that is drawn at ``position``: nothing, of most."""
        describe = getattr(self._dataset, "describe", None)
        return f", {describe(row, position)}" if describe else ""

    def finished(self, row: int, answer: dict[str, Any]) -> dict[str, Any]:
        """Return what a network says of a row as the row's kind is answered."""
        finish = getattr(self._dataset, "finished", None)
        return finish(row, answer) if finish else answer

    def fingerprint(self) -> str:
        if own := getattr(self._dataset, "fingerprint", None):
            return str(own)
        digests = {name: xxhash.xxh3_64(f"{name} {c.dtype} {c.shape}".encode()) for name, c in self._columns.items()}
        begin, is_said = time.monotonic(), False
        for first in range(0, self.num_rows, _ROWS_AT_ONCE):
            rows = np.arange(first, min(first + _ROWS_AT_ONCE, self.num_rows))
            samples = self.read(rows, rows)
            for name, array in samples.items():
                digests[name].update(np.ascontiguousarray(array).data)
            self._has_target[rows] = self._objective.count(samples) > 0
            if not is_said and time.monotonic() - begin > _PATIENCE_SECONDS:
                is_said = True
                get_logger().info(
                    f"{self._where}: reading all {self.num_rows:,} rows to tell them from others; a dataset with an "
                    "attribute 'fingerprint' is not read before it is used"
                )
        return xxhash.xxh3_64_hexdigest("".join(digest.hexdigest() for digest in digests.values()).encode())

    def labels(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the labels of some rows, int64 ``(N,)``, alone if the dataset has ``labels(rows)``."""
        if own := getattr(self._dataset, "labels", None):
            return own(rows)
        parts = np.array_split(rows, max(len(rows) // _ROWS_AT_ONCE, 1))
        return np.concatenate([self.read(part, part)["labels"] for part in parts])

    def content_hashes(self, rows: NDArray[np.int64]) -> list[int]:
        """Return a hash of the inputs of each of some rows, int64 ``(N,)``."""
        samples = self.read(rows, rows)
        inputs = [samples[name] for name in samples if self._objective.fields[name].is_input]
        return [xxhash.xxh3_64_intdigest(b"".join(array[i].tobytes() for array in inputs)) for i in range(len(rows))]

    def require_targets(self, rows: NDArray[np.int64], side: str) -> None:
        if len(rows) and not self._has_target[rows].any():
            raise DataError(f"{self._where}: none of the {len(rows)} rows of the {side} side has a target that counts")

    def _require_values(self, samples: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
        """Refuse numbers that are not below what they have to be, and inputs that are not finite."""
        for name, column in self._columns.items():
            values, below = samples[name], column.below or (self.num_ids if name in OF_IDS else None)
            if column.dtype.kind == "f":  # a sum takes a fraction of the time
                is_outside = column.filling == column.filling and not np.isfinite(values.sum()) and ~np.isfinite(values)
                wanted = "a finite number"
            elif below is not None:
                is_outside = (values != column.filling) & ((values < 0) | (values >= below))
                unless = f", or {column.filling}, which does not count" if column.filling < 0 else ""
                wanted = f"from 0 to {below - 1}{'' if column.below else ' (model.vocab_size)'}{unless}"
            else:
                continue
            if np.any(is_outside):
                place = tuple(np.argwhere(is_outside)[0])
                raise DataError(f"{self._where}: row {rows[place[0]]}: {name} is {values[place]}; it must be {wanted}")

    def _bind(self, fields: Mapping[str, Field], sequence_length: int | None) -> None:
        first = self._first_row()
        sizes: dict[str, int] = {} if sequence_length is None else {SEQUENCE: sequence_length}
        self._require_names(first, {n: f for n, f in fields.items() if n in first or not f.is_optional}, "row 0")
        for name, field in ((name, field) for name, field in fields.items() if name in first):
            shape = np.shape(first[name])
            if len(shape) != len(field.shape):
                raise DataError(f"{self._where}: row 0: {name} has the shape {shape}; the task needs {_named(field)}")
            for letter, size in zip(field.shape, shape, strict=True):
                if isinstance(letter, str):
                    sizes.setdefault(letter, size)
            wanted = tuple(sizes[d] if isinstance(d, str) else d for d in field.shape)
            axis = field.shape.index(SEQUENCE) - len(shape) if SEQUENCE in field.shape else None
            dtype = torch.empty(0, dtype=field.dtype).numpy().dtype
            self._columns[name] = _Column(dtype, wanted, field.filling, axis, field.below)

    def _first_row(self) -> Mapping[str, Any]:
        zero = np.zeros(1, dtype=np.int64)
        first = self._dataset[0] if self._gather is None else self._gather(zero, zero)
        if not isinstance(first, Mapping):
            raise DataError(f"{self._where}: row 0 is a {type(first).__name__}; a row has to be columns by name")
        return first if self._gather is None else {name: array[0] for name, array in first.items()}

    def _require_idle_padding(self, objective: Objective) -> None:
        """Refuse an objective that counts the padding which fills up a rank's part of a step."""
        padding = {name: np.full((1, *c.shape), c.filling, c.dtype) for name, c in self._columns.items()}
        if (num_counted := objective.count(padding).sum().item()) != 0:
            raise DataError(
                f"{self._where}: the objective counts {num_counted} targets in a sample that is nothing but padding; give the "
                "field of its targets an 'ignored' value, which its count leaves out"
            )

    def _require_names(self, found: Mapping[str, Any], wanted: Mapping[str, Any], which: str) -> None:
        if found.keys() == wanted.keys():
            return
        told = [f"it lacks {name}" for name in wanted if name not in found]
        told += [f"it has {name}" for name in found if name not in wanted]
        raise DataError(f"{self._where}: {which}: the columns have to be {', '.join(wanted)}; {', '.join(told)}")

    def _row(self, row: int) -> Mapping[str, Any]:
        try:
            return self._dataset[row]
        except MISTAKES as error:
            now = len(self._dataset)
            changed = f"; it had {self.num_rows} rows, and has {now} now" if now != self.num_rows else ""
            raise DataError(f"{self._where}: row {row}: {told_with_place(error)}{changed}") from error

    def _put(self, places: Mapping[str, NDArray[Any]], found: Mapping[str, Any], which: str) -> None:
        if found.keys() != self._columns.keys():
            self._require_names(found, self._columns, which)
        for name, column in self._columns.items():
            value, place = np.asarray(found[name]), places[name]
            if value.dtype != column.dtype:
                value = self._converted(value, column.dtype, f"{which}: {name}")
            if value.shape == place.shape:
                place[...] = value
                continue
            self._require_shape(value.shape, place.shape, column.sequence_axis, f"{which}: {name}")
            place[...] = column.filling
            place[tuple(map(slice, value.shape))] = value

    def _converted(self, value: NDArray[Any], dtype: np.dtype, which: str) -> NDArray[Any]:
        is_number = value.dtype.kind in "biuf"
        if is_number and np.can_cast(value.dtype, dtype, "same_kind"):
            converted = value.astype(dtype)
            if dtype.kind == "f" or np.array_equal(converted, value):
                return converted
        what = value.dtype if is_number else "no array of numbers"
        raise DataError(f"{self._where}: {which} is {what}; the task needs {dtype}")

    def _require_shape(self, shape: tuple[int, ...], wanted: tuple[int, ...], axis: int | None, which: str) -> None:
        """Refuse another shape than ``wanted``, unless it is shorter along ``axis`` and is to be filled up."""
        advice = ""
        if axis is not None and len(shape) == len(wanted):
            filled_up = list(shape)
            filled_up[axis] = wanted[axis]
            if self._fills_up and tuple(filled_up) == wanted and shape[axis] < wanted[axis]:
                return
            advice = "; rows are filled up to data.sequence_length, which has to be that of the longest"
        raise DataError(f"{self._where}: {which} has the shape {shape}, not {wanted}{advice}")


def _named(field: Field) -> str:
    return f"({', '.join(map(str, field.shape))}{',' * (len(field.shape) == 1)})"


@dataclass(frozen=True, slots=True, eq=False)
class RecordSplit:
    """Some rows of a dataset, each a sample; the samples of :mod:`bigtrain.data.read.packing` have the same members."""

    name: str
    records: Records
    rows: NDArray[np.int64]  # the rows, ascending, int64 ``(num_samples,)``
    fingerprint: str  # identity of the rows
    facts: Mapping[str, Any]  # what is recorded with a run, such as ``label_names``
    has_answers = is_remote = may_skip = is_full = False

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        return np.array([len(self.rows)])

    def gather(self, sample_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Samples:
        return self.records.read(self.rows[sample_ids], positions)

    def answered(self) -> None:
        """All samples are drawn."""

    def all_labels(self) -> NDArray[np.int64]:
        return self.records.labels(self.rows)

    def documents(self, sample_id: int) -> NDArray[np.int64]:
        return self.rows[[sample_id]]


def split_records(
    source: Any, objective: Objective, *, where: str, sequence_length: int | None, validation_fraction: float
) -> dict[str, RecordSplit]:
    """Return the training and the validation side of a source; DataError if it does not fit the objective.

    A source is a :class:`Dataset`, or arrays by column, of which ``validation_fraction`` is held out by a hash of the
    row's number; or an object whose ``train()`` returns one, and ``validation()``, if it has that, another one or None;
    or a function that returns either. With a fraction of 0 nothing is held out. The rest is as in :class:`Records`.
    """
    if isinstance(source, type) or inspect.isroutine(source):
        source = source()
    has_sides = hasattr(source, "train")
    facts = getattr(source, "facts", {})
    has_own = has_sides and hasattr(source, "validation") and validation_fraction > 0
    sides = {"train": source.train() if has_sides else source}
    if has_own and (own := source.validation()) is not None:
        sides["validation"] = own
    records = {}
    for name, side in sides.items():
        dataset = Arrays(side, where=where) if isinstance(side, Mapping) else side
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(f"{where}: the {name} side is a {type(dataset).__name__}; it has to have len() and [row]")
        records[name] = Records(dataset, objective, where=where, sequence_length=sequence_length)
    fingerprints = {name: part.fingerprint() for name, part in records.items()}
    rows = {name: np.arange(part.num_rows) for name, part in records.items()}
    if len(sides) == 1:
        records["validation"] = records["train"]
        is_held_out = held_out(records["train"].num_rows, validation_fraction)
        rows = {"train": np.flatnonzero(~is_held_out), "validation": np.flatnonzero(is_held_out)}
        fingerprints = dict.fromkeys(rows, f"{fingerprints['train']} without {validation_fraction:g}")
    for name, part in records.items():
        part.require_targets(rows[name], name)
    return {name: RecordSplit(name, part, rows[name], fingerprints[name], facts) for name, part in records.items()}


def held_out(num_rows: int, fraction: float) -> NDArray[np.bool_]:
    """Return whether each row is held out: a function of its number, for about ``fraction`` of them and at least one."""
    hashes = mix64(np.arange(num_rows, dtype=np.uint64) ^ np.uint64(derive_key(*b"validation")))
    is_held_out = hashes < np.uint64(fraction * 2**64)
    if num_rows and fraction and not is_held_out.any():
        is_held_out[hashes.argmin()] = True
    return is_held_out


class Arrays:
    """A dataset of columns, each an array ``(num_rows, ...)``; see :class:`bigtrain.data.read.records.Dataset`."""

    def __init__(self, columns: Mapping[str, Any], *, where: str = "data") -> None:
        """Take arrays by name; ``where`` is their place in messages. DataError if they are not equally long."""
        self._columns = {name: np.asarray(column) for name, column in columns.items()}
        lengths = {name: len(column) if column.ndim else None for name, column in self._columns.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            told = ", ".join(f"{name}: {'a number' if n is None else n}" for name, n in lengths.items()) or "none"
            raise DataError(
                f"{where}: every column has to be an array with one element per row; their lengths are {told}"
            )

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, row: int | slice) -> dict[str, Any]:
        return {name: column[row] for name, column in self._columns.items()}

    def gather(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return {name: column[rows] for name, column in self._columns.items()}


def read_npz(path: str | Path) -> Arrays:
    """Return the arrays of a ``.npz`` file; DataError if there is none, or it holds objects."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it is one array, without a name; numpy.savez(path, features=..., labels=...) names them")
        with loaded as file:
            columns = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DataError(f"data.path={path}: there is no such file") from error
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"data.path={path}: data=records reads a .npz of arrays of numbers: {first_line(error)}"
        ) from error
    return Arrays(columns, where=f"data.path={path}")
