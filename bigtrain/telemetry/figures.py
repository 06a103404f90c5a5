"""The report's pictures, drawn by matplotlib as SVG: text stays text, lines are thinned to what an eye can see."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from bigtrain.telemetry import names
from bigtrain.telemetry.history import History

# Mid tones, readable on a light and on a dark page; the pictures have no background of their own.
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6")
GREY = "#808890"
_ALARM = "#dc2626"
_POINTS = 600  # of a line
_INCHES = (5.4, 3.1)  # half a desktop's page, and a phone's whole one
_STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "bigtrain",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def loss_figure(histories: list[History], axis: str) -> Any:
    """Return training loss (thin: range, thick: running mean), validation loss and unigram loss over ``axis``."""
    figure, axes = _figure("loss (nats per token)", axis)
    tops = []
    for history, colour in zip(histories, _colours(histories), strict=True):
        records, losses = history.series(names.LOSS)
        x = [record[axis] for record in records if axis in record]
        if len(x) != len(losses):
            continue
        _draw_range(axes, x, losses, colour)
        _line(axes, x, running_mean(losses), colour, history.name, gid=f"curve-loss-{history.name}")
        # The first steps would flatten the rest.
        tops += [loss for loss in losses[max(len(losses) // 50, min(10, len(losses) - 1)) :] if loss == loss]
        tops += _draw_validations(axes, history, axis, colour)
        _mark_events(axes, history, axis, colour)
    for loss in sorted({history.unigram_loss for history in histories} - {None}):
        axes.axhline(loss, color=GREY, linestyle=(0, (5, 4)), linewidth=1)
        _note(axes, f"unigram model {loss:.2f}", (1, loss), ("axes fraction", "data"), (-4, 3), ha="right")
    low, high = min(tops, default=0.0), max(tops, default=0.0)
    if low < high:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    axes.legend(frameon=False, fontsize=9)
    return figure


def line_figure(
    histories: list[History], key: str, label: str, *, scale: float = 1.0, smooth: bool = False, log: bool = False
) -> Any:
    """Return one metric of all runs over steps, or None if no run has it."""
    if not any(history.series(key)[1] for history in histories):
        return None
    figure, axes = _figure(label, names.STEP)
    for history, colour in zip(histories, _colours(histories), strict=True):
        records, values = history.series(key)
        x, y = [record[names.STEP] for record in records], [value * scale for value in values]
        if smooth:
            _draw_range(axes, x, y, colour)
            y = running_mean(y)
        _line(axes, x, y, colour, history.name, gid=f"curve-{key}-{history.name}")
        _mark_events(axes, history, names.STEP, colour)
    if log:
        _log_scale(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return figure


def memory_figure(history: History) -> Any:
    """Return allocated, reserved, peak and host memory of a run over steps, or None."""
    kinds = {
        names.PEAK_BYTES: "device, peak",
        names.RESERVED_BYTES: "device, reserved",
        names.ALLOCATED_BYTES: "device, in use",
        names.HOST_RSS_BYTES: "host, process",
    }
    if not any(history.series(key)[1] for key in kinds):
        return None
    figure, axes = _figure("memory of rank 0 (GiB)", names.STEP)
    for (key, label), colour in zip(kinds.items(), COLOURS, strict=False):
        records, values = history.series(key)
        if values:
            _line(
                axes, [r[names.STEP] for r in records], [v / 2**30 for v in values], colour, label, gid=f"curve-{key}"
            )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return figure


def breakdown_figure(history: History) -> Any:
    """Return what a step's time goes into, stacked, over steps, or None."""
    records, _ = history.series(names.FORWARD_BACKWARD_SECONDS)
    if not records:
        return None
    figure, axes = _figure("milliseconds per step", names.STEP)
    x = [record[names.STEP] for record in records]
    parts = {
        key.removeprefix("perf/").removesuffix("_seconds").replace("_", " "): [
            record.get(key, 0.0) * 1e3 for record in records
        ]
        for key in names.PHASES
    }
    keep = _thinned(len(x))
    drawn = axes.stackplot(
        [x[i] for i in keep],
        *([values[i] for i in keep] for values in parts.values()),
        labels=parts,
        colors=COLOURS,
        alpha=0.85,
    )
    for key, area in zip(parts, drawn, strict=True):
        area.set_gid(f"curve-breakdown-{key}")
    axes.set_ylim(bottom=0)
    _legend_above(axes)
    return figure


def family_figure(history: History, prefix: str, label: str, *, log: bool = False) -> Any:
    """Return the metrics ``<prefix>/<name>`` over steps, from the first in cyan to the last in magenta, or None."""
    keys = list(dict.fromkeys(key for record in history.records for key in record if key.startswith(f"{prefix}/")))
    if len(keys) < 2:
        return None
    from matplotlib import colormaps

    figure, axes = _figure(label, names.STEP)
    for i, key in enumerate(keys):
        records, values = history.series(key)
        colour = colormaps["cool"](i / (len(keys) - 1))
        name = key.removeprefix(f"{prefix}/") if len(keys) <= len(COLOURS) or i in (0, len(keys) - 1) else None
        _line(axes, [record[names.STEP] for record in records], values, colour, name, width=1.2, gid=f"curve-{key}")
    if log:
        _log_scale(axes)
    _legend_above(axes)
    return figure


def to_svg(figure: Any, prefix: str) -> str:
    """Return ``figure`` as an SVG element for a page; ids begin with ``prefix``, as other pictures have the same."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    # The page gives it its size.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def drawing() -> Any:
    """Return the context in which figures are made; matplotlib then needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(_STYLE)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the centred mean over about 2 % of the curve, narrower towards its ends; what is no number is left out."""
    import numpy

    array = numpy.asarray(values, dtype=float)
    sums = numpy.concatenate(([0.0], numpy.cumsum(numpy.nan_to_num(array))))
    counts = numpy.concatenate(([0], numpy.cumsum(~numpy.isnan(array))))
    position = numpy.arange(len(array))
    reach = numpy.minimum(max(len(array) // 100, 1), numpy.minimum(position, len(array) - 1 - position))
    low, high = position - reach, position + reach + 1
    num_known = counts[high] - counts[low]
    means = numpy.where(num_known > 0, (sums[high] - sums[low]) / numpy.maximum(num_known, 1), numpy.nan)
    return means.tolist()


def _figure(label: str, axis: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(label)
    axes.set_xlabel("optimizer step" if axis == names.STEP else axis)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0)
    return figure, axes


def _legend_above(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _log_scale(axes: Any) -> None:
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def _line(
    axes: Any, x: Sequence[float], y: Sequence[float], colour: Any, label: str | None, *, gid: str, width: float = 1.7
) -> None:
    keep = _thinned(len(x))
    (line,) = axes.plot([x[i] for i in keep], [y[i] for i in keep], color=colour, linewidth=width, label=label)
    line.set_gid(gid)
    if len(keep) == 1:
        line.set_marker("o")


def _draw_range(axes: Any, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    """Draw every value of a short series, and of a long one the range of each piece."""
    if len(x) <= _POINTS:
        axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        return
    size = -(-len(x) // _POINTS)
    pieces = [[v for v in y[i : i + size] if v == v] or [float("nan")] for i in range(0, len(x), size)]
    axes.fill_between(
        x[::size], [min(p) for p in pieces], [max(p) for p in pieces], color=colour, alpha=0.25, linewidth=0
    )


def _draw_validations(axes: Any, history: History, axis: str, colour: str) -> list[float]:
    """Draw the validations and return their losses."""
    place = _place(history, axis)
    points = [
        (place(event[names.STEP]), event[names.LOSS])
        for event in history.validations()
        if event.get(names.LOSS) is not None
    ]
    if points:
        (dots,) = axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle="none",
            marker="o",
            markersize=5,
            markeredgecolor=GREY,
            label=f"{history.name}: validation, last {points[-1][1]:.3f}",
        )
        dots.set_gid(f"curve-validation-{history.name}")
    return [loss for _, loss in points if loss == loss]


def _mark_events(axes: Any, history: History, axis: str, colour: str) -> None:
    place, kinds = _place(history, axis), dict[int, list[str]]()
    for event in history.disturbances():
        if isinstance(event.get(names.STEP), int):
            kinds.setdefault(event[names.STEP], []).append(event["event"])
    for step, happened in kinds.items():
        alarm = any(kind in names.ALARMS for kind in happened)
        for kind in happened:
            line = axes.axvline(place(step), color=_ALARM if alarm else colour, linestyle=":", linewidth=1.0)
            line.set_gid(f"event-{kind}-{step}")
        style = {"rotation": 90, "va": "top", "fontsize": 7, "color": _ALARM if alarm else GREY}
        label = ", ".join(dict.fromkeys(happened))
        _note(axes, label, (place(step), 1), ("data", "axes fraction"), (2, -2), **style)


def _note(
    axes: Any, text: str, place: tuple[float, float], system: tuple[str, str], offset: tuple[int, int], **style: Any
) -> None:
    """Write beside a place, unless it is outside; a text never moves the axes."""
    note = axes.annotate(text, place, offset, system, "offset points", annotation_clip=True, **style)
    note.set_in_layout(False)


def _place(history: History, axis: str) -> Callable[[int], float]:
    """Return where on ``axis`` a step is."""
    if axis == names.STEP:
        return lambda step: step
    last = history.records[-1]
    return lambda step: step * last[axis] / last[names.STEP]


def _thinned(length: int) -> list[int]:
    step = max(length // _POINTS, 1)
    return sorted({*range(0, length, step), length - 1}) if length else []


def _colours(histories: list[History]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(histories))]
