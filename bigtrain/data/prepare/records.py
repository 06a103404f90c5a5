"""From a record of a source to a document: plain text, or a conversation of which the answers count."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import Content, DataConfig, DataSource, TrainOn
from bigtrain.data.prepare.chat import PAIR_FIELDS, RATED_FIELDS, chat_of, has_empty_answer
from bigtrain.data.prepare.chat_forms import advice_without_text, form_of, read_row, without_null
from bigtrain.data.read.index import LabelKind, LabelRecord

MOST_LABELS = 100_000
NOT_FIRST = -100  # label of tokens that continue a word, and of those that a tokenizer adds: does not count


class Labels(NamedTuple):
    """What a document is labelled with."""

    names: tuple[str, ...] = ()  # of its one label, its several labels, or of each of its words
    numbers: tuple[float, ...] = ()  # instead of names
    is_list: bool = False  # whether it may have several labels, or none
    words: tuple[tuple[int, int], ...] = ()  # range of characters of each word, if each has a label


def read_labels(content: Content, value: Any, field: str) -> Labels:
    """Return the labels in a field of a record; ValueError if it holds something else."""
    if value in (None, ""):
        raise ValueError(f"field '{field}' is empty: a document without a label")
    if content is Content.numbers:
        numbers = value if isinstance(value, list | tuple) else [value]
        if not numbers or not all(_is_number(number) for number in numbers):
            raise ValueError(
                f"field '{field}' is {_quoted(value)}: data.content=numbers needs a number, or a list of them"
            )
        return Labels(numbers=tuple(map(float, numbers)))
    if isinstance(value, list | tuple):
        return Labels(tuple(_name(item, field) for item in value), is_list=True)
    return Labels((_name(value, field),))


def read_words(words: Any, tags: Any, text_field: str, label_field: str) -> tuple[str, Labels]:
    """Return the text of words, joined by spaces, and the label of each; ValueError if these are no such lists."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"field '{text_field}' is {_quoted(words)}: data.content=tagged needs a list of words")
    if not isinstance(tags, list) or len(tags) != len(words):
        what = f"{len(tags)} labels" if isinstance(tags, list) else _quoted(tags)
        raise ValueError(f"field '{label_field}' has {what} for the {len(words)} words of '{text_field}'")
    ends = np.cumsum([len(word) + 1 for word in words])
    spans = tuple((int(end) - len(word) - 1, int(end) - 1) for word, end in zip(words, ends, strict=True))
    return " ".join(words), Labels(tuple(_name(tag, label_field) for tag in tags), words=spans)


def label_record(
    content: Content, counts: Counter[str], *, has_lists: bool, num_values: set[int]
) -> LabelRecord | None:
    """Return what the labels of a corpus are; None if it has none. ValueError if the documents do not agree.

    ``counts`` are by label, of documents or words; ``num_values`` says how many numbers documents have.
    """
    if content is Content.numbers:
        if len(num_values) != 1:
            raise ValueError(f"documents have {' and '.join(map(str, sorted(num_values)))} numbers; all need as many")
        return LabelRecord(kind=LabelKind.numbers, size=num_values.pop(), names=[])
    if not counts:
        return None
    if len(counts) > MOST_LABELS:
        raise ValueError(f"{len(counts)} different labels; is data.label_field the right one?")
    is_whole = all(re.fullmatch("-?[0-9]+", name) for name in counts)
    names = sorted(counts, key=(lambda name: (int(name), name)) if is_whole else None)
    kind = LabelKind.per_token if content is Content.tagged else LabelKind.several if has_lists else LabelKind.one
    return LabelRecord(kind=kind, size=len(names), names=names)


def number_labels(record: LabelRecord, documents: Sequence[Labels]) -> NDArray[Any]:
    """Return the labels of documents as an array with a row for each: see :class:`LabelKind`."""
    if record.kind is LabelKind.numbers:
        return np.array([labels.numbers for labels in documents], dtype=np.float32).reshape(-1, record.size)
    ids = {name: number for number, name in enumerate(record.names)}
    if record.kind is LabelKind.one:
        return np.array([ids[labels.names[0]] for labels in documents], dtype=np.int32)
    array = np.zeros((len(documents), record.size), dtype=np.uint8)
    for row, labels in zip(array, documents, strict=True):
        row[[ids[name] for name in labels.names]] = 1
    return array


def number_tokens(names: Sequence[str], labels: Labels, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    """Return the label of each token, by its characters: that of a word for its first one, else :data:`NOT_FIRST`."""
    reached = np.maximum.accumulate([end for _, end in offsets] or [0])
    numbers = np.full(len(reached), NOT_FIRST, dtype=np.int32)
    ids = {name: number for number, name in enumerate(names)}
    first = np.searchsorted(reached, [start for start, _ in labels.words], side="right")
    for name, token in zip(labels.names, first.tolist(), strict=True):
        if token < len(numbers):  # not a word of which nothing is left
            numbers[token] = ids[name]
    return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name(value: Any, field: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int) and value != "":
        return str(value)
    raise ValueError(f"field '{field}' is {_quoted(value)}: a label is text or a whole number")


def _quoted(value: Any) -> str:
    return f"{value!r:.60}"


class Document(NamedTuple):
    """One document of a source."""

    id: str  # unique within the source and the same wherever the source lies: relative file name, ``@byte`` or ``:row``
    text: str  # valid Unicode, possibly empty
    is_repaired: bool  # whether something that is not valid Unicode was replaced
    answers: tuple[tuple[int, int], ...] | None = None  # characters that count in the loss, in order; None: all
    labels: Labels | None = None  # what it is labelled with
    group: str | None = None  # text that decides its split instead of its own: pieces of one file are on one side
    is_parted: bool = False  # what counts and what does not are tokenised as texts of their own
    is_templated: bool = False  # by a chat template, with all special tokens; what ends it does not count
    second: int | None = None  # character at which the second of two texts begins, which are encoded by themselves
    form: str = ""  # in which a conversation was found
    has_empty_answer: bool = False  # of a conversation: only what ends it is learnt


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
        Content.preference: (),
        Content.rated: ("label_field",),
    }[config.content]
    return {setting: getattr(config, setting) for setting in settings}


def columns_to_read(config: DataConfig, names: list[str]) -> list[str]:
    """Return the columns of a table that are read; ValueError if they hold no chats."""
    columns = list(document_fields(config).values())
    if config.content is Content.chat:
        form = form_of(names, config.messages_field)
        columns = [name for name in (*form.fields, *form.others) if name in names]
    of_answers = {Content.preference: PAIR_FIELDS, Content.rated: RATED_FIELDS}.get(config.content, ())
    columns += [name for name in of_answers if name in names]
    if config.content.is_chat:
        columns += [
            name for name in chat_of(config.tokenizer, config.chat_template).columns(names) if name not in columns
        ]
    return columns


def record_document(config: DataConfig, document_id: str, record: dict[str, Any], is_repaired: bool) -> Document:
    """Return the document in a record; ValueError if a field is missing or not what it should be."""
    if config.content is Content.chat:
        return _chat_document(config, document_id, record, is_repaired)
    fields = document_fields(config)
    for setting, name in fields.items():
        if name not in record:
            advice = advice_without_text(record, config.messages_field) if config.content is Content.text else ""
            raise ValueError(f"no field '{name}'; set data.{setting} to one of {sorted(record)}{advice}")
    if config.content in (Content.preference, Content.rated):
        return _compared_document(config, document_id, record, is_repaired)
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
    if config.messages_field in record and record[config.messages_field] is None:
        return Document(document_id, "", is_repaired, ())
    repaired = _repair(record)
    is_repaired |= repaired != record
    row = read_row(_of_row(config, repaired), config.messages_field)
    if row.is_text:
        is_empty = False
        text, begin = "".join(row.messages), len(row.messages[0]) * (config.train_on is not TrainOn.all)
        answers, is_templated = [(begin, len(text))] * bool(row.messages[1]), False
    else:
        chat = chat_of(config.tokenizer, config.chat_template)
        text, answers = chat.write(row, config.train_on)
        is_templated, is_empty = not chat.is_plain, has_empty_answer(row, config.train_on)
    form = f"{row.form.name} in text" if row.is_text else row.form.name
    text = text if answers else ""
    found = Document(document_id, text, is_repaired, tuple(answers), is_templated=is_templated, form=form)
    return found._replace(has_empty_answer=is_empty)


def _compared_document(config: DataConfig, document_id: str, record: dict[str, Any], is_repaired: bool) -> Document:
    chat = chat_of(config.tokenizer, config.chat_template)
    repaired = _repair(record)
    is_repaired |= repaired != record
    names: tuple[str, ...] = PAIR_FIELDS[1:]
    rating = None
    if config.content is Content.rated:
        label, names = repaired.pop(config.label_field), RATED_FIELDS[1:]
        rating = {"true": "true", "1": "true", "false": "false", "0": "false"}.get(str(label).lower())
        if rating is None:
            raise ValueError(f"field '{config.label_field}' is {_quoted(label)}: true of a good answer, else false")
    prompt, answers = chat.write_answers(_of_row(config, repaired), names)
    texts = [prompt + answer for answer in answers]
    ends = np.cumsum([len(text) for text in texts]).tolist()
    spans = tuple((end - len(answer), end) for end, answer in zip(ends, answers, strict=True))
    document = Document(document_id, "".join(texts), is_repaired, spans, group=prompt, is_templated=not chat.is_plain)
    return document._replace(labels=Labels((rating,))) if rating else document._replace(second=ends[0])


def _of_row(config: DataConfig, record: dict[str, Any]) -> dict[str, Any]:
    return record if config.source is DataSource.jsonl else without_null(record)


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
