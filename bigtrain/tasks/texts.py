"""Metrics of texts that are written, compared with those wanted."""

import re
from collections.abc import Sequence


def rouge_l(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the mean F1 of longest common subsequences of words in lower case (Lin, "ROUGE", 2004)."""
    scores = []
    for text, right in zip(written, wanted, strict=True):
        words, others = (re.findall(r"\w+", part.lower()) for part in (text, right))
        common = _common_subsequence(words, others)
        scores.append(2 * common / (len(words) + len(others)) if common else float(not words and not others))
    return sum(scores) / len(scores)


def error_rate(written: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """Return the edits (insertions, deletions, substitutions) of all texts per word, or character, that is wanted."""
    edits = sum(map(_edit_distance, written, wanted))
    return edits / max(sum(map(len, wanted)), 1)


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    row = [0] * (len(other) + 1)
    for item in one:
        before = row
        row = [0]
        for place, right in enumerate(other):
            row.append(before[place] + 1 if item == right else max(before[place + 1], row[place]))
    return row[-1]


def _edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    row = list(range(len(other) + 1))
    for number, item in enumerate(one, start=1):
        before = row
        row = [number]
        for place, right in enumerate(other):
            row.append(min(before[place] + (item != right), before[place + 1] + 1, row[place] + 1))
    return row[-1]
