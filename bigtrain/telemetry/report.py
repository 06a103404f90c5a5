"""One self-contained HTML page about one or several runs."""

import html
import math
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bigtrain.log import redact
from bigtrain.telemetry import figures, names
from bigtrain.telemetry.history import History, differences
from bigtrain.telemetry.mistakes import STYLE, classification
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
_DETAILED_RUNS = 4  # have pictures of their own

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #808890; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; break-inside: avoid; } figcaption { color: var(--soft); font-size: .85rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } td:last-child { overflow-wrap: anywhere; }
@media (min-width: 40rem) { td:first-child { white-space: nowrap; } }
@media (max-width: 40rem) {
  .facts, .facts tbody, .events, .events tbody { display: block; }
  .facts tr, .events tr { display: grid; column-gap: .75rem; border-bottom: 1px solid var(--line); padding: .3rem 0; }
  .facts tr { grid-template-columns: repeat(var(--runs), minmax(0, 1fr)); } .events tr { grid-template-columns: auto auto 1fr; }
  .facts td, .facts th, .events td { border: 0; padding: 0; overflow-wrap: anywhere; }
  .facts td:first-child, .events td:last-child { grid-column: 1 / -1; } .facts td:first-child { color: var(--soft); }
  .facts th:first-child, .events tr:first-child { display: none; }
}
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: .75rem; margin: .5rem 0; }
mark { background: #3b82f633; color: inherit; } .soft { color: var(--soft); }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .pictures { grid-template-columns: 1fr 1fr; }
  h2 { break-after: avoid; } :root { color-scheme: light; } }
"""


def write_report(histories: list[History], path: Path) -> None:
    """Write the page to ``path``; it needs no network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(histories), encoding="utf-8")


def render(histories: list[History]) -> str:
    """Return the page as HTML."""
    title = ", ".join(history.name for history in histories)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with figures.drawing():
        pictures = [_section(heading, drawn) for heading, drawn in _pictures(histories)]
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">Made by bigtrain from the files of the run{"s" * (len(histories) > 1)} on {made}.</p>',
        _summary(histories),
        *pictures,
        *(classification(history) for history in histories),
        _sources(histories),
        _differences(histories),
        *(_events(history) for history in histories),
        *(_samples(history) for history in histories),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{_STYLE}{STYLE}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(body)}\n</body></html>\n'


def _pictures(histories: list[History]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield headings with their figures, or None, by caption."""
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


def _section(heading: str, drawn: dict[str, Any]) -> str:
    pictures = [
        f"<figure>{figures.to_svg(figure, f'{_slug(heading)}{i}')}<figcaption>{_text(caption)}</figcaption></figure>"
        for i, (caption, figure) in enumerate(drawn.items())
        if figure is not None
    ]
    return f'<h2>{_text(heading)}</h2><div class="pictures">{"".join(pictures)}</div>' if pictures else ""


def _summary(histories: list[History]) -> str:
    columns = [_facts(history) for history in histories]
    rows = [[key, *(column.get(key, "") for column in columns)] for key in columns[0]]
    head = ["", *(history.name if len(histories) > 1 else "" for history in histories)]
    return _table(head, [row for row in rows if any(row[1:])], "facts")


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
    return {
        "state": f"{state} after step {steps:,}{f' of {total:,}' if total else ''}{f': {redact(why)}' if why else ''}",
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
        "launches": str(len(launches) or ""),
        "engine": str(config.get("engine.kind", "")),
        "devices": f"{launch.get('world_size')} x {environment['device']}" if "device" in environment else "",
        "commit": f"{commit[:12]}{'+' * commit.endswith('+')}",
        "packages": ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items()),
    }


def _median(history: History, key: str) -> float:
    values = [value for value in history.series(key)[1] if math.isfinite(value)]
    return statistics.median(values) if values else math.nan


def _sources(histories: list[History]) -> str:
    """Return the table of data sources as of the last logging step."""
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
    if not rows:
        return ""
    first = 0 if len(histories) > 1 else 1
    head = ["run", "source", unit, "share", "passes"][first:]
    return f"<h2>Data by source</h2>{_table(head, [row[first:] for row in rows])}"


def _differences(histories: list[History]) -> str:
    if len(histories) < 2:
        return ""
    rows = [[key, *("" if value is None else str(value) for value in values)] for key, values in differences(histories)]
    table = _table(["setting", *(history.name for history in histories)], rows, "facts") if rows else "<p>None.</p>"
    return f"<h2>Differences of configuration</h2>{table}"


def _events(history: History) -> str:
    shown = [event for event in history.events if event.get("event") not in ("validation", "checkpoint")]
    if len(shown) < 2:
        return ""
    rows = []
    for event in shown[-_MAX_EVENTS:]:
        when, step, kind = (str(event.get(key, "")) for key in (names.TIME, names.STEP, "event"))
        rows.append([when[:19].replace("T", " "), step, kind, _details(event)])
    table = _table(["time (UTC)", "step", "event", ""], rows, "events")
    return f"<h2>What happened to {_text(history.name)}</h2>{table}"


def _details(event: dict[str, Any]) -> str:
    hidden = {"event", names.TIME, names.STEP, "environment", "launched_at", "peak_source"}
    known = {
        key: "; ".join(map(str, value)) if isinstance(value, list) else _plain(value)
        for key, value in event.items()
        if key not in hidden and "flops" not in key and value not in ("", None, 0)
    }
    return redact(", ".join(f"{key} {value}" for key, value in known.items()))


def _samples(history: History) -> str:
    if not history.samples:
        return ""
    texts = [
        f'<p class="soft">step {sample.get(names.STEP, "?")}</p>'
        f"<pre><mark>{_text(sample.get('prompt', ''))}</mark>{_text(sample.get('text', ''))}</pre>"
        for sample in history.samples[-_MAX_SAMPLES:]
    ]
    return f"<h2>Text by {_text(history.name)}</h2>{''.join(texts)}"


def _table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    first = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="{kind}" style="--runs:{len(head) - 1}"><tr>{first}</tr>{rest}</table></div>'
    )


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not a number"


def _slug(heading: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in heading.lower())
