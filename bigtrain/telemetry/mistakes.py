"""The part of the report about a classifier: its confusion matrix, and the images that it got wrong."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from bigtrain.telemetry.history import History

STYLE = """
.confusion td { text-align: right; padding: .15rem .5rem; min-width: 2.2rem; } .confusion th { padding: .15rem .5rem; }
.wrong { display: flex; flex-wrap: wrap; gap: .75rem; } .wrong img { width: 5rem; height: 5rem; image-rendering: pixelated; }
"""
_MOST_CLASSES = 32  # of a matrix that is shown whole
_MOST_PAIRS = 20


def classification(history: History) -> str:
    """Return the section of a run, which is empty for one that has written no confusion matrix."""
    if not (facts := history.classification):
        return ""
    labels, counts = [html.escape(str(label)) for label in facts["labels"]], facts["confusion"]
    right, total = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    table = _matrix(labels, counts) if len(counts) <= _MOST_CLASSES else _pairs(labels, counts)
    told = f"Step {facts['step']}: {right} of {total} held-out samples right; a row per true label, a column per prediction."
    wrong = "".join(_picture(mistake, labels) for mistake in facts["wrong"])
    pictures = f'<p class="soft">Wrong, the surest first: true → predicted.</p><div class="wrong">{wrong}</div>'
    return f'<h2>Labels by {html.escape(history.name)}</h2><p class="soft">{told}</p>{table}{pictures if wrong else ""}'


def _matrix(labels: Sequence[str], counts: list[list[int]]) -> str:
    head = "".join(f"<th>{label}</th>" for label in ["", *labels])
    rows = [
        "".join(_cell(count, sum(row), is_right=i == j) for j, count in enumerate(row)) for i, row in enumerate(counts)
    ]
    body = "".join(f"<tr><th>{label}</th>{row}</tr>" for label, row in zip(labels, rows, strict=True))
    return f'<div class="wide"><table class="confusion"><tr>{head}</tr>{body}</table></div>'


def _cell(count: int, total: int, *, is_right: bool) -> str:
    """Return a cell whose colour is as strong as its share of the row."""
    colour, share = "59 130 246" if is_right else "220 38 38", count / max(total, 1)
    strength = share * 0.6 if is_right else min(5 * share, 0.8)
    return f'<td style="background: rgb({colour} / {strength:.2f})">{count or ""}</td>'


def _pairs(labels: Sequence[str], counts: list[list[int]]) -> str:
    pairs = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count]
    rows = "".join(
        f"<tr><td>{labels[i]}</td><td>{labels[j]}</td><td>{count}</td></tr>"
        for count, i, j in sorted(pairs, reverse=True)[:_MOST_PAIRS]
    )
    return f"<table><tr><th>true</th><th>predicted</th><th>samples</th></tr>{rows}</table>"


def _picture(mistake: dict[str, Any], labels: Sequence[str]) -> str:
    from PIL import Image  # matplotlib, which draws the other figures, brings it along

    height, width, channels = mistake["shape"]
    image = Image.frombytes("L" if channels == 1 else "RGB", (width, height), base64.b64decode(mistake["pixels"]))
    file = io.BytesIO()
    image.save(file, "PNG")
    told = f"{labels[mistake['label']]} → {labels[mistake['predicted']]}"
    source = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="{told}" src="data:image/png;base64,{source}">'
        f"<figcaption>{told}<br>{mistake['probability']:.2f}</figcaption></figure>"
    )
