"""Say where a run lives: ``python launch/where.py +model=gpt_nano``; batch scripts ask before they start ranks."""

import contextlib
import os
from typing import NoReturn

from bigtrain.cli import hydra_cli
from bigtrain.config import TrainConfig
from bigtrain.errors import EXIT_FINISHED
from bigtrain.supervise.attempt import ATTEMPT_FILE, COUNTS_FAILURES, is_restart
from bigtrain.supervise.lease import take_lease

HELP = """\
Check the settings of a training run, for the world size in WORLD_SIZE and LOCAL_WORLD_SIZE, and print the directory
that the run lives in. Nothing is started. A run that another launch has is refused; a batch system's restart waits for
one that may be cut off, and takes the run from it when it gives no sign of life any more.

  python launch/where.py +model=gpt_nano
  WORLD_SIZE=32 LOCAL_WORLD_SIZE=8 python launch/where.py +model=gpt3_1b engine=hsdp run.name=first

With BIGTRAIN_COUNTS_FAILURES=1, which slurm/train.sbatch sets, a second line is supervision.max_failed_attempts.

Takes the settings of launch/train.py. Exit codes: 0, or 2 with every problem of the settings, or the run is in use.
"""


def run(config: TrainConfig) -> int:
    """Print the directory, when the run is free."""
    directory = config.run.directory
    if (directory / ATTEMPT_FILE).exists():
        # The run itself would wait too, but its refusal would reach the batch script as a fault of torchrun's.
        with contextlib.suppress(OSError):  # the run itself says what is wrong with its directory
            take_lease(directory / ATTEMPT_FILE, patient=is_restart()).release()
    print(directory)
    if COUNTS_FAILURES in os.environ:
        print(config.supervision.max_failed_attempts)
    return EXIT_FINISHED


def main() -> NoReturn:
    """Run the command."""
    hydra_cli.main(hydra_cli.read_run, run, lambda: HELP)
