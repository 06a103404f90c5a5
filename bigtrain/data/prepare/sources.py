"""Documents of a source, in an order that depends on the source alone.

A source is read in parts, so that several processes share the work. For all sources:

- Invalid UTF-8 becomes U+FFFD and the document counts as repaired. A byte-order mark at the beginning is dropped.
- Empty and null documents are yielded as empty text, which the caller drops and counts.
- A missing path, an unreadable or damaged file, a binary file given as text, a line that is not a JSON object, and a
  field that is missing or not text are a :class:`DataError` that names the file and the line or row. With
  ``data.on_bad_row=skip`` such a row, and a file that cannot be read to its end, is left out whole and counted.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import sys
import tokenize
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.config import Content, DataConfig, DataSource, OnBad
from bigtrain.data.prepare.files import SourceFile, find_files
from bigtrain.data.prepare.formats import SeveralLinesError, foreign_format, foreign_json, parse_object
from bigtrain.data.prepare.labels import Labels
from bigtrain.data.prepare.records import Document, columns_to_read, decode, document_fields, record_document
from bigtrain.data.prepare.saved import choose_split, read_state, split_name
from bigtrain.data.read.dropped import Dropped
from bigtrain.errors import DataError, UnreachableError

_PART_BYTES = 8 << 20
_PART_ROWS = 8192
_ROWS_PER_READ = 1024
_SMALLEST_PIECE_CHARACTERS = 1024
_HEAD_BYTES = 4096
_BLOCK_BYTES = 1 << 20
_LABELLED_CHARACTERS = 500
_PACKAGE_BYTES = 120_000


class BadRow(NamedTuple):
    """A row or file that ``data.on_bad_row`` decides about."""

    problem: str  # what is wrong, with file and line or row


Row = Document | BadRow
Rows = Iterator[Row]


class Part(NamedTuple):
    """What one process reads at a time: some whole files, or a range of one file or dataset."""

    files: tuple[SourceFile, ...] = ()  # empty for a dataset
    start: int = 0  # first byte (jsonl), row group (parquet), row (dataset) or shard (streamed dataset)
    stop: int | None = None
    """End of that range; None: to the end. Of a text only if it is all that a directory or a pattern holds."""
    first_row: int = 0  # rows before the range


def iterate_documents(config: DataConfig) -> Iterator[Document]:
    """Yield every document of the source, in an order fixed by names and positions.

    Raises:
        DataError: the source is missing, unreadable, damaged or lacks the text field.
    """
    for part in source_parts(config):
        yield from read_part(config, part)


def source_parts(config: DataConfig) -> list[Part]:
    """Return the parts of the source, a few MB each where it can be divided; DataError if it cannot be read."""
    if config.source is DataSource.datasets:
        return _dataset_parts(config)
    files = find_files(config).files
    if config.source is DataSource.text and len(files) == 1 and not Path(config.path).is_file():
        return [Part(tuple(files), stop=files[0].path.stat().st_size)]
    parts, small, num_bytes = [], [], 0
    for file in files:
        size = file.path.stat().st_size
        ranges = _file_ranges(config, file, size) if size >= _PART_BYTES else []
        if not ranges:
            small.append(file)
            num_bytes += size
        if small and (ranges or num_bytes >= _PART_BYTES):
            parts.append(Part(tuple(small)))
            small, num_bytes = [], 0
        parts += ranges
    return parts + ([Part(tuple(small))] if small else [])


def _file_ranges(config: DataConfig, file: SourceFile, size: int) -> list[Part]:
    """Return the ranges in which a large file is read, none if it can only be read as a whole."""
    source = config.source
    if source is DataSource.jsonl and file.name.endswith(".jsonl"):
        return [Part((file,), start, min(start + _PART_BYTES, size)) for start in range(0, size, _PART_BYTES)]
    if source is DataSource.parquet:
        from pyarrow import parquet

        try:
            with _readable(file.path), parquet.ParquetFile(file.path) as table:
                rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        except DataError:
            if config.on_bad_row is OnBad.skip:
                return []  # left out when it is read
            raise
        return [Part((file,), i, i + 1, sum(rows[:i])) for i in range(len(rows))]
    return []


def read_part(config: DataConfig, part: Part, bad: Dropped | None = None) -> Iterator[Document]:
    """Yield the documents of one part; raises as :func:`iterate_documents`.

    Args:
        bad: counts what ``data.on_bad_row=skip`` leaves out: rows; files, or row groups of large Parquet files.
    """
    skips = config.on_bad_row is OnBad.skip
    for row in _dataset_rows(config, part) if config.source is DataSource.datasets else _file_rows(config, part, skips):
        if isinstance(row, Document):
            yield row
        elif not skips:
            raise DataError(row.problem)
        elif bad is not None:
            bad.add(row.problem, 0)


def _file_rows(config: DataConfig, part: Part, skips: bool) -> Rows:
    read: Callable[[SourceFile, Part, DataConfig], Rows] = {
        DataSource.stdlib: _python_documents,
        DataSource.text: _text_documents,
        DataSource.jsonl: _jsonl_rows,
        DataSource.csv: _csv_rows,
        DataSource.parquet: _parquet_rows,
        DataSource.arrow: _arrow_rows,
    }[config.source]
    for file in part.files:
        may_break = config.source in (DataSource.parquet, DataSource.arrow) or _packing(file.path)
        try:
            with _readable(file.path):
                if skips and may_break:
                    deque(read(file, part, config), maxlen=0)  # a file that breaks off yields no rows at all
                yield from read(file, part, config)
        except DataError as error:
            # Errors of the system (disk, permissions) may differ between nodes.
            if not skips or getattr(error.__cause__, "errno", None):
                raise
            yield BadRow(str(error))


def source_fingerprint(config: DataConfig, *, with_times: bool = True) -> str:
    """Return a SHA-256 that changes when the source does, without reading the documents.

    Local files enter with relative name, size and modification time, the standard library with name, size and Python
    version, a dataset on the hub with its name only: once prepared it stays as it is, also offline.

    Args:
        with_times: whether modification times enter, which a copy may have changed.

    Raises:
        DataError: the source is missing.
    """
    if config.source is DataSource.datasets and not Path(config.path).exists():
        return _sha256_of([config.path, config.subset, config.split or "train"])
    files = [(file.name, os.stat(file.path)) for file in find_files(config).files]
    if config.source is DataSource.stdlib:
        return _sha256_of([sys.version, [(name, stat.st_size) for name, stat in files]])
    facts = [(name, stat.st_size, stat.st_mtime_ns * with_times) for name, stat in files]
    if config.source is DataSource.datasets:  # of a directory, too, only one split is read
        return _sha256_of([facts, config.subset, config.split or "train"])
    return _sha256_of(facts)


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an error inside a file into a DataError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "pyarrow":
            raise
        with open(path, "rb") as file:
            what = foreign_format(file.read(_HEAD_BYTES))
        raise DataError(f"{path}: cannot be read: {error}" + (f"; it begins as {what}" if what else "")) from error


# Text


def _python_documents(file: SourceFile, _part: Part, config: DataConfig) -> Iterator[Document]:
    raw = file.path.read_bytes()
    try:
        text, is_repaired = decode(raw, tokenize.detect_encoding(io.BytesIO(raw).readline)[0])
    except (SyntaxError, LookupError):  # Python's own tests declare encodings that do not exist
        text, is_repaired = decode(raw)
    if config.content is Content.labelled:
        yield from _labelled_pieces(file, text, is_repaired)
    else:
        yield Document(file.name, text, is_repaired)


def _labelled_pieces(file: SourceFile, text: str, is_repaired: bool) -> Iterator[Document]:
    """Yield pieces of a module of the standard library, labelled with its package, if that is one of some size."""
    package = file.name.partition("/")[0]
    if package in _large_packages():
        for start, end in _pieces(text, _LABELLED_CHARACTERS):
            labels = Labels((package,))
            yield Document(f"{file.name}#{start}", text[start:end], is_repaired, labels=labels, group=file.name)


@cache
def _large_packages() -> frozenset[str]:
    """Return the packages of the standard library, tests aside, with so many bytes of source."""
    sizes: Counter[str] = Counter()
    for file in find_files(DataConfig()).files:
        if "/" in file.name and not file.name.startswith(("test/", "idlelib/idle_test/")):
            sizes[file.name.partition("/")[0]] += file.path.stat().st_size
    return frozenset(package for package, size in sizes.items() if size >= _PACKAGE_BYTES)


def _pieces(text: str, num_characters: int) -> Iterator[tuple[int, int]]:
    """Yield where pieces of at least so many characters begin and end, at the ends of lines."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + num_characters) + 1 or len(text)
        yield start, end
        start = end


def _text_documents(file: SourceFile, part: Part, config: DataConfig) -> Iterator[Document]:
    raw = file.path.read_bytes()
    if b"\0" in raw or raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        what = foreign_format(raw) or "has zero bytes, so it is binary or UTF-16"
        raise DataError(
            f"{file.path}: {what}, not text in UTF-8; choose the text files by a pattern such as "
            f"data.path='{file.path.parent}/**/*.txt'"
        )
    text, is_repaired = decode(raw)
    if config.content is Content.labelled:
        yield Document(file.name, text, is_repaired, labels=Labels((_directory_label(file, config),)))
        return
    is_alone = part.stop is not None or Path(config.path).is_file()
    if not is_alone or len(text) < 2 * _SMALLEST_PIECE_CHARACTERS:
        yield Document(file.name, text, is_repaired)
        return
    # A single file is split into hundredths, so that there are documents for validation.
    for start, end in _pieces(text, max(len(text) // 100, _SMALLEST_PIECE_CHARACTERS)):
        yield Document(f"{file.name}#{start}", text[start:end], is_repaired and start == 0)


def _directory_label(file: SourceFile, config: DataConfig) -> str:
    """Return the directory below ``data.path`` that a file lies in."""
    label, slash, _ = file.name.partition("/")
    if not slash:
        raise DataError(
            f"{file.path}: lies in no directory below data.path={config.path}; with data.content=labelled the name of that "
            "directory is the label"
        )
    return label


def _csv_rows(file: SourceFile, _part: Part, config: DataConfig) -> Rows:
    name = re.sub(r"\.(gz|zst)$", "", file.name.lower())
    with _open_lines(file.path) as lines:
        if what := foreign_format(lines.peek(_HEAD_BYTES)[:_HEAD_BYTES]):
            raise DataError(f"{file.path}: {what}, not text in UTF-8 with a header and a row per line")
        text = io.TextIOWrapper(lines, encoding="utf-8-sig", errors="replace", newline="")
        reader = csv.reader(text, delimiter="\t" if name.endswith(".tsv") else ",", strict=True)
        try:
            columns = next(reader, [])
            _require_columns(config, columns, str(file.path))
            for number, values in enumerate(reader):
                yield _csv_row(config, f"{file.name}:{number}", columns, values, f"{file.path}:{reader.line_num}")
        except csv.Error as error:
            raise DataError(f"{file.path}:{reader.line_num}: {error}") from error


def _csv_row(config: DataConfig, document_id: str, columns: list[str], values: list[str], where: str) -> Row:
    if len(values) != len(columns):
        return BadRow(f"{where}: {len(values)} columns, but the header has {len(columns)}")
    row: dict[str, Any] = dict(zip(columns, values, strict=True))
    if config.content is Content.numbers:
        try:
            row[config.label_field] = float(row[config.label_field])
        except ValueError:
            return BadRow(f"{where}: {config.label_field} is {row[config.label_field]!r}, which is no number")
    return _row(config, document_id, row, where, is_repaired=any("\N{REPLACEMENT CHARACTER}" in v for v in values))


def _jsonl_rows(file: SourceFile, part: Part, config: DataConfig) -> Rows:
    if file.path.stat().st_size == 0:
        if _packing(file.path):
            raise DataError(f"{file.path}: empty, not even the header of a compressed file; was it copied to the end?")
        yield Document(file.name, "", False)  # so that it is counted
        return
    with _open_lines(file.path) as lines:
        if what := foreign_json(lines.peek(_HEAD_BYTES)[:_HEAD_BYTES]):
            raise DataError(
                f"{file.path}: {what}, not JSON lines in UTF-8, plain or packed by gzip (.gz) or zstd (.zst)"
            )
        offset = begin = _next_line(lines, part.start)
        number, before, is_first = 0, None, begin == 0
        while (part.stop is None or offset < part.stop) and (raw := lines.readline()):
            line, is_repaired = decode(raw)
            number += 1
            try:
                if line.strip():
                    record = parse_object(line, lambda: lines.peek(_HEAD_BYTES))
                    yield record_document(config, f"{file.name}@{offset}", record, is_repaired)
            except ValueError as error:
                before = _num_lines(file.path, begin) if before is None else before
                problem = f"{file.path}:{before + number}: {error}"
                if is_first and isinstance(error, SeveralLinesError):
                    raise DataError(problem) from error  # the whole file is of this form
                yield BadRow(problem)
            is_first = is_first and not line.strip()
            offset += len(raw)


def _packing(path: Path) -> str | None:
    return {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())


def _open_lines(path: Path) -> io.BufferedReader | gzip.GzipFile:
    if _packing(path) == "gzip":
        return gzip.open(path, "rb")
    if _packing(path) == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _next_line(lines: io.BufferedReader | gzip.GzipFile, start: int) -> int:
    """Seek to the first line that begins at or after ``start`` and return its position."""
    if start == 0:
        return 0
    lines.seek(start - 1)
    return start - 1 + len(lines.readline())


def _num_lines(path: Path, end: int) -> int:
    """Return the number of lines before the byte ``end``."""
    with _open_lines(path) as lines:
        return sum(lines.read(min(_BLOCK_BYTES, end - at)).count(b"\n") for at in range(0, end, _BLOCK_BYTES))


# Tables


def _parquet_rows(file: SourceFile, part: Part, config: DataConfig) -> Rows:
    from pyarrow import parquet

    with parquet.ParquetFile(file.path) as table:
        fields = _require_columns(config, table.schema_arrow.names, str(file.path))
        groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
        first_row = part.first_row
        for batch in table.iter_batches(batch_size=_ROWS_PER_READ, columns=fields, row_groups=list(groups)):
            yield from _batch_rows(config, batch, first_row, f"{file.name}:", str(file.path))
            first_row += len(batch)


def _arrow_rows(file: SourceFile, _part: Part, config: DataConfig) -> Rows:
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
            yield from _batch_rows(config, batch.select(fields), first_row, f"{file.name}:", str(file.path))
            first_row += len(batch)


def _dataset_parts(config: DataConfig) -> list[Part]:
    dataset = _load_dataset(config)
    if config.streaming:
        return [Part(start=shard, stop=shard + 1) for shard in range(dataset.num_shards)]
    return [Part(start=row, stop=min(row + _PART_ROWS, len(dataset))) for row in range(0, len(dataset), _PART_ROWS)]


def _dataset_rows(config: DataConfig, part: Part) -> Rows:
    where = f"data.path={config.path}"
    dataset = _load_dataset(config)
    if config.streaming:
        yield from _streamed_rows(config, dataset.shard(dataset.num_shards, part.start), part, where)
        return
    rows = dataset.select_columns(_require_columns(config, dataset.column_names, where)).with_format("arrow")
    for first_row in range(part.start, part.stop, _ROWS_PER_READ):
        table = rows[first_row : min(first_row + _ROWS_PER_READ, part.stop)]
        yield from _batch_rows(config, table, first_row, "", where)


def _streamed_rows(config: DataConfig, shard: Any, part: Part, where: str) -> Rows:
    import datasets

    try:
        for row, record in enumerate(shard):
            yield _row(config, f"{part.start}:{row}", record, f"{where}: shard {part.start}, row {row}")
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UnreachableError(f"{where}: cannot be read further: {error}; the same command continues") from error


def _load_dataset(config: DataConfig) -> Any:
    import datasets

    where = f"data.path={config.path}"
    saved = [Path(config.path, name) for name in ("dataset_dict.json", "state.json")]
    try:
        if not any(file.exists() for file in saved):
            split = config.split or "train"
            return datasets.load_dataset(config.path, config.subset, split=split, streaming=config.streaming)
        dataset = datasets.load_from_disk(config.path)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        may_pass = config.streaming and isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise (UnreachableError if may_pass else DataError)(
            f"{where}: cannot load this dataset (data.subset={config.subset}, data.split={config.split or 'train'}): {error}"
        ) from error
    directory = Path(config.path)
    if isinstance(dataset, datasets.DatasetDict):
        is_default = config.split is None and "train" in dataset
        split = "train" if is_default else choose_split(list(dataset), config) or next(iter(dataset))
        dataset, directory = dataset[split], directory / split
    else:
        choose_split([split_name(dataset.split)] if dataset.split else [], config)
    read_state(directory)
    return dataset.to_iterable_dataset() if config.streaming else dataset


def _require_columns(config: DataConfig, columns: list[str], where: str) -> list[str]:
    fields = document_fields(config)
    for name in fields.values():
        if name not in columns:
            setting = next(key for key, value in fields.items() if value == name)
            raise DataError(f"{where}: no column '{name}'; set data.{setting} to one of {sorted(columns)}")
    return columns_to_read(config, columns)


def _batch_rows(config: DataConfig, batch: Any, first_row: int, prefix: str, where: str) -> Rows:
    """Yield the documents of an Arrow table or record batch."""
    import pyarrow

    if config.content is not Content.text:
        for row, record in enumerate(batch.to_pylist(), start=first_row):
            yield _row(config, f"{prefix}{row}", record, f"{where}: row {row}")
        return
    column = batch.column(0)
    try:
        values = column.cast(pyarrow.large_binary()).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{where}: the text column has type {column.type}, not text") from error
    for row, raw in enumerate(values, start=first_row):
        yield Document(f"{prefix}{row}", *decode(raw or b"", "utf-8"))


def _row(config: DataConfig, document_id: str, row: dict[str, Any], where: str, *, is_repaired: bool = False) -> Row:
    try:
        return record_document(config, document_id, row, is_repaired)
    except ValueError as error:
        return BadRow(f"{where}: {error}")
