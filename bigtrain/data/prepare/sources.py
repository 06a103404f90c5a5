"""Documents of a source, in an order that depends on the source alone.

A source is read in parts, so that several processes share the work. Invalid UTF-8 becomes U+FFFD, which is counted, and
a byte-order mark is dropped. Empty and null documents are yielded as empty text, which the caller drops and counts.

A missing path, an unreadable, damaged or binary file, a line that is not a JSON object, and a field that is missing or
not text are a :class:`DataError` that names the file and the line or row. With ``data.on_bad_row=skip`` such a row,
and a file that cannot be read to its end, is left out whole and counted.
"""

import gzip
import hashlib
import io
import json
import os
import sys
import tokenize
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from bigtrain.config import Content, DataConfig, DataSource, OnBad
from bigtrain.data.prepare.files import Part, SourceFile, find_files, open_lines, packing
from bigtrain.data.prepare.formats import SeveralLinesError, foreign_format, foreign_json, parse_object
from bigtrain.data.prepare.records import BadRow, Document, Labels, Rows, decode, record_document
from bigtrain.data.prepare.tables import arrow_rows, csv_rows, dataset_parts, dataset_rows, gettext_rows, parquet_rows
from bigtrain.data.read.dropped import SKIPS, Dropped
from bigtrain.errors import DataError

_PART_BYTES = 8 << 20
_SMALLEST_PIECE_CHARACTERS = 1024
_HEAD_BYTES = 4096
_BLOCK_BYTES = 1 << 20
_PIECE_CHARACTERS = 500
_PACKAGE_BYTES = 120_000


def source_parts(config: DataConfig) -> list[Part]:
    """Return the parts of the source, a few MB each where it can be divided; DataError if it cannot be read."""
    if config.source is DataSource.datasets:
        return dataset_parts(config)
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
    """Yield the documents of one part; ``bad`` counts the rows and files that ``data.on_bad_row=skip`` leaves out."""
    skips = config.on_bad_row is OnBad.skip
    for row in dataset_rows(config, part) if config.source is DataSource.datasets else _file_rows(config, part, skips):
        if isinstance(row, Document):
            yield row
        elif not skips:
            raise DataError(f"{row.problem}; {SKIPS}")
        elif bad is not None:
            bad.add(row.problem, 0)


def _file_rows(config: DataConfig, part: Part, skips: bool) -> Rows:
    read: Callable[[SourceFile, Part, DataConfig], Rows] = {
        DataSource.stdlib: _python_documents,
        DataSource.text: _text_documents,
        DataSource.jsonl: _jsonl_rows,
        DataSource.csv: csv_rows,
        DataSource.gettext: gettext_rows,
        DataSource.parquet: parquet_rows,
        DataSource.arrow: arrow_rows,
    }[config.source]
    for file in part.files:
        may_break = config.source in (DataSource.parquet, DataSource.arrow) or packing(file.path)
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

    Local files enter with name, size and, ``with_times``, modification time; the standard library with the Python
    version; a dataset on the hub with its name only: once prepared it stays as it is, also offline.
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


def _python_documents(file: SourceFile, _part: Part, config: DataConfig) -> Iterator[Document]:
    raw = file.path.read_bytes()
    try:
        text, is_repaired = decode(raw, tokenize.detect_encoding(io.BytesIO(raw).readline)[0])
    except (SyntaxError, LookupError):  # Python's own tests declare encodings that do not exist
        text, is_repaired = decode(raw)
    if config.content is Content.labelled:
        yield from _labelled_pieces(file, text, is_repaired)
    elif config.content is Content.seq2seq:
        yield from _neighbours(file, text, is_repaired)
    else:
        yield Document(file.name, text, is_repaired)


def _labelled_pieces(file: SourceFile, text: str, is_repaired: bool) -> Iterator[Document]:
    """Yield pieces of a module of the standard library, labelled with its package, if that is one of some size."""
    package = file.name.partition("/")[0]
    if package in _large_packages():
        for start, end in _pieces(text, _PIECE_CHARACTERS):
            labels = Labels((package,))
            yield Document(f"{file.name}#{start}", text[start:end], is_repaired, labels=labels, group=file.name)


def _neighbours(file: SourceFile, text: str, is_repaired: bool) -> Iterator[Document]:
    """Yield the pieces of a module in twos: of overlapping pairs one's target would be the other's source."""
    pieces = list(_pieces(text, _PIECE_CHARACTERS))
    for (start, middle), (_, end) in zip(pieces[::2], pieces[1::2], strict=False):
        answers, pair = ((middle - start, end - start),), text[start:end]
        yield Document(f"{file.name}#{start}", pair, is_repaired, answers, group=file.name, is_parted=True)


@cache
def _large_packages() -> frozenset[str]:
    """Return the packages of the standard library with so many bytes of source, its tests among them."""
    sizes: Counter[str] = Counter()
    for file in find_files(DataConfig()).files:
        if "/" in file.name:
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
    label, slash, _ = file.name.partition("/")
    if not slash:
        raise DataError(
            f"{file.path}: lies in no directory below data.path={config.path}; with data.content=labelled the name of that "
            "directory is the label"
        )
    return label


def _jsonl_rows(file: SourceFile, part: Part, config: DataConfig) -> Rows:
    if file.path.stat().st_size == 0:
        if packing(file.path):
            raise DataError(f"{file.path}: empty, not even the header of a compressed file; was it copied to the end?")
        yield Document(file.name, "", False)  # so that it is counted
        return
    with open_lines(file.path) as lines:
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


def row_name(config: DataConfig, document_id: str) -> str:
    """Return where a document is, as people look for it: of JSON lines, file and line."""
    name, _, offset = document_id.rpartition("@")
    if config.source is not DataSource.jsonl or not name:
        return document_id
    path = next(file.path for file in find_files(config).files if file.name == name)
    return f"{name}:{_num_lines(path, int(offset)) + 1}"


def _next_line(lines: io.BufferedReader | gzip.GzipFile, start: int) -> int:
    """Seek to the first line that begins at or after ``start`` and return its position."""
    if start == 0:
        return 0
    lines.seek(start - 1)
    return start - 1 + len(lines.readline())


def _num_lines(path: Path, end: int) -> int:
    with open_lines(path) as lines:
        return sum(lines.read(min(_BLOCK_BYTES, end - at)).count(b"\n") for at in range(0, end, _BLOCK_BYTES))
