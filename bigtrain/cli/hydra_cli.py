"""The front door of every command: the command line in, a checked configuration out, and an exit code.

A mistake of the user ends with a sentence on standard error and exit code 2. Nothing here imports torch.
"""

import contextlib
import dataclasses
import functools
import gc
import io
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

from bigtrain.cli import own_parts, std_streams
from bigtrain.cli.settings import group_options, setting_lines
from bigtrain.config import ModelConfig, ModelKind, TrainConfig
from bigtrain.config.bounds import out_of_bounds
from bigtrain.config.check import RunT, check, check_data, fit_micro_batch, ignored_settings, resolve
from bigtrain.config.convert import from_dict
from bigtrain.config.layout import data_ranks, layout_warnings, padding
from bigtrain.config.length import with_typed_length
from bigtrain.config.packages import missing_data_packages, missing_packages
from bigtrain.errors import BigtrainError, ConfigError, raise_problems
from bigtrain.files import RUN_FILES, such_as_runs
from bigtrain.log import redact
from bigtrain.processes import RankInfo, lone_ranks

std_streams.open_closed()  # before a file of ours has the number of one

T = TypeVar("T")
RunsT = TypeVar("RunsT", bound="_HasRuns")

RANK_0_HEAD_START_SECONDS = 5.0


def main(read: Callable[[list[str]], T], run: Callable[[T], int | None], help_page: Callable[[], str]) -> NoReturn:
    """Run a command from its arguments (``read``) to its exit code (of ``run``; None is 0), or show ``help_page``."""
    std_streams.guard()
    sys.excepthook = _show_fault
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    # Imports leave no garbage; the default thresholds take a quarter of their time.
    gc.set_threshold(100_000, 50, 100)
    args = [arg for arg in sys.argv[1:] if not arg.startswith(("--local_rank=", "--local-rank="))]
    try:
        code = _read_and_run(args, read, run, help_page)
        if code == 0:
            sys.stdout.flush()  # may fail, and is the command's failure
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
    """Run a command with the settings of ``schema``, all or ``shown`` in ``--help``: at ``{settings}``, or behind."""
    if "{settings}" not in help_text:
        help_text += "\nSettings, with their defaults:\n{settings}\n"
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
    """Return the resolved and checked configuration of a training run; a ConfigError lists every problem."""
    info = RankInfo.from_env()
    config = fit_micro_batch(compose_run(TrainConfig, args), info.world_size)
    raise_problems(check(config, world_size=info.world_size, local_world_size=info.local_world_size))
    check_machine(config)
    warn(config, info.world_size, info.local_world_size)
    return config


def check_machine(config: TrainConfig) -> None:
    """Refuse a checked run in a process that is no rank, without its packages, or beyond the positions of its model."""
    raise_problems([problem] if (problem := lone_ranks()) else missing_packages(config))
    if config.model.kind is ModelKind.hf:
        from bigtrain.models.probe import require_positions
        from bigtrain.run.directory import continued_model

        require_positions(continued_model(config.model, config.run.directory), config.data.sequence_length)


def warn(config: TrainConfig, world_size: int, local_world_size: int) -> None:
    """Say on rank 0 what has no effect, what is padding, and what is slow."""
    warnings = ignored_settings(config) + layout_warnings(config, local_world_size)
    warnings += padding(config.train, data_ranks(config.parallel, world_size))
    if config.model.kind is ModelKind.hf or config.model.init_from:
        from bigtrain.run.directory import unused_of_model

        warnings += unused_of_model(config)
    for warning in warnings if rank() == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)


def compose(schema: type[T], args: list[str], *, config_name: str | None = None) -> tuple[T, dict[str, str]]:
    """Compose ``schema`` by :func:`bigtrain.cli.composing.compose`; ``--help`` does without Hydra, which takes 0.1 s."""
    from bigtrain.cli.composing import compose

    return compose(schema, args, config_name=config_name)


def compose_run(schema: type[RunT], args: list[str], *, config_name: str = "train") -> RunT:
    """Return the resolved configuration of a training run, with what a launcher's ``schema`` adds; not yet checked."""
    config, choices = compose(schema, args, config_name=config_name)
    config = own_parts.recorded(config)
    config.train = with_typed_length(config.train, {arg.partition("=")[0].lstrip("+") for arg in args})
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

        resolved = resolve(config)
        described = continued_model(resolved.model, resolved.run.directory)
        shaped = dataclasses.replace(with_hf_shape(described), name=config.model.name)
        if given := [f.name for f in dataclasses.fields(shaped) if _is_other_shape(config.model, shaped, f.name)]:
            names = ", ".join(f"model.{key}" for key in given)
            raise ConfigError(f"{names}: the config.json of model.name={config.model.name} decides; change it there")
        config.model = shaped
    return resolve(config)


def _is_other_shape(given: ModelConfig, shaped: ModelConfig, key: str) -> bool:
    """Return whether a key is set that the Hugging Face model's own configuration decides otherwise."""
    value, default = getattr(given, key, None), getattr(ModelConfig(), key, None)
    return value not in (default, getattr(shaped, key, None))


def read(schema: type[T], args: list[str]) -> T:
    """Return the configuration of a command with a schema of its own; a ConfigError lists every problem."""
    config, _ = compose(schema, args)
    raise_problems(out_of_bounds(config))
    return config


class _HasRuns(Protocol):
    runs: list[str]


def read_runs(schema: type[RunsT], args: list[str]) -> RunsT:
    """Return the configuration of a command with ``runs``, which are the arguments that are no settings."""
    runs = [arg for arg in args if os.path.isdir(arg) or not (arg.startswith("-") or "=" in arg)]
    config, _ = compose(schema, [arg for arg in args if arg not in runs])
    config.runs += from_dict(schema, {"runs": runs}, from_user=True).runs
    if not config.runs:
        raise ConfigError(f"which run? name its directory{such_as_runs(Path('runs'))}")
    raise_problems([*filter(None, (not_a_run(Path(run)) for run in config.runs)), *out_of_bounds(config)])
    return config


def training_of(config: TrainConfig) -> TrainConfig:
    """Return a launcher's configuration without what its own schema adds."""
    return TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})


def not_a_run(path: Path) -> str | None:
    """Return why ``path`` is not the directory of a run; None if it is one."""
    if any((path / name).is_file() for name in RUN_FILES):
        return None
    what = f"not the directory of a run: it has no {RUN_FILES[0]}" if path.exists() else "there is no such directory"
    return f"{path}: {what}; name one{such_as_runs(path)}"


def read_data(args: list[str]) -> TrainConfig:
    """Return the configuration of a run with only ``data`` checked; a ConfigError lists every problem."""
    config, choices = compose(TrainConfig, args, config_name="train")
    config.model.name = config.model.name or choices.get("model")
    config = resolve(config)
    raise_problems(check_data(config.data) or missing_data_packages(config.data))
    return config


def rank() -> int:
    """Return the global rank, 0 without a launcher."""
    return RankInfo.from_env().rank


def _exit_with(error: BigtrainError) -> NoReturn:
    """Print ``error`` and end, rank 0 first: torchrun kills all ranks as soon as one has failed."""
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
    """Tell ranks waiting at the rendezvous that this one failed; return whether rank 0 prints the reason."""
    with contextlib.suppress(ConfigError):  # what the launcher has set makes no sense
        info = RankInfo.from_env()
        if info.world_size > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys():
            from bigtrain.distributed.rendezvous import refuse

            return refuse(info, redact(reason))
    return False


def leave(code: int) -> NoReturn:
    """End the process at once.

    Python's own teardown is slow, waits for helper processes, and aborts, with another code, where other ranks still use
    the process group. Only semaphores are released, which multiprocessing would report as leaked.
    """
    if "multiprocessing" in sys.modules:  # children that are just starting need the semaphores
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    if "multiprocessing.util" in sys.modules:  # the public way waits for the children first
        sys.modules["multiprocessing.util"]._run_finalizers(0)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _show_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, redacted."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
