"""Figures of the report, drawn by matplotlib as SVG with text as text and lines thinned."""

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from bigtrain.telemetry import names
from bigtrain.telemetry.files import only_steps
from bigtrain.telemetry.history import History
from bigtrain.telemetry.text import number

# Mid tones, readable on a light and on a dark page; the pictures have no background of their own.
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6")
GREY = "#808890"
_ALARM = "#dc2626"
_POINTS = 600  # of a line
_LABEL_WIDTH = 0.035  # of vertical text, as a share of the figure's
_LEGEND_CHARACTERS = 72  # that fit above a picture
_NAME_CHARACTERS = 36
_UNMARKED_EVENTS = ("start", "validation", "checkpoint", "profile")
_PER_TOKEN = ("causal_lm", "masked_lm", "denoise", "seq2seq", "speech")  # tasks whose loss is a cross-entropy of tokens
_FEW_VALUES = 8  # of a setting, which have even distances
_INCHES = (5.4, 3.1)  # half the page on a desktop, all of it on a phone
_STYLE: Any = {
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
    """Return training loss (thin: range, thick: running mean), validation and unigram loss over ``axis``."""
    is_of_tokens = all(history.config.get("task.kind", _PER_TOKEN[0]) in _PER_TOKEN for history in histories)
    figure, axes = _figure("loss (nats per token)" if is_of_tokens else "loss", axis)
    shown = _draw_runs(axes, histories, names.LOSS, axis, smooth=True, validated=names.LOSS)
    for loss in sorted({history.unigram_loss for history in histories} - {None}):
        axes.axhline(loss, color=GREY, linestyle=(0, (5, 4)), linewidth=1)
        place = {"xy": (1, loss), "xycoords": ("axes fraction", "data"), "xytext": (-4, 3)}
        _note(axes, f"unigram model {loss:.2f}", **place, ha="right")
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    if low < high:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    if not any(_finite(history.series(names.LOSS)[1]) for history in histories):
        _note(axes, "no loss is finite", xy=(0.5, 0.5), xycoords="axes fraction", xytext=(0, 0), ha="center")
    return figure


def line_figure(
    histories: list[History],
    key: str,
    label: str,
    *,
    scale: float = 1.0,
    smooth: bool = False,
    log: bool = False,
    validated: str = "",
) -> Any:
    """Return one metric of all runs over steps, with dots for what validations call ``validated``; None if no run has it."""
    if not any(_finite(history.series(key)[1]) or _validations(history, validated) for history in histories):
        return None
    figure, axes = _figure(label, names.STEP)
    _draw_runs(axes, histories, key, names.STEP, scale=scale, smooth=smooth, validated=validated)
    _scale_y(axes, log)
    return figure


def _draw_runs(
    axes: Any, histories: list[History], key: str, axis: str, *, scale: float = 1.0, smooth: bool, validated: str
) -> list[float]:
    """Draw a metric of all runs, their validations and events; return the values but for those of the first steps."""
    shown = []
    for history, colour in zip(histories, _colours(histories), strict=True):
        records, values = history.series(key)
        x, y = [record.get(axis, math.nan) for record in records], [value * scale for value in values]
        shown += _finite(y[max(len(y) // 50, min(10, len(y) // 10)) :])  # the first ones would flatten the rest
        if smooth:
            _draw_range(axes, x, y, colour)
            y = running_mean(y)
        if x:
            _line(axes, x, y, colour, _label(history), gid=f"curve-{key}-{history.name}")
        if validated:
            shown += _draw_validations(axes, history, axis, colour, validated)
    _mark_events(axes, histories, axis)
    if len(histories) > 1 or validated:
        _legend(axes)
    return shown


def curve_figure(points: Sequence[tuple[float, float]], axis: str, label: str) -> Any:
    """Return a line through some points, which are marked."""
    from matplotlib.ticker import StrMethodFormatter

    figure, axes = _figure(label, axis)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    (line,) = axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o", markersize=5)
    line.set_gid("curve")
    return figure


def memory_figure(history: History) -> Any:
    """Return device and host memory over steps, or None."""
    kinds = {
        names.PEAK_BYTES: "device, peak",
        names.RESERVED_BYTES: "device, reserved",
        names.ALLOCATED_BYTES: "device, in use",
        names.HOST_RSS_BYTES: "host, process",
    }
    known = {key: label for key, label in kinds.items() if history.series(key)[1]}
    label = "memory of rank 0 (GiB)"
    return _several_lines(history, known, label, COLOURS, scale=2**-30, log=False) if known else None


def breakdown_figure(history: History) -> Any:
    """Return the phases of a step over steps, stacked, or None."""
    records, _ = history.series(names.FORWARD_BACKWARD_SECONDS)
    if len(records) < 2:
        return None
    figure, axes = _figure("milliseconds per step", names.STEP)
    shown = [records[i] for i in _thinned(len(records))]
    x = [record[names.STEP] for record in shown]
    parts = {
        key.removeprefix("perf/").removesuffix("_seconds").replace("_", " "): [
            record.get(key, 0.0) * 1e3 for record in shown
        ]
        for key in names.PHASES
    }
    drawn = axes.stackplot(x, *parts.values(), labels=parts, colors=COLOURS, alpha=0.85)
    for key, area in zip(parts, drawn, strict=True):
        area.set_gid(f"curve-breakdown-{key}")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def family_figure(history: History, prefix: str, label: str, *, log: bool = False) -> Any:
    """Return the metrics ``<prefix>/<name>`` over steps, or None; many are coloured from cyan to magenta in order."""
    keys = history.family(prefix)
    if len(keys) < 2:
        return None
    labels: dict[str, str | None] = {key: key.removeprefix(f"{prefix}/") for key in keys}
    colours: Sequence[Any] = COLOURS
    if len(keys) > len(COLOURS):
        from matplotlib import colormaps

        labels |= dict.fromkeys(keys[1:-1])
        colours = [colormaps["cool"](i / (len(keys) - 1)) for i in range(len(keys))]
    return _several_lines(history, labels, label, colours, scale=1.0, log=log)


def _several_lines(
    history: History, labels: Mapping[str, str | None], label: str, colours: Sequence[Any], *, scale: float, log: bool
) -> Any:
    """Return some metrics of a run over steps; a label of None is not in the legend."""
    figure, axes = _figure(label, names.STEP)
    for (key, name), colour in zip(labels.items(), colours, strict=False):
        records, values = history.series(key)
        x, y = [record[names.STEP] for record in records], [value * scale for value in values]
        _line(axes, x, y, colour, name, gid=f"curve-{key}", width=1.2)
    _scale_y(axes, log)
    _legend(axes)
    return figure


def to_svg(figure: Any, prefix: str) -> str:
    """Return ``figure`` as an SVG element; its ids begin with ``prefix``, unique within the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)  # the page sizes it


def parallel_figure(names: Sequence[str], lines: Sequence[Sequence[str | float]], *, log: Sequence[bool]) -> Any:
    """Return parallel coordinates, a vertical axis a name: each line has a place on each, and its colour is the last one.

    The best line is the first one. An axis of numbers is linear, or with ``log`` logarithmic; any other has its values
    in even distances.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * _INCHES[0], _INCHES[1]), layout="constrained")
    axes = figure.subplots()
    places = []
    for column, is_log in enumerate([*log, False]):
        values = [line[column] for line in lines]
        known = list(dict.fromkeys(sorted(values, key=_as_number)))
        numbers = [_as_number(value) for value in known]
        if not all(map(math.isfinite, numbers)) or (column < len(log) and len(known) <= _FEW_VALUES):
            numbers = [float(place) for place in range(len(known))]
        elif is_log:
            numbers = [math.log(number) for number in numbers]
        low, width = min(numbers), max(numbers) - min(numbers) or 1.0
        at = {
            value: (number - low) / width if len(known) > 1 else 0.5
            for value, number in zip(known, numbers, strict=True)
        }
        places.append([at[value] for value in values])
        axes.axvline(column, color=GREY, linewidth=0.8, alpha=0.6)
        shown = known if len(known) <= _FEW_VALUES else [known[0], known[-1]]
        for value in shown:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            _note(axes, text, xy=(column, at[value]), xycoords="data", xytext=(4, 2), fontsize=9)
    for place, line in reversed(list(enumerate(zip(*places, strict=True)))):
        colour = colormaps["viridis"](0.9 * place / max(len(lines) - 1, 1))
        axes.plot(
            range(len(names)), line, color=colour, linewidth=2.5 if place == 0 else 1, alpha=1 if place == 0 else 0.6
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.1, len(names) - 0.8)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return figure


def several_figure(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    across: str,
    up: str,
    *,
    dots: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Any:
    """Return curves by name over common places; with ``dots``, what they were fitted to, over the logarithm of these."""
    figure, axes = _figure(up, across)
    for colour, (name, y) in zip(itertools.cycle(COLOURS), curves.items(), strict=False):
        axes.plot(x, y, color=colour, marker=None if dots else "o", markersize=4, linewidth=1.7, label=name)
        if dots:
            axes.plot(*zip(*dots[name], strict=True), color=colour, marker="o", linestyle="none")
    if dots:
        axes.set_xscale("log")
    _legend(axes)
    return figure


def _as_number(value: str | float) -> float:
    try:
        return float(value)
    except ValueError:
        return math.inf


def drawing() -> Any:
    """Return the context in which figures are made, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(_STYLE)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the centred mean over about 2 % of the curve, narrower towards its ends; NaN is left out."""
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
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(label)
    axes.set_xlabel("optimizer step" if axis == names.STEP else axis)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    is_count = label.startswith((names.TOKENS, names.SAMPLES))
    # A common factor of ticks (1e-7) would lie under the legend.
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if is_count else StrMethodFormatter("{x:g}"))
    axes.margins(x=0.01)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0)
    return figure, axes


def _label(history: History) -> str:
    name, half = history.name, _NAME_CHARACTERS // 2
    return name if len(name) <= _NAME_CHARACTERS else f"{name[:half]}…{name[-half:]}"


def _legend(axes: Any) -> None:
    """Put the legend above the picture, in as many columns as fit."""
    lines, labels = axes.get_legend_handles_labels()
    columns = max(_LEGEND_CHARACTERS // (max(map(len, labels), default=0) + 6), 1)
    options = {"frameon": False, "fontsize": 9, "loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(lines, labels, ncols=columns, **options)


def _scale_y(axes: Any, log: bool) -> None:
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    if not log:
        if axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
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
    """Draw every value of a short series, of a long one the range of each bin."""
    if len(x) <= _POINTS:
        axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        return
    size = -(-len(x) // _POINTS)
    pieces = [[v for v in y[i : i + size] if v == v] or [float("nan")] for i in range(0, len(x), size)]
    axes.fill_between(
        x[::size], [min(p) for p in pieces], [max(p) for p in pieces], color=colour, alpha=0.25, linewidth=0
    )


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _validations(history: History, key: str) -> list[tuple[int, float]]:
    return [(e[names.STEP], number(e, key)) for e in only_steps(history.events_of("validation")) if key in e]


def _draw_validations(axes: Any, history: History, axis: str, colour: str, key: str) -> list[float]:
    place = _place(history, axis)
    points = [(place(step), value) for step, value in _validations(history, key)]
    if points:
        (dots,) = axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle="none",
            marker="o",
            markersize=5,
            markeredgecolor=GREY,
            label=f"{_label(history)}: validation, last {points[-1][1]:.3f}",
        )
        dots.set_gid(f"curve-validation{'' if key == names.LOSS else f'-{key}'}-{history.name}")
    return _finite([value for _, value in points])


def _mark_events(axes: Any, histories: list[History], axis: str) -> None:
    """Mark checkpoints at the bottom and other events by lines with a word at the top."""
    happened: list[tuple[float, str, bool]] = []
    for history, colour in zip(histories, _colours(histories), strict=True):
        place = _place(history, axis)
        checkpoints = sorted({place(event[names.STEP]) for event in only_steps(history.events_of("checkpoint"))})
        if checkpoints:
            bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False, "linestyle": "none"}
            x = [checkpoints[i] for i in _thinned(len(checkpoints))]
            (marks,) = axes.plot(x, [0] * len(x), color=colour, marker="^", markersize=4, alpha=0.7, **bottom)
            marks.set_gid(f"event-checkpoint-{history.name}")
        for event in only_steps(history.events):
            if (kind := event.get("event")) not in _UNMARKED_EVENTS:
                where, is_alarm = place(event[names.STEP]), kind in names.ALARMS or bool(event.get("after"))
                line = axes.axvline(where, color=_ALARM if is_alarm else colour, linestyle=":", linewidth=1.0, zorder=1)
                line.set_gid(f"event-{kind}-{event[names.STEP]}")
                happened.append((where, str(kind), is_alarm))
    _name_events(axes, sorted(happened, key=itemgetter(0)))


def _name_events(axes: Any, happened: list[tuple[float, str, bool]]) -> None:
    """Label events at the top; those close together share a label."""
    first, last = axes.get_xlim()
    width = _LABEL_WIDTH * (last - first)
    groups: list[list[tuple[float, str, bool]]] = []
    for item in happened:
        if groups and item[0] - groups[-1][0][0] < width:
            groups[-1].append(item)
        else:
            groups.append([item])
    for group in groups:
        x, text = group[0][0], ", ".join(dict.fromkeys(kind for _, kind, _ in group))
        side, offset = ("right", -2) if x > last - width else ("left", 2)
        colour = _ALARM if any(is_alarm for *_, is_alarm in group) else GREY
        where: dict[str, Any] = {"xy": (x, 1), "xycoords": ("data", "axes fraction"), "xytext": (offset, -3)}
        _note(axes, text, ha=side, va="top", rotation=90, color=colour, fontsize=9, **where)


def _note(axes: Any, text: str, **style: Any) -> None:
    """Annotate a place, if it is inside the axes; the layout ignores the text."""
    axes.annotate(text, textcoords="offset points", annotation_clip=True, **style).set_in_layout(False)


def _place(history: History, axis: str) -> Callable[[int], float]:
    if axis == names.STEP:
        return lambda step: step
    per_step = number(history.records[-1], axis) / history.records[-1][names.STEP]
    return lambda step: step * per_step


def _thinned(length: int) -> list[int]:
    step = max(length // _POINTS, 1)
    return sorted({*range(0, length, step), length - 1}) if length else []


def _colours(histories: list[History]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(histories))]
