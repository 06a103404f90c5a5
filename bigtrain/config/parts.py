"""A user's own parts: models, objectives, data and loggers, by the name of a module and of something in it.

Modules come in by two doors: ``--import ./ideas.py`` and packages' entry points in the group ``bigtrain``. Both are
opened by what is typed. A name in a file that is read (a configuration, a checkpoint) is only looked up.
"""

import dataclasses
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from bigtrain.config.bounds import out_of_bounds
from bigtrain.config.convert import from_dict, nearest, to_dict
from bigtrain.errors import ConfigError, first_line, raise_problems

GROUP = "bigtrain"
"""Of entry points: ``[project.entry-points.bigtrain] mypkg = "mypkg.parts"``."""
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True, slots=True)
class _Module:
    typed: str
    """What was typed after ``--import``; empty for parts that a Python program has given."""
    version: str
    """Hash of the file, or version of the package."""
    parts: Mapping[str, Any]


_modules: dict[str, _Module] = {}  # a fact of the process, as sys.modules is


def is_own(name: str | None) -> bool:
    """Return whether ``name`` has the form of an own part's: ``ideas.focal``."""
    return bool(name and NAME.fullmatch(name))


def bring_in(typed: str) -> None:
    """Import what follows ``--import``: a Python file, or the name of a package's entry point."""
    if typed.endswith(".py") or os.sep in typed:
        _bring_in_file(typed)
    elif not bring_in_package(typed):
        file = f"; did you mean --import ./{typed}.py?" if Path(f"{typed}.py").is_file() else ""
        raise ConfigError(
            f"--import {typed}: neither a file (./ideas.py) nor a package with an entry point in the group {GROUP}{file}"
        )


def bring_in_package(name: str) -> bool:
    """Import the entry point ``name``, unless that has been done; return whether there is one."""
    if name in _modules:
        return True
    found = list(importlib.metadata.entry_points(group=GROUP, name=name))
    for point in found[:1]:
        try:
            module = point.load()
        except Exception as error:  # anything may go wrong in other people's code
            raise ConfigError(f"--import {name}: {point.value} cannot be imported: {told(error)}") from error
        version = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        _modules[name] = _Module(name, version, vars(module))
    return bool(found)


def _bring_in_file(typed: str) -> None:
    path = Path(typed).expanduser().resolve()
    name = path.stem
    if not path.is_file():
        raise ConfigError(f"--import {typed}: there is no such file")
    if not name.isidentifier():
        raise ConfigError(f"--import {typed}: {name!r} cannot be the name of a module; use letters, digits and _")
    there = sys.modules.get(name)
    if there and Path(getattr(there, "__file__", None) or "").resolve() != path:
        raise ConfigError(f"--import {typed}: there is another module {name} already; rename the file")
    content = path.read_bytes()
    module = there or _run(name, path, content, typed)
    _modules[name] = _Module(typed, _hash(content), vars(module))


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs the bytes that were hashed: no compiled code from a cache, which may be older."""

    def __init__(self, name: str, path: Path, content: bytes) -> None:
        super().__init__(name, str(path))
        self.content = content

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.content, self.path)


def _run(name: str, path: Path, content: bytes, typed: str) -> Any:
    loader = _Loader(name, path, content)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path, loader=loader))
    sys.modules[name] = module  # dataclasses look their module up
    try:
        loader.exec_module(module)
    except Exception as error:  # anything may go wrong in other people's code
        del sys.modules[name]
        raise ConfigError(f"--import {typed}: {told(error, path)}") from error
    return module


def told(error: Exception, path: Path | None = None) -> str:
    """Return an error of other people's code in one line, with its place, in the file at ``path`` if it is there."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path and frame.filename == str(path)] or frames
    what = f"{type(error).__name__}: {first_line(error)}"
    return f"line {own[-1].lineno}: {what}" if path else f"{own[-1].filename}:{own[-1].lineno}: {what}"


def give(part: Any) -> str:
    """Make a part of a Python program known by the name of its module and its own, and return that."""
    definition = part if inspect.isclass(part) or inspect.isroutine(part) else type(part)
    name, attribute = definition.__module__, re.sub(r"\W+", "_", definition.__qualname__)
    known = _modules.get(name) or _Module("", _version_of(definition), {})
    _modules[name] = dataclasses.replace(known, parts={**known.parts, attribute: part})
    return f"{name}.{attribute}"


def _version_of(definition: Any) -> str:
    """Return the hash of the file that something is defined in; in a notebook, which has none, of its own source."""
    path = getattr(sys.modules[definition.__module__], "__file__", None)
    if path and Path(path).is_file():
        return _hash(Path(path).read_bytes())
    try:
        return _hash(inspect.getsource(definition).encode())
    except (OSError, TypeError):  # made by exec, or in C
        return ""


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def versions() -> dict[str, str]:
    """Return the content of each module by name: the hash of a file, the version of a package."""
    return {name: module.version for name, module in _modules.items()}


def imports() -> list[str]:
    """Return what was typed after each ``--import``, for the processes that this one starts."""
    return [module.typed for module in _modules.values() if module.typed]


def find(name: str, setting: str) -> Any:
    """Return the part with a name, such as ``ideas.focal``, that ``setting`` has; nothing is imported."""
    module, _, attribute = name.rpartition(".")
    if module not in _modules:
        raise ConfigError(f"{setting}={name}: nothing imported has it; {_how_to_import(module)}")
    parts = _modules[module].parts
    if attribute not in parts:
        own = [key for key, part in parts.items() if callable(part) and getattr(part, "__module__", module) == module]
        raise ConfigError(f"{setting}={name}: {module} has no {attribute}; {nearest(attribute, own)}")
    return parts[attribute]


def _how_to_import(module: str) -> str:
    if module == "__main__":
        return "it was given from Python: name it again there, as in bigtrain.load_run(path, network=...)"
    return f"add --import {module if importlib.metadata.entry_points(group=GROUP, name=module) else f'./{module}.py'}"


def build(name: str, settings: Mapping[str, Any], *, setting: str, from_user: bool = False) -> Any:
    """Return the part that ``setting`` names: of a dataclass an instance with these settings, else as it is."""
    part, section = find(name, setting), f"{setting.rpartition('.')[0]}.settings"
    if not is_dataclass(part):
        if settings:
            raise ConfigError(f"{section}: {name} has no settings: it is not a dataclass")
        return part
    schema = part if isinstance(part, type) else type(part)
    given = {} if isinstance(part, type) else to_dict(part)
    try:
        return from_dict(schema, {**given, **settings}, from_user=from_user, section=f"{section}.")
    except (TypeError, ValueError) as error:  # of its __post_init__
        raise ConfigError(f"{section}: {name}: {first_line(error)}") from error


def instance(name: str, settings: Mapping[str, Any], *, setting: str) -> Any:
    """Return :func:`build`, or of a class without settings an instance."""
    part = build(name, settings, setting=setting)
    return part() if isinstance(part, type) else part


def settings_of(name: str, settings: Mapping[str, Any], *, setting: str) -> dict[str, Any]:
    """Return ``settings`` as a user gives them with the defaults of all others, as plain data."""
    part = build(name, settings, setting=setting, from_user=True)
    if not is_dataclass(part):
        return {}
    raise_problems(out_of_bounds(part, f"{setting.rpartition('.')[0]}.settings."))
    return to_dict(part)
