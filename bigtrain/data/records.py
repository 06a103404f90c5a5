"""From one record of a source to one document: plain text, or a conversation of which only the answers count."""

from typing import Any, NamedTuple

from bigtrain.config import Content, DataConfig

ANSWERING_ROLE = "assistant"
_ROLES = ("system", "user", ANSWERING_ROLE, "tool")


class Document(NamedTuple):
    """One document of a source."""

    id: str
    """Unique within the source and the same wherever the source lies: relative file name, ``@byte`` or ``:row``."""
    text: str
    """Valid Unicode, possibly empty."""
    is_repaired: bool
    """Whether something that is not valid Unicode was replaced."""
    answers: tuple[tuple[int, int], ...] | None = None
    """Ranges of characters that count in the loss; None: all of them."""


def document_fields(config: DataConfig) -> dict[str, str]:
    """Return the fields that a record must have, by the setting that names each."""
    settings = {
        Content.text: ("text_field",),
        Content.chat: ("messages_field",),
        Content.pairs: ("prompt_field", "answer_field"),
    }[config.content]
    return {setting: getattr(config, setting) for setting in settings}


def record_document(config: DataConfig, document_id: str, record: dict[str, Any], is_repaired: bool) -> Document:
    """Return the document that a record holds.

    A chat is written as ChatML, in plain text: ``<|im_start|>role``, a new line, the content, ``<|im_end|>`` and a
    new line for each message; what the assistant says counts, with the ``<|im_end|>`` that ends it. Of a pair,
    prompt and answer follow each other directly and the answer counts.

    Raises:
        ValueError: a field is missing or not what it should be.
    """
    fields = document_fields(config)
    for setting, name in fields.items():
        if name not in record:
            raise ValueError(f"no field '{name}'; set data.{setting} to one of {sorted(record)}")
    if config.content is Content.text:
        segments = [(_text(record[config.text_field], config.text_field), True)]
    elif config.content is Content.pairs:
        prompt, answer = (_text(record[name], name) for name in (config.prompt_field, config.answer_field))
        segments = [(prompt, False), (answer, True)] if prompt and answer else []
    else:
        segments = _chat_segments(record[config.messages_field], config.messages_field)
    repaired = [(*_join_surrogates(text), counts) for text, counts in segments]
    is_repaired = is_repaired or any(was_repaired for _, was_repaired, _ in repaired)
    text, answers = "", []
    for part, _, counts in repaired:
        if counts:
            answers.append((len(text), len(text) + len(part)))
        text += part
    return Document(document_id, text, is_repaired, None if config.content is Content.text else tuple(answers))


def decode(raw: bytes, encoding: str = "utf-8-sig") -> tuple[str, bool]:
    """Return text and whether something in it was replaced because it is not valid."""
    try:
        return raw.decode(encoding), False
    except UnicodeDecodeError:
        return raw.decode(encoding, errors="replace"), True


def _chat_segments(messages: Any, name: str) -> list[tuple[str, bool]]:
    if messages is None:
        return []
    if not isinstance(messages, list):
        raise ValueError(f"field '{name}' is {type(messages).__name__}, not a list of messages")
    segments = []
    for number, message in enumerate(messages):
        where = f"field '{name}', message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where}: expected an object with role and content")
        role, content = message["role"], _text(message["content"], f"{name}[{number}].content")
        if role not in _ROLES:
            raise ValueError(f"{where}: role {role!r} is none of {', '.join(_ROLES)}")
        segments += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>\n", role == ANSWERING_ROLE)]
    # Nothing to learn from, like an empty text.
    return segments if any(counts for _, counts in segments) else []


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
