"""Rows of tables as documents: csv, Parquet, Arrow, and data sets of the datasets library."""

import csv
import io
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from bigtrain.config import Content, DataConfig
from bigtrain.data.prepare.chat_forms import advice_without_text
from bigtrain.data.prepare.files import Part, SourceFile, choose_split, open_lines, read_state, split_name
from bigtrain.data.prepare.formats import foreign_format
from bigtrain.data.prepare.records import (
    BadRow,
    Document,
    Row,
    Rows,
    columns_to_read,
    decode,
    document_fields,
    record_document,
)
from bigtrain.errors import DataError, UnreachableError, some

_ROWS_PER_READ = 1024
_PART_ROWS = 8192
_HEAD_BYTES = 4096
_LARGEST_CELL = 2**31 - 1


def csv_rows(file: SourceFile, _part: Part, config: DataConfig) -> Rows:
    """Yield the rows of a csv or tsv file with a header."""
    with open_lines(file.path) as lines:
        if what := foreign_format(lines.peek(_HEAD_BYTES)[:_HEAD_BYTES]):
            raise DataError(f"{file.path}: {what}, not text in UTF-8 with a header and a row per line")
        text = io.TextIOWrapper(lines, encoding="utf-8-sig", errors="replace", newline="")
        rows = csv_lines(text, file.path)
        _, columns = next(rows)
        _require_columns(config, columns, str(file.path))
        for number, (line, values) in enumerate(rows):
            yield _csv_row(config, f"{file.name}:{number}", columns, values, f"{file.path}:{line}")


def csv_lines(text: TextIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of each line of csv or tsv that is not blank, the header first; DataError if damaged."""
    is_tsv = re.sub(r"\.(gz|zst)$", "", path.name.lower()).endswith(".tsv")
    csv.field_size_limit(_LARGEST_CELL)  # of the whole program
    reader = csv.reader(text, delimiter="\t" if is_tsv else ",", strict=True)
    try:
        columns = next(reader, [])
        if twice := [name for name, count in Counter(columns).items() if count > 1]:
            raise DataError(f"{path}: the header names {some(twice, 8)} twice; rename one of the columns")
        yield reader.line_num, columns
        yield from ((reader.line_num, values) for values in reader if values)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from error


def _csv_row(config: DataConfig, document_id: str, columns: list[str], values: list[str], where: str) -> Row:
    try:
        row: dict[str, Any] = csv_record(columns, values, where)
    except DataError as error:
        return BadRow(str(error))
    if config.content is Content.numbers:
        try:
            row[config.label_field] = float(row[config.label_field])
        except ValueError:
            return BadRow(f"{where}: {config.label_field} is {row[config.label_field]!r}, which is no number")
    return _row(config, document_id, row, where, is_repaired=any("\N{REPLACEMENT CHARACTER}" in v for v in values))


def csv_record(columns: list[str], values: list[str], where: str) -> dict[str, str]:
    """Return the cells of a line by their columns; DataError if there are more or fewer."""
    if len(values) != len(columns):
        raise DataError(f"{where}: {len(values)} columns, but the header has {len(columns)}")
    return dict(zip(columns, values, strict=True))


def gettext_rows(file: SourceFile, _part: Part, config: DataConfig) -> Rows:
    """Yield the messages of a compiled catalogue with their translations, without plural forms."""
    raw = file.path.read_bytes()
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(raw[:4])
    try:
        _, num_messages, sources_at, targets_at = struct.unpack_from(f"{order}4I", raw, 4)
        for number in range(num_messages):
            places = (struct.unpack_from(f"{order}2I", raw, at + 8 * number) for at in (sources_at, targets_at))
            source, target = (raw[begin : begin + length] for length, begin in places)
            if source and b"\0" not in source:
                pair = {config.source_field: source.rpartition(b"\4")[2].decode(), config.target_field: target.decode()}
                yield _row(config, f"{file.name}:{number}", pair, f"{file.path}: message {number}")
    except (struct.error, UnicodeDecodeError) as error:
        raise DataError(f"{file.path}: no compiled catalogue of gettext in UTF-8: {error}") from error


def parquet_rows(file: SourceFile, part: Part, config: DataConfig) -> Rows:
    """Yield the rows of a Parquet file, or of some of its row groups."""
    from pyarrow import parquet

    with parquet.ParquetFile(file.path) as table:
        fields = _require_columns(config, table.schema_arrow.names, str(file.path))
        groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
        first_row = part.first_row
        for batch in table.iter_batches(batch_size=_ROWS_PER_READ, columns=fields, row_groups=list(groups)):
            yield from _batch_rows(config, batch, first_row, f"{file.name}:", str(file.path))
            first_row += len(batch)


def arrow_rows(file: SourceFile, _part: Part, config: DataConfig) -> Rows:
    """Yield the rows of an Arrow file or stream."""
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


def dataset_parts(config: DataConfig) -> list[Part]:
    """Return the parts of a data set of the datasets library."""
    dataset = _load_dataset(config)
    if config.streaming:
        return [Part(start=shard, stop=shard + 1) for shard in range(dataset.num_shards)]
    return [Part(start=row, stop=min(row + _PART_ROWS, len(dataset))) for row in range(0, len(dataset), _PART_ROWS)]


def dataset_rows(config: DataConfig, part: Part) -> Rows:
    """Yield the rows of a part of such a data set."""
    where = f"data.path={config.path}"
    dataset = _load_dataset(config)
    if config.streaming:
        import datasets

        try:
            for row, record in enumerate(dataset.shard(dataset.num_shards, part.start)):
                yield _row(config, f"{part.start}:{row}", record, f"{where}: shard {part.start}, row {row}")
        except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise UnreachableError(f"{where}: cannot be read further: {error}; the same command continues") from error
        return
    rows = dataset.select_columns(_require_columns(config, dataset.column_names, where)).with_format("arrow")
    for first_row in range(part.start, part.stop, _ROWS_PER_READ):
        table = rows[first_row : min(first_row + _ROWS_PER_READ, part.stop)]
        yield from _batch_rows(config, table, first_row, "", where)


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
    fields = {} if config.content is Content.chat else document_fields(config)
    for name in fields.values():
        if name not in columns:
            setting = next(key for key, value in fields.items() if value == name)
            told = advice_without_text(columns, config.messages_field) if config.content is Content.text else ""
            if len(columns) == 1 and not told:
                told = "; columns of csv are separated by commas, of tsv by tabs"
            raise DataError(f"{where}: no column '{name}'; set data.{setting} to one of {sorted(columns)}{told}")
    try:
        return columns_to_read(config, columns)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _batch_rows(config: DataConfig, batch: Any, first_row: int, prefix: str, where: str) -> Rows:
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
