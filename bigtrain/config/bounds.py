"""What stands beside a field of the configuration: the numbers it may have, and the settings it counts with."""

import dataclasses
import operator
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bigtrain.config.convert import to_dict, type_hints

LARGEST = 10**12
"""Upper bound of whole numbers that have none of their own."""
_WORDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_CHOSEN_BY_GROUP = ("data.source", "engine.kind", "optimizer.kind", "scheduler.kind", "task.kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a number is compared with; of a list, each of its numbers."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def limits(self) -> dict[str, float]:
        return {name: limit for name in _WORDS if (limit := getattr(self, name)) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{_WORDS[name]} {limit}" for name, limit in self.limits().items())


class OnlyIf:
    """Condition of a setting: another one of its section has, or has not, one of some values."""

    def __init__(self, name: str, *, is_in: tuple[Any, ...] = (), not_in: tuple[Any, ...] = ()) -> None:
        self.name, self.is_in, self.not_in = name, is_in, not_in

    def holds(self, section: Any) -> bool:
        """Return whether the setting counts in ``section``."""
        value = to_dict(getattr(section, self.name))
        return value in self.is_in if self.is_in else value not in self.not_in

    def __str__(self) -> str:
        values = " | ".join(str(value) for value in self.is_in or self.not_in)
        return f"{'only' if self.is_in else 'not'} with {self.name}={values}"


def metadata(hint: Any) -> list[Any]:
    """Return all that stands beside a type, or beside a part of it, in ``Annotated``."""
    return [*getattr(hint, "__metadata__", ()), *(item for part in typing.get_args(hint) for item in metadata(part))]


def out_of_bounds(section: object, prefix: str = "") -> list[str]:
    """Return which numbers of a config dataclass are not as its fields say; those that are not set are right."""
    schema: type = type(section)
    return [
        problem
        for name, hint in type_hints(schema).items()
        for problem in _outside(f"{prefix}{name}", getattr(section, name), hint)
    ]


def _outside(key: str, value: Any, hint: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        yield from out_of_bounds(value, f"{key}.")
    elif isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _outside(f"{key}.{name}" if isinstance(value, dict) else f"{key}[{name}]", item, hint)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limits = next((item.limits() for item in metadata(hint) if isinstance(item, Bound)), {})
        if isinstance(value, int):
            limits.setdefault("le", LARGEST)
        broken = [name for name, limit in limits.items() if not getattr(operator, name)(value, limit)]
        if broken:
            yield f"{key}={value}: must be {_WORDS[broken[0]]} {limits[broken[0]]}"


def without_effect(section: object, prefix: str = "", *, parts: list[Any] | None = None) -> list[str]:
    """Return a sentence for every changed setting of a section that counts in none of ``parts``, by default itself."""
    schema: type = type(section)
    default, parts, found = schema(), parts or [section], []
    for name, hint in type_hints(schema).items():
        value, usual = getattr(section, name), getattr(default, name)
        conditions = [item for item in metadata(hint) if isinstance(item, OnlyIf)]
        if value != usual and not any(all(c.holds(part) for c in conditions) for part in parts):
            condition = next(condition for condition in conditions if not condition.holds(parts[0]))
            other = f"{prefix}{condition.name}"
            shown = other.partition(".")[0] if other in _CHOSEN_BY_GROUP else other
            found.append(f"{prefix}{name} is ignored by {shown}={to_dict(getattr(parts[0], condition.name))}")
        elif dataclasses.is_dataclass(value) and dataclasses.is_dataclass(usual):
            found += without_effect(value, f"{prefix}{name}.")
    return found
