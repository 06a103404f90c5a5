"""One page about one or several runs: a file with everything in it, to be sent to somebody."""

import html
import math
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bigtrain.redact import redact
from bigtrain.telemetry import figures, names
from bigtrain.telemetry.history import QUIET_EVENTS, History, differences, totals
from bigtrain.telemetry.text import describe_communication, format_count, format_duration

_MAX_EVENTS = 60
_MAX_SAMPLES = 12
_DETAILED_RUNS = 4  # with pictures of their own

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #808890; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; break-inside: avoid; } figcaption { color: var(--soft); font-size: .85rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } td:last-child { overflow-wrap: anywhere; }
@media (min-width: 40rem) { td:first-child { white-space: nowrap; } }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: .75rem; margin: .5rem 0; }
mark { background: #3b82f633; color: inherit; } .soft { color: var(--soft); }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .pictures { grid-template-columns: 1fr 1fr; }
  h2 { break-after: avoid; } :root { color-scheme: light; } }
"""


def write_report(histories: list[History], path: Path) -> None:
    """Write the page about ``histories`` to ``path``; it needs no network.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(histories), encoding="utf-8")


def render(histories: list[History]) -> str:
    """Return the page as text."""
    title = ", ".join(history.name for history in histories)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with figures.drawing():
        pictures = [_section(heading, drawn) for heading, drawn in _pictures(histories)]
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">Made by bigtrain from the files of the run{"s" * (len(histories) > 1)} on {made}.</p>',
        _summary(histories),
        *pictures,
        _differences(histories),
        *(_events(history) for history in histories),
        *(_samples(history) for history in histories),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{_STYLE}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(body)}\n</body></html>\n'


def _pictures(histories: list[History]) -> Iterable[tuple[str, list[tuple[str, Any]]]]:
    """Yield (heading, (caption, figure or None) pairs)."""
    line, family = figures.line_figure, figures.family_figure
    yield (
        "Loss",
        [
            (
                "Loss over optimizer steps. Thin: every step; thick: running mean; dots: validation; dotted: events.",
                figures.loss_figure(histories, names.STEP),
            ),
            ("The same over tokens.", figures.loss_figure(histories, names.TOKENS)),
        ],
    )
    yield (
        "Optimization",
        [
            (
                "Global gradient norm before clipping.",
                line(histories, names.GRAD_NORM, "gradient norm", smooth=True, log=True),
            ),
            ("Learning rate.", line(histories, names.LR, "learning rate")),
        ],
    )
    yield (
        "Speed",
        [
            (
                "Tokens per second, all devices together.",
                line(histories, names.TOKENS_PER_SECOND, "tokens per second", smooth=True),
            ),
            (
                "Model FLOPs utilisation, attention counted causally.",
                line(histories, names.MFU_CAUSAL, "MFU (%), causal", scale=100),
            ),
        ],
    )
    for history in histories[:_DETAILED_RUNS]:
        yield (
            f"Inside {history.name}",
            [
                ("Where a step's time goes.", figures.breakdown_figure(history)),
                ("Memory.", figures.memory_figure(history)),
                ("Gradient norm per layer.", family(history, names.LAYER_GRAD_NORM, "gradient norm", log=True)),
                (
                    "Size of an update relative to its weights, per layer.",
                    family(history, names.LAYER_UPDATE_RATIO, "update ratio", log=True),
                ),
                ("Passes over each source of data.", family(history, names.SOURCE_EPOCHS, "epochs")),
            ],
        )


def _section(heading: str, drawn: list[tuple[str, Any]]) -> str:
    shown = [(caption, figure) for caption, figure in drawn if figure is not None]
    if not shown:
        return ""
    pictures = [
        f"<figure>{figures.to_svg(figure, f'{_slug(heading)}{i}')}<figcaption>{_text(caption)}</figcaption></figure>"
        for i, (caption, figure) in enumerate(shown)
    ]
    return f'<h2>{_text(heading)}</h2><div class="pictures">{"".join(pictures)}</div>'


def _summary(histories: list[History]) -> str:
    columns = [_facts(history) for history in histories]
    rows = [[key, *(column.get(key, "") for column in columns)] for key in columns[0]]
    return _table(["", *(history.name for history in histories)], rows)


def _facts(history: History) -> dict[str, str]:
    total, config = totals(history, time.time()), history.config
    launch = history.launches()[-1] if history.launches() else {}
    environment = launch.get("environment", {})
    profiles = [event for event in history.events if event.get("event") == "profile"]
    mfu = "" if total.mfu is None else f"{total.mfu:.1%} of {launch.get('peak_source', '')}"
    return {
        "state": f"{total.state} after step {total.step:,}" + (f" of {total.num_steps:,}" if total.num_steps else ""),
        "model": str(config.get("model.name", "")),
        "tokens": format_count(total.tokens),
        "last loss": _number(total.loss),
        "last validation": ""
        if total.validation_loss is None
        else f"{_number(total.validation_loss)}, perplexity {_perplexity(total.validation_loss)}",
        "tokens per second": format_count(total.tokens_per_second),
        "MFU, causal": mfu,
        "communication": describe_communication(profiles[-1]).removeprefix("communication ") if profiles else "",
        "time in steps": format_duration(total.train_seconds),
        "goodput": ""
        if total.goodput is None
        else f"{total.goodput:.1%} of {format_duration(total.held_seconds)} in {total.num_launches} launches",
        "engine": f"{config.get('engine.kind', '')} on {launch.get('world_size', '?')} x {environment.get('device', '?')}",
        "commit": _short(str(environment.get("commit", ""))),
        "packages": ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items()),
    }


def _differences(histories: list[History]) -> str:
    if len(histories) < 2:
        return ""
    rows = [[key, *("" if value is None else str(value) for value in values)] for key, values in differences(histories)]
    table = _table(["setting", *(history.name for history in histories)], rows) if rows else "<p>None.</p>"
    return f"<h2>Differences of configuration</h2>{table}"


def _events(history: History) -> str:
    shown = [event for event in history.events if event.get("event") not in QUIET_EVENTS or event["event"] == "start"]
    if len(shown) < 2:
        return ""
    rows = [
        [
            str(event.get(names.TIME, ""))[:19].replace("T", " "),
            str(event.get(names.STEP, "")),
            str(event["event"]),
            _details(event),
        ]
        for event in shown[-_MAX_EVENTS:]
    ]
    return f"<h2>What happened to {_text(history.name)}</h2>{_table(['time (UTC)', 'step', 'event', ''], rows)}"


def _details(event: dict[str, Any]) -> str:
    hidden = {"event", names.TIME, names.STEP, "environment", "launched_at", "peak_source"}
    known = {
        key: f"{value:.4g}" if isinstance(value, float) else value
        for key, value in event.items()
        if key not in hidden and "flops" not in key and value not in ("", None)
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


def _table(head: list[str], rows: list[list[str]]) -> str:
    first = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{first}</tr>{rest}</table></div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _short(commit: str) -> str:
    """Return the beginning of a commit's hash, and the mark of changed files."""
    return commit[:12] + "+" * commit.endswith("+")


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not a number"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "infinite"


def _slug(heading: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in heading.lower())
