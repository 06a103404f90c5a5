"""Validate a run's newest checkpoint: ``python launch/validate.py checkpoint=runs/gpt_nano``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

from bigtrain.cli import hydra_cli
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath
from bigtrain.errors import EXIT_FINISHED


@dataclass(kw_only=True, slots=True)
class ValidateConfig:
    """What is validated, and on how much."""

    checkpoint: LocalPath
    """Directory of the run, or of one of its checkpoints."""
    batches: Annotated[int | None, Bound(ge=1, le=10**6)] = None
    """Global batches of validation data; by default as many as in the run's own validations."""


HELP = """\
Compute the loss and the perplexity of a run on the documents that it never trained on.

  python launch/validate.py checkpoint=runs/gpt_nano
  torchrun --nproc-per-node=8 launch/validate.py checkpoint=runs/gpt3_1b batches=100

Settings, with their defaults:
{settings}
"""


def run(config: ValidateConfig) -> int:
    """Validate and print the result."""
    from bigtrain.run.validation import validate_run

    result = validate_run(Path(config.checkpoint), batches=config.batches)
    if hydra_cli.rank() == 0:
        for name, value in result.items():
            print(f"{name:<24} {value:.4f}" if isinstance(value, float) else f"{name:<24} {value}")
    return EXIT_FINISHED


def main() -> NoReturn:
    """Run the command."""
    hydra_cli.command(ValidateConfig, run, HELP)
