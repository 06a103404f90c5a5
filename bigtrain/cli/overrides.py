"""Settings on the command line, rewritten for the grammar of Hydra's parser."""

import contextlib
import itertools
import re
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from bigtrain.config.convert import generic_key, key_types, named_sections, optional_sections, value_problems
from bigtrain.errors import raise_problems

VALUED_OPTIONS = {
    "--config-dir",
    "--config-name",
    "--config-path",
    "--package",
    "--cfg",
    "-cd",
    "-cn",
    "-cp",
    "-p",
    "-c",
}


def prepare(args: list[str], schema: type) -> list[str]:
    """Return ``args`` for Hydra: text quoted, options last, named sections nested."""
    args = [_nest(_quote_text(arg, schema), schema) for arg in _options_last(args)]
    raise_problems(_numbers_for_text(args, schema))
    return args


def repeated(args: list[str]) -> dict[str, list[str]]:
    """Return the settings of each key that has several, in their order."""
    by_key: dict[str, list[str]] = {}
    for arg in args:
        if "=" in arg and not arg.startswith("-"):
            by_key.setdefault(arg.partition("=")[0].lstrip("+"), []).append(arg)
    return {key: given for key, given in by_key.items() if len(given) > 1}


def _options_last(args: list[str]) -> list[str]:
    """Return ``args`` with Hydra's options, and their values, behind the settings, as argparse needs them."""
    settings: list[str] = []
    options: list[str] = []
    rest = iter(args)
    for arg in rest:
        (options if arg.startswith("-") else settings).append(arg)
        if arg in VALUED_OPTIONS:
            options += itertools.islice(rest, 1)
    return settings + options


def _numbers_for_text(args: list[str], schema: type) -> Iterator[str]:
    """Find the numbers in sections and lists where text is meant, which need quotes."""
    for override in parsed([arg for arg in args if "{" in arg or "[" in arg]):
        if override.key_or_group in key_types(schema) and isinstance(override.value(), list | dict):
            for problem in value_problems(schema, override.key_or_group, override.value()):
                if "expected str" in problem:
                    yield f"{problem}; text that looks like a number needs quotes"


def _quote_text(arg: str, schema: type) -> str:
    """Quote the value of a text setting, so that ``prompt=Hello, world (1)`` needs no quotes of Hydra's.

    ``null`` for a setting that may be null, ``${train.seed}`` and values in quotes keep their meaning.
    """
    key, equals, value = arg.partition("=")
    keys = key_types(schema)
    hint = keys.get(generic_key(schema, key.lstrip("+")))
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if not equals or hint not in (str, str | None) or quoted or (value == "null" and hint is not str):
        return arg

    def escape(match: re.Match[str]) -> str:
        return match[0] if match[2] in keys else f"{match[1] * 2}\\${{"

    value = re.sub(r"(\\*)\$\{(?=([\w.]+)\}|)", escape, value)
    return f"{key}={QuotedString(text=value, quote=Quote.single).with_quotes()}"


def _nest(arg: str, schema: type) -> str:
    """Write ``data.mixture.web.weight=0.3`` as ``++data.mixture={web:{weight:0.3}}``, which Hydra merges."""
    key, equals, value = arg.lstrip("+").partition("=")
    for section in optional_sections(schema):  # OmegaConf merges into what is null only from the section around it
        parent, _, name = section.rpartition(".")
        if equals and key.startswith(f"{section}.") and key in key_types(schema):
            return f"++{parent}={{{name}:{{{key.removeprefix(f'{section}.')}:{value}}}}}"
        if equals and key == section and value != "null":
            return f"++{parent}={{{name}:{value}}}"
    for named in named_sections(schema):
        if equals and key.startswith(f"{named}."):
            for name in reversed(key.removeprefix(f"{named}.").split(".")):
                value = f"{{{name}:{value}}}"
            return f"++{named}={value}"
        if equals and arg.startswith(f"{named}="):
            return f"++{arg}"
    return arg


def parsed(args: list[str]) -> Iterator[Override]:
    """Yield the well-formed settings among ``args``, without Hydra's own."""
    parser = OverridesParser.create()
    for arg in args:
        with contextlib.suppress(HydraException):
            override = parser.parse_override(arg)
            if not override.is_hydra_override() and not arg.startswith("-"):
                yield override
