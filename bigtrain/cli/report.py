"""Write a page about runs: ``python launch/report.py runs/a runs/b``; ``--help`` says more."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bigtrain.cli import hydra_cli
from bigtrain.config.convert import LocalPath
from bigtrain.config.packages import require
from bigtrain.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    runs: list[LocalPath] = field(default_factory=list)
    """Directories of runs; ``runs=`` is left out."""
    out: LocalPath | None = None
    """File to write: ``.html``, or ``.svg``, ``.png`` or ``.pdf`` for the loss curve alone; by default ``report.html`` in the run, for several runs here."""


HELP = """\
Write one HTML file about one or several runs, finished or running: loss, speed, memory, where the time goes, what
happened, how their configurations differ, and generated text. It needs no network and can be sent or printed.

  python launch/report.py runs/gpt_nano
  python launch/report.py runs/first runs/second out=comparison.html
  python launch/report.py runs/first out=loss.png
"""
PICTURES = (".svg", ".png", ".pdf")


def read(args: list[str]) -> ReportConfig:
    """Return the configuration; what is no setting is a run."""
    config = hydra_cli.read_runs(ReportConfig, args)
    require("bigtrain report", "matplotlib", "report")
    config.out = config.out or (f"{config.runs[0]}/report.html" if len(config.runs) == 1 else "report.html")
    if Path(config.out).suffix not in (".html", *PICTURES):
        raise ConfigError(f"out={config.out}: the name must end in .html, {', '.join(PICTURES)}")
    return config


def run(config: ReportConfig) -> None:
    from bigtrain.telemetry import figures, names
    from bigtrain.telemetry.history import read_history
    from bigtrain.telemetry.report import render

    histories, out = [read_history(Path(directory)) for directory in config.runs], Path(str(config.out))
    try:
        if out.suffix in PICTURES:
            with figures.drawing():
                figures.loss_figure(histories, names.STEP).savefig(out, dpi=160, transparent=True)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(render(histories), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error}") from error
    print(out)


main = partial(hydra_cli.command, ReportConfig, run, HELP, reader=read)
