"""List and verify the checkpoints of a run: ``python launch/checkpoints.py runs/gpt_nano``."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.cli import hydra_cli
from bigtrain.config import Verify
from bigtrain.config.convert import LocalPath
from bigtrain.config.parallel import AXES
from bigtrain.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from bigtrain.checkpoint.store import Listed


@dataclass(kw_only=True, slots=True)
class CheckpointsConfig:
    run: LocalPath
    """Directory of the run, or of one of its checkpoints; ``run=`` may be left out."""
    verify: Verify = Verify.full
    """``full`` reads and hashes every file, ``sizes`` compares sizes, ``off`` looks at the small files only."""


HELP = """\
List the checkpoints of a run: step, tokens, size, what wrote them, the validation by validation.metric, and whether they are whole.

  python launch/checkpoints.py runs/gpt_nano
  python launch/checkpoints.py runs/gpt3_1b verify=off
  python launch/checkpoints.py runs/gpt3_1b/checkpoints/step-00020000

Settings, with their defaults:
{settings}

Exit code: 0, or 2 if a checkpoint that the run could continue from is damaged.
"""

TRUST = {Verify.full: "whole", Verify.sizes: "sizes right", Verify.off: "not verified"}
COLUMNS = "{:>10} {:>18} {:>11}  {:<16} {:>10}  {}"


def read(args: list[str]) -> CheckpointsConfig:
    """Return the configuration; a directory by itself is the run."""
    named = [
        f"run={arg}" if os.path.exists(arg) or (not arg.startswith("-") and "=" not in arg) else arg for arg in args
    ]
    if sum(arg.startswith("run=") for arg in named) > 1:
        raise ConfigError("one run at a time, please")
    return hydra_cli.read(CheckpointsConfig, named)


def run(config: CheckpointsConfig) -> None:
    """Print the table; fail if a checkpoint is damaged, or if there is none."""
    from bigtrain.checkpoint.store import list_checkpoints

    found = list_checkpoints(Path(config.run), config.verify, progress=show_progress)
    show_progress(None)
    print(COLUMNS.format("step", "tokens", "size", "written by", "validation", "state"))
    for item in found:
        print(row(item, config.verify))
        for problem in item.problems:
            print(f"{'':>10} {problem}")
    complete = [item for item in found if item.status == "complete"]
    if damaged := [item for item in complete if item.problems]:
        raise CheckpointError(
            f"{len(damaged)} of {len(complete)} checkpoints damaged; a launch that comes to one sets it aside"
        )


def row(item: "Listed", verify: Verify) -> str:
    state, written_by, loss = item.run_state, "", ""
    if state:
        written_by = f"{state.config.get('engine', {}).get('kind', 'unknown')} x {state.world_size}"
        parallel = state.config.get("parallel", {})
        written_by += "".join(f", {name} {size}" for name in AXES if (size := parallel.get(name, 1)) > 1)
        loss = "" if state.measured is None else f"{state.measured.value:.4f}"
    condition = "DAMAGED" if item.problems else TRUST[verify]
    if item.status == "set aside":
        condition = f"{condition.lower()}, set aside as {item.path.name}"
    elif item.status == "unfinished":
        condition = f"unfinished ({item.path.name}), deleted by the next launch"
    tokens = f"{state.tokens:,}" if state else ""
    size = f"{item.num_bytes / 2**30:.2f} GiB" if item.num_bytes >= 2**30 else f"{item.num_bytes / 2**20:.2f} MiB"
    return COLUMNS.format(item.step, tokens, size, written_by, loss, condition)


def show_progress(file: str | None) -> None:
    """Say on a terminal what is being read; None clears the line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{f'verifying {file}' if file else ''}")
        sys.stderr.flush()


main = partial(hydra_cli.command, CheckpointsConfig, run, HELP, reader=read)
