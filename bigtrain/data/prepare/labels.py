"""Labels of documents: from the values of records to numbers beside the tokens."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import Content
from bigtrain.data.read.index import LabelKind, LabelRecord

MOST_LABELS = 100_000
NOT_FIRST = -100
"""Label of tokens that continue a word, and of those that a tokenizer adds: does not count."""


class Labels(NamedTuple):
    """What a document is labelled with."""

    names: tuple[str, ...] = ()
    """Of its one label, its several labels, or of each of its words."""
    numbers: tuple[float, ...] = ()
    """Instead of names."""
    is_list: bool = False
    """Whether it may have several labels, or none."""
    words: tuple[tuple[int, int], ...] = ()
    """Range of characters of each word, if each has a label."""


def read_labels(content: Content, value: Any, field: str) -> Labels:
    """Return the labels in a field of a record; ValueError if it holds something else."""
    if value in (None, ""):
        raise ValueError(f"field '{field}' is empty: a document without a label; data.on_bad_row=skip leaves it out")
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
    """Return the text of a list of words, joined by spaces, and the label of each; ValueError if these are no such lists."""
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

    Args:
        content: Of its records.
        counts: How many documents, or words, have each label.
        has_lists: Whether a document may have several labels.
        num_values: How many numbers documents have.
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
    """Return the label of each token: that of a word for its first token, else :data:`NOT_FIRST`.

    ``names`` are all labels, ``labels`` those of the document's words, ``offsets`` the range of characters of each token,
    empty of those that a tokenizer adds.
    """
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
