"""Documents to token ids, and which of them count.

tiktoken encodes where it gives the same ids as the tokenizers library, because it is several times faster.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.packages import lacking
from bigtrain.data.prepare.records import Document, number_tokens
from bigtrain.data.prepare.survey import cut
from bigtrain.data.read.tokenizer import byte_symbols
from bigtrain.log import get_logger

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Encode = Callable[[str], NDArray[np.integer]]


class Coded(NamedTuple):
    """A document as tokens."""

    tokens: NDArray[np.integer]  # ids
    counted: NDArray[np.uint8] | None = None  # 1 for each that counts, unless all do
    labels: NDArray[np.int32] | None = None  # of each, if they have some


# GPT-2's pattern of the ByteLevel pre-tokenizer, without backtracking as tiktoken writes it; the matches are the same.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def slow_encoder(tokenizer: "Tokenizer", *, adds_special: bool = False) -> Encode:
    """Return the tokenizers library's own encoding, which defines the ids; ``adds_special``: with BOS and the like."""
    return lambda text: np.array(tokenizer.encode(text, add_special_tokens=adds_special).ids, dtype=np.uint32)


def fast_encoder(tokenizer: "Tokenizer", *, adds_special: bool = False) -> Encode | None:
    """Return a faster encoding with the same ids, or None; names of special tokens are left to the library."""
    fast, slow = _tiktoken_encoder(tokenizer), slow_encoder(tokenizer, adds_special=adds_special)
    if fast is None or (tokenizer.encode_special_tokens and not adds_special):
        return fast
    around = tokenizer.encode("a", add_special_tokens=adds_special)
    first = around.special_tokens_mask.index(0)
    before, after = (np.array(ids, dtype=np.uint32) for ids in (around.ids[:first], around.ids[first + 1 :]))
    names = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
    has_name = re.compile("|".join(map(re.escape, names)) if names and not tokenizer.encode_special_tokens else r"(?!)")
    return lambda text: slow(text) if has_name.search(text) else np.concatenate([before, fast(text), after])


def _tiktoken_encoder(tokenizer: "Tokenizer") -> Encode | None:
    """Return an encoding by tiktoken, or None.

    tiktoken merges the neighbours whose joined bytes have the lowest rank, tokenizers those whose pair comes first
    among the merges. Both agree when every merge makes another token, which is required here, and no token is reached
    by two pairs, which holds for learnt merges and :func:`agrees` checks.
    """
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    pattern = _pattern(description)
    plain = model["type"] == "BPE" and not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    all_special = all(token["special"] for token in description["added_tokens"])
    symbols = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    if pattern is None or not plain or not all_special or not set(symbols) <= set(model["vocab"]):
        return None
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    tokens = [*symbols, *("".join(merge) for merge in merges)]
    if len(set(tokens)) != len(tokens):
        return None
    ids = np.array([model["vocab"][token] for token in tokens], dtype=np.uint32)
    if not merges and pattern == "":
        return lambda text: ids[np.frombuffer(text.encode(), dtype=np.uint8)]
    if pattern == "":
        return None
    if problems := lacking("the fast way from text to the same ids", "tiktoken", "tiktoken"):
        get_logger().info(problems[0])
        return None
    import tiktoken

    # Ranks are indices into ``tokens``: bytes first, then merges in order.
    ranks = {bytes(symbols[symbol] for symbol in token): rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda text: ids[encoding.encode_ordinary(text)] if text else ids[:0]


def encode_pieces(encode: Encode, document: Document, split: Callable[[str], Iterable[str]] = cut) -> Coded:
    """Encode segments that count and that do not separately, and long texts in pieces, which bounds the memory."""
    tokens: list[NDArray[np.integer]] = [np.empty(0, dtype=np.uint32)]
    counted = [np.empty(0, dtype=np.uint8)]
    for text, counts in _segments(document):
        for piece in split(text):
            tokens.append(encode(piece))
            counted.append(np.full(len(tokens[-1]), counts, dtype=np.uint8))
    return Coded(np.concatenate(tokens), None if document.answers is None else np.concatenate(counted))


def encode_whole(tokenizer: "Tokenizer", encode: Encode, document: Document) -> Coded:
    """Encode a document as the tokenizer does; a token counts if any of its characters does, as in transformers."""
    if document.answers is None or document.is_parted:
        return encode_pieces(encode, document, split=lambda text: [text])
    encoding = tokenizer.encode(document.text, add_special_tokens=not document.is_templated)
    return Coded(np.array(encoding.ids, dtype=np.uint32), counted_tokens(encoding, document.answers))


def encode_both(encode: Callable[[Document], Coded], document: Document) -> Coded:
    """Encode the two texts of a document, each by itself."""
    middle = document.second
    first, second = document.answers
    halves = [
        document._replace(text=document.text[:middle], answers=(first,), second=None),
        document._replace(
            text=document.text[middle:], answers=((second[0] - middle, second[1] - middle),), second=None
        ),
    ]
    coded = [encode(half) for half in halves]
    return Coded(*(np.concatenate(arrays) for arrays in zip(*((c.tokens, c.counted) for c in coded), strict=True)))


def encode_tagged(
    tokenizer: "Tokenizer", label_names: Sequence[str], document: Document, *, adds_special: bool
) -> Coded:
    """Encode a document of labelled words; the first token of each has its label."""
    encoding = tokenizer.encode(document.text, add_special_tokens=adds_special)
    labels = number_tokens(label_names, document.labels, encoding.offsets)
    return Coded(np.array(encoding.ids, dtype=np.uint32), labels=labels)


def counted_tokens(encoding: "Encoding", answers: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
    """Return 1 for each token with a character inside ``answers``, uint8 ``(n,)``.

    A token without characters (whitespace left out of the offsets) stands for what is between its neighbours. Tokens
    added in front of a text never count, those added behind count as its last token.
    """
    begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    is_empty = begins == ends
    so_far = np.concatenate([[0], np.maximum.accumulate(ends)])[:-1]
    following = np.minimum.accumulate(np.where(is_empty, max(ends, default=0), begins)[::-1])[::-1]
    begins, ends = np.where(is_empty, so_far, begins), np.where(is_empty, np.maximum(following, so_far), ends)
    starts, stops = np.array(answers, dtype=np.int64).T
    last_before = np.searchsorted(starts, ends) - 1
    counted = (last_before >= 0) & (stops[last_before] > begins) & (begins < ends)
    of_text = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    if len(of_text):
        counted[of_text[-1] + 1 :] = counted[of_text[-1]]
    return counted.astype(np.uint8)


def _segments(document: Document) -> Iterator[tuple[str, bool]]:
    """Yield the segments of a document, none of them empty unless it counts, and whether each counts."""
    end = 0
    for start, stop in [(0, len(document.text))] if document.answers is None else document.answers:
        if end < start:
            yield document.text[end:start], False
        yield document.text[start:stop], True
        end = stop
    if end < len(document.text):
        yield document.text[end:], False


def agrees(fast: Encode, slow: Encode, texts: Iterable[str]) -> bool:
    """Return whether both give the same ids for all ``texts``."""
    return all(np.array_equal(fast(text), slow(text)) for text in texts)


def _pattern(description: dict[str, Any]) -> str | None:
    """Return the pattern that splits text into words, "" if it is not split, None if it is split in another way."""
    pre_tokenizer = description["pre_tokenizer"] or {}
    if description["normalizer"] is not None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not splits:
        return _GPT2_PATTERN if last["use_regex"] else ""
    (split,) = splits if len(splits) == 1 else ({},)
    isolates = split.get("type") == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    if not isolates or last["use_regex"] or "Regex" not in split["pattern"]:
        return None
    pattern = split["pattern"]["Regex"]
    # Words must cover the text: tiktoken drops what no alternative matches.
    return pattern if re.search(r"\|\\s\+?$", pattern) else None
