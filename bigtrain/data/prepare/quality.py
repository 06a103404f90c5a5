"""Filters of documents, and exact and near duplicates."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bigtrain.config import FilterConfig

_VISIBLE = re.compile(r"\S+")
_LETTERS_DIGITS_AND_SPACE = re.compile(r"[^\W_]+|\s+")
_WORD = re.compile(r"\w+")
_SHINGLE_WORDS = 5
_NUM_PERMUTATIONS = 128
_RECALL = 0.95


def rejection(text: str, filters: FilterConfig) -> str | None:
    """Return the name of the first filter that rejects ``text``, or None."""
    if len(text) < filters.min_characters:
        return "min_characters"
    if filters.max_characters is not None and len(text) > filters.max_characters:
        return "max_characters"
    if filters.max_repeated_line_share < 1 and repeated_line_share(text) > filters.max_repeated_line_share:
        return "max_repeated_line_share"
    if filters.max_symbol_share < 1 and symbol_share(text) > filters.max_symbol_share:
        return "max_symbol_share"
    return None


def repeated_line_share(text: str) -> float:
    """Return the share of characters in lines, stripped and not blank, that repeat earlier ones."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    num_characters = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / num_characters if num_characters else 0.0


def symbol_share(text: str) -> float:
    """Return the share of visible characters that are neither letters nor digits."""
    num_visible = sum(match.end() - match.start() for match in _VISIBLE.finditer(text))
    return len(_LETTERS_DIGITS_AND_SPACE.sub("", text)) / num_visible if num_visible else 0.0


def content_hash(text: str) -> tuple[int, int]:
    """Return a 128-bit hash as two 64-bit integers."""
    value = xxhash.xxh3_128_intdigest(text.encode())
    return value >> 64, value & (1 << 64) - 1


def minhash(text: str) -> Any:
    """Return the MinHash signature (Broder 1997) of the text's five-word shingles."""
    import rensa

    words = _WORD.findall(text.lower())
    last = max(len(words) - _SHINGLE_WORDS, 0)
    signature = rensa.RMinHash(num_perm=_NUM_PERMUTATIONS, seed=1)
    signature.update([" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(last + 1)])
    return signature


def exact_duplicates(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which rows of ``hashes``, uint64 ``(N, 2)``, equal an earlier one, bool ``(N,)``."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the earliest comes first
    ordered = hashes[order]
    is_duplicate = np.zeros(len(hashes), dtype=np.bool_)
    is_duplicate[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return is_duplicate


def near_duplicates(signatures: Iterator[Any], similarity: float) -> Iterator[bool]:
    """Yield for each signature whether an earlier one that was kept is at least so similar.

    LSH finds the candidates, with as many bands as catch 95 % of the pairs of just this similarity; signatures decide.
    """
    import rensa

    # The chance to find a pair with ``bands`` bands of ``rows`` rows is 1 - (1 - similarity ** rows) ** bands.
    rows = {bands: _NUM_PERMUTATIONS // bands for bands in (8, 16, 32, 64)}
    enough = (bands for bands in rows if 1 - (1 - similarity ** rows[bands]) ** bands >= _RECALL)
    num_bands = next(enough, _NUM_PERMUTATIONS)
    index = rensa.RMinHashLSH(threshold=similarity, num_perm=_NUM_PERMUTATIONS, num_bands=num_bands)
    kept: dict[int, Any] = {}
    for number, signature in enumerate(signatures):
        is_duplicate = any(signature.jaccard(kept[other]) >= similarity for other in index.query(signature))
        if not is_duplicate:
            kept[number] = signature
            index.insert(number, signature)
        yield is_duplicate
