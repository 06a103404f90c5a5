"""Text to token ids, by tiktoken where it gives the same ids as the tokenizers library, for it is several times faster."""

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.tokenizer import byte_symbols

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encode = Callable[[str], NDArray[np.integer]]

# What the ByteLevel pre-tokenizer does (GPT-2's pattern) without backtracking; the same matches, as tiktoken writes it.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def slow_encoder(tokenizer: "Tokenizer") -> Encode:
    """Return the tokenizers library's own encoding, which defines the ids."""
    return lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


def fast_encoder(tokenizer: "Tokenizer") -> Encode | None:
    """Return an encoding with the same ids, or None where the tokenizer is of another kind.

    tiktoken joins the two neighbours whose bytes together have the lowest rank, the tokenizers library those
    whose pair comes first among the merges. These are the same when every merge makes another token, which is
    required here, and no token can be reached by another pair, which merges that were learnt from text
    fulfil and :func:`agrees` looks for.
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
    import tiktoken

    # Ranks are places in ``tokens``: bytes first, then the merges in their order.
    ranks = {bytes(symbols[symbol] for symbol in token): rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda text: ids[encoding.encode_ordinary(text)] if text else ids[:0]


def agrees(fast: Encode, slow: Encode, texts: Iterable[str]) -> bool:
    """Return whether both give the same ids for all ``texts``."""
    return all(np.array_equal(fast(text), slow(text)) for text in texts)


def _pattern(description: dict[str, Any]) -> str | None:
    """Return the pattern that cuts text into words, "" if it is not cut, None if that is done in another way."""
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
