"""The page of ``bigtrain explain``: tokens and pixels, coloured by what they add to the odds of the predicted label."""

import base64
import io
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.telemetry.figures import several_figure
from bigtrain.telemetry.report import Section, render

_BLUE, _RED = (59, 130, 246), (220, 38, 38)  # adds to the odds of the label, takes from them


def render_explained(facts: dict[str, Any]) -> str:
    """Return the page as HTML, of what :func:`bigtrain.run.explaining.explain` returns."""
    names = facts["labels"]
    ahead = []
    if deleted := facts.get("deletion"):
        curves = {m: [count / deleted["samples"] for count in right] for m, right in deleted["right"].items()}
        shares = [100 * share for share in deleted["shares"]]
        caption = (
            f"Accuracy of {deleted['samples']} held-out samples without their most important units, or random ones."
        )
        ahead.append(
            Section(
                "What deleting costs",
                draw=lambda: {caption: several_figure(shares, curves, "units left out (%)", "accuracy")},
            )
        )
    for sample in facts["samples"]:
        label = str(names[sample["predicted"]] if names else sample["predicted"])
        true = sample.get("label")
        said = f"predicted {label} ({sample['probability']:.2f})"
        said += "" if true is None else f", label {names[true] if names else true}"
        draw = _pixels if "pixels" in sample else _tokens
        markup = "".join(draw(sample, method, values) for method, values in sample["importance"].items())
        markup = f'<div class="wrong">{markup}</div>' if "pixels" in sample else markup
        ahead.append(Section(f"Sample {sample['index']}", text=said, markup=markup))
    return render([], title=f"Explained: {facts['run']}", ahead=ahead)


def _tokens(sample: dict[str, Any], method: str, values: list[float]) -> str:
    largest = max(map(abs, values), default=0) or 1
    spans = []
    for token, value in zip(sample["tokens"], values, strict=True):
        red, green, blue = _BLUE if value > 0 else _RED
        style = f"background: rgb({red} {green} {blue} / {abs(value) / largest:.2f})"
        spans.append(f'<span style="{style}" title="{value:.4g}">{escape(token)}</span>')
    return f'<p class="soft">{method}</p><pre>{"".join(spans)}</pre>'


def _pixels(sample: dict[str, Any], method: str, values: list[float]) -> str:
    pixels_CHW = np.array(sample["pixels"], dtype=np.float32)
    grey_HW = pixels_CHW.mean(axis=0)
    grey_HW = 255 * (grey_HW - grey_HW.min()) / (np.ptp(grey_HW) or 1)
    share_HW = np.array(values).reshape(grey_HW.shape)
    share_HW = share_HW / (abs(share_HW).max() or 1)
    colour_HWC = np.where(share_HW[..., None] > 0, _BLUE, _RED)
    weight_HW1 = 0.85 * abs(share_HW)[..., None]
    mixed = (1 - weight_HW1) * grey_HW[..., None] + weight_HW1 * colour_HWC
    png = _png(mixed.round().astype(np.uint8))
    return f'<figure><img alt="{method}" src="data:image/png;base64,{png}"><figcaption>{method}</figcaption></figure>'


def _png(pixels_HWC: NDArray[np.uint8]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
