"""The packages that not everybody installs: each belongs to an extra of bigtrain and is named when it is missing."""

from collections.abc import Iterator
from importlib.util import find_spec

from bigtrain.config import DataConfig, TrainConfig, component_data
from bigtrain.config.check import ZERO_KINDS
from bigtrain.config.choices import Duplicates, Precision
from bigtrain.errors import raise_problems


def lacking(what: str, package: str, extra: str) -> list[str]:
    """Return, as a list of problems, that ``what`` needs a package that is not installed and that ``extra`` brings."""
    return [] if find_spec(package) else [f"{what} needs the package {package}: pip install 'bigtrain[{extra}]'"]


def require(what: str, package: str, extra: str) -> None:
    """Raise what :func:`lacking` says, in place of an ``import`` that would fail."""
    raise_problems(lacking(what, package, extra))


def missing_packages(config: TrainConfig) -> Iterator[str]:
    """Yield every package that ``config`` needs and this machine does not have."""
    if config.logging.tensorboard:
        yield from lacking("logging.tensorboard=true", "tensorboardX", "tensorboard")
    if config.engine.precision is Precision.fp8:
        yield from lacking("engine.precision=fp8", "torchao", "fp8")
    if (kind := config.engine.kind) in ZERO_KINDS and not find_spec("deepspeed"):
        yield f"engine={kind.name} needs the package deepspeed, which is for Linux; use ddp, fsdp or hsdp"
    if config.model.adapter:
        yield from lacking("model.adapter", "peft", "adapters")
    if config.privacy.max_grad_norm:
        yield from lacking("privacy.max_grad_norm", "opacus", "privacy")
    if config.validation.written_samples:
        yield from lacking("validation.written_samples", "sacrebleu", "metrics")
    if config.validation.lm_eval:
        yield from lacking("validation.lm_eval", "lm_eval", "lm_eval")
    yield from missing_data_packages(config.data)


def missing_data_packages(data: DataConfig) -> Iterator[str]:
    """Yield every package that reading or preparing ``data`` needs and this machine does not have."""
    if data.filters.duplicates is Duplicates.near:
        yield from lacking("data.filters.duplicates=near", "rensa", "dedup")
    for path in (part.path or "" for part in component_data(data).values()):
        if path.startswith("s3://"):
            yield from lacking(f"data.path={path}", "s3fs", "s3")
