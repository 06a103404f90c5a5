"""Fit the law by which the loss falls with size: ``bigtrain curve runs/sizes``; ``--help`` says more."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bigtrain.cli import hydra_cli
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath
from bigtrain.config.packages import require
from bigtrain.errors import ConfigError

if TYPE_CHECKING:
    from bigtrain.run.law import Law, Point


@dataclass(kw_only=True, slots=True)
class CurveConfig:
    runs: list[LocalPath] = field(default_factory=list)
    """Directories of runs, or of sweeps, whose runs are all taken; ``runs=`` is left out."""
    compute: Annotated[list[float], Bound(gt=0)] = field(default_factory=list)
    """Budgets in operations (6 per parameter and token), for which the best sizes and their loss are printed."""
    out: LocalPath = "curve.html"
    """Page to write."""


HELP = """\
Say whether the data is large enough, and the model: fit L = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022) to the
validation losses of runs that differ in parameters N or data D, with intervals of 90 % by bootstrap.

  bigtrain sweep +model=gpt_nano train.epochs=1 validation.every_steps=100 sweep.name=sizes \\
      data.max_train_samples=500,1000,2000,4000 model.hidden_dim=64,128
  bigtrain curve runs/sizes compute=[1e15,1e16]
"""


def read(args: list[str]) -> CurveConfig:
    sweeps = [arg for arg in args if os.path.isfile(os.path.join(arg, "sweep.json"))]
    found = [str(run.parent) for sweep in sweeps for run in sorted(Path(sweep).glob("*/metrics.jsonl"))]
    require("bigtrain curve", "matplotlib", "report")
    return hydra_cli.read_runs(CurveConfig, [*(arg for arg in args if arg not in sweeps), *found])


def run(config: CurveConfig) -> None:
    from bigtrain.run.law import fit, read_point
    from bigtrain.telemetry.report import Section, render

    points = [read_point(Path(directory)) for directory in config.runs]
    if len({point.unit for point in points}) > 1:
        raise ConfigError(
            "these runs count tokens and samples, and their losses are of different things; give one kind"
        )
    if config.compute and points[0].unit != "tokens":
        raise ConfigError("compute: operations are counted of tokens, and these runs have samples; leave it out")
    law, again = fit(points)
    lines = [*_law_lines(law, again), _verdict(points, law), *_budget_lines(config.compute, points, law, again)]
    print("\n".join(lines))
    head = ["run", "parameters", points[0].unit, "passes", "loss", "of the law"]
    rows = []
    for p in sorted(points, key=lambda p: (p.parameters, p.size)):
        losses = [f"{loss:.4f}" for loss in (p.loss, law.loss(p.parameters, p.size))]
        rows.append([p.name, f"{p.parameters:,}", f"{p.size:,.0f}", f"{p.passes:.3g}", *losses])
    section = Section("Loss by size", command="\n".join(lines), table=(head, rows), draw=partial(_draw, points, law))
    try:
        Path(config.out).write_text(render([], title="Learning curve", ahead=[section]), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out={config.out}: cannot be written: {error}") from error
    print(config.out)


def _law_lines(law: "Law", again: "list[Law]") -> list[str]:
    shown = ["E", *(["A", "alpha"] if law.A else []), *(["B", "beta"] if law.B else [])]
    return [f"{name:<6} {_with_interval([getattr(one, name) for one in (law, *again)])}" for name in shown]


def _with_interval(found: list[float]) -> str:
    from bigtrain.run.law import interval

    low, high = interval(found[1:])
    return f"{found[0]:.4g} ({low:.4g} to {high:.4g})"


def _verdict(points: "list[Point]", law: "Law") -> str:
    """Return what the largest run loses to its size, and to that of its data."""
    largest = max(points, key=lambda p: p.parameters * p.size)
    of_model, of_data = law.terms(largest.parameters, largest.size)
    wants = [f"{of_data:.4f} are for want of data"] if law.B else []
    wants += [f"{of_model:.4f} for want of parameters"] if law.A else []
    more = f": a larger {'data set' if of_data > of_model else 'model'} helps more" if len(wants) == 2 else ""
    return f"of the loss {law.loss(largest.parameters, largest.size):.4f} of {largest.name}, {', '.join(wants)}{more}"


def _budget_lines(compute: list[float], points: "list[Point]", law: "Law", again: "list[Law]") -> Iterator[str]:
    like = max(points, key=lambda p: p.parameters * p.size)
    for budget in compute:
        sizes = [one.best(budget, like.passes, like) for one in (law, *again)]
        losses = [one.loss(*size) for one, size in zip((law, *again), sizes, strict=True)]
        parameters, tokens = zip(*sizes, strict=True)
        found = {"parameters": parameters, "tokens": tokens, "loss": losses}
        said = ", ".join(f"{name} {_with_interval(list(values))}" for name, values in found.items())
        yield f"with {budget:.3g} operations: {said}"


def _draw(points: "list[Point]", law: "Law") -> dict[str, Any]:
    from bigtrain.telemetry.figures import several_figure

    by_model: dict[int, list[tuple[float, float]]] = {}
    for point in sorted(points, key=lambda p: (p.parameters, p.size)):
        by_model.setdefault(point.parameters, []).append((point.size, point.loss))
    low, high = min(p.size for p in points), max(p.size for p in points)
    x = [low * (4 * high / low) ** (place / 60) for place in range(61)]
    curves = {f"{n:,} parameters": [law.loss(n, d) for d in x] for n in by_model}
    dots = {f"{n:,} parameters": found for n, found in by_model.items()}
    caption = "Validation loss: a dot a run, lines the law, up to four times the data."
    return {caption: several_figure(x, curves, points[0].unit, "validation loss", dots=dots)}


main = partial(hydra_cli.command, CurveConfig, run, HELP, reader=read)
