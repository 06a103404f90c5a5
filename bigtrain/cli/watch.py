"""Look at runs while they run: ``python launch/watch.py runs/a runs/b``; ``--help`` says more."""

import contextlib
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bigtrain.cli import hydra_cli
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath

if TYPE_CHECKING:
    from bigtrain.telemetry.view import FollowedRun


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    runs: list[LocalPath] = field(default_factory=list)
    """Directories of runs; ``runs=`` is left out."""
    every_seconds: Annotated[float, Bound(gt=0, le=10**6)] = 2.0
    """Seconds between two looks."""


HELP = """\
Show runs on a terminal: progress, numbers, loss, memory, time left, the last events. Reads their files and nothing
else, so it works for running and finished runs, from any machine that sees the directory, and disturbs nobody.
A run is running, finished, stopped or failed (and why), or has given no sign of life for some time: its process or its
machine is gone, or stands still. It ends when no run is running any more, or with Ctrl-C. Without a terminal it says
once how things stand.

  python launch/watch.py runs/gpt_nano
  ssh cluster python bigtrain/launch/watch.py /shared/runs/first /shared/runs/second
"""


def run(config: WatchConfig) -> None:
    """Show the runs until none of them runs."""
    from rich.console import Console

    from bigtrain.telemetry.view import FollowedRun

    runs, console = [FollowedRun(Path(directory)) for directory in config.runs], Console(highlight=False)
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal:
            _follow(runs, config.every_seconds, console)
        else:
            for followed in runs:
                followed.read()
            console.print(_screen(runs), width=100)


def _follow(runs: "list[FollowedRun]", every_seconds: float, console: Any) -> None:
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            for followed in runs:
                followed.read()
            live.update(_screen(runs), refresh=True)
            if all(followed.is_over() for followed in runs):
                return
            time.sleep(every_seconds)


def _screen(runs: "list[FollowedRun]") -> Any:
    from rich.console import Group
    from rich.constrain import Constrain
    from rich.panel import Panel
    from rich.text import Text

    from bigtrain.telemetry.view import MAX_COLUMNS

    panels = []
    for followed in runs:
        state, _, why = followed.state().partition(": ")
        shown = [followed.view.render(show_events=True), *([Text(why)] if why else [])]
        panels.append(Panel(Group(*shown), title=Text(f"{followed.name}: {state}"), title_align="left"))
    return Constrain(Group(*panels), MAX_COLUMNS)


main = partial(hydra_cli.command, WatchConfig, run, HELP, reader=partial(hydra_cli.read_runs, WatchConfig))
