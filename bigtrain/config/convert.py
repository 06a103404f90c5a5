"""Plain data to typed dataclasses and back, strictly, with hints for what was misspelt."""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import os
import re
import textwrap
import types
import typing
from enum import Enum
from typing import Annotated, Any, TypeVar

from bigtrain.config.foreign import OTHERWISE, OURS
from bigtrain.errors import ConfigError

T = TypeVar("T")


class PathMark(Enum):
    """Marks a field that holds a path (or, where names are allowed, a name in its place)."""

    local = "a path on this machine"
    any = "a path or a URL"


LocalPath = Annotated[str, PathMark.local]
PathOrUrl = Annotated[str, PathMark.any]
MaybeEmpty = Annotated[str, "may be empty"]
"""Text of which none is some."""

SEVERAL = "several are a pattern that matches them, or a mixture of sources (data=mixture)"
"""What to do in place of a list of paths."""
MAX_NAME_BYTES = 255
"""Of a file, on the usual file systems."""
_MAX_PATH_BYTES = 4095 - 200  # what a run, a corpus and a checkpoint put below it fits, too
_URL = re.compile(r"[^/]+:/")  # s3://bucket, cache::s3://bucket, me@host:/path
_VARIABLE = re.compile(r"\$(?:\{(?:oc\.env:)?([A-Za-z_]\w*)(?:,([^}]*))?\}|([A-Za-z_]\w*))")


def to_dict(config: Any) -> Any:
    """Return ``config`` (a config dataclass) as plain JSON-able data; enums become their names."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, list):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(item) for key, item in config.items()}
    return config


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested plain data as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def from_dict(schema: type[T], values: dict[str, Any], *, from_user: bool = False, section: str = "") -> T:
    """Build the dataclass ``schema`` from plain data, strictly; a ConfigError lists all that is unknown or wrong.

    With ``from_user`` paths are expanded by :func:`expand_path`, numbers must be finite, and text not empty.
    """
    valid_keys = [f"{section}{key}" for key in key_types(typing.cast(type, schema))]
    builder = _Builder(valid_keys, from_user=from_user)
    config = builder.build(schema, values, section)
    if builder.problems:
        raise ConfigError("\n".join(builder.problems))
    return config


def expand_path(text: str, mark: PathMark = PathMark.local) -> str:
    """Return a path with ``~``, ``$NAME``, ``${NAME}`` and ``${oc.env:NAME}`` (or ``${oc.env:NAME,default}``) expanded.

    ValueError: a URL where none is allowed, no such variable, or no such home directory.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        value = os.environ.get(name, match[2])
        if value is None and os.path.lexists(text):
            return match[0]  # what exists by that name is meant
        if value is None:
            raise ValueError(f"the environment variable {name} is not set")
        return value

    expanded = os.path.expanduser(_VARIABLE.sub(value_of, text))
    if not expanded.strip():
        raise ValueError("the environment variable is empty")
    if not _URL.match(expanded) and (wrong := _refused_name(expanded)):
        raise ValueError(wrong)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise ValueError("there is no such home directory")
    if "${" in expanded:
        raise ValueError("of what is in ${ } only environment variables are known, as ${oc.env:HOME}")
    if mark is PathMark.local and _URL.match(expanded):
        raise ValueError(
            "a URL or another machine, where a path on this machine is meant; mount or copy what is there "
            f"(a directory of that name is ./{expanded})"
        )
    return expanded


def _refused_name(path: str) -> str:
    """Return why no file system takes a path; empty if one may."""
    encoded = path.encode(errors="surrogateescape")
    if b"\0" in encoded:
        return "a NUL character is in no file name"
    if len(encoded) > _MAX_PATH_BYTES:
        return f"a path of {len(encoded)} bytes; {_MAX_PATH_BYTES} are possible"
    long = max(map(len, encoded.split(b"/")))
    return f"a name of {long} bytes; {MAX_NAME_BYTES} are possible" if long > MAX_NAME_BYTES else ""


def value_problems(schema: type, key: str, value: Any) -> list[str]:
    """Return what is wrong with plain ``value`` for the dotted ``key`` of ``schema``."""
    types_by_key = key_types(schema)
    builder = _Builder(list(types_by_key))
    builder.convert(types_by_key[key], value, key)
    return builder.problems


@functools.cache
def type_hints(schema: type, *, include_extras: bool = True) -> dict[str, Any]:
    """Return the types of the fields of a dataclass, with what ``Annotated`` puts beside them."""
    hints = typing.get_type_hints(schema, include_extras=include_extras)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


@functools.cache
def key_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every dotted key of ``schema``, sections included; of sections by name, ``*`` is the name."""
    types_by_key = {}
    for name, hint in type_hints(schema, include_extras=False).items():
        types_by_key[prefix + name] = hint
        star, section = section_of(hint)
        if section:
            types_by_key |= key_types(section, f"{prefix}{name}.{star}")
    return types_by_key


def named_sections(schema: type) -> list[str]:
    """Return the dotted keys of ``schema`` that hold sections or values by name: those of type ``dict``."""
    return [key for key, hint in key_types(schema).items() if typing.get_origin(hint) is dict]


def optional_sections(schema: type) -> list[str]:
    """Return the dotted keys of ``schema`` that hold a section or null."""
    hints = key_types(schema).items()
    return [key for key, hint in hints if hint is not _without_none(hint) and section_of(hint)[1]]


def generic_key(schema: type, key: str) -> str:
    """Return ``key`` with ``*`` for the name of a section by name: ``data.mixture.web.path`` -> ``data.mixture.*.path``."""
    for named in named_sections(schema):
        if key.startswith(f"{named}."):
            return re.sub(rf"^{re.escape(named)}\.[^.]+", f"{named}.*", key)
    return key


def is_text(schema: type, key: str) -> bool:
    """Return whether a dotted key holds text, or a list of texts."""
    hint = _without_none(key_types(schema).get(generic_key(schema, key)))
    return hint is str or hint == list[str]


def key_docs(schema: type, prefix: str = "") -> dict[str, str]:
    """Return the docstring under every field of ``schema``, or of its section, by the dotted keys of :func:`key_types`."""
    docs = {}
    for base in filter(dataclasses.is_dataclass, reversed(schema.__mro__)):
        definition: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for statement, following in itertools.pairwise(definition.body):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[prefix + name] = text
    for name, hint in type_hints(schema, include_extras=False).items():
        star, section = section_of(hint)
        if section:
            docs.setdefault(prefix + name, section.__doc__)
            docs |= key_docs(section, f"{prefix}{name}.{star}")
    return docs


def nearest(name: str, valid: list[str]) -> str:
    """Return a hint for a misspelt ``name``: the nearest valid one, or all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "choose one of: " + ", ".join(valid)


def nearest_key(key: str, valid: list[str]) -> str:
    """Return a hint for an unknown dotted ``key``, wherever in the configuration the nearest one is."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return (whole + last) / 2

    theirs = key.rpartition(".")[2].replace("-", "_")
    if theirs in OTHERWISE:
        return OTHERWISE[theirs]
    if (ours := OURS.get(theirs)) in valid:
        return f"here that is '{ours}'"
    best = max(valid, key=likeness)
    if likeness(best) >= 0.6:
        return f"did you mean '{best}'?"
    section = key.rpartition(".")[0]
    siblings = [k for k in valid if k.rpartition(".")[0] == section] or [k for k in valid if "." not in k]
    return "choose one of: " + ", ".join(siblings)


def _without_none(hint: Any) -> Any:
    """Return ``X`` for ``X | None`` and every other type as it is."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def section_of(hint: Any) -> tuple[str, Any]:
    """Return the dataclass that a field's type holds, if any, after ``"*."`` if it holds several by name."""
    hint = _without_none(hint.__origin__ if typing.get_origin(hint) is Annotated else hint)
    if dataclasses.is_dataclass(hint):
        return "", hint
    values = typing.get_args(hint)[1:] if typing.get_origin(hint) is dict else ()
    return "*.", next(filter(dataclasses.is_dataclass, values), None)


class _Builder:
    """Builds dataclasses from plain data and collects what is wrong with it."""

    def __init__(self, valid_keys: list[str], *, from_user: bool = False) -> None:
        self.valid_keys = valid_keys
        self.from_user = from_user
        self.problems: list[str] = []

    def build(self, schema: Any, values: Any, path: str) -> Any:
        if not isinstance(values, dict):
            return self._problem(f"{path.rstrip('.')}: expected a section with keys, got {values!r}")
        hints = type_hints(schema)
        for key in values:
            if key not in hints:
                self._problem(f"{path}{key}: unknown key; {nearest_key(f'{path}{key}', self.valid_keys)}")
        for field_ in dataclasses.fields(schema):
            if field_.name not in values and field_.default is field_.default_factory is dataclasses.MISSING:
                self._problem(f"{path}{field_.name}: missing")
        known = {k: self.convert(hints[k], v, f"{path}{k}") for k, v in values.items() if k in hints}
        return None if self.problems else schema(**known)

    def convert(self, hint: Any, value: Any, path: str) -> Any:
        """Return ``value`` as ``hint``, or None where there are problems."""
        if value is None and hint is not _without_none(hint):
            return None
        hint = _without_none(hint)
        if hint is Any:
            return value
        if hint == MaybeEmpty and isinstance(value, str):
            return value
        if typing.get_origin(hint) is Annotated:
            marks = [mark for mark in hint.__metadata__ if isinstance(mark, PathMark)]
            if PathMark.any in marks and isinstance(value, list):
                return self._problem(
                    f"{path}: one path, directory or pattern ('*.jsonl') is meant, got {value!r}; {SEVERAL}"
                )
            converted = self.convert(hint.__origin__, value, path)
            return self._path(marks[0], converted, path) if marks and self.from_user else converted
        if dataclasses.is_dataclass(hint):
            return self.build(hint, value, f"{path}.")
        if typing.get_origin(hint) is list:
            if not isinstance(value, list):
                return self._problem(f"{path}: expected a list, got {value!r}")
            return [self.convert(typing.get_args(hint)[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
        if typing.get_origin(hint) is dict:
            if not isinstance(value, dict):
                return self._problem(f"{path}: expected names with values, got {value!r}")
            return {key: self.convert(typing.get_args(hint)[1], item, f"{path}.{key}") for key, item in value.items()}
        if not isinstance(hint, type) or typing.get_origin(hint):
            return self._problem(
                f"{path}: a setting cannot be a {hint}; use bool, int, float, str, an Enum, a list, a dict or a dataclass"
            )
        if issubclass(hint, Enum) and not isinstance(value, hint):
            if not isinstance(value, str) or value not in hint.__members__:
                return self._problem(f"{path}: unknown value {value!r}; {nearest(str(value), list(hint.__members__))}")
            return hint[value]
        if hint is float and type(value) is int:
            value = float(value) if abs(value) < 2**1023 else math.inf
        if type(value) is not hint:
            return self._problem(f"{path}: expected {hint.__name__}, got {value!r}")
        if self.from_user and hint is float and not math.isfinite(value):
            return self._problem(f"{path}={value}: must be a finite number")
        if self.from_user and hint is str and not value.strip():
            return self._problem(f"{path}: empty, as a variable that is not set; give it a value, or leave it out")
        return value

    def _path(self, mark: PathMark, text: str | None, path: str) -> str | None:
        if text is None:
            return None
        try:
            return expand_path(text, mark)
        except ValueError as error:
            return self._problem(f"{path}={text}: {error}")

    def _problem(self, text: str) -> None:
        self.problems.append(text)
