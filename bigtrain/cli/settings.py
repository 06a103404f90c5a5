"""Every setting of a run with its type, default, bound and meaning (``--help all``, docs/settings.md); config groups.

``python -m bigtrain.cli.settings > docs/settings.md`` writes the page anew.
"""

import dataclasses
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bigtrain.config import TrainConfig
from bigtrain.config.bounds import Bound, OnlyIf, metadata
from bigtrain.config.convert import PathMark, key_docs, section_of, to_dict, type_hints

HEAD = """\
# Settings

Every setting of a run: `key` = default (type, bound), and what it means. A key is set on the command line, as in
`bigtrain train +model=gpt_nano train.steps=200`; a preset of `configs/` sets several; `*` is a name of your choice.
`bigtrain train --help all` says the same.

Written by `python -m bigtrain.cli.settings > docs/settings.md` from the dataclasses of `bigtrain/config`.
"""

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(place for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if place.is_dir())


class Setting(NamedTuple):
    """A key, or a section of keys."""

    key: str
    kind: str
    """Type and bound; empty for a section."""
    default: str
    meaning: str


def settings(schema: type = TrainConfig) -> list[Setting]:
    """Return every key of ``schema``, the keys of a section before the sections in it."""
    return list(_walk(schema, "", key_docs(schema)))


def _walk(schema: type, prefix: str, docs: dict[str, str]) -> Iterator[Setting]:
    sections = []
    for field in dataclasses.fields(schema):
        key = prefix + field.name
        hint = type_hints(schema)[field.name]
        star, inner = section_of(hint)
        said = [str(item) for item in metadata(hint) if isinstance(item, Bound | OnlyIf)]
        if inner:
            condition = f" ({', '.join(said)})" if said else ""
            sections.append((Setting(key, "", "", _one_line(inner.__doc__) + condition), inner, star))
        else:
            yield Setting(key, ", ".join([_type_name(hint), *said]), _default(field), _one_line(docs.get(key, "")))
    for section, inner, star in sections:
        yield section
        yield from _walk(inner, f"{section.key}.{star}", docs)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _type_name(hint: Any) -> str:
    inner = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return f"{_type_name(inner[0])} or null"
    if typing.get_origin(hint) is typing.Annotated:
        marks = [mark for mark in hint.__metadata__ if isinstance(mark, PathMark)]
        return {PathMark.local: "path", PathMark.any: "path or URL"}[marks[0]] if marks else _type_name(inner[0])
    if typing.get_origin(hint) is list:
        return f"list of {_type_name(inner[0])}"
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(f"{field.name}: ..." for field in dataclasses.fields(hint)) + "}"
    if issubclass(hint, Enum):
        return " | ".join(hint.__members__)
    return {str: "text", bool: "true | false"}.get(hint, hint.__name__)


def _default(field: dataclasses.Field) -> str:
    if field.default is field.default_factory:  # both are missing
        return "<needed>"
    value = to_dict(field.default if field.default_factory is dataclasses.MISSING else field.default_factory())
    return value if isinstance(value, str) else json.dumps(value)


def setting_lines(schema: type, keys: list[str] | None = None, *, prefix: str = "") -> str:
    """Return one line per setting of ``schema``, or of ``keys`` only: the key, its default and what it is."""
    by_key = {setting.key: setting for setting in settings(schema) if setting.kind and "*" not in setting.key}
    shown = [by_key[key] for key in keys] if keys else by_key.values()
    lines = (f"  {f'{prefix}{s.key}={s.default}':<38} {s.meaning.replace('``', '')}" for s in shown)
    return "\n".join(lines)


def lines(schema: type = TrainConfig, prefix: str = "") -> str:
    return "\n".join(
        f"{prefix}{key}={default}  ({kind})\n{textwrap.indent(textwrap.fill(meaning, 110), '      ')}"
        if kind
        else f"\n{prefix}{key}: {meaning}\n"
        for key, kind, default, meaning in settings(schema)
    ).replace("``", "")


def page() -> str:
    """Return docs/settings.md."""
    lines = [HEAD]
    for key, kind, default, meaning in settings():
        if kind:
            text = f"- `{key}` = `{default}` ({kind}): {meaning}"
            lines.append(textwrap.fill(text.replace("``", "`"), 118, subsequent_indent="  ", break_on_hyphens=False))
        else:
            text = textwrap.fill(meaning.replace("``", "`"), 118, break_on_hyphens=False)
            lines.append(f"\n{'###' if '.' in key else '##'} {key}\n\n{text}\n")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def groups(config_name: str = "train") -> dict[str, str | None]:
    """Return the config groups of ``configs/<config_name>.yaml``, with the option in its defaults list or None."""
    found: dict[str, str | None] = dict.fromkeys(("adapter", "articles", "experiment", "model", "recipe"))
    for entry in yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text())["defaults"]:
        if isinstance(entry, dict):
            found.update(entry)
        elif entry == "train":
            found |= groups()
    return dict(sorted(found.items()))


def group_options(group: str) -> list[str]:
    """Return the names that ``group=<name>`` accepts."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def group_lines() -> str:
    """Return one line per config group with its options; defaults are marked with a star."""
    lines = []
    for group, default in groups().items():
        options = [name + "*" * (name == default) for name in group_options(group)]
        text = f"  {group if default else '+' + group:<12} {'  '.join(options)}"
        lines.append(textwrap.fill(text, width=110, subsequent_indent=" " * 15, break_on_hyphens=False))
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
