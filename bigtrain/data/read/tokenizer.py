"""Tokenizers: every kind is one class, ``tokenizers.Tokenizer``, kept as ``tokenizer.json``.

The files that a Hugging Face tokenizer is published as lie beside it, whole, in ``tokenizer/``: what else they say,
such as a chat template, is for chats and exports.

``bpe`` and ``bytes`` work on UTF-8 bytes without normalisation or added spaces, so decoding gives
back any text exactly. The name of a special token inside a text is text: only bigtrain itself
writes the end-of-text token. A published tokenizer writes and reads special tokens as it does by itself.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import DataConfig
from bigtrain.data.read.index import INDEX_FILE, PUBLISHED_DIRECTORY, TokenizerRecord, read_index, record_file
from bigtrain.errors import DataError, StopError, as_data_error
from bigtrain.files import FileRecord

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TOKENIZER_FILE, TEMPLATE_FILE = "tokenizer.json", "chat_template.jinja"
END_OF_TEXT = "<|endoftext|>"
OURS = ("bpe", "bytes")
_PUBLISHED_FILES = (  # what the tokenizers of transformers, sentencepiece, tiktoken and mistral-common read; no code
    "*token*.json",
    "*.tokenizer",
    "*vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "normalizer.json",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
_SPACES = "ĠĊĉč▁ "  # as byte-level tokenizers (GPT-2) and SentencePiece write space, line ends and tab
_MASKS = ("[MASK]", "<mask>")


class BuiltTokenizer(NamedTuple):
    """A tokenizer and the id that ends a document."""

    tokenizer: "Tokenizer"
    eos_id: int
    adds_special: bool = False  # see :class:`bigtrain.data.read.index.TokenizerRecord`

    @property
    def reads_special(self) -> bool:
        return not self.tokenizer.encode_special_tokens


def build_tokenizer(config: DataConfig, sample: Iterable[str]) -> BuiltTokenizer:
    """Return the tokenizer of ``config.tokenizer``, a ``bpe`` trained on ``sample``; DataError if unsuitable."""
    if config.tokenizer == "bpe":
        return _train_bpe(sample, config.tokenizer_vocab_size)
    if config.tokenizer == "bytes":
        return _bytes_tokenizer()
    if record := kept_record(config.tokenizer):
        tokenizer = load_tokenizer(config.tokenizer, reads_special=record.reads_special)
        return BuiltTokenizer(tokenizer, record.eos_id, record.adds_special)
    return _hugging_face_tokenizer(config.tokenizer)


def load_tokenizer(directory: str | Path, *, reads_special: bool | None = None) -> "Tokenizer":
    """Load ``tokenizer.json`` of a prepared corpus or a run; DataError if there is none, or it is damaged."""
    if reads_special is None:
        record = kept_record(directory)
        reads_special = record is not None and record.reads_special
    path = Path(directory, TOKENIZER_FILE)
    with as_data_error(path, OSError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
    return _from_json(text, str(path), reads_special=reads_special)


def is_ours(name: str) -> bool:
    """Return whether ``data.tokenizer`` is a ``bpe`` or ``bytes``, also one that a corpus or run has."""
    record = kept_record(name)
    return (record.name if record else name) in OURS


def load_published(name: str) -> tuple[str | dict[str, str] | None, dict[str, Any]]:
    """Return the chat template of a published tokenizer, several by name or none, and its special tokens by role."""
    if Path(name, INDEX_FILE).is_file():
        if not Path(name, PUBLISHED_DIRECTORY).is_dir():  # kept since chats have templates
            tokenizer, eos_id, *_ = build_tokenizer(DataConfig(tokenizer=name), ())
            return None, {"eos_token": tokenizer.id_to_token(eos_id)}
        name = str(Path(name, PUBLISHED_DIRECTORY))
    wrapper = _load_wrapper(name)
    return wrapper.chat_template, dict(wrapper.special_tokens_map)


def keep_published(name: str, corpus: Path, chat_template: str | None = None) -> list[FileRecord]:
    """Copy a tokenizer's published files below ``corpus``, templates replaced by ``chat_template``; return records."""
    records = []
    source = _published_directory(name)
    found = {path for pattern in _PUBLISHED_FILES if source for path in source.glob(pattern) if path.is_file()}
    copies = {path.relative_to(source).as_posix(): path for path in sorted(found)}
    if copies and chat_template is not None:
        copies = {name: path for name, path in copies.items() if "chat_template" not in name}
        copies[TEMPLATE_FILE] = Path(chat_template)
    for where, path in copies.items():
        copy = corpus / PUBLISHED_DIRECTORY / where
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        records.append(dataclasses.replace(record_file(copy), name=copy.relative_to(corpus).as_posix()))
    return records


def _published_directory(name: str) -> Path | None:
    directory = Path(name)
    if name in OURS:
        return None
    if (directory / INDEX_FILE).is_file():
        return directory / PUBLISHED_DIRECTORY
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download

    problem = "its files cannot be had from the hub"
    with as_data_error(f"data.tokenizer={name}", OSError, ValueError, problem=problem):
        return Path(snapshot_download(name, allow_patterns=list(_PUBLISHED_FILES)))


def tokenizer_name(config: DataConfig) -> str:
    """Return what a tokenizer is called: a published one that comes from a corpus or a run, as it was called there."""
    kept = kept_record(config.tokenizer)
    return kept.name if kept and kept.facts else config.tokenizer


def tokenizer_facts(config: DataConfig) -> object:
    """Return plain data that tell a tokenizer from others."""
    if config.tokenizer == "bpe":
        return ["bpe", config.tokenizer_vocab_size]
    if (kept := kept_record(config.tokenizer)) and kept.facts:
        return json.loads(kept.facts)
    path = Path(config.tokenizer)
    if not path.is_dir():
        return config.tokenizer
    parts = [file for file in path.iterdir() if re.search("token|vocab|merges|template", file.name)]
    return sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in parts)


def kept_record(name: str | Path) -> TokenizerRecord | None:
    """Return the record of the tokenizer of a prepared corpus or run; None if ``name`` is neither."""
    return read_index(name, check_sizes=False).tokenizer if Path(name, INDEX_FILE).is_file() else None


def num_ids(tokenizer: "Tokenizer") -> int:
    """Return the smallest vocabulary size of a model that can take every id of ``tokenizer``."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _from_json(text: str, where: str, *, reads_special: bool) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except StopError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{where}: not a tokenizer of the tokenizers library: {error}") from error
    # These three are not part of the file, or must not be taken from it.
    tokenizer.encode_special_tokens = not reads_special
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


def _load_wrapper(name: str) -> Any:
    from transformers import AutoTokenizer

    where = f"data.tokenizer={name}"
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        why = " ".join(str(error).split())
        needs_sentencepiece = any(Path(name).glob("*.model")) and not find_spec("sentencepiece")
        if isinstance(error, ImportError) or needs_sentencepiece:
            package = "the Python package sentencepiece" if needs_sentencepiece else "a Python package"
            raise DataError(f"{where}: it is there, but needs {package}, which is not installed: {why}") from error
        if Path(name).is_dir():
            raise DataError(
                f"{where}: the directory is there, but no tokenizer can be loaded from it: {why}"
            ) from error
        raise DataError(
            f"{where}: no such tokenizer here or on the Hugging Face hub; use bpe, bytes, the name of a model "
            f"on the hub, or a directory that holds {TOKENIZER_FILE} (offline: one that was downloaded before)\n{error}"
        ) from error


def _hugging_face_tokenizer(name: str) -> BuiltTokenizer:
    where = f"data.tokenizer={name}"
    wrapper = _load_wrapper(name)
    backend = getattr(wrapper, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"{where}: it exists only as slow Python code; choose one with a {TOKENIZER_FILE}")
    if wrapper.eos_token_id is None:
        raise DataError(f"{where}: it has no end-of-text token, which separates documents; choose another")
    reads_special = not getattr(wrapper, "split_special_tokens", False)
    tokenizer = _from_json(backend.to_str(), where, reads_special=reads_special)
    probe = f"a  b\n{wrapper.eos_token} c"
    if tokenizer.encode(probe).ids != wrapper(probe)["input_ids"]:
        raise DataError(f"{where}: transformers gives other ids than its own {TOKENIZER_FILE}; choose another")
    return BuiltTokenizer(tokenizer, wrapper.eos_token_id, adds_special=True)


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
