"""Rows of arrays in memory, one array a column, also from a ``.npz`` file."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.errors import DataError, first_line


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

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row] for name, column in self._columns.items()}

    def gather(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return {name: column[rows] for name, column in self._columns.items()}


def read_npz(path: str | Path) -> Arrays:
    """Return the arrays of a ``.npz`` file; DataError if there is none, or it holds objects."""
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DataError(f"data.path={path}: there is no such file") from error
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"data.path={path}: data=records reads a .npz of arrays of numbers: {first_line(error)}"
        ) from error
    return Arrays(columns, where=f"data.path={path}")
