"""Draw the loss curves of runs: ``python launch/plot_loss.py runs/a runs/b --out loss.png``.

Reads only the files of the run directories, so it works on finished and on running runs.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigtrain.config import DataSource, TrainConfig
from bigtrain.errors import EXIT_USER_ERROR, BigtrainError, DataError
from bigtrain.schema import from_dict
from bigtrain.telemetry import names
from bigtrain.telemetry.files import read_jsonl
from bigtrain.telemetry.recorder import EVENTS_FILE, METRICS_FILE

# Mid tones, readable on a light and on a dark page; the picture has no background of its own.
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6")
GREY = "#808890"


@dataclass(kw_only=True, slots=True)
class Curves:
    """What is drawn of one run; losses are in nats per token."""

    name: str
    steps: list[int]
    losses: list[float]
    validation_steps: list[int]
    validation_losses: list[float]
    unigram_loss: float | None


def main() -> int:
    """Read the command line and draw; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, default=Path("loss.png"), help="picture to write: .png, .svg or .pdf")
    parser.add_argument("--log-x", action="store_true", help="logarithmic step axis")
    arguments = parser.parse_args()
    try:
        draw([read_curves(run) for run in arguments.runs], arguments.out, log_x=arguments.log_x)
    except BigtrainError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    print(arguments.out)
    return 0


def read_curves(run: Path) -> Curves:
    """Read the curves of a run directory.

    Raises:
        DataError: There are no metrics in it.
    """
    records = read_jsonl(run / METRICS_FILE) if (run / METRICS_FILE).exists() else []
    if not records:
        raise DataError(
            f"{run}: no {METRICS_FILE} with steps in it; name the directory of a run, such as runs/gpt_nano"
        )
    events = read_jsonl(run / EVENTS_FILE) if (run / EVENTS_FILE).exists() else []
    validations = [event for event in events if event.get("event") == "validation"]
    return Curves(
        name=run.resolve().name,
        steps=[record[names.STEP] for record in records],
        losses=[_number(record) for record in records],
        validation_steps=[event[names.STEP] for event in validations],
        validation_losses=[_number(event) for event in validations],
        unigram_loss=_unigram_loss(run),
    )


def _number(record: dict[str, Any]) -> float:
    loss = record.get(names.LOSS)
    return float("nan") if loss is None else loss


def _unigram_loss(run: Path) -> float | None:
    """Return the validation loss of a model that knows only the frequency of each token, if the corpus is there."""
    from bigtrain.data.index import INDEX_FILE
    from bigtrain.data.prepare import prepared_directory

    try:
        config = from_dict(TrainConfig, yaml.safe_load((run / "config.yaml").read_text()))
        if config.data.source is DataSource.synthetic:
            return None
        index = json.loads((prepared_directory(config.data) / INDEX_FILE).read_text())
        return index["validation"]["unigram_nats_per_token"]
    except (OSError, ValueError, KeyError, BigtrainError) as error:
        print(f"{run}: drawn without the unigram line: {error}", file=sys.stderr)
        return None


def draw(runs: list[Curves], path: Path, *, log_x: bool) -> None:
    """Draw training loss (thin: every step, thick: running mean), validation loss and unigram loss into ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 11, "text.color": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            _draw_run(axes, run, colour)
        for loss in {run.unigram_loss for run in runs} - {None}:
            axes.axhline(loss, color=GREY, linestyle=(0, (5, 4)), linewidth=1.2)
            axes.annotate(
                f"unigram model {loss:.2f}", (1, loss), (-4, 4), ("axes fraction", "data"), "offset points", ha="right"
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        if log_x:
            axes.set_xscale("log")
        axes.margins(x=0.01)
        axes.grid(color=GREY, alpha=0.2, linewidth=0.7)
        axes.spines[:].set_visible(False)
        axes.tick_params(which="both", length=0)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=160, transparent=True)
        pyplot.close(figure)


def _draw_run(axes: Any, run: Curves, colour: str) -> None:
    axes.plot(run.steps, run.losses, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(run.steps, _running_mean(run.losses), color=colour, linewidth=1.8, label=f"{run.name}: training")
    if run.validation_steps:
        axes.plot(
            run.validation_steps,
            run.validation_losses,
            color=colour,
            linestyle="none",
            marker="o",
            markersize=6,
            markeredgecolor=GREY,
            label=f"{run.name}: validation, last {run.validation_losses[-1]:.3f}",
        )


def _running_mean(losses: list[float]) -> Any:
    """Return the centred mean over about 2 % of the curve, narrower towards its ends."""
    import numpy

    values = numpy.asarray(losses, dtype=float)
    num_values = len(values)
    sums = numpy.concatenate(([0.0], numpy.cumsum(numpy.nan_to_num(values))))
    counts = numpy.concatenate(([0], numpy.cumsum(~numpy.isnan(values))))
    position = numpy.arange(num_values)
    reach = numpy.minimum(max(num_values // 100, 1), numpy.minimum(position, num_values - 1 - position))
    low, high = position - reach, position + reach + 1
    num_known = counts[high] - counts[low]
    return numpy.where(num_known > 0, (sums[high] - sums[low]) / numpy.maximum(num_known, 1), numpy.nan)


if __name__ == "__main__":
    sys.exit(main())
