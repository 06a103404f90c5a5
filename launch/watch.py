"""Look at runs while they run: ``python launch/watch.py runs/a runs/b``; ``--help`` says more."""

import contextlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra_cli

from bigtrain.errors import EXIT_FINISHED, ConfigError

if TYPE_CHECKING:
    from bigtrain.telemetry.follow import FollowedRun


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """Which runs, and how often they are looked at."""

    runs: list[str] = field(default_factory=list)
    """Directories of runs; ``runs=`` is left out."""
    every_seconds: float = 2.0
    """Seconds between two looks."""


HELP = """\
Show runs on a terminal: progress, numbers, loss, memory, time left, the last events. Reads their files and nothing
else, so it works for running and finished runs, from any machine that sees the directory, and disturbs nobody.
It ends when no run is running any more, or with Ctrl-C. Without a terminal it says once how things stand.

  python launch/watch.py runs/gpt_nano
  ssh cluster python bigtrain/launch/watch.py /shared/runs/first /shared/runs/second

Settings, with their defaults:
{settings}
"""


def read(args: list[str]) -> WatchConfig:
    """Return the configuration; what is no setting is a run.

    Raises:
        ConfigError: listing every problem.
    """
    from bigtrain.telemetry.history import CONFIG_FILE

    runs = [arg for arg in args if Path(arg).is_dir() or not (arg.startswith("-") or "=" in arg)]
    config = hydra_cli.read(WatchConfig, [arg for arg in args if arg not in runs])
    config.runs += runs
    problems = [
        f"{run}: there is no such directory; name that of a run" for run in config.runs if not Path(run).is_dir()
    ]
    problems += [
        f"{run}: not the directory of a run: it has no {CONFIG_FILE}; name one such as runs/gpt_nano"
        for run in config.runs
        if Path(run).is_dir() and not Path(run, CONFIG_FILE).exists()
    ]
    if not config.runs:
        problems.append("which run? name its directory, such as runs/gpt_nano")
    if not config.every_seconds > 0:
        problems.append(f"every_seconds={config.every_seconds}: must be positive")
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def run(config: WatchConfig) -> int:
    """Show the runs until none of them runs."""
    from rich.console import Console

    from bigtrain.telemetry.follow import FollowedRun

    runs, console = [FollowedRun(Path(directory)) for directory in config.runs], Console(highlight=False)
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal:
            _follow(runs, config.every_seconds, console)
        else:
            for followed in runs:
                followed.read()
            console.print(_screen(runs), width=100)
    return EXIT_FINISHED


def _follow(runs: "list[FollowedRun]", every_seconds: float, console: Any) -> None:
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        is_running = True
        while is_running:
            for followed in runs:
                followed.read()
            live.update(_screen(runs), refresh=True)
            is_running = any(followed.state() in ("running", "begins") for followed in runs)
            if is_running:
                time.sleep(every_seconds)


def _screen(runs: "list[FollowedRun]") -> Any:
    from rich.console import Group
    from rich.constrain import Constrain
    from rich.panel import Panel

    from bigtrain.telemetry.view import MAX_COLUMNS

    panels = [
        Panel(item.view.render(show_events=True), title=f"{item.name}: {item.state()}", title_align="left")
        for item in runs
    ]
    return Constrain(Group(*panels), MAX_COLUMNS)


def help_page() -> str:
    """Return the text of ``--help``."""
    return HELP.format(settings=hydra_cli.setting_lines(WatchConfig))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    hydra_cli.main(read, run, help_page)
