"""One self-contained HTML page about one or several runs: ``report.html`` filled with tables, figures and texts."""

import base64
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from bigtrain.config.parallel import AXES
from bigtrain.log import redact
from bigtrain.telemetry import figures, names
from bigtrain.telemetry.history import History, differences
from bigtrain.telemetry.text import (
    describe_communication,
    describe_metrics,
    format_count,
    format_duration,
    number,
    task_metrics,
)

_MAX_EVENTS = 60
_MAX_SAMPLES = 12
_MAX_CLASSES = 32  # of a confusion matrix that is shown whole
_MAX_PAIRS = 20  # of labels that are confused, in its place
_DETAILED_RUNS = 4  # have pictures of their own

Table = tuple[list[str], list[list[str]]]  # head and rows


@dataclass(frozen=True, slots=True)
class Section:
    """What a command has found out, in front of the report of runs."""

    heading: str
    text: str = ""
    command: str = ""
    table: Table | None = None
    draw: Callable[[], dict[str, Any]] = dict  # figures by caption
    markup: str = ""  # HTML of our own


def render(histories: list[History], *, title: str = "", ahead: Sequence[Section] = ()) -> str:
    """Return the page as HTML; it needs no network."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    runs = [
        {
            "name": history.name,
            "classification": _classification(history.classification),
            "events": _events(history),
            "samples": history.samples[-_MAX_SAMPLES:],
            "images": [(picture["step"], _png(picture)) for picture in history.images],
            "written": next(iter(history.events_of("written")[-1:]), {}),
        }
        for history in histories
    ]
    pictures, drawn_ahead = [], []
    with figures.drawing():
        for place, section in enumerate(ahead):
            drawing = section.draw().items()
            drawn_ahead.append(
                [(figures.to_svg(one, f"ahead-{place}-{i}"), text) for i, (text, one) in enumerate(drawing)]
            )
        for place, (heading, drawn) in enumerate(_pictures(histories)):
            known = ((caption, figure) for caption, figure in drawn.items() if figure is not None)
            shown = [(figures.to_svg(figure, f"figure-{place}-{i}"), text) for i, (text, figure) in enumerate(known)]
            pictures.append((heading, shown))
    return pages.get_template("report.html").render(
        title=title or ", ".join(history.name for history in histories),
        ahead=list(zip(ahead, drawn_ahead, strict=True)),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        summary=_summary(histories) if histories else None,
        pictures=pictures,
        sources=_sources(histories) if histories else ([], []),
        answers=_answers(histories) if histories else ([], []),
        differences=_differences(histories),
    )


def _pictures(histories: list[History]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield headings with their figures, or None, by caption."""
    if not histories:
        return
    line, family = figures.line_figure, figures.family_figure
    unit = names.unit_of(histories[0].records[-1])
    over_steps = (
        "Loss over optimizer steps. Thin: every step; thick: running mean; dots: validation; triangles: checkpoints; "
        "dotted: what else happened, red where something went wrong."
    )
    yield (
        "Loss",
        {
            over_steps: figures.loss_figure(histories, names.STEP),
            f"The same over {unit}.": figures.loss_figure(histories, unit),
        },
    )
    grad_norm = line(histories, names.GRAD_NORM, "gradient norm", smooth=True, log=True)
    yield (
        "Optimization",
        {
            "Global gradient norm before clipping.": grad_norm,
            "Learning rate.": line(histories, names.LR, "learning rate"),
        },
    )
    own = {key.removeprefix("train/") for history in histories for key in history.family("train")}
    own |= {key for history in histories for event in history.events_of("validation") for key in task_metrics(event)}
    own -= {names.LOSS, names.TRAIN_PERPLEXITY.removeprefix("train/")}
    curves = {
        f"{key}: line in training, dots in validation.": line(
            histories, f"train/{key}", key, smooth=True, validated=key
        )
        for key in sorted(own)
    }
    yield "Metrics", curves
    speed = line(histories, f"{unit}_per_second", f"{unit} per second", smooth=True)
    mfu = line(histories, names.MFU_CAUSAL, "MFU (%), causal", scale=100)
    waits = line(histories, names.DATA_WAIT_FRACTION, "waiting for data (%)", scale=100)
    yield (
        "Speed",
        {
            f"{unit.capitalize()} per second, all devices together.": speed,
            "Model FLOPs utilisation, attention counted causally.": mfu,
            "Share of the time in which rank 0 waited for data.": waits,
        },
    )
    for history in histories[:_DETAILED_RUNS]:
        ratios = family(history, names.LAYER_UPDATE_RATIO, "update ratio", log=True)
        yield (
            f"Inside {history.name}",
            {
                "Where a step's time goes.": figures.breakdown_figure(history),
                "Memory.": figures.memory_figure(history),
                "Gradient norm per layer.": family(history, names.LAYER_GRAD_NORM, "gradient norm", log=True),
                "Size of an update relative to its weights, per layer.": ratios,
                f"{unit.capitalize()} from each source of data.": family(history, f"data/{unit}", unit),
                "Passes over each source of data.": family(history, names.SOURCE_EPOCHS, "passes"),
            },
        )


def _summary(histories: list[History]) -> Table:
    columns = [_facts(history) for history in histories]
    rows = [[key, *(column.get(key, "") for column in columns)] for key in columns[0]]
    head = ["", *(history.name if len(histories) > 1 else "" for history in histories)]
    return head, [row for row in rows if any(row[1:])]


def _facts(history: History) -> dict[str, str]:
    last, config, launches = history.records[-1], history.config, history.launches()
    unit = names.unit_of(last)
    launch = launches[-1] if launches else {}
    environment = launch.get("environment", {})
    commit = environment.get("commit", "")
    state, _, why = history.state.partition(": ")
    steps, total = last[names.STEP], config.get("train.steps")
    validations, tests = history.events_of("validation"), history.events_of("test")
    best = history.standing
    profiles, train_seconds, held = history.events_of("profile"), history.train_seconds(), history.held_seconds()
    goodput = f"{min(train_seconds / held, 1):.1%} of {format_duration(held)}" if held else ""
    mfu, waited = _median(history, names.MFU_CAUSAL), math.fsum(history.series(names.DATA_WAIT_SECONDS)[1])
    shared = [f", parallel.{name}={size}" for name in AXES if (size := config.get(f"parallel.{name}", 1)) > 1]
    return {
        "state": f"{state} after step {steps:,}{f' of {total:,}' if total else ''}{f': {redact(why)}' if why else ''}",
        "task": str(config.get("task.kind", "")),
        "model": str(config.get("model.name", "")),
        unit: format_count(number(last, unit)),
        "last loss": _number(number(last, names.LOSS)),
        "last validation": describe_metrics(validations[-1]) if validations else "",
        "best validation": f"{best['metric']} {best['best']:.4g} after step {best['best_step']:,}" if best else "",
        "test": describe_metrics(tests[-1]) if tests else "",
        f"{unit} per second": format_count(_median(history, f"{unit}_per_second")),
        "MFU, causal": f"{mfu:.1%}; peak: {launch.get('peak_source', 'unknown')}" if mfu == mfu else "",
        "time in steps": format_duration(train_seconds),
        "waiting for data": f"{waited / train_seconds:.1%} of that" if train_seconds else "",
        "communication": describe_communication(profiles[-1]).removeprefix("communication ") if profiles else "",
        "goodput": goodput,
        "energy": _energy(history, launch.get("world_size", 1)),
        "launches": str(len(launches) or ""),
        "engine": f"{config.get('engine.kind', '')}{''.join(shared)}",
        "devices": f"{launch.get('world_size')} x {environment['device']}" if "device" in environment else "",
        "commit": f"{commit[:12]}{'+' * commit.endswith('+')}",
        "packages": ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items()),
    }


def _median(history: History, key: str) -> float:
    values = [value for value in history.series(key)[1] if math.isfinite(value)]
    return statistics.median(values) if values else math.nan


def _energy(history: History, world_size: int) -> str:
    """Return what rank 0's device has used in all launches, each of which counts from 0; empty if none has said so."""
    _, joules = history.series(names.ENERGY_JOULES)
    used = sum(after - before if after >= before else after for before, after in itertools.pairwise([0.0, *joules]))
    others = f"; {used * world_size / 1e3:.4g} kJ if all {world_size} are alike" if world_size > 1 else ""
    return f"{used / 1e3:.4g} kJ of rank 0's device{others}" if joules else ""


def _sources(histories: list[History]) -> Table:
    rows = []
    for history in histories:
        unit = names.unit_of(history.records[-1])
        drawn = {
            key.removeprefix(f"data/{unit}/"): history.series(key)[1][-1] for key in history.family(f"data/{unit}")
        }
        for name, count in drawn.items():
            _, passes = history.series(f"{names.SOURCE_EPOCHS}/{name}")
            cells = [name, format_count(count), f"{count / max(sum(drawn.values()), 1):.1%}"]
            rows.append([history.name, *cells, f"{passes[-1]:.3g}" if passes else ""])
    first = 0 if len(histories) > 1 else 1
    unit = names.unit_of(histories[0].records[-1])
    return ["run", "source", unit, "share", "passes"][first:], [row[first:] for row in rows]


def _differences(histories: list[History]) -> Table:
    rows = [[key, *("" if value is None else str(value) for value in values)] for key, values in differences(histories)]
    return ["setting", *(history.name for history in histories)], rows


def _answers(histories: list[History]) -> Table:
    """Return what several runs have made, at last, of the prompts that all of them had."""
    texts = [{str(made.get("prompt")): str(made.get("text")) for made in history.samples} for history in histories]
    common = [prompt for prompt in texts[0] if len(texts) > 1 and all(prompt in of_run for of_run in texts)]
    rows = [[prompt, *(of_run[prompt].strip() for of_run in texts)] for prompt in common[-_MAX_SAMPLES:]]
    return ["prompt", *(history.name for history in histories)], rows


def _events(history: History) -> list[list[str]]:
    shown = [event for event in history.events if event.get("event") not in ("validation", "checkpoint", "written")]
    rows = []
    for event in shown[-_MAX_EVENTS:]:
        when, step, kind = (str(event.get(key, "")) for key in (names.TIME, names.STEP, "event"))
        rows.append([when[:19].replace("T", " "), step, kind, _details(event)])
    return rows


def _details(event: dict[str, Any]) -> str:
    hidden = {"event", names.TIME, names.STEP, "environment", "launched_at", "peak_source"}
    known = {
        key: "; ".join(map(str, value)) if isinstance(value, list) else _plain(value)
        for key, value in event.items()
        if key not in hidden and "flops" not in key and value not in ("", None, 0)
    }
    return redact(", ".join(f"{key} {value}" for key, value in known.items()))


def _classification(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what a classifier got right and wrong; empty for a run that has written no confusion matrix."""
    if not facts:
        return {}
    labels, counts = facts["labels"], facts["confusion"]
    confused = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count]
    pairs = [[labels[i], labels[j], count] for count, i, j in sorted(confused, reverse=True)[:_MAX_PAIRS]]
    wrong = [
        (f"{labels[item['label']]} → {labels[item['predicted']]}", f"{item['probability']:.2f}", _png(item))
        for item in facts["wrong"]
    ]
    right, total = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    found = {"step": facts["step"], "labels": labels, "counts": counts, "right": right, "total": total}
    return found | {"wrong": wrong, "pairs": pairs if len(counts) > _MAX_CLASSES else None}


def _png(image: dict[str, Any]) -> str:
    from PIL import Image  # matplotlib, which draws the other figures, brings it along

    height, width, channels = image["shape"]
    picture = Image.frombytes("L" if channels == 1 else "RGB", (width, height), base64.b64decode(image["pixels"]))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not a number"
