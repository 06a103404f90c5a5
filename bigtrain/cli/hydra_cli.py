"""The front door of every launcher: the command line in, a checked configuration out.

Hydra is the parser and nothing else. It composes the configuration and has returned before the run
starts, so the run's exceptions, exit code, logging and directories are the run's own. What the user
did wrong ends in one short message on standard error and exit code 2. Nothing here imports torch.
"""

import contextlib
import dataclasses
import functools
import gc
import io
import itertools
import json
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.conf import HydraConf, RunDir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from bigtrain.cli import overrides, own_parts, std_streams, yaml_source
from bigtrain.config import ModelConfig, ModelKind, TrainConfig
from bigtrain.config.bounds import out_of_bounds
from bigtrain.config.check import check, check_data, fit_micro_batch, ignored_settings, padding, resolve
from bigtrain.config.convert import from_dict, key_docs, key_types, nearest, nearest_key, value_problems
from bigtrain.config.packages import missing_data_packages, missing_packages
from bigtrain.errors import EXIT_USER_ERROR, BigtrainError, ConfigError
from bigtrain.files import RUN_FILES, such_as_runs
from bigtrain.log import redact
from bigtrain.processes import RankInfo, lone_ranks

std_streams.open_closed()  # before a file of ours has the number of one

T = TypeVar("T")
RunT = TypeVar("RunT", bound=TrainConfig)

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(place for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if place.is_dir())
RANK_0_HEAD_START_SECONDS = 5.0
TORCHRUN_OPTION = re.compile(r"--(nproc|nnodes|node[-_]rank|master|rdzv|standalone|max[-_]restarts)")


def main(read: Callable[[list[str]], T], run: Callable[[T], int | None], help_page: Callable[[], str]) -> NoReturn:
    """Run a launcher from its command line to its exit code.

    Args:
        read: turns the command line's arguments into the launcher's configuration.
        run: does the work and returns the exit code; None counts as 0.
        help_page: text of ``--help``.
    """
    std_streams.guard()
    sys.excepthook = _show_fault
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a letter gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
    # Imports leave no garbage, but to look for it as often as Python does takes a quarter of their time.
    gc.set_threshold(100_000, 50, 100)
    args = [arg for arg in sys.argv[1:] if not arg.startswith(("--local_rank=", "--local-rank="))]
    try:
        code = _read_and_run(args, read, run, help_page)
        if code == 0:
            sys.stdout.flush()  # what was to be written is not
    except BigtrainError as error:
        _exit_with(error)
    except Exception as error:
        _tell_other_ranks(f"{type(error).__name__}: {error}")
        raise
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    leave(code)


def command(
    schema: type,
    run: Callable[[Any], int | None],
    help_text: str,
    *,
    reader: Callable[[list[str]], Any] | None = None,
    shown: list[str] | None = None,
) -> NoReturn:
    """Run a command with the settings of ``schema``, of which ``--help`` shows all or those named in ``shown``."""
    main(
        reader or functools.partial(read, schema), run, lambda: help_text.format(settings=setting_lines(schema, shown))
    )


def _read_and_run(
    args: list[str], read: Callable[[list[str]], T], run: Callable[[T], int | None], help_page: Callable[[], str]
) -> int:
    args = own_parts.bring_in(args)
    if {"-h", "--help"} & set(args):
        print(own_parts.help_page(args) or as_typed(help_page()))
        return 0
    try:
        config = read(args)
    except SystemExit:  # Hydra has answered --cfg, --info or the like
        return 0
    return run(config) or 0


def as_typed(text: str) -> str:
    """Return ``text`` with its commands as this one was typed: ``bigtrain train``, or ``python launch/train.py``."""
    if Path(sys.argv[0]).name not in ("bigtrain", "__main__.py"):
        return text
    text = re.sub(r"(torchrun [^\n]*)launch/(\w+)\.py", r"\1-m bigtrain \2", text)
    return re.sub(r"(python )?launch/(\w+)\.py", r"bigtrain \2", text)


def read_run(args: list[str]) -> TrainConfig:
    """Return the resolved and checked configuration of a training run.

    Raises:
        ConfigError: listing every problem; no model is chosen; the values contradict each other.
    """
    if problem := lone_ranks():
        raise ConfigError(problem)
    info = RankInfo.from_env()
    config = fit_micro_batch(compose_run(TrainConfig, args), info.world_size)
    problems = check(config, world_size=info.world_size, local_world_size=info.local_world_size)
    if problems := problems or missing_packages(config):
        raise ConfigError("\n".join(problems))
    if config.model.kind is ModelKind.hf:
        from bigtrain.models.probe import require_positions
        from bigtrain.run.directory import continued_model

        require_positions(continued_model(config.model, config.run.directory), config.data.sequence_length)
    warnings = ignored_settings(config) + padding(config.train, info.world_size)
    if config.model.kind is ModelKind.hf or config.model.init_from:
        from bigtrain.run.directory import unused_of_model

        warnings += unused_of_model(config)
    if rank() == 0:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return config


def compose_run(schema: type[RunT], args: list[str], *, config_name: str = "train") -> RunT:
    """Return the resolved configuration of a training run, with what a launcher's ``schema`` adds; not yet checked.

    Raises:
        ConfigError: listing every problem; no model is chosen.
    """
    config, choices = compose(schema, args, config_name=config_name)
    config = own_parts.recorded(config)
    if "model" not in choices:
        raise ConfigError(f"no model is chosen; add one of: {' '.join('+model=' + m for m in group_options('model'))}")
    if config.model.kind is not ModelKind.hf:
        config.model.name = config.model.name or choices["model"]
        return resolve(config)
    from bigtrain.models.hf.build import describe_architecture, with_hf_shape

    if config.model.architecture:
        config.model.name = describe_architecture(config.model, Path(config.data.root, "models"))
    if config.model.name:
        from bigtrain.run.directory import continued_model

        described = continued_model(config.model, resolve(config).run.directory)
        shaped = dataclasses.replace(with_hf_shape(described), name=config.model.name)
        if given := [key for key in key_types(type(shaped)) if _is_other_shape(config.model, shaped, key)]:
            names = ", ".join(f"model.{key}" for key in given)
            raise ConfigError(f"{names}: the config.json of model.name={config.model.name} decides; change it there")
        config.model = shaped
    return resolve(config)


def _is_other_shape(given: ModelConfig, shaped: ModelConfig, key: str) -> bool:
    """Return whether somebody has set a part of the shape that a Hugging Face model brings along otherwise."""
    value, default = getattr(given, key, None), getattr(ModelConfig(), key, None)
    return value not in (default, getattr(shaped, key, None))


def read(schema: type[T], args: list[str]) -> T:
    """Return the configuration of a command that has a schema of its own and no config files.

    Raises:
        ConfigError: listing every problem.
    """
    config, _ = compose(schema, args)
    if problems := out_of_bounds(config):
        raise ConfigError("\n".join(problems))
    return config


def read_runs(schema: type[T], args: list[str]) -> tuple[T, list[str]]:
    """Return the configuration of a launcher that looks at ``runs``, and what is wrong with them; what is no setting is one."""
    runs = [arg for arg in args if os.path.isdir(arg) or not (arg.startswith("-") or "=" in arg)]
    config, _ = compose(schema, [arg for arg in args if arg not in runs])
    config.runs += from_dict(schema, {"runs": runs}, from_user=True).runs
    if not config.runs:
        return config, [f"which run? name its directory{such_as_runs(Path('runs'))}"]
    return config, [problem for run in config.runs if (problem := not_a_run(Path(run)))] + out_of_bounds(config)


def not_a_run(path: Path) -> str | None:
    """Say that ``path`` is not the directory of a run; None if it is one."""
    if any((path / name).is_file() for name in RUN_FILES):
        return None
    what = f"not the directory of a run: it has no {RUN_FILES[0]}" if path.exists() else "there is no such directory"
    return f"{path}: {what}; name one{such_as_runs(path)}"


def read_data(args: list[str]) -> TrainConfig:
    """Return the configuration of a run of which only ``data`` matters; a model may be chosen and then has a name.

    Raises:
        ConfigError: listing every problem.
    """
    config, choices = compose(TrainConfig, args, config_name="train")
    config.model.name = config.model.name or choices.get("model")
    config = resolve(config)
    if problems := check_data(config.data) or missing_data_packages(config.data):
        raise ConfigError("\n".join(problems))
    return config


def compose(schema: type[T], args: list[str], *, config_name: str | None = None) -> tuple[T, dict[str, str]]:
    """Compose ``schema`` from ``configs/<config_name>.yaml`` and the command line.

    Args:
        schema: the dataclass to build.
        args: settings and Hydra's own options such as ``--cfg job``, which Hydra answers by ending
            the process.
        config_name: the primary file; by default the defaults of ``schema`` alone.

    Returns:
        The configuration, and the option chosen in each group.

    Raises:
        ConfigError: listing what is misspelt, missing or of the wrong type.
    """
    if {"-m", "--multirun"} & set(args):
        raise ConfigError(
            "--multirun is not offered: one command is one run. A sweep is a loop of the shell: "
            "for lr in 1e-4 3e-4; do <this command> optimizer.lr=$lr run.name=lr-$lr; done"
        )
    args = own_parts.with_own_parts(args)
    twice = overrides.repeated(args)
    if groups := [f"{' '.join(given)}: write one of them" for key, given in twice.items() if given[-1][0] == "+"]:
        raise ConfigError("\n".join(groups))
    if rank() == 0:
        for key, given in twice.items():
            print(f"warning: {key} is given {len(given)} times; the last one counts, {given[-1]}", file=sys.stderr)
    typed, args = args, overrides.prepare(args, schema)
    yaml_source.keep_text(schema)
    composed: list[tuple[DictConfig, dict[str, str]]] = []
    store = ConfigStore.instance()
    store.store(group="hydra", name="config", node=_quiet_hydra())
    store.store(name="schema", node=schema)
    parse = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name or "schema")(
        lambda node: composed.append((node, dict(HydraConfig.get().runtime.choices)))
    )
    try:
        with _hydra_command_line(args):
            parse()
        if not composed:
            sys.exit(0)  # Hydra has answered --cfg, --info or the like
        node, choices = composed[0]
        if missing := sorted(OmegaConf.missing_keys(node)):
            raise ConfigError("\n".join(f"{key}: missing; write {key}=..." for key in missing))
        values = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    except BigtrainError:
        raise
    except Exception as error:  # nothing but Hydra and OmegaConf ran
        groups = _groups(config_name) if config_name else {}
        problems = _problems(args, schema, groups) or _problems(typed, schema, groups)
        raise ConfigError("\n".join(problems) or _explain(error, args, schema)) from error
    # Hydra lets `+train.stpes=1` into its structured config; this does not.
    return from_dict(schema, values, from_user=True), choices


def group_options(group: str) -> list[str]:
    """Return the names that ``group=<name>`` accepts."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def rank() -> int:
    """Return this process's rank as the launcher set it; a plain process is rank 0."""
    return RankInfo.from_env().rank


def setting_lines(schema: type, keys: list[str] | None = None, *, prefix: str = "") -> str:
    """Return one line per setting of ``schema``, or of ``keys`` only: the key, its default and what it is."""
    docs = key_docs(schema)
    defaults = OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
    lines = []
    for key in keys or (key for key in docs if "*" not in key):
        value = functools.reduce(lambda section, name: section[name], key.split("."), defaults)
        shown = "<needed>" if value == "???" else value if isinstance(value, str) else json.dumps(value)
        lines.append(f"  {f'{prefix}{key}={shown}':<38} {' '.join(docs[key].split()).replace('``', '')}")
    return "\n".join(lines)


def group_lines() -> str:
    """Return one line per config group with its options; defaults are marked with a star."""
    lines = []
    for group, default in _groups().items():
        options = [name + "*" * (name == default) for name in group_options(group)]
        text = f"  {group if default else '+' + group:<12} {'  '.join(options)}"
        lines.append(textwrap.fill(text, width=110, subsequent_indent=" " * 15, break_on_hyphens=False))
    return "\n".join(lines)


def _exit_with(error: BigtrainError) -> NoReturn:
    """Show ``error`` and end the process; rank 0 goes first, if it may have the same to say.

    torchrun ends all ranks as soon as one has failed. So the others give rank 0 time to say what
    is wrong, and only a rank that nobody has ended by then, and that rank 0 does not speak for, speaks for itself.
    """
    message, begin = redact(as_typed(str(error))), time.monotonic()
    number = os.environ.get("RANK") or "0"
    if is_first := number == "0" or not number.isdecimal():
        print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    is_told = error.shared is None and _tell_other_ranks(message)
    if not is_first:
        if error.shared is not False:
            time.sleep(max(0.0, begin + RANK_0_HEAD_START_SECONDS - time.monotonic()))
        if not (is_told or error.shared):
            print(textwrap.indent(message, f"[rank {number}] "), file=sys.stderr, flush=True)
    leave(error.exit_code)


def _tell_other_ranks(reason: str) -> bool:
    """Tell ranks that wait for this one that it cannot begin; return whether rank 0 has heard, and says it."""
    with contextlib.suppress(ConfigError):  # what the launcher has set makes no sense
        info = RankInfo.from_env()
        if info.world_size > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys():
            from bigtrain.distributed.rendezvous import refuse

            return refuse(info, redact(reason))
    return False


def leave(code: int) -> NoReturn:
    """End the process at once.

    To look through everything once more takes Python a while; helper processes would be waited for; and a process group
    that is torn down while others use it aborts, with another code. Only semaphores are given back, of which the system
    would complain otherwise.
    """
    if "multiprocessing" in sys.modules:  # those that are just starting miss the semaphores
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    if "multiprocessing.util" in sys.modules:  # it has no public name; what is public waits for the helpers first
        sys.modules["multiprocessing.util"]._run_finalizers(0)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _show_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show a traceback as Python does, without the secrets that its messages may hold."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _quiet_hydra() -> HydraConf:
    """Return Hydra's own configuration: no directories and no logging.

    Under torchrun every rank would make an output directory of its own and log into it. ``none`` leaves
    Python's logging alone; Hydra's ``disabled`` would mute other people's loggers.
    """
    quiet = HydraConf(run=RunDir(dir="."), output_subdir=None)
    silent = {"hydra_logging": "none", "job_logging": "none"}
    quiet.defaults = [{name: silent.get(name, option) for name, option in entry.items()} for entry in quiet.defaults]
    return quiet


@contextlib.contextmanager
def _hydra_command_line(args: list[str]) -> Iterator[None]:
    """Let Hydra read ``args``; turn its usage errors into ConfigErrors and its other words over to rank 0."""
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
    if rank() == 0:
        sys.stderr.write(said.getvalue())


def _groups(config_name: str = "train") -> dict[str, str | None]:
    """Return the config groups of ``configs/<config_name>.yaml``, with the option in its defaults list or None."""
    groups: dict[str, str | None] = {"experiment": None, "model": None}
    for entry in OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config_name}.yaml"))["defaults"]:
        if isinstance(entry, dict):
            groups.update(entry)
        elif entry == "train":
            groups |= _groups()
    return dict(sorted(groups.items()))


def _problems(args: list[str], schema: type, groups: dict[str, str | None]) -> list[str]:
    """Return what is wrong with the settings on the command line: plus signs of groups, keys, values."""
    problems = []
    valid = list(key_types(schema))
    for override in overrides.parsed(args):
        key, value = override.key_or_group, override.value()
        plus = override.is_add() or override.is_force_add()
        if key in groups:
            if groups[key] and plus:
                problems.append(f"{override.input_line}: write {key}={value}; it replaces a default")
            elif not groups[key] and not plus and not override.is_delete():
                problems.append(f"{override.input_line}: write +{key}={value}; there is no default to replace")
        elif key not in valid:
            problems.append(f"{key}: unknown key; {nearest_key(key, valid)}")
        elif override.is_delete():
            problems.append(
                f"~{key}: nothing is removed here; leave the setting out for its default, or write {key}=null where it may be null"
            )
        elif override.is_sweep_override():
            problems.append(f"{override.input_line}: one value, please; a list is written {key}=[1,2]")
        elif "${" not in str(value):
            problems += value_problems(schema, key, value)
    return problems


def _explain(error: Exception, args: list[str], schema: type) -> str:
    """Return the one thing that the user needs to know of an error that Hydra or OmegaConf raised."""
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
