"""Say where a run lives: ``python launch/where.py +model=gpt_nano``; batch scripts ask before they start ranks."""

import hydra_cli

from bigtrain.config import TrainConfig
from bigtrain.errors import EXIT_FINISHED

HELP = """\
Check the settings of a training run, for the world size in WORLD_SIZE and LOCAL_WORLD_SIZE, and print the directory
that the run lives in. Nothing is started or written.

  python launch/where.py +model=gpt_nano
  WORLD_SIZE=32 LOCAL_WORLD_SIZE=8 python launch/where.py +model=gpt3_1b engine=hsdp run.name=first

Takes the settings of launch/train.py. Exit codes: 0, or 2 with every problem of the settings.
"""


def run(config: TrainConfig) -> int:
    """Print the directory."""
    print(f"{config.run.root}/{config.run.name}")
    return EXIT_FINISHED


if __name__ == "__main__":
    hydra_cli.main(hydra_cli.read_run, run, lambda: HELP)
