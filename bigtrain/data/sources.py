"""Documents of a source, one after the other, in an order that depends on nothing but the source.

What becomes of odd input, for every source alike:

- Text that is not valid UTF-8 keeps its valid part; each bad sequence becomes U+FFFD and the
  document counts as repaired. A byte-order mark at the beginning of a file is dropped.
- Empty and null documents are yielded as empty text (the caller drops and counts them).
- A missing path, an unreadable or damaged file, a binary file given as text, a line that is not
  a JSON object, a missing field and a field that is not text are a :class:`DataError` that names
  the file and the line or row.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bigtrain.config import DataConfig, DataSource
from bigtrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_NOT_STDLIB = frozenset({"__pycache__", "site-packages", "dist-packages"})
_SUFFIXES = {DataSource.jsonl: (".jsonl", ".jsonl.gz"), DataSource.parquet: (".parquet",)}
_ROWS_PER_READ = 1024


class Document(NamedTuple):
    """One document of a source."""

    id: str
    """Unique within the source and the same wherever the source lies: relative file name, ``:line`` or ``:row``."""
    text: str
    """Valid Unicode, possibly empty."""
    is_repaired: bool
    """Whether something that is not valid Unicode was replaced."""


class _SourceFile(NamedTuple):
    name: str  # relative to the root of the source, with '/' on every system
    path: Path


def iterate_documents(config: DataConfig) -> Iterator[Document]:
    """Yield every document of the configured source, in an order fixed by names and positions.

    Raises:
        DataError: the source is missing, unreadable, damaged or lacks the text field.
    """
    if config.source is DataSource.datasets:
        yield from _dataset_documents(config)
        return
    read = {
        DataSource.stdlib: _python_documents,
        DataSource.text: _text_documents,
        DataSource.jsonl: _jsonl_documents,
        DataSource.parquet: _parquet_documents,
    }[config.source]
    for file in _source_files(config):
        with _readable(file.path):
            yield from read(file, config.text_field)


def source_fingerprint(config: DataConfig) -> str:
    """Return a SHA-256 that changes when the source does, without reading the documents.

    Local files enter with relative name, size and time of modification, the standard library with
    name, size and Python version. A dataset on the hub enters with its name only: it is prepared
    once and then stays as it is, also offline.

    Raises:
        DataError: the source is missing.
    """
    if config.source is DataSource.datasets and not Path(config.path).exists():
        return _sha256_of([config.path, config.subset, config.split])
    files = [(file.name, os.stat(file.path)) for file in _source_files(config)]
    if config.source is DataSource.stdlib:
        return _sha256_of([sys.version, [(name, stat.st_size) for name, stat in files]])
    return _sha256_of([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# Files


def _source_files(config: DataConfig) -> list[_SourceFile]:
    if config.source is DataSource.stdlib:
        return _files_below(Path(sysconfig.get_paths()["stdlib"]), (".py",), _NOT_STDLIB)
    path = Path(config.path)
    suffixes = _SUFFIXES.get(config.source, ("",))
    if path.is_dir():
        return _files_below(path, suffixes)
    if path.exists():
        return [_SourceFile(path.name, path)]
    root = _glob_root(path)
    matches = [Path(match) for match in glob.glob(config.path, recursive=True)]
    files = [_SourceFile(match.relative_to(root).as_posix(), match) for match in matches if match.is_file()]
    if not files:
        raise DataError(f"data.path={config.path}: no such file or directory, and no file matches it as a pattern")
    return sorted(files)


def _glob_root(pattern: Path) -> Path:
    """Return the part of ``pattern`` before the first wildcard."""
    root = Path(pattern.anchor)
    for part in pattern.parts[bool(pattern.anchor) :]:
        if glob.has_magic(part):
            break
        root /= part
    return root


def _files_below(root: Path, suffixes: tuple[str, ...], ignored: frozenset[str] = frozenset()) -> list[_SourceFile]:
    """Return the files below ``root`` that end in one of ``suffixes``, sorted by name.

    Hidden files and directories, and directories with an ``ignored`` name, are left out.
    Links to directories are followed, each directory once, so that a loop of links ends.
    """
    files, visited = [], set()
    for directory, children, names in os.walk(root, followlinks=True):
        identity = os.path.realpath(directory)
        if identity in visited:
            children.clear()
            continue
        visited.add(identity)
        children[:] = sorted(c for c in children if not c.startswith(".") and c not in ignored)
        prefix = Path(directory).relative_to(root).as_posix().removeprefix(".")
        for name in names:
            path = os.path.join(directory, name)
            if name.endswith(suffixes) and not name.startswith(".") and os.path.isfile(path):
                files.append(_SourceFile(f"{prefix}/{name}".removeprefix("/"), Path(path)))
    if not files:
        wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise DataError(f"{root}: no file {wanted} in this directory or below it")
    return sorted(files)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong inside a file into an error that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


# Text


def _decode(raw: bytes, encoding: str = "utf-8-sig") -> tuple[str, bool]:
    try:
        return raw.decode(encoding), False
    except UnicodeDecodeError:
        return raw.decode(encoding, errors="replace"), True


def _python_documents(file: _SourceFile, _text_field: str) -> Iterator[Document]:
    raw = file.path.read_bytes()
    try:
        text, is_repaired = _decode(raw, tokenize.detect_encoding(io.BytesIO(raw).readline)[0])
    except (SyntaxError, LookupError):  # test files of Python declare encodings that do not exist
        text, is_repaired = _decode(raw)
    yield Document(file.name, text, is_repaired)


def _text_documents(file: _SourceFile, _text_field: str) -> Iterator[Document]:
    raw = file.path.read_bytes()
    if b"\0" in raw:
        raise DataError(
            f"{file.path}: has zero bytes, so it is binary or UTF-16, not UTF-8 text; "
            f"choose the text files by a pattern such as data.path='{file.path.parent}/**/*.txt'"
        )
    yield Document(file.name, *_decode(raw))


def _jsonl_documents(file: _SourceFile, text_field: str) -> Iterator[Document]:
    open_file = gzip.open if file.path.name.endswith(".gz") else open
    with open_file(file.path, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{file.path}:{number}"
            line, is_repaired = _decode(raw)
            if line.strip():
                text, has_lone_surrogate = _join_surrogates(_json_field(line, text_field, where))
                yield Document(f"{file.name}:{number}", text, is_repaired or has_lone_surrogate)


def _json_field(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if text_field not in record:
        raise DataError(f"{where}: no field '{text_field}'; set data.text_field to one of {sorted(record)}")
    text = record[text_field]
    if not isinstance(text, str | None):
        raise DataError(f"{where}: field '{text_field}' is {type(text).__name__}, not text")
    return text or ""


def _join_surrogates(text: str) -> tuple[str, bool]:
    """Replace lone surrogates, which JSON escapes can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True
    return text, False


# Tables


def _parquet_documents(file: _SourceFile, text_field: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            _require_column(text_field, table.schema_arrow.names, str(file.path))
            first_row = 0
            for batch in table.iter_batches(batch_size=_ROWS_PER_READ, columns=[text_field]):
                yield from _column_documents(batch.column(0), first_row, f"{file.name}:", str(file.path))
                first_row += len(batch)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file.path}: cannot be read as parquet: {error}") from error


def _dataset_documents(config: DataConfig) -> Iterator[Document]:
    dataset = _load_dataset(config)
    where = f"data.path={config.path}"
    _require_column(config.text_field, dataset.column_names, where)
    rows = dataset.select_columns([config.text_field]).with_format("arrow")
    for first_row in range(0, len(rows), _ROWS_PER_READ):
        table = rows[first_row : first_row + _ROWS_PER_READ]
        yield from _column_documents(table.column(0), first_row, "", where)


def _load_dataset(config: DataConfig) -> Any:
    import datasets

    where = f"data.path={config.path}"
    saved = [Path(config.path, name) for name in ("dataset_dict.json", "state.json")]
    try:
        if not any(file.exists() for file in saved):
            return datasets.load_dataset(config.path, config.subset, split=config.split)
        dataset = datasets.load_from_disk(config.path)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{where}: cannot load this dataset (data.subset={config.subset}, data.split={config.split}): {error}"
        ) from error
    if not isinstance(dataset, datasets.DatasetDict):  # saved as a single split: that one
        return dataset
    if config.split not in dataset:
        raise DataError(f"{where}: no split '{config.split}'; set data.split to one of {sorted(dataset)}")
    return dataset[config.split]


def _require_column(text_field: str, columns: list[str], where: str) -> None:
    if text_field not in columns:
        raise DataError(f"{where}: no column '{text_field}'; set data.text_field to one of {sorted(columns)}")


def _column_documents(column: "pyarrow.Array", first_row: int, prefix: str, where: str) -> Iterator[Document]:
    import pyarrow

    try:
        values = column.cast(pyarrow.large_binary()).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{where}: the text column has type {column.type}, not text") from error
    for row, raw in enumerate(values, start=first_row):
        yield Document(f"{prefix}{row}", *_decode(raw or b"", "utf-8"))
