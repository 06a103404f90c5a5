"""From a record of a source to a document: plain text, or a conversation of which the answers count."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bigtrain.config import Content, DataConfig, DataSource
from bigtrain.data.prepare.chat import chat_of
from bigtrain.data.prepare.labels import Labels, read_labels, read_words


class Document(NamedTuple):
    """One document of a source."""

    id: str  # unique within the source and the same wherever the source lies: relative file name, ``@byte`` or ``:row``
    text: str  # valid Unicode, possibly empty
    is_repaired: bool  # whether something that is not valid Unicode was replaced
    answers: tuple[tuple[int, int], ...] | None = None
    """Ranges of characters that count in the loss, in order; None: all of them."""
    labels: Labels | None = None
    """What it is labelled with."""
    group: str | None = None
    """Text that decides its split instead of its own: pieces of one file are on one side."""
    is_parted: bool = False
    """Whether what does not count and what does are texts of their own, each with what a tokenizer adds to one."""
    is_templated: bool = False
    """Whether a chat template has written it, with all special tokens: none is added, and what ends it does not count."""


class BadRow(NamedTuple):
    """A row or file that ``data.on_bad_row`` decides about."""

    problem: str  # what is wrong, with file and line or row


Row = Document | BadRow
Rows = Iterator[Row]


def document_fields(config: DataConfig) -> dict[str, str]:
    """Return the fields that a record must have, by the setting that names each."""
    settings = {
        Content.text: ("text_field",),
        Content.chat: ("messages_field",),
        Content.pairs: ("prompt_field", "answer_field"),
        Content.labelled: ("text_field", "label_field"),
        Content.numbers: ("text_field", "label_field"),
        Content.tagged: ("text_field", "label_field"),
        Content.seq2seq: ("source_field", "target_field"),
    }[config.content]
    return {setting: getattr(config, setting) for setting in settings}


def columns_to_read(config: DataConfig, names: list[str]) -> list[str]:
    """Return the columns of a table that are read."""
    columns = list(document_fields(config).values())
    if config.content is Content.chat:
        columns += [
            name for name in chat_of(config.tokenizer, config.chat_template).columns(names) if name not in columns
        ]
    return columns


def record_document(config: DataConfig, document_id: str, record: dict[str, Any], is_repaired: bool) -> Document:
    """Return the document in a record; ValueError if a field is missing or not what it should be.

    A chat is written by its template. A pair is prompt and answer, or source and target, joined, of which the second counts.
    """
    fields = document_fields(config)
    for setting, name in fields.items():
        if name not in record:
            raise ValueError(f"no field '{name}'; set data.{setting} to one of {sorted(record)}")
    if config.content is Content.chat:
        return _chat_document(config, document_id, record, is_repaired)
    if config.content.has_labels:
        return _labelled_document(config, document_id, record, is_repaired)
    text, answers = "", []
    for name in fields.values():
        part, was_repaired = _join_surrogates(_text(record[name], name))
        is_repaired |= was_repaired
        answers = [(len(text), len(text) + len(part))]  # the last is what counts
        if config.content.has_answers and not part:
            return Document(document_id, "", is_repaired, ())
        text += part
    if config.content is Content.text:
        return Document(document_id, text, is_repaired)
    is_seq2seq = config.content is Content.seq2seq
    source = text[: answers[0][0]] if is_seq2seq else None  # what it becomes in the other split would be known
    return Document(document_id, text, is_repaired, tuple(answers), group=source, is_parted=is_seq2seq)


def _labelled_document(config: DataConfig, document_id: str, record: dict[str, Any], is_repaired: bool) -> Document:
    repaired = _repair({name: record[name] for name in (config.text_field, config.label_field)})
    is_repaired |= any(repaired[name] != record[name] for name in repaired)
    value, label = repaired[config.text_field], repaired[config.label_field]
    if config.content is Content.tagged:
        text, labels = read_words(value, label, config.text_field, config.label_field)
    else:
        text, labels = _text(value, config.text_field), read_labels(config.content, label, config.label_field)
    return Document(document_id, text, is_repaired, labels=labels)


def decode(raw: bytes, encoding: str = "utf-8-sig") -> tuple[str, bool]:
    """Return the text and whether invalid bytes were replaced."""
    try:
        return raw.decode(encoding), False
    except UnicodeDecodeError:
        return raw.decode(encoding, errors="replace"), True


def _chat_document(config: DataConfig, document_id: str, record: dict[str, Any], is_repaired: bool) -> Document:
    if record[config.messages_field] is None:
        return Document(document_id, "", is_repaired, ())
    chat = chat_of(config.tokenizer, config.chat_template)
    repaired = _repair(record)
    is_repaired |= repaired != record
    text, answers = chat.write(repaired, config.messages_field, is_table=config.source is not DataSource.jsonl)
    return Document(document_id, text if answers else "", is_repaired, tuple(answers), is_templated=not chat.is_plain)


def _repair(value: Any) -> Any:
    if isinstance(value, str):
        return _join_surrogates(value)[0]
    if isinstance(value, dict):
        return {_repair(key): _repair(item) for key, item in value.items()}
    return [_repair(item) for item in value] if isinstance(value, list) else value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"field '{name}' is {type(value).__name__}, not text")
    return value or ""


def _join_surrogates(text: str) -> tuple[str, bool]:
    """Replace lone surrogates, which JSON escapes can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), True
    return text, False
