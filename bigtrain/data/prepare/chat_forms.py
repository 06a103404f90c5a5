"""Forms in which data sets hold conversations, told apart by the fields of a row, and the messages that each stands for.

``messages`` are OpenAI's. ShareGPT and Alpaca are read as LlamaFactory documents them (``data/README.md`` there), prompt
and completion as TRL does ("Dataset formats"): a completion in text is no chat, and no template writes it.
"""

import json
from collections.abc import Collection
from typing import Any, NamedTuple

_SENDERS = {  # by ShareGPT's ``from``
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}


class Form(NamedTuple):
    """Fields by which a form is known, and others that belong to it."""

    name: str
    fields: tuple[str, ...]
    others: tuple[str, ...] = ()


class Row(NamedTuple):
    """The conversation of a row."""

    form: Form
    messages: Any  # as they stand in the row, unchecked; of texts, the prompt and the completion
    fields: dict[str, Any]  # what else the row has
    num_given: int = 0  # messages at the beginning that do not count, whoever wrote them: a prompt
    is_text: bool = False


def form_of(names: Collection[str], messages_field: str) -> Form:
    """Return the form of a row, or of a table's columns; ValueError if it is none."""
    forms = (
        Form(messages_field, (messages_field,)),
        Form("ShareGPT", ("conversations",), ("system",)),
        Form("prompt and completion", ("prompt", "completion")),
        Form("Alpaca", ("instruction", "output"), ("input", "system", "history")),
    )
    found = next((form for form in forms if all(name in names for name in form.fields)), None)
    if found is None:
        advice = "data.messages_field names another field with messages"
        if "chosen" in names and "rejected" in names:
            advice = "data.content=preference is for 'chosen' and 'rejected'"
        raise ValueError(
            f"no field '{messages_field}' or 'conversations' (messages), 'prompt' and 'completion', or 'instruction' and "
            f"'output' among {sorted(names)}; {advice}"
        )
    return found


def advice_without_text(names: Collection[str], messages_field: str) -> str:
    """Return what to add to a message about a row without a text field: the setting that reads chats, where it is one."""
    if "chosen" in names and "rejected" in names:
        return "; data.content=preference reads 'chosen' and 'rejected'"
    try:
        return f"; data.content=chat reads this row, as {form_of(names, messages_field).name}"
    except ValueError:
        return ""


def read_row(record: dict[str, Any], messages_field: str) -> Row:
    """Return the conversation in a record; ValueError if it has none."""
    form = form_of(record, messages_field)
    fields = {name: value for name, value in record.items() if name not in (*form.fields, *form.others)}
    if form.name == "Alpaca":
        return Row(form, _alpaca(record), fields)
    if form.name == "prompt and completion":
        prompt, completion = (record[name] for name in form.fields)
        if isinstance(prompt, str) and isinstance(completion, str):
            return Row(form, [prompt, completion], fields, is_text=True)
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            kinds = " and ".join(type(record[name]).__name__ for name in form.fields)
            raise ValueError(f"fields 'prompt' and 'completion' are {kinds}; both are text, or both lists of messages")
        return Row(form, prompt + completion, fields, num_given=len(prompt))
    messages = record[form.fields[0]]
    if form.name == "ShareGPT" and record.get("system") and isinstance(messages, list):
        messages = [{"role": "system", "content": record["system"]}, *messages]
    return Row(form, messages, fields)


def _alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of instruction, input and output, behind those of a system text and earlier exchanges."""
    for name in ("instruction", "output", "input", "system"):
        if not isinstance(record.get(name), str | None):
            raise ValueError(f"field '{name}' is {type(record[name]).__name__}, not text")
    history = record.get("history") or []
    if not all(isinstance(exchange, list | tuple) and len(exchange) == 2 for exchange in history):
        raise ValueError("field 'history' is no list of pairs of an instruction and an answer")
    question = "\n".join(record[name] for name in ("instruction", "input") if record.get(name))
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for asked, answered in [*history, (question, record["output"])]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def read_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with role and content, also one with ShareGPT's ``from`` and ``value``; ValueError if it has both."""
    if "from" not in message:
        return message
    if "role" in message or "content" in message or "value" not in message:
        raise ValueError(f"has {sorted(message)}; expected from and value, or role and content")
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    sender, value = message["from"], message["value"]
    if sender != "function_call":
        return {"role": _SENDERS.get(sender, sender), "content": value} | others
    try:
        calls = json.loads(value)
    except (TypeError, ValueError) as error:
        raise ValueError("what function_call says is not JSON") from error
    calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return {"role": "assistant", "tool_calls": calls} | others


def check_content(content: Any, where: str) -> None:
    """Refuse a content that is neither text nor parts of text."""
    if not isinstance(content, str | list | None):
        raise ValueError(f"field '{where}' is {type(content).__name__}, not text")
    for number, part in enumerate(content if isinstance(content, list) else []):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ValueError(f"field '{where}[{number}]' is {kind}, and only text can be trained on")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(f"field '{where}[{number}]' has {sorted(part)}; expected type and text")


def without_null(value: Any) -> Any:
    """Return a row of a table without nulls, which may only mean that other rows have a field."""
    if isinstance(value, dict):
        return {key: without_null(item) for key, item in value.items() if item is not None}
    return [without_null(item) for item in value] if isinstance(value, list) else value
