"""The packages that not everybody installs: each belongs to an extra of bigtrain and is named when it is missing."""

from importlib.util import find_spec

from bigtrain.config import DataConfig, TrainConfig, component_data
from bigtrain.config.check import ZERO_KINDS
from bigtrain.config.choices import Duplicates, Precision
from bigtrain.errors import ConfigError


def lacking(what: str, package: str, extra: str) -> list[str]:
    """Return, as a list of problems, that ``what`` needs a package that is not installed and that ``extra`` brings."""
    return [] if find_spec(package) else [f"{what} needs the package {package}: pip install 'bigtrain[{extra}]'"]


def require(what: str, package: str, extra: str) -> None:
    """Refuse to go on to an ``import`` that would fail.

    Raises:
        ConfigError: the sentence of :func:`lacking`.
    """
    if problems := lacking(what, package, extra):
        raise ConfigError(problems[0])


def missing_packages(config: TrainConfig) -> list[str]:
    """Return every package that ``config`` needs and this machine does not have."""
    problems = []
    if config.logging.tensorboard:
        problems += lacking("logging.tensorboard=true", "tensorboardX", "tensorboard")
    if config.engine.precision is Precision.fp8:
        problems += lacking("engine.precision=fp8", "torchao", "fp8")
    if (kind := config.engine.kind) in ZERO_KINDS and not find_spec("deepspeed"):
        problems.append(f"engine={kind.name} needs the package deepspeed, which is for Linux; use ddp, fsdp or hsdp")
    if config.model.adapter:
        problems += lacking("model.adapter", "peft", "adapters")
    if config.validation.written_samples:
        problems += lacking("validation.written_samples", "sacrebleu", "metrics")
    return problems + missing_data_packages(config.data)


def missing_data_packages(data: DataConfig) -> list[str]:
    """Return every package that reading or preparing ``data`` needs and this machine does not have."""
    problems = []
    if data.filters.duplicates is Duplicates.near:
        problems += lacking("data.filters.duplicates=near", "rensa", "dedup")
    for path in (part.path or "" for part in component_data(data).values()):
        if path.startswith("s3://"):
            problems += lacking(f"data.path={path}", "s3fs", "s3")
    return problems
