"""Tokenizers: every kind is one class, ``tokenizers.Tokenizer``, kept as ``tokenizer.json``.

``bpe`` and ``bytes`` work on UTF-8 bytes without normalisation or added spaces, so decoding gives
back any text exactly. The name of a special token inside a text is text: only bigtrain itself
writes the end-of-text token.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bigtrain.config import DataConfig
from bigtrain.data.index import INDEX_FILE, read_index
from bigtrain.errors import DataError, StopError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"


class BuiltTokenizer(NamedTuple):
    """A tokenizer and the id that ends a document."""

    tokenizer: "Tokenizer"
    eos_id: int


def build_tokenizer(config: DataConfig, sample: Iterable[str]) -> BuiltTokenizer:
    """Return the tokenizer that ``config.tokenizer`` names.

    Args:
        config: ``tokenizer`` is ``bpe``, ``bytes``, a prepared corpus or run that has one, or a Hugging Face name or
            local directory.
        sample: Texts that a ``bpe`` is trained on; the others leave it alone.

    Raises:
        DataError: the Hugging Face tokenizer is missing or unsuitable.
    """
    if config.tokenizer == "bpe":
        return _train_bpe(sample, config.tokenizer_vocab_size)
    if config.tokenizer == "bytes":
        return _bytes_tokenizer()
    if Path(config.tokenizer, INDEX_FILE).is_file():
        index = read_index(config.tokenizer, check_sizes=False)
        return BuiltTokenizer(load_tokenizer(config.tokenizer), index.tokenizer.eos_id)
    return _hugging_face_tokenizer(config.tokenizer)


def load_tokenizer(directory: str | Path) -> "Tokenizer":
    """Load ``tokenizer.json`` from a prepared corpus or a run.

    Encode with ``add_special_tokens=False``.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = Path(directory, TOKENIZER_FILE)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error}") from error
    return _from_json(text, str(path))


def num_ids(tokenizer: "Tokenizer") -> int:
    """Return the smallest vocabulary size of a model that can take every id of ``tokenizer``."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _from_json(text: str, where: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except StopError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{where}: not a tokenizer of the tokenizers library: {error}") from error
    # These three are not part of the file, or must not be taken from it.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte_level(model: Any, *, use_regex: bool) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _train_bpe(sample: Iterable[str], vocab_size: int) -> BuiltTokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2); end-of-text has id 0."""
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return BuiltTokenizer(tokenizer, tokenizer.token_to_id(END_OF_TEXT))


def _bytes_tokenizer() -> BuiltTokenizer:
    """Return the tokenizer whose ids 0 to 255 are the bytes; end-of-text has id 256."""
    from tokenizers import models

    vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=[]), use_regex=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return BuiltTokenizer(tokenizer, tokenizer.token_to_id(END_OF_TEXT))


def byte_symbols() -> Iterator[str]:
    """Yield the character by which the library writes each byte: itself where printable, else one above 255."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    above = iter([symbol for symbol in alphabet if ord(symbol) > 255])
    for byte in range(256):
        yield chr(byte) if chr(byte) in alphabet else next(above)


def _hugging_face_tokenizer(name: str) -> BuiltTokenizer:
    from transformers import AutoTokenizer

    where = f"data.tokenizer={name}"
    try:
        wrapper = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{where}: no such tokenizer here or on the Hugging Face hub; use bpe, bytes, the name of a model on the "
            f"hub, or a directory that holds {TOKENIZER_FILE} (offline: one that was downloaded before)\n{error}"
        ) from error
    backend = getattr(wrapper, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{where}: it exists only as slow Python code; choose one with a {TOKENIZER_FILE}")
    if wrapper.eos_token_id is None:
        raise DataError(f"{where}: it has no end-of-text token, which separates documents; choose another")
    return BuiltTokenizer(_from_json(backend.to_str(), where), wrapper.eos_token_id)
