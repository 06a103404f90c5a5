"""The commands as functions, for notebooks and programs of other people; ``import bigtrain`` offers them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from bigtrain.cli import hydra_cli, own_parts
from bigtrain.config import SetConfig, TrainConfig
from bigtrain.errors import ConfigError
from bigtrain.files import read_json
from bigtrain.processes import STOP_SIGNALS


@dataclass(frozen=True, slots=True)
class Run:
    """A run on disk."""

    directory: Path
    """``runs/<run.name>``."""

    @property
    def config(self) -> TrainConfig:
        """Configuration of the newest launch."""
        from bigtrain.run.directory import read_config

        return read_config(self.directory)

    def metrics(self) -> list[dict[str, Any]]:
        """Return one record per optimizer step: ``step``, ``loss``, ``grad_norm``, ``lr`` and more."""
        from bigtrain.telemetry.files import METRICS_FILE, read_jsonl

        return read_jsonl(self.directory / METRICS_FILE)

    def checkpoints(self) -> list[Path]:
        """Return the directories of the complete checkpoints, oldest first."""
        from bigtrain.checkpoint.store import find_checkpoints

        return find_checkpoints(self.directory)

    def ended(self) -> dict[str, Any]:
        """Return how the newest launch ended: ``code``, ``reason``, ``step``, ``attempt``, ``time``; empty while it runs."""
        from bigtrain.supervise.attempt import EXIT_FILE

        return read_json(self.directory / EXIT_FILE)


def train(*overrides: str, network: Any = None, objective: Any = None, data: Any = None) -> Run:
    """Train, or continue a run, as ``bigtrain train <overrides>`` does; under torchrun on all ranks.

    ``network``, in place of ``+model``, is a function that builds a module, or a dataclass with ``build()``;
    ``objective``, in place of ``task``, a :class:`bigtrain.tasks.base.Objective`; ``data`` a map-style data set.
    ``ended()`` of the run says whether it is finished, or stopped and resumable. BigtrainError: what the command would
    say and exit with its ``exit_code``.
    """
    given = own_parts.given(network=network, objective=objective, data=data)
    config = hydra_cli.read_run([*own_parts.bring_in(list(overrides)), *given])
    from bigtrain.distributed.collectives import shut_down
    from bigtrain.run import launching

    with _own_signals():
        try:
            launching.run(config, outlived=True)
        finally:
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                shut_down()  # after a failure, too: a program goes on, and may train again
    return load_run(config.run.directory)


def load_run(path: str | PathLike[str], *, network: Any = None, objective: Any = None, data: Any = None) -> Run:
    """Return the run in a directory, or raise a ConfigError; other programs give the parts that it was trained with."""
    own_parts.given(network=network, objective=objective, data=data)
    if problem := hydra_cli.not_a_run(Path(path)):
        raise ConfigError(problem)
    return Run(Path(path))


def validate(
    run: Run | str | PathLike[str], *, batches: int | None = None, set: str = "validation", data: str | None = None
) -> dict[str, float]:
    """Return step, loss and metrics of a run's newest checkpoint, or of the checkpoint at a path.

    ``batches``, ``set`` and ``data.path`` of ``bigtrain validate --help`` say on what. BigtrainError: there is no whole
    checkpoint, or its data are gone.
    """
    from bigtrain.run.evaluation import validate_run

    part = SetConfig(path=data) if data else None
    return validate_run(_path(run), batches=batches, chosen=set, part=part).metrics


def predict(
    run: Run | str | PathLike[str],
    inputs: Any,
    *,
    top_k: int = 1,
    threshold: float | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Return what a run, or a checkpoint at a path, says of each input: ``label`` and ``probability``, or ``value``.

    ``inputs`` are arrays by column, rows, texts, or the path of a file; ``bigtrain predict --help`` has the rest.
    BigtrainError: there is no whole checkpoint, or the inputs do not fit its network.
    """
    from bigtrain.run import prediction
    from bigtrain.tasks.answers import Wanted

    inputs = Path(inputs) if isinstance(inputs, str | PathLike) else inputs
    return prediction.predict(
        _path(run), inputs, wanted=Wanted(top_k=top_k, threshold=threshold), batch_size=batch_size
    )


def generate(
    run: Run | str | PathLike[str],
    prompt: str,
    *,
    chat: bool = False,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int = 0,
) -> list[str]:
    """Return continuations of ``prompt``; see :func:`bigtrain.run.sampling.sample_run`."""
    from bigtrain.run.sampling import sample_run

    return sample_run(
        _path(run),
        [prompt],
        chat=chat,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


def _path(run: Run | str | PathLike[str]) -> Path:
    return run.directory if isinstance(run, Run) else Path(run)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Give signals back to the program when a run, which stops in order at them, has ended."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
