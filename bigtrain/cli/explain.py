"""Say why a classifier says what it says: ``bigtrain explain checkpoint=runs/digits index=[0,1]``; ``--help`` says more."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from bigtrain.cli import hydra_cli
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath
from bigtrain.config.packages import require
from bigtrain.errors import ConfigError

METHODS = ("gradient", "occlusion", "attention")


@dataclass(kw_only=True, slots=True)
class ExplainConfig:
    checkpoint: LocalPath
    """Directory of the run, or of one of its checkpoints."""
    inputs: LocalPath | None = None
    """File or directory of inputs, as of ``bigtrain predict``; by default samples that were held out."""
    index: Annotated[list[int], Bound(ge=0)] = field(default_factory=list)
    """Which of them, counted from 0; by default the first 8."""
    methods: list[str] = field(default_factory=lambda: ["gradient", "occlusion"])
    """``gradient`` times input, ``occlusion``, and of encoders of text of transformers ``attention``."""
    samples: Annotated[int, Bound(ge=0, le=10**6)] = 128
    """Held-out samples whose accuracy is measured without their most important tokens or pixels; 0: not at all."""
    out: LocalPath | None = None
    """File to write, ``.html``, and beside it ``.json``; by default ``explain.html`` in the run."""


HELP = """\
Say how much each token or pixel adds to the label that a classifier gives, as a page and as JSON, and whether it is so:
the accuracy without the most important ones beside that without random ones.

  bigtrain explain checkpoint=runs/digits index=[0,1,2]
  bigtrain explain checkpoint=runs/mails inputs=new.txt methods=[gradient,occlusion,attention]
"""


def read(args: list[str]) -> ExplainConfig:
    config = hydra_cli.read(ExplainConfig, args)
    if wrong := [method for method in config.methods if method not in METHODS]:
        raise ConfigError(f"methods={config.methods}: {wrong[0]} is none of {', '.join(METHODS)}")
    if config.out and Path(config.out).suffix != ".html":
        raise ConfigError(f"out={config.out}: the name must end in .html")
    require("bigtrain explain", "matplotlib", "report")
    return config


def run(config: ExplainConfig) -> None:
    from bigtrain.run.explaining import SHARES, explain
    from bigtrain.telemetry.explained import render_explained

    inputs = Path(config.inputs) if config.inputs else None
    path = Path(config.checkpoint)
    facts = explain(path, inputs=inputs, index=config.index, methods=config.methods, samples=config.samples)
    out = Path(config.out) if config.out else Path(facts["run"], "explain.html")
    try:
        out.write_text(render_explained(facts), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error}") from error
    if deleted := facts.get("deletion"):
        print(f"accuracy of {deleted['samples']} held-out samples without the most important tokens or pixels:")
        print(f"{'left out':<12}" + "".join(f"{share:>8.0%}" for share in SHARES))
        for method, right in deleted["right"].items():
            print(f"{method:<12}" + "".join(f"{count / deleted['samples']:>8.3f}" for count in right))
    print(out)


main = partial(hydra_cli.command, ExplainConfig, run, HELP, reader=read)
