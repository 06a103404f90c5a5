"""Composition of settings by Hydra, which parses and has returned before anything of the command runs."""

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import hydra
from hydra._internal.hydra import Hydra
from hydra.conf import HydraConf, RunDir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from bigtrain.cli import overrides, own_parts, yaml_source
from bigtrain.cli.settings import CONFIGS, groups
from bigtrain.config.convert import from_dict, key_types, nearest, nearest_key, value_problems
from bigtrain.errors import EXIT_USER_ERROR, BigtrainError, ConfigError, raise_problems
from bigtrain.processes import RankInfo

T = TypeVar("T")
TORCHRUN_OPTION = re.compile(r"--(nproc|nnodes|node[-_]rank|master|rdzv|standalone|max[-_]restarts)")


def compose(schema: type[T], args: list[str], *, config_name: str | None = None) -> tuple[T, dict[str, str]]:
    """Compose ``schema`` from ``configs/<config_name>.yaml`` or its defaults, and the command line.

    Returns the configuration, and the option chosen in each group; Hydra answers ``--cfg job`` and the like and ends
    the process. ConfigError: lists what is misspelt, missing or of the wrong type.
    """
    if {"-m", "--multirun"} & set(args):
        raise ConfigError(
            "--multirun is not offered: one command is one run. A sweep is a command of its own: "
            "bigtrain sweep <these settings> optimizer.lr=1e-4,3e-4 validation.every_steps=100"
        )
    args = own_parts.with_own_parts(args)
    twice = overrides.repeated(args)
    raise_problems(f"{' '.join(given)}: write one of them" for given in twice.values() if given[-1][0] == "+")
    if RankInfo.from_env().rank == 0:
        for key, given in twice.items():
            print(f"warning: {key} is given {len(given)} times; the last one counts, {given[-1]}", file=sys.stderr)
    typed, args = args, overrides.prepare(args, schema)
    yaml_source.keep_text(schema)
    composed: list[tuple[DictConfig, dict[str, str]]] = []
    store = ConfigStore.instance()
    store.store(group="hydra", name="config", node=_quiet_hydra())
    store.store(name="schema", node=schema)
    # Hydra would compose everything once more to find out that it does not sweep.
    Hydra.get_mode = lambda *args, **kwargs: RunMode.RUN  # type: ignore[method-assign]
    parse = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name or "schema")(
        lambda node: composed.append((node, dict(HydraConfig.get().runtime.choices)))
    )
    try:
        with _hydra_command_line(args):
            parse()
        if not composed:
            sys.exit(0)  # Hydra has answered --cfg, --info or the like
        node, choices = composed[0]
        raise_problems(f"{key}: missing; write {key}=..." for key in sorted(OmegaConf.missing_keys(node)))
        values: Any = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    except BigtrainError:
        raise
    except Exception as error:  # nothing but Hydra and OmegaConf ran
        known = groups(config_name) if config_name else {}
        problems = [*_problems(args, schema, known)] or [*_problems(typed, schema, known)]
        raise ConfigError("\n".join(problems) or _explain(error, args, schema)) from error
    # Hydra lets `+train.stpes=1` into its structured config; this does not.
    return from_dict(schema, values, from_user=True), choices


def _quiet_hydra() -> HydraConf:
    """Return Hydra's configuration without output and logging; ``disabled`` instead of ``none`` would mute loggers."""
    quiet = HydraConf(run=RunDir(dir="."), output_subdir=None)
    silent = {"hydra_logging": "none", "job_logging": "none"}
    quiet.defaults = [{name: silent.get(name, option) for name, option in entry.items()} for entry in quiet.defaults]
    return quiet


@contextlib.contextmanager
def _hydra_command_line(args: list[str]) -> Iterator[None]:
    """Let Hydra read ``args``; turn its usage errors into ConfigErrors, and print its other messages on rank 0."""
    before = sys.argv
    sys.argv = [before[0], *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, rather than print half a traceback and exit
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code != EXIT_USER_ERROR:  # the code of argparse
            raise
        reason = said.getvalue().strip().rpartition("error: ")[2]
        advice = "settings are written key=value, without dashes"
        if TORCHRUN_OPTION.search(reason):
            advice = "torchrun's options go in front of the script"
        raise ConfigError(f"{reason}; {advice}") from stop
    finally:
        sys.argv = before
    if RankInfo.from_env().rank == 0:
        sys.stderr.write(said.getvalue())


def _problems(args: list[str], schema: type, groups: dict[str, str | None]) -> Iterator[str]:
    """Find what is wrong with the settings on the command line: plus signs of groups, keys, values."""
    valid = list(key_types(schema))
    for override in overrides.parsed(args):
        key, value, line = override.key_or_group, override.value(), override.input_line
        plus = override.is_add() or override.is_force_add()
        if key in groups:
            if groups[key] and plus:
                yield f"{line}: write {key}={value}; it replaces a default"
            elif not groups[key] and not plus and not override.is_delete():
                yield f"{line}: write +{key}={value}; there is no default to replace"
        elif key not in valid:
            yield f"{key}: unknown key; {nearest_key(key, valid)}"
        elif override.is_delete():
            instead = f"leave the setting out for its default, or write {key}=null where it may be null"
            yield f"~{key}: nothing is removed here; {instead}"
        elif override.is_sweep_override():
            yield f"{line}: one value, please; a list is written {key}=[1,2]"
        elif "${" not in str(value):
            yield from value_problems(schema, key, value)


def _explain(error: Exception, args: list[str], schema: type) -> str:
    """Return what the user needs to know of an error of Hydra or OmegaConf."""
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}; settings are written key=value, lists key=[1,2]"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: unknown; {nearest(name, sorted(error.options))}"
    lines = [line for line in str(error).partition("Config search path:")[0].splitlines() if line.strip()]
    for line, following in itertools.pairwise(lines):
        if "full_key: " in following:  # OmegaConf's way to say where
            key = following.split()[-1]
            unknown = line.startswith("Key ")
            return f"{key}: unknown key; {nearest_key(key, list(key_types(schema)))}" if unknown else f"{key}: {line}"
    if isinstance(error, HydraException | YAMLError):
        return "\n".join(lines[:2])
    return f"cannot compose {' '.join(args)}: {error}"
