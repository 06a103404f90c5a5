"""Train a Transformer: ``torchrun launch/train.py +model=gpt3_1b``; ``--help`` says more."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

from bigtrain.cli import hydra_cli, settings
from bigtrain.config import TrainConfig
from bigtrain.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_RESUMABLE, BigtrainError
from bigtrain.log import redact
from bigtrain.processes import only_zero_is_success
from bigtrain.supervise.signals import EarlyStop

HELP = """\
Train a Transformer: the same run on one process or many, under any engine.

  python launch/train.py +model=gpt_nano                            one process
  torchrun --nproc-per-node=8 launch/train.py +model=gpt3_1b        one node with 8 GPUs
  torchrun --nproc-per-node=8 launch/train.py +model=gpt3_1b engine=zero3 engine.offload=cpu
  torchrun --nproc-per-node=2 launch/train.py +model=gpt_nano data=text data.path='books/*.txt'
  python launch/train.py +model=hf model.name=gpt2 model.pretrained=true
  python launch/train.py --import ./ideas.py +model=ideas.mixer task=ideas.focal       parts of your own

The same command again continues the run; runs/<run.name>/ is its directory.

Groups, chosen with <group>=<option> (* is the default; + where there is none):
{groups}

Settings used most, with their defaults:
{settings}

All settings as composed:  python launch/train.py +model=gpt_nano --cfg job
What each one means:       python launch/train.py --help all

Exit codes: 0 finished, 2 something to change in the command or the data, 75 stopped and resumable, 1 fault,
3 failed again and again: no use in restarting it. Under torchrun and accelerate launch a run that was stopped and
saved ends with 0 too, and they turn all others into 1; the file exit.json in the run's directory has the code.
"""

MOST_USED = [
    "run.name",
    "train.steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "data.sequence_length",
    "engine.precision",
    "engine.activation_checkpointing",
    "optimizer.lr",
    "validation.every_steps",
    "checkpoint.every_steps",
]


def run(config: TrainConfig, early_stop: EarlyStop | None = None) -> int:
    """Train; record a fault where torchrun looks for it."""
    # Only now, as all imports here: --help and mistakes answer at once.
    from bigtrain.checkpoint.store import newest_step
    from bigtrain.supervise.attempt import record_early_stop

    directory = config.run.directory
    if early_stop:
        early_stop.leave_word = lambda reason: record_early_stop(directory, newest_step(directory), reason)
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from bigtrain.run import launching
    from bigtrain.supervise.failures import is_lost_connection

    faults = get_error_handler()
    faults.initialize()
    try:
        code = launching.run(config)
    except BigtrainError as error:  # a sentence for the user, not a traceback per rank in torchrun's report
        if error.exit_code == EXIT_RESUMABLE and only_zero_is_success():
            error.exit_code = EXIT_FINISHED
        raise
    except Exception as error:
        if is_lost_connection(error):  # it would hide the error of the other rank
            return EXIT_FAULT
        faults.record_exception(error)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # which torchrun shows
            Path(path).write_text(json.dumps(redact(json.loads(Path(path).read_text()))))
        raise
    # torchrun and accelerate would report 75 as a failure and restart; nor may they start a renamed run anew.
    return EXIT_FINISHED if only_zero_is_success() else code


def help_page() -> str:
    return HELP.format(groups=settings.group_lines(), settings=settings.setting_lines(TrainConfig, MOST_USED))


def main(early_stop: EarlyStop) -> NoReturn:
    """Run the command; ``early_stop`` handles signals until the run has begun."""
    page = settings.lines if "all" in sys.argv else help_page
    hydra_cli.main(hydra_cli.read_run, partial(run, early_stop=early_stop), page)
