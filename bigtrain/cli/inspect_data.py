"""Show what a step trains on: ``python launch/inspect_data.py directory=runs/gpt_nano step=100``."""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated

from bigtrain.cli import hydra_cli
from bigtrain.config import TrainConfig
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath
from bigtrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class InspectConfig:
    directory: LocalPath | None = None
    """Directory of a run; without one, the settings of launch/train.py say which data."""
    step: Annotated[int, Bound(ge=1)] = 1
    """Optimizer step, from 1, as in metrics.jsonl."""
    samples: Annotated[int, Bound(ge=1)] = 4
    """Samples to show; a step has train.global_batch_size."""


HELP = """\
Show the samples of an optimizer step as text: component of the mixture, documents, borders of tokens (│), the token
that opens a document, or the sample's first, in ( ), and targets that do not count in the loss in ⟦ ⟧; those that count are
green in a terminal.

  python launch/inspect_data.py directory=runs/gpt_nano step=100
  python launch/inspect_data.py +model=gpt_nano data=jsonl data.path=chats.jsonl data.packing=best_fit samples=2

Settings of its own, with their defaults; without directory=, all settings of launch/train.py mean the same:
{settings}
"""


def read(args: list[str]) -> tuple[InspectConfig, TrainConfig | None]:
    """Return what to show, and the run if it is not one in a directory."""
    own = {field.name for field in fields(InspectConfig)}
    own_args = [arg for arg in args if arg.partition("=")[0] in own]
    config, others = hydra_cli.read(InspectConfig, own_args), [arg for arg in args if arg not in own_args]
    if config.directory and others:
        raise ConfigError(f"{others[0]}: with directory= the settings are those of the run")
    return config, None if config.directory else hydra_cli.read_run(others)


def run(chosen: tuple[InspectConfig, TrainConfig | None]) -> None:
    from bigtrain.run.inspection import inspect_run, inspect_step

    config, train = chosen
    if train is None:
        lines = inspect_run(Path(str(config.directory)), step=config.step, num_samples=config.samples)
    else:
        lines = inspect_step(train, step=config.step, num_samples=config.samples)
    for line in lines:
        print(line)


main = partial(hydra_cli.command, InspectConfig, run, HELP, reader=read)
