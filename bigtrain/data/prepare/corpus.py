"""From a source to a prepared corpus: survey, tokenizer, tokens, shards, index, rename.

The directory's name follows from settings and source, so preparing again finds an existing corpus. It is written under
a hidden name and renamed when complete; parts that were finished before a kill are reused. A file lock keeps processes
from preparing the same corpus at once.
"""

import dataclasses
import glob
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from bigtrain.config import WITHOUT_TEXT, Content, DataConfig, DataSource, OnBad, Verify, component_data, is_live
from bigtrain.config.convert import to_dict
from bigtrain.data.prepare.chat import build_coding, coding_hash, encoding_facts, keep_chat
from bigtrain.data.prepare.encoder import agrees, fast_encoder, slow_encoder
from bigtrain.data.prepare.files import LeftOut, Part, find_files, tell_left_out
from bigtrain.data.prepare.images import prepare_images
from bigtrain.data.prepare.live import PLAN_FILE, write_plan
from bigtrain.data.prepare.records import Document, document_fields
from bigtrain.data.prepare.sources import read_part, row_name, source_fingerprint, source_parts
from bigtrain.data.prepare.survey import Piece, Survey, combine, kept_documents, sample_texts, survey_part
from bigtrain.data.prepare.token_files import fill_tokens
from bigtrain.data.prepare.tokenise import (
    PARTS_DIRECTORY,
    SPLIT_BY,
    Coding,
    cross_entropy_nats,
    labels_of_shards,
    part_directory,
    plan_shards,
    token_dtype,
    tokenise_part,
    write_shard,
)
from bigtrain.data.read.cache import cache_directory
from bigtrain.data.read.dropped import tell_bad_rows
from bigtrain.data.read.index import (
    FORMAT,
    SPLITS,
    CorpusIndex,
    LabelKind,
    LiveRecord,
    ShardRecord,
    SplitRecord,
    TokenizerRecord,
    read_index,
    record_file,
    verify_hashes,
    write_index,
)
from bigtrain.data.read.remote import fetch_index, is_url
from bigtrain.data.read.tokenizer import (
    TOKENIZER_FILE,
    BuiltTokenizer,
    keep_published,
    num_ids,
    tokenizer_facts,
    tokenizer_name,
)
from bigtrain.data.read.workers import Run, workers
from bigtrain.errors import DataError, counted, some
from bigtrain.files import make_directory
from bigtrain.log import get_logger, reporter
from bigtrain.processes import num_usable_cpus

REPORT_FILE = "report.json"
_COMPARED_CHARACTERS = 1 << 18


def prepare(config: DataConfig, *, progress: bool) -> Path:
    """Tokenise the source, any of text, into ``<data.root>/<name>``, or check what is there; return the directory.

    Of a source that is tokenised while training only tokenizer and parts are written. ``progress`` shows a bar on a
    terminal, else a log line now and then. DataError if something cannot be used, or an existing corpus is damaged.
    """
    if config.source is DataSource.prepared:
        if is_url(config.path):
            return fetch_index(config.path, cache_directory(config))
        return _check(Path(config.path), config)
    target = _locate(config)
    fill = _fill_live if is_live(config) else partial(_fill, progress=progress)
    if config.source is DataSource.tokens:
        fill = partial(_fill_tokens, progress=progress)
    make_directory(target.directory, lambda work: write_index(work, fill(work, config, target)))
    return _check(target.directory, config, target.identity)


def prepare_components(data: DataConfig, *, progress: bool) -> Iterator[tuple[str, Path]]:
    """Prepare all components of a mixture, or the one data set, with one ``bpe``; yield name and directory of each."""
    texts = {name: part for name, part in component_data(data).items() if part.source not in WITHOUT_TEXT}
    sources = [part for part in texts.values() if part.source is not DataSource.prepared]
    if data.tokenizer == "bpe" and len(sources) > 1:
        directory = str(_shared_bpe(sources, progress))
        texts = {name: dataclasses.replace(part, tokenizer=directory) for name, part in texts.items()}
    for name, part in texts.items():
        yield name, prepare(part, progress=progress)
    for name, part in component_data(data).items():
        if part.source is DataSource.images:
            yield name, prepare_images(part, progress=progress)


class _Target(NamedTuple):
    directory: Path
    identity: str
    source_fingerprint: str


def _locate(config: DataConfig) -> _Target:
    """Derive the directory from everything that decides its content."""
    fingerprint = source_fingerprint(config)
    has_fields = config.source not in (DataSource.stdlib, DataSource.text)
    facts = {
        "format": FORMAT,
        "source": config.source.name,
        "source_fingerprint": fingerprint,
        "content": [config.content.name, document_fields(config)] if has_fields or config.content.has_labels else None,
        "streaming": config.streaming and config.source is DataSource.datasets,
        "filters": to_dict(config.filters),
        "validation": [SPLIT_BY, config.validation_fraction],
        "shard_tokens": config.shard_tokens,
        "tokenizer": tokenizer_facts(config),
    } | ({"on_the_fly": True} if is_live(config) else {})
    facts |= ({"on_bad_row": "skip"} if config.on_bad_row is OnBad.skip else {}) | encoding_facts(config)
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    vocab_size = str(config.tokenizer_vocab_size) if config.tokenizer == "bpe" else ""
    name = _slug(tokenizer_name(config)) + vocab_size
    parts = [*["live"] * is_live(config), config.source.name, name, identity[:8]]
    if config.source is not DataSource.stdlib:
        parts.insert(-2, _slug(config.path))
    return _Target(Path(config.root, "-".join(parts)), identity, fingerprint)


def _slug(path: str) -> str:
    """Return the last part of a path without wildcards, as a file name."""
    plain = [part for part in PurePath(path).parts if not glob.has_magic(part)] or ["files"]
    return re.sub(r"[^A-Za-z0-9]+", "-", plain[-1]).strip("-")[:40]


def _check(directory: Path, config: DataConfig, identity: str | None = None) -> Path:
    """Compare a local corpus with its index; shards that the run verifies one by one are left to it."""
    verify = Verify.off if config.on_bad_shard is OnBad.skip else config.verify
    index = read_index(directory, check_sizes=verify is not Verify.off)
    if identity not in (None, index.identity):
        raise DataError(f"{directory}: made from another source or with other settings; remove it")
    if verify is Verify.full:
        verify_hashes(directory, index)
    return directory


def _fill(work: Path, config: DataConfig, target: _Target, progress: bool) -> CorpusIndex:
    left_out = _report_files(config)
    given, config = config, keep_chat(config, work)
    parts = source_parts(config)
    with workers(_num_processes(config, parts)) as run:
        survey = _survey(config, parts, progress, run)
        _report_survey(survey, config.content)
        built = build_coding(config, _read_sample(config, parts, survey, run))
        index = _begin(work, given, target, built)
        _begin_parts(work, parts, index.tokenizer.file.xxh3 + coding_hash(config, built))
        with reporter("tokenising", survey.num_text_bytes, progress) as advance:
            ends = [kept_documents(config, parts[i], survey.kept[i]) for i in (0, -1)]
            is_fast = _is_fast_exact(config, built, ends)
            coding = Coding(is_fast, built.eos_id, survey.validation_bound, built.adds_special, built.reads_special)
            if survey.labels and survey.labels.kind is LabelKind.per_token:
                coding = coding._replace(label_names=tuple(survey.labels.names))
            chosen = enumerate(zip(parts, survey.kept, strict=True))
            tasks = ((config, part, i, kept, coding, survey.labels, work) for i, (part, kept) in chosen)
            for text_bytes in run(tokenise_part, tasks):
                advance(text_bytes)
        index.labels = survey.labels
        train, train_counts = _join_split(work, "train", len(parts), index, config, run)
        validation, validation_counts = _join_split(work, "validation", len(parts), index, config, run)
    train.unigram_nats_per_token = cross_entropy_nats(train_counts, train_counts)
    if validation.num_documents:
        validation.unigram_nats_per_token = cross_entropy_nats(validation_counts, train_counts + 1)
    shutil.rmtree(work / PARTS_DIRECTORY)
    _write_report(work, survey, left_out, train, validation)
    return dataclasses.replace(
        index,
        num_empty_documents=survey.empty.documents,
        num_repaired_documents=survey.num_repaired,
        train=train,
        validation=validation,
    )


def _fill_live(work: Path, config: DataConfig, target: _Target) -> CorpusIndex:
    """Write tokenizer and plan of a source that is tokenised while training, and return their index."""
    _report_files(config)
    parts = source_parts(config)
    if not parts:
        raise DataError(f"data={config.source.name} data.path={config.path}: has no documents")
    given, config = config, keep_chat(config, work)
    # Of more parts than two, the reader of the first window reports that there is no text.
    first = next(read_part(config, parts[0]), None)
    if first and first.form:
        get_logger().info(f"data.path={config.path}: its first chat is read as {first.form}")
    if len(parts) < 3 and not any(document.text for part in parts for document in read_part(config, part)):
        what = "an answer that counts" if config.content.has_answers else "text"
        raise DataError(f"data={config.source.name} data.path={config.path}: none of its documents has {what}")
    built = build_coding(config, ())
    index = _begin(work, given, target, built)
    is_fast = _is_fast_exact(config, built, [read_part(config, parts[i]) for i in (0, -1)])
    fingerprint = write_plan(work, config, parts, index.tokenizer.file.xxh3 + coding_hash(config, built), is_fast)
    return dataclasses.replace(index, live=LiveRecord(plan=record_file(work / PLAN_FILE), fingerprint=fingerprint))


def _fill_tokens(work: Path, config: DataConfig, target: _Target, progress: bool) -> CorpusIndex:
    """Write what describes ids that lie elsewhere, and return their index."""
    _report_files(config)
    index = _begin(work, config, target, build_coding(config, ()))
    num_bytes = sum(file.path.stat().st_size for file in find_files(config).files)
    with reporter("reading ids", num_bytes, progress) as advance:
        fill_tokens(work, config, index, advance)
    return index


def _begin(work: Path, config: DataConfig, target: _Target, built: BuiltTokenizer) -> CorpusIndex:
    (work / TOKENIZER_FILE).write_text(built.tokenizer.to_str(pretty=True), encoding="utf-8")
    published = keep_published(config.tokenizer, work, config.chat_template)
    vocab_size = num_ids(built.tokenizer)
    nothing = SplitRecord(shards=[], num_tokens=0, num_documents=0, num_text_bytes=0, unigram_nats_per_token=0.0)
    return CorpusIndex(
        format=FORMAT,
        identity=target.identity,
        source=config.source.name if config.source is DataSource.stdlib else f"{config.source.name} {config.path}",
        source_fingerprint=target.source_fingerprint,
        dtype=token_dtype(vocab_size).name,
        num_empty_documents=0,
        num_repaired_documents=0,
        tokenizer=TokenizerRecord(
            name=tokenizer_name(config),
            facts=json.dumps(tokenizer_facts(config)) if published else None,
            file=record_file(work / TOKENIZER_FILE),
            vocab_size=vocab_size,
            eos_id=built.eos_id,
            adds_special=built.adds_special,
            reads_special=built.reads_special,
            published=published,
        ),
        train=nothing,
        validation=nothing,
    )


def _num_processes(config: DataConfig, parts: list[Part]) -> int:
    return min(config.prepare_processes or num_usable_cpus(), len(parts))


def _survey(config: DataConfig, parts: list[Part], progress: bool, run: Run) -> Survey:
    with reporter("reading", None, progress) as advance:
        survey = combine(config, run(survey_part, ((config, part) for part in parts)), advance)
    for dropped in (survey.empty, survey.empty_answers, *survey.dropped.values()):
        dropped.examples = [row_name(config, example) for example in dropped.examples]
    return survey


def _shared_bpe(sources: list[DataConfig], progress: bool) -> Path:
    targets = [_locate(config) for config in sources]
    identity = hashlib.sha256(" ".join(target.identity for target in targets).encode()).hexdigest()
    directory = Path(sources[0].root, f"tokenizer-bpe{sources[0].tokenizer_vocab_size}-{identity[:8]}")

    def fill(work: Path) -> None:
        texts = []
        for config in sources:
            parts = source_parts(config)
            with workers(_num_processes(config, parts)) as run:
                texts += _read_sample(config, parts, _survey(config, parts, progress, run), run)
        write_index(work, _begin(work, sources[0], targets[0], build_coding(sources[0], texts)))

    make_directory(directory, fill)
    return directory


def _read_sample(config: DataConfig, parts: list[Part], survey: Survey, run: Run) -> list[str]:
    wanted: dict[int, list[Piece]] = {}
    for piece in survey.bpe_sample:
        wanted.setdefault(piece.part, []).append(piece)
    tasks = ((config, parts[number], survey.kept[number], pieces) for number, pieces in wanted.items())
    return list(chain.from_iterable(run(sample_texts, tasks)))


def _begin_parts(work: Path, parts: list[Part], tokenizer_hash: str) -> None:
    """Discard tokens of an earlier preparation from other parts or another tokenizer."""
    basis = work / PARTS_DIRECTORY / hashlib.sha256(f"{parts} {tokenizer_hash}".encode()).hexdigest()
    if not basis.exists():
        shutil.rmtree(work / PARTS_DIRECTORY, ignore_errors=True)
        basis.parent.mkdir()
        basis.touch()


def _is_fast_exact(config: DataConfig, built: BuiltTokenizer, ends: list[Iterator[Document]]) -> bool:
    """Return whether the fast encoder gives the same ids, tried on both ends of this corpus."""
    fast, slow = (build(built.tokenizer, adds_special=built.adds_special) for build in (fast_encoder, slow_encoder))
    if fast is None:
        return False

    def beginnings() -> Iterator[str]:
        for documents in ends:
            num_left = _COMPARED_CHARACTERS
            while num_left > 0 and (document := next(documents, None)):
                yield document.text[:num_left]
                num_left -= len(document.text)

    if agrees(fast, slow, beginnings()):
        return True
    get_logger().warning("data.tokenizer=%s: tiktoken gives other ids, so the slower library is used", config.tokenizer)
    return False


def _join_split(
    work: Path, split: str, num_parts: int, index: CorpusIndex, config: DataConfig, run: Run
) -> tuple[SplitRecord, np.ndarray]:
    """Write the shards of a split; return its record, without entropy, and token counts."""
    directories = [part_directory(work, number) for number in range(num_parts)]
    lengths = [np.load(directory / f"{split}.lengths.npy") for directory in directories]
    has_counted = any((directory / f"{split}.counted").exists() for directory in directories)
    plans = plan_shards(split, lengths, config.shard_tokens)
    labels, vocab_size = labels_of_shards(work, plans, split, num_parts, index.labels), index.tokenizer.vocab_size
    tasks = ((work, plan, vocab_size, has_counted, part) for plan, part in zip(plans, labels, strict=True))
    counts, shards = np.zeros(vocab_size, dtype=np.int64), list[ShardRecord]()
    for shard, shard_counts in run(write_shard, tasks):
        shards.append(shard)
        counts += shard_counts
    record = SplitRecord(
        shards=shards,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=sum(shard.num_documents for shard in shards),
        num_text_bytes=sum(int(np.load(path / "text_bytes.npy")[SPLITS.index(split)]) for path in directories),
        unigram_nats_per_token=0.0,
    )
    return record, counts


def _write_report(work: Path, survey: Survey, left_out: LeftOut, train: SplitRecord, validation: SplitRecord) -> None:
    report = {
        "documents": survey.num_documents,
        "text_bytes": survey.num_text_bytes,
        "unique_share": survey.unique_share,
        "train_tokens": train.num_tokens,
        "validation_tokens": validation.num_tokens,
        "empty_documents": survey.empty.documents,
        "repaired_documents": survey.num_repaired,
        "dropped": {reason: dataclasses.asdict(dropped) for reason, dropped in survey.dropped.items()},
    }
    report |= {"forms": survey.forms} if survey.forms else {}
    report |= {"files_left_out": left_out} if left_out else {}
    if survey.empty_answers.documents:
        report |= {"empty_answers": dataclasses.asdict(survey.empty_answers)}
    if bad := survey.bad.documents:
        report |= {"bad_rows": {"count": bad, "examples": survey.bad.examples}}
    (work / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _report_survey(survey: Survey, content: Content) -> None:
    remarks = [f"{counted(survey.num_documents, 'document')}, {survey.num_text_bytes / 1e6:.1f} MB of text"]
    remarks += [f"{number} read as {form}" for form, number in survey.forms.items()]
    if num_empty := survey.empty.documents:
        empty = counted(num_empty, "empty document")
        if content.has_answers:
            empty = f"{counted(num_empty, 'document')} without an answer that counts"
        remarks.append(f"{empty} left out, such as {survey.empty.examples[0]}")
    if survey.num_repaired:
        remarks.append(f"invalid UTF-8 in {counted(survey.num_repaired, 'document')} replaced by U+FFFD")
    if survey.labels and survey.labels.names:
        remarks.append(f"{counted(survey.labels.size, 'label')}: {some(survey.labels.names, 12)}")
    remarks += [f"{reason}: {dropped.documents} left out" for reason, dropped in survey.dropped.items()]
    get_logger().info("; ".join(remarks))
    if survey.bad.documents:
        get_logger().warning(tell_bad_rows(survey.bad))
    if num_empty := survey.empty_answers.documents:
        get_logger().warning(
            f"{counted(num_empty, 'chat')} with an empty answer that counts, such as {survey.empty_answers.examples[0]}: only "
            "what ends it is learnt; give it weight 0, or leave the chat out"
        )


def _report_files(config: DataConfig) -> LeftOut:
    """Warn of files that ``data.path`` leads to but that are not read, and return them."""
    if config.source is DataSource.datasets:  # which reports itself what it reads
        return {}
    left_out = find_files(config).left_out
    if left_out:
        get_logger().warning(f"data.path={config.path}: not read: {tell_left_out(left_out)}")
    return left_out
