"""What a tokenizer's ids are to masked language modelling: words, special tokens, the mask."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.read.index import PUBLISHED_DIRECTORY
from bigtrain.data.read.tokenizer import num_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACES = "ĠĊĉč▁ "  # as byte-level tokenizers (GPT-2) and SentencePiece write space, line ends and tab
_MASKS = ("[MASK]", "<mask>")


def starts_word(tokenizer: "Tokenizer") -> NDArray[np.bool_]:
    """Return of each id whether its token begins a word, ``(num_ids,)``; what is neither letter nor digit is one by itself."""
    description = json.loads(tokenizer.to_str())["model"]
    prefix = description.get("continuing_subword_prefix") or "" if description["type"] == "WordPiece" else None
    tokens = (tokenizer.id_to_token(i) or " " for i in range(num_ids(tokenizer)))
    if prefix is not None:
        return np.array([not token.startswith(prefix) for token in tokens])
    return np.array([token[0] in _SPACES or not token[0].isalnum() for token in tokens])


def special_ids(tokenizer: "Tokenizer") -> list[int]:
    """Return the ids of special tokens, such as the end of a text."""
    return sorted(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def mask_token_id(tokenizer: "Tokenizer", directory: Path) -> int | None:
    """Return the id of the token that stands for a hidden one, of a corpus or run; None if it has none."""
    path = directory / PUBLISHED_DIRECTORY / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("mask_token") if path.is_file() else None
    named = named.get("content") if isinstance(named, dict) else named
    found = (tokenizer.token_to_id(name) for name in (named, *_MASKS) if name)
    return next((i for i in found if i is not None), None)
