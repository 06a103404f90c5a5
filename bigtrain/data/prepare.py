"""From a source to a prepared corpus: survey, tokenizer, tokens, index, rename.

The directory's name follows from the settings and the source, so preparing again finds what is
there. Everything is written into a hidden directory beside it, which becomes visible by one
rename when it is complete: a kill leaves nothing that could be mistaken for a corpus, and of two
processes that prepare the same one the later adopts the result of the earlier.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

from bigtrain.config import DataConfig, DataSource, OnBadShard, Verify
from bigtrain.data.corpus import Corpus, require_vocab
from bigtrain.data.index import (
    FORMAT,
    CorpusIndex,
    TokenizerRecord,
    read_index,
    record_file,
    verify_hashes,
    write_index,
)
from bigtrain.data.remote import (
    RemoteDirectory,
    ShardCache,
    fetch_index,
    index_directory,
    is_url,
    read_remote_index,
)
from bigtrain.data.sources import iterate_documents, source_fingerprint
from bigtrain.data.survey import Survey, cut, document_hash, survey_documents
from bigtrain.data.tokenizer import TOKENIZER_FILE, BuiltTokenizer, build_tokenizer, num_ids
from bigtrain.data.writer import SplitWriter, cross_entropy_nats, token_dtype
from bigtrain.errors import DataError
from bigtrain.log import get_logger

_BATCH_CHARACTERS = 1 << 22
_LEFTOVER_SECONDS = 24 * 3600
_REPORT_SECONDS = 10.0


def prepared_directory(config: DataConfig) -> Path:
    """Return where the corpus of ``config`` is, or will be once it is prepared.

    Raises:
        DataError: the source is missing.
    """
    if config.source is not DataSource.prepared:
        return _locate(config).directory
    return index_directory(config.path, _cache(config)) if is_url(config.path) else Path(config.path)


def prepare(config: DataConfig, *, progress: bool) -> Path:
    """Tokenise the configured source into ``<data.root>/<name>``; when it is there already, only check it.

    Args:
        config: Source, tokenizer and validation fraction; any source but ``synthetic``.
        progress: Show a bar when standard error is a terminal; otherwise the log gets a line now and then.

    Returns:
        The directory, the same that :func:`prepared_directory` names.

    Raises:
        DataError: the source is missing, damaged or too small, the tokenizer is unsuitable, the
            directory cannot be written, or a corpus of that name is damaged.
    """
    if config.source is DataSource.prepared:
        return fetch_index(config.path, _cache(config)) if is_url(config.path) else _check(Path(config.path), config)
    target = _locate(config)
    if target.directory.exists():
        return _adopt(target, config)
    work = target.directory.with_name(f".{target.directory.name}.{uuid.uuid4().hex[:8]}")
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.directory)
        work.mkdir()
        write_index(work, _fill(work, config, target, progress))
        _publish(work, target.directory)
    except OSError as error:
        raise DataError(f"{target.directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _adopt(target, config)


def open_corpus(config: DataConfig, *, vocab_size: int) -> Corpus:
    """Open what :func:`prepare` has prepared, on any rank, for a model with ``vocab_size`` embeddings.

    Raises:
        DataError: not prepared, damaged, cannot be reached, or the tokenizer has more than ``vocab_size`` ids.
    """
    skips = config.on_bad_shard is OnBadShard.skip
    if not (config.source is DataSource.prepared and is_url(config.path)):
        return Corpus.open(prepared_directory(config), vocab_size=vocab_size, skip_bad_shards=skips)
    remote = RemoteDirectory(config.path)
    index = read_remote_index(remote)
    require_vocab(index, vocab_size, config.path)
    corpus = Corpus(ShardCache(remote, _cache(config), int(config.cache_gib * 2**30)), index, skips)
    for split in (corpus.split("train"), corpus.split("validation")):
        if split.cache_shards < 2:
            raise DataError(f"data.cache_gib={config.cache_gib}: too small for two shards of {config.path}")
    return corpus


# Where


class _Target(NamedTuple):
    directory: Path
    identity: str
    source_fingerprint: str


def _locate(config: DataConfig) -> _Target:
    """Derive the directory from everything that decides its content."""
    fingerprint = source_fingerprint(config)
    has_field = config.source in (DataSource.jsonl, DataSource.parquet, DataSource.datasets)
    facts = {
        "format": FORMAT,
        "source": config.source.name,
        "source_fingerprint": fingerprint,
        "text_field": config.text_field if has_field else None,
        "validation_fraction": config.validation_fraction,
        "shard_tokens": config.shard_tokens,
        "tokenizer": _tokenizer_facts(config),
    }
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    vocab_size = str(config.tokenizer_vocab_size) if config.tokenizer == "bpe" else ""
    parts = [config.source.name, _slug(config.tokenizer) + vocab_size, identity[:8]]
    if config.source is not DataSource.stdlib:
        parts.insert(1, _slug(config.path))
    return _Target(Path(config.root, "-".join(parts)), identity, fingerprint)


def _tokenizer_facts(config: DataConfig) -> object:
    if config.tokenizer == "bpe":
        return ["bpe", config.tokenizer_vocab_size]
    path = Path(config.tokenizer)
    if not path.is_dir():
        return config.tokenizer
    parts = [file for file in path.iterdir() if re.search("token|vocab|merges", file.name)]
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in parts)


def _slug(path: str) -> str:
    """Return the last part of a path that has no wildcard, as a file name."""
    plain = [part for part in PurePath(path).parts if not glob.has_magic(part)] or ["files"]
    return re.sub(r"[^A-Za-z0-9]+", "-", plain[-1]).strip("-")[:40]


def _cache(config: DataConfig) -> Path:
    return Path(config.cache_directory or Path(config.root, "cache"))


def _adopt(target: _Target, config: DataConfig) -> Path:
    if read_index(target.directory, check_sizes=False).identity != target.identity:
        raise DataError(f"{target.directory}: made from another source or with other settings; remove it")
    return _check(target.directory, config)


def _check(directory: Path, config: DataConfig) -> Path:
    """Compare a local corpus with its index, so far as its shards are not looked at one by one in the run."""
    if config.on_bad_shard is OnBadShard.skip:
        read_index(directory, check_sizes=False)
    elif config.verify is Verify.full:
        verify_hashes(directory)
    else:
        read_index(directory, check_sizes=config.verify is not Verify.off)
    return directory


def _remove_leftovers(directory: Path) -> None:
    """Remove what killed preparations left; one that still runs has written something within a day."""
    for leftover in directory.parent.glob(f".{glob.escape(directory.name)}.*"):
        newest = max((file.stat().st_mtime for file in leftover.iterdir()), default=leftover.stat().st_mtime)
        if time.time() - newest > _LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _publish(work: Path, directory: Path) -> None:
    """Make the finished ``work`` appear as ``directory``, durably and at once."""
    for path in (*work.iterdir(), work):
        _fsync(path)
    try:
        work.rename(directory)
    except OSError:
        if not directory.exists():
            raise
        get_logger().info("%s was prepared by another process at the same time; using that", directory)
    _fsync(directory.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What


@dataclass(frozen=True, slots=True)
class _Piece:
    document_id: str
    text: str
    is_last: bool


def _fill(work: Path, config: DataConfig, target: _Target, progress: bool) -> CorpusIndex:
    """Write tokenizer and tokens into ``work`` and return their index."""
    with _reporter("reading", None, progress) as advance:
        survey = survey_documents(config, advance)
    _report_survey(survey)
    built = build_tokenizer(config, survey.bpe_sample)
    vocab_size = num_ids(built.tokenizer)
    built.tokenizer.save(str(work / TOKENIZER_FILE))
    train, validation = (
        SplitWriter(work, name, vocab_size, built.eos_id, shard_tokens=config.shard_tokens)
        for name in ("train", "validation")
    )
    with _reporter("tokenising", survey.num_text_bytes, progress) as advance:
        _tokenise(config, built, survey.validation_bound, train, validation, advance)
    index = CorpusIndex(
        format=FORMAT,
        identity=target.identity,
        source=config.source.name if config.source is DataSource.stdlib else f"{config.source.name} {config.path}",
        source_fingerprint=target.source_fingerprint,
        dtype=token_dtype(vocab_size).name,
        num_empty_documents=survey.num_empty_documents,
        num_repaired_documents=survey.num_repaired_documents,
        tokenizer=TokenizerRecord(
            name=config.tokenizer,
            file=record_file(work / TOKENIZER_FILE),
            vocab_size=vocab_size,
            eos_id=built.eos_id,
        ),
        train=train.record(cross_entropy_nats(train.counts, train.counts)),
        validation=validation.record(cross_entropy_nats(validation.counts, train.counts + 1)),
    )
    if index.train.num_documents + index.validation.num_documents != survey.num_documents:
        raise DataError(f"data={index.source}: the source changed while it was being prepared; try again")
    return index


def _tokenise(
    config: DataConfig,
    built: BuiltTokenizer,
    validation_bound: int,
    train: SplitWriter,
    validation: SplitWriter,
    advance: Callable[[int], None],
) -> None:
    """Encode all documents, each batch on all cores (threads of the tokenizers library)."""
    for batch in _batches(config):
        encodings = built.tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            writer = validation if document_hash(piece.document_id) < validation_bound else train
            num_bytes = len(piece.text.encode())
            writer.append(encoding.ids, num_bytes)
            if piece.is_last:
                writer.end_document()
            advance(num_bytes)
    train.finish()
    validation.finish()


def _batches(config: DataConfig) -> Iterator[list[_Piece]]:
    """Yield the documents that are not empty, in pieces, about 4 M characters at a time."""
    batch: list[_Piece] = []
    num_characters = 0
    for document in iterate_documents(config):
        pieces = list(cut(document.text)) if document.text else []
        for number, text in enumerate(pieces, start=1):
            batch.append(_Piece(document.id, text, is_last=number == len(pieces)))
            num_characters += len(text)
            if num_characters >= _BATCH_CHARACTERS:
                yield batch
                batch, num_characters = [], 0
    yield batch


# What people see


def _report_survey(survey: Survey) -> None:
    remarks = [f"{survey.num_documents} documents, {survey.num_text_bytes / 1e6:.1f} MB of text"]
    if survey.num_empty_documents:
        remarks.append(f"{survey.num_empty_documents} empty documents left out")
    if survey.num_repaired_documents:
        remarks.append(f"invalid UTF-8 in {survey.num_repaired_documents} documents replaced by U+FFFD")
    get_logger().info("; ".join(remarks))


@contextmanager
def _reporter(title: str, total_bytes: int | None, progress: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that is told each number of bytes done and shows how far the work is."""
    if progress and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total_bytes)
            yield lambda num_bytes: bar.advance(task, num_bytes)
    else:
        yield _Ticker(title, total_bytes).advance


class _Ticker:
    """Progress as a line of the log every ten seconds."""

    def __init__(self, title: str, total_bytes: int | None) -> None:
        self._title = title
        self._total = f" of {total_bytes / 1e6:.0f}" if total_bytes else ""
        self._done_bytes = 0
        self._due = time.monotonic() + _REPORT_SECONDS

    def advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if time.monotonic() >= self._due:
            get_logger().info("%s: %.0f%s MB", self._title, self._done_bytes / 1e6, self._total)
            self._due = time.monotonic() + _REPORT_SECONDS
