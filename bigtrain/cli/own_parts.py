"""A user's own parts on the command line: ``--import ./ideas.py``, ``task=ideas.focal``."""

import dataclasses
import inspect
from typing import Any

from bigtrain.config import DataSource, ModelKind, parts
from bigtrain.config.bounds import out_of_bounds
from bigtrain.config.check import RunT
from bigtrain.config.convert import from_dict, to_dict
from bigtrain.config.tasks import SMALL_NETWORKS
from bigtrain.errors import ConfigError, raise_problems

IMPORT = "--import"
SHORT_FOR = {
    "task": "task.kind={}",
    "+model": "+model=own model.name={}",
    "data": "data=own data.path={}",
}
"""What ``<group>=ideas.part`` is short for."""
KEYS = ("task", "task.kind", "model", "model.name", "data", "data.path", "logging.also")
KNOWN_TO_DATA = ("vocab_size", "max_positions")
"""Parts of the model's shape that an own model may say, by settings of the same names."""


def bring_in(args: list[str]) -> list[str]:
    """Import what ``--import`` names, and return the other arguments."""
    rest, words = [], iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option != IMPORT:
            rest.append(word)
        elif value := value if equals else next(words, ""):
            parts.bring_in(value)
        else:
            raise ConfigError(f"{IMPORT}: of what? write {IMPORT} ./ideas.py")
    return rest


def given(*, network: Any, objective: Any, data: Any) -> list[str]:
    """Make parts of a program known, and return the settings that choose them; those that are None are left out."""
    chosen = {"+model": network, "task": objective, "data": data}
    return [f"{key}={parts.give(part)}" for key, part in chosen.items() if part is not None]


def with_own_parts(args: list[str]) -> list[str]:
    """Return ``args`` with own parts, such as ``task=ideas.focal``, whose packages are imported, as settings."""
    settings = []
    for arg in args:
        key, _, value = arg.partition("=")
        if key.lstrip("+") in KEYS:
            for name in filter(parts.is_own, value.strip("[]'\"").split(",")):
                parts.bring_in_package(name.partition(".")[0])
        is_short = key in SHORT_FOR and parts.is_own(value)
        settings += SHORT_FOR[key].format(value).split() if is_short else [arg]
    return settings


def recorded(config: RunT) -> RunT:
    """Return a user's ``config`` with all settings of its own parts, and the contents that were imported."""
    task, model, data = config.task, config.model, config.data
    for name in config.logging.also:
        parts.find(name, "logging.also")
    if parts.is_own(task.kind):
        settings = parts.settings_of(task.kind, task.settings, setting="task.kind")
        task = dataclasses.replace(task, settings=settings)
    if model.kind is ModelKind.own and parts.is_own(model.name):
        settings = parts.settings_of(model.name, model.settings, setting="model.name")
        shared = {key: settings[key] for key in KNOWN_TO_DATA if key in settings}
        model = dataclasses.replace(model, settings=settings, **shared)
    if model.kind is ModelKind.own and model.name in SMALL_NETWORKS:
        from bigtrain.models.small import NETWORKS

        network = from_dict(NETWORKS[model.name], model.settings, from_user=True, section="model.settings.")
        raise_problems(out_of_bounds(network, "model.settings."))
        model = dataclasses.replace(model, settings=to_dict(network))
    if data.source is DataSource.own and parts.is_own(data.path):
        settings = parts.settings_of(data.path, data.settings, setting="data.path")
        data = dataclasses.replace(data, settings=settings)
    return dataclasses.replace(config, task=task, model=model, data=data, imports=parts.versions())


def help_page(args: list[str]) -> str:
    """Return the settings of the own parts in ``args``; empty without any."""
    from bigtrain.cli.settings import lines

    pages = []
    for arg in with_own_parts([arg for arg in args if parts.is_own(arg.partition("=")[2])]):
        key, _, name = arg.partition("=")
        if parts.is_own(name) and dataclasses.is_dataclass(part := parts.find(name, key)):
            schema = part if isinstance(part, type) else type(part)
            section = f"{key.partition('.')[0]}.settings."
            pages.append(f"{name}: {inspect.getdoc(schema)}\n\n{lines(schema, section)}")
    return "\n\n".join(pages)
