"""Say where a run lives: ``python launch/where.py +model=gpt_nano``; batch scripts ask before they start ranks."""

import os
from functools import partial

from bigtrain.cli import hydra_cli
from bigtrain.config import TrainConfig
from bigtrain.files import read_json

RESERVE = "BIGTRAIN_RESERVE"
HELP = """\
Check the settings of a training run, for the world size in WORLD_SIZE and LOCAL_WORLD_SIZE, and print the directory
that the run lives in. Nothing is started.

  python launch/where.py +model=gpt_nano
  WORLD_SIZE=32 LOCAL_WORLD_SIZE=8 python launch/where.py +model=gpt3_1b engine=hsdp run.name=first

With BIGTRAIN_RESERVE=1, which slurm/train.sbatch sets, the run is taken for ranks that are started next, which count
as failed if they never come to it; a second line says how many launches in a row have failed without a new checkpoint,
and supervision.max_failed_attempts. A run that another launch has is refused; a batch system's restart waits for one
that may be cut off, and takes the run from it when it gives no sign of life any more.

Takes the settings of launch/train.py. Exit codes: 0; 2 with every problem of the settings, or the run is in use; 3 no
use in restarting it.
"""


def run(config: TrainConfig) -> None:
    """Print the directory; for a batch script, take the run first."""
    directory, reserved = config.run.directory, []
    if RESERVE in os.environ:
        from bigtrain.files import writing
        from bigtrain.run.directory import reached_step
        from bigtrain.supervise.attempt import ATTEMPT_FILE, claim_run

        most = config.supervision.max_failed_attempts
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            step = reached_step(directory)
            _, lease = claim_run(directory, newest_step=step, max_failed_attempts=most, reserve=True)
            lease.release()
        reserved = [f"{read_json(directory / ATTEMPT_FILE)['failures_without_progress']} {most}"]
    print(directory, *reserved, sep="\n")


main = partial(hydra_cli.main, hydra_cli.read_run, run, lambda: HELP)
