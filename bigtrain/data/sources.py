"""Documents of a source, one after the other, in an order that depends on nothing but the source.

A source comes in parts, each read by itself, so that several processes share the work; the order of
the documents is that of the parts. What becomes of odd input, for every source alike:

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bigtrain.config import Content, DataConfig, DataSource
from bigtrain.data.records import Document, decode, document_fields, record_document
from bigtrain.errors import DataError, UnreachableError

_NOT_STDLIB = frozenset({"__pycache__", "site-packages", "dist-packages"})
_SUFFIXES = {
    DataSource.jsonl: (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    DataSource.parquet: (".parquet",),
    DataSource.arrow: (".arrow",),
}
_PART_BYTES = 8 << 20
_PART_ROWS = 8192
_ROWS_PER_READ = 1024
_SMALLEST_PIECE_CHARACTERS = 1024


class SourceFile(NamedTuple):
    """One file of a source."""

    name: str
    """Path relative to the root of the source, with '/' on every system."""
    path: Path
    """Where it is."""


class Part(NamedTuple):
    """What one process reads at a time: some whole files, or a range of one file or dataset."""

    files: tuple[SourceFile, ...] = ()
    """None for a dataset."""
    start: int = 0
    """First byte (jsonl), row group (parquet), row (dataset) or shard (streamed dataset)."""
    stop: int | None = None
    """End of that range; None: to the end."""
    first_row: int = 0
    """Rows before the range."""


def iterate_documents(config: DataConfig) -> Iterator[Document]:
    """Yield every document of the configured source, in an order fixed by names and positions.

    Raises:
        DataError: the source is missing, unreadable, damaged or lacks the text field.
    """
    for part in source_parts(config):
        yield from read_part(config, part)


def source_parts(config: DataConfig) -> list[Part]:
    """Return the parts of the configured source, a few megabytes each where it can be divided.

    Raises:
        DataError: the source is missing or cannot be read.
    """
    if config.source is DataSource.datasets:
        return _dataset_parts(config)
    parts, small, num_bytes = [], [], 0
    for file in _source_files(config):
        size = file.path.stat().st_size
        ranges = _file_ranges(config.source, file, size) if size >= _PART_BYTES else []
        if not ranges:
            small.append(file)
            num_bytes += size
        if small and (ranges or num_bytes >= _PART_BYTES):
            parts.append(Part(tuple(small)))
            small, num_bytes = [], 0
        parts += ranges
    return parts + ([Part(tuple(small))] if small else [])


def _file_ranges(source: DataSource, file: SourceFile, size: int) -> list[Part]:
    """Return the ranges in which a large file is read, none if it can only be read as a whole."""
    if source is DataSource.jsonl and file.name.endswith(".jsonl"):
        return [Part((file,), start, min(start + _PART_BYTES, size)) for start in range(0, size, _PART_BYTES)]
    if source is DataSource.parquet:
        from pyarrow import parquet

        with _readable(file.path), parquet.ParquetFile(file.path) as table:
            rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        return [Part((file,), i, i + 1, sum(rows[:i])) for i in range(len(rows))]
    return []


def read_part(config: DataConfig, part: Part) -> Iterator[Document]:
    """Yield the documents of one part; raises as :func:`iterate_documents`."""
    if config.source is DataSource.datasets:
        yield from _dataset_documents(config, part)
        return
    read: Callable[[SourceFile, Part, DataConfig], Iterator[Document]] = {
        DataSource.stdlib: _python_documents,
        DataSource.text: _text_documents,
        DataSource.jsonl: _jsonl_documents,
        DataSource.parquet: _parquet_documents,
        DataSource.arrow: _arrow_documents,
    }[config.source]
    for file in part.files:
        with _readable(file.path):
            yield from read(file, part, config)


def source_fingerprint(config: DataConfig, *, with_times: bool = True) -> str:
    """Return a SHA-256 that changes when the source does, without reading the documents.

    Local files enter with relative name, size and time of modification, the standard library with
    name, size and Python version. A dataset on the hub enters with its name only: it is prepared
    once and then stays as it is, also offline.

    Args:
        config: the source.
        with_times: whether the times of modification enter, which a copy of the files may have changed.

    Raises:
        DataError: the source is missing.
    """
    if config.source is DataSource.datasets and not Path(config.path).exists():
        return _sha256_of([config.path, config.subset, config.split])
    files = [(file.name, os.stat(file.path)) for file in _source_files(config)]
    if config.source is DataSource.stdlib:
        return _sha256_of([sys.version, [(name, stat.st_size) for name, stat in files]])
    facts = [(name, stat.st_size, stat.st_mtime_ns * with_times) for name, stat in files]
    if config.source is DataSource.datasets:  # of a directory, too, only one split is read
        return _sha256_of([facts, config.subset, config.split])
    return _sha256_of(facts)


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# Files


def _source_files(config: DataConfig) -> list[SourceFile]:
    if config.source is DataSource.stdlib:
        return _files_below(Path(sysconfig.get_paths()["stdlib"]), (".py",), _NOT_STDLIB)
    path = Path(config.path)
    suffixes = _SUFFIXES.get(config.source, ("",))
    if path.is_dir():
        return _files_below(path, suffixes)
    if path.exists():
        return [SourceFile(path.name, path)]
    root = _glob_root(path)
    matches = [Path(match) for match in glob.glob(config.path, recursive=True)]
    files = [SourceFile(match.relative_to(root).as_posix(), match) for match in matches if match.is_file()]
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


def _files_below(root: Path, suffixes: tuple[str, ...], ignored: frozenset[str] = frozenset()) -> list[SourceFile]:
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
                files.append(SourceFile(f"{prefix}/{name}".removeprefix("/"), Path(path)))
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
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "pyarrow":
            raise
        raise DataError(f"{path}: cannot be read: {error}") from error


# Text


def _python_documents(file: SourceFile, _part: Part, _config: DataConfig) -> Iterator[Document]:
    raw = file.path.read_bytes()
    try:
        text, is_repaired = decode(raw, tokenize.detect_encoding(io.BytesIO(raw).readline)[0])
    except (SyntaxError, LookupError):  # test files of Python declare encodings that do not exist
        text, is_repaired = decode(raw)
    yield Document(file.name, text, is_repaired)


def _text_documents(file: SourceFile, _part: Part, config: DataConfig) -> Iterator[Document]:
    raw = file.path.read_bytes()
    if b"\0" in raw:
        raise DataError(
            f"{file.path}: has zero bytes, so it is binary or UTF-16, not UTF-8 text; "
            f"choose the text files by a pattern such as data.path='{file.path.parent}/**/*.txt'"
        )
    text, is_repaired = decode(raw)
    is_alone = config.path is not None and Path(config.path).is_file()
    if not is_alone or len(text) < 2 * _SMALLEST_PIECE_CHARACTERS:
        yield Document(file.name, text, is_repaired)
        return
    # One file alone leaves no documents to choose from for validation: its hundredths are.
    start, size = 0, max(len(text) // 100, _SMALLEST_PIECE_CHARACTERS)
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield Document(f"{file.name}#{start}", text[start:end], is_repaired and start == 0)
        start = end


def _jsonl_documents(file: SourceFile, part: Part, config: DataConfig) -> Iterator[Document]:
    if file.path.stat().st_size == 0:
        if not file.name.endswith(".jsonl"):
            raise DataError(f"{file.path}: empty, not even the header of a compressed file; was it copied to the end?")
        yield Document(file.name, "", False)  # so that it is counted
        return
    with _open_lines(file.path) as lines:
        offset = _next_line(lines, part.start)
        while (part.stop is None or offset < part.stop) and (raw := lines.readline()):
            line, is_repaired = decode(raw)
            if line.strip():
                try:
                    yield record_document(config, f"{file.name}@{offset}", _parse(line), is_repaired)
                except ValueError as error:
                    raise DataError(f"{file.path}:{_line_number(file.path, offset)}: {error}") from error
            offset += len(raw)


def _open_lines(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _next_line(lines: BinaryIO, start: int) -> int:
    """Go to the first line that begins at or after ``start`` and return where it does."""
    if start == 0:
        return 0
    lines.seek(start - 1)
    return start - 1 + len(lines.readline())


def _line_number(path: Path, offset: int) -> int:
    with _open_lines(path) as lines:
        return lines.read(offset).count(b"\n") + 1


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


# Tables


def _parquet_documents(file: SourceFile, part: Part, config: DataConfig) -> Iterator[Document]:
    from pyarrow import parquet

    with parquet.ParquetFile(file.path) as table:
        fields = _require_columns(config, table.schema_arrow.names, str(file.path))
        groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
        first_row = part.first_row
        for batch in table.iter_batches(batch_size=_ROWS_PER_READ, columns=fields, row_groups=list(groups)):
            yield from _batch_documents(config, batch, first_row, f"{file.name}:", str(file.path))
            first_row += len(batch)


def _arrow_documents(file: SourceFile, _part: Part, config: DataConfig) -> Iterator[Document]:
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(file.path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"  # else a stream, as the datasets library writes it
        mapped.seek(0)
        if is_file:
            reader = ipc.open_file(mapped)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = reader = ipc.open_stream(mapped)
        fields = _require_columns(config, reader.schema.names, str(file.path))
        first_row = 0
        for batch in batches:
            yield from _batch_documents(config, batch.select(fields), first_row, f"{file.name}:", str(file.path))
            first_row += len(batch)


def _dataset_parts(config: DataConfig) -> list[Part]:
    dataset = _load_dataset(config)
    if config.streaming:
        return [Part(start=shard, stop=shard + 1) for shard in range(dataset.num_shards)]
    return [Part(start=row, stop=min(row + _PART_ROWS, len(dataset))) for row in range(0, len(dataset), _PART_ROWS)]


def _dataset_documents(config: DataConfig, part: Part) -> Iterator[Document]:
    where = f"data.path={config.path}"
    dataset = _load_dataset(config)
    if config.streaming:
        yield from _streamed_documents(config, dataset.shard(dataset.num_shards, part.start), part, where)
        return
    rows = dataset.select_columns(_require_columns(config, dataset.column_names, where)).with_format("arrow")
    for first_row in range(part.start, part.stop, _ROWS_PER_READ):
        table = rows[first_row : min(first_row + _ROWS_PER_READ, part.stop)]
        yield from _batch_documents(config, table, first_row, "", where)


def _streamed_documents(config: DataConfig, shard: Any, part: Part, where: str) -> Iterator[Document]:
    import datasets

    try:
        for row, record in enumerate(shard):
            yield _row_document(config, f"{part.start}:{row}", record, f"{where}: shard {part.start}, row {row}")
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UnreachableError(f"{where}: cannot be read further: {error}; the same command continues") from error


def _load_dataset(config: DataConfig) -> Any:
    import datasets

    where = f"data.path={config.path}"
    saved = [Path(config.path, name) for name in ("dataset_dict.json", "state.json")]
    try:
        if not any(file.exists() for file in saved):
            return datasets.load_dataset(config.path, config.subset, split=config.split, streaming=config.streaming)
        dataset = datasets.load_from_disk(config.path)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        may_pass = config.streaming and isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise (UnreachableError if may_pass else DataError)(
            f"{where}: cannot load this dataset (data.subset={config.subset}, data.split={config.split}): {error}"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise DataError(f"{where}: no split '{config.split}'; set data.split to one of {sorted(dataset)}")
        dataset = dataset[config.split]  # one saved as a single split is that one
    return dataset.to_iterable_dataset() if config.streaming else dataset


def _require_columns(config: DataConfig, columns: list[str], where: str) -> list[str]:
    fields = document_fields(config)
    for name in fields.values():
        if name not in columns:
            setting = next(key for key, value in fields.items() if value == name)
            raise DataError(f"{where}: no column '{name}'; set data.{setting} to one of {sorted(columns)}")
    return list(fields.values())


def _batch_documents(config: DataConfig, batch: Any, first_row: int, prefix: str, where: str) -> Iterator[Document]:
    """Yield the documents of an Arrow table or record batch."""
    import pyarrow

    if config.content is not Content.text:
        for row, record in enumerate(batch.to_pylist(), start=first_row):
            yield _row_document(config, f"{prefix}{row}", record, f"{where}: row {row}")
        return
    column = batch.column(0)
    try:
        values = column.cast(pyarrow.large_binary()).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{where}: the text column has type {column.type}, not text") from error
    for row, raw in enumerate(values, start=first_row):
        yield Document(f"{prefix}{row}", *decode(raw or b"", "utf-8"))


def _row_document(config: DataConfig, document_id: str, row: dict[str, Any], where: str) -> Document:
    try:
        return record_document(config, document_id, row, False)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
