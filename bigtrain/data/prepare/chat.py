"""Conversations as the text that a chat template writes, and what of that text counts in the loss.

Templates are rendered by transformers, sandboxed, with the tokenizer's special tokens. Every field of a row is written
by the template or refused: templates silently drop what they do not know, so each field is probed.
"""

import copy
import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bigtrain.config import DataConfig, TrainOn
from bigtrain.data.prepare.chat_forms import Row, check_content, read_message
from bigtrain.data.read.tokenizer import (
    END_OF_TEXT,
    OURS,
    BuiltTokenizer,
    build_tokenizer,
    is_ours,
    kept_record,
    load_published,
)
from bigtrain.errors import DataError, StopError, as_data_error
from bigtrain.log import get_logger

ANSWERING_ROLE = "assistant"
CHAT_FILE = "chat.json"
_ROLES = ("system", "user", ANSWERING_ROLE, "tool", "developer", "function", "ipython")
_OF_A_CHAT = ("tools", "functions", "documents", "system", "chat_template_kwargs")
"""Fields of a row beside its messages that are, by convention, part of what the model is to see."""
_LABELS = ("id", "type", "index")  # keys inside a field, such as in a tool call, that a template may do without
_OF_A_MESSAGE = ("role", "tool_call_id")  # the role is the template's own; the id refers to one of a call
_CHATML = """\
{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}\
{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<|im_end|>\n' }}{% endgeneration %}\
{% else %}{{ m.content ~ '<|im_end|>\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\ue000{}\ue001"
"""Stands behind a content to see whether the template writes it; private use, so nothing trims it."""

PAIR_FIELDS = ("prompt", "chosen", "rejected")
RATED_FIELDS = ("prompt", "completion")
"""Of a row with two answers: the first is messages or the user's text, and may be the beginning of the others instead."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Chat:
    """How the conversations of a source are written."""

    templates: dict[str, str]  # ``default``, and ``tool_use`` where chats with tools have a template of their own
    tokens: dict[str, Any]  # special tokens such as ``bos_token``, which templates read besides the chat
    date: str = ""  # ISO 8601; given to templates that write today's: text must not depend on when it is read
    is_plain: bool = False  # whether it is the ChatML of ``bpe`` and ``bytes``, whose names of special tokens are text

    def write(self, row: Row, train_on: TrainOn = TrainOn.answers) -> tuple[str, list[Span]]:
        """Return the text of a row and the ranges of characters that count; both empty if nothing does.

        ValueError if the row is no conversation, or the template cannot write it or drops some of it.
        """
        name = row.form.fields[-1]
        messages, weights = _weighed(row, train_on)
        if train_on is not TrainOn.all and not _answers(messages, weights):
            return "", []
        written = _Row(self, messages, self._fields(row.fields, name), name)
        if train_on is TrainOn.all:
            left_out = written.answers([not weight for weight in weights])
            begins, ends = [0, *(end for _, end in left_out)], [*(begin for begin, _ in left_out), len(written.text)]
            spans = list(zip(begins, ends, strict=True))
        else:
            spans = written.answers(weights)
        written.require_written()
        return written.text, [(begin, end) for begin, end in spans if begin < end]

    def write_answers(self, record: dict[str, Any], names: Sequence[str]) -> tuple[str, list[str]]:
        """Return the text of a prompt, with what asks for an answer, and those of the answers in fields behind it.

        ValueError if the row has no such ones, or the template cannot write it or drops some of it.
        """
        prompt, answers = _read_answers(record, names)
        fields = self._fields(record, names[0])
        before, _ = self.render(prompt, fields, asks=True)
        texts = []
        for name, answer in zip(names, answers, strict=True):
            row = _Row(self, [*prompt, *answer], fields, name)
            row.require_written()
            if not row.text.startswith(before):
                raise ValueError(f"field '{name}': the chat template does not write the answer behind what asks for it")
            texts.append(row.text.removeprefix(before))
        return before, texts

    def render(
        self, messages: list[dict[str, Any]], fields: dict[str, Any], *, asks: bool = False
    ) -> tuple[str, list[Span]]:
        """Return a conversation's text and the ranges that the template marks; ValueError if it cannot be written.

        ``fields`` are other variables of the template; ``asks`` appends what opens an answer.
        """
        from transformers.utils import chat_template_utils as templates

        template = self._template(fields)
        try:
            if "strftime_now" in template:
                day = datetime.date.fromisoformat(self.date)
                templates._compile_jinja_template(template).environment.globals["strftime_now"] = day.strftime
            rendered: Any = templates.render_jinja_template(  # annotated as a str
                [messages],
                chat_template=template,
                return_assistant_tokens_mask=self.marks(fields),
                add_generation_prompt=asks,
                **self.tokens | fields,
            )
        except StopError:
            raise
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template cannot write it: {error}") from error
        texts, spans = rendered
        return texts[0], [(begin, end) for begin, end in (spans[0] if spans else [])]

    def marks(self, fields: dict[str, Any]) -> bool:
        return _GENERATION.search(self._template(fields)) is not None

    def _template(self, fields: dict[str, Any]) -> str:
        return self.templates["tool_use" if fields.get("tools") and "tool_use" in self.templates else "default"]

    def columns(self, names: list[str]) -> list[str]:
        """Return those of a table's columns, besides the messages, that are part of a chat."""
        read = frozenset(_OF_A_CHAT).union(*map(variables, self.templates.values()))
        return [name for name in names if name in read]

    def _fields(self, record: dict[str, Any], name: str) -> dict[str, Any]:
        """Return the fields, besides the messages, that the template reads."""
        given = record.get("chat_template_kwargs") or {}
        if not isinstance(given, dict):
            raise ValueError(f"field 'chat_template_kwargs' is {type(given).__name__}, not an object")
        record = {key: value for key, value in record.items() if key != "chat_template_kwargs"} | given
        if isinstance(record.get("tools"), str):
            record["tools"] = _parsed(record["tools"])
        read = variables(self._template(record)) - {name, "messages", "add_generation_prompt", *self.tokens}
        fields = {key: record[key] for key in read if record.get(key) is not None}
        for key in (*_OF_A_CHAT, *given):
            if _says_something(record.get(key)) and key not in (*fields, name):
                raise ValueError(f"field '{key}': the chat template does not write it")
        return fields


class _Row:
    """One conversation being written."""

    def __init__(self, chat: Chat, messages: list[dict[str, Any]], fields: dict[str, Any], name: str) -> None:
        self.text, self._spans = chat.render(messages, fields)
        self._chat, self._messages, self._fields, self._name = chat, messages, fields, name

    def require_written(self) -> None:
        marked = [_marked(message, number) for number, message in enumerate(self._messages)]
        text = self._try([message for message, _ in marked], self._fields)
        for number, message in enumerate(self._messages):
            for key, value in message.items():
                if key in _OF_A_MESSAGE or not _says_something(value):
                    continue
                where = f"field '{self._name}', message {number}"
                if isinstance(value, list) and any(repr(part) in self.text for part in value):
                    raise ValueError(f"{where}: {key} is a list, and the chat template takes text only")
                if key != "content" or not all(mark in text for mark in marked[number][1]):
                    self._require_effect(number, key, where)
        for key in set(_OF_A_CHAT) & set(self._fields):
            value = self._fields[key]
            parts = [value[:i] + value[i + 1 :] for i in range(len(value))] if isinstance(value, list) else [None]
            if any(self._try(self._messages, self._fields | {key: part}) == self.text for part in parts):
                raise ValueError(f"field '{key}': the chat template does not write it, or not all of it")

    def answers(self, weights: list[bool]) -> list[Span]:
        counted = [i for i, m in enumerate(self._messages) if m["role"] == ANSWERING_ROLE and weights[i]]
        if not self._chat.marks(self._fields):
            return [self._span(number) for number in counted]
        if all(weights):
            return self._spans
        # A message's spans are those that appear when it is added.
        places = {i for n in counted for i in (n, n + 1)}
        bounds = {i: len(self._chat.render(self._messages[:i], self._fields)[1]) if i else 0 for i in places}
        return [span for n in counted for span in self._spans[bounds[n] : bounds[n + 1]]]

    def _span(self, number: int) -> Span:
        """Return the range of a message: behind what asks for it, up to the end of what is written with it."""
        before, _ = self._chat.render(self._messages[:number], self._fields, asks=True)
        upto, _ = self._chat.render(self._messages[: number + 1], self._fields)
        if not self.text.startswith(upto):  # some templates write a special token at the end
            special = [token for token in self._chat.tokens.values() if isinstance(token, str) and token]
            upto = next((upto.removesuffix(token) for token in special if upto.endswith(token)), upto)
        if not (upto.startswith(before) and self.text.startswith(upto)):
            raise ValueError(
                f"field '{self._name}', message {number}: the chat template writes this answer, or what is before it, in "
                "another way when the chat goes on, so what counts of it is not known; mark answers by {% generation %} "
                "and {% endgeneration %} in a template of your own (data.chat_template=FILE)"
            )
        return len(before), len(upto)

    def _require_effect(self, number: int, key: str, where: str) -> None:
        """Refuse a field with a part that changes the text neither of the chat nor of the chat up to its message.

        What a template writes of the last answer only, as many do with reasoning, it leaves out on purpose.
        """
        message = self._messages[number]
        for path in _innermost(message[key], (key,)):
            changed = [*self._messages[:number], _without(message, path), *self._messages[number + 1 :]]
            if self._try(changed, self._fields) != self.text:
                continue
            whole, part = (self._try(messages[: number + 1], self._fields) for messages in (self._messages, changed))
            if whole == part:
                what = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
                raise ValueError(
                    f"{where}: the chat template does not write its {what}; remove it, or name a template that does "
                    "(data.chat_template=FILE)"
                )

    def _try(self, messages: list[dict[str, Any]], fields: dict[str, Any]) -> str:
        try:
            return self._chat.render(messages, fields)[0]
        except ValueError:  # so the change has an effect
            return ""


def has_empty_answer(row: Row, train_on: TrainOn) -> bool:
    """Return whether an answer that counts says nothing, so that only what ends it is learnt."""
    answers = _answers(*_weighed(row, train_on))
    said = ([v.strip() if isinstance(v, str) else v for k, v in m.items() if k != "role"] for m in answers)
    return not all(any(map(_says_something, values)) for values in said)


def _answers(messages: list[dict[str, Any]], weights: list[bool]) -> list[dict[str, Any]]:
    return [m for m, weight in zip(messages, weights, strict=True) if weight and m["role"] == ANSWERING_ROLE]


def _weighed(row: Row, train_on: TrainOn) -> tuple[list[dict[str, Any]], list[bool]]:
    """Return the messages of a row, and which of them count if their role does."""
    messages, weights = _read_messages(row.messages, row.form.fields[-1])
    answers = [number for number, message in enumerate(messages) if message["role"] == ANSWERING_ROLE]
    last = answers[-1:] if train_on is TrainOn.last_answer else answers
    for number in answers:
        weights[number] &= number in last and (train_on is TrainOn.all or number >= row.num_given)
    return messages, weights


def _read_messages(messages: Any, name: str) -> tuple[list[dict[str, Any]], list[bool]]:
    """Return messages in the form that templates read, without nulls, and which of them may count."""
    if not isinstance(messages, list):
        raise ValueError(f"field '{name}' is {type(messages).__name__}, not a list of messages")
    found, weights = [], []
    for number, message in enumerate(messages):
        where = f"field '{name}', message {number}"
        try:
            message = read_message(message) if isinstance(message, dict) else {}
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if "role" not in message or len(message) < 2:
            raise ValueError(f"{where}: expected an object with role and content")
        if message["role"] not in _ROLES:
            raise ValueError(f"{where}: role {message['role']!r} is none of {', '.join(_ROLES)}")
        check_content(message.get("content"), f"{name}[{number}].content")
        if not any(value is not None for key, value in message.items() if key not in ("role", "weight")):
            raise ValueError(f"{where} has no content")
        weight = message.get("weight")
        if weight not in (None, 0, 1) or (weight and message["role"] != ANSWERING_ROLE):
            raise ValueError(f"{where}: weight {weight!r}; answers have 0 (does not count) or 1, others none")
        found.append({key: value for key, value in message.items() if value is not None and key != "weight"})
        weights.append(weight != 0)
    return found, weights


def _read_answers(
    record: dict[str, Any], names: Sequence[str]
) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Return the messages of the prompt, which several answers may begin with, and those of each answer behind them."""
    for name in names:
        if record.get(name) is None:
            has = "messages 'chosen' and 'rejected', and may have a 'prompt'" if len(names) > 1 else "a 'prompt'"
            raise ValueError(f"no field '{name}': a row has {has}")
    given = record.get("prompt")
    prompt = [{"role": "user", "content": given}] if isinstance(given, str) else given
    prompt = [] if prompt is None else _read_messages(prompt, "prompt")[0]
    both = [
        _read_messages([{"role": ANSWERING_ROLE, "content": value}] if isinstance(value, str) else value, name)[0]
        for name, value in ((name, record[name]) for name in names)
    ]
    if len(both) > 1 and both[0] == both[1]:
        raise ValueError("fields 'chosen' and 'rejected' are the same; of such a pair nothing is learnt")
    differs = (i for i, found in enumerate(zip(*both, strict=False)) if found[0] != found[-1])
    common = next(differs, min(map(len, both))) if len(both) > 1 else 0
    if common and prompt and both[0][:common] != prompt:
        raise ValueError("field 'prompt': it is not what 'chosen' and 'rejected' begin with; leave one of them out")
    prompt, answers = prompt or both[0][:common], [messages[common:] for messages in both]
    for name, answer in zip(names, answers, strict=True):
        if not answer or any(m["role"] != ANSWERING_ROLE for m in answer[:1]):
            raise ValueError(f"field '{name}': behind the prompt comes no answer of its own")
    if not prompt:
        none = "and 'chosen' and 'rejected' have no message in common" if len(names) > 1 else "that is not empty"
        raise ValueError(f"no prompt {none}")
    return prompt, answers


def _says_something(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def _innermost(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each innermost part of a value that says something."""
    keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    inner = [key for key in keys if key not in _LABELS and _says_something(value[key])]
    for key in inner:
        yield from _innermost(value[key], (*path, key))
    if not inner:
        yield path


def _without(value: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    value = place = copy.deepcopy(value)
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return value


def _parsed(tools: str) -> Any:
    try:
        return json.loads(tools)
    except ValueError as error:
        raise ValueError(f"field 'tools' is neither a list nor JSON: {error}") from error


def _marked(message: dict[str, Any], number: int) -> tuple[dict[str, Any], list[str]]:
    """Return a message with a mark behind each text of its content, and the marks of texts that are not blank."""
    content = message.get("content")
    if not content:
        return message, []
    parts = [{"text": content}] if isinstance(content, str) else content
    marks = [_MARK.format(f"{number}.{i}") for i in range(len(parts))]
    marked = [part | {"text": part["text"] + mark} for part, mark in zip(parts, marks, strict=True)]
    of_text = [mark for part, mark in zip(parts, marks, strict=True) if part["text"].strip()]
    return message | {"content": marked[0]["text"] if isinstance(content, str) else marked}, of_text


@lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """Return the variables that a template reads and does not set."""
    from jinja2 import Environment, TemplateError, meta

    try:
        plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
        return frozenset(
            meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
        )
    except TemplateError as error:
        raise ValueError(f"the chat template is not valid: {error}") from error


def find_chat(tokenizer: str, chat_template: str | None) -> Chat:
    """Return how chats are written by a tokenizer's, or the given, template; DataError if there is no valid one."""
    text = read_template(chat_template)
    if text is not None and Path(str(chat_template)).name == CHAT_FILE:
        return Chat(**json.loads(text))
    ours = is_ours(tokenizer)
    templates, tokens = (_CHATML, {"eos_token": END_OF_TEXT}) if ours else load_published(tokenizer)
    templates = templates if text is None else text
    if not templates:
        raise DataError(
            f"data.tokenizer={tokenizer}: it has no chat template, which says how its model reads chats; name one "
            "with data.chat_template=<file of a Jinja template>"
        )
    templates = templates if isinstance(templates, dict) else {"default": templates}
    if "default" not in templates:
        raise DataError(
            f"data.tokenizer={tokenizer}: it has the chat templates {sorted(templates)} and no default; name a file with "
            "one of them, data.chat_template=FILE"
        )
    try:
        _ = [variables(template) for template in templates.values()]
    except ValueError as error:
        raise DataError(f"data.chat_template={chat_template or tokenizer}: {error}") from error
    has_date = any("strftime_now" in template for template in templates.values())
    date = datetime.date.today().isoformat() if has_date else ""
    return Chat(templates, tokens, date, is_plain=ours and text is None)


chat_of = lru_cache(maxsize=8)(find_chat)  # the same for every row of a source


def read_template(chat_template: str | None) -> str | None:
    """Return the content of ``data.chat_template``; DataError if it cannot be read."""
    with as_data_error(f"data.chat_template={chat_template}", OSError, UnicodeDecodeError):
        return None if chat_template is None else Path(chat_template).read_text(encoding="utf-8")


def keep_chat(config: DataConfig, directory: Path) -> DataConfig:
    """Write the template into ``directory``; return settings that name it, by which all processes write chats alike."""
    if not _is_templated(config):
        return config
    chat, path = find_chat(config.tokenizer, config.chat_template), directory / CHAT_FILE
    path.write_text(json.dumps(asdict(chat)), encoding="utf-8")
    if chat.date:
        get_logger().warning("the chat template writes today's date; in all chats of this corpus it is %s", chat.date)
    return dataclasses.replace(config, chat_template=str(path))


def build_coding(config: DataConfig, sample: Iterable[str]) -> BuiltTokenizer:
    """Return the tokenizer of :func:`build_tokenizer`, which reads the special tokens that a chat template writes."""
    built = build_tokenizer(config, sample)
    if built.adds_special or not _is_templated(config):
        return built
    built.tokenizer.encode_special_tokens = False
    return built._replace(adds_special=True)


def encoding_facts(config: DataConfig) -> dict[str, Any]:
    """Return what decides the ids besides source and tokenizer files; empty by default, for existing identities."""
    facts: dict[str, Any] = {"train_on": config.train_on.name} if config.train_on is not TrainOn.answers else {}
    if _is_templated(config):
        return facts | {"encoding": ["template", read_template(config.chat_template)]}
    kept = kept_record(config.tokenizer)  # whose text was encoded as this will be
    is_whole = kept.adds_special if kept else config.tokenizer not in OURS
    return facts | ({"encoding": ["whole"]} if is_whole else {})


def coding_hash(config: DataConfig, built: BuiltTokenizer) -> str:
    """Return a hash of :func:`encoding_facts` for a built tokenizer and settings of :func:`keep_chat`, or ""."""
    bare, whole = (built.tokenizer.encode("a", add_special_tokens=adds).ids for adds in (False, built.adds_special))
    facts: list[Any] = [whole] if bare != whole or (built.adds_special and config.content.has_answers) else []
    facts += [read_template(config.chat_template)] if _is_templated(config) else []
    facts += [config.train_on.name] if config.train_on is not TrainOn.answers else []
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest() if facts else ""


def _is_templated(config: DataConfig) -> bool:
    is_plain = config.chat_template is None and is_ours(config.tokenizer)
    return config.content.is_chat and not is_plain
